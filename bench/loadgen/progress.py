"""Progress of a replay: a live bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

LINE_EVERY_S: Final = 10.0


class ReplayProgress:
    """Requests done of how many, failed, under way, and the least time left (until the last request is sent)."""

    def __init__(self, label: str, total: int, last_arrival_s: float, console: Console | None = None) -> None:
        self._label = label
        self._total = total
        self._last_arrival_s = last_arrival_s
        self._console = console or Console()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._next_line_s = 0.0
        self._start_s = 0.0
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )

    def __enter__(self) -> Self:
        self._start_s = time.monotonic()
        self._next_line_s = self._start_s + LINE_EVERY_S
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total, state="")
        return self

    def update(self, done: int, failed: int, in_flight: int) -> None:
        """Show the state; cheap enough to be called a few times a second."""
        now_s = time.monotonic()
        left_s = max(0.0, self._start_s + self._last_arrival_s - now_s)
        state = f"{in_flight} under way, " + (f"{failed} failed, " if failed else "")
        state += f"{left_s:.0f} s left" if left_s > 0 else "waiting for the last answers"
        if self._bar:
            self._bar.update(self._task, completed=done, state=state)
        elif now_s >= self._next_line_s:
            self._next_line_s = now_s + LINE_EVERY_S
            self._console.print(
                f"{self._label}: {done} of {self._total} requests done, {state}", highlight=False, soft_wrap=True
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
