"""Engines in processes of their own: one process can hold one scheduler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

from tests import warm
from tests.engine import Engine

_engine: Any = None
"""The engine of this process, where it is one of a ``Remote``."""
Outcome = TypeVar("Outcome")


class Remote:
    """An engine in a process of its own, in which functions of it are called."""

    def __init__(self, make: Callable[..., Engine], *arguments: Any, is_warm: bool = True, **options: Any) -> None:
        """``is_warm``: SGLang may have been imported before ``make`` sets an environment."""
        context, first = (warm.CONTEXT, warm.warm(_make)) if is_warm else (get_context("spawn"), _make)
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=first, initargs=(make, arguments, options))

    def call(self, function: Callable[..., Outcome], *arguments: Any) -> Outcome:
        """What ``function(engine, *arguments)`` returns or raises there."""
        return self._pool.submit(_call, function, *arguments).result()

    def close(self) -> None:
        self._pool.shutdown()


def _make(make: Callable[..., Engine], arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
    global _engine
    _engine = make(*arguments, **options)


def _call(function: Callable[..., Outcome], *arguments: Any) -> Outcome:
    return function(_engine, *arguments)
