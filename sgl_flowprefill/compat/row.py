"""What one row of the table of SGLang's options says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

Server = Literal["prefill", "unified"]
SERVERS: Final[tuple[Server, ...]] = ("prefill", "unified")
MODE: Final[dict[Server, str]] = {"prefill": "prefill", "unified": "null"}
"""``--disaggregation-mode`` of each kind of server."""
Treatment = Literal["left", "set", "refused"]

NOTHING: Final = (None, False, 0, "none", "null", "off")
"""Values that ask for nothing, beside empty ones."""
FLAGS: Final = {
    "ep_join_mode": "--elastic-ep-join-mode",
    "ep_join_rank_offset": "--elastic-ep-join-rank-offset",
    "fp8_gemm_runner_backend": "--fp8-gemm-backend",
    "fp4_gemm_runner_backend": "--fp4-gemm-backend",
}
"""Options whose name on the command line is not that of their field."""


@dataclass(frozen=True)
class Values:
    """Some values of an option."""

    holds: Callable[[Any], bool]
    words: str = ""
    """How the docs call them, behind the option."""


GIVEN: Final = Values(lambda value: bool(value) and value not in NOTHING)
ABOVE_ONE: Final = Values(lambda value: (value or 1) > 1, "above 1")
POSITIVE: Final = Values(lambda value: (value or 0) > 0, "above 0")


def one_of(*names: str) -> Values:
    """The values ``names``."""
    return Values(lambda value: value in names, _listed(names))


def other_than(*names: str) -> Values:
    """All values but ``names``, in capital letters or small ones, and but none."""
    lowered = {name.lower() for name in names}
    return Values(lambda value: value is not None and str(value).lower() not in lowered, f"other than {_listed(names)}")


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


@dataclass(frozen=True)
class Row:
    """What FlowPrefill does about options of SGLang, and why.

    Options are fields of SGLang's ``ServerArgs``.
    """

    treatment: Treatment
    options: tuple[str, ...]
    why: str
    servers: tuple[Server, ...] = SERVERS
    """Kinds of servers that the row is about."""
    values: Values = GIVEN
    """Of a row that refuses: what it refuses."""
    to: Any = None
    """Of a row that sets: the value that the option gets."""
    default: Any = None
    """Of a row that sets: SGLang's default. A user who gives another value has asked for it."""
    only_with: str = ""
    """Of a row that sets: the option that has to be given, if any; without it, this one has no effect."""

    @property
    def is_needed(self) -> bool:
        """Whether the option, left alone, is wrong: SGLang's default is not what it is set to."""
        return bool(self.to) and self.to != self.default

    def is_about(self, server: Server, options: Any) -> bool:
        """Whether the row applies to a server of this kind with these ``options``."""
        return server in self.servers and (not self.only_with or GIVEN.holds(getattr(options, self.only_with, None)))

    def works(self, value: Any) -> bool:
        """Of a row that sets: whether a server can run with ``value``."""
        return bool(value == self.to) or (not value and not self.is_needed)


@dataclass(frozen=True)
class Group:
    """Rows of one group of SGLang's options."""

    title: str
    namespaces: tuple[str, ...]
    """Groups of SGLang, all of whose options have rows here. None: only some options have."""
    rows: tuple[Row, ...]


def flag(option: str) -> str:
    """The option as it is given on a command line."""
    return FLAGS.get(option, "--" + option.replace("_", "-"))


def shown(option: str, value: Any) -> str:
    """The option with its value, as it is given on a command line."""
    return flag(option) if value is True else f"{flag(option)} {value}"


def is_on(variable: str, env: Mapping[str, str]) -> bool:
    """Whether a variable of ``env`` says yes, as SGLang reads them."""
    return env.get(variable, "").lower() in ("1", "true", "yes", "y")


# ---- rows, written shortly ----------------------------------------------------------------------------------------


def leave(options: str, why: str = "", servers: tuple[Server, ...] = SERVERS) -> Row:
    """Options that stay as they are."""
    return Row("left", tuple(options.split()), why, servers)


def put(
    option: str, to: Any, why: str, *, default: Any, servers: tuple[Server, ...] = SERVERS, only_with: str = ""
) -> Row:
    """An option that FlowPrefill sets."""
    return Row("set", (option,), why, servers, to=to, default=default, only_with=only_with)


def refuse(
    option: str | tuple[str, ...], why: str, values: Values = GIVEN, servers: tuple[Server, ...] = SERVERS
) -> Row:
    """An option, or several, that ends the server before it starts where it has one of ``values``."""
    return Row("refused", (option,) if isinstance(option, str) else option, why, servers, values)
