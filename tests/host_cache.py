"""Servers with SGLang's hierarchical cache: a device without room for all prompts, and what the host gives back."""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple, Self

from tests.prompts import prompt
from tests.rank_notes import noting
from tests.ranks import Ranks

POOL_TOKENS: Final = 5000
OPTIONS: Final[dict[str, Any]] = {
    "enable_hierarchical_cache": True,
    "hicache_ratio": 8.0,
    "hicache_write_policy": "write_through",
    "max_total_tokens": POOL_TOKENS,
}
PREFIXES: Final = [prompt(40 + i, 400 + 60 * i) for i in range(9)]
PROMPTS: Final = [prompt(i, len(prefix) + 20 + 37 * (i % 7), prefix) for prefix in PREFIXES for i in range(100, 104)]
"""Four for each prefix; the device has room for the prompts of some."""
WAVES: Final = [{f"w{wave}-{i}": PROMPTS[4 * i + wave] for i in range(len(PREFIXES))} for wave in range(4)]
"""The same, one for each prefix at a time, by request ids that end with the number of the prefix: what is asked next
has been evicted meanwhile.
"""


class Loads:
    """What a scheduler loads from host memory."""

    def __init__(self, scheduler: Any) -> None:
        self.tokens: list[int] = []
        """Of each load."""
        self.beside_others = 0
        """Batches that were made while a load of another one was under way."""
        controller = scheduler.tree_cache.cache_controller
        start_loading = controller.start_loading

        def noted() -> Any:
            tokens = sum(len(load.device_indices) for load in controller.load_queue)
            self.note(tokens, any(not load.finish_event.query() for load in controller.ack_load_queue))
            return start_loading()

        controller.start_loading = noted

    def note(self, tokens: int, is_beside_another: bool) -> None:
        """A batch is made: for how many ``tokens`` a load begins, and whether one for another batch is under way."""
        self.beside_others += is_beside_another
        if tokens:
            self.tokens.append(tokens)

    def __str__(self) -> str:
        return f"{len(self.tokens)} loads of {sum(self.tokens)} tokens, {self.beside_others} batches beside a load"


class WrittenLoads(Loads):
    """Writes a line for each batch of a rank."""

    def __init__(self, scheduler: Any, rank: int) -> None:
        self._notes = noting("loads", rank)
        super().__init__(scheduler)

    def note(self, tokens: int, is_beside_another: bool) -> None:
        super().note(tokens, is_beside_another)
        self._notes.write(json.dumps({"tokens": tokens, "beside": is_beside_another}) + "\n")


class Noted(NamedTuple):
    """What ``WrittenLoads`` has written at a rank."""

    tokens: list[int]
    """Of each load."""
    beside_others: int
    """Batches that were made while a load of another one was under way."""

    @classmethod
    def at(cls, ranks: Ranks, rank: int) -> Self:
        notes = ranks.notes("loads", rank)
        return cls([note["tokens"] for note in notes if note["tokens"]], sum(note["beside"] for note in notes))
