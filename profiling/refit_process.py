"""The process that refits the TTFT model of a server while it serves: beside it, and after everything else.

It runs at the lowest priority, and on other CPUs than the server's scheduler where there are any. It reads questions
from its standard input and writes answers to its standard output (``profiling.refit``). It ends with its input, or by a
signal in a question that takes too much CPU time. It imports neither torch nor SGLang.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from sgl_flowprefill.processes import own_stdout
from sgl_flowprefill.profiling.refit import answer, read_frame, write_frame

LOWEST_PRIORITY: Final = 19
CPU_LIMIT_S: Final = 30.0
"""CPU time of a question at which this process ends."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="refit")
    parser.add_argument("--cpus", type=lambda text: {int(cpu) for cpu in text.split(",")})
    parser.add_argument("--nice", type=int, default=LOWEST_PRIORITY)
    parser.add_argument("--cpu-limit-s", type=float, default=CPU_LIMIT_S)
    options = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the server ends, and with it the questions
    os.setpriority(os.PRIO_PROCESS, 0, options.nice)
    if options.cpus:
        with suppress(OSError):  # not among those that this process may use: it stays where it is
            os.sched_setaffinity(0, options.cpus)
    import lightgbm  # noqa: F401 - now, while the server starts, and not when it asks
    import scipy.optimize  # type: ignore[import-untyped]  # noqa: F401

    import sgl_flowprefill.profiling.learned
    import sgl_flowprefill.ttft.learning  # noqa: F401

    answers = os.fdopen(own_stdout(), "wb")
    with suppress(BrokenPipeError):  # the server has ended
        while (question := read_frame(sys.stdin.buffer)) is not None:
            signal.setitimer(signal.ITIMER_PROF, options.cpu_limit_s)  # its signal ends this process
            write_frame(answers, answer(question))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
