"""``launch.py profile``: measure this machine and model for the TTFT model, and report on what was measured."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from sgl_flowprefill import paths
from sgl_flowprefill.cluster import preflight
from sgl_flowprefill.cluster.base import EXIT_CANNOT_START, EXIT_FAILED, ClusterConfig, StartError
from sgl_flowprefill.cluster.commands import join_values
from sgl_flowprefill.cluster.logs import last_lines
from sgl_flowprefill.cluster.parsing import Append, Parser, seconds, words
from sgl_flowprefill.cluster.process import Guard
from sgl_flowprefill.config import ConfigError, FlowPrefillConfig
from sgl_flowprefill.profiling import ProfileError, read_profile
from sgl_flowprefill.provenance import result

if TYPE_CHECKING:
    from sgl_flowprefill.profiling.report import Report


def main(argv: Sequence[str]) -> int:
    """Profile or report; returns the exit code."""
    try:
        arguments, server_args = _parser().parse_known_args(join_values(argv))
        if arguments.report:
            if server_args:
                raise StartError(f"--report reads a file and takes no server options, got {shlex.join(server_args)}")
            return _report(arguments, argv)
        return _profile(arguments, server_args)
    except (StartError, ConfigError, ProfileError) as error:
        print(f"launch.py profile: {error}", file=sys.stderr)
        return EXIT_CANNOT_START


def _profile(arguments: argparse.Namespace, server_args: Sequence[str]) -> int:
    layout = preflight.prepare(
        ClusterConfig(
            flowprefill=True,
            model_path=arguments.model_path,
            server_args=server_args,
            prefill_args=words("--prefill-args", arguments.prefill_args),
            decode_args=("--base-gpu-id", "0"),  # no decode server is started, so it needs no GPU
            options=FlowPrefillConfig.from_namespace(arguments),
        )
    )
    if layout.ranks("prefill") > 1:
        raise StartError(
            f"a server with --tp {layout.ranks('prefill')} measures its profile itself at its first start; "
            "launch.py profile measures one process"
        )
    command = [sys.executable, "-m", "sgl_flowprefill.profiling.process", "--budget-s", str(arguments.budget_s)]
    if arguments.output is not None:
        command += ["--output", str(arguments.output.absolute())]
    log = arguments.log_dir / "profile.log"
    with Guard() as guard:
        process = guard.follow([*command, *layout.server_options("prefill")], layout.server_env("prefill"), log)
        end = _measure(guard, process, arguments.budget_s)
    if "path" not in end:
        reason = end.get("error") or last_lines(log)
        print(f"launch.py profile: nothing was measured; {log} ends with:\n{reason}", file=sys.stderr)
        return EXIT_FAILED
    print(f"{end['measured']} forward passes in {end['path']}")
    if not end["complete"]:
        print("The profile is not complete. The same command goes on where this run stopped.")
        return EXIT_FAILED
    print("Servers with the same model and options use it from their next start on. What it is worth:")
    print("  python launch.py profile --report")
    return 0


def _measure(guard: Guard, process: subprocess.Popen[str], budget_s: float) -> dict[str, Any]:
    """Show progress until the measuring process ends, which a signal to this one asks it to; its last words."""
    assert process.stdout is not None

    def interrupt() -> None:
        if process.returncode is None:  # nobody has waited for it yet
            os.kill(process.pid, signal.SIGINT)

    ends = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = [signal.signal(number, lambda number, frame: interrupt()) for number in ends]
    try:
        with _Bar(budget_s) as show:
            try:
                end = _follow(process.stdout, show)
            except KeyboardInterrupt:
                interrupt()
                end = _follow(process.stdout, show)
        guard.wait(process)
        return end
    finally:
        for number, handler in zip(ends, before, strict=True):
            signal.signal(number, handler)


def _report(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    path = arguments.output or newest_profile(arguments.model_path)
    profile = read_profile(path)
    try:
        from sgl_flowprefill.profiling.report import Report

        report = Report(profile)
    except ValueError as error:
        raise ProfileError(f"{path}: {error}; `python launch.py profile` measures more") from None
    figures = {"profile": str(path), **report.to_json(), "learned": _learned(path, report)}
    if arguments.json:
        print(json.dumps(result("profile", figures, ["launch.py", "profile", *argv]), indent=2))
    else:
        _print(figures, report.lines())
    if arguments.plot is not None:
        report.write_plot(arguments.plot)
        print(f"plot: {arguments.plot}", file=sys.stderr)
    return 0


def _learned(path: Path, report: Report) -> dict[str, Any] | None:
    """What servers with the profile at ``path``, on which ``report`` is, have learned since; None if that is nothing,
    or nothing that a server would go on with.
    """
    from sgl_flowprefill.profiling.learned import begin, learned_path, read_learned

    kept = learned_path(path)
    if not os.path.exists(kept):
        return None
    try:
        learned = read_learned(kept)
    except ProfileError as error:
        print(f"launch.py profile: servers begin to learn anew: {error}", file=sys.stderr)
        return None
    if not learned.began_as(begin(report.profile, report.fitted)):
        return None
    return {"rows": len(learned.rows), **learned.history.model_dump()}


def _print(figures: dict[str, Any], lines: Sequence[Sequence[str]]) -> None:
    print(f"{figures['profile']}: {', '.join(f'{name} {value}' for name, value in figures['setting'].items())}")
    table = Table(title="Error on held-out shapes", title_justify="left")
    for column in ("shapes", "median", "p90", "cubic: median", "cubic: p90"):
        table.add_column(column, justify="left" if column == "shapes" else "right")
    for line in lines:
        table.add_row(*line)
    console = Console()
    console.print(table)
    worst = figures["worst_shape"]
    console.print(
        f"worst shape: {worst['new_tokens']} new, {worst['cached_tokens']} cached tokens: measured "
        f"{worst['measured_s']:.4f} s, predicted {worst['predicted_s']:.4f} s"
    )
    console.print(
        f"the machine: {figures['speed_range']:.1%} slower in its slowest tenth than in its fastest, by "
        f"{figures['references']} references; a repeat lies {figures['repeat_spread']:.1%} from the median of its "
        f"shape with this taken out, {figures['repeat_spread_untreated']:.1%} as measured"
    )
    learned = figures["learned"]
    if learned is not None:
        console.print(
            f"learned while serving: {learned['tasks']} tasks ({learned['refused']} not believed), {learned['rows']} "
            f"rows, {learned['refits']} refits, {learned['adopted']} adopted; the last, after task "
            f"{learned['refit_at']}, was "
            f"{'adopted' if learned['was_adopted'] else 'not adopted'}: {learned['challenger_error']:.1%} off on the "
            f"{learned['judged']} newest tasks, the model before it {learned['champion_error']:.1%}; the machine took "
            f"{learned['slowness']:.2f} times the profile's time"
        )
    console.print(f"one prediction {figures['predict_one_us']:.1f} us, 1,000 {figures['predict_1000_ms']:.2f} ms")


def newest_profile(model: str | None) -> Path:
    """The newest profile in the cache; if ``model`` is given, of a model whose directory or id ends so."""
    found = [path for path in (paths.cache_dir() / "profiles").glob("*.parquet") if _is_whole(path)]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        if model is None or _is_of(path, model):
            return path
    option = "" if model is None else f" --model-path {model}"
    raise ProfileError(
        f"nothing has been profiled yet{option and ' with' + option}; run `python launch.py profile{option}` first, or "
        "name a file with -o"
    )


def _is_of(path: Path, model: str) -> bool:
    with suppress(ProfileError):
        return read_profile(path).setting.model.rpartition("-")[0] == Path(model).name
    return False


def _is_whole(path: Path) -> bool:
    return not path.name.startswith(".") and not path.stem.endswith(".partial")


class _Bar:
    """A progress bar over the budget, with the time left."""

    def __init__(self, budget_s: float) -> None:
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("left"),
            console=Console(stderr=True),
        )  # fmt: skip
        self._task = self._progress.add_task("starting the engine", total=budget_s)

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        self._progress.start()
        return self._show

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def _show(self, now: dict[str, Any]) -> None:
        description = f"{now['measured']} forward passes ({now['what']})"
        self._progress.update(self._task, completed=now["elapsed_s"], description=description)


def _follow(reports: IO[str], show: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Show progress until the measuring process ends; its last words."""
    end: dict[str, Any] = {}
    for line in reports:
        message = json.loads(line)
        if "elapsed_s" in message:
            show(message)
        else:
            end = message
    return end


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch.py profile",
        usage="launch.py profile [--model-path MODEL] [--budget-s SECONDS] [SGLang server options]\n"
        "       launch.py profile --report [--json] [--plot FILE]",
        description="Measure the forward times that TTFT is predicted from. An interrupted run is resumed by the same "
        "command. Options that are not listed here are SGLang's, as for the prefill server.",
        allow_abbrev=False,
    )
    parser.add_argument("--model-path", metavar="MODEL", help="model directory or Hugging Face model id (default: "
                        "the embedded model)")  # fmt: skip
    parser.add_argument("--budget-s", type=seconds, default=180.0, metavar="SECONDS", help="how long to measure, "
                        "after the engine has started (default %(default)s)")  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="profile file to write, or to report on "
                        "(default: in the cache, where servers look for it)")  # fmt: skip
    parser.add_argument("--report", action="store_true", help="report on the model of an existing profile")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also write the report's plot, an HTML page")
    parser.add_argument("--prefill-args", metavar="ARGS", action=Append, default="", help="more SGLang "
                        "options, in one string")  # fmt: skip
    parser.add_argument("--log-dir", metavar="DIR", type=Path, default=Path("out/logs"), help="directory of the log "
                        "file (default %(default)s)")  # fmt: skip
    FlowPrefillConfig.add_cli_args(parser)
    return parser
