"""Adapters (LoRA) below several prefills at once: which of them the device holds, and for whom.

SGLang keeps the weights of a few adapters on the device, in slots. When a forward pass begins it loads the adapters of
its own batch, each into the place of one that this batch does not need. Here other prefills are suspended meanwhile:
their adapters stay where they are, and requests whose adapters would find no slot beside these wait. The base model
takes a slot, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sglang.srt.lora.lora_drainer import LoRADrainer

from sgl_flowprefill.contract import require

BATCH_STATE: Final = (
    "batch_info",
    "sgemm_batch_info",
    "lm_head_batch_info",
    "lm_head_pass_batch_infos",
    "_lm_head_pass_idx",
)
"""What the LoRA backends that ``compat`` lets in keep of the forward pass that runs."""
EXPERTS: Final = (
    "sgl-flowprefill: adapters of experts cannot work with FlowPrefill: they have not been checked to keep the batches "
    "of suspended prefills apart; use --lora-target-modules without gate_up_proj and down_proj"
)


class Adapters:
    """What a role asks of the adapters on the device. There is the base model alone."""

    def fitting(self, reqs: Sequence[Any], beside: Iterable[Any]) -> Sequence[Any]:
        """Those of ``reqs`` whose adapters the device can hold with the adapters of ``beside``, each with those before
        it.
        """
        return reqs

    def kept_out(self, waiting: Sequence[Any], streams: Collection[Any]) -> Collection[Any]:
        """Those of the ``waiting`` requests that cannot start while these ``streams`` decode."""
        return ()


@dataclass(eq=False)
class LoRA(Adapters):
    """SGLang's."""

    manager: Any
    """``LoRAManager``."""
    computed: Callable[[], Iterable[Any]]
    """The requests for which forward passes are under way or to come."""
    drain_after_s: float
    """How long a request waits for a slot that streams have, until one of their adapters takes no more requests."""
    _drainer: LoRADrainer = field(init=False)

    def __post_init__(self) -> None:
        self._drainer = LoRADrainer(self.manager.max_loras_per_batch, self.drain_after_s)
        self._fetch = self.manager.fetch_new_loras
        self.manager.fetch_new_loras = self.fetch

    def fetch(self, new_loras: set[str | None], running_loras: Collection[str | None] = ()) -> None:
        """Load ``new_loras``, in the places of adapters that nobody computes with."""
        in_use = {req.lora_id for req in self.computed()} & self.manager.memory_pool.uid_to_buffer_id.keys()
        self._fetch(new_loras, in_use.union(running_loras))

    def fitting(self, reqs: Sequence[Any], beside: Iterable[Any]) -> list[Any]:
        held = {req.lora_id for req in beside}
        found = []
        for req in reqs:
            if req.lora_id in held or self.manager.validate_lora_batch({req.lora_id, *held}):
                held.add(req.lora_id)
                found.append(req)
        return found

    def kept_out(self, waiting: Sequence[Any], streams: Collection[Any]) -> set[Any]:
        """The first of those that have waited too long gets the next slot that is free: others, which may be more
        urgent, would take that of an adapter that has just been drained.
        """
        held = {req.lora_id for req in streams}
        too_old_s = time.monotonic() - self._drainer.max_wait_time_secs
        overdue = [req for req in waiting if req.lora_id not in held and entered_s(req) < too_old_s]
        reserved = {min(overdue, key=entered_s).lora_id} if overdue else set()

        def fits(lora_id: str | None) -> bool:
            beside = held if lora_id in reserved else held | reserved
            return lora_id in held or bool(self.manager.validate_lora_batch({lora_id, *beside}))

        fitting = {lora_id: fits(lora_id) for lora_id in {req.lora_id for req in waiting}}
        out = {req for req in waiting if not fitting[req.lora_id]}
        self._drainer.update_draining_state(out, streams)
        return out.union(req for req in waiting if not self._drainer.can_schedule(req))


def entered_s(req: Any) -> float:
    """Since when ``req`` waits."""
    return float(req.time_stats.wait_queue_entry_time)


def adapters(scheduler: Any, computed: Callable[[], Iterable[Any]], drain_after_s: float) -> Adapters:
    """The adapters of SGLang's ``scheduler``, if it has some. Raises SystemExit with one line for those that cannot be
    served.
    """
    if not scheduler.enable_lora:
        return Adapters()
    require("adapters")
    manager = scheduler.tp_worker.model_runner.lora_manager
    if manager.lora_backend.is_moe_lora:
        raise SystemExit(EXPERTS)
    drainer, scheduler.lora_drainer = scheduler.lora_drainer, None  # it would be shown no request but the chosen ones
    return LoRA(manager, computed, drainer.max_wait_time_secs if drainer is not None else drain_after_s)


def batch_state(model_runner: Any) -> dict[str, Any]:
    """What the LoRA backend keeps of the forward pass that runs, if there is one."""
    manager = model_runner.lora_manager
    return {} if manager is None else {k: v for k, v in vars(manager.lora_backend).items() if k in BATCH_STATE}
