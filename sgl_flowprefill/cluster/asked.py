"""Questions that may take a while, asked aside so that nothing else waits for the answer."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")


class Asked(Generic[T]):
    """The answer to a question that a thread of its own asks. The thread does not keep the process from ending."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self._answer: Future[T] = Future()
        Thread(target=self._run, args=(ask,), daemon=True).start()

    @property
    def is_answered(self) -> bool:
        return self._answer.done()

    def wait(self, timeout_s: float) -> None:
        """Give the answer this long to come."""
        wait([self._answer], timeout=max(0.0, timeout_s))

    def answer(self) -> T:
        """Wait for the answer: what ``ask`` has returned. Raises what ``ask`` has raised."""
        return self._answer.result()

    def _run(self, ask: Callable[[], T]) -> None:
        try:
            self._answer.set_result(ask())
        except BaseException as error:
            self._answer.set_exception(error)
