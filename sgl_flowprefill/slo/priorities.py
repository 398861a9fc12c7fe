"""Which class a request's priority stands for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from sgl_flowprefill.slo.objective import LONGEST_SLO_S


@dataclass(frozen=True)
class PriorityClasses:
    """The TTFT objectives that SGLang's priorities stand for.

    A class has the priorities from its number on, towards the more urgent ones, up to the next class. Which numbers
    are the more urgent ones follows from the objectives: the shorter, the more urgent. The last class has all others.
    """

    numbers: tuple[int, ...]
    """Of the classes, the most urgent first."""
    slos_s: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of ``10:0.5,0:2``. Raises ValueError with what is expected."""
        pairs = []
        for item in text.split(","):
            number, _, slo_s = item.partition(":")
            if not re.fullmatch(r"\s*[+-]?\d+\s*", number) or not re.fullmatch(r"\s*\d*\.?\d+\s*", slo_s):
                raise ValueError("expected PRIORITY:SECONDS,PRIORITY:SECONDS,… such as 10:0.5,0:2,-10:30")
            pairs.append((float(slo_s), int(number)))
        pairs.sort()
        slos_s, numbers = tuple(slo_s for slo_s, _ in pairs), tuple(number for _, number in pairs)
        if slos_s[0] == 0 or slos_s[-1] > LONGEST_SLO_S:
            raise ValueError(f"objectives are above 0 and at most {LONGEST_SLO_S:,.0f} seconds")
        if len(set(slos_s)) < len(pairs) or not is_order(numbers):
            raise ValueError("objectives have to grow as priorities fall, or as they rise")
        return cls(numbers, slos_s)

    def slo_s(self, priority: int) -> float:
        """The objective that ``priority`` stands for."""
        return self.slos_s[place(self.numbers, priority)]


def is_order(numbers: Sequence[int]) -> bool:
    """Whether ``numbers`` rise from one to the next, or fall."""
    rising = sorted(set(numbers))
    return list(numbers) in (rising, rising[::-1])


def is_low_first(numbers: Sequence[int]) -> bool:
    """Whether small priorities are the urgent ones, of classes that begin at ``numbers``, the most urgent first."""
    return len(numbers) > 1 and numbers[0] < numbers[1]


def place(numbers: Sequence[int], priority: int) -> int:
    """Which of the classes that begin at ``numbers``, the most urgent first, has ``priority``."""
    low_first = is_low_first(numbers)
    for index, number in enumerate(numbers):
        if priority <= number if low_first else priority >= number:
            return index
    return len(numbers) - 1
