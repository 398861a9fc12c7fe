"""The systems that can be compared: one table of settings, each with why its users would run it so.

All of them are served by the same cluster with the same engine and attention; they differ in the prefill server's
scheduler alone.

The original's stream synchronisation at every operator is no system of its own here: on the CPU a kernel has ended when
its call returns, so every checkpoint is synchronised already and ``flowprefill`` is what it would be.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from rich import box
from rich.table import Table

from sgl_flowprefill.config import FlowPrefillConfig, command_line

CHUNKS: Final[Mapping[str, str]] = {
    "": "unchunked: no prompt pays for chunks, the highest throughput",
    "512": "chunk 512: the shortest wait behind a long prompt",
    "1024": "chunk 1,024: a short wait at less overhead",
    "2048": "chunk 2,048: what SGLang chooses for small GPUs",
    "4096": "chunk 4,096: what SGLang chooses for middling GPUs and for this CPU",
    "8192": "chunk 8,192: what SGLang chooses for large GPUs, and the paper's limit",
}
ORDERS: Final[Mapping[str, tuple[tuple[str, ...], str]]] = {
    "fcfs": ((), "fcfs: SGLang's default, fair by arrival"),
    "lpm": (("--schedule-policy", "lpm"), "lpm: cached prefixes first, where prompts share much"),
    "spf": (("--schedule-policy", "shortest-prefill-first"), "shortest-prefill-first: the lowest mean TTFT"),
    "hrrn": (("--schedule-policy", "hrrn"), "hrrn: short prompts first, but nobody waits forever"),
    "priority": (("--enable-priority-scheduling",), "priority scheduling: the class with the tighter SLO first"),
}
UNCHUNKED_FCFS: Final = "stock-fcfs"


@dataclass(frozen=True)
class System:
    """A system: what the prefill server is started with."""

    name: str
    label: str
    why: str
    stock_args: Sequence[str] = ()
    """SGLang options of the prefill server."""
    options: Mapping[str, Any] | None = field(default=None)
    """FlowPrefill's options (fields of FlowPrefillConfig); None for SGLang's own scheduler."""
    stock_simulated: str | None = None
    """Name in the simulator, of one of SGLang's own."""

    @property
    def is_stock(self) -> bool:
        """Whether SGLang's own scheduler runs."""
        return self.options is None

    def config(self, options: FlowPrefillConfig) -> FlowPrefillConfig:
        """FlowPrefill's options: what the system is about, and ``options`` for the rest."""
        return FlowPrefillConfig.parse(options.model_dump() | dict(self.options or {}))

    def simulated(self, options: FlowPrefillConfig) -> str:
        """Its name in the simulator, run with ``options``."""
        if self.stock_simulated is not None:
            return self.stock_simulated
        config = self.config(options)
        return f"{config.policy}/{config.granularity}"

    @property
    def wants_priority(self) -> bool:
        """Whether requests carry a priority: the tighter the TTFT SLO, the higher."""
        return "--enable-priority-scheduling" in self.stock_args

    @property
    def settings(self) -> str:
        """What it is started with, as on a command line."""
        if self.options is None:
            return " ".join(self.stock_args)
        return f"--flowprefill {command_line(self.options)}".rstrip()


def _flowprefill(name: str, label: str, why: str, **options: Any) -> System:
    return System(name, label, why, options=options)


def _stock(order: str, chunk: str) -> System:
    order_args, order_why = ORDERS[order]
    return System(
        name=f"stock-{order}" + (f"-{chunk}" if chunk else ""),
        label=f"SGLang {order}, " + (f"chunk {chunk}" if chunk else "unchunked"),
        why=f"{order_why}; {CHUNKS[chunk]}",
        stock_args=("--chunked-prefill-size", chunk or "-1", *order_args),
        stock_simulated=f"stock-{order}" + (f"-{chunk}" if chunk else ""),
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
            "the paper's order: hopeless requests latest deadline first, waiting without bound; slack without a margin",
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
            "checkpoints once a layer: half as many, the paper's comparison",
            granularity="layer",
        ),
        _flowprefill(
            "flowprefill-chunk",
            "FlowPrefill by forward",
            "no checkpoint inside a forward pass: slack-aware order without preemption",
            granularity="chunk",
        ),
        System(
            "sglang",
            "SGLang",
            "SGLang as it comes, with the chunk size that it chooses",
            stock_simulated="stock-fcfs-4096",
        ),
        *(_stock(order, chunk) for chunk in CHUNKS for order in ORDERS),
    )
}
"""Every system by name. UNCHUNKED_FCFS stands in for DistServe."""


def select(patterns: Iterable[str]) -> list[System]:
    """The systems that any of ``patterns`` names: names or globs, also several in one with commas, or ``all``.

    In the order of the patterns. Raises ValueError for one that names none.
    """
    chosen: dict[str, System] = {}
    for pattern in (part for text in patterns for part in text.split(",") if part):
        names = list(SYSTEMS) if pattern == "all" else fnmatch.filter(SYSTEMS, pattern)
        if not names:
            raise ValueError(f"no system is called {pattern!r}; --list-systems shows all {len(SYSTEMS)}")
        chosen |= {name: SYSTEMS[name] for name in names}
    return list(chosen.values())


def systems_table() -> Table:
    """Name, settings and reason of every system."""
    table = Table("system", "settings of the prefill server", "why its users would run it so", box=box.SIMPLE_HEAD)
    for system in SYSTEMS.values():
        table.add_row(system.name, system.settings, system.why)
    return table
