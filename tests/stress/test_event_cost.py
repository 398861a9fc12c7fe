"""What an event costs the policy, and a decode step the order of running slots: what docs/simulator.md says, or less.

By the code of ``simulate --speed``. The suite compares many that wait with few, which a busy machine can tell, too;
these figures are of a machine on which nothing else runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Final

import pytest

from sgl_flowprefill.bench.cli.simulate import PLACES_WAITED_FOR, QUEUE_LENGTHS
from sgl_flowprefill.bench.simulator.place_speed import step_cost
from sgl_flowprefill.bench.simulator.speed import KINDS, EventCost, event_cost
from sgl_flowprefill.policy import Limits, make_policy

pytestmark = [pytest.mark.stress, pytest.mark.alone]

MARGIN: Final = 2.0
"""How much more than documented it may be: no two machines are as fast."""
RUNS: Final = 3
"""How often is measured what is above its bound."""
P99_US: Final = {"feasible": 98.0, "s-edf": 58.0}
"""Documented for events, by policy: the largest of all kinds of requests. The goal is 100."""
WORST_US: Final = 1000.0
"""The goal for the event that costs most, of those that the OS does not interrupt."""
STEP_P50_US: Final = 15.0
"""Documented for a step with 5,000 waiting."""
STEP_P99_GOAL_US: Final = 200.0


def is_above(cost: EventCost, most_us: float, worst_us: float) -> bool:
    """Whether the p99 is above ``most_us``, or an event that the OS did not interrupt above ``worst_us``."""
    return cost.p99_s * 1e6 > most_us or cost.undisturbed_max_s * 1e6 > worst_us


def lowest(measure: Callable[[], EventCost], most_us: float, worst_us: float = math.inf) -> EventCost:
    """The first cost that is not above these, or the one of RUNS with the lowest p99: an odd run is none."""
    costs = [measure()]
    while is_above(costs[-1], most_us, worst_us) and len(costs) < RUNS:
        costs.append(measure())
    return min(costs, key=lambda cost: cost.p99_s)


def in_us(cost: EventCost) -> str:
    p50_us, p99_us, max_us = (seconds * 1e6 for seconds in (cost.p50_s, cost.p99_s, cost.max_s))
    undisturbed_us = cost.undisturbed_max_s * 1e6
    others = f"{undisturbed_us:.0f} without the {cost.preempted} events that were interrupted"
    return f"p50 {p50_us:.0f}, p99 {p99_us:.0f}, max {max_us:.0f} us ({others})"


@pytest.mark.parametrize("policy", P99_US)
def test_an_event_costs_what_is_documented_while_up_to_a_hundred_thousand_wait(policy: str) -> None:
    new_policy = partial(make_policy, policy, Limits(16, 2048), 60.0)
    assert max(QUEUE_LENGTHS) == 100_000
    most_us = MARGIN * P99_US[policy]
    above = []
    print()
    for kind, requests in KINDS.items():
        for waiting in QUEUE_LENGTHS:
            cost = lowest(partial(event_cost, new_policy, requests, waiting), most_us, MARGIN * WORST_US)
            line = f"{policy}, {waiting:,} {kind}: {in_us(cost)}"
            print(line, flush=True)
            if is_above(cost, most_us, MARGIN * WORST_US):
                above.append(line)
    assert not above, f"p99 above {most_us:g} us, or one above {MARGIN * WORST_US:g}: {'; '.join(above)}"


def test_a_decode_step_costs_what_is_documented_while_thousands_wait_for_a_slot() -> None:
    assert max(PLACES_WAITED_FOR) == 5_000
    print()
    for waiting in PLACES_WAITED_FOR:
        cost = lowest(partial(step_cost, waiting), STEP_P99_GOAL_US)
        print(f"order of running slots, {waiting:,} waiting: {in_us(cost)}", flush=True)
        assert cost.p50_s * 1e6 <= MARGIN * STEP_P50_US
        assert cost.p99_s * 1e6 <= STEP_P99_GOAL_US
