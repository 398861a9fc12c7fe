"""Requests that are served: at once, one turn of a chat after the other, under overload, and beside long prompts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final
from unittest.mock import patch

from sgl_flowprefill.hub.shedding import Shedding
from sgl_flowprefill.policy import Act, make_policy
from sgl_flowprefill.policy.colocated import Turn
from sgl_flowprefill.shadow import Shadows
from sgl_flowprefill.ttft import PrefillShape
from tests.prompts import prompt
from tests.unified_asks import Answer, Ask
from tests.unified_engine import AnsweringEngine, StockEngine, UnifiedEngine, state_of
from tests.unified_rounds import Play
from tests.unified_scenarios.common import LONG, STREAM, anew, calm, finish, running, until

FIRST_TURN: Final = Ask(tuple(prompt(520, 300)), 24, (("ignore_eos", True),), ttft_slo_s=20.0)
"""The first turn of a chat."""


def serve(engine: UnifiedEngine, asked: Mapping[str, Ask]) -> Play:
    """Submit all of ``asked`` at once, and let the policy decide."""
    anew(engine)
    for rid, ask in asked.items():
        engine.submit(rid, ask)
    return finish(engine)


def refuse(engine: UnifiedEngine, rid: str) -> Play:
    """Submit a prompt that is longer than the model's context."""
    anew(engine)
    engine.submit(rid, Ask(tuple(prompt(506, 70_000))))
    return finish(engine)


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
    anew(engine)
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
        return ShedPlay(finish(engine), asked, shadows.state())
    finally:
        work.colocated.prefills, work.shedding, engine.hub.sheds = usual, None, False


def second_turn(first: Answer) -> Ask:
    """What a client asks that has got an answer: all that was said before, and a little more."""
    return Ask((*FIRST_TURN.prompt, *first.tokens, *prompt(521, 40)), 8, (("ignore_eos", True),))


def chat(engine: UnifiedEngine) -> tuple[Play, dict[str, Ask]]:
    """Two turns of a chat. The answer to the first is decoded while another prefill is suspended."""
    anew(engine)
    running(engine)
    engine.submit("first", FIRST_TURN)
    until(engine, lambda: state_of(engine, "first") in ("joining", "decoding"))
    with patch.object(engine.hub.work.colocated, "next", lambda *_: Turn(Act.STEP)):
        until(engine, lambda: "first" in engine.answers)
    engine.seen[f"beside: {state_of(engine, 'goes')}"] += 1
    asked = {"first": FIRST_TURN, "second": second_turn(engine.answers["first"]), "goes": LONG}
    engine.submit("second", asked["second"])
    calm(engine)
    return finish(engine), asked


def chat_alone(engine: StockEngine) -> Answer:
    """The answer to the second turn of a chat, on SGLang's own scheduler."""
    engine.submit("second", second_turn(engine.answer(FIRST_TURN)))
    engine.run()
    return engine.answers["second"]


def texts(engine: AnsweringEngine, answers: Sequence[Sequence[int]]) -> list[str]:
    """Tokens in words."""
    return [engine.scheduler.tokenizer.decode(list(tokens)) for tokens in answers]


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
    anew(engine)
    stream = Ask(STREAM.prompt, 120, STREAM.sampling, tbt_slo_s=tbt_slo_s)
    long = Ask(tuple(prompt(504, 4000)), 2, (("ignore_eos", True),), ttft_slo_s=60.0)
    asked = {"stream": stream, "long": long}
    engine.submit("stream", stream)
    until(engine, lambda: state_of(engine, "stream") == "decoding")
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
    return Gaps(finish(engine), asked, longest_s, prefill_s, steps)


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
    anew(engine)
    assert engine.scheduler.flush_cache()
    stream = replace(STREAM, max_new_tokens=2000, tbt_slo_s=tbt_slo_s)
    asked = {f"stream{number}": replace(stream, prompt=tuple(prompt(530 + number, 200))) for number in range(streams)}
    rids, long = list(asked), Ask(tuple(prompt(seed, tokens)), 1, ttft_slo_s=600.0)
    for rid, ask in asked.items():
        engine.submit(rid, ask)
    with patch.object(engine, "check"):
        until(engine, lambda: min(engine.streamed[rid] for rid in rids) >= 5)
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
    played = finish(engine, set(rids))
    gaps_s = [later - earlier for earlier, later in pairwise(times)]
    return Beside(gaps_s, prefill_s, asked | {"prompt": long}, played.answers)
