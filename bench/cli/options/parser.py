"""The command line: which command it names, and that command's options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Union

import tyro
from tyro.conf import DisallowNone, FlagCreatePairsOff, OmitArgPrefixes, subcommand

from sgl_flowprefill.bench.cli.options.base import Command
from sgl_flowprefill.bench.cli.options.breakdown import Breakdown
from sgl_flowprefill.bench.cli.options.demo import Demo, UnifiedDemo
from sgl_flowprefill.bench.cli.options.events import Events
from sgl_flowprefill.bench.cli.options.fetch_trace import FetchTrace
from sgl_flowprefill.bench.cli.options.goodput import Goodput, UnifiedGoodput
from sgl_flowprefill.bench.cli.options.replay import Replay
from sgl_flowprefill.bench.cli.options.simulate import Simulate
from sgl_flowprefill.bench.cli.options.uncontended import Uncontended
from sgl_flowprefill.bench.cli.options.validate import UnifiedValidate, Validate
from sgl_flowprefill.config import attach_values

PROGRAM: Final = "python -m sgl_flowprefill.bench"
SUMMARY: Final = "Traces, replay, comparison of systems. `COMMAND --help` shows the options of a command."
COMMANDS: Final[tuple[type[Command], ...]] = (
    Demo, Goodput, Uncontended, Breakdown, Replay, Validate, Simulate, Events, FetchTrace,
)  # fmt: skip
WITH_UNIFIED: Final[Mapping[type[Command], type[Command]]] = {
    Demo: UnifiedDemo,
    Goodput: UnifiedGoodput,
    Validate: UnifiedValidate,
}
"""Commands whose defaults are others with --unified."""
FORMER_NAMES: Final = {"anatomy": Breakdown.name}
WITH_ARGUMENTS: Final = ("--server-args", "--prefill-args", "--decode-args")


def parse(arguments: Sequence[str]) -> Command:
    """The options of the command that ``arguments`` name. Raises OptionError, and SystemExit where tyro has printed
    the help, or what it does not know.
    """
    first, *rest = [*arguments[:1], *attach_values(arguments[1:], WITH_ARGUMENTS)] or [""]
    name = FORMER_NAMES.get(first, first)
    kind: Any = next((command for command in COMMANDS if command.name == name), None)
    if "--unified" in rest:
        kind = WITH_UNIFIED.get(kind, kind)
    if kind is not None:
        program, about, given = f"{PROGRAM} {name}", _about(kind), rest
    else:  # the list of commands, or that this is none
        kind = Union[tuple(Annotated[command, subcommand(command.name)] for command in COMMANDS)]  # noqa: UP007
        program, about, given = PROGRAM, SUMMARY, list(arguments)
    parsed: Command = tyro.cli(
        kind,
        prog=program,
        description=about,
        args=given,
        config=(OmitArgPrefixes, FlagCreatePairsOff, DisallowNone),
    )
    return parsed


def _about(command: type[Command]) -> str:
    lines = [f"  {PROGRAM} {command.name} {options}" for options in command.examples]
    return "\n".join([f"{command.__doc__}", "", "Examples:", *lines])
