"""Where a forward pass is, and how much of it is left, by the preemption checkpoints that it has passed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, cycle, islice


class Progress:
    """What each preemption checkpoint of a forward pass follows, and how much is left behind it."""

    def __init__(self, is_attention: Sequence[bool], names: Sequence[str] = ()) -> None:
        """``is_attention`` says of every preemption checkpoint, in order, whether it follows attention (else: MLP, or a
        layer); ``names`` are those of the modules that they follow, where they are known.
        """
        self._pattern = is_attention
        self._names = names
        self._attention = [0, *accumulate(is_attention)]

    @property
    def checkpoints(self) -> int:
        """Preemption checkpoints of one forward pass."""
        return len(self._attention) - 1

    def behind(self, passed: int) -> str:
        """The module that the last of ``passed`` checkpoints follows; empty where there is none, or its name is not
        known.
        """
        return self._names[(passed - 1) % len(self._names)] if passed and self._names else ""

    def passed_all(self, checkpoints: int) -> None:
        """A forward pass is done and had so many ``checkpoints``: some models run their layers more than once."""
        if checkpoints != self.checkpoints:
            self._attention = [0, *accumulate(islice(cycle(self._pattern), checkpoints))]

    def left(self, passed: int, attention_share: float) -> float:
        """Share of the time that is left behind ``passed`` of them; attention takes ``attention_share`` of all."""
        passed = min(passed, self.checkpoints)
        attention, all_attention = self._attention[passed], self._attention[-1]
        others, all_others = passed - attention, self.checkpoints - all_attention
        if not all_attention or not all_others:
            return 1.0 - passed / self.checkpoints
        done = attention_share * attention / all_attention + (1.0 - attention_share) * others / all_others
        return max(0.0, 1.0 - done)
