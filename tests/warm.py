"""Processes that start warm: forked from one that has imported SGLang, transformers and pytest, and has done nothing
else.

A process of SGLang is busy with imports for longer than most tests need it. Servers start as they do for users; engines
and ranks that tests start by themselves start here. They have none of the state of the test's process but its
environment.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import connection
from typing import Any, TypeVar

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.warm_imports"])

Outcome = TypeVar("Outcome")


def warm(function: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """``function``, to be the first that a process of CONTEXT calls: in the environment that is now this process's."""
    return partial(_call, dict(os.environ), function)


def call(function: Callable[..., Outcome], *arguments: Any) -> Outcome:
    """What ``function(*arguments)`` returns or raises in a process of its own, which calls nothing else before."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        return pool.submit(warm(function), *arguments).result()


def _call(environment: dict[str, str], function: Callable[..., Any], *arguments: Any) -> Any:
    assert "tests.warm_imports" in sys.modules, (
        "what is imported first could not be; import tests.warm_imports to see why"
    )
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return function(*arguments)


def _end_with_parent() -> None:
    """The process that has forked this one outlives a test's process that is killed, and so would this one."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
