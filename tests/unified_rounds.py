"""Rounds of chance on an engine that prefills and decodes, each answer compared with SGLang's own scheduler's."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.unified_engine import Ask, Remote, StockComparison, play_and_flush

SWITCH_PROBABILITIES = (0.05, 0.3, 0.8)


@dataclass
class Rounds:
    """Rounds of random requests with aborts, all of it compared."""

    unified: Remote
    comparison: StockComparison
    asks: Sequence[Ask]
    most_requests: int = 12
    seen: Counter[str] = field(default_factory=Counter)

    def run(self, rounds: int, first: int = 0) -> None:
        """Raises AssertionError at the end of the first round with an answer that is not SGLang's."""
        for number in range(first, first + rounds):
            self.play(random.Random(number))
            self.comparison.assert_same()

    def play(self, rng: random.Random) -> None:
        """One round."""
        asked = {f"s{i:02}": rng.choice(self.asks) for i in range(rng.randrange(2, self.most_requests))}
        if rng.random() < 0.5:
            asked["twin"] = asked["s00"]
        dropped = {rid for rid in asked if rng.random() < 0.2}
        played = self.unified.call(
            play_and_flush, asked, dropped, rng.randrange(1 << 30), rng.choice(SWITCH_PROBABILITIES), rng.random() < 0.3
        )
        deepest = max(self.seen["deepest"], played.seen["deepest"])
        self.seen += played.seen
        self.seen["deepest"] = deepest
        self.comparison.compare(asked, played.answers, played.left)

    def __str__(self) -> str:
        return f"{', '.join(f'{count:,} {what}' for what, count in sorted(self.seen.items()))}; {self.comparison}"
