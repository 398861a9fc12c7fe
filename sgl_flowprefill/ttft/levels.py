"""Levels: by how much nearly all of the last tasks of a kind, or of a size, were off, beside the machine's slowness.

Only the sum of both is measured, and so levels begin where most of the last tasks are. A burst of tasks that have a
level passes for no slow machine then; where most tasks have one, it is the machine's, and the others have levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median, median_low
from typing import Final

LEAST_LEVEL: Final = 0.05
"""Natural logarithm: noise alone hardly ever makes a level."""
USUAL_TASKS: Final = 200
"""Last tasks among which levels begin where most are. A burst of less than half as many does not change where."""
LEAST_USUAL_TASKS: Final = 25
"""With fewer last tasks levels begin where they did: those do not tell what is usual."""
USUAL_SHARE: Final = 0.6
"""So many of these have to have levels to the same side, or levels stay as they are. With half of them, they would
begin now here and now there where two kinds are as frequent.
"""


def level_of(ordered: Sequence[float], agreeing: int) -> float:
    """By how much the tasks were off that have these log ratios, smallest first: 0 where fewer than ``agreeing`` were
    off to the same side, by more than LEAST_LEVEL.
    """
    if len(ordered) < agreeing:
        return 0.0
    agree = ordered[-agreeing] > LEAST_LEVEL or ordered[agreeing - 1] < -LEAST_LEVEL
    return median(ordered) if agree else 0.0


def usual_level(levels: Iterable[float]) -> float:
    """Where levels begin from now on, by those of the last tasks: 0 is as before."""
    usual = sorted(levels)
    if len(usual) < LEAST_USUAL_TASKS:
        return 0.0
    most = int(USUAL_SHARE * len(usual))
    return median_low(usual) if usual[len(usual) - most] > 0 or usual[most - 1] < 0 else 0.0
