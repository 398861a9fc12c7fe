"""The process in which ``launch.py profile`` measures, forked warm: what the command adds to it is left out."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sgl_flowprefill.cluster import ClusterConfig, preflight
from sgl_flowprefill.profiling.process import main
from tests import warm
from tests.engine import compile_nothing

SET = ("--disable-overlap-schedule", "--chunked-prefill-size", "-1")
"""Options that FlowPrefill sets in a process that no other one of Python's has started, which this one is not."""
START_S = 240.0
"""Longest that it takes until something is saved, on a busy machine."""


def interrupt(directory: Path, partial: Path, options: Sequence[str]) -> None:
    """Measure to ``directory`` with ``options`` of servers, and end it when it has saved something in ``partial``."""
    layout = preflight.prepare(ClusterConfig(flowprefill=True, server_args=options, decode_args=("--base-gpu-id", "0")))
    arguments = ["--budget-s", "20", "--output", str(directory / "p.parquet"), *layout.server_options("prefill"), *SET]
    variables, log = layout.server_env("prefill"), directory / "profile.log"
    with pytest.MonkeyPatch.context() as environment:
        for name in os.environ.keys() - variables.keys():
            environment.delenv(name)
        for name, value in variables.items():
            environment.setenv(name, value)
        target = warm.warm(_measure)
    process = warm.CONTEXT.Process(target=target, args=(arguments, log), daemon=True)
    process.start()
    assert process.pid is not None
    try:
        wait_for(partial, process.is_alive, log)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode == 0, log.read_text()[-2000:]
    finally:
        process.kill()


def wait_for(partial: Path, is_alive: Callable[[], bool], log: Path) -> None:
    """Wait until something is saved in ``partial``, as long as the process ``is_alive``."""
    started_s = time.monotonic()
    while not partial.exists():
        assert is_alive(), log.read_text()[-2000:]
        assert time.monotonic() - started_s < START_S
        time.sleep(0.2)


def _measure(arguments: Sequence[str], log: Path) -> None:
    """The whole of the process; all that it prints goes to ``log``."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    compile_nothing()
    os._exit(main(arguments))
