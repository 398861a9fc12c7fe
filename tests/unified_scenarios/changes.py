"""What is asked of a server in the middle of everything: pauses, flushes, other weights, time-outs, its load."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any, Final
from unittest.mock import patch

from tests.prompts import prompt
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
    running,
    suspend_all_the_time,
    suspended,
    until,
    with_a_step_in_flight,
)

RETRACTED_TBT_S: Final = 4.0
"""Longer than a slow machine takes for a step."""
RETRACTED: Final = {
    rid: Ask(tuple(prompt(730 + tokens, 60)), tokens, (("ignore_eos", True),), tbt_slo_s=RETRACTED_TBT_S)
    for rid, tokens in (("goes on", 30), ("ends", 6))
}
"""Streams of which one is to have its last token from its second prefill."""


def _in_the_middle(engine: UnifiedEngine) -> dict[str, Ask]:
    """A stream decodes, a prefill is suspended, and one that has run joins."""
    asked = {"stays": STREAM, "goes": LONG, "urgent": URGENT}
    anew(engine)
    engine.submit("stays", STREAM)
    until(engine, lambda: state_of(engine, "stays") == "decoding")
    suspended(engine)
    until(engine, lambda: state_of(engine, "urgent") in ("joining", "decoding"))
    for rid in asked:
        engine.seen[state_of(engine, rid)] += 1
    calm(engine)
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


def pause(engine: UnifiedEngine, mode: str, late: bool) -> Paused:
    """Pause in the middle of everything, with a step in flight if it shall be ``late``, and go on."""
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

    asked = _in_the_middle(engine)
    before = engine.hub.role.retractions
    with with_a_step_in_flight(engine, late):
        engine.receive(PauseGenerationReqInput(mode=mode))
        assert not engine.hub.work.tasks
    streamed = dict(engine.streamed)
    for _ in range(20):
        engine.turn()
    live = len(engine.hub.work.tasks)
    answered = sum(engine.streamed[rid] != streamed[rid] for rid in streamed)
    unanswered = len(asked) - len(engine.answers)
    engine.receive(ContinueGenerationReqInput())
    return Paused(finish(engine), asked, live, answered, engine.hub.role.retractions - before, unanswered)


def tokens_of_retracted_streams(engine: UnifiedEngine) -> tuple[Play, dict[str, Ask], dict[str, float]]:
    """Two streams lose their KV cache for longer than their tokens may be apart, one with many tokens to go and one
    with a single one. What metrics count of the tokens behind their first ones, and retractions.
    """
    from prometheus_client import CollectorRegistry
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

    from sgl_flowprefill.metrics import table
    from sgl_flowprefill.runtime.event_recorder import AnswerReports, EventRecorder
    from sgl_flowprefill.runtime.metrics import Metrics

    registry, labels, role = CollectorRegistry(), {"model_name": "embedded"}, engine.hub.role
    recorder = EventRecorder(None, Metrics(labels, decodes=True, registry=registry), decodes=True)
    engine.record(recorder)
    engine.scheduler.output_streamer.reports = AnswerReports(recorder)
    anew(engine)
    before = role.retractions
    for rid, ask in RETRACTED.items():
        engine.submit(rid, ask)
    until(engine, lambda: engine.streamed["ends"] == RETRACTED["ends"].max_new_tokens - 1)
    engine.receive(PauseGenerationReqInput(mode="retract"))
    time.sleep(1.2 * RETRACTED_TBT_S)
    engine.receive(ContinueGenerationReqInput())
    played = finish(engine)
    recorder.flush()
    counted = {"retractions": float(role.retractions - before)}
    for metric in (table.TBT_MET, table.TBT_MISSED):
        counted[metric.name] = registry.get_sample_value(metric.series, labels) or 0.0
    return played, dict(RETRACTED), counted


def retracted_and_suspended(engine: UnifiedEngine) -> tuple[Play, dict[str, Ask]]:
    """A stream that was retracted is computed again, and has to wait for a more urgent prefill meanwhile."""
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

    anew(engine)
    engine.submit("goes", LONG)
    until(engine, lambda: state_of(engine, "goes") == "decoding")
    engine.receive(PauseGenerationReqInput(mode="retract"))
    engine.receive(ContinueGenerationReqInput())
    suspend_all_the_time(engine)
    until(engine, lambda: state_of(engine, "goes") == "running")
    engine.submit("urgent", URGENT)
    until(engine, lambda: state_of(engine, "goes") == "suspended")
    calm(engine)
    return finish(engine), {"goes": LONG, "urgent": URGENT}


def flush_while_busy(engine: UnifiedEngine, late: bool) -> tuple[Play, dict[str, Ask], bool]:
    """Whether a flush succeeds in the middle of everything."""
    asked = _in_the_middle(engine)
    with with_a_step_in_flight(engine, late):
        flushed = bool(engine.scheduler.flush_cache())
    return finish(engine), asked, flushed


def change_weights(engine: UnifiedEngine, late: bool) -> tuple[Play, dict[str, Ask], int]:
    """Other weights come in the middle of everything, and the old ones come back before anything else runs; how many
    prefills and steps were under way when they came.
    """
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

    asked = _in_the_middle(engine)
    live: list[int] = []

    def ruin(recv_req: Any) -> None:
        live.append(len(engine.hub.work.tasks))

    mapping = engine.scheduler._request_dispatcher._mapping
    with patch.dict(mapping, {UpdateWeightFromDiskReqInput: ruin}), with_a_step_in_flight(engine, late):
        engine.receive(UpdateWeightFromDiskReqInput(model_path="other", load_format=None))
    return finish(engine), asked, live[0]


def time_out(engine: UnifiedEngine) -> Play:
    """A prefill is suspended for longer than SGLang lets requests run."""
    anew(engine)
    running(engine)
    with patch.dict(os.environ, SGLANG_REQ_RUNNING_TIMEOUT="0.05"):
        time.sleep(0.1)
        until(engine, lambda: "goes" in engine.answers)
    calm(engine)
    return finish(engine, {"goes"})


def loads(engine: UnifiedEngine, late: bool) -> dict[str, int]:
    """What routers hear in the middle of everything."""
    _in_the_middle(engine)
    with with_a_step_in_flight(engine, late):
        load = engine.scheduler.load_inquirer.get_loads()
        reqs = len(engine.scheduler.collect_inflight_reqs())
    finish(engine)
    return {"running": load.num_running_reqs, "waiting": load.num_waiting_reqs, "in flight": reqs}
