"""What the order of running slots costs a decode server in each of its steps."""

from __future__ import annotations

import random
from typing import Final

from sgl_flowprefill.bench.simulator.speed import EventClock, EventCost
from sgl_flowprefill.policy.places import DueTimes, PlaceOrder

STEPS: Final = 5000
ARRIVALS_PER_S: Final = 100.0
SLOS_S: Final = (0.5, 5.0, 30.0)
MAX_STARVATION_S: Final = 60.0


class _Request:
    """Something to tell from others."""


def step_cost(waiting: int) -> EventCost:
    """What the order of running slots costs in a decode step in which one request gets a slot and another comes, with
    ``waiting`` requests of every kind: on time, late and starved.
    """
    rng = random.Random(0)
    order: PlaceOrder[_Request] = PlaceOrder(MAX_STARVATION_S)

    def arrive(number: int) -> None:
        arrival_s = number / ARRIVALS_PER_S
        order.add(_Request(), DueTimes(arrival_s, arrival_s + rng.choice(SLOS_S)))

    for number in range(waiting):
        arrive(number)
    clock = EventClock()
    for step in range(STEPS):
        clock.start()
        order.give_place(order.in_order()[0])
        arrive(waiting + step)
        clock.stop()
    return clock.cost()
