"""Who keeps a slot for its adapter, and who waits for one: on a pool of slots without weights."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sgl_flowprefill.runtime.adapters import BATCH_STATE, EXPERTS, Adapters, LoRA, adapters, batch_state


class Request:
    """What of SGLang's Req is looked at."""

    def __init__(self, lora_id: str | None, waits_s: float = 0.0, tokens: int = 10) -> None:
        self.lora_id = lora_id
        self.output_ids: list[int] = []
        self.sampling_params = SimpleNamespace(max_new_tokens=tokens)
        self.time_stats = SimpleNamespace(wait_queue_entry_time=time.monotonic() - waits_s)


def manager(slots: int, resident: tuple[str | None, ...] = ()) -> Any:
    fetched: list[tuple[set[Any], set[Any]]] = []
    return SimpleNamespace(
        max_loras_per_batch=slots,
        memory_pool=SimpleNamespace(uid_to_buffer_id={uid: i for i, uid in enumerate(resident)}),
        validate_lora_batch=lambda ids: len(ids) <= slots,
        fetch_new_loras=lambda new, running=(): fetched.append((new, running)),
        fetched=fetched,
        lora_backend=SimpleNamespace(is_moe_lora=False),
    )


def test_what_is_computed_keeps_its_slot() -> None:
    pool = manager(3, resident=(None, "a", "b"))
    LoRA(pool, lambda: [Request("a"), Request("d")], 1.0)
    pool.fetch_new_loras({"c"})
    pool.fetch_new_loras({"c"}, {"e"})
    assert pool.fetched == [({"c"}, {"a"}), ({"c"}, {"a", "e"})], "d is not there yet, and needs no protection"


def test_requests_fit_while_there_are_slots_and_their_adapters_are_there() -> None:
    lora = LoRA(manager(2), list, 1.0)
    a, b, c, again, base = (Request(name) for name in ("a", "b", "c", "a", None))
    assert lora.fitting([a, b, c, again, base], []) == [a, b, again]
    assert lora.fitting([b, a], [Request("a")]) == [b, a]
    assert lora.fitting([c, base, a], [Request("a"), Request(None)]) == [base, a]
    assert lora.fitting([c], []) == [c]


def test_requests_without_a_slot_beside_streams_are_kept_out() -> None:
    lora = LoRA(manager(2), list, 60.0)
    blocked, passes = Request("c", 1.0), Request("a")
    assert lora.kept_out([blocked, passes], {Request("a"): 1, Request("b"): 2}) == {blocked}
    assert lora.kept_out([blocked, passes], {Request("a"): 1}) == set()


def test_the_adapter_with_least_to_do_takes_no_more_requests_when_others_have_waited() -> None:
    lora = LoRA(manager(2), list, 60.0)
    blocked, of_a, of_b, short = Request("c", 61.0), Request("a"), Request("b"), Request("b", tokens=1)
    streams = {Request("a", tokens=50): 1, Request("b", tokens=5): 2}
    assert lora.kept_out([blocked, of_a, of_b, short], streams) == {blocked, of_b}
    assert lora.kept_out([blocked, of_a, of_b], {Request("a"): 1}) == {of_b}, "b has ended, and its slot is for c"


def test_a_slot_that_has_been_drained_goes_to_who_has_waited_longest() -> None:
    lora = LoRA(manager(2), list, 60.0)
    blocked, urgent, of_a = Request("c", 61.0), Request("b"), Request("a")
    assert lora.kept_out([blocked, urgent, of_a], {Request("a"): 1}) == {urgent}
    assert lora.kept_out([urgent, of_a], {Request("a"): 1}) == set()


def test_a_request_that_waits_for_its_turn_alone_stops_no_adapter() -> None:
    lora = LoRA(manager(2), list, 60.0)
    streams = {Request("a"): 1, Request("b"): 2}
    assert lora.kept_out([Request("a", 100.0), Request("b", 100.0)], streams) == set()


def scheduler(enable: bool, pool: Any = None, drainer: Any = None) -> Any:
    runner = SimpleNamespace(lora_manager=pool)
    return SimpleNamespace(enable_lora=enable, lora_drainer=drainer, tp_worker=SimpleNamespace(model_runner=runner))


def test_sglangs_own_drainer_is_taken_away_and_its_time_kept() -> None:
    """It would be shown the requests of one batch as all that wait."""
    own = scheduler(True, manager(2), SimpleNamespace(max_wait_time_secs=7.0))
    found = adapters(own, list, 30.0)
    assert isinstance(found, LoRA)
    assert own.lora_drainer is None
    assert found.drain_after_s == 7.0
    assert adapters(scheduler(True, manager(2)), list, 30.0).drain_after_s == 30.0  # type: ignore[attr-defined]


def test_without_adapters_all_requests_fit() -> None:
    found = adapters(scheduler(False), list, 30.0)
    assert type(found) is Adapters
    assert found.fitting([1, 2], []) == [1, 2]
    assert batch_state(SimpleNamespace(lora_manager=None)) == {}


def test_adapters_of_experts_are_refused() -> None:
    pool = manager(2)
    pool.lora_backend.is_moe_lora = True
    with pytest.raises(SystemExit) as refusal:
        adapters(scheduler(True, pool), list, 30.0)
    assert refusal.value.code == EXPERTS


def test_all_that_a_backend_keeps_of_a_batch_is_known() -> None:
    """What SGLang clears for a forward pass without a batch; the rest belongs to DP attention, which is refused."""
    from sglang.srt.lora.backend.triton_backend import TritonLoRABackend

    backend = object.__new__(TritonLoRABackend)
    backend.reset_batch_state()
    of_dp_attention = {"global_batch_info", "global_sgemm_batch_info", "has_global_active_lora"}
    assert vars(backend).keys() - of_dp_attention == set(BATCH_STATE)
