"""The question to a scheduler that who watches asks: it travels as the request id of SGLang's request for its internal
state, which has none of its own.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Self

PREFIX: Final = "flowprefill-live"
KEY: Final = "flowprefill_live"
"""Where the answer is in SGLang's internal state: bytes that ``state.decode_answer`` reads."""
MOST_EVENTS: Final = 500
"""Events of an answer at most: what the scheduler does for it takes some tenths of a millisecond then."""


class Ask(NamedTuple):
    """What is asked."""

    since: int
    """Number of the first event that is asked for."""
    with_state: bool = True
    """Whether the present state is asked for as well."""

    def as_rid(self) -> str:
        return f"{PREFIX}:{self.since}:{int(self.with_state)}"

    @classmethod
    def from_rid(cls, rid: str | None) -> Self | None:
        """None for a request that asks for something else."""
        if rid is None or not rid.startswith(PREFIX):
            return None
        _, since, with_state = rid.split(":")
        return cls(int(since), with_state == "1")
