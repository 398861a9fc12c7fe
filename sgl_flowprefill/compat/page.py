"""docs/compatibility.md, written from the table of SGLang's options."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Final

from sgl_flowprefill.compat.pairs import COMPARED, FEATURES, PAIRS, Pair, is_compared, servers_of
from sgl_flowprefill.compat.row import SERVERS, Group, Row, Server, flag
from sgl_flowprefill.compat.table import (
    DECODE_SERVERS,
    GRAPH_CONFIG,
    OF_PREFILL_SERVERS,
    REFUSED_ENVIRONMENT,
    TABLE,
    UNSET_ENVIRONMENT,
)


@dataclass(frozen=True)
class Example:
    """A command line as users have it."""

    name: str
    options: tuple[str, ...]


EXAMPLES: Final = (
    Example("as it comes", ()),
    Example(
        "priorities, tuned for a mix of chats and long prompts",
        tuple(
            shlex.split(
                "--enable-priority-scheduling --schedule-low-priority-values-first --default-priority-value 10 "
                "--chunked-prefill-size 2048 --enable-mixed-chunk --schedule-policy lof --prefill-decode-interval 4 "
                "--max-prefill-tokens 16384 --schedule-conservativeness 0.8"
            )
        ),
    ),
    Example(
        "agents, with a hierarchical cache",
        tuple(
            shlex.split(
                "--enable-hierarchical-cache --hicache-ratio 2 --hicache-write-policy write_through "
                "--chunked-prefill-size 16384 --schedule-policy lpm --enable-metrics"
            )
        ),
    ),
)
"""What docs/compatibility.md shows."""

INTRODUCTION: Final = """\
# SGLang's options

A command line of stock SGLang works with FlowPrefill as it is: `FLOWPREFILL=1` before it, or the same options
behind `launch.py --flowprefill`. FlowPrefill does one of three things about an option:

* **sets** it, where it decides when prompts run and in which pieces. That is done before SGLang derives anything
  from it (sizes of CUDA graphs, shares of memory), so the server is the one that the user would have got with the
  right options. The log has a line for each: what it was, what it is now, why. A default of SGLang's is told as
  information, what the user has asked for as a warning.
* **refuses** the server, where the option asks for something that FlowPrefill cannot work with and has nothing to
  put in its place: one line on stderr before the model is loaded, and exit code 2.
* **leaves** it to SGLang. Not every such option was tested with FlowPrefill.

For one command line,

    .venv/bin/python launch.py doctor --explain "sglang serve --model-path MODEL --schedule-policy lpm"

prints the table of its options and starts nothing; the exit code is 1 where something is refused. What SGLang
derives from the model and the machine is not in it: the server checks that when it starts. Decode servers keep
SGLang's scheduler and all of its options [but one](#decode-servers).

The tables below are of SGLang 0.5.22 and 0.5.23. They come from `compat/table.py`, by `python -m
sgl_flowprefill.compat > docs/compatibility.md`.

## Priorities

With SGLang's `--enable-priority-scheduling`, the `priority` of a request says whose turn it is. With FlowPrefill a
turn follows from the request's objective, so a priority stands for one:

    --enable-priority-scheduling --flowprefill-priority-ttft-slo 10:0.5,0:2,-10:30

gives requests of priority 10 or more half a second to their first token, those from 0 to 9 two seconds, and all
below thirty. With `--schedule-low-priority-values-first` each number is the largest of its class:
`0:0.5,10:2,20:30` gives half a second up to priority 0, two seconds up to 10, and thirty to all above. A request
that names its own `ttft_slo` keeps that. One without a priority has `--default-priority-value` or, where that is
not set, `--flowprefill-default-ttft-slo`. In place of this option, the `priorities` of `--flowprefill-slo-policy`
give each range of priorities a class, with all that a class has ([clients.md](clients.md#the-policy-file)).

Without either, priorities do not change the order of prefills, and a server says so in its log when it starts. There is
no default: no number says how much time a request has, and a wrong guess does the opposite of what was asked for:
a request whose objective is too tight for its prompt runs behind those that can be met. A server also says so where
small numbers are urgent in one of the two, SGLang's switch and FlowPrefill's option, and large ones in the other.

SGLang's preemption by priority, which takes the places of streams, is set off. `--max-queued-requests` and
`--retraction-policy priority` go by priorities as in SGLang.

"""


TOGETHER: Final = """\
## Features together

These work on a server each by itself: {features}.
A pair of them that no test has compared is refused, because what a server keeps for one while a prefill is suspended
may not be all that it would have to keep for both. `--flowprefill-uncompared true`, or `FLOWPREFILL_UNCOMPARED=1`,
starts the server all the same, with a warning in its log; its answers may be wrong then, or wait for ever.

Compared is what has a test of `tests/integration` here, which has run with SGLang 0.5.23. Under suspensions at random
it compares answers, and on prefill servers KV caches (where experts move, what was counted of them instead), of a pair,
not of three or more.

"""


def compatibility_page() -> str:
    """The whole page."""
    examples = "".join(_example(example) for example in EXAMPLES)
    tables = "".join(map(_group, (*TABLE, DECODE_SERVERS)))
    return f"{INTRODUCTION}## Three command lines\n\n{examples}{_pairs()}{tables}" + "\n".join(_environment())


def _example(example: Example) -> str:
    command = ["FLOWPREFILL=1", "sglang", "serve", "--model-path", "MODEL", *example.options]
    return f"{example.name[0].upper()}{example.name[1:]}:\n\n    {' '.join(command)}\n\n"


def _pairs() -> str:
    features = ", ".join(f"{feature.name} (`{flag(feature.options[0])}`)" for feature in FEATURES)
    lines = ["| pair | prefill server | unified server |", "| --- | --- | --- |"]
    for pair in PAIRS:
        cells = " | ".join(_judged(pair, server) for server in SERVERS)
        lines.append(f"| {pair[0].name}, {pair[1].name} | {cells} |")
    return TOGETHER.format(features=features) + "\n".join(lines) + "\n\n"


def _judged(pair: Pair, server: Server) -> str:
    if server not in servers_of(pair):
        return "has only one of them"
    return f"`{COMPARED[pair][server]}`" if is_compared(pair, server) else "**refused**"


def _group(group: Group) -> str:
    lines = [f"## {group.title}", "", "| option | FlowPrefill | why |", "| --- | --- | --- |"]
    lines += [f"| {_options(row)} | {_treatment(row)} | {row.why} |" for row in group.rows]
    return "\n".join(lines) + "\n\n"


def _options(row: Row) -> str:
    return ", ".join(f"`{flag(option)}`" for option in row.options)


def _treatment(row: Row) -> str:
    where = (
        "" if len(row.servers) > 1 else {"prefill": ", prefill server", "unified": ", unified server"}[row.servers[0]]
    )
    if row.treatment == "left":
        return f"leaves it{where}"
    if row.treatment == "refused":
        return " ".join(filter(None, ["**refuses**", row.values.words])) + where
    if row is GRAPH_CONFIG:
        return "sets a part"
    to = "takes it out" if row.to is None else f"sets `{row.to}`"
    return to + where + (f", with `{flag(row.only_with)}`" if row.only_with else "")


def _environment() -> list[str]:
    return [
        "## Environment",
        "",
        "| variable | FlowPrefill | why |",
        "| --- | --- | --- |",
        *(f"| `{name}` | unsets it | {why} |" for name, why in UNSET_ENVIRONMENT.items()),
        *(
            f"| `{name}` | **refuses**{', prefill server' if name in OF_PREFILL_SERVERS else ''} | {why} |"
            for name, why in REFUSED_ENVIRONMENT.items()
        ),
        "",
    ]
