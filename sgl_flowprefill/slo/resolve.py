"""The one order in which a request's objective is chosen. No clock, no file, no SGLang: all that counts is passed in.

What asks for something is an ``Ask``, and a request has a list of them: its body, its headers, its priority, its
service tier, SGLang's default priority, the policy file, the default. Each of the TTFT objective, the TBT objective and
the class comes from the first that has it; one that names a class has the class's objectives, too, behind those that it
names itself. A class may be named so often a minute; a further request goes by what the server asks. A request may be
refused where its class or any of them says so.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from sgl_flowprefill.slo.objective import DEFAULT, Objective, SloError, shortened
from sgl_flowprefill.slo.policy import EMPTY, SloClass, SloPolicy
from sgl_flowprefill.slo.priorities import PriorityClasses

POLICY_FILE: Final = "policy file"
PRIORITY: Final = "priority"
SERVICE_TIER: Final = "service_tier"
DEFAULT_PRIORITY: Final = "default priority"
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
    """The one that its client asks for."""
    service_tier: str | None = None
    model: str = ""
    prompt_tokens: int = 0
    api_key: str = ""
    default_priority: int | None = None
    """What SGLang gives a request without one (``--default-priority-value``)."""


@dataclass
class PerMinute:
    """How many requests have had what is bounded by the minute: a bucket for each key, which fills evenly and holds a
    minute's worth.
    """

    _left: OrderedDict[tuple[str, str], tuple[float, float]] = field(default_factory=OrderedDict, init=False)
    """Requests that a key has left, and when that was so; the key that was idle longest first."""

    def has(self, key: tuple[str, str], per_minute: float, now_s: float) -> bool:
        """Whether ``key`` has one left, of ``per_minute``."""
        most = max(1.0, per_minute)
        left, since_s = self._left.pop(key, (most, now_s))
        left = min(most, left + per_minute * (now_s - since_s) / 60)
        self._left[key] = left, now_s
        if len(self._left) > KEYS:
            self._left.popitem(last=False)
        return left >= 1

    def take(self, key: tuple[str, str], per_minute: float, now_s: float) -> bool:
        """Whether ``key`` may have one more, of ``per_minute``, which it has then."""
        if not self.has(key, per_minute, now_s):
            return False
        left, since_s = self._left[key]
        self._left[key] = left - 1, since_s
        return True


class Choice(NamedTuple):
    """The asks that the parts of an objective come from."""

    of_ttft: Ask
    ttft_s: float
    of_tbt: Ask
    tbt_s: float
    of_class: Ask | None
    """None: none of them names a class."""

    def named(self) -> set[str]:
        """Classes that clients have named and that say something of the objective."""
        asks = (
            self.of_class,
            self.of_ttft if self.of_ttft.ttft_s is None else None,
            self.of_tbt if self.of_tbt.tbt_s is None else None,
        )
        return {ask.slo_class for ask in asks if ask is not None and ask.slo_class is not None and is_clients(ask)}


@dataclass(frozen=True)
class Resolver:
    """Chooses objectives by one policy."""

    default_ttft_s: float
    default_tbt_s: float
    priorities: PriorityClasses | None = None
    """What priorities stand for where the policy says nothing of them."""
    policy: SloPolicy = EMPTY
    tight: PerMinute = field(default_factory=PerMinute)
    """Requests that have asked for less than their class's own objective. Goes on counting with the next policy."""
    naming: PerMinute = field(default_factory=PerMinute)
    """Requests that have named their class. Goes on counting with the next policy."""
    counts: bool = True
    """Whether it counts these: not on a decode server, which sees the requests of a whole pool of prefill servers."""

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
        choice, beyond = self._choose(asks, request), ""
        if not self._may_name(choice.named(), request, now_s):
            asks = [replace(ask, slo_class=None) if is_clients(ask) else ask for ask in asks]
            choice, beyond = self._choose(asks, request), ", beyond named_per_minute"
        of_client = asks[: len(request.asks)]
        of_ttft, ttft_s, of_tbt, tbt_s, of_class = choice
        slo_class = DEFAULT if of_class is None or of_class.slo_class is None else of_class.slo_class
        terms, source = self._class(slo_class), of_ttft.source + beyond
        bounded_by = slo_class if terms.has_bounds else DEFAULT
        if of_ttft.ttft_s is not None and of_ttft in of_client:
            ttft_s, source = self._bounded(ttft_s, source, terms, bounded_by, request, now_s)
        if of_tbt.tbt_s is not None and of_tbt in of_client:
            tbt_s = max(tbt_s, self._class(bounded_by).min_tbt_s or 0.0)
        sheddable = terms.sheddable or any(ask.sheddable for ask in asks)
        return Objective(ttft_s, tbt_s, slo_class, source, terms.weight, sheddable)

    def _further(self, request: Request) -> Iterator[Ask]:
        """What asks for something behind the client's body and headers."""
        if request.priority is not None:
            yield self._of_priority(PRIORITY, request.priority)
        if request.service_tier is not None:
            yield Ask(SERVICE_TIER, slo_class=self.policy.service_tiers.get(request.service_tier))
        if request.priority is None and request.default_priority is not None:
            yield self._of_priority(DEFAULT_PRIORITY, request.default_priority)
        yield Ask(POLICY_FILE, slo_class=self.policy.of_rules(request.model, request.prompt_tokens))
        yield Ask(DEFAULT, self.default_ttft_s, self.default_tbt_s)

    def _of_priority(self, source: str, priority: int) -> Ask:
        if self.policy.priorities or self.priorities is None:
            return Ask(source, slo_class=self.policy.of_priority(priority))
        return Ask(source, ttft_s=self.priorities.slo_s(priority))

    def _choose(self, asks: Sequence[Ask], request: Request) -> Choice:
        of_ttft, ttft_s = next((ask, found) for ask in asks if (found := self._ttft_s(ask, request)) is not None)
        of_tbt, tbt_s = next((ask, found) for ask in asks if (found := self._tbt_s(ask)) is not None)
        of_class = next((ask for ask in asks if ask.slo_class is not None), None)
        return Choice(of_ttft, ttft_s, of_tbt, tbt_s, of_class)

    def _may_name(self, slo_classes: set[str], request: Request, now_s: float) -> bool:
        """Whether one more request may belong to classes because its client has named them: it counts for all of them,
        or for none.
        """
        bounded: list[tuple[tuple[str, str], float]] = []
        for name in slo_classes:
            terms = self._class(name)
            if self.counts and terms.named_per_minute is not None:
                bounded.append((_key(name, terms, request), terms.named_per_minute))
        if not all(self.naming.has(key, per_minute, now_s) for key, per_minute in bounded):
            return False
        for key, per_minute in bounded:
            self.naming.take(key, per_minute, now_s)
        return True

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
        if (
            bounds.tight_per_minute is not None
            and self.counts
            and ttft_s < own_s
            and not self.tight.take(_key(bounded_by, bounds, request), bounds.tight_per_minute, now_s)
        ):
            return own_s, f"{POLICY_FILE}, beyond tight_per_minute"
        return ttft_s, source


def is_clients(ask: Ask) -> bool:
    """Whether it is the client that asks, not the server."""
    return ask.source not in (DEFAULT_PRIORITY, POLICY_FILE, DEFAULT)


def _key(slo_class: str, terms: SloClass, request: Request) -> tuple[str, str]:
    """Whose requests are counted together."""
    return slo_class, request.api_key if terms.tight_by == "api_key" else ""


NO_TERMS: Final = SloClass()
"""A class that promises nothing."""
