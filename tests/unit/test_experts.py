"""Experts that are counted, that move, and that are split between ranks without an accelerator."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch
from sglang.srt.eplb import expert_distribution
from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.utils import Withable

from sgl_flowprefill.patches.experts_cpu import of_this_rank
from sgl_flowprefill.runtime import experts, rebalancing
from sgl_flowprefill.runtime.rebalancing import EPLB, Rebalancing

EXPERTS, HIDDEN, MIDDLE, TOKENS = 6, 8, 5, 40


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What SGLang's recorder keeps, counting in the middle of no pass."""
    metadata = SimpleNamespace()
    one = SimpleNamespace(
        recording=True,
        _recording=True,
        _record_current_pass=False,
        _current_layer_idx=Withable(),
        _expert_location_metadata=metadata,
        _single_pass_gatherers={"primary": SimpleNamespace(counts=torch.zeros(3), of=metadata)},
    )
    for module in (experts, rebalancing):
        monkeypatch.setattr(module, "get_global_expert_distribution_recorder", lambda: one)
    return one


def test_a_pass_that_begins_has_places_of_its_own_and_shares_where_experts_are(recorder: Any) -> None:
    of_none = experts.pass_state()
    own = experts.of_new_pass(of_none)
    assert own.keys() == of_none.keys() == {"_record_current_pass", "_current_layer_idx", "_single_pass_gatherers"}
    own["_single_pass_gatherers"]["primary"].counts += 1
    assert own["_single_pass_gatherers"]["primary"].of is recorder._expert_location_metadata
    with own["_current_layer_idx"].with_value(3):
        assert recorder._current_layer_idx.value is None
        experts.set_pass_state(own)
        assert recorder._current_layer_idx.value == 3
        experts.set_pass_state(of_none)
    assert recorder._single_pass_gatherers["primary"].counts.tolist() == [0, 0, 0]


def test_without_a_recorder_there_is_nothing_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    none = expert_distribution.ExpertDistributionRecorder()
    monkeypatch.setattr(experts, "get_global_expert_distribution_recorder", lambda: none)
    assert experts.of_new_pass(experts.pass_state()) == {}
    experts.keep_whole_passes()
    with experts.uncounted():
        assert not none.recording


class Manager:
    """Moves experts in two parts."""

    def __init__(self) -> None:
        self._rebalance_num_iterations = 3
        self.moved: list[int] = []

    def on_forward_pass_end(self) -> None:
        raise AssertionError("experts would move in the middle of the hub's tasks")

    def rebalance(self) -> Iterator[None]:
        self.moved.append(1)
        yield
        self.moved.append(2)


def test_experts_move_when_enough_passes_have_been_counted_and_nothing_is_suspended(recorder: Any) -> None:
    manager = Manager()
    moves = EPLB(manager)
    for _ in range(2):
        manager.on_forward_pass_end()
    recorder.recording = False  # what nobody has asked for
    manager.on_forward_pass_end()
    assert not moves.is_due
    recorder.recording = True
    manager.on_forward_pass_end()
    assert moves.is_due
    manager.on_forward_pass_end()  # of a task that has started
    assert manager.moved == []
    for _ in range(2):
        moves.move()
        assert manager.moved == [1, 2]
        assert not moves.is_due


def test_experts_stay_where_nothing_moves_them() -> None:
    scheduler = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=SimpleNamespace(eplb_manager=None)))
    moves = rebalancing.rebalancing(scheduler)
    assert type(moves) is Rebalancing
    moves.move()
    assert not moves.is_due


def test_ranks_that_have_some_of_the_experts_each_add_up_to_all() -> None:
    torch.manual_seed(0)
    w13, w2 = torch.randn(EXPERTS, 2 * MIDDLE, HIDDEN), torch.randn(EXPERTS, HIDDEN, MIDDLE)
    x, weights = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, 2)
    ids = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(TOKENS)])
    config = SimpleNamespace(apply_router_weight_on_input=False, activation="silu", gemm1_alpha=None)

    def compute(forward: Any, first: int, last: int, ranks: int, ids: torch.Tensor) -> torch.Tensor:
        layer = SimpleNamespace(
            num_experts=EXPERTS, moe_ep_size=ranks, w13_weight=w13[first:last], w2_weight=w2[first:last]
        )
        return torch.as_tensor(forward(layer, x, StandardTopKOutput(weights, ids, None), config))

    forward = of_this_rank(moe_forward_native)
    whole = compute(forward, 0, EXPERTS, 1, ids)
    parts = torch.zeros_like(whole)
    for first, last in ((0, 2), (2, 4), (4, 6)):
        own = torch.where((ids >= first) & (ids < last), ids - first, -1)
        parts += compute(forward, first, last, 3, own)
    assert float((parts - whole).abs().max()) < 1e-5
    nothing = compute(forward, 0, 2, 3, torch.full_like(ids, -1))
    assert nothing.shape == x.shape
    assert not nothing.any()
    with pytest.raises(RuntimeError, match="index -1 is out of bounds"):
        compute(moe_forward_native, 0, 2, 3, torch.where(ids < 2, ids, -1))
