"""Adapters (LoRA) under suspensions at random places: more of them than the device has slots for.

Each answer is compared with that of transformers, which computes the prompt alone with the adapter merged into the
model's weights.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest

from tests.adapters import (
    ADAPTERS,
    NAMES,
    SLOTS,
    AdaptedPrefill,
    AdaptedRounds,
    AdaptedUnified,
    MergedComparison,
    assert_all_same,
    ids_of,
    references,
    total,
    write_adapters,
)
from tests.chaos import calm
from tests.engine import Engine
from tests.prompts import population, prompt
from tests.remote import Remote
from tests.unified_asks import Ask
from tests.unified_rounds import Rounds as UnifiedRounds

PROMPTS = population(40, longest_tokens=1500)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def remote(paths: list[str]) -> Iterator[Remote]:
    with closing(Remote(AdaptedPrefill, paths)) as remote:
        yield remote


@pytest.fixture(scope="module")
def unified(paths: list[str]) -> Iterator[Remote]:
    with closing(Remote(AdaptedUnified, paths)) as remote:
        yield remote


# ---- prefill servers -------------------------------------------------------------------------------------------------


@dataclass
class Played:
    """What became of some rounds."""

    text: str
    counts: Counter[str]
    seen: Counter[str]


def play(engine: AdaptedPrefill, rounds: int, first: int = 0) -> Played:
    """Rounds of prompts, each with an adapter or without one."""
    chance = AdaptedRounds(engine, None, PROMPTS)  # type: ignore[arg-type] - each request has its own comparison
    chance.comparison = chance.comparisons[None]
    engine.slots.counts.clear()
    for number in range(first, first + rounds):
        chance.play(random.Random(number))
        assert_all_same(chance.comparisons)
    chance.close()
    engine.assert_clean()
    counts = total(chance.comparisons)
    seen = chance.seen + engine.slots.counts
    compared = ", ".join(f"{count:,} {what}" for what, count in (*counts.items(), *seen.items()))
    return Played(f"compared with transformers and merged weights: {compared}", counts, seen)


def assert_played(played: Played, answers: int) -> None:
    print(played.text)
    counts, seen = played.counts, played.seen
    assert counts["answers"] == counts["KV caches"] >= answers
    assert counts["log probabilities"] >= 0.99 * answers
    assert seen["suspensions"] >= 3 * answers
    assert seen["adapters loaded beside suspended prefills"] >= answers // 5
    assert seen["adapters evicted"] >= answers // 5
    assert seen["times that requests waited for a slot"] >= answers
    assert all(seen[f"of adapter {name}"] >= answers // 20 for name in NAMES)


def test_suspended_prefills_keep_their_adapters(remote: Remote) -> None:
    assert_played(remote.call(play, 3), answers=10)


@pytest.mark.stress
def test_many_rounds_of_adapters_change_no_answer_and_no_kv(remote: Remote) -> None:
    assert_played(remote.call(play, 60, 1000), answers=280)


# ---- servers that decode, too ----------------------------------------------------------------------------------------


def asks(lora_ids: dict[str | None, str | None], count: int, seed: int) -> list[Ask]:
    rng = random.Random(seed)
    return [
        Ask(tuple(tokens), rng.randrange(1, 20), (("ignore_eos", True),), lora_id=lora_ids[rng.choice(NAMES)])
        for tokens in population(count, seed=seed, longest_tokens=1500)
    ]


def slots_of(engine: AdaptedUnified) -> Counter[str]:
    engine.assert_clean()
    return engine.slots.counts


def run_unified(unified: Remote, rounds: int, first: int, answers: int) -> None:
    comparison = MergedComparison(unified.call(ids_of))
    chance = UnifiedRounds(unified, comparison, asks(unified.call(ids_of), 60, seed=5))  # type: ignore[arg-type]
    chance.run(rounds, first)
    slots = unified.call(slots_of)
    print(f"{chance}; {', '.join(f'{count:,} {what}' for what, count in slots.items())}")
    assert comparison.counts["answers"] >= answers
    assert comparison.counts["log probabilities"] >= 3 * answers
    assert chance.seen["suspensions"] >= answers
    assert chance.seen["steps inside prefills"] >= 3 * answers
    assert slots["adapters loaded beside suspended prefills"] >= answers // 5
    assert slots["adapters evicted"] >= answers // 5


def test_decode_steps_between_operators_keep_the_adapters_apart(unified: Remote) -> None:
    run_unified(unified, 3, 0, answers=10)


@pytest.mark.stress
def test_many_rounds_of_adapters_and_decode_steps_change_no_answer(unified: Remote) -> None:
    run_unified(unified, 60, 1000, answers=240)


def serve_past(engine: AdaptedUnified, streams: list[Ask], blocked: Ask, others: list[Ask]) -> tuple[bool, list[str]]:
    """``streams`` take all slots, then ``blocked`` comes, and then ``others``, whose adapters are there. Whether the
    hub was told of the blocked one before the others had ended, and who ended in which order.
    """
    engine.assert_clean()
    engine.forget()
    for i, ask in enumerate(streams):
        engine.submit(f"stream{i}", ask)
    while len(engine.hub.role.streams) < len(streams):
        engine.turn()
    engine.submit("blocked", blocked)
    for i, ask in enumerate(others):
        engine.submit(f"other{i}", ask)
    while not all(f"other{i}" in engine.answers for i in range(len(others))):
        engine.turn()
    was_kept_out = [req.rid for req in engine.hub.role.kept_out] == ["blocked"]
    engine.run()
    engine.assert_clean()
    return was_kept_out, list(engine.answers)


def a_round_past(unified: Remote) -> tuple[list[Ask], Ask, list[Ask]]:
    lora_ids = unified.call(ids_of)
    long = Ask(tuple(prompt(1, 30)), 120, (("ignore_eos", True),))
    streams = [replace(long, lora_id=lora_ids[adapter.name]) for adapter in ADAPTERS[:SLOTS]]
    blocked = replace(streams[0], prompt=tuple(prompt(2, 30)), max_new_tokens=2, lora_id=lora_ids["e"], ttft_slo_s=0.1)
    others = [replace(one, prompt=tuple(prompt(3, 200)), max_new_tokens=2, ttft_slo_s=60.0) for one in streams]
    return streams, blocked, others


def test_a_request_whose_adapter_has_no_slot_stands_in_nobodys_way(unified: Remote) -> None:
    was_kept_out, ended = unified.call(serve_past, *a_round_past(unified))
    assert was_kept_out
    assert ended.index("blocked") > max(ended.index(f"other{i}") for i in range(SLOTS))


def drain(engine: AdaptedUnified, streams: list[Ask], blocked: Ask, more: Ask) -> list[str]:
    """``streams`` take all slots, and ``blocked`` waits beyond its time, while requests for one of their adapters keep
    coming. Who ended in which order.
    """
    engine.assert_clean()
    engine.forget()
    drainer = engine.hub.role.adapters._drainer
    usual, drainer.max_wait_time_secs = drainer.max_wait_time_secs, 0.0
    for i, ask in enumerate(streams):
        engine.submit(f"stream{i}", ask)
    while len(engine.hub.role.streams) < len(streams):
        engine.turn()
    engine.submit("blocked", blocked)
    for i in range(8):
        engine.submit(f"more{i}", more)
        for _ in range(20):
            engine.turn()
    engine.run()
    engine.assert_clean()
    drainer.max_wait_time_secs = usual
    return list(engine.answers)


@pytest.mark.stress
def test_an_adapter_that_others_wait_for_gets_a_slot_in_the_end(unified: Remote) -> None:
    streams, blocked, _ = a_round_past(unified)
    longer = [replace(streams[0], max_new_tokens=30), *(replace(one, max_new_tokens=250) for one in streams[1:])]
    more = replace(longer[0], prompt=tuple(prompt(4, 50)), max_new_tokens=50)
    ended = unified.call(drain, longer, blocked, more)
    assert ended.index("blocked") < ended.index("more7")
    assert ended.index("blocked") < min(ended.index("stream1"), ended.index("stream2"))


def unload_beside_a_suspended_prefill(engine: AdaptedPrefill) -> tuple[int, bool]:
    """Tasks that are live after another one's adapter has been unloaded, and whether that has left the device. It is
    loaded again then, and both answers are compared.
    """
    from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput, UnloadLoRAAdapterReqInput

    engine.assert_clean()
    comparisons = references()
    manager, lora_id = engine.scheduler.tp_worker.model_runner.lora_manager, engine.lora_ids["c"]
    path = manager.lora_refs[lora_id].lora_path
    asked = {"ended": ("c", prompt(8, 300)), "suspended": ("a", prompt(9, 300)), "again": ("c", prompt(10, 300))}
    engine.asked = {rid: name for rid, (name, _) in asked.items()}
    engine.submit("ended", asked["ended"][1], logprobs=True)
    engine.run()
    executor = engine.hub.executor
    usual, executor.interrupted = executor.interrupted, lambda: True
    engine.submit("suspended", asked["suspended"][1], logprobs=True)
    while not engine.hub.work.tasks.live:
        engine.turn()
    executor.interrupted = usual
    engine.receive(UnloadLoRAAdapterReqInput(lora_name="c", lora_id=lora_id))
    live, has_left = len(engine.hub.work.tasks.live), lora_id not in manager.memory_pool.uid_to_buffer_id
    engine.receive(LoadLoRAAdapterReqInput(lora_name="c", lora_path=path, lora_id=lora_id))
    engine.submit("again", asked["again"][1], logprobs=True)
    engine.run()
    for rid, (name, tokens) in asked.items():
        answer = engine.answers[rid]
        assert answer.token is not None
        assert answer.logprob is not None
        comparisons[name].answer(rid, tokens, [answer.token], [answer.logprob])
    assert_all_same(comparisons)
    assert total(comparisons)["log probabilities"] == len(asked)
    engine.assert_clean()
    return live, has_left


def test_an_adapter_is_unloaded_beside_a_suspended_prefill_of_another(remote: Remote) -> None:
    live, has_left = remote.call(unload_beside_a_suspended_prefill)
    assert live == 1
    assert has_left


# ---- defects ---------------------------------------------------------------------------------------------------------


def batch_is_not_restored(_: Engine) -> Any:
    """A prefill that is resumed finds what the LoRA backend kept of the forward pass that ran last."""
    return patch("sgl_flowprefill.runtime.forward_state.batch_state", lambda _: {})


def live_adapters_are_not_counted(engine: Engine) -> Any:
    """The slots of suspended prefills and of streams count as free."""
    return patch.object(engine.hub.role.adapters, "computed", lambda: ())


def slots_are_counted_and_not_kept(engine: Engine) -> Any:
    """A batch takes the slot of an adapter that a suspended prefill computes with, though others are free."""
    lora = engine.hub.role.adapters
    fetch = lora.manager.fetch_new_loras

    def fetched(new_loras: Any, running_loras: Any = ()) -> None:
        with patch.object(lora, "computed", lambda: ()):
            fetch(new_loras, running_loras)

    return patch.object(lora.manager, "fetch_new_loras", fetched)


def plant(engine: Engine, defect: Callable[[Engine], Any]) -> None:
    vars(engine)["planted"] = defect(engine)
    vars(engine)["planted"].start()


def take_out(engine: Engine) -> None:
    """Let an engine be as it was before a defect was planted and caught."""
    vars(engine).pop("planted").stop()
    if isinstance(engine, AdaptedPrefill):
        calm(engine)
        vars(engine.scheduler).pop("send_kv_chunk", None)
    engine.run()
    engine.assert_clean()


DEFECTS = (batch_is_not_restored, live_adapters_are_not_counted, slots_are_counted_and_not_kept)


@pytest.mark.stress
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_of_a_prefill_server_is_caught(remote: Remote, defect: Callable[[Engine], Any]) -> None:
    remote.call(plant, defect)
    with pytest.raises(AssertionError, match="not what transformers answers") as caught:
        remote.call(play, 10, 500)
    print(str(caught.value)[:300])
    remote.call(take_out)


@pytest.mark.stress
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_of_a_server_that_decodes_is_caught(unified: Remote, defect: Callable[[Engine], Any]) -> None:
    unified.call(plant, defect)
    with pytest.raises(AssertionError, match="not what transformers answers") as caught:
        run_unified(unified, 20, 500, answers=1)
    print(str(caught.value)[:300])
    unified.call(take_out)
