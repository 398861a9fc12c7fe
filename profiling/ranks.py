"""A profile measured by tensor-parallel ranks together: rank 0 says what is measured next, and all compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sgl_flowprefill.profiling.design import Shape
from sgl_flowprefill.profiling.file import Profile
from sgl_flowprefill.profiling.run import Engine, Timing

Broadcast = Callable[[Any], Any]
"""Takes rank 0's object, and returns it at every rank."""


@dataclass(frozen=True)
class Order:
    """What all ranks do next: a method of the engine, and its argument."""

    method: str
    argument: Shape | int


@dataclass(frozen=True)
class Done:
    """The run is over."""

    profile: Profile


class Leader:
    """The engine of rank 0: the other ranks do as it does."""

    def __init__(self, engine: Engine, broadcast: Broadcast) -> None:
        self._engine = engine
        self._broadcast = broadcast

    @property
    def limit_tokens(self) -> int:
        return self._engine.limit_tokens

    @property
    def is_gpu(self) -> bool:
        return self._engine.is_gpu

    def cache_prefix(self, tokens: int) -> None:
        self._broadcast(Order("cache_prefix", tokens))
        self._engine.cache_prefix(tokens)

    def time(self, shape: Shape) -> Timing:
        self._broadcast(Order("time", shape))
        return self._engine.time(shape)

    def time_operators(self, shape: Shape) -> tuple[Timing, float, float]:
        self._broadcast(Order("time_operators", shape))
        return self._engine.time_operators(shape)


def follow(engine: Engine, broadcast: Broadcast) -> Profile:
    """Another rank's part: do what rank 0's ``Leader`` does, until it says what has been measured."""
    while True:
        order = broadcast(None)
        if isinstance(order, Done):
            return order.profile
        getattr(engine, order.method)(order.argument)
