"""``launch.py gpu-report``: all phases in turns, each in a process of its own, and what they found."""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from sgl_flowprefill.cluster import machine, preflight
from sgl_flowprefill.cluster.base import EXIT_CANNOT_START, EXIT_FAILED, ClusterConfig, StartError
from sgl_flowprefill.cluster.commands import Layout, last_value
from sgl_flowprefill.cluster.logs import last_lines
from sgl_flowprefill.cluster.parsing import Parser, seconds
from sgl_flowprefill.cluster.process import Guard
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.gpu_report.document import Document
from sgl_flowprefill.gpu_report.phases import Phase, plan, to_check
from sgl_flowprefill.gpu_report.phases.base import phase_file
from sgl_flowprefill.gpu_report.shapes import SHAPES, shape_path
from sgl_flowprefill.gpu_report.tuning import choose
from sgl_flowprefill.patches import made_weights

DEFAULT_SHAPE: Final = "llama-8b"
BACKEND_OPTION: Final = "--attention-backend"
MEM_FRACTION_STATIC: Final = "0.75"
"""Share of a card for weights and KV cache of a made model: the rest is enough for the activations of a long prompt."""
START_S: Final = 300.0
"""Longest that an engine or servers may take to start: kernels may have to be compiled."""
PATIENCE_S: Final = 60.0
"""Beyond its share of the budget that a phase may take, to finish what it has begun."""


def main(argv: Sequence[str]) -> int:
    """Measure and report; returns the exit code."""
    try:
        arguments, server_args = make_parser().parse_known_args(argv)
        report = Report(arguments, server_args)
    except StartError as error:
        print(f"launch.py gpu-report: {error}", file=sys.stderr)
        return EXIT_CANNOT_START
    try:
        report.run()
    finally:
        report.finish()
    return report.exit_code


@dataclass
class Running:
    """A phase whose process has started. It waits for its turn: until the lock is given up, or this process ends."""

    phase: Phase
    process: subprocess.Popen[str]
    lock: int
    """Descriptor of the file that is locked."""


class Report:
    """One run."""

    def __init__(self, arguments: argparse.Namespace, server_args: Sequence[str]) -> None:
        self._on_card = not preflight.runs_on_cpu(server_args)
        shape = arguments.shape
        if shape is None and arguments.model_path is None and self._on_card:
            shape = DEFAULT_SHAPE
        self._makes_weights = shape is not None
        self._model_path = arguments.model_path if shape is None else str(shape_path(shape))
        self._server_args = list(server_args)
        if self._makes_weights:
            self._server_args += ["--load-format", "dummy"]
            if self._on_card and last_value(server_args, "--mem-fraction-static") is None:
                self._server_args += ["--mem-fraction-static", MEM_FRACTION_STATIC]
        self._budget_s: float = arguments.budget_s
        self.started_s = time.monotonic()
        self._engine_start_s = math.inf
        """The shortest start of an engine so far: the first may have had to compile kernels."""
        asked = last_value(server_args, BACKEND_OPTION)
        backends = to_check(asked, machine.is_hopper()) if self._on_card else (None,)
        self.phases = plan(backends, arguments.unified, asked)
        _clear(arguments.out)
        self._log_dir: Path = arguments.out / "logs"
        self._log_dir.mkdir(parents=True)
        self._document = Document(
            out=arguments.out.absolute(),
            command=["launch.py", "gpu-report", *sys.argv[2:]],
            model=f"shape {shape}, weights made on the device" if shape else arguments.model_path or "embedded Llama",
            device=self.layout(None).device(),
            budget_s=self._budget_s,
        )

    @property
    def exit_code(self) -> int:
        failed = any(found["state"] == "FAILED" for found in self._document.phases.values())
        return EXIT_FAILED if failed else 0

    def run(self) -> None:
        """All phases. What they have found is on disk when this is interrupted."""
        self._document.write()
        with Guard() as guard:
            to_run = [phase for phase in self.phases if self._on_card or not phase.needs_card]
            ahead: Running | None = None
            for phase in self.phases:
                if phase not in to_run:
                    self._note(phase, "not here", f"this phase needs a card: {phase.needs_card}")
                elif phase is not to_run[0] and ahead is None and self._is_over:
                    self._note(phase, "left out", "the budget was used up")
                else:
                    left = to_run[to_run.index(phase) :]
                    ahead = self.follow(ahead or self.start(guard, phase, left), guard, left[1:])
        self._document.ended = "finished"

    def finish(self) -> None:
        """Put everything into the JSON, the page and a table."""
        document = self._document
        if document.ended != "finished":
            document.ended = "interrupted"
        document.elapsed_s = time.monotonic() - self.started_s
        document.choices = choose(document.figures)
        document.write()
        _print(document)
        from sgl_flowprefill.gpu_report.page import write_page

        page = document.out / "report.html"
        write_page(json.loads(document.path.read_text()), page)
        print(f"{page} to look at, {document.path} to send")

    # ---- one phase --------------------------------------------------------------------------------------------------

    @property
    def _is_over(self) -> bool:
        return time.monotonic() >= self.started_s + self._budget_s

    def start(self, guard: Guard, phase: Phase, left: Sequence[Phase]) -> Running:
        """Start the process of ``phase``; it waits for its turn. ``left``: it and those behind it, whose engines have
        to start within the budget, too.
        """
        starts_s = 0.0 if math.isinf(self._engine_start_s) else self._engine_start_s * (len(left) - 1)
        layout = self.layout(phase)
        lock_file = guard.directory / f"{phase_file(self._document.out, phase.name).stem}.lock"
        lock = os.open(lock_file, os.O_CREAT | os.O_WRONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-m", "sgl_flowprefill.gpu_report.worker", "--phase", phase.name]
        command += ["--out", str(self._document.out), "--lock", str(lock_file)]
        command += ["--until-s", str(self.started_s + self._budget_s - starts_s)]
        command += ["--share", str(phase.share / sum(one.share for one in left))]
        command += ["--engine", *layout.server_options(phase.role)] if phase.has_engine else self._user_options(phase)
        env = layout.server_env(phase.role)
        if self._makes_weights:
            env[made_weights.ENV_SWITCH] = "1"
        return Running(phase, guard.follow(command, env, self._log(phase)), lock)

    def follow(self, running: Running, guard: Guard, following: Sequence[Phase]) -> Running | None:
        """Let it be a phase's turn, and keep what it finds until its process ends; the next phase's, if it was started
        meanwhile.
        """
        phase, process = running.phase, running.process
        os.close(running.lock)
        began_s = time.monotonic()
        ahead: Running | None = None
        found: dict[str, Any] = {}
        error = "its process ended without a word"
        print(f"{phase.title} …", file=sys.stderr, flush=True)
        with killed_after(process) as limit:
            assert process.stdout is not None
            for line in process.stdout:
                message = json.loads(line)
                if "measures_for_s" in message:
                    self._engine_start_s = min(self._engine_start_s, time.monotonic() - began_s)
                    limit(message["measures_for_s"] + PATIENCE_S)
                elif "starts_for_s" in message:
                    began_s = time.monotonic()
                    limit(message["starts_for_s"] + START_S)
                    error = "its process was ended"
                    if following and not self._is_over:
                        ahead = self.start(guard, following[0], following)
                elif "outcome" in message:
                    found, error = message["outcome"], ""
                    self._document.note(phase, found, time.monotonic() - began_s)
                else:
                    error = message["error"]
            guard.wait(process)
        took_s = time.monotonic() - began_s
        if process.returncode != 0:
            error = f"its process was ended after {took_s:.0f} s" if process.returncode < 0 else error
        if error:
            self._fail(phase, found, error, took_s)
        state, line = (self._document.phases[phase.name][name] for name in ("state", "line"))
        print(f"  {state}: {line} ({took_s:.0f} s)", file=sys.stderr, flush=True)
        return ahead

    def _fail(self, phase: Phase, found: dict[str, Any], error: str, took_s: float) -> None:
        """What a phase had found before it failed is kept."""
        if phase.is_optional and not found:
            state, line = "not here", f"it does not load: {error}"
        else:
            state, line = "FAILED", error + (f"; before that: {found['line']}" if found else "")
        self._document.note(phase, found | {"state": state, "line": line, "log": last_lines(self._log(phase))}, took_s)

    def _note(self, phase: Phase, state: str, line: str) -> None:
        """Why a phase was not begun."""
        self._document.note(phase, {"state": state, "line": line}, 0.0)

    # ---- what is started --------------------------------------------------------------------------------------------

    def layout(self, phase: Phase | None) -> Layout:
        """One server, whose engine ``phase`` measures: its options and its environment."""
        is_unified = phase is not None and phase.role == "unified"
        return preflight.prepare(
            ClusterConfig(
                flowprefill=True,
                model_path=self._model_path,
                prefill=int(not is_unified),
                decode=0,
                unified=int(is_unified),
                server_args=self._args(phase),
                options=FlowPrefillConfig(),
            )
        )

    def _user_options(self, phase: Phase) -> list[str]:
        model = [] if self._model_path is None else ["--model-path", self._model_path]
        return [*model, *self._args(phase)]

    def _args(self, phase: Phase | None) -> list[str]:
        """SGLang's options, with the attention backend of ``phase``."""
        backend = None if phase is None else phase.backend or self._backend()
        return [*self._server_args, *(() if backend is None else (BACKEND_OPTION, backend))]

    def _backend(self) -> str | None:
        """The first that has passed its checks; the first of all if none has."""
        checked = [phase for phase in self.phases if phase.module == "checks"]
        passed = [one for one in checked if self._document.phases.get(one.name, {}).get("state") == "passed"]
        return next((phase.backend for phase in passed or checked), None)

    def _log(self, phase: Phase) -> Path:
        return self._log_dir / f"{phase_file(self._document.out, phase.name).stem}.log"


@contextmanager
def killed_after(process: subprocess.Popen[str]) -> Iterator[Any]:
    """A function that ends ``process`` and its session after so many seconds, unless it has ended by itself."""
    timers: list[threading.Timer] = []

    def kill() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def limit(seconds: float) -> None:
        for timer in timers:
            timer.cancel()
        timers.append(threading.Timer(seconds, kill))
        timers[-1].daemon = True
        timers[-1].start()

    try:
        yield limit
    finally:
        for timer in timers:
            timer.cancel()


def _clear(out: Path) -> None:
    """Remove what an earlier report left. Raises StartError for a directory that is no report's."""
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / "report.json").exists()):
        raise StartError(f"--out {out}: there is something else; name a new directory")
    shutil.rmtree(out)


def _print(document: Document) -> None:
    table = Table(title=f"gpu-report: {document.model} on {document.device}", title_justify="left")
    for column in ("", "phase", "found"):
        table.add_column(column, overflow="fold")
    for found in document.phases.values():
        table.add_row(found["state"], found["title"], found["line"])
    for choice in document.choices:
        table.add_row("chosen", choice.flag, choice.why)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch.py gpu-report",
        usage="launch.py gpu-report [--shape NAME | --model-path MODEL] [--unified] [--budget-s S] [--out DIR] "
        "[SGLang server options]",
        description="Measure on one card what FlowPrefill promises: the same tokens and logits under preemption, the "
        "cost of preemption checkpoints, blocking, look-ahead, operator times, and requests in time against SGLang's "
        "own scheduler. Options that are not listed here are SGLang's, as for the prefill server.",
        allow_abbrev=False,
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--shape", choices=list(SHAPES), help="a model of this shape, with weights made on the device "
                       f"(default on a card: {DEFAULT_SHAPE}; on the CPU engine: the embedded model)")  # fmt: skip
    model.add_argument("--model-path", metavar="MODEL", help="model directory or Hugging Face model id")
    parser.add_argument("--unified", action="store_true", help="compare servers that prefill and decode, in place of "
                        "prefill servers by themselves")  # fmt: skip
    parser.add_argument("--budget-s", metavar="S", type=seconds, default=300.0, help="seconds for all phases, about; "
                        "what does not fit is left out (default %(default)g)")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("out/gpu-report"), help="directory of the "
                        "report; an earlier one there is replaced (default %(default)s)")  # fmt: skip
    return parser
