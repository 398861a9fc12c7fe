"""What became of rounds with a planted defect: whether a comparison caught it, or something else ended them."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass
from typing import Any

_CHECKS = re.compile(r"memory leak detected|KV double free|KV page use-after-free")
"""What SGLang's checks of its pools say in the ValueError that they raise; its other checks are assertions."""


class Crash(Exception):
    """The forward pass of a prefill raised: no test would say so if only the requests of that prefill ended."""


def raise_crashes(role: Any) -> None:
    """Let any error within a forward pass but a test's own assertion end the rounds."""
    drop = role.drop

    def drop_or_raise(task: Any) -> None:
        failure = task.failure
        if failure is not None and failure.kind != "AssertionError":
            raise Crash(failure.traceback)
        drop(task)

    role.drop = drop_or_raise


@dataclass(frozen=True)
class Outcome:
    """What became of rounds."""

    strikes: int
    """Times that the defect struck."""
    error: Exception | None
    """What ended the rounds, if something did."""

    @property
    def is_found(self) -> bool:
        """Whether a comparison or an invariant ended the rounds. Any other error says that the defect itself is broken,
        such as one in whose place an attribute has another name now.
        """
        return isinstance(self.error, AssertionError) or (
            isinstance(self.error, ValueError) and _CHECKS.search(str(self.error)) is not None
        )

    def is_as_it_should_be(self, is_planted: bool) -> bool:
        """A defect that was planted has struck and is found; without one, nothing has happened."""
        if is_planted:
            return self.strikes > 0 and self.is_found
        return self.strikes == 0 and self.error is None

    def __str__(self) -> str:
        if self.error is None:
            return "nothing differs"
        text = str(self.error)
        if not (isinstance(self.error, AssertionError) and text):
            text = "".join(traceback.format_exception(self.error, limit=-3))
        return f"{'caught by' if self.is_found else 'NOT caught, but ended by'}\n{text}"
