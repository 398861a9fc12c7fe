"""What is expected to arrive, judged by what has."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_flowprefill.pace import Pace
from sgl_flowprefill.policy.forecast import SLOTS, Entry, Forecast


def test_work_is_expected_at_the_rate_at_which_it_arrived_and_due_after_its_slo() -> None:
    forecast = Forecast(window_s=10.0)
    for second in range(100):
        forecast.arrived(float(second), 0.25, 1.0)
        forecast.arrived(float(second), 0.5, 4.0)
    assert forecast.due_s(0.9) == 0.0
    assert forecast.due_s(3.0) == pytest.approx(2 * 0.25, rel=0.15)
    assert forecast.due_s(8.0) == pytest.approx(7 * 0.25 + 4 * 0.5, rel=0.15)
    for second in range(200, 300):
        forecast.arrived(float(second), 0.1, 1.0)
    assert forecast.due_s(8.0) == pytest.approx(7 * 0.1, rel=0.15)


def test_a_request_that_is_announced_late_does_not_shorten_the_past() -> None:
    forecast = Forecast(window_s=60.0)
    for second in range(100):
        forecast.arrived(float(second), 0.3, 1.0)
    in_order = forecast.due_s(11.0)
    assert in_order == pytest.approx(10 * 0.3, rel=0.1)
    changes = [forecast.arrived(20.0 + number, 1e-3, 1.0) for number in range(20)]
    assert any(changes)
    assert forecast.due_s(11.0) == pytest.approx(in_order, rel=0.1)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 9), st.floats(0.01, 30)), max_size=60))
def test_no_more_work_is_expected_than_there_is_time_for(drawn: list[tuple[float, float, float]]) -> None:
    forecast, now_s = Forecast(window_s=5.0), 0.0
    for elapsed_s, work_s, slo_s in drawn:
        now_s += elapsed_s
        forecast.arrived(now_s, work_s, slo_s)
        due_s = [forecast.due_s(within_s) for within_s in (0.0, 0.5, 2.0, 9.0, 60.0)]
        assert due_s == sorted(due_s)
        assert all(due <= within * (1 + 1e-9) for due, within in zip(due_s, (0.0, 0.5, 2.0, 9.0, 60.0), strict=True))


@pytest.mark.parametrize("window_s", [60.0, 1000.0])
def test_the_room_is_that_of_all_requests_of_the_window_one_by_one(window_s: float) -> None:
    """At the paces that these have by then, whatever the classes of their work, and without what was withdrawn."""
    random, forecast = Random(5), Forecast(window_s)
    paces = [Pace(factor) for factor in (0.5, 1.0, 3.0)]
    count_from_s = 200.0 // (window_s / SLOTS) * (window_s / SLOTS) - window_s
    counted: list[tuple[float, float, Pace]] = []
    for second in range(200):
        request = 10 ** random.uniform(-3.0, -1.5), random.choice((0.5, 2.0, 7.0)), random.choice(paces)
        forecast.arrived(float(second), *request)
        if random.random() < 0.2:
            forecast.withdrawn(forecast.entry(*request))
        elif second >= count_from_s:
            counted.append(request)
    for pace, factor in zip(paces, (2.0, 0.7, 1.3), strict=True):
        pace.factor = factor
    forecast.repaced()
    for _ in range(60):  # until it is made anew, of all that has arrived
        forecast.arrived(200.0, 0.0, 1.0)

    past_s = 200.0 - count_from_s

    def room_s(within_s: float) -> float:
        during_s = [(work_s * pace.factor, max(0.0, within_s - slo_s)) for work_s, slo_s, pace in counted]
        variance = sum(work_s**2 * time_s for work_s, time_s in during_s) / past_s
        return sum(work_s * time_s for work_s, time_s in during_s) / past_s + math.sqrt(variance)

    times_s = (0.4, 0.6, 1.9, 3.0, 6.9, 7.2, 50.0, 1e5)
    assert forecast.rooms_s(times_s) == pytest.approx([room_s(within_s) for within_s in times_s], rel=1e-6, abs=1e-6)


def test_the_forecast_follows_each_pace_and_counts_the_shortest_by_the_present_ones() -> None:
    steady, changing = Pace(), Pace()
    forecast, alike = Forecast(60.0), Forecast(60.0)
    for second in range(200):
        forecast.arrived(float(second), 0.1, 1.0, steady)
        forecast.arrived(float(second), 0.2, 4.0, changing)
        alike.arrived(float(second), 0.1, 1.0)
        alike.arrived(float(second), 0.6, 4.0)
    changing.factor = 3.0
    forecast.repaced()
    assert forecast.due_s(11.0) == pytest.approx(10 * 0.1 + 7 * 0.6, rel=0.05)
    assert forecast.rooms_s([11.0]) == pytest.approx(alike.rooms_s([11.0]), rel=0.05)
    changing.factor = 10.0  # 2 s a second: half of these count beside the short ones, less what is left of the last
    forecast.repaced()
    assert forecast.due_s(1001.0) == pytest.approx(1000.0, rel=0.02)
    steady.factor = 40.0  # now the other ones are the shorter ones, and take all the time
    forecast.repaced()
    for _ in range(2):
        forecast.arrived(200.0, 0.2, 4.0, changing)
    assert forecast.due_s(3.9) == 0.0


def test_a_forecast_without_what_was_withdrawn_is_that_of_the_others() -> None:
    """Also where what was withdrawn had been forgotten by then, or was counted at another pace."""
    forecast, others, pace = Forecast(60.0), Forecast(60.0), Pace(2.0)
    left: list[tuple[int, Entry]] = []
    for second in range(300):
        forecast.arrived(float(second), 0.7, 2.0, pace)
        left.append((second + 7 * (second % 20), forecast.entry(0.7, 2.0, pace)))
        for each in (forecast, others):
            each.arrived(float(second), 0.1 + 0.01 * (second % 7), 1.0)
        for gone in [entry for entry in left if entry[0] <= second]:
            forecast.withdrawn(gone[1])
            left.remove(gone)
    for _, request in left:
        forecast.withdrawn(request)
    for each in (forecast, others):
        for _ in range(20):  # until both are made anew
            each.arrived(300.0, 0.0, 1.0)
    times_s = (0.5, 3.0, 20.0, 100.0)
    assert forecast.rooms_s(times_s) == pytest.approx(others.rooms_s(times_s))
