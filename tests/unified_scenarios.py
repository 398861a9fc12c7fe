"""What a test of a unified server lets happen in its engine's process: each function is called there."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final
from unittest.mock import patch

from sgl_flowprefill.policy import Act, Limits
from sgl_flowprefill.policy.colocated import Turn
from tests.late_device import LateDevice
from tests.prompts import prompt
from tests.unified_asks import Ask
from tests.unified_engine import UnifiedEngine, state_of
from tests.unified_rounds import Play

STREAM: Final = Ask(tuple(prompt(501, 60)), 40, (("ignore_eos", True),), tbt_slo_s=5.0)
"""A request that decodes while others are prefilled, which on a slow machine too are done before it."""
LONG: Final = Ask(tuple(prompt(502, 1800)), 6, (("ignore_eos", True),), ttft_slo_s=60.0)
URGENT: Final = Ask(tuple(prompt(503, 500)), 4, (("ignore_eos", True),), ttft_slo_s=1.0)

TIGHT_TOKENS: Final = 1500
"""KV cache of an engine for what follows."""
GROWING: Final = {f"s{i}": Ask(tuple(prompt(700 + i, 200)), 500, (("min_new_tokens", 500),)) for i in range(2)}
"""Streams of which admission takes it that they may end early, and which do not: 1,400 tokens in the end."""
LATE: Final = {"late": Ask(tuple(prompt(710, 300)), 4, (("ignore_eos", True),))}
"""A prompt that is admitted beside them, and does not fit in the end."""
RESERVED: Final = {f"a{i}": Ask(tuple(prompt(720 + i, 100)), 180, (("ignore_eos", True),)) for i in range(6)}
"""Requests that take 1,680 tokens of KV cache in the end, and 600 at first."""


def serve(engine: UnifiedEngine, asked: Mapping[str, Ask]) -> Play:
    """Submit all of ``asked`` at once, and let the policy decide."""
    _anew(engine)
    for rid, ask in asked.items():
        engine.submit(rid, ask)
    return _played(engine)


def _anew(engine: UnifiedEngine) -> None:
    engine.forget()
    engine.seen.clear()
    engine.hub.work.policy.limits = Limits(max_suspended=100, max_batch_tokens=1)


def _played(engine: UnifiedEngine, left: set[str] | None = None) -> Play:
    engine.run()
    engine.assert_clean()
    return Play(dict(engine.answers), left or set(), Counter(engine.seen))


def _until(engine: UnifiedEngine, condition: Callable[[], bool], turns: int = 50_000) -> None:
    for _ in range(turns):
        if condition():
            return
        engine.turn()
    raise AssertionError(f"not after {turns} turns")


def _suspend_all_the_time(engine: UnifiedEngine) -> None:
    """A task comes back at each interruption point."""
    engine.hub.executor.interrupted = lambda: True


def _calm(engine: UnifiedEngine) -> None:
    engine.hub.executor.interrupted = engine.hub.has_news


# ---- aborts ----------------------------------------------------------------------------------------------------------


def _compiling(engine: UnifiedEngine) -> None:
    may_end = threading.Event()
    backend = engine.scheduler.grammar_manager.grammar_backend
    compile_it = backend._init_value_dispatch

    def compile_late(*key: Any) -> Any:
        may_end.wait(30.0)
        return compile_it(*key)

    with patch.object(backend, "_init_value_dispatch", compile_late):
        engine.submit("goes", Ask(LONG.prompt, 6, (("regex", f"[a-z]{{{time.monotonic_ns() % 7 + 1}}}.*"),)))
        engine.turn()
        engine.seen[state_of(engine, "goes")] += 1
        engine.abort("goes")
        may_end.set()
        _until(engine, lambda: "goes" in engine.answers)


def _waiting(engine: UnifiedEngine) -> None:
    engine.submit("goes", LONG)


def _running(engine: UnifiedEngine) -> None:
    _suspend_all_the_time(engine)
    engine.submit("goes", LONG)
    _until(engine, lambda: state_of(engine, "goes") == "running" and engine.hub.executor.points > 0)
    engine.turn()


def _suspended(engine: UnifiedEngine) -> None:
    _running(engine)
    engine.submit("urgent", URGENT)
    _until(engine, lambda: state_of(engine, "goes") == "suspended")


def _result_on_its_way(engine: UnifiedEngine) -> None:
    hub = engine.hub
    hub.device = hub.executor.device = hub.role.device = LateDevice(0, seed=1, pass_probability=0.001)
    engine.submit("goes", URGENT)
    _until(engine, lambda: state_of(engine, "goes") == "result on its way")


def _joining(engine: UnifiedEngine) -> None:
    engine.submit("goes", URGENT)
    _until(engine, lambda: state_of(engine, "goes") == "joining")


def _decoding(engine: UnifiedEngine) -> None:
    engine.submit("goes", Ask(URGENT.prompt, 30, URGENT.sampling))
    _until(engine, lambda: state_of(engine, "goes") == "decoding")


def _retracted(engine: UnifiedEngine) -> None:
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

    _decoding(engine)
    engine.receive(PauseGenerationReqInput(mode="retract"))
    engine.receive(ContinueGenerationReqInput())


def _given_back(engine: UnifiedEngine) -> None:
    _running(engine)
    [task] = [task for task in engine.hub.work.tasks.live if "goes" in task.rids]
    engine.hub.give_back(task, engine.hub.role)


STATES: Final[dict[str, Callable[[UnifiedEngine], None]]] = {
    "compiling": _compiling,
    "waiting": _waiting,
    "running": _running,
    "suspended": _suspended,
    "result on its way": _result_on_its_way,
    "joining": _joining,
    "decoding": _decoding,
    "retracted": _retracted,
    "given back": _given_back,
}
"""What brings the request ``goes`` into each state, while ``stays`` decodes."""


def abort_in(engine: UnifiedEngine, state: str) -> Play:
    """Abort a request in that state, while another decodes."""
    _anew(engine)
    device = engine.hub.device
    engine.submit("stays", STREAM)
    _until(engine, lambda: state_of(engine, "stays") == "decoding")
    try:
        STATES[state](engine)
        if state != "compiling":
            engine.seen[state_of(engine, "goes")] += 1
            engine.abort("goes")
    finally:
        hub = engine.hub
        hub.device = hub.executor.device = hub.role.device = device
        _calm(engine)
    return _played(engine, {"goes"})


def abort_all_with_everything_in_flight(engine: UnifiedEngine) -> Play:
    """Abort all requests at once, of which some are in each of several states."""
    from sglang.srt.managers.io_struct import AbortReq

    _anew(engine)
    engine.submit("stays", STREAM)
    _until(engine, lambda: state_of(engine, "stays") == "decoding")
    _suspended(engine)
    engine.submit("waits", LONG)
    for rid in ("stays", "goes", "urgent", "waits"):
        engine.seen[state_of(engine, rid)] += 1
    engine.receive(AbortReq(rid="", abort_all=True))
    _calm(engine)
    return _played(engine, {"stays", "goes", "urgent", "waits"})


# ---- pauses, flushes, weights, timeouts ------------------------------------------------------------------------------


def _in_the_middle(engine: UnifiedEngine) -> dict[str, Ask]:
    """A stream decodes, a prefill is suspended, and one that has run joins."""
    asked = {"stays": STREAM, "goes": LONG, "urgent": URGENT}
    _anew(engine)
    engine.submit("stays", STREAM)
    _until(engine, lambda: state_of(engine, "stays") == "decoding")
    _suspended(engine)
    _until(engine, lambda: state_of(engine, "urgent") in ("joining", "decoding"))
    for rid in asked:
        engine.seen[state_of(engine, rid)] += 1
    _calm(engine)
    return asked


@dataclass
class Paused:
    play: Play
    asked: dict[str, Ask]
    live: int
    """Started prefills in the pause."""
    answered: int
    """Requests that got something in the pause."""
    retracted: int
    unanswered: int
    """Requests that had not ended when the pause began."""


def pause(engine: UnifiedEngine, mode: str) -> Paused:
    """Pause in the middle of everything, and go on."""
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

    asked = _in_the_middle(engine)
    before = engine.hub.role.retractions
    engine.receive(PauseGenerationReqInput(mode=mode))
    streamed = dict(engine.streamed)
    for _ in range(20):
        engine.turn()
    live = len(engine.hub.work.tasks)
    answered = sum(engine.streamed[rid] != streamed[rid] for rid in streamed)
    unanswered = len(asked) - len(engine.answers)
    engine.receive(ContinueGenerationReqInput())
    return Paused(_played(engine), asked, live, answered, engine.hub.role.retractions - before, unanswered)


def flush_while_busy(engine: UnifiedEngine) -> tuple[Play, dict[str, Ask], bool]:
    """Whether a flush succeeds in the middle of everything."""
    asked = _in_the_middle(engine)
    flushed = bool(engine.scheduler.flush_cache())
    return _played(engine), asked, flushed


def change_weights(engine: UnifiedEngine) -> tuple[Play, dict[str, Ask], int]:
    """Other weights come in the middle of everything, and the old ones come back before anything else runs; how many
    prefills were under way when they came.
    """
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

    asked = _in_the_middle(engine)
    live: list[int] = []

    def ruin(recv_req: Any) -> None:
        live.append(len(engine.hub.work.tasks))

    mapping = engine.scheduler._request_dispatcher._mapping
    with patch.dict(mapping, {UpdateWeightFromDiskReqInput: ruin}):
        engine.receive(UpdateWeightFromDiskReqInput(model_path="other", load_format=None))
    return _played(engine), asked, live[0]


def time_out(engine: UnifiedEngine) -> Play:
    """A prefill is suspended for longer than SGLang lets requests run."""
    _anew(engine)
    _running(engine)
    with patch.dict(os.environ, SGLANG_REQ_RUNNING_TIMEOUT="0.05"):
        time.sleep(0.1)
        _until(engine, lambda: "goes" in engine.answers)
    _calm(engine)
    return _played(engine, {"goes"})


def loads(engine: UnifiedEngine) -> dict[str, int]:
    """What routers hear in the middle of everything."""
    _in_the_middle(engine)
    load = engine.scheduler.load_inquirer.get_loads()
    reqs = len(engine.scheduler.collect_inflight_reqs())
    _played(engine)
    return {"running": load.num_running_reqs, "waiting": load.num_waiting_reqs, "in flight": reqs}


# ---- decisions -------------------------------------------------------------------------------------------------------


@dataclass
class Gaps:
    play: Play
    asked: dict[str, Ask]
    longest_gap_s: float
    """Between two tokens of the stream, while the long prompt was prefilled."""
    prefill_s: float
    steps_inside: int


def stream_beside_a_long_prompt(engine: UnifiedEngine, tbt_slo_s: float) -> Gaps:
    """A stream with an objective, while a long prompt is prefilled: the policy decides."""
    _anew(engine)
    stream = Ask(STREAM.prompt, 120, STREAM.sampling, tbt_slo_s=tbt_slo_s)
    long = Ask(tuple(prompt(504, 6000)), 2, (("ignore_eos", True),), ttft_slo_s=60.0)
    asked = {"stream": stream, "long": long}
    engine.submit("stream", stream)
    _until(engine, lambda: state_of(engine, "stream") == "decoding")
    engine.submit("long", long)
    times, steps = [time.monotonic()], 0
    began_s = times[0]
    tokens = engine.streamed["stream"]
    while engine.streamed["long"] == 0:
        engine.turn()
        if engine.streamed["stream"] != tokens:
            tokens = engine.streamed["stream"]
            times.append(time.monotonic())
            steps += any(task.has_run for task in engine.hub.work.tasks.live)
    prefill_s = time.monotonic() - began_s
    longest_s = max(later - earlier for earlier, later in pairwise(times))
    return Gaps(_played(engine), asked, longest_s, prefill_s, steps)


def streams_without_room(engine: UnifiedEngine) -> Play:
    """Streams grow until they need the KV cache of a prefill that has started and does not get on."""
    _anew(engine)
    role = engine.hub.role
    before = Counter(retractions=role.retractions, given_back=role.given_back)
    for rid, ask in GROWING.items():
        engine.submit(rid, ask)
    _until(engine, lambda: all(state_of(engine, rid) == "decoding" for rid in GROWING))
    _suspend_all_the_time(engine)
    for rid, ask in LATE.items():
        engine.submit(rid, ask)
    _until(engine, lambda: state_of(engine, "late") in ("running", "suspended"))
    with patch.object(engine.hub.work.colocated, "next", lambda *_: Turn(Act.STEP)):
        _until(engine, lambda: role.given_back + role.retractions > before.total() or "s0" in engine.answers)
    _calm(engine)
    played = _played(engine)
    played.seen["given back"] = role.given_back - before["given_back"]
    played.seen["retractions"] = role.retractions - before["retractions"]
    return played


def starts_of_all_that_is_admitted(engine: UnifiedEngine) -> Play:
    """As many prefills are started as admission lets, before any of them goes on."""
    _anew(engine)
    role = engine.hub.role
    before = Counter(retractions=role.retractions, given_back=role.given_back)
    for rid, ask in RESERVED.items():
        engine.submit(rid, ask)
    _suspend_all_the_time(engine)
    with patch.object(engine.hub.work.colocated, "next", _starts_first(engine)):
        engine.run()
    _calm(engine)
    played = _played(engine)
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
