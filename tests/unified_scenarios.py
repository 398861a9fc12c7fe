"""What a test of a unified server lets happen in its engine's process: each function is called there."""

from __future__ import annotations

import gc
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final
from unittest.mock import patch

from sgl_flowprefill.hub.failure import StepOutOfMemory
from sgl_flowprefill.hub.shedding import Shedding
from sgl_flowprefill.policy import Act, Limits, make_policy
from sgl_flowprefill.policy.colocated import Turn
from sgl_flowprefill.shadow import Shadows
from sgl_flowprefill.ttft import PrefillShape
from tests.faults import MARKER, STEP_PLACES, StepAttempts, raise_in_marked_prompts, without_memory_for_steps
from tests.late_device import LateDevice
from tests.prompts import prompt
from tests.unified_asks import Answer, Ask
from tests.unified_engine import AnsweringEngine, StockEngine, UnifiedEngine, state_of
from tests.unified_rounds import Play, play_and_flush

STREAM: Final = Ask(tuple(prompt(501, 60)), 40, (("ignore_eos", True),), tbt_slo_s=5.0)
"""A request that decodes while others are prefilled, which on a slow machine too are done before it."""
LONG: Final = Ask(tuple(prompt(502, 1800)), 6, (("ignore_eos", True),), ttft_slo_s=60.0)
URGENT: Final = Ask(tuple(prompt(503, 500)), 4, (("ignore_eos", True),), ttft_slo_s=20.0)
"""A request that goes before the long one, also on a machine that needs seconds for it."""

BAD: Final = Ask((*prompt(505, 700), MARKER), 4, (("ignore_eos", True),), ttft_slo_s=20.0)
"""A request whose prefill fails where the model raises in marked prompts."""

FIRST_TURN: Final = Ask(tuple(prompt(520, 300)), 24, (("ignore_eos", True),), ttft_slo_s=20.0)
"""The first turn of a chat."""

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

RETRACTED_TBT_S: Final = 4.0
"""Longer than a slow machine takes for a step."""
RETRACTED: Final = {
    rid: Ask(tuple(prompt(730 + tokens, 60)), tokens, (("ignore_eos", True),), tbt_slo_s=RETRACTED_TBT_S)
    for rid, tokens in (("goes on", 30), ("ends", 6))
}
"""Streams of which one is to have its last token from its second prefill."""


def serve(engine: UnifiedEngine, asked: Mapping[str, Ask]) -> Play:
    """Submit all of ``asked`` at once, and let the policy decide."""
    _anew(engine)
    for rid, ask in asked.items():
        engine.submit(rid, ask)
    return _played(engine)


def refuse(engine: UnifiedEngine, rid: str) -> Play:
    """Submit a prompt that is longer than the model's context."""
    _anew(engine)
    engine.submit(rid, Ask(tuple(prompt(506, 70_000))))
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


def late_device() -> LateDevice:
    """A device on which nothing that is queued has run a turn later."""
    return LateDevice(0, seed=1, pass_probability=0.001)


@contextmanager
def _with_a_step_in_flight(engine: UnifiedEngine, late: bool) -> Iterator[None]:
    """In it, if it shall be ``late``, the tokens of a step are on their way."""
    usual = engine.hub.device
    if late:
        engine.use(late_device())
        engine.step()
        assert state_of(engine, "stays") == "step in flight"
    try:
        yield
    finally:
        engine.use(usual)


def _suspend_all_the_time(engine: UnifiedEngine) -> None:
    """A task comes back at each interruption point."""
    engine.hub.executor.interrupted = lambda: True


def _calm(engine: UnifiedEngine) -> None:
    engine.hub.executor.interrupted = engine.hub.has_news


# ---- overload --------------------------------------------------------------------------------------------------------


@dataclass
class ShedPlay:
    play: Play
    asked: dict[str, Ask]
    counted: dict[str, int]
    """What became of shed requests, and would have."""


def shed(engine: UnifiedEngine) -> ShedPlay:
    """A server that sheds, behind a prefill that takes longer than others can wait: one that may be refused, one that
    may and has plenty of time, and one that may not.
    """
    _anew(engine)
    work, shadows = engine.hub.work, Shadows()
    engine.hub.recorder.listen(shadows.read)
    usual, work.colocated.prefills = work.colocated.prefills, make_policy("edf", work.policy.limits, 60.0)
    work.shedding, engine.hub.sheds = Shedding(), True
    wait_s = 2 * work.ttft.predict_s([PrefillShape(600, 0)])
    ends = (("ignore_eos", True),)
    asked = {
        "first": Ask(tuple(prompt(740, 3000)), 2, ends, ttft_slo_s=0.001),
        "goes": Ask(tuple(prompt(741, 600)), 2, ends, ttft_slo_s=wait_s, sheddable=True),
        "late": Ask(tuple(prompt(742, 600)), 2, ends, ttft_slo_s=wait_s),
        "stays": Ask(tuple(prompt(743, 600)), 2, ends, ttft_slo_s=600.0, sheddable=True),
    }
    try:
        for rid, ask in asked.items():
            engine.submit(rid, ask)
        return ShedPlay(_played(engine), asked, shadows.state())
    finally:
        work.colocated.prefills, work.shedding, engine.hub.sheds = usual, None, False


# ---- turns of a chat, texts ------------------------------------------------------------------------------------------


def second_turn(first: Answer) -> Ask:
    """What a client asks that has got an answer: all that was said before, and a little more."""
    return Ask((*FIRST_TURN.prompt, *first.tokens, *prompt(521, 40)), 8, (("ignore_eos", True),))


def chat(engine: UnifiedEngine) -> tuple[Play, dict[str, Ask]]:
    """Two turns of a chat. The answer to the first is decoded while another prefill is suspended."""
    _anew(engine)
    _running(engine)
    engine.submit("first", FIRST_TURN)
    _until(engine, lambda: state_of(engine, "first") in ("joining", "decoding"))
    with patch.object(engine.hub.work.colocated, "next", lambda *_: Turn(Act.STEP)):
        _until(engine, lambda: "first" in engine.answers)
    engine.seen[f"beside: {state_of(engine, 'goes')}"] += 1
    asked = {"first": FIRST_TURN, "second": second_turn(engine.answers["first"]), "goes": LONG}
    engine.submit("second", asked["second"])
    _calm(engine)
    return _played(engine), asked


def chat_alone(engine: StockEngine) -> Answer:
    """The answer to the second turn of a chat, on SGLang's own scheduler."""
    engine.submit("second", second_turn(engine.answer(FIRST_TURN)))
    engine.run()
    return engine.answers["second"]


def texts(engine: AnsweringEngine, answers: Sequence[Sequence[int]]) -> list[str]:
    """Tokens in words."""
    return [engine.scheduler.tokenizer.decode(list(tokens)) for tokens in answers]


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
    _until(engine, lambda: state_of(engine, "goes") == "running" and engine.hub.executor.points_passed > 0)
    engine.turn()


def _suspended(engine: UnifiedEngine) -> None:
    _running(engine)
    engine.submit("urgent", URGENT)
    _until(engine, lambda: state_of(engine, "goes") == "suspended")


def _result_on_its_way(engine: UnifiedEngine) -> None:
    engine.use(late_device())
    engine.submit("goes", URGENT)
    _until(engine, lambda: state_of(engine, "goes") == "result on its way")


def _joining(engine: UnifiedEngine) -> None:
    engine.submit("goes", URGENT)
    _until(engine, lambda: state_of(engine, "goes") == "joining")


def _decoding(engine: UnifiedEngine) -> None:
    engine.submit("goes", Ask(URGENT.prompt, 30, URGENT.sampling))
    _until(engine, lambda: state_of(engine, "goes") == "decoding")


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
    _running(engine)
    [task] = [task for task in engine.hub.work.tasks.live if "goes" in task.rids]
    since_s = time.monotonic()
    engine.hub.give_back(task)
    assert all(engine.hub.role.as_arrival(req).readable_s >= since_s for req in task.reqs), "nobody is blocked before"


STATES: Final[dict[str, Callable[[UnifiedEngine], None]]] = {
    "compiling": _compiling,
    "waiting": _waiting,
    "running": _running,
    "suspended": _suspended,
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
        engine.use(device)
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


# ---- prefills that fail ----------------------------------------------------------------------------------------------


@dataclass
class Failed:
    play: Play
    asked: dict[str, Ask]
    """Requests whose prefills did not fail."""
    errors: list[str]
    """What was logged as an error."""


@contextmanager
def _errors() -> Iterator[list[str]]:
    """What is logged as an error in it."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    keep, logger = Keep(logging.ERROR), logging.getLogger("sgl_flowprefill")
    logger.addHandler(keep)
    try:
        yield lines
    finally:
        logger.removeHandler(keep)


@contextmanager
def _raising(engine: UnifiedEngine, fault: str) -> Iterator[None]:
    """In it, prefills of marked prompts fail in the middle of their forward pass, and tasks come back at each
    interruption point.
    """
    hooks = raise_in_marked_prompts(engine.scheduler, fault, 4)
    _suspend_all_the_time(engine)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        _calm(engine)


def fail(engine: UnifiedEngine, fault: str) -> Failed:
    """A prefill fails while a stream decodes and another prefill is suspended; then its prompt comes again."""
    asked = {"stays": STREAM, "goes": LONG, "again": BAD}
    _anew(engine)
    engine.submit("stays", STREAM)
    _until(engine, lambda: state_of(engine, "stays") == "decoding")
    with _errors() as errors, _raising(engine, fault):
        _running(engine)
        engine.submit("bad", BAD)
        _until(engine, lambda: "bad" in engine.answers)
        for rid in ("stays", "goes"):
            engine.seen[state_of(engine, rid)] += 1
    engine.submit("again", BAD)
    return Failed(_played(engine), asked, errors)


def fail_in_a_batch(engine: UnifiedEngine) -> Failed:
    """The prefill of three requests fails, one of whose clients has left; then their prompts come again."""
    bad = {f"bad{i}": Ask((*prompt(506 + i, 60), MARKER), 4, BAD.sampling, ttft_slo_s=60.0) for i in range(3)}
    _anew(engine)
    engine.hub.work.policy.limits = Limits(max_suspended=100, max_batch_tokens=1000)
    with _errors() as errors, _raising(engine, "error"):
        for rid, ask in bad.items():
            engine.submit(rid, ask)
        engine.turn()
        [task] = engine.hub.work.tasks.live
        engine.seen["requests of the batch"] += len(task.rids)
        engine.abort("bad1")
        _until(engine, lambda: engine.answers.keys() == bad.keys())
    again = {f"again{i}": ask for i, ask in enumerate(bad.values())}
    for rid, ask in again.items():
        engine.submit(rid, ask)
    return Failed(_played(engine), again, errors)


# ---- what never fits -------------------------------------------------------------------------------------------------

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
    _anew(engine)
    hub = engine.hub
    engine.submit("stays", STREAM)
    _until(engine, lambda: state_of(engine, "stays") == "decoding")
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
        return _played(engine)
    finally:
        hub.stall_check_s = usual


# ---- decode steps without device memory ------------------------------------------------------------------------------

PENALISED: Final = Ask(tuple(prompt(507, 200)), 40, (("ignore_eos", True), ("frequency_penalty", 1.5)))
WORDED: Final = Ask(tuple(prompt(508, 150)), 40, (("regex", "[a-z ]+"), ("min_new_tokens", 40)))
"""Streams whose tokens hang on those before, which a step counts once."""


@dataclass
class WithoutMemory:
    play: Play
    asked: dict[str, Ask]
    attempts: StepAttempts
    error: str
    """What was raised, and its cause."""


def _streams_of_all_kinds(engine: UnifiedEngine) -> dict[str, Ask]:
    asked = {"worded": WORDED, "penalised": PENALISED, "stays": STREAM}
    _anew(engine)
    for rid, ask in asked.items():
        engine.submit(rid, ask)
        _until(engine, lambda rid=rid: state_of(engine, rid) != "compiling")
    _until(engine, lambda: all(state_of(engine, rid) in ("joining", "decoding") for rid in asked))
    return asked


def step_without_memory(engine: UnifiedEngine, place: str, times: int) -> WithoutMemory:
    """A step runs out of memory so many times, while two prefills are live that have run."""
    asked = _streams_of_all_kinds(engine) | {"goes": LONG, "urgent": URGENT}
    before = engine.hub.role.given_back
    _suspended(engine)
    failures = iter([place] * times)
    gc.disable()
    try:
        with without_memory_for_steps(engine.scheduler, lambda: next(failures, None)) as attempts:
            engine.step()
    finally:
        gc.enable()
    engine.seen["given back"] = engine.hub.role.given_back - before
    _calm(engine)
    return WithoutMemory(_played(engine), asked, attempts, "")


def step_without_memory_and_prefills(engine: UnifiedEngine, place: str) -> WithoutMemory:
    """A step runs out of memory while there are streams alone; then it runs again, as if there was some at once."""
    asked, error = _streams_of_all_kinds(engine), ""
    failures = iter([place])
    with without_memory_for_steps(engine.scheduler, lambda: next(failures, None)) as attempts:
        try:
            engine.step()
        except StepOutOfMemory as raised:
            error = f"{raised}: {type(raised.__cause__).__name__}"
        engine.step()
    return WithoutMemory(_played(engine), asked, attempts, error)


def steps_without_memory_by_chance(
    engine: UnifiedEngine, asked: Mapping[str, Ask], seed: int, probability: float
) -> WithoutMemory:
    """A round in which steps run out of memory with that ``probability``, while prefills are live that have run."""
    rng, tasks = random.Random(seed), engine.hub.work.tasks

    def place() -> str | None:
        fails = any(task.has_run for task in tasks.live) and rng.random() < probability
        return rng.choice(STEP_PLACES) if fails else None

    with without_memory_for_steps(engine.scheduler, place) as attempts:
        played = play_and_flush(engine, asked, set(), seed, 0.4)
    return WithoutMemory(played, dict(asked), attempts, "")


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


def pause(engine: UnifiedEngine, mode: str, late: bool) -> Paused:
    """Pause in the middle of everything, with a step in flight if it shall be ``late``, and go on."""
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

    asked = _in_the_middle(engine)
    before = engine.hub.role.retractions
    with _with_a_step_in_flight(engine, late):
        engine.receive(PauseGenerationReqInput(mode=mode))
        assert not engine.hub.work.tasks
    streamed = dict(engine.streamed)
    for _ in range(20):
        engine.turn()
    live = len(engine.hub.work.tasks)
    answered = sum(engine.streamed[rid] != streamed[rid] for rid in streamed)
    unanswered = len(asked) - len(engine.answers)
    engine.receive(ContinueGenerationReqInput())
    return Paused(_played(engine), asked, live, answered, engine.hub.role.retractions - before, unanswered)


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
    _anew(engine)
    before = role.retractions
    for rid, ask in RETRACTED.items():
        engine.submit(rid, ask)
    _until(engine, lambda: engine.streamed["ends"] == RETRACTED["ends"].max_new_tokens - 1)
    engine.receive(PauseGenerationReqInput(mode="retract"))
    time.sleep(1.2 * RETRACTED_TBT_S)
    engine.receive(ContinueGenerationReqInput())
    played = _played(engine)
    recorder.flush()
    counted = {"retractions": float(role.retractions - before)}
    for metric in (table.TBT_MET, table.TBT_MISSED):
        counted[metric.name] = registry.get_sample_value(metric.series, labels) or 0.0
    return played, dict(RETRACTED), counted


def flush_while_busy(engine: UnifiedEngine, late: bool) -> tuple[Play, dict[str, Ask], bool]:
    """Whether a flush succeeds in the middle of everything."""
    asked = _in_the_middle(engine)
    with _with_a_step_in_flight(engine, late):
        flushed = bool(engine.scheduler.flush_cache())
    return _played(engine), asked, flushed


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
    with patch.dict(mapping, {UpdateWeightFromDiskReqInput: ruin}), _with_a_step_in_flight(engine, late):
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


def loads(engine: UnifiedEngine, late: bool) -> dict[str, int]:
    """What routers hear in the middle of everything."""
    _in_the_middle(engine)
    with _with_a_step_in_flight(engine, late):
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
    long = Ask(tuple(prompt(504, 4000)), 2, (("ignore_eos", True),), ttft_slo_s=60.0)
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


@dataclass
class Beside:
    gaps_s: list[float]
    """Between two tokens of all streams, while a prompt was prefilled."""
    prefill_s: float
    asked: Mapping[str, Ask]
    answers: Mapping[str, Answer]
    """Of a stream, what it had when it was aborted."""


def gaps_beside_a_prompt(engine: UnifiedEngine, tokens: int, seed: int, tbt_slo_s: float, streams: int) -> Beside:
    """Streams with an objective while a prompt is prefilled. Nothing is checked meanwhile, which would take time."""
    _anew(engine)
    assert engine.scheduler.flush_cache()
    stream = replace(STREAM, max_new_tokens=2000, tbt_slo_s=tbt_slo_s)
    asked = {f"stream{number}": replace(stream, prompt=tuple(prompt(530 + number, 200))) for number in range(streams)}
    rids, long = list(asked), Ask(tuple(prompt(seed, tokens)), 1, ttft_slo_s=600.0)
    for rid, ask in asked.items():
        engine.submit(rid, ask)
    with patch.object(engine, "check"):
        _until(engine, lambda: min(engine.streamed[rid] for rid in rids) >= 5)
        begin_s = time.monotonic()  # all streams have got a token a moment ago
        engine.submit("prompt", long)
        times, seen = [begin_s], dict(engine.streamed)
        while "prompt" not in engine.answers:
            engine.turn()
            if any(engine.streamed[rid] != seen[rid] for rid in rids):
                assert all(engine.streamed[rid] == seen[rid] + 1 for rid in rids), "a step gives each stream a token"
                times.append(time.monotonic())
                seen = dict(engine.streamed)
        prefill_s = time.monotonic() - begin_s
    for rid in rids:
        engine.abort(rid)
    played = _played(engine, set(rids))
    gaps_s = [later - earlier for earlier, later in pairwise(times)]
    return Beside(gaps_s, prefill_s, asked | {"prompt": long}, played.answers)


def _grown(engine: UnifiedEngine) -> Counter[str]:
    """Streams that grow have begun, beside which no prefill gets on. What had been retracted and given back before."""
    _anew(engine)
    role = engine.hub.role
    before = Counter(retractions=role.retractions, given_back=role.given_back)
    for rid, ask in GROWING.items():
        engine.submit(rid, ask)
    _until(engine, lambda: all(state_of(engine, rid) == "decoding" for rid in GROWING))
    _suspend_all_the_time(engine)
    return before


def _begun(engine: UnifiedEngine, rid: str) -> None:
    _until(engine, lambda: state_of(engine, rid) in ("running", "suspended"))


def _step_until_kv_is_short(engine: UnifiedEngine, before: Counter[str], known: int = 0) -> Play:
    """Steps alone, until something more than the ``known`` has been given back or retracted; then all goes on."""
    role = engine.hub.role
    with patch.object(engine.hub.work.colocated, "next", lambda *_: Turn(Act.STEP)):
        _until(engine, lambda: role.given_back + role.retractions > before.total() + known or "s0" in engine.answers)
    _calm(engine)
    played = _played(engine)
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
    _anew(engine)
    assert engine.scheduler.flush_cache()
    usual, allocator = engine.hub.device, engine.scheduler.token_to_kv_pool_allocator
    asked = {"stays": STREAM, "goes": Ask(URGENT.prompt, 1, URGENT.sampling, ttft_slo_s=20.0)}
    engine.submit("stays", STREAM)
    _until(engine, lambda: state_of(engine, "stays") == "decoding")
    engine.use(late_device())
    engine.submit("goes", asked["goes"])
    _until(engine, lambda: state_of(engine, "goes") == "result on its way")
    rest = allocator.alloc(int(allocator.available_size()))
    engine.step()
    engine.seen[f"goes: {state_of(engine, 'goes')}"] += 1
    allocator.free(rest)
    engine.use(usual)
    return _played(engine), asked


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
