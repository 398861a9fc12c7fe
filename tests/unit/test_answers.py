"""How long answers are: scaled to what the decode server carries, or cut, and said so."""

from __future__ import annotations

import pytest

from sgl_flowprefill.bench.loadgen.calibrate import CalibrationError
from sgl_flowprefill.bench.loadgen.client import Outcome
from sgl_flowprefill.bench.loadgen.decode_rate import step_s, tokens_per_s
from sgl_flowprefill.bench.workloads.answers import DECODE_SHARE, Answers
from sgl_flowprefill.bench.workloads.trace import Trace, TraceRequest


def trace(*answers: int) -> Trace:
    return Trace("t", [TraceRequest(float(i), 100, tokens, "text", 1.0, 0.1) for i, tokens in enumerate(answers)])


def lengths(trace: Trace) -> list[int]:
    return [request.output_tokens for request in trace.requests]


def stream(first_token_s: float, step_s: float, tokens: int) -> Outcome:
    end_s = first_token_s + step_s * (tokens - 1)
    return Outcome(0.0, end_s, first_token_s, end_s, [step_s] * (tokens - 1), tokens)


def test_one_factor_shortens_all_and_leaves_each_a_token() -> None:
    whole = trace(1000, 500, 100, 1)
    answers = Answers.carried(whole, rate_rps=2.0, decode_tokens_per_s=200.0)
    assert answers.scale == pytest.approx(DECODE_SHARE * 200.0 / (2.0 * 400.25))
    assert lengths(answers.of(whole)) == [125, 62, 12, 1]


def test_answers_that_the_decode_server_carries_keep_their_lengths() -> None:
    answers = Answers.carried(trace(10, 20), rate_rps=1.0, decode_tokens_per_s=1000.0)
    assert answers.scale == 1.0
    assert lengths(answers.of(trace(10, 20))) == [10, 20]
    assert answers.text(trace(10, 20)) == "answers: the workload's own, median 15 tokens, mean 15.0"


def test_what_was_done_to_answers_is_said() -> None:
    scaled = Answers(0.125, None, 200.0)
    assert scaled.text(scaled.of(trace(80, 160, 800))) == (
        "answers: 0.125 of the workload's, median 20 tokens, mean 43.3"
    )
    cut = Answers(max_tokens=8)
    assert cut.text(cut.of(trace(4, 160, 800))) == (
        "answers: the workload's, cut at 8 tokens, median 8 tokens, mean 6.7"
    )
    assert scaled.to_dict(trace(10, 30))["median"] == 20.0


def test_tokens_are_counted_while_all_answers_stream() -> None:
    # 1 to 2 s: 10 tokens of one, 20 of the other; before and after only one streams.
    assert tokens_per_s([stream(0.0, 0.1, 21), stream(1.0, 0.05, 41)]) == pytest.approx(30.0, rel=0.05)


def test_a_step_takes_what_lies_between_tokens_while_all_answers_stream() -> None:
    slow_alone = stream(0.0, 0.2, 6)  # to 1 s, when the other begins
    slow_alone.tbt_s += [0.05] * 20
    assert step_s([slow_alone, stream(1.0, 0.05, 30)]) == pytest.approx(0.05)
    assert step_s([stream(0.0, 0.1, 5)]) == pytest.approx(0.1)
    with pytest.raises(CalibrationError, match="let nobody else use the server"):
        step_s([stream(0.0, 0.1, 5), stream(1.0, 0.1, 5)])


def test_answers_that_did_not_stream_at_a_time_measure_nothing() -> None:
    with pytest.raises(CalibrationError, match="give --max-output-tokens"):
        tokens_per_s([stream(0.0, 0.1, 5), stream(1.0, 0.1, 5)])
