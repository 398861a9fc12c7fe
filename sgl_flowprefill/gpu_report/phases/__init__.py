"""The phases of a report, in the order in which they run: what is worth most comes first, as a run may be cut off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sgl_flowprefill.cluster.commands import Role


@dataclass(frozen=True)
class Phase:
    """One phase: a module of this package whose ``measure`` is run."""

    name: str
    """Its name, with what it is run on where it is run on several: ``checks:triton``."""
    title: str
    share: float
    """Share of the budget, relative to the shares of the other phases."""
    has_engine: bool = True
    """Whether ``measure`` is given an engine, or starts what it needs."""
    role: Role = "prefill"
    """Which server's engine that is."""
    needs_card: str = ""
    """Why it says nothing on the CPU engine."""
    backend: str | None = None
    """Attention backend, of one that is run for it."""
    is_optional: bool = False
    """Whether the machine may lack what it needs: then its error is no failure."""

    @property
    def module(self) -> str:
        return self.name.partition(":")[0]


UNIFIED_GOODPUT: Final = "goodput:unified"
BACKENDS: Final = ("flashinfer", "triton", "fa3")
"""SGLang's attention backends for a GPU that FlowPrefill was written against; later phases run on the first that passes
its checks."""
OPTIONAL_BACKEND: Final = "fa3"
"""The one whose kernels are sglang-kernel's, for some cards and one PyTorch; others are compiled where they run."""


def to_check(asked: str | None, hopper: bool) -> tuple[str, ...]:
    """The backends to check, in the order in which later phases prefer them: what was ``asked`` for, and then what
    SGLang itself chooses for the card (FlashAttention 3 on a Hopper, since FlashInfer is slower there).
    """
    own = [OPTIONAL_BACKEND] if hopper else []
    return tuple(dict.fromkeys([*([asked] if asked else []), *own, *BACKENDS]))


def plan(backends: tuple[str | None, ...], unified: bool = False, asked: str | None = None) -> list[Phase]:
    """All phases; ``backends`` are checked one by one, None being the engine's own. ``unified``: whether the servers
    that are compared at the end decode, too. ``asked``: the backend that a user has asked for.
    """
    checks = [
        Phase(
            f"checks:{backend or 'engine'}",
            f"The doctor's checks, {backend or 'its own attention'}",
            3.0 if index == 0 else 2.0,
            backend=backend,
            is_optional=backend == OPTIONAL_BACKEND and backend != asked,
        )
        for index, backend in enumerate(backends)
    ]
    return [
        Phase("machine", "What the machine could reach", 1.0, has_engine=False),
        *checks,
        Phase("tokens", "The same tokens and logits, suspended", 3.0),
        Phase("cost", "What preemption checkpoints and tiles cost", 3.0),
        Phase("blocking", "How long an arrival is blocked", 5.0),
        Phase("operators", "Operator times", 4.0),
        Phase("lookahead", "Look-ahead", 3.0, needs_card="the CPU engine queues nothing, so it has no look-ahead"),
        Phase("tiles", "Lengths of tiles", 3.0),
        Phase("memory", "What prefills hold", 1.0, needs_card="the CPU engine's memory is the host's"),
        Phase("steps", "Decode steps inside prefills", 4.0, role="unified"),
        Phase(
            UNIFIED_GOODPUT if unified else "goodput",
            "Requests in time, against SGLang's own scheduler",
            9.0,
            has_engine=False,
        ),
    ]
