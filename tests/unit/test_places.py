"""The order in which a decode server gives out places."""

from __future__ import annotations

import random
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_flowprefill.bench.simulator.place_speed import step_cost
from sgl_flowprefill.policy.places import PLACES_PER_STARVED, DueTimes, PlaceOrder

MAX_STARVATION_S = 60.0


class Name:
    """A request; two of the same name are two requests."""

    def __init__(self, name: str) -> None:
        self.name = name


class Order:
    """A PlaceOrder of requests that tests call by name."""

    def __init__(self, times: dict[str, tuple[float, float]]) -> None:
        self.places: PlaceOrder[Name] = PlaceOrder(MAX_STARVATION_S)
        self.requests = {name: Name(name) for name in times}
        for name, request in self.requests.items():
            self.places.add(request, DueTimes(*times[name]))

    def order(self) -> list[str]:
        return [request.name for request in self.places.in_order()]

    def give(self, name: str) -> None:
        self.places.give_place(self.requests[name])


def test_the_earliest_deadline_goes_first_whatever_the_arrival() -> None:
    order = Order({"relaxed": (0.0, 9.0), "between": (0.5, 4.0), "urgent": (1.0, 1.5)})
    assert order.order() == ["urgent", "between", "relaxed"]


def test_late_requests_go_last_and_oldest_first() -> None:
    times = {"late": (1.0, 1.1), "later": (0.0, 1.9), "new": (2.0, 7.0)}
    assert Order(times).order() == ["new", "later", "late"]


def test_a_request_is_late_by_the_newest_arrival_and_not_by_a_clock() -> None:
    order = Order({"second": (0.5, 5.0), "first": (0.0, 1.0)})
    assert order.order() == ["first", "second"]  # whenever that is


def test_requests_with_the_same_times_keep_the_order_in_which_they_came() -> None:
    names = [str(i) for i in random.Random(1).sample(range(100), 100)]
    order = Order(dict.fromkeys(names, (1.0, 2.0)))
    assert order.order() == names
    order.places.add(Name("new"), DueTimes(3.0, 4.0))
    assert order.order() == ["new", *names]  # all of them are late now


def test_a_starved_request_goes_first_but_gets_one_place_in_many() -> None:
    now_s = 100.0
    times = {f"starved {i}": (float(i), 1.0 + i) for i in range(3)}
    times |= {f"new {i}": (now_s, now_s + 5 + i) for i in range(4 * PLACES_PER_STARVED)}
    order = Order(times)
    given: list[str] = []
    while len(given) < 2 * PLACES_PER_STARVED + 2:
        first = order.order()[0]
        order.give(first)
        given.append(first)
    assert [given.index(f"starved {i}") for i in range(3)] == [0, PLACES_PER_STARVED, 2 * PLACES_PER_STARVED]


def test_a_starved_request_that_got_no_place_goes_first_again() -> None:
    order = Order({"starved": (0.0, 1.0), "new": (100.0, 101.0)})
    for _ in range(3):
        assert order.order() == ["starved", "new"]


times_of_requests = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8)), max_size=30)


@given(times_of_requests)
def test_nobody_is_lost_and_the_order_does_not_depend_on_how_they_wait(requests: list[tuple[int, int]]) -> None:
    times = {str(i): (float(arrival_s), float(arrival_s + slo_s)) for i, (arrival_s, slo_s) in enumerate(requests)}
    ordered = Order(times).order()
    assert sorted(ordered) == sorted(times)
    again = Order({name: times[name] for name in reversed(times)}).order()
    assert [times[name] for name in again] == [times[name] for name in ordered]


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8), st.sampled_from(["stays", "leaves", "is given"]))))
def test_what_is_kept_in_order_is_what_sorting_gives(steps: list[tuple[int, int, str]]) -> None:
    order = Order({})
    waiting: list[tuple[Name, int, int]] = []
    newest_s = -1
    for i, (arrival_s, slo_s, what) in enumerate(steps):
        request = Name(str(i))
        waiting.append((request, arrival_s, arrival_s + slo_s))
        order.places.add(request, DueTimes(arrival_s, arrival_s + slo_s))
        newest_s = max(newest_s, arrival_s)
        if what != "stays":
            gone = waiting.pop(arrival_s % len(waiting))[0]
            (order.places.remove if what == "leaves" else order.places.give_place)(gone)
            assert gone not in order.places
        in_time = sorted(
            (deadline_s, arrival_s, int(r.name)) for r, arrival_s, deadline_s in waiting if deadline_s >= newest_s
        )
        late = sorted(
            (arrival_s, deadline_s, int(r.name)) for r, arrival_s, deadline_s in waiting if deadline_s < newest_s
        )
        assert order.order() == [str(number) for *_, number in in_time + late]
        assert len(order.places) == len(waiting)


def test_a_step_with_thousands_waiting_costs_microseconds() -> None:
    cost = step_cost(5000)
    print(f"median {cost.p50_s * 1e6:.0f} us, p99 {cost.p99_s * 1e6:.0f} us, worst {cost.max_s * 1e6:.0f} us")
    assert cost.p50_s < 500e-6


def test_thousands_that_turn_late_at_once_are_sorted_once() -> None:
    def turn_late_s() -> float:
        order = Order({str(i): (i / 150, i / 150 + (0.5, 5.0, 30.0)[i % 3] + 100) for i in range(5000)}).places
        started_s = time.perf_counter()
        order.add(Name("new"), DueTimes(1000.0, 1001.0))
        return time.perf_counter() - started_s

    assert min(turn_late_s() for _ in range(5)) < 0.05
