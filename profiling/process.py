"""The process that measures: one scheduler, as a prefill server would have it, without a server around it.

Started by ``launch.py profile`` with the environment and options of the prefill server. Writes one JSON object a line
to its standard output: ``elapsed_s``, ``measured`` and ``what`` while it runs, ``path``, ``complete`` and ``measured``
at the end, or ``error``. Ends with exit code 0 also when it was interrupted: what it has is saved.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import IO, Any

from sgl_flowprefill.config import ENV_SCHEDULER_CPUS
from sgl_flowprefill.processes import own_stdout
from sgl_flowprefill.profiling.file import Profile, ProfileError, Setting, read_profile
from sgl_flowprefill.profiling.run import Progress, partial_path, run_profile


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="profile")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--budget-s", type=float, required=True)
    own, server_options = parser.parse_known_args(argv)
    reports = os.fdopen(own_stdout(), "w", buffering=1)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        measure(make_scheduler(server_options), own.output, own.budget_s, reports)
    except KeyboardInterrupt:
        return 0
    except SystemExit as error:
        _report(reports, error=str(error))
        return 1
    return 0


def make_scheduler(server_options: Sequence[str]) -> Any:
    """The scheduler of a prefill server or of a unified server, by its command line.

    No KV cache is sent anywhere, nor is a library needed that would send it.
    """
    # As in a scheduler that SGLang spawns: otherwise a forward pass overwrites the inputs of one that is suspended.
    os.environ["SGLANG_EAGER_INPUT_NO_COPY"] = "1"
    import sglang.srt.managers.scheduler  # noqa: F401 - what tells the plugin that this process runs one
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import PortArgs, prepare_server_args

    from sgl_flowprefill.patches import affinity, lone_prefill

    os.environ[lone_prefill.ENV_SWITCH] = "1"
    load_plugins()
    if affinity.is_enabled():
        affinity.bind(affinity.parse_ranks(os.environ[ENV_SCHEDULER_CPUS])[0])
    server_args = prepare_server_args(list(server_options))
    server_args.resolve_once()
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=server_args.base_gpu_id))
    ports = PortArgs.init_new(server_args)
    if server_args.disaggregation_mode == "null":
        from sgl_flowprefill.runtime.unified_scheduler import UnifiedScheduler

        return UnifiedScheduler(server_args, ports)
    from sgl_flowprefill.runtime.scheduler import FlowPrefillScheduler

    return FlowPrefillScheduler(server_args, ports)


def serving_stream(scheduler: Any) -> AbstractContextManager[Any]:
    """The stream on which ``scheduler`` serves: its loop runs within this context, and so do measurements."""
    context: AbstractContextManager[Any] = scheduler.device_module.StreamContext(scheduler.schedule_stream)
    return context


def measure(scheduler: Any, output: Path | None, budget_s: float, reports: IO[str]) -> None:
    """Measure for about ``budget_s``, go on with what an interrupted run has left, and write to ``output``, or where
    servers find it. What happens is told to ``reports``.
    """
    from sgl_flowprefill.profiling.measure import SchedulerEngine
    from sgl_flowprefill.runtime.profile import current_setting, profile_path

    setting = current_setting(scheduler)
    path = output or profile_path(setting)
    last = Progress(0.0, 0, "")

    def progress(now: Progress) -> None:
        nonlocal last
        last = now
        _report(reports, **now._asdict())

    complete = False
    try:
        resumed = _resumable(partial_path(path), setting)
        with serving_stream(scheduler):
            complete = run_profile(SchedulerEngine(scheduler.role), setting, path, budget_s, resumed, progress).complete
    finally:
        written = path if complete else partial_path(path)
        _report(reports, path=str(written), complete=complete, measured=last.measured)


def _resumable(path: Path, setting: Setting) -> Profile | None:
    """What an interrupted run of the same setting has left."""
    try:
        profile = read_profile(path) if path.exists() else None
    except ProfileError:
        return None
    return profile if profile is not None and profile.setting == setting else None


def _report(reports: IO[str], **fields: Any) -> None:
    reports.write(json.dumps(fields) + "\n")


def _interrupt(number: int, frame: FrameType | None) -> None:
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    # SGLang's scheduler leaves threads behind that would keep the process.
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)
