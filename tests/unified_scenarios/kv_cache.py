"""Requests and streams for which there is hardly any KV cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Final
from unittest.mock import patch

from sgl_flowprefill.policy import Act
from sgl_flowprefill.policy.colocated import Turn
from tests.prompts import prompt
from tests.unified_asks import Ask
from tests.unified_engine import UnifiedEngine, state_of
from tests.unified_rounds import Play
from tests.unified_scenarios.common import (
    STREAM,
    URGENT,
    anew,
    calm,
    finish,
    late_device,
    suspend_all_the_time,
    until,
)

TIGHT_TOKENS: Final = 200
"""KV cache of an engine for what follows."""
GROWING: Final = {f"s{i}": Ask(tuple(prompt(700 + i, 25)), 65, (("min_new_tokens", 65),)) for i in range(2)}
"""Streams of which admission takes it that they may end early, and which do not: 180 tokens in the end."""
LATE: Final = {"late": Ask(tuple(prompt(710, 40)), 4, (("ignore_eos", True),))}
"""A prompt that is admitted beside them, and does not fit in the end."""
FREES: Final = {"frees": Ask(tuple(prompt(711, 10)), 1)}
"""A request that ends with its prefill."""
RESERVED: Final = {f"a{i}": Ask(tuple(prompt(720 + i, 12)), 26, (("ignore_eos", True),)) for i in range(6)}
"""Requests that take 228 tokens of KV cache in the end, and 72 at first."""
NO_ROOM: Final = Ask(tuple(prompt(750, TIGHT_TOKENS // 2)), 4, (("ignore_eos", True),), ttft_slo_s=100.0)
BEHIND: Final = Ask(tuple(prompt(751, 60)), 4, (("ignore_eos", True),), ttft_slo_s=600.0)
"""A request that is due after it."""
FIXED: Final = {
    "clipped": Ask(tuple(prompt(752, TIGHT_TOKENS - 60)), 1000, (("ignore_eos", True),)),
    "fits": Ask(tuple(prompt(753, TIGHT_TOKENS - 60)), 57, (("ignore_eos", True),)),
    "behind": BEHIND,
}
"""Answers of fixed lengths. SGLang clips the first one to one token more than its admission takes without a cache of
prefixes.
"""


def never_admitted(engine: UnifiedEngine) -> Play:
    """A request that SGLang's admission does not take, as it asks for a longer answer than when it arrived. While
    another holds KV cache, that may be the reason; then it is in front of one that would be taken.
    """
    anew(engine)
    hub = engine.hub
    engine.submit("stays", STREAM)
    until(engine, lambda: state_of(engine, "stays") == "decoding")
    usual, hub.stall_check_s = hub.stall_check_s, 0.0  # KV cache is asked for anew in each turn
    try:
        engine.submit("no room", NO_ROOM)
        [req] = engine.scheduler.waiting_queue
        req.sampling_params.max_new_tokens = 10_000
        engine.submit("behind", BEHIND)
        for _ in range(10):
            engine.turn()
        for rid in ("stays", "no room"):
            engine.seen[f"{rid}: {state_of(engine, rid)}"] += 1
        return finish(engine)
    finally:
        hub.stall_check_s = usual


def _grown(engine: UnifiedEngine) -> Counter[str]:
    """Streams that grow have begun, beside which no prefill gets on. What had been retracted and given back before."""
    anew(engine)
    role = engine.hub.role
    before = Counter(retractions=role.retractions, given_back=role.given_back)
    for rid, ask in GROWING.items():
        engine.submit(rid, ask)
    until(engine, lambda: all(state_of(engine, rid) == "decoding" for rid in GROWING))
    suspend_all_the_time(engine)
    return before


def _begun(engine: UnifiedEngine, rid: str) -> None:
    until(engine, lambda: state_of(engine, rid) in ("running", "suspended"))


def _step_until_kv_is_short(engine: UnifiedEngine, before: Counter[str], known: int = 0) -> Play:
    """Steps alone, until something more than the ``known`` has been given back or retracted; then all goes on."""
    role = engine.hub.role
    with patch.object(engine.hub.work.colocated, "next", lambda *_: Turn(Act.STEP)):
        until(engine, lambda: role.given_back + role.retractions > before.total() + known or "s0" in engine.answers)
    calm(engine)
    played = finish(engine)
    played.seen["given back"] = role.given_back - before["given_back"]
    played.seen["retractions"] = role.retractions - before["retractions"]
    return played


def streams_without_room(engine: UnifiedEngine) -> Play:
    """Streams grow until they need the KV cache of a prefill that has started and does not get on."""
    before = _grown(engine)
    for rid, ask in LATE.items():
        engine.submit(rid, ask)
    _begun(engine, "late")
    return _step_until_kv_is_short(engine, before)


def streams_without_room_again(engine: UnifiedEngine) -> Play:
    """As ``streams_without_room``, with a prefill that has given its KV cache back before."""
    before = _grown(engine)
    engine.submit("late", LATE["late"])
    _begun(engine, "late")
    [task] = engine.hub.work.tasks.live
    engine.hub.give_back(task)
    engine.submit("frees", FREES["frees"])
    _begun(engine, "late")
    return _step_until_kv_is_short(engine, before, known=1)


def last_stream_beside_a_result_on_its_way(engine: UnifiedEngine) -> tuple[Play, dict[str, Ask]]:
    """A step of the only stream needs KV cache, and a prefill that has run has the rest: its result has not come."""
    anew(engine)
    assert engine.scheduler.flush_cache()
    usual, allocator = engine.hub.device, engine.scheduler.token_to_kv_pool_allocator
    asked = {"stays": STREAM, "goes": Ask(URGENT.prompt, 1, URGENT.sampling, ttft_slo_s=20.0)}
    engine.submit("stays", STREAM)
    until(engine, lambda: state_of(engine, "stays") == "decoding")
    engine.use(late_device())
    engine.submit("goes", asked["goes"])
    until(engine, lambda: state_of(engine, "goes") == "result on its way")
    rest = allocator.alloc(int(allocator.available_size()))
    engine.step()
    engine.seen[f"goes: {state_of(engine, 'goes')}"] += 1
    allocator.free(rest)
    engine.use(usual)
    return finish(engine), asked


def starts_of_all_that_is_admitted(engine: UnifiedEngine) -> Play:
    """As many prefills are started as admission lets, before any of them goes on."""
    anew(engine)
    role = engine.hub.role
    before = Counter(retractions=role.retractions, given_back=role.given_back)
    for rid, ask in RESERVED.items():
        engine.submit(rid, ask)
    suspend_all_the_time(engine)
    with patch.object(engine.hub.work.colocated, "next", _starts_first(engine)):
        engine.run()
    calm(engine)
    played = finish(engine)
    played.seen["given back"] = role.given_back - before["given_back"]
    played.seen["retractions"] = role.retractions - before["retractions"]
    return played


def _starts_first(engine: UnifiedEngine) -> Callable[..., Any]:
    """All is started that is admitted, then all prefills run, then steps."""
    colocated = engine.hub.work.colocated

    def next_(now_s: float, running: Any, admit: bool = True) -> Any:
        waiting = colocated.prefills.first_waiting(now_s, 1000) if admit else []
        if waiting:
            return Turn(Act.START, min(waiting, key=lambda job: job.item.number))
        started = sorted(colocated.prefills.started, key=lambda job: job.item.id)
        if started:
            return Turn(Act.TASK, started[0])
        return Turn(Act.STEP if colocated.streams.requests else Act.NOTHING)

    return next_
