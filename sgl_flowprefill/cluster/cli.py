"""The command line of ``launch.py``: a cluster that stays up until it is interrupted."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from sgl_flowprefill.cluster.base import GATEWAY_PORT, ClusterConfig, ClusterError, Ports, StartError
from sgl_flowprefill.cluster.cluster import Cluster
from sgl_flowprefill.config import ConfigError, FlowPrefillConfig

EXIT_DIED: Final = 1
EXIT_CANNOT_START: Final = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted, or ``profile`` or ``doctor``; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "profile":
        from sgl_flowprefill.cluster import profile_command

        return profile_command.main(argv[1:])
    if argv and argv[0] == "doctor":
        from sgl_flowprefill.cluster import doctor_command

        return doctor_command.main(argv[1:])
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    begin_s = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - begin_s:5.1f} s] {line}", flush=True)

    try:
        config = parse(argv)
        with Cluster(config, on_progress=say) as cluster:
            system = "FlowPrefill" if config.flowprefill else "SGLang's own scheduler"
            print(f"\nServing {cluster.model_path} with {system} at {cluster.gateway_url}; Ctrl-C ends it. Try:\n")
            print(f"{cluster.curl()}\n", flush=True)
            cluster.wait()
    except StartError as error:
        print(f"launch.py: {error}", file=sys.stderr)
        return EXIT_CANNOT_START
    except ClusterError as error:
        print(f"launch.py: {error}", file=sys.stderr)
        return EXIT_DIED
    except KeyboardInterrupt:
        print("\nstopped", flush=True)
        return 128 + signal.SIGINT
    return 0


def parse(argv: Sequence[str]) -> ClusterConfig:
    """The cluster that a command line asks for. Raises StartError."""
    arguments, server_args = _parser().parse_known_args(_join_values(argv))
    try:
        options = FlowPrefillConfig.from_namespace(arguments)
    except ConfigError as error:
        raise StartError(str(error)) from None
    return ClusterConfig(
        flowprefill=arguments.flowprefill,
        model_path=arguments.model_path,
        host=arguments.host,
        ports=Ports.parse(arguments.ports),
        server_args=server_args,
        prefill_args=shlex.split(arguments.prefill_args),
        decode_args=shlex.split(arguments.decode_args),
        log_dir=arguments.log_dir,
        options=options,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise StartError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="launch.py",
        usage="launch.py [--flowprefill] [--model-path MODEL] [options] [SGLang server options]",
        description="Start an SGLang prefill server, decode server and gateway, and keep them running. Options that "
        "are not listed here are SGLang's (`sglang serve --help`) and go to both servers.",
        allow_abbrev=False,
    )
    parser.add_argument("--flowprefill", action="store_true", help="schedule prefills with FlowPrefill; without it, "
                        "the same cluster runs SGLang's own scheduler")  # fmt: skip
    parser.add_argument("--model-path", metavar="MODEL", help="checkpoint directory or Hugging Face model id (default: "
                        "the embedded model)")  # fmt: skip
    parser.add_argument("--prefill-args", metavar="ARGS", default="", help="SGLang options of the prefill server only, "
                        "in one string")  # fmt: skip
    parser.add_argument("--decode-args", metavar="ARGS", default="", help="SGLang options of the decode server only")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--ports", metavar="GATEWAY,PREFILL,DECODE,BOOTSTRAP", default=str(GATEWAY_PORT),
                        help="ports to listen on; 0 or none for any free one (default %(default)s)")  # fmt: skip
    parser.add_argument("--log-dir", metavar="DIR", type=Path, default=Path("out/logs"), help="directory of the log "
                        "files, one a process (default %(default)s)")  # fmt: skip
    FlowPrefillConfig.add_cli_args(parser)
    return parser


def _join_values(argv: Sequence[str]) -> list[str]:
    """Write ``--prefill-args VALUE`` as ``--prefill-args=VALUE``: argparse takes a value like --tp for an option."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1] in ("--prefill-args", "--decode-args"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
