"""``launch.py doctor --explain COMMAND``: what FlowPrefill does about the options of a command line."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Final, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sgl_flowprefill.cluster import preflight
from sgl_flowprefill.cluster.base import ClusterConfig, StartError
from sgl_flowprefill.compat import MODE, Finding, Server, explain, server_of, take_over_decode_server

WIDTH: Final = 160
LAUNCHERS: Final = ("launch.py", "sgl-flowprefill")
ENTRIES: Final = ("serve", "launch_server", "launch_server.py", "sglang.launch_server")
"""What stands before SGLang's options in a command line."""
MODEL_TYPE: Final = "--model-type"
SCHEDULED: Final = ("auto", "llm")
"""Types of models that `sglang serve` serves with SGLang's scheduler."""
COLORS: Final = {"refused": "red", "risk": "red", "set": "yellow", "left": "default"}
NO_MODEL: Final = "MODEL"
UNTOUCHED: Final = "SGLang's scheduler and all of its options stay as they are."
ALMOST_UNTOUCHED: Final = "SGLang's scheduler and all of its options but one stay as they are."

ReadLauncher = Callable[[Sequence[str]], ClusterConfig]
"""Reads a command line of ``launch.py``. Raises StartError."""


class Asked(NamedTuple):
    """A server that a command line asks for."""

    options: list[str]
    """SGLang's."""
    env: dict[str, str]


def run(command: str, read_launcher: ReadLauncher) -> bool:
    """Print the table of ``command``, of SGLang or of launch.py, and start nothing. Whether the server would start, as
    far as options tell. Raises StartError for a command that cannot be read.
    """
    asked = read(command, read_launcher)
    if asked is None:
        print(f"Without --flowprefill: {UNTOUCHED}")
        return True
    options = preflight.read_options(asked.options)
    if server_of(options) is None:
        changes = take_over_decode_server(options)
        print(f"A {options.disaggregation_mode} server: {ALMOST_UNTOUCHED if changes else UNTOUCHED}")
        for change in changes:
            print(change)
        return True
    defaults = preflight.read_options(["--model-path", options.model_path])
    defaults.disaggregation_mode = options.disaggregation_mode
    findings = explain(options, defaults, asked.env)
    _print(findings, server_of(options))
    return all(finding.treatment != "refused" for finding in findings)


def read(command: str, read_launcher: ReadLauncher) -> Asked | None:
    """The server that ``command`` asks for; of a launcher's pair, the prefill server. None where it asks for SGLang's
    own scheduler. Raises StartError.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise StartError(f"--explain {command}: {error}") from None
    env = dict(os.environ)
    while words and re.match(r"\w+=", words[0]):
        name, _, env[name] = words.pop(0).partition("=")
    names = [PurePath(word).name for word in words]
    launcher = next((place for place, name in enumerate(names) if name in LAUNCHERS), None)
    if launcher is not None:
        config = read_launcher(words[launcher + 1 :])
        return Asked(_server_options(config), env | config.options.to_env()) if config.flowprefill else None
    entry = next((place for place, name in enumerate(names) if name in ENTRIES), -1)
    options = words[entry + 1 :]
    if entry >= 0 and names[entry] == "serve":
        options = _without_model_type(options)
    if options and not options[0].startswith("-"):
        options.insert(0, "--model-path")
    if not any(word.partition("=")[0] in ("--model-path", "--model", "--config") for word in options):
        options += ["--model-path", NO_MODEL]
    return Asked(options, env)


def _without_model_type(options: Sequence[str]) -> list[str]:
    """``options`` without the one by which `sglang serve` looks for what is to serve them, where that is SGLang's
    scheduler: it takes that one out itself."""
    left: list[str] = []
    for option in options:
        if left and left[-1] == MODEL_TYPE and option in SCHEDULED:
            left.pop()
        elif option not in [f"{MODEL_TYPE}={kind}" for kind in SCHEDULED]:
            left.append(option)
    return left


def _server_options(config: ClusterConfig) -> list[str]:
    server: Server = "unified" if config.unified else "prefill"
    options = ["--model-path", str(config.model_path or NO_MODEL), *config.server_args]
    if server == "prefill":
        options += ["--disaggregation-transfer-backend", "nixl", *config.prefill_args]
    return [*options, "--disaggregation-mode", MODE[server]]


def _print(findings: Sequence[Finding], server: Server | None) -> None:
    what = "a server that prefills and decodes" if server == "unified" else "a prefill server"
    table = Table(title=f"What FlowPrefill does about these options of {what}", title_justify="left")
    for column in ("", "option", "becomes", "why"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        color = COLORS[finding.treatment]
        table.add_row(
            f"[{color}]{finding.treatment}[/{color}]", escape(finding.given), escape(finding.now), escape(finding.why)
        )
    counts = Counter(finding.treatment for finding in findings)
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(table)
    risks = f"{counts['risk']} not compared, " if counts["risk"] else ""
    console.print(
        f"{counts['refused']} refused, {risks}{counts['set']} set, {counts['left']} left. What SGLang derives from the "
        "model and the machine is checked when the server starts."
    )
