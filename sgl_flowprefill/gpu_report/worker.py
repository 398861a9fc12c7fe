"""One phase's process. Writes a JSON object a line to its standard output: when it is its turn (``starts_for_s``:
the budget that is its share), when its engine is up (``measures_for_s``), what it has found so far, and how it failed.

It imports all that it needs while the phase before it still measures, and then waits for its turn: a lock on a file,
which ``command`` holds until that phase's process has ended and what it has found is kept.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from sgl_flowprefill.config import ENV_SCHEDULER_CPUS
from sgl_flowprefill.patches import affinity
from sgl_flowprefill.processes import own_stdout

MEMORY_S: Final = 0.5
"""For which free memory has to stay the same."""


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="gpu_report.worker")
    parser.add_argument("--phase", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lock", type=Path, required=True)
    parser.add_argument("--until-s", type=float, required=True, help="when all phases end, by the monotonic clock")
    parser.add_argument("--share", type=float, required=True, help="of what is left of that")
    parser.add_argument("--engine", action="store_true")
    own, options = parser.parse_known_args(argv)
    reports = os.fdopen(own_stdout(), "w", buffering=1)

    def report(**message: Any) -> None:
        reports.write(json.dumps(message) + "\n")

    try:
        _keep_aside()
        module = importlib.import_module(f"sgl_flowprefill.gpu_report.phases.{own.phase.partition(':')[0]}")
        if own.engine:
            importlib.import_module("sgl_flowprefill.runtime.scheduler")
        with open(own.lock, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _wait_for_memory()
            report(starts_for_s=_budget_s(own))
            for message in _measure(module, own, options):
                report(**message)
    except BaseException as error:
        traceback.print_exc()
        report(error=f"{type(error).__name__}: {error}".strip())


def _budget_s(own: argparse.Namespace) -> float:
    """The phase's share of the time that is left now."""
    return float(own.share * max(0.0, own.until_s - time.monotonic()))


def _measure(module: Any, own: argparse.Namespace, options: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What is reported: that an engine is up and measures from now on, and outcomes."""
    from sgl_flowprefill.gpu_report.phases.base import Budget, Request

    if not own.engine:
        for outcome in module.measure(Request(own.phase, own.out, Budget(_budget_s(own)), options)):
            yield {"outcome": outcome.to_dict()}
        return
    from sgl_flowprefill.gpu_report.engine import Engine
    from sgl_flowprefill.profiling.process import make_scheduler, serving_stream

    scheduler = make_scheduler(options)
    with serving_stream(scheduler):
        engine = Engine(scheduler.hub)
        described = engine.describe()
        budget_s = _budget_s(own)  # without the time of the start
        yield {"measures_for_s": budget_s}
        request = Request(own.phase, own.out, Budget(budget_s), options)
        for outcome in module.measure(engine, request):
            found = outcome.to_dict()
            yield {"outcome": found | {"figures": {"engine": described, **found["figures"]}}}


def _wait_for_memory() -> None:
    """The driver takes back the memory of a process that has ended a little later than the kernel its locks."""
    import torch

    if not torch.cuda.is_available():
        return
    free_bytes = -1
    while (now_bytes := torch.cuda.mem_get_info()[0]) > free_bytes:
        free_bytes = now_bytes
        time.sleep(MEMORY_S)


def _keep_aside() -> None:
    """Leave the CPUs of a scheduler to the one that measures, on a machine where it has its own."""
    if affinity.is_enabled():
        schedulers = set[int]().union(*affinity.parse_ranks(os.environ[ENV_SCHEDULER_CPUS]))
        os.sched_setaffinity(0, (os.sched_getaffinity(0) - schedulers) or schedulers)


if __name__ == "__main__":
    main(sys.argv[1:])
    # SGLang's scheduler leaves threads behind that would keep the process.
    sys.stderr.flush()
    os._exit(0)
