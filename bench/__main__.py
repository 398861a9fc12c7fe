"""``python -m sgl_flowprefill.bench``: traces, replay, comparison of systems."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Callable
from types import FrameType

from rich.console import Console

from sgl_flowprefill.bench.cli.options import Command, OptionError, parse

INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns its exit code: 0, 1 for a doubtful result, 2 for what cannot work, 130 after Ctrl-C."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
    except OptionError as error:
        return _refused(error)
    return run(options)


def run(options: Command) -> int:
    """Run the command that the options belong to; its exit code."""
    # Only now: whoever asks for help, or has made a mistake, shall not wait for these.
    from sgl_flowprefill.bench.loadgen.calibrate import CalibrationError
    from sgl_flowprefill.bench.systems.catalog import systems_table
    from sgl_flowprefill.cluster import ClusterError
    from sgl_flowprefill.config import ConfigError

    console = Console(width=None if sys.stdout.isatty() else 160)
    if getattr(options, "list_systems", False):
        Console().print(systems_table())
        raise SystemExit(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell starts with it ignored
    signal.signal(signal.SIGTERM, _as_ctrl_c)
    try:
        module = importlib.import_module(f"sgl_flowprefill.bench.cli.{options.name.replace('-', '_')}")
        command: Callable[[Command, Console], int] = module.run
        return command(options, console)
    except KeyboardInterrupt:
        console.print("Stopped.")
        return INTERRUPTED
    except (CalibrationError, ClusterError, ConfigError, ValueError, OSError) as error:
        return _refused(error)


def _refused(error: Exception) -> int:
    Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    return 2


def _as_ctrl_c(signum: int, frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
