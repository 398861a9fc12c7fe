"""What options and commands are: typed objects whose values meet their bounds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final, cast, get_type_hints

from sgl_flowprefill.bench.workloads.formats import AUTO


class OptionError(Exception):
    """An option has a value that cannot work; the message names both, and what is wanted. Not a ValueError, which tyro
    would print itself.
    """


@dataclass(frozen=True)
class Bound:
    """What the values of an option have to be."""

    wanted: str
    holds: Callable[[Any], bool]


POSITIVE: Final = Bound("a positive number", lambda value: value > 0 and math.isfinite(value))
SHARE: Final = Bound("a share between 0 and 1, like 0.9", lambda value: 0 < value < 1)
CHANGE: Final = Bound("above -1, and not 0", lambda value: value > -1 and value != 0 and math.isfinite(value))
AT_LEAST_0: Final = Bound("at least 0", lambda value: value >= 0)
SEVERAL: Final = Bound("at least 2: only the prompts after a turn's first count for throughput", lambda n: n >= 2)


class Options:
    """Options whose values meet their bounds."""

    def __post_init__(self) -> None:
        """Raises OptionError."""
        for one in dataclasses.fields(cast(Any, self)):  # all that derive from this are dataclasses
            value, default = getattr(self, one.name), cast(Any, one.default)
            flag = f"--{one.name.replace('_', '-')}"
            if value == () and default:
                raise OptionError(f"{flag}: name at least one (default {' '.join(str(item) for item in default)})")
            for bound in _bounds(type(self)).get(one.name, ()):
                for item in value if isinstance(value, tuple) else (value,):
                    if item not in (None, AUTO, default) and not bound.holds(item):
                        raise OptionError(f"{flag} {item}: it has to be {bound.wanted}")


class Command(Options):
    """The options of a command."""

    name: ClassVar[str]
    examples: ClassVar[tuple[str, ...]]
    """For the help text: options that are worth a look."""


def _bounds(options: type[Options]) -> dict[str, list[Bound]]:
    hints = get_type_hints(options, include_extras=True)
    return {
        name: [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Bound)]
        for name, hint in hints.items()
    }
