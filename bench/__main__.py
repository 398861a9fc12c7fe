"""``python -m sgl_flowprefill.bench``: traces, replay, comparison of systems."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from types import FrameType

from rich.console import Console

from sgl_flowprefill.bench.cli import anatomy, demo, fetch_trace, goodput, uncontended, validate
from sgl_flowprefill.bench.cli import events as event_log
from sgl_flowprefill.bench.cli import replay as replay_command
from sgl_flowprefill.bench.cli import simulate as simulator
from sgl_flowprefill.bench.loadgen.calibrate import CalibrationError
from sgl_flowprefill.cluster import ClusterError
from sgl_flowprefill.config import ConfigError

INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns its exit code: 0, 1 for a doubtful result, 2 for what cannot work, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace, Console], int] = args.command
    console = Console(width=None if sys.stdout.isatty() else 160)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell starts with it ignored
    signal.signal(signal.SIGTERM, _as_ctrl_c)
    try:
        return command(args, console)
    except KeyboardInterrupt:
        console.print("Stopped.")
        return INTERRUPTED
    except (CalibrationError, ClusterError, ConfigError, ValueError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sgl_flowprefill.bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module, summary in (
        ("demo", demo, "compare FlowPrefill with SGLang's stock scheduler on this machine"),
        ("goodput", goodput, "the highest rate at which each system keeps its SLOs, on this machine, side by side"),
        ("uncontended", uncontended, "what FlowPrefill costs when nobody waits, in pairs with stock SGLang unchunked"),
        ("anatomy", anatomy, "where the time of a lone request goes, from client to first token"),
        ("replay", replay_command, "replay a trace against a running endpoint"),
        ("validate", validate, "simulated against measured attainment, on the same traces with the engine's profile"),
        ("simulate", simulator, "policies on a model of the machine: attainment, goodput, capacity, and the limit"),
        ("events", event_log, "what an event log says: how busy the server was, blocking, prediction errors"),
        ("fetch-trace", fetch_trace, "download a published trace"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(command=module.run)
    return parser


def _as_ctrl_c(signum: int, frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
