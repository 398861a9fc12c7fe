"""The order in which a decode server gives out places."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sgl_flowprefill.policy.places import PLACES_PER_STARVED, DueTimes, PlaceOrder

MAX_STARVATION_S = 60.0


def order_of(times: dict[str, tuple[float, float]]) -> PlaceOrder[str]:
    return PlaceOrder(lambda name: DueTimes(*times[name]), MAX_STARVATION_S)


def test_the_earliest_deadline_goes_first_whatever_the_arrival() -> None:
    order = order_of({"relaxed": (0.0, 9.0), "urgent": (1.0, 1.5), "between": (0.5, 4.0)})
    assert order.order(["relaxed", "between", "urgent"]) == ["urgent", "between", "relaxed"]


def test_late_requests_go_last_and_oldest_first() -> None:
    times = {"late": (1.0, 1.1), "later": (0.0, 1.9), "new": (2.0, 7.0)}
    assert order_of(times).order(["late", "later", "new"]) == ["new", "later", "late"]


def test_a_request_is_late_by_the_newest_arrival_and_not_by_a_clock() -> None:
    order = order_of({"first": (0.0, 1.0), "second": (0.5, 5.0)})
    assert order.order(["second", "first"]) == ["first", "second"]  # whenever that is


def test_a_starved_request_goes_first_but_gets_one_place_in_many() -> None:
    now_s = 100.0
    times = {f"starved {i}": (float(i), 1.0 + i) for i in range(3)}
    times |= {f"new {i}": (now_s, now_s + 5 + i) for i in range(4 * PLACES_PER_STARVED)}
    order, waiting = order_of(times), list(times)
    given: list[str] = []
    while len(given) < 2 * PLACES_PER_STARVED + 2:
        first = order.order(waiting)[0]
        order.given([first])
        waiting.remove(first)
        given.append(first)
    assert [given.index(f"starved {i}") for i in range(3)] == [0, PLACES_PER_STARVED, 2 * PLACES_PER_STARVED]


def test_a_starved_request_that_got_no_place_goes_first_again() -> None:
    order = order_of({"starved": (0.0, 1.0), "new": (100.0, 101.0)})
    for _ in range(3):
        assert order.order(["starved", "new"]) == ["starved", "new"]
        order.given([])


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.01, 10)), max_size=30), st.randoms())
def test_nobody_is_lost_and_the_order_does_not_depend_on_how_they_wait(
    requests: list[tuple[float, float]], random: Any
) -> None:
    times = {str(i): (arrival_s, arrival_s + slo_s) for i, (arrival_s, slo_s) in enumerate(requests)}
    waiting = list(times)
    ordered = order_of(times).order(waiting)
    assert sorted(ordered) == sorted(waiting)
    random.shuffle(waiting)
    again = order_of(times).order(waiting)
    assert [times[name] for name in again] == [times[name] for name in ordered]
