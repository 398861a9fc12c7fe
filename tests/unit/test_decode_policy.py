"""Decode steps of a server that prefills as well: when they start, what they take from prefills, and their margin."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_flowprefill.bench.simulator.step_cost import StepCost
from sgl_flowprefill.policy import DecodeLimits, Joiner, Stream
from sgl_flowprefill.policy.decode import (
    CORRECTED_BY,
    LONGEST_GAP_S,
    MARGIN_FACTOR,
    MARGIN_STEPS,
    NO_LOAD,
    STALLED,
    CorrectedSteps,
    DecodeLoad,
    Margin,
    Streams,
    decode_load,
    may_join,
)

STEPS = StepCost(0.010, 0.001)
TINY_S = 1e-9


def streams_of(*objectives_s: float, joined_s: float = 0.0) -> Streams:
    streams = Streams()
    for tbt_s in objectives_s:
        streams.join(Stream(tbt_s, 100, joined_s))
    return streams


def test_a_step_starts_so_that_the_first_token_due_comes_a_margin_early() -> None:
    streams = streams_of(0.2, joined_s=1.0)
    streams.join(Stream(0.1, 50, 1.05))
    load = decode_load(streams, STEPS, DecodeLimits(), margin_s=0.007)
    assert load.step_s == pytest.approx(0.012)
    assert load.start_by_s == pytest.approx(1.15 - 0.012 - 0.007)
    assert load.period_s == pytest.approx(0.1 - 0.007)


def test_streams_that_may_wait_for_years_get_a_token_now_and_then_while_prefills_run() -> None:
    load = decode_load(streams_of(1e9, joined_s=5.0), STEPS, DecodeLimits(), margin_s=0.5)
    assert load.start_by_s == pytest.approx(5.0 + LONGEST_GAP_S - 0.511)
    assert load.period_s == LONGEST_GAP_S - 0.5


def test_a_step_leaves_prefills_their_share_since_the_last_one_whatever_streams_ask_for() -> None:
    streams = streams_of(0.011)
    streams.begin_step()
    streams.stepped(5.0)
    load = decode_load(streams, STEPS, DecodeLimits(max_share=0.5), margin_s=0.1)
    assert load.start_by_s == pytest.approx(5.011), "as long a rest as the step will take"
    assert load.period_s == pytest.approx(0.022)


def test_tokens_of_a_step_are_late_by_the_objectives_of_their_streams() -> None:
    streams = Streams()
    strict, lax = Stream(0.1, 100, 0.0), Stream(0.3, 100, 0.0)
    streams.join(strict)
    streams.join(lax)
    streams.begin_step()
    assert streams.late_tokens(0.05) == (2, 0)
    assert streams.late_tokens(0.2) == (2, 1)
    streams.stepped(0.2)
    streams.begin_step()
    streams.join(Stream(0.1, 100, 0.25))
    assert streams.late_tokens(0.35) == (2, 1), "the one that has joined takes part in the next step"
    streams.stepped(0.35)
    streams.begin_step()
    assert streams.late_tokens(0.37) == (3, 1), "the new one waits since 0.25 s, the others since 0.35 s"
    assert streams.late_tokens(0.9) == (3, 3)
    streams.stepped(0.9)
    streams.leave(lax)
    streams.begin_step()
    assert streams.late_tokens(1.1) == (2, 2)


def test_context_grows_with_each_step_and_leaves_with_its_stream() -> None:
    streams = Streams()
    first, second = Stream(0.1, 100, 0.0), Stream(0.2, 1000, 0.0)
    streams.join(first)
    streams.begin_step()
    streams.stepped(1.0)
    streams.join(second)
    streams.begin_step()
    streams.stepped(2.0)
    assert (streams.requests, streams.context_tokens) == (2, 1103)
    streams.leave(first)
    assert (streams.requests, streams.context_tokens, streams.start_by_s(0.0)) == (1, 1001, 2.2)
    streams.leave(second)
    assert (streams.requests, streams.context_tokens, streams.start_by_s(0.0)) == (0, 0, math.inf)


def test_a_step_takes_what_the_rank_with_the_most_streams_or_tokens_has() -> None:
    """Of several ranks that step together, the others wait for it."""
    streams = Streams()
    many = [Stream(0.1, 10, 0.0, dp_rank=1) for _ in range(3)]
    long = Stream(0.1, 1000, 0.0, dp_rank=0)
    for stream in (*many, long):
        streams.join(stream)
    assert (streams.requests, streams.widest, streams.context_tokens) == (4, 3, 1000)
    load = decode_load(streams, replace(STEPS, per_context_s=1e-6), DecodeLimits(), margin_s=0.0)
    assert load.step_s == pytest.approx(replace(STEPS, per_context_s=1e-6).predict_s(3, 1000))
    streams.begin_step()
    streams.stepped(1.0)
    assert streams.context_tokens == 1001
    streams.leave(long)
    assert (streams.requests, streams.widest, streams.context_tokens) == (3, 3, 33)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["join", "leave", "begin", "step"]), st.integers(0, 5)), max_size=40))
def test_sums_over_streams_are_those_of_the_streams_one_by_one(script: list[tuple[str, int]]) -> None:
    """Steps end at once or later: a stream that joins meanwhile gets no token of them."""
    streams, live, last_s, context = Streams(), [], {}, {}
    running: list[Stream] | None = None
    now_s = 0.0
    for what, number in script:
        now_s += 0.03
        if what == "join":
            stream = Stream(0.1 + 0.05 * number, 10 * number, now_s)
            live.append(stream)
            last_s[stream], context[stream] = now_s, stream.context_tokens
            streams.join(stream)
        elif what == "leave" and live:
            streams.leave(live.pop(number % len(live)))
        elif what in ("begin", "step") and running is None and live:
            running = list(live)
            streams.begin_step()
        if what == "step" and running is not None:
            streams.stepped(now_s)
            for stream in running:
                last_s[stream] = now_s
                context[stream] += 1
            running = None
        assert streams.requests == len(live)
        assert streams.context_tokens == sum(context[stream] for stream in live)
        longest = max((context[stream] for stream in live), default=0)
        assert longest - 1 <= streams.longest_tokens <= longest
        assert streams.start_by_s(0.0) == pytest.approx(min((last_s[s] + s.tbt_s for s in live), default=math.inf))
        assert streams.tightest_s() == min((s.tbt_s for s in live), default=math.inf)
        assert [streams.last_token_s(s) for s in live] == [last_s[s] for s in live]


def test_what_steps_take_is_the_steps_that_are_due_before() -> None:
    load = DecodeLoad(step_s=0.02, period_s=0.1, start_by_s=1.05)
    assert [round(load.taken_s(1.0, within_s), 6) for within_s in (0.0, 0.05, 0.06, 0.07, 0.15, 0.16, 1.05)] == [
        0.0, 0.0, 0.01, 0.02, 0.02, 0.03, 0.2,
    ]  # fmt: skip
    assert load.taken_s(1.2, 0.05) == pytest.approx(0.02), "a step that is late is taken to start at once"
    assert NO_LOAD.taken_s(0.0, 1e9) == 0.0


@given(
    st.floats(0.001, 0.1), st.floats(1.05, 10), st.floats(-1, 1), st.floats(0, 3), st.floats(0, 3)
)  # fmt: skip
def test_steps_take_more_of_more_time_and_never_more_than_the_time(
    step_s: float, periods: float, start_by_s: float, within_s: float, more_s: float
) -> None:
    load = DecodeLoad(step_s, step_s * periods, start_by_s)
    taken_s = load.taken_s(0.0, within_s)
    assert 0.0 <= taken_s <= within_s
    assert taken_s - TINY_S <= load.taken_s(0.0, within_s + more_s) <= taken_s + more_s + TINY_S


def test_the_margin_covers_all_but_the_rarest_lateness_and_follows_it_both_ways() -> None:
    margin = Margin(first_s=0.01)
    assert margin.value_s() == MARGIN_FACTOR * 0.01
    for _ in range(MARGIN_STEPS):
        margin.observe(0.002)
    assert margin.value_s() == pytest.approx(MARGIN_FACTOR * 0.002)
    margin.observe(0.5)
    assert margin.value_s() == pytest.approx(MARGIN_FACTOR * 0.002), "one outlier in a thousand steps"
    for _ in range(3):
        margin.observe(0.03)
    assert margin.value_s() == pytest.approx(MARGIN_FACTOR * 0.03), "a machine that has become slower shows at once"
    for _ in range(MARGIN_STEPS):
        margin.observe(-0.001)
    assert margin.value_s() == 0.0


def test_steps_that_no_margin_would_have_brought_in_time_make_it_no_wider() -> None:
    margin = Margin(first_s=0.01)
    for _ in range(100):
        margin.observe(0.002)
    for _ in range(3):
        margin.observe(0.3)
    assert margin.value_s(0.05) == pytest.approx(MARGIN_FACTOR * 0.01), "a pause is no lateness of a step"
    for _ in range(3):
        margin.observe(0.045)
    assert margin.value_s(0.05) == 0.05
    assert margin.value_s(1.0) == pytest.approx(MARGIN_FACTOR * 0.3), "one of 0.3 s, where streams leave time for it"
    assert margin.value_s(0.001) == 0.001, "where none would have been in time, as much as there may be"


def test_steps_that_are_nearly_all_too_late_for_any_margin_have_the_widest() -> None:
    margin = Margin(first_s=0.01)
    for overrun_s in (0.0, *[0.06] * (MARGIN_STEPS - 1)):
        margin.observe(overrun_s)
    assert margin.value_s(0.05) == 0.05


def test_predicted_steps_follow_the_measured_ones() -> None:
    model = CorrectedSteps(StepCost(0.01, 0.0))
    for _ in range(50):
        model.observe(3, 100, 0.012)
    assert model.predict_s(3, 100) == pytest.approx(0.012, rel=1e-2)


def test_one_step_that_was_held_up_hardly_changes_what_the_next_ones_are_predicted_to_take() -> None:
    model = CorrectedSteps(StepCost(0.01, 0.0))
    for _ in range(50):
        model.observe(3, 100, 0.02)
    steady_s = model.predict_s(3, 100)
    model.observe(3, 100, 200 * 0.02)
    assert steady_s < model.predict_s(3, 100) < 1.5 * steady_s
    for _ in range(16):
        model.observe(3, 100, 0.02)
    assert model.predict_s(3, 100) == pytest.approx(steady_s, rel=0.05)


@pytest.mark.parametrize("times", [0.5, 2.0, 3.0, 20.0])
def test_a_machine_whose_speed_changes_is_followed_within_some_dozens_of_steps(times: float) -> None:
    model = CorrectedSteps(StepCost(0.01, 0.0))
    off = []
    for _ in range(40):
        model.observe(3, 100, times * 0.01)
        off.append(model.predict_s(3, 100) / (times * 0.01) - 1)
    assert abs(off[-1]) < 0.02
    if times < STALLED:
        expected = [(1 / times - 1) * (1 - 1 / CORRECTED_BY) ** steps for steps in range(1, 41)]
        assert off == pytest.approx(expected), "none of these steps counts as held up"


def test_a_request_starts_only_where_all_still_fit_the_tightest_objective() -> None:
    limits = DecodeLimits(max_share=0.9)
    streams = streams_of(*[0.1] * 70)
    assert may_join(streams, 10, 0, STEPS, limits)  # 10 + 80 ms of 90
    assert not may_join(streams, 11, 0, STEPS, limits)
    assert may_join(streams, 9, 2_000, replace(STEPS, per_context_s=1e-7), limits)  # 10 + 79 + 0.9 ms
    assert not may_join(streams, 9, 4_000, replace(STEPS, per_context_s=1e-7), limits), "contexts count"
    assert may_join(Streams(), 10_000, 0, STEPS, limits), "nobody waits for ever for an empty server"
    assert may_join(streams_of(0.011), 10_000, 0, STEPS, limits), "what one stream alone would miss bars nobody"
    slow = StepCost(0.95 * LONGEST_GAP_S, 0.0)
    assert may_join(streams_of(1e9), 1, 0, slow, limits), "nor does a gap that is shorter than it asks for"


def test_a_request_starts_only_where_its_own_objective_holds_beside_the_streams() -> None:
    limits = DecodeLimits(max_share=0.9)
    lax = streams_of(*[1.0] * 39)  # with one more, 10 + 40 ms a step

    def joins(*joiners: Joiner, streams: Streams = lax) -> bool:
        tokens = sum(one.context_tokens for one in joiners)
        return may_join(streams, len(joiners), tokens, STEPS, limits, joiners)

    assert joins(Joiner(0.056, 100))
    assert not joins(Joiner(0.055, 100))
    assert not joins(Joiner(1.0, 100), Joiner(0.056, 100)), "together, a step takes 51 ms of 50.4"
    assert joins(Joiner(0.055, 100), streams=streams_of(*[1.0] * 38)), "once a stream has ended"
    assert joins(Joiner(0.055, 100), streams=Streams())


def test_an_objective_that_would_not_hold_alone_is_no_reason_to_wait() -> None:
    limits, streams = DecodeLimits(max_share=0.9), streams_of(*[1.0] * 39)
    assert may_join(streams, 1, 100, STEPS, limits, [Joiner(0.0122, 100)]), "11 ms of 10.98"
    assert not may_join(streams, 1, 100, STEPS, limits, [Joiner(0.0123, 100)])
    long = replace(STEPS, per_context_s=1e-6)
    assert not may_join(streams, 1, 30_000, long, limits, [Joiner(0.055, 30_000)]), "41 ms alone, of 49.5"
    assert may_join(streams, 1, 40_000, long, limits, [Joiner(0.055, 40_000)]), "51 ms"


@pytest.mark.parametrize(
    ("context_tokens", "tokens", "barred", "waited_for_barred"),
    [
        (85_000, 100, True, False),  # 96 ms alone, of 90
        (78_500, 100, True, False),  # 89.5 ms alone, and 90.5 with any other
        (70_000, 9_000, True, True),  # 82 ms with another, 92 with this one
        (70_000, 6_000, False, False),
        (85_000, 100_000, True, True),  # 198 ms, of 180 for the lax one
    ],
)
def test_a_stream_that_leaves_no_room_for_another_bars_nobody_whom_all_wait_for(
    context_tokens: int, tokens: int, barred: bool, waited_for_barred: bool
) -> None:
    streams, model = Streams(), replace(STEPS, per_context_s=1e-6)
    for stream in (Stream(0.2, 0, 0.0), Stream(0.1, context_tokens, 0.0)):
        streams.join(stream)
    for is_waited_for, expected in ((False, barred), (True, waited_for_barred)):
        assert may_join(streams, 1, tokens, model, DecodeLimits(), (), is_waited_for) is not expected


@pytest.mark.parametrize(
    ("others", "requests", "tokens", "joins"),
    [
        (0, 1, 300_000, True),  # 397 ms: or it would wait for the long one's end
        (0, 2, 99_000, False),  # 197 ms, of twice 97
        (1, 1, 95_000, True),  # 193 ms
        (1, 1, 97_000, False),  # 195 ms
        (90, 1, 100, True),
        (100, 1, 100, False),
    ],
)
def test_who_is_waited_for_makes_no_step_longer_than_twice_what_the_longest_stream_makes_unavoidable(
    others: int, requests: int, tokens: int, joins: bool
) -> None:
    streams, model = Streams(), replace(STEPS, per_context_s=1e-6)
    for context_tokens in (85_000, *[0] * others):
        streams.join(Stream(0.1, context_tokens, 0.0))
    assert may_join(streams, requests, tokens, model, DecodeLimits(), (), is_waited_for=True) is joins


@given(st.floats(1e-4, 10.0), st.integers(1, 200_000))
def test_an_empty_server_lets_in_any_request(tbt_s: float, tokens: int) -> None:
    model = replace(STEPS, per_context_s=1e-6)
    assert may_join(Streams(), 1, tokens, model, DecodeLimits(), [Joiner(tbt_s, tokens)])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([0.011, 0.02, 0.05, 0.1, 1.0]), min_size=1, max_size=60), st.sampled_from([0.5, 0.9]))
def test_streams_that_were_let_in_leave_the_objectives_of_all_room_for_a_step(
    objectives_s: list[float], share: float
) -> None:
    """In whatever order they come, but for objectives that no stream could have here."""
    limits, streams, in_s = DecodeLimits(max_share=share), Streams(), []
    alone_s = STEPS.predict_s(1, 0)
    for tbt_s in objectives_s:
        if may_join(streams, 1, 100, STEPS, limits, [Joiner(tbt_s, 100)]):
            streams.join(Stream(tbt_s, 100, 0.0))
            in_s.append(tbt_s)
    assert in_s
    step_s = STEPS.predict_s(len(in_s), 0)
    assert all(step_s <= share * tbt_s for tbt_s in in_s if alone_s <= share * tbt_s)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_that_leaves_one_side_nothing_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"not {share}: 0.9 is usual"):
        DecodeLimits(max_share=share)
    with pytest.raises(ValueError, match="negative"):
        DecodeLimits(margin_s=-0.001)
