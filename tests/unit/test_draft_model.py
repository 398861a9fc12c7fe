"""What of a draft model belongs to a task, and what is refused beside it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch
from sglang.srt.runtime_context import get_flags
from torch import nn

from sgl_flowprefill.runtime.checkpoints import find_decoder_layers
from sgl_flowprefill.runtime.draft_model import draft_backend_of, kept_hidden_states, whole_model
from sgl_flowprefill.runtime.forward_state import ForwardState
from sgl_flowprefill.runtime.memory import Activations
from sgl_flowprefill.runtime.slots import AttentionSlots
from tests.unit.test_compat import problem


class RadixAttention(nn.Module):
    attn_type = SimpleNamespace(name="DECODER")


class LogitsProcessor(nn.Module):
    pass


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Sequential(RadixAttention())
        self.mlp = Mlp()


class Model(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.logits_processor = LogitsProcessor()


class Runner:
    """A model runner that makes attention backends."""

    def __init__(self, layers: int) -> None:
        self.model = Model(layers)
        self.attn_backend = self._get_attention_backend()
        self.lora_manager = None
        self.kv_index_translator = SimpleNamespace(bind_and_verify_backends=lambda backends: None)
        self.spec_aux_config = SimpleNamespace(eagle_use_aux_hidden_state=False, eagle_aux_hidden_state_layer_ids=None)

    def _get_attention_backend(self, init_new_workspace: bool = False) -> Any:
        return SimpleNamespace()


def server(with_draft: bool = True) -> Any:
    draft = SimpleNamespace(draft_worker=SimpleNamespace(draft_runner=Runner(1)))
    worker = SimpleNamespace(model_runner=Runner(2))
    return SimpleNamespace(tp_worker=worker, draft_worker=draft if with_draft else None)


def test_the_layers_of_the_draft_are_the_last_ones_of_a_forward_pass() -> None:
    names = [layer.name for layer in find_decoder_layers(whole_model(server()))]
    assert names == ["target.layers.0", "target.layers.1", "draft.layers.0"]
    alone = server(with_draft=False)
    assert whole_model(alone) is alone.tp_worker.model_runner.model


def test_each_task_has_an_attention_backend_for_the_draft_of_its_own() -> None:
    scheduler = server()
    target, draft = scheduler.tp_worker.model_runner, scheduler.draft_worker.draft_worker.draft_runner
    slots = AttentionSlots(target, None, draft_runner=draft)
    taken = [slots.take() for _ in range(3)]
    assert taken[0] is target.attn_backend
    drafts = [draft_backend_of(slot) for slot in taken]
    assert drafts[0] is draft.attn_backend
    assert len(set(map(id, [*taken, *drafts]))) == 6


def test_a_server_that_decodes_keeps_both_backends_for_that() -> None:
    scheduler = server()
    target, draft = scheduler.tp_worker.model_runner, scheduler.draft_worker.draft_worker.draft_runner
    slot = AttentionSlots(target, None, with_main=False, draft_runner=draft).take()
    assert slot is not target.attn_backend
    assert draft_backend_of(slot) is not draft.attn_backend
    assert draft_backend_of(target.attn_backend) is draft.attn_backend


def test_a_prefill_that_is_suspended_in_its_draft_takes_its_state_along(monkeypatch: pytest.MonkeyPatch) -> None:
    bags = {"get_forward": SimpleNamespace(_plain={}), "get_model": SimpleNamespace(shared_experts=None)}
    bags["get_model"]._set = lambda name, value: None
    for name, bag in bags.items():
        monkeypatch.setattr(f"sgl_flowprefill.runtime.forward_state.{name}", lambda bag=bag: bag)
    scheduler = server()
    target, draft = scheduler.tp_worker.model_runner, scheduler.draft_worker.draft_worker.draft_runner
    slots = AttentionSlots(target, None, with_main=False, draft_runner=draft)
    moe, own = get_flags().moe, draft.attn_backend
    before = moe.speculative_context
    hub = ForwardState.capture(target, draft_runner=draft)
    slot = slots.take()
    hub.with_backend(slot).install(target)
    assert (target.attn_backend, draft.attn_backend) == (slot, draft_backend_of(slot))
    moe.speculative_context = not before
    suspended = ForwardState.capture(target, draft_runner=draft)
    hub.install(target)
    assert (moe.speculative_context, draft.attn_backend) == (before, own)
    suspended.install(target)
    assert (moe.speculative_context, draft.attn_backend) == (not before, draft_backend_of(slot))
    hub.install(target)


def test_hidden_states_that_are_kept_for_the_draft_are_counted() -> None:
    scheduler = server()
    layers = scheduler.tp_worker.model_runner.spec_aux_config
    assert kept_hidden_states(server(with_draft=False)) == 0
    assert kept_hidden_states(scheduler) == 1
    layers.eagle_use_aux_hidden_state = True
    assert kept_hidden_states(scheduler) == 3
    layers.eagle_aux_hidden_state_layer_ids = [1, 5]
    assert kept_hidden_states(scheduler) == 2
    config = SimpleNamespace(
        hf_text_config=SimpleNamespace(intermediate_size=8),
        num_attention_heads=1,
        get_total_num_kv_heads=lambda: 1,
        head_dim=2,
        hidden_size=4,
        vocab_size=10,
    )
    alone, drafted = (Activations.of(config, torch.float16.itemsize, None, kept) for kept in (0, 2))
    assert drafted.suspended_bytes(10) - alone.suspended_bytes(10) == 10 * 2 * 4 * 2
    assert drafted.running_bytes(10) - alone.running_bytes(10) == 2 * 10 * 2 * 4 * 2


@pytest.mark.parametrize("algorithm", ["EAGLE", "EAGLE3", "NEXTN", "eagle3"])
def test_a_prefill_server_with_a_draft_starts(algorithm: str) -> None:
    assert problem(speculative_algorithm=algorithm, speculative_draft_model_path="draft") is None


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"speculative_algorithm": "STANDALONE"}, "--speculative-algorithm STANDALONE"),
        ({"speculative_algorithm": "EAGLE", "disaggregation_mode": "null"}, "--speculative-algorithm EAGLE"),
    ],
)
def test_another_draft_is_refused(options: dict[str, Any], given: str) -> None:
    text = problem(**options)
    assert text is not None
    assert text.startswith(f"{given} cannot work with FlowPrefill: ")
