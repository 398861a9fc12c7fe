"""``launch.py doctor``: check on this machine what FlowPrefill assumes of its device, or of SGLang."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from sgl_flowprefill.cluster import contract_command, explain_command, machine, preflight
from sgl_flowprefill.cluster.base import EXIT_CANNOT_START, EXIT_FAILED, ClusterConfig, StartError
from sgl_flowprefill.cluster.logs import last_lines
from sgl_flowprefill.cluster.parsing import Parser
from sgl_flowprefill.cluster.process import Guard
from sgl_flowprefill.config import ConfigError, FlowPrefillConfig
from sgl_flowprefill.model.embedded import EmbeddedModel

GPU_MODEL: Final = EmbeddedModel(hidden_size=1024, intermediate_size=4096, heads=8, kv_heads=2, head_dim=128)
"""GPU attention kernels serve no heads as small as the embedded model's."""


def main(argv: Sequence[str], read_launcher: explain_command.ReadLauncher) -> int:
    """Run the checks and print what they found; returns the exit code. ``read_launcher`` reads the command lines of
    launch.py.
    """
    try:
        arguments, server_args = _parser().parse_known_args(argv)
        if arguments.contract:
            if server_args:
                raise StartError(f"--contract takes no options of SGLang: {shlex.join(server_args)}")
            return 0 if contract_command.check(arguments.sources) else EXIT_FAILED
        if arguments.explain is not None:
            if server_args:
                raise StartError(f"--explain takes the command in quotes; beside it there is {shlex.join(server_args)}")
            return 0 if explain_command.run(arguments.explain, read_launcher) else EXIT_FAILED
        if arguments.sources is not None:
            raise StartError("--sources is where --contract looks: give that too")
        if arguments.gpu and not machine.gpu_count():
            raise StartError("this machine has no NVIDIA GPU, so nothing was checked")
        return _check(arguments, server_args)
    except (StartError, ConfigError) as error:
        print(f"launch.py doctor: {error}", file=sys.stderr)
        return EXIT_CANNOT_START


def _check(arguments: argparse.Namespace, server_args: Sequence[str]) -> int:
    model = arguments.model_path
    if model is None and not preflight.runs_on_cpu(server_args):
        model = preflight.made_model(GPU_MODEL)
    layout = preflight.prepare(
        ClusterConfig(
            flowprefill=True,
            model_path=model,
            server_args=server_args,
            decode_args=("--base-gpu-id", "0"),  # no decode server is started, so it needs no GPU
            options=FlowPrefillConfig.from_namespace(arguments),
        )
    )
    log = arguments.log_dir / "doctor.log"
    findings: list[dict[str, Any]] = []
    command = [sys.executable, "-m", "sgl_flowprefill.runtime.selfcheck", *layout.server_options("prefill")]
    with Guard() as guard:
        process = guard.follow(command, layout.server_env("prefill"), log)
        assert process.stdout is not None
        for line in process.stdout:
            findings.append(json.loads(line))
            print(f"{'pass' if findings[-1]['passed'] else 'FAIL'}  {findings[-1]['check']}", file=sys.stderr)
        guard.wait(process)
    if process.returncode or not findings:
        print(f"launch.py doctor: the engine did not get through; {log} ends with:\n{last_lines(log)}", file=sys.stderr)
        return EXIT_FAILED
    _print(findings, shlex.join(server_args))
    return 0 if all(finding["passed"] for finding in findings) else EXIT_FAILED


def _print(findings: Sequence[dict[str, Any]], options: str) -> None:
    table = Table(title=f"doctor {options}".rstrip(), title_justify="left")
    for column in ("", "check", "figures"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row("pass" if finding["passed"] else "FAIL", finding["check"], finding["figures"])
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch.py doctor",
        usage="launch.py doctor [--gpu] [--model-path MODEL] [SGLang server options]\n"
        "       launch.py doctor --contract [--sources DIR]\n"
        "       launch.py doctor --explain 'COMMAND'",
        description="Check what FlowPrefill assumes of the device: events, attention state, tokens under preemption, "
        "tiled attention, the cost of preemption checkpoints, blocking. Options that are not listed here are SGLang's, "
        "as for the prefill server.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", action="store_true", help="insist on a GPU: without one, exit with 2")
    parser.add_argument("--model-path", metavar="MODEL", help="model directory or Hugging Face model id (default: "
                        "a small random model)")  # fmt: skip
    parser.add_argument("--contract", action="store_true", help="check instead what FlowPrefill expects of the "
                        "installed SGLang, symbol by symbol")  # fmt: skip
    parser.add_argument("--sources", metavar="DIR", type=Path, help="with --contract: check the SGLang in this "
                        "directory (an unpacked wheel), without importing it")  # fmt: skip
    parser.add_argument("--explain", metavar="COMMAND", help="print instead what FlowPrefill does about each option of "
                        "a command line of SGLang or launch.py; exit with 1 if it is refused")  # fmt: skip
    parser.add_argument("--log-dir", metavar="DIR", type=Path, default=Path("out/logs"), help="directory of the log "
                        "file (default %(default)s)")  # fmt: skip
    FlowPrefillConfig.add_cli_args(parser)
    return parser
