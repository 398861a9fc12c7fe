"""The systems that can be compared: one table of settings, each with why its users would run it so.

All of them run the same engine and attention. Systems with the layout ``pair`` differ in the scheduler of the prefill
server alone; those with the layout ``unified`` are one server, which prefills and decodes, and their names begin with
``unified``.

The original's stream synchronisation at every operator is no system of its own here: on the CPU a kernel has ended when
its call returns, so every preemption checkpoint is synchronised already and ``flowprefill`` is what it would be.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, Final

from rich import box
from rich.table import Table

from sgl_flowprefill.bench.simulator.systems import (
    Simulated,
    SimulatedFlowPrefill,
    SimulatedStock,
    SimulatedUnified,
    SimulatedUnifiedStock,
)
from sgl_flowprefill.bench.systems.system import (
    PRIORITY_OPTION,
    EndpointSystem,
    FlowPrefillSystem,
    Layout,
    SimulatedSystem,
    StockSystem,
    System,
)
from sgl_flowprefill.bench.systems.tuning import rival
from sgl_flowprefill.config import GRANULARITIES, FlowPrefillConfig
from sgl_flowprefill.policy import POLICIES, DecodeLimits

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

UNIFIED: Final = "unified"
"""FlowPrefill on one server, and how the names of all unified systems begin."""
UNIFIED_CHUNKS: Final = (None, 256, 512, 640, 768, 896, 1024, 1280, 1536, 2048, 4096, 8192)
INTERVALS: Final = (0, 1, 2, 4)
"""``--prefill-decode-interval``: decode steps behind each forward of prompts."""
RIVAL: Final = rival()
"""What FlowPrefill is compared with by default."""
TUNING: Final = (
    *(f"unified-stock-{order}-1024-mixed" for order in ("fcfs", "lpm", "hrrn", "priority")),
    *(
        f"unified-stock-spf-{chunk_tokens}{how}"
        for chunk_tokens in (256, 512, 768, 1024, 1280, 1536, 2048)
        for how in ("-mixed", "-mixed-interval-1", "-mixed-interval-2", "-interval-1", "-interval-2")
    ),
)
"""Settings of SGLang that a tuning tries, beside the default: each of its orders, and shortest prefill first, which
stands out in simulations, in seven sizes of chunks with all that lets streams take part."""
VARIANTS: Final[Mapping[str, DecodeLimits]] = {
    "uncharged": DecodeLimits(charged=False),
    "ahead": DecodeLimits(ahead=True),
    "margin-0": DecodeLimits(margin_s=0.0),
    "margin-12": DecodeLimits(margin_s=0.012),
    "margin-22": DecodeLimits(margin_s=0.022),
    "share-0.5": DecodeLimits(max_share=0.5),
}
"""What FlowPrefill could do otherwise, simulated only: plan prefills without the time of steps, decode ahead while KV
cache is short, start steps by a fixed margin in milliseconds, leave prefills more of the time."""


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


def _unified_stock(order: str, chunk_tokens: int | None, mixed: bool, interval: int) -> StockSystem:
    order_args, order_why = ORDERS[order]
    simulation = SimulatedUnifiedStock(order, chunk_tokens, mixed, interval)
    parts = [order, f"chunk {chunk_tokens}" if chunk_tokens else "unchunked"]
    args = ["--chunked-prefill-size", str(chunk_tokens or -1), *order_args]
    whys = [order_why]
    if mixed:
        parts.append("mixed")
        args.append("--enable-mixed-chunk")
        whys.append("mixed chunks: streams take part in every forward of prompts")
    if interval:
        parts.append(f"interval {interval}")
        args += ["--prefill-decode-interval", str(interval)]
        whys.append(f"{interval} decode step{'s' if interval > 1 else ''} behind each forward of prompts")
    return StockSystem(
        name=f"{UNIFIED}-{simulation}",
        label=f"SGLang {', '.join(parts)}",
        why="; ".join(whys),
        simulation=simulation,
        args=tuple(args),
        layout="unified",
    )


def _by_policy(policy: str, granularity: str, layout: Layout = "pair") -> System:
    name = str(SimulatedFlowPrefill(policy, granularity))
    return FlowPrefillSystem(
        f"{UNIFIED}-{name}" if layout == "unified" else name,
        f"FlowPrefill, {name}",
        f"policy {policy} with preemption by {granularity}",
        {"policy": policy, "granularity": granularity},
        layout=layout,
    )


UNIFIED_STOCK: Final[Mapping[str, StockSystem]] = {
    system.name: system
    for system in (
        _unified_stock(order, chunk_tokens, mixed, interval)
        for order in ORDERS
        for chunk_tokens in UNIFIED_CHUNKS
        for mixed in ((False, True) if chunk_tokens else (False,))
        for interval in INTERVALS
    )
}
"""SGLang on one server, in every way that it can be tuned: its settings that trade the time to first token against the
time between tokens are chunk size, order, mixed chunks and decode steps between forwards of prompts."""

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
        FlowPrefillSystem(
            UNIFIED, "FlowPrefill, unified", "decode steps between two operators of a prefill", layout="unified"
        ),
        FlowPrefillSystem(
            "unified-chunk",
            "FlowPrefill, unified, by forward",
            "decode steps between forward passes only: slack-aware order without preemption",
            {"granularity": "chunk"},
            layout="unified",
        ),
        StockSystem(
            "unified-sglang",
            "SGLang, unified",
            "SGLang as it comes: prompts first, with the chunk size that it chooses",
            SimulatedUnifiedStock("fcfs", 4096),
            layout="unified",
        ),
        *(UNIFIED_STOCK[name] for name in TUNING),
    )
}
"""Every system by name: a baseline is one entry here. UNCHUNKED_FCFS stands in for DistServe."""
BY_POLICY: Final[Mapping[str, System]] = {
    system.name: system
    for system in (_by_policy(policy, granularity) for policy in POLICIES for granularity in GRANULARITIES)
}
"""FlowPrefill by policy and granularity alone, for comparisons of policies: ``POLICY`` or ``POLICY/GRANULARITY``."""
UNIFIED_BY_POLICY: Final[Mapping[str, System]] = {
    system.name: system
    for system in (
        *(_by_policy(policy, granularity, "unified") for policy in POLICIES for granularity in GRANULARITIES),
        *(
            SimulatedSystem(
                f"{UNIFIED}-feasible+{name}",
                f"FlowPrefill, feasible+{name}",
                f"variant {name} of the policy",
                SimulatedUnified("feasible", limits=limits, variant=name),
                layout="unified",
            )
            for name, limits in VARIANTS.items()
        ),
    )
}
"""Each policy and granularity of FlowPrefill on one server, and its VARIANTS."""
BY_SETTING: Final[Mapping[str, System]] = {**BY_POLICY, **UNIFIED_BY_POLICY, **UNIFIED_STOCK}
"""Systems that are not listed one by one."""

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


UNIFIED_HEADLINE: Final = (
    "feasible",
    "s-edf",
    "feasible/chunk",
    "stock-fcfs-8192",
    "stock-spf-1024-interval-1",
    "stock-spf-1024-mixed",
    "stock-spf-768-mixed",
    "stock-priority-768-mixed",
)
"""Unified systems that such a comparison runs by default, without the beginning of their names; stock-fcfs-8192 is
what SGLang does by itself on large GPUs."""


def find(name: str, layout: Layout = "pair") -> System:
    """The system called ``name``; with the layout ``unified``, the beginning of the name may be left out. Raises
    ValueError with the names that there are.
    """
    if layout == "unified" and not name.startswith(UNIFIED):
        system = BY_SETTING.get(f"{UNIFIED}-{name}") or SYSTEMS.get(f"{UNIFIED}-{name}")
    else:
        system = SYSTEMS.get(name) or BY_SETTING.get(name)
    if system is not None:
        return system
    if layout == "unified" or name.startswith(UNIFIED):
        ours = ", ".join(one.removeprefix(f"{UNIFIED}-") for one in UNIFIED_BY_POLICY)
        raise ValueError(
            f"no unified system is called {name!r}; there are {ours}, and {_unified_pattern()}, for example "
            "stock-spf-768-mixed"
        )
    raise ValueError(f"no system is called {name!r}; there are {', '.join([*BY_POLICY, *SYSTEMS])}")


def simulated(name: str, layout: Layout = "pair") -> Simulated:
    """How the system called ``name`` is simulated, with FlowPrefill's default options. Raises ValueError."""
    found = find(name, layout).simulated(FlowPrefillConfig())
    assert found is not None, "what the registry has can be simulated"
    return found


def _unified_pattern() -> str:
    """How the names of UNIFIED_STOCK are made, in words."""
    chunks, steps = (", ".join(str(one) for one in choices if one) for choices in (UNIFIED_CHUNKS, INTERVALS))
    return f"stock-ORDER[-CHUNK[-mixed]][-interval-N] with ORDER {', '.join(ORDERS)}, CHUNK {chunks} and N {steps}"


def select(patterns: Iterable[str]) -> list[System]:
    """The systems that any of ``patterns`` names: names or globs, also several in one with commas, or ``all``.

    In the order of the patterns. A system that is not listed is found by its whole name, or a glob that matches no
    listed one. Raises ValueError for a pattern that names none, and for what can only be simulated.
    """
    chosen: dict[str, System] = {}
    for pattern in (part for text in patterns for part in text.split(",") if part):
        names = list(SYSTEMS) if pattern == "all" else fnmatch.filter(SYSTEMS, pattern)
        names = names or fnmatch.filter(BY_SETTING, pattern)
        if not names:
            raise ValueError(f"no system is called {pattern!r}; --list-systems shows all {len(SYSTEMS)}")
        chosen |= {name: find(name) for name in names}
    for name, system in chosen.items():
        if isinstance(system, SimulatedSystem):
            raise ValueError(f"{name} can only be simulated, by `simulate --unified`: leave it out here")
    return list(chosen.values())


def endpoint(text: str) -> EndpointSystem:
    """The endpoint that ``NAME=URL`` names. Raises ValueError, also for the name of a system that there is."""
    system = EndpointSystem.parse(text)
    if system.name in SYSTEMS or system.name in BY_SETTING:
        raise ValueError(f"--endpoint {text!r}: a system is called {system.name!r} already; give another name")
    return system


def endpoints(texts: Iterable[str]) -> list[EndpointSystem]:
    """The endpoints that ``texts`` name. Raises ValueError, also for a name that is given twice."""
    found: dict[str, EndpointSystem] = {}
    for text in texts:
        system = endpoint(text)
        if system.name in found:
            taken = f"{found[system.name].url} is called {system.name!r} already"
            raise ValueError(f"--endpoint {text!r}: {taken}; give another name")
        found[system.name] = system
    return list(found.values())


def systems_table() -> Table:
    """Name, settings and reason of every system."""
    columns = ("system", "settings of the server that prefills", "why its users would run it so")
    table = Table(*columns, box=box.SIMPLE_HEAD)
    for system in SYSTEMS.values():
        table.add_row(system.name, system.settings, system.why)
    return table


def systems_page() -> str:
    """``docs/systems.md``: what it says is what the registry has."""
    variants = ", ".join(f"`{name}`" for name in UNIFIED_BY_POLICY)
    lines = [
        "# Systems",
        "",
        "What `demo`, `goodput` and `validate` take as `--systems`, and `simulate` as `--policy`. All run the same",
        "engine.",
        "",
        "A baseline is one entry of `bench/systems/catalog.py`. This page is written from there, by",
        "`python -m sgl_flowprefill.bench.systems > docs/systems.md`.",
        "",
        "## A prefill and a decode server",
        "",
        "They are served by the same cluster, and differ in the prefill server's scheduler alone.",
        f"`{UNCHUNKED_FCFS}` stands in for DistServe.",
        "",
        *_rows("pair"),
        "",
        f"Policies by themselves, for comparisons of policies: {', '.join(f'`{name}`' for name in BY_POLICY)}.",
        "",
        "## One server that prefills and decodes",
        "",
        f"`demo --unified` compares `{UNIFIED}` with `unified-sglang` and `{RIVAL}`",
        "([why this one](benchmarks.md#one-server)).",
        "",
        *_rows("unified"),
        "",
        f"There are more of them, which are not listed one by one: {len(UNIFIED_STOCK)} settings of SGLang, "
        f"`unified-{_unified_pattern().replace(' with', '` with', 1)}; policies by themselves, and what can only be",
        f"simulated (with a `+`): {variants}. `simulate --unified` takes the names without `unified-`.",
        "",
        "Servers of another engine take part in `demo` and `goodput` with `--endpoint NAME=URL`; see",
        "[benchmarks.md](benchmarks.md#another-engine).",
    ]
    return "\n".join(lines) + "\n"


def _rows(layout: Layout) -> list[str]:
    """The systems with a layout, as a table."""
    lines = [
        "| system | settings of the server that prefills | simulated as | why its users would run it so |",
        "| --- | --- | --- | --- |",
    ]
    for system in SYSTEMS.values():
        if system.layout == layout:
            settings = f"`{system.settings}`" if system.settings else "none"
            lines.append(f"| `{system.name}` | {settings} | `{simulated(system.name)}` | {system.why} |")
    return lines
