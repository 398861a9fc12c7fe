"""The policies by name. Each registers itself in a file of ``policy/orders``, and is listed by that alone."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from types import MappingProxyType, ModuleType
from typing import Any, Final, NamedTuple, TypeVar

from sgl_flowprefill.policy.base import Limits, Policy

NewPolicy = Callable[[Limits, float], Policy[Any, Any]]
"""Makes a policy within limits, in which no request starves for longer than so many seconds (where it bounds that)."""
N = TypeVar("N", bound=NewPolicy)


class Registered(NamedTuple):
    """A policy that can be chosen."""

    name: str
    summary: str
    """Completes "NAME: ..." in help texts and docs: half a sentence."""
    new: NewPolicy


_registered: Final[dict[str, Registered]] = {}
POLICIES: Final[Mapping[str, Registered]] = MappingProxyType(_registered)
"""All policies by name, in the order of the files' names."""


def register(name: str, summary: str) -> Callable[[N], N]:
    """Makes a class (or function) that is called with limits and ``max_starvation_s`` the policy called ``name``."""

    def add(new: N) -> N:
        if name in _registered:
            raise ValueError(f"two policies are called {name!r}: rename that of {new.__module__}")
        _registered[name] = Registered(name, summary, new)
        return new

    return add


def discover(package: ModuleType) -> None:
    """Import every module of ``package``, so that the policies in it register themselves."""
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name):
        importlib.import_module(f"{package.__name__}.{module.name}")


def make_policy(name: str, limits: Limits, max_starvation_s: float) -> Policy[Any, Any]:
    """The policy called ``name``, one of POLICIES."""
    if name not in POLICIES:
        raise ValueError(f"no policy is called {name!r}; there are {', '.join(POLICIES)}")
    return POLICIES[name].new(limits, max_starvation_s)


def described() -> str:
    """All policies with their summaries, for a help text."""
    return ", ".join(f"{policy.name} ({policy.summary})" for policy in POLICIES.values())
