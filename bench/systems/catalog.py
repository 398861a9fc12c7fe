"""The systems that can be compared: one table of settings, each with why its users would run it so.

All of them are served by the same cluster with the same engine and attention; they differ in the prefill server's
scheduler alone.

The original's stream synchronisation at every operator is no system of its own here: on the CPU a kernel has ended when
its call returns, so every preemption checkpoint is synchronised already and ``flowprefill`` is what it would be.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, Final

from rich import box
from rich.table import Table

from sgl_flowprefill.bench.simulator.checkpoints import GRANULARITIES
from sgl_flowprefill.bench.simulator.systems import Simulated, SimulatedFlowPrefill, SimulatedStock
from sgl_flowprefill.bench.systems.system import PRIORITY_OPTION, EndpointSystem, FlowPrefillSystem, StockSystem, System
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.policy import POLICIES

CHUNKS: Final[Mapping[int | None, str]] = {
    None: "unchunked: no prompt pays for chunks, the highest throughput",
    512: "chunk 512: the shortest wait behind a long prompt",
    1024: "chunk 1,024: a short wait at less overhead",
    2048: "chunk 2,048: what SGLang chooses for small GPUs",
    4096: "chunk 4,096: what SGLang chooses for middling GPUs and for this CPU",
    8192: "chunk 8,192: what SGLang chooses for large GPUs, and the paper's limit",
}
ORDERS: Final[Mapping[str, tuple[tuple[str, ...], str]]] = {
    "fcfs": ((), "fcfs: SGLang's default, fair by arrival"),
    "lpm": (("--schedule-policy", "lpm"), "lpm: cached prefixes first, where prompts share much"),
    "spf": (("--schedule-policy", "shortest-prefill-first"), "shortest-prefill-first: the lowest mean TTFT"),
    "hrrn": (("--schedule-policy", "hrrn"), "hrrn: short prompts first, but nobody waits forever"),
    "priority": ((PRIORITY_OPTION,), "priority scheduling: the class with the tighter SLO first"),
}
UNCHUNKED_FCFS: Final = "stock-fcfs"


def _flowprefill(name: str, label: str, why: str, **options: Any) -> System:
    return FlowPrefillSystem(name, label, why, options)


def _stock(order: str, chunk_tokens: int | None) -> System:
    order_args, order_why = ORDERS[order]
    simulation = SimulatedStock(order, chunk_tokens)
    return StockSystem(
        name=str(simulation),
        label=f"SGLang {order}, " + (f"chunk {chunk_tokens}" if chunk_tokens else "unchunked"),
        why=f"{order_why}; {CHUNKS[chunk_tokens]}",
        simulation=simulation,
        args=("--chunked-prefill-size", str(chunk_tokens or -1), *order_args),
    )


def _by_policy(policy: str, granularity: str) -> System:
    name = str(SimulatedFlowPrefill(policy, granularity))
    return FlowPrefillSystem(
        name,
        f"FlowPrefill, {name}",
        f"policy {policy} with preemption by {granularity}",
        {"policy": policy, "granularity": granularity},
    )


SYSTEMS: Final[Mapping[str, System]] = {
    system.name: system
    for system in (
        _flowprefill("flowprefill", "FlowPrefill", "what this package does by default"),
        _flowprefill(
            "flowprefill-s-edf",
            "FlowPrefill, S-EDF",
            "the paper's order with bounds: earliest deadline first among what can still be met by itself",
            policy="s-edf",
        ),
        _flowprefill(
            "flowprefill-paper",
            "FlowPrefill, S-EDF as published",
            "the paper's order: infeasible requests latest deadline first, waiting unbounded; slack without a margin",
            policy="s-edf-paper",
            slack_quantile=0.5,
        ),
        _flowprefill(
            "flowprefill-edf",
            "FlowPrefill, EDF",
            "the order of real-time systems, blind to requests that are late anyway",
            policy="edf",
        ),
        _flowprefill(
            "flowprefill-layer",
            "FlowPrefill by layer",
            "preemption checkpoints once a layer: half as many, the paper's comparison",
            granularity="layer",
        ),
        _flowprefill(
            "flowprefill-chunk",
            "FlowPrefill by forward",
            "no preemption checkpoint inside a forward pass: slack-aware order without preemption",
            granularity="chunk",
        ),
        StockSystem(
            "sglang",
            "SGLang",
            "SGLang as it comes, with the chunk size that it chooses",
            SimulatedStock("fcfs", 4096),
        ),
        *(_stock(order, chunk_tokens) for chunk_tokens in CHUNKS for order in ORDERS),
    )
}
"""Every system by name: a baseline is one entry here. UNCHUNKED_FCFS stands in for DistServe."""
BY_POLICY: Final[Mapping[str, System]] = {
    system.name: system
    for system in (_by_policy(policy, granularity) for policy in POLICIES for granularity in GRANULARITIES)
}
"""FlowPrefill by policy and granularity alone, for comparisons of policies: ``POLICY`` or ``POLICY/GRANULARITY``."""

HEADLINE: Final = (
    "feasible",
    "s-edf",
    "feasible/layer",
    "stock-fcfs",
    "stock-spf",
    "stock-fcfs-512",
    "stock-fcfs-2048",
    "stock-fcfs-8192",
    "stock-spf-512",
    "stock-spf-2048",
    "stock-priority-512",
    "stock-priority-2048",
)
"""What a comparison in the simulator runs by default; stock-fcfs stands in for DistServe."""


def find(name: str) -> System:
    """The system called ``name``, of SYSTEMS or of BY_POLICY. Raises ValueError with the names that there are."""
    system = SYSTEMS.get(name) or BY_POLICY.get(name)
    if system is None:
        raise ValueError(f"no system is called {name!r}; there are {', '.join([*BY_POLICY, *SYSTEMS])}")
    return system


def simulated(name: str) -> Simulated:
    """How the system called ``name`` is simulated, with FlowPrefill's default options. Raises ValueError."""
    found = find(name).simulated(FlowPrefillConfig())
    assert found is not None, "what the registry has can be simulated"
    return found


def select(patterns: Iterable[str]) -> list[System]:
    """The systems that any of ``patterns`` names: names or globs, also several in one with commas, or ``all``.

    In the order of the patterns. Raises ValueError for one that names none.
    """
    chosen: dict[str, System] = {}
    for pattern in (part for text in patterns for part in text.split(",") if part):
        names = list(SYSTEMS) if pattern == "all" else fnmatch.filter(SYSTEMS, pattern)
        if not names and pattern not in BY_POLICY:
            raise ValueError(f"no system is called {pattern!r}; --list-systems shows all {len(SYSTEMS)}")
        chosen |= {name: find(name) for name in names or [pattern]}
    return list(chosen.values())


def endpoint(text: str) -> EndpointSystem:
    """The endpoint that ``NAME=URL`` names. Raises ValueError, also for the name of a system that there is."""
    system = EndpointSystem.parse(text)
    if system.name in SYSTEMS or system.name in BY_POLICY:
        raise ValueError(f"--endpoint {text!r}: a system is called {system.name!r} already; give another name")
    return system


def systems_table() -> Table:
    """Name, settings and reason of every system."""
    table = Table("system", "settings of the prefill server", "why its users would run it so", box=box.SIMPLE_HEAD)
    for system in SYSTEMS.values():
        table.add_row(system.name, system.settings, system.why)
    return table


def systems_page() -> str:
    """``docs/systems.md``: what it says is what the registry has."""
    lines = [
        "# Systems",
        "",
        "What `demo`, `goodput` and `validate` take as `--systems`, and `simulate` as `--policy`. All are served by",
        "the same cluster with the same engine; they differ in the prefill server's scheduler alone.",
        f"`{UNCHUNKED_FCFS}` stands in for DistServe.",
        "",
        "A baseline is one entry of `bench/systems/catalog.py`. This page is written from there, by",
        "`python -m sgl_flowprefill.bench.systems > docs/systems.md`.",
        "",
        "| system | settings of the prefill server | simulated as | why its users would run it so |",
        "| --- | --- | --- | --- |",
    ]
    for system in SYSTEMS.values():
        settings = f"`{system.settings}`" if system.settings else "none"
        lines.append(f"| `{system.name}` | {settings} | `{simulated(system.name)}` | {system.why} |")
    lines += [
        "",
        f"Policies by themselves, for comparisons of policies: {', '.join(f'`{name}`' for name in BY_POLICY)}.",
        "",
        "Servers of another engine take part in `demo` and `goodput` with `--endpoint NAME=URL`; see",
        "[benchmarks.md](benchmarks.md#another-engine).",
    ]
    return "\n".join(lines) + "\n"
