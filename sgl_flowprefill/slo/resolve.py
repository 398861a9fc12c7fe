"""The one order in which a request's objective is chosen. No clock, no file, no SGLang: all that counts is passed in.

What asks for something is an ``Ask``, and a request has a list of them: its body, its headers, its priority, its
service tier, the policy file, the default. Each of the TTFT objective, the TBT objective and the class comes from the
first that has it; one that names a class has the class's objectives, too, behind those that it names itself. A request
may be refused where its class or any of them says so.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from sgl_flowprefill.slo.objective import DEFAULT, Objective, SloError, shortened
from sgl_flowprefill.slo.policy import EMPTY, SloClass, SloPolicy
from sgl_flowprefill.slo.priorities import PriorityClasses

POLICY_FILE: Final = "policy file"
PRIORITY: Final = "priority"
SERVICE_TIER: Final = "service_tier"
KEYS: Final = 10_000
"""API keys whose requests are counted; the one that was idle longest is forgotten beyond."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What one source asks for."""

    source: str
    ttft_s: float | None = None
    tbt_s: float | None = None
    slo_class: str | None = None
    sheddable: bool | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What is known of a request before it is sent to the scheduler."""

    asks: Sequence[Ask] = ()
    """Of its client: the body, then the headers."""
    priority: int | None = None
    service_tier: str | None = None
    model: str = ""
    prompt_tokens: int = 0
    api_key: str = ""


@dataclass
class TightRequests:
    """How many requests have asked for less than their class's own objective: a bucket for each key, which fills evenly
    and holds a minute's worth.
    """

    _left: OrderedDict[tuple[str, str], tuple[float, float]] = field(default_factory=OrderedDict, init=False)
    """Requests that a key has left, and when that was so; the key that was idle longest first."""

    def take(self, key: tuple[str, str], per_minute: float, now_s: float) -> bool:
        """Whether ``key`` may have one more, of ``per_minute``."""
        most = max(1.0, per_minute)
        left, since_s = self._left.pop(key, (most, now_s))
        left = min(most, left + per_minute * (now_s - since_s) / 60)
        self._left[key] = (left - 1 if left >= 1 else left, now_s)
        if len(self._left) > KEYS:
            self._left.popitem(last=False)
        return left >= 1


@dataclass(frozen=True)
class Resolver:
    """Chooses objectives by one policy."""

    default_ttft_s: float
    default_tbt_s: float
    priorities: PriorityClasses | None = None
    """What priorities stand for where the policy says nothing of them."""
    policy: SloPolicy = EMPTY
    tight: TightRequests = field(default_factory=TightRequests)
    """Goes on counting with the next policy."""

    def check(self, asks: Sequence[Ask]) -> None:
        """Raises SloError for a class that there is not."""
        classes = self.policy.classes
        for ask in asks:
            if ask.slo_class is None or ask.slo_class in classes or ask.slo_class == DEFAULT:
                continue
            there = (
                f"there are {', '.join(dict.fromkeys([*classes, DEFAULT]))}"
                if classes
                else "this server has no --flowprefill-slo-policy, which says what classes there are"
            )
            raise SloError(f"The {ask.source} names the class {shortened(ask.slo_class)}; {there}.")

    def resolve(self, request: Request, now_s: float) -> Objective:
        """The objective of ``request``, which comes at ``now_s`` of a monotonic clock."""
        asks = [*request.asks, *self._further(request)]
        of_ttft, ttft_s = next((ask, found) for ask in asks if (found := self._ttft_s(ask, request)) is not None)
        of_tbt, tbt_s = next((ask, found) for ask in asks if (found := self._tbt_s(ask)) is not None)
        slo_class = next((ask.slo_class for ask in asks if ask.slo_class is not None), DEFAULT)
        terms, source = self._class(slo_class), of_ttft.source
        bounded_by = slo_class if terms.has_bounds else DEFAULT
        if of_ttft.ttft_s is not None and of_ttft in request.asks:
            ttft_s, source = self._bounded(ttft_s, source, terms, bounded_by, request, now_s)
        if of_tbt.tbt_s is not None and of_tbt in request.asks:
            tbt_s = max(tbt_s, self._class(bounded_by).min_tbt_s or 0.0)
        sheddable = terms.sheddable or any(ask.sheddable for ask in asks)
        return Objective(ttft_s, tbt_s, slo_class, source, terms.weight, sheddable)

    def _further(self, request: Request) -> Iterator[Ask]:
        """What asks for something behind the client."""
        policy, priority = self.policy, request.priority
        if priority is not None:
            if policy.priorities:
                yield Ask(PRIORITY, slo_class=policy.of_priority(priority))
            elif self.priorities is not None:
                yield Ask(PRIORITY, ttft_s=self.priorities.slo_s(priority))
        if request.service_tier is not None:
            yield Ask(SERVICE_TIER, slo_class=policy.service_tiers.get(request.service_tier))
        yield Ask(POLICY_FILE, slo_class=policy.of_rules(request.model, request.prompt_tokens))
        yield Ask(DEFAULT, self.default_ttft_s, self.default_tbt_s)

    def _class(self, name: str | None) -> SloClass:
        return NO_TERMS if name is None else self.policy.classes.get(name, NO_TERMS)

    def _ttft_s(self, ask: Ask, request: Request) -> float | None:
        return self._class(ask.slo_class).objective_s(request.prompt_tokens) if ask.ttft_s is None else ask.ttft_s

    def _tbt_s(self, ask: Ask) -> float | None:
        return self._class(ask.slo_class).tbt_s if ask.tbt_s is None else ask.tbt_s

    def _bounded(
        self, ttft_s: float, source: str, terms: SloClass, bounded_by: str, request: Request, now_s: float
    ) -> tuple[float, str]:
        """What a client gets that asks for ``ttft_s``, and why."""
        bounds = self._class(bounded_by)
        own_s = terms.objective_s(request.prompt_tokens) or bounds.objective_s(request.prompt_tokens) or math.inf
        least_s = min(bounds.min_ttft_s or 0.0, own_s)
        if ttft_s < least_s:
            ttft_s, source = least_s, f"{source}, raised to min_ttft_s"
        if bounds.tight_per_minute is not None and ttft_s < own_s:
            key = (bounded_by, request.api_key if bounds.tight_by == "api_key" else "")
            if not self.tight.take(key, bounds.tight_per_minute, now_s):
                return own_s, f"{POLICY_FILE}, beyond tight_per_minute"
        return ttft_s, source


NO_TERMS: Final = SloClass()
"""A class that promises nothing."""
