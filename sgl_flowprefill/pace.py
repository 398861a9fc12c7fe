"""What predictions of waiting work share, so that all of them follow the machine at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(slots=True, eq=False)
class Pace:
    """How many times longer than predicted the jobs that share it take now.

    Whoever changes ``factor`` calls ``Policy.repaced`` afterwards.
    """

    factor: float = 1.0


AS_PREDICTED: Final = Pace()
