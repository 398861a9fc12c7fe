"""``launch.py timeline``: event logs as a timeline for Perfetto, and why requests missed their objectives."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sgl_flowprefill.cluster.base import EXIT_CANNOT_START, StartError
from sgl_flowprefill.cluster.parsing import Parser
from sgl_flowprefill.events import OPTION, EventLogError
from sgl_flowprefill.timeline import SUFFIX, History, write_timeline


def main(argv: Sequence[str]) -> int:
    """Write the timeline, and say what became of the requests in it; returns the exit code."""
    try:
        arguments = _parser().parse_args(argv)
        logs: list[Path] = arguments.events
        output: Path = arguments.output or logs[0].with_suffix(SUFFIX)
        if output in logs:
            raise StartError(f"-o {output} is one of the event logs: name another file")
        servers = write_timeline(logs, output)
    except (StartError, EventLogError) as error:
        print(f"launch.py timeline: {error}", file=sys.stderr)
        return EXIT_CANNOT_START
    except OSError as error:
        print(f"launch.py timeline: {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_CANNOT_START
    for name, history in servers:
        print(f"{name}: {outcome(history)}")
    print(f"{output}: open it at https://ui.perfetto.dev, which reads it in the browser")
    return 0


def outcome(history: History) -> str:
    """What became of the requests, by causes."""
    if history.decoded and not history.requests:
        failed = sum(one.event.reason is not None for one in history.decoded)
        return f"{len(history.decoded)} requests, {len(history.decoded) - failed} decoded, {failed} failed"
    verdicts = Counter(request.verdict for request in history.requests)
    causes = [
        (f"missed, {verdict.cause}" if verdict.met is False else str(verdict.cause or "under way"), requests)
        for verdict, requests in verdicts.most_common()
        if not verdict.met
    ]
    in_time = sum(requests for verdict, requests in verdicts.items() if verdict.met)
    rest = "".join(f"; {requests} {words}" for words, requests in causes)
    return f"{len(history.requests)} requests, {in_time} in time{rest}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch.py timeline",
        usage="launch.py timeline EVENTS [EVENTS ...] [-o FILE]",
        description="Make a timeline for Perfetto of the event logs of servers of one machine, and of their decode "
        "servers wherever they are: what ran when, what was suspended for whom, and of each request why it missed its "
        "objective.",
        allow_abbrev=False,
    )
    parser.add_argument("events", metavar="EVENTS", type=Path, nargs="+",
                        help=f"a file that a server wrote with {OPTION}")  # fmt: skip
    parser.add_argument("-o", "--output", metavar="FILE", type=Path,
                        help=f"file to write (default: the first log's name with {SUFFIX})")  # fmt: skip
    return parser
