"""The command line of ``launch.py``: a cluster that stays up until it is interrupted.

It is made with argparse, as SGLang's is: what this parser leaves over are SGLang's options, which go to the servers.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Final, NamedTuple, NoReturn

from sgl_flowprefill.cluster import preflight
from sgl_flowprefill.cluster.base import (
    EXIT_CANNOT_START,
    EXIT_FAILED,
    GATEWAY_PORT,
    KEY_VARIABLE,
    LIVE_PORT,
    LOOPBACK,
    MAX_PORT,
    UNIFIED_PORTS,
    ClusterConfig,
    ClusterError,
    Ports,
    StartError,
)
from sgl_flowprefill.cluster.cluster import Cluster
from sgl_flowprefill.cluster.commands import join_values
from sgl_flowprefill.cluster.parsing import Append, Parser, seconds, seconds_or_0, text_of_key_file, words
from sgl_flowprefill.cluster.saying import say
from sgl_flowprefill.config import ConfigError, FlowPrefillConfig, is_enabled
from sgl_flowprefill.events import EventLogError
from sgl_flowprefill.live import PAGE
from sgl_flowprefill.timeline import write_timeline

SIGTERM_CODE: Final = 128 + signal.SIGTERM
"""Exit code of a launcher that SIGTERM has ended."""
FOREIGN_TO_UNIFIED: Final = {
    "prefill": "leave one of the two out",
    "decode": "leave one of the two out",
    "prefill_args": "give SGLang's options as they are",
    "decode_args": "give SGLang's options as they are",
}
"""Options of prefill and decode servers: what to do about one that is given with --unified."""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted, or ``profile``, ``doctor``, ``timeline``, ``top``, ``gpu-report``: the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell starts with it ignored
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup asks to go on
        signal.signal(signal.SIGHUP, _end)
    try:
        if argv and argv[0] == "profile":
            from sgl_flowprefill.cluster import profile_command

            return profile_command.main(argv[1:])
        if argv and argv[0] == "doctor":
            from sgl_flowprefill.cluster import doctor_command

            return doctor_command.main(argv[1:], parse)
        if argv and argv[0] == "timeline":
            from sgl_flowprefill.cluster import timeline_command

            return timeline_command.main(argv[1:])
        if argv and argv[0] == "top":
            from sgl_flowprefill.cluster import top_command

            return top_command.main(argv[1:])
        if argv and argv[0] == "gpu-report":
            from sgl_flowprefill.gpu_report import command

            return command.main(argv[1:])
        serve(parse(argv))
    except StartError as error:
        say(f"launch.py: {error}", "stderr")
        return EXIT_CANNOT_START
    except ClusterError as error:
        say(f"launch.py: {error}", "stderr")
        return EXIT_FAILED
    except KeyboardInterrupt:
        say("\nstopped")
        return 128 + signal.SIGINT
    return 0


def serve(config: ClusterConfig) -> None:
    """Run a cluster, or one machine's part of it, until it cannot go on or a signal ends it."""
    begin_s = time.monotonic()

    def tell(line: str) -> None:
        say(f"[{time.monotonic() - begin_s:5.1f} s] {line}")

    with ExitStack() as afterwards, Cluster(config, on_progress=tell) as cluster, _live_page(cluster, config, tell):
        if config.flowprefill and config.options.timeline is not None:
            afterwards.callback(_write_timeline, cluster.event_logs, Path(config.options.timeline), tell)
        try:
            _announce(cluster, config, tell)
            cluster.wait()
        except (KeyboardInterrupt, SystemExit) as end:
            if not cluster.answers or (isinstance(end, SystemExit) and end.code == SIGTERM_CODE):
                most = f"up to {config.drain_timeout_s:g} s"
                tell(f"waiting {most} for the requests here to end; another Ctrl-C or SIGTERM does not wait")
                cluster.drain()
            raise


def _announce(cluster: Cluster, config: ClusterConfig, tell: Callable[[str], None]) -> None:
    """Say where requests are served, or what this part of a cluster is there for."""
    if cluster.answers:
        system = "FlowPrefill" if config.flowprefill else "SGLang's own scheduler"
        where = {0: "at", 1: "on one server at"}.get(config.unified, f"on {config.unified} unified servers at")
        say(f"\nServing {cluster.model_path} with {system} {where} {cluster.url}; Ctrl-C ends it. Try:\n")
        say(f"{cluster.curl()}\n")
    elif config.join:
        tell(f"the gateway at {cluster.url} routes to this machine; Ctrl-C takes it off again")
    else:
        tell(f"the gateway listens at {cluster.url}; servers --join it there")


def _write_timeline(event_logs: Sequence[Path], file: Path, tell: Callable[[str], None]) -> None:
    """Write what servers did, which have ended and whose ``event_logs`` are on this machine."""
    logs = [log for log in event_logs if log.exists()]
    if not logs:
        return
    try:
        write_timeline(logs, file)
    except (OSError, EventLogError) as error:
        tell(f"no timeline in {file}: {error}; its events are in {', '.join(map(str, logs))}")
    else:
        tell(f"a timeline is in {file}: open it at https://ui.perfetto.dev")


@contextmanager
def _live_page(cluster: Cluster, config: ClusterConfig, tell: Callable[[str], None]) -> Iterator[None]:
    """A context in which the cluster can be watched, and its URL is said."""
    if config.has_live_page:
        from sgl_flowprefill.cluster.live import page

        with page(cluster.prefilling_urls, config.host, config.live_port, config.api_key) as url:
            tell(f"watch it at {url}, or with launch.py top --url {url}")
            yield
        return
    if config.flowprefill and config.is_one_server and config.options.recent_events:
        tell(f"watch it at {cluster.url}{PAGE}, or with launch.py top --url {cluster.url}")
    yield


def parse(argv: Sequence[str]) -> ClusterConfig:
    """The cluster, or the part of one, that a command line asks for. Raises StartError."""
    arguments, server_args = _parser().parse_known_args(join_values(argv))
    try:
        options = FlowPrefillConfig.from_namespace(arguments)
    except ConfigError as error:
        raise StartError(str(error)) from None
    part = _part(arguments, server_args)
    problem = options.refusing_problem(decodes=not part.prefill, is_joint=False)
    if arguments.flowprefill and problem is not None:
        raise StartError(problem)
    key, key_in_shell = _key(arguments)
    return ClusterConfig(
        flowprefill=arguments.flowprefill,
        model_path=arguments.model_path,
        host=arguments.host or (preflight.own_address(part.join) if part.join else LOOPBACK),
        ports=_ports(arguments),
        prefill=part.prefill,
        decode=part.decode,
        unified=part.unified,
        unified_elsewhere=bool(arguments.unified) and not part.unified,
        join=part.join,
        server_args=server_args,
        prefill_args=words("--prefill-args", arguments.prefill_args),
        decode_args=words("--decode-args", arguments.decode_args),
        gateway_args=words("--gateway-args", arguments.gateway_args),
        api_key=key,
        api_key_in_shell=key_in_shell,
        live_port=_live_port(arguments, part),
        log_dir=arguments.log_dir,
        options=options,
        startup_timeout_s=arguments.startup_timeout_s,
        drain_timeout_s=arguments.drain_timeout_s,
    )


class Part(NamedTuple):
    """Servers to start here, and the gateway that they join."""

    prefill: int = 0
    decode: int = 0
    unified: int = 0
    join: str | None = None


def _unified(arguments: argparse.Namespace) -> Part:
    """Raises StartError for options that unified servers, or a single one of them, have no use for."""
    servers = arguments.unified
    what = "--unified starts one server" if servers == 1 else f"--unified {servers} starts unified servers"
    foreign = FOREIGN_TO_UNIFIED | ({"gateway_args": "it has no gateway"} if servers == 1 else {})
    for option, remedy in foreign.items():
        if getattr(arguments, option):
            raise StartError(f"{what} and takes no --{option.replace('_', '-')}: {remedy}")
    return Part(unified=servers)


def _part(arguments: argparse.Namespace, server_args: Sequence[str]) -> Part:
    """Raises StartError for options that the role has no use for."""
    role = arguments.role
    useless = {
        None: ("join",),
        "prefill": ("decode", "unified", "decode_args", "gateway_args"),
        "decode": ("prefill", "unified", "prefill_args", "gateway_args"),
        "unified": ("prefill", "decode", "prefill_args", "decode_args", "gateway_args"),
        "gateway": ("join", "model_path", "prefill", "decode", "prefill_args", "decode_args"),
    }
    for option in useless[role]:
        if getattr(arguments, option):
            flag = "--" + option.replace("_", "-")
            raise StartError(
                f"{flag} needs --role prefill, decode or unified" if role is None else f"--role {role} takes no {flag}"
            )
    if role == "gateway":
        if server_args:
            raise StartError(f"--role gateway starts no SGLang server, got {shlex.join(server_args)}")
        if arguments.unified and arguments.unified > 1:
            raise StartError(
                f"--unified {arguments.unified}: --role gateway starts no server; --unified without a number says that "
                "unified servers join it"
            )
        return Part()
    if role is None:
        return _unified(arguments) if arguments.unified else Part(arguments.prefill or 1, arguments.decode or 1)
    if not arguments.join:
        starts_one = "python launch.py --role gateway" + (" --unified" if role == "unified" else "")
        raise StartError(f"--role {role} needs --join URL, the gateway's ({starts_one} starts one)")
    join = preflight.check_gateway_url(arguments.join)
    return Part(**{role: getattr(arguments, role) or 1}, join=join)


def _ports(arguments: argparse.Namespace) -> Ports:
    """Raises StartError."""
    if arguments.unified and arguments.role is None:
        return _unified_ports(arguments)
    if arguments.port is not None:
        raise StartError("--port cannot be passed on to a server: use --ports")
    text = arguments.ports
    if arguments.role in (None, "gateway"):
        return Ports.parse(str(GATEWAY_PORT) if text is None else text)
    ports = Ports.parse(text or "0")
    if ports != Ports(gateway=ports.gateway):
        raise StartError(f"--ports {text}: --role {arguments.role} takes the port of its first server only")
    return Ports(**{arguments.role: ports.gateway})


def _live_port(arguments: argparse.Namespace, part: Part) -> int | None:
    """Raises StartError."""
    text = arguments.live_port
    if text is None:
        return None
    if not text.isdigit() or int(text) > MAX_PORT:
        raise StartError(f"--live-port {text}: expected a port number, at most {MAX_PORT} (0: any free one)")
    if not (part.prefill or part.unified) or (part.unified == 1 and part.join is None):
        raise StartError(
            f"--live-port {text}: there a launcher shows servers that prefill behind a gateway; a single unified "
            f"server shows itself on its own port, at {PAGE}"
        )
    return int(text)


def _unified_ports(arguments: argparse.Namespace) -> Ports:
    """Port of the single unified server, or of the gateway and of the servers behind it. Raises StartError."""
    given = {name: text for name in ("port", "ports") if (text := getattr(arguments, name)) is not None}
    if len(given) > 1:
        raise StartError(f"--port {arguments.port} and --ports {arguments.ports}: give one of them")
    for name, text in given.items():
        if name == "ports" and arguments.unified > 1:
            return Ports.parse(text, UNIFIED_PORTS)
        if not text.isdigit() or int(text) > MAX_PORT:
            raise StartError(f"--{name} {text}: --unified takes one port number, at most {MAX_PORT} (0: any free one)")
        return Ports(gateway=int(text))
    return Ports(gateway=GATEWAY_PORT)


def _key(arguments: argparse.Namespace) -> tuple[str | None, str]:
    """The API key and how a shell is told it, from the first of --api-key, --api-key-file and the environment that
    there is. Raises StartError; no message shows a key."""
    shell, file = ClusterConfig.api_key_in_shell, arguments.api_key_file
    if arguments.api_key is not None and file is not None:
        raise StartError("--api-key and --api-key-file: give one of them")
    if arguments.api_key is not None:
        return _checked("--api-key", arguments.api_key), shell
    if file is None:
        given = os.environ.get(KEY_VARIABLE)
        return (None if given is None else _checked(KEY_VARIABLE, given)), shell
    return _checked(f"--api-key-file {file}", text_of_key_file(file)), f"$(cat {shlex.quote(str(file.absolute()))})"


def _checked(source: str, text: str) -> str:
    """The key without white space around it."""
    key = text.strip()
    if not key:
        raise StartError(f"{source} is empty: put a key there, such as one of `openssl rand -hex 32`")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise StartError(f"{source}: a key is one line of printable ASCII characters without spaces")
    return key


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of servers, got {text}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch.py",
        usage="launch.py [--flowprefill] [--model-path MODEL] [--prefill N] [--decode M] [options] [SGLang options]\n"
        "       launch.py [--flowprefill] [--model-path MODEL] --unified [N] [--port PORT] [options] [SGLang options]\n"
        "       launch.py --role gateway [--unified] --host 0.0.0.0 [--ports PORT]\n"
        "       launch.py --role prefill|decode|unified --join http://GATEWAY:PORT [--flowprefill] [options] "
        "[SGLang options]\n"
        "       launch.py profile|doctor|timeline|top|gpu-report --help",
        description="Start SGLang prefill servers, decode servers and gateway, or unified servers, which prefill and "
        "decode, and keep them running. Options that are not listed here are SGLang's (`sglang serve --help`) and go "
        "to every server. Commands: `profile` measures prefill times, `doctor` checks this machine, SGLang or a "
        "command line, `timeline` makes event logs a trace for Perfetto, `top` shows what a server does now, "
        "`gpu-report` measures on one card what FlowPrefill promises.",
        allow_abbrev=False,
    )
    parser.add_argument("--flowprefill", action="store_true", default=is_enabled(), help="schedule prefills with "
                        "FlowPrefill, as FLOWPREFILL=1 does; without, the same cluster runs SGLang's own "
                        "scheduler")  # fmt: skip
    parser.add_argument("--model-path", metavar="MODEL", help="model directory or Hugging Face model id (default: "
                        "the embedded model)")  # fmt: skip
    parser.add_argument("--unified", metavar="N", type=_count, nargs="?", const=1, help="start N servers that prefill "
                        "and decode, behind a gateway; one (the default) has none, and the port is its own. With "
                        "--role gateway, without a number: unified servers join it. Not with --prefill, --decode, "
                        "--prefill-args or --decode-args")  # fmt: skip
    parser.add_argument("--prefill", metavar="N", type=_count, help="number of prefill servers (default 1)")
    parser.add_argument("--decode", metavar="M", type=_count, help="number of decode servers (default 1)")
    parser.add_argument("--role", choices=("prefill", "decode", "unified", "gateway"), help="start only these here, as "
                        "one of several machines")  # fmt: skip
    parser.add_argument("--join", metavar="URL", help="gateway that the servers of --role prefill, decode or unified "
                        "join")  # fmt: skip
    parser.add_argument("--prefill-args", metavar="ARGS", action=Append, default="", help="SGLang options of the "
                        "prefill server only, in one string")  # fmt: skip
    parser.add_argument("--decode-args", metavar="ARGS", action=Append, default="", help="SGLang options of the "
                        "decode server only")  # fmt: skip
    parser.add_argument("--gateway-args", metavar="ARGS", action=Append, default="", help="options of the gateway "
                        "(`smg launch --help`), such as '--policy cache_aware'")  # fmt: skip
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1; with --join, this machine's address "
                        "on the way to the gateway)")  # fmt: skip
    parser.add_argument("--ports", metavar="GATEWAY,PREFILL,DECODE,BOOTSTRAP", help="ports to listen on; 0 or none for "
                        f"any free one (default {GATEWAY_PORT}); several servers of a kind count up from theirs, with "
                        "DP attention by 10. With --role and --unified, one port; with --unified N, "
                        "GATEWAY,UNIFIED")  # fmt: skip
    parser.add_argument("--port", metavar="PORT", help="with --unified, where clients send their requests")
    parser.add_argument("--live-port", metavar="PORT", help="where the launcher shows what a cluster's servers do now "
                        f"(default: {LIVE_PORT}, or if that is taken any free port; it prints which)")  # fmt: skip
    parser.add_argument("--api-key-file", metavar="FILE", type=Path, help="file with the key that servers and gateway "
                        "ask of their clients as a bearer token; the same on each machine of a cluster (default: the "
                        f"environment variable {KEY_VARIABLE}, or no key)")  # fmt: skip
    parser.add_argument("--api-key", metavar="KEY", help="the key itself; other users of this machine can read it in "
                        "the list of processes")  # fmt: skip
    parser.add_argument("--startup-timeout-s", metavar="SECONDS", type=seconds,
                        default=ClusterConfig.startup_timeout_s, help="longest that each server, the gateway and the "
                        "first request may take to come up (default %(default)g)")  # fmt: skip
    parser.add_argument("--drain-timeout-s", metavar="SECONDS", type=seconds_or_0,
                        default=ClusterConfig.drain_timeout_s, help="longest that running requests have to end once "
                        "SIGTERM has come (for servers that --join a gateway, and a gateway by itself, Ctrl-C as "
                        "well); a second signal ends all at once (default %(default)g)")  # fmt: skip
    parser.add_argument("--log-dir", metavar="DIR", type=Path, default=Path("out/logs"), help="directory of the log "
                        "files, one a process (default %(default)s)")  # fmt: skip
    FlowPrefillConfig.add_cli_args(parser)
    return parser


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
