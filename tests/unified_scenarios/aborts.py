"""Requests whose clients leave, in each state in which a request can be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final
from unittest.mock import patch

from tests.unified_asks import Ask
from tests.unified_engine import UnifiedEngine, state_of
from tests.unified_rounds import Play
from tests.unified_scenarios.common import (
    LONG,
    STREAM,
    URGENT,
    anew,
    calm,
    finish,
    late_device,
    running,
    suspended,
    until,
)


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
        until(engine, lambda: "goes" in engine.answers)


def _waiting(engine: UnifiedEngine) -> None:
    engine.submit("goes", LONG)


def _result_on_its_way(engine: UnifiedEngine) -> None:
    engine.use(late_device())
    engine.submit("goes", URGENT)
    until(engine, lambda: state_of(engine, "goes") == "result on its way")


def _joining(engine: UnifiedEngine) -> None:
    engine.submit("goes", URGENT)
    until(engine, lambda: state_of(engine, "goes") == "joining")


def _decoding(engine: UnifiedEngine) -> None:
    engine.submit("goes", Ask(URGENT.prompt, 30, URGENT.sampling))
    until(engine, lambda: state_of(engine, "goes") == "decoding")


def _step_in_flight(engine: UnifiedEngine) -> None:
    _decoding(engine)
    engine.use(late_device())
    engine.step()


def _retracted(engine: UnifiedEngine) -> None:
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

    _decoding(engine)
    engine.receive(PauseGenerationReqInput(mode="retract"))
    engine.receive(ContinueGenerationReqInput())


def _given_back(engine: UnifiedEngine) -> None:
    running(engine)
    [task] = [task for task in engine.hub.work.tasks.live if "goes" in task.rids]
    since_s = time.monotonic()
    engine.hub.give_back(task)
    assert all(engine.hub.role.as_arrival(req).readable_s >= since_s for req in task.reqs), "nobody is blocked before"


STATES: Final[dict[str, Callable[[UnifiedEngine], None]]] = {
    "compiling": _compiling,
    "waiting": _waiting,
    "running": running,
    "suspended": suspended,
    "result on its way": _result_on_its_way,
    "joining": _joining,
    "decoding": _decoding,
    "step in flight": _step_in_flight,
    "retracted": _retracted,
    "given back": _given_back,
}
"""What brings the request ``goes`` into each state, while ``stays`` decodes."""


def abort_in(engine: UnifiedEngine, state: str) -> Play:
    """Abort a request in that state, while another decodes."""
    anew(engine)
    device = engine.hub.device
    engine.submit("stays", STREAM)
    until(engine, lambda: state_of(engine, "stays") == "decoding")
    try:
        STATES[state](engine)
        if state != "compiling":
            engine.seen[state_of(engine, "goes")] += 1
            engine.abort("goes")
    finally:
        engine.use(device)
        calm(engine)
    return finish(engine, {"goes"})


def abort_all_with_everything_in_flight(engine: UnifiedEngine) -> Play:
    """Abort all requests at once, of which some are in each of several states."""
    from sglang.srt.managers.io_struct import AbortReq

    anew(engine)
    engine.submit("stays", STREAM)
    until(engine, lambda: state_of(engine, "stays") == "decoding")
    suspended(engine)
    engine.submit("waits", LONG)
    for rid in ("stays", "goes", "urgent", "waits"):
        engine.seen[state_of(engine, rid)] += 1
    engine.receive(AbortReq(rid="", abort_all=True))
    calm(engine)
    return finish(engine, {"stays", "goes", "urgent", "waits"})
