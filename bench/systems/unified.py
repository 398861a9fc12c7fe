"""Systems that prefill and decode on one server, for the simulator: FlowPrefill unified, and SGLang tuned in every way.

SGLang's settings that trade the time to first token against the time between tokens are chunk size, order, mixed chunks
and decode steps between forwards of prompts. "The best stock system" is the best of all combinations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sgl_flowprefill.bench.simulator.checkpoints import GRANULARITIES
from sgl_flowprefill.bench.simulator.systems import Simulated, SimulatedUnified, SimulatedUnifiedStock
from sgl_flowprefill.policy import POLICIES, DecodeLimits

CHUNKS: Final = (None, 256, 512, 640, 768, 896, 1024, 2048, 4096, 8192)
ORDERS: Final = ("fcfs", "lpm", "spf", "hrrn", "priority")
INTERVALS: Final = (0, 1, 2, 4)
"""``--prefill-decode-interval``: decode steps behind each forward of prompts."""
VARIANTS: Final[Mapping[str, DecodeLimits]] = {
    "uncharged": DecodeLimits(charged=False),
    "ahead": DecodeLimits(ahead=True),
    "margin-0": DecodeLimits(margin_s=0.0),
    "margin-12": DecodeLimits(margin_s=0.012),
    "margin-22": DecodeLimits(margin_s=0.022),
    "share-0.5": DecodeLimits(max_share=0.5),
}
"""What FlowPrefill could do otherwise: plan prefills without the time of steps, decode ahead while KV cache is short,
start steps by a fixed margin in milliseconds, leave prefills more of the time."""

OURS: Final[Mapping[str, SimulatedUnified]] = {
    str(system): system
    for system in (
        *(SimulatedUnified(policy, granularity) for policy in POLICIES for granularity in GRANULARITIES),
        *(SimulatedUnified("feasible", limits=limits, variant=name) for name, limits in VARIANTS.items()),
    )
}
STOCK: Final[Mapping[str, SimulatedUnifiedStock]] = {
    str(system): system
    for system in (
        SimulatedUnifiedStock(order, chunk_tokens, mixed, interval)
        for order in ORDERS
        for chunk_tokens in CHUNKS
        for mixed in ((False, True) if chunk_tokens else (False,))
        for interval in INTERVALS
    )
}
HEADLINE: Final = (
    "feasible",
    "s-edf",
    "feasible/chunk",
    "stock-fcfs-8192",
    "stock-spf-1024-interval-1",
    "stock-spf-1024-mixed",
    "stock-spf-768-mixed",
    "stock-priority-768-mixed",
)
"""What a comparison runs by default; stock-fcfs-8192 is what SGLang does by itself on large GPUs."""


def unified(name: str) -> Simulated:
    """The system called ``name``. Raises ValueError with the names that there are."""
    system = OURS.get(name) or STOCK.get(name)
    if system is None:
        raise ValueError(
            f"no unified system is called {name!r}; there are {', '.join(OURS)}, and stock-ORDER[-CHUNK[-mixed]]"
            f"[-interval-N] with ORDER {', '.join(ORDERS)}, CHUNK {', '.join(str(c) for c in CHUNKS if c)} and N "
            f"{', '.join(str(n) for n in INTERVALS if n)}, for example stock-spf-768-mixed"
        )
    return system
