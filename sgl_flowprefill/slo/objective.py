"""What a request is promised, the keys under which that travels in SGLang's ``custom_params``, and what is valid."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

SLO_KEY: Final = "ttft_slo"
"""Seconds within which the client wants the first token."""
TBT_KEY: Final = "tbt_slo"
"""Seconds within which it wants each token after the one before."""
CLASS_KEY: Final = "slo_class"
"""Name of the request's class in the SLO policy file."""
SHEDDABLE_KEY: Final = "sheddable"
"""Whether the request may be refused when the server is overloaded."""
SOURCE_KEY: Final = "slo_source"
WEIGHT_KEY: Final = "slo_weight"
"""Keys that only the server writes: a request that has a source has been resolved."""
EXAMPLES: Final = {SLO_KEY: 0.5, TBT_KEY: 0.1}
LONGEST_SLO_S: Final = 1e9
"""Thirty years; a number beyond is a mistake, and an integer of more than 64 bits cannot travel to the scheduler."""
MOST_WEIGHT: Final = 1e6
"""The largest that a class of the policy may have."""
ECHOED_CHARACTERS: Final = 60
"""How much of an invalid value its refusal repeats."""
CLASS_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
DEFAULT: Final = "default"
"""The class of requests that get no other, and the source of objectives that nobody has named."""


class SloError(ValueError):
    """The client's objective is not valid; the message is meant for the client."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What one request is promised, and where that came from."""

    ttft_s: float
    """For the first token, from when the HTTP server received the request."""
    tbt_s: float
    """For each token after the one before."""
    slo_class: str = DEFAULT
    slo_source: str = DEFAULT
    """Where ``ttft_s`` came from: a body, a header, a priority, a service tier, the policy file, or the default."""
    weight: float = 1.0
    """How much meeting it counts, beside other requests."""
    sheddable: bool = False

    @classmethod
    def resolved(cls, custom_params: Any) -> Self | None:
        """The objective that ``to_custom_params`` wrote; None for what it cannot have written."""
        if not isinstance(custom_params, Mapping) or SOURCE_KEY not in custom_params:
            return None
        try:
            return cls(
                _positive(custom_params[SLO_KEY]),
                _positive(custom_params[TBT_KEY]),
                str(custom_params[CLASS_KEY]),
                str(custom_params[SOURCE_KEY]),
                _positive(custom_params[WEIGHT_KEY], MOST_WEIGHT),
                bool(custom_params[SHEDDABLE_KEY]),
            )
        except (KeyError, ValueError):  # a client's own, of a request that came past the HTTP process
            return None

    def to_custom_params(self) -> dict[str, float | str | bool]:
        """What travels to the scheduler."""
        return {
            SLO_KEY: self.ttft_s,
            TBT_KEY: self.tbt_s,
            CLASS_KEY: self.slo_class,
            SOURCE_KEY: self.slo_source,
            WEIGHT_KEY: self.weight,
            SHEDDABLE_KEY: self.sheddable,
        }

    def as_asked(self) -> dict[str, float]:
        """The ``custom_params`` of a client that asks for its times, as far as clients may. Not for its class, which
        another server may not have.
        """
        times_s = {SLO_KEY: self.ttft_s, TBT_KEY: self.tbt_s}
        return {key: time_s for key, time_s in times_s.items() if is_objective(time_s)}


def check_object(custom_params: Any) -> None:
    """Raises SloError for ``custom_params`` that are no object, in which nothing can be named; SGLang has no others."""
    if custom_params is not None and not isinstance(custom_params, Mapping):
        raise SloError(
            f"custom_params must be an object, got {shortened(custom_params)}; for example "
            f'{{"custom_params": {{"{SLO_KEY}": {EXAMPLES[SLO_KEY]}}}}}.'
        )


def objective_s(key: str, custom_params: Any) -> float | None:
    """The objective in seconds that clients put under ``key`` of SGLang's ``custom_params``; None where they name none.

    Raises SloError for a value that is no positive number, or one above LONGEST_SLO_S.
    """
    value = named(key, custom_params)
    if value is None:
        return None
    if not is_objective(value):
        raise SloError(
            f'custom_params["{key}"] must be a positive, finite number of seconds (at most {LONGEST_SLO_S:,.0f}), '
            f'got {shortened(value)}; for example {{"custom_params": {{"{key}": {EXAMPLES[key]}}}}}.'
        )
    return float(value)


def class_name(custom_params: Any) -> str | None:
    """The class that ``custom_params`` name. Raises SloError for what is no name of one."""
    name = named(CLASS_KEY, custom_params)
    if name is not None and not (isinstance(name, str) and CLASS_NAME.fullmatch(name)):
        raise SloError(
            f'custom_params["{CLASS_KEY}"] must be the name of a class (letters, digits, _, . and -, at most 64), got '
            f"{shortened(name)}."
        )
    return name


def is_sheddable(custom_params: Any) -> bool | None:
    """Whether the client says that its request may be refused. Raises SloError for what is neither true nor false."""
    value = named(SHEDDABLE_KEY, custom_params)
    if value is not None and not isinstance(value, bool):
        raise SloError(f'custom_params["{SHEDDABLE_KEY}"] must be true or false, got {shortened(value)}.')
    return value


def is_objective(value: Any) -> bool:
    """Whether ``value`` can be an objective in seconds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= LONGEST_SLO_S


def _positive(value: Any, most: float = math.inf) -> float:
    """``value``, if it is a number above 0 and at ``most`` that; raises ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise ValueError(f"{shortened(value)} is not above 0 and at most {most}")
    return float(value)


def named(key: str, custom_params: Any) -> Any:
    """What ``custom_params`` have under ``key``; None where that is nothing, or where they are no mapping."""
    return custom_params.get(key) if isinstance(custom_params, Mapping) else None


def shortened(value: Any) -> str:
    """``value`` as its refusal repeats it."""
    text = repr(value)
    return text if len(text) <= ECHOED_CHARACTERS else text[: ECHOED_CHARACTERS - 1] + "…"
