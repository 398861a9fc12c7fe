"""What FlowPrefill does about the options of one server: what it sets, what it refuses, and the table of both.

Reads any object with the fields of SGLang 0.5.23's ``ServerArgs``: its record, or the namespace of its command line
parser. Imports nothing of SGLang.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from sgl_flowprefill.compat.pairs import SWITCHED_ON, DataParallel, takes_uncompared, uncompared
from sgl_flowprefill.compat.row import ABOVE_ONE, GIVEN, MODE, Row, Server, Treatment, flag, is_on, shown
from sgl_flowprefill.compat.table import (
    ATTENTION,
    DECODE_SERVERS,
    GRAPH_CONFIG,
    INSTEAD_OF_UNCHECKED,
    OF_PREFILL_SERVERS,
    ONE_MACHINE,
    RANKS_THAT_FAIL,
    REFUSED_ENVIRONMENT,
    REPLICAS,
    ROWS,
    SHARED_ATTENTION,
    UNSET_ENVIRONMENT,
)

NOT_COMPARED: Final = f"{{}} is refused by FlowPrefill: they have not been compared together; {SWITCHED_ON}"
TAKEN_UNCOMPARED: Final = "has not been compared, and what this server answers may be wrong"


@dataclass(frozen=True)
class Change:
    """An option of a server that FlowPrefill has set."""

    name: str
    """As it is given on a command line, or the variable's."""
    was: str
    now: str
    why: str
    asked: bool
    """Whether the user has asked for what it was; otherwise it was SGLang's default."""

    def __str__(self) -> str:
        return f"{self.name} {self.now} (was {self.was}): {self.why}"


class Refusal(NamedTuple):
    """What a server cannot start with."""

    name: str
    """Field of ServerArgs, or variable."""
    given: str
    """The option with its value, as it is given on a command line."""
    sentence: str
    options: tuple[str, ...] = ()
    """All fields of ServerArgs by which it is asked for, where there are several."""


class Finding(NamedTuple):
    """A line of the table that ``launch.py doctor --explain`` prints."""

    given: str
    treatment: Treatment | Literal["risk"]
    now: str
    why: str


@dataclass(frozen=True)
class WithStorage:
    """The options of a server to which a storage comes while it runs."""

    options: Any
    hicache_storage_backend: str

    def __getattr__(self, option: str) -> Any:
        return getattr(self.options, option)


def server_of(server_args: Any) -> Server | None:
    """The kind of a server that prefills; None for another one."""
    mode = getattr(server_args, "disaggregation_mode", None)
    return next((server for server, its_mode in MODE.items() if its_mode == mode), None)


def take_over(server_args: Any, env: MutableMapping[str, str] | None = None) -> list[Change]:
    """Set what FlowPrefill works with in the options of a server, before SGLang resolves them, and in the environment
    that it reads (default: this process's). What was something else before.
    """
    env = os.environ if env is None else env
    changes = list(_changes(_settings(server_args), server_args))
    graphs = getattr(server_args, "cuda_graph_config", None)
    if isinstance(graphs, dict) and "backend" in (graphs.get("prefill") or {}):
        prefill = {key: value for key, value in graphs["prefill"].items() if key != "backend"}
        server_args.cuda_graph_config = {**graphs, "prefill": prefill}
        name, was = flag("cuda_graph_config"), str(graphs["prefill"]["backend"])
        changes.append(Change(name, was, "says nothing of prefill.backend", GRAPH_CONFIG.why, asked=True))
    for name, why in UNSET_ENVIRONMENT.items():
        if is_on(name, env):
            changes.append(Change(name, env.pop(name), "is not set", why, asked=True))
    return changes


def take_over_decode_server(server_args: Any) -> list[Change]:
    """As ``take_over``, of a server that only decodes."""
    return list(_changes(DECODE_SERVERS.rows, server_args))


def incompatible_option(server_args: Any, env: Mapping[str, str] | None = None) -> str | None:
    """One sentence about the first option of a server that cannot work with FlowPrefill, or variable of its
    environment (default: this process's), or None.
    """
    return next((refusal.sentence for refusal in (*refusals(server_args, env), *_unmet(server_args))), None)


def refusals(server_args: Any, env: Mapping[str, str] | None = None) -> Iterator[Refusal]:
    """What a server cannot start with, whatever FlowPrefill sets."""
    env = os.environ if env is None else env
    server = server_of(server_args)
    if server is None:
        mode = server_args.disaggregation_mode
        sentence = f"FlowPrefill schedules prefills: --disaggregation-mode has to be prefill or null, not {mode}"
        yield Refusal("disaggregation_mode", shown("disaggregation_mode", mode), sentence)
        return
    for row in ROWS:
        if row.treatment == "refused" and server in row.servers:
            for option in row.options:
                value = getattr(server_args, option, None)
                if row.values.holds(value):
                    yield Refusal(option, shown(option, value), _cannot_work(shown(option, value), row.why))
    elastic = getattr(server_args, "elastic_ep_backend", None)
    if getattr(server_args, "enable_eplb", False) and GIVEN.holds(elastic):
        given = f"--enable-eplb with {shown('elastic_ep_backend', elastic)}"
        yield Refusal("enable_eplb", given, _cannot_work(given, RANKS_THAT_FAIL))
    yield from _data_parallel(server_args)
    if not takes_uncompared(env):
        for pair in uncompared(server_args, server):
            yield Refusal(pair.options[0], pair.given, NOT_COMPARED.format(pair.given), pair.options)
    for name, why in REFUSED_ENVIRONMENT.items():
        if is_on(name, env) and (server == "prefill" or name not in OF_PREFILL_SERVERS):
            yield Refusal(name, f"{name}={env[name]}", f"{_cannot_work(f'{name}={env[name]}', why)}; unset it")


def risks(server_args: Any, env: Mapping[str, str] | None = None) -> list[str]:
    """What a server starts with though it has not been compared: one sentence each."""
    return [f"{given} {TAKEN_UNCOMPARED}" for given in _taken(server_args, os.environ if env is None else env)]


def _taken(server_args: Any, env: Mapping[str, str]) -> list[str]:
    """The features together that a server starts with though they have not been compared."""
    server = server_of(server_args)
    if server is None or not takes_uncompared(env):
        return []
    return [pair.given for pair in uncompared(server_args, server)]


def _data_parallel(server_args: Any) -> Iterator[Refusal]:
    """What a server cannot start with for its data parallelism."""

    def given(option: str) -> Any:
        return getattr(server_args, option, None)

    option, ranks, replicas = DataParallel.of(server_args)
    if replicas > 1:
        yield Refusal("dp_size", shown("dp_size", replicas), _cannot_work(shown("dp_size", replicas), REPLICAS))
    if ranks == 1:
        return
    for other, is_refused, why in (
        ("tp_size", (given("tp_size") or 1) != ranks, SHARED_ATTENTION),
        ("nnodes", ABOVE_ONE.holds(given("nnodes")), ONE_MACHINE),
    ):
        if is_refused:
            sentence = _cannot_work(shown(option, ranks), f"beside {shown(other, given(other) or 1)}, {why}")
            yield Refusal(option, shown(option, ranks), sentence)


def explain(options: Any, defaults: Any, env: Mapping[str, str]) -> list[Finding]:
    """What FlowPrefill does about the ``options`` of a server that prefills, as a command line gives them to the
    environment ``env``. Those that are not in the table and have SGLang's ``defaults`` are left out.
    """
    refused = list(refusals(options, env))
    refused_names = {name for refusal in refused for name in (refusal.name, *refusal.options)}
    risky = _taken(options, env)
    rows = {option: row for row in ROWS if server_of(options) in row.servers for option in row.options}
    given = {name: value for name, value in vars(options).items() if value != getattr(defaults, name, None)}
    changes = take_over(options, dict(env))
    set_names = {change.name for change in changes}
    left = [
        Finding(shown(name, value), "left", "", rows[name].why if name in rows else "")
        for name, value in given.items()
        if flag(name) not in set_names and name not in refused_names
    ]
    return [
        *(Finding(one.given, "refused", "", one.sentence.partition(": ")[2]) for one in refused),
        *(Finding(pair, "risk", "", TAKEN_UNCOMPARED) for pair in risky),
        *(Finding(f"{change.name} (was {change.was})", "set", change.now, change.why) for change in changes),
        *left,
    ]


def checked_attention_backend(chosen: str, needs_triton: bool) -> str | None:
    """What a server gets in place of the attention backend that SGLang has ``chosen`` for it; None where that stays: it
    is checked, or there is no other. ``needs_triton``: FlashInfer has not all that the model's attention needs.
    """
    if chosen == "trtllm_mha" and needs_triton:
        return "triton"
    return INSTEAD_OF_UNCHECKED.get(chosen)


def unchecked_attention_backend(name: str | None) -> str | None:
    """One sentence about an attention backend that is not known to keep the batches of suspended tasks apart."""
    if not ATTENTION.values.holds(name):
        return None
    return _cannot_work(shown("attention_backend", name), ATTENTION.why)


def _changes(rows: Iterable[Row], server_args: Any) -> Iterator[Change]:
    """Set the options of ``rows``."""
    for row in rows:
        [option] = row.options
        given = getattr(server_args, option, row.to)  # another version may not have it
        if given != row.to:
            setattr(server_args, option, row.to)
            asked = given is not None and given != row.default
            was = "not set" if given is None else str(given)
            now = "is not set" if row.to is None else f"is {row.to}"
            yield Change(flag(option), was, now, row.why, asked)


def _settings(server_args: Any) -> Iterator[Row]:
    """The rows of the options that FlowPrefill sets on this server."""
    server = server_of(server_args) or "prefill"
    for row in ROWS:
        if row.treatment == "set" and row is not GRAPH_CONFIG and row.is_about(server, server_args):
            yield row


def _unmet(server_args: Any) -> Iterator[Refusal]:
    """What FlowPrefill would have set if this server had come by ``patches.options``."""
    for row in _settings(server_args):
        [option] = row.options
        value = getattr(server_args, option, None)
        if row.works(value) or (option == "cuda_graph_backend_prefill" and _has_no_graphs(server_args)):
            continue
        if row.is_needed:
            instead = f", not {value}" if value else ""
            sentence = f"FlowPrefill needs {shown(option, row.to)}{instead}: {row.why}"
        else:
            sentence = _cannot_work(shown(option, value), row.why)
        yield Refusal(option, shown(option, value), sentence)


def _has_no_graphs(server_args: Any) -> bool:
    """Whether prefills are not captured anyway."""
    off = ("disable_cuda_graph", "disable_prefill_cuda_graph")
    return getattr(server_args, "device", None) == "cpu" or any(getattr(server_args, name, False) for name in off)


def _cannot_work(given: str, why: str) -> str:
    return f"{given} cannot work with FlowPrefill: {why}"
