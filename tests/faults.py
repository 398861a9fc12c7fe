"""A model that raises in the middle of the forward pass of chosen prompts, or of decode steps."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from sgl_flowprefill.model.embedded import FIRST_WORD_ID

MARKER: Final = FIRST_WORD_ID - 1
"""A prompt that holds this token, which ``tests.prompts`` never draws, is one whose forward pass raises."""
ANOTHER_MARKER: Final = MARKER - 1
"""Likewise, where prompts are to raise in two ways."""


class ModelFault(Exception):
    """What no code expects."""


FAULTS: Final[dict[str, Callable[[], Exception]]] = {
    "error": lambda: ModelFault("a defect of the model"),
    "memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB."),
    "stop": lambda: StopIteration(),
    "poison": lambda: torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
}


def raise_in_marked_prompts(scheduler: Any, fault: str, checkpoint: int, marker: int = MARKER) -> list[Any]:
    """From now on, a batch with a prompt that holds ``marker`` raises ``fault`` within an operator, after
    ``checkpoint`` preemption checkpoints. Returns the hooks, to be removed.
    """
    executor = scheduler.hub.executor

    def hook(*_: Any) -> None:
        task = executor.running
        if task is not None and task.operators_passed >= checkpoint and is_marked(task.batch, marker):
            raise FAULTS[fault]()

    return [module.register_forward_pre_hook(hook) for module in _operators(scheduler)]


STEP_PLACES: Final = ("first operator", "logits", "sampled")
"""Where a decode step can run out of memory: it has written nothing; KV cache in all layers; it has its tokens, too."""


@dataclass
class StepAttempts:
    """What became of the forward passes of decode steps."""

    failed: int = 0
    still_held: int = 0
    """Tensors of a pass that failed which were not free when the next one began."""
    _layer_inputs: list[Any] = field(default_factory=list)

    def begin(self) -> None:
        self.still_held += sum(tensor() is not None for tensor in self._layer_inputs)
        self.end()

    def hold(self, tensor: Any) -> None:
        self._layer_inputs.append(weakref.ref(tensor))

    def end(self) -> None:
        self._layer_inputs.clear()


@contextmanager
def without_memory_for_steps(scheduler: Any, place: Callable[[], str | None]) -> Iterator[StepAttempts]:
    """In it, the forward pass of a decode step runs out of memory at the ``place`` that is said when it begins."""
    executor, runner = scheduler.hub.executor, scheduler.tp_worker.model_runner
    operators, attempts = _operators(scheduler), StepAttempts()
    fails_at: str | None = None

    def is_step() -> bool:
        return executor.running is None and scheduler.cur_batch_for_debug.forward_mode.is_decode()

    def passed(here: str) -> None:
        if is_step() and fails_at == here:
            attempts.failed += 1
            raise FAULTS["memory"]()

    def first(*_: Any) -> None:
        nonlocal fails_at
        if is_step():
            attempts.begin()
            fails_at = place()
        passed("first operator")

    def in_a_layer(_module: Any, args: Any) -> None:
        if is_step():
            attempts.hold(args[0])

    [logits] = [module for module in operators if type(module).__name__ == "LogitsProcessor"]
    hooks = [
        operators[0].register_forward_pre_hook(first),
        runner.model.model.layers[1].mlp.register_forward_pre_hook(in_a_layer),
        logits.register_forward_pre_hook(lambda *_: passed("logits")),
        runner.sampler.register_forward_hook(lambda *_: passed("sampled")),
    ]
    try:
        yield attempts
    finally:
        attempts.end()
        for hook in hooks:
            hook.remove()


PLUGIN: Final = Path(__file__).parent / "fault_plugin"
"""A folder for the module search path of servers: they find ``load`` in it as a plugin of SGLang."""
PARAMETER: Final = "test_fault"
"""In ``custom_params``, names the fault of a request's prefill in a server with this plugin."""


def load() -> None:
    """The entry point of the plugin: requests with the parameter fail in the middle of their forward pass."""
    from sgl_flowprefill.config import is_enabled

    if not is_enabled() or "sglang.srt.managers.scheduler" not in sys.modules:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sgl_flowprefill.runtime.hub_scheduler.HubScheduler.run_batch", _run_with_faults, HookType.AROUND
    )


def _run_with_faults(run_batch: Callable[[Any, Any], Any], scheduler: Any, batch: Any) -> Any:
    params = [req.sampling_params.custom_params or {} for req in batch.reqs]
    faults = [found[PARAMETER] for found in params if PARAMETER in found]
    if not faults:
        return run_batch(scheduler, batch)
    executor = scheduler.hub.executor
    task = executor.running

    def hook(*_: Any) -> None:
        if executor.running is task and task.operators_passed >= 3:
            raise FAULTS[faults[0]]()

    handles = [module.register_forward_pre_hook(hook) for module in _operators(scheduler)]
    try:
        return run_batch(scheduler, batch)
    finally:
        for handle in handles:
            handle.remove()


def _operators(scheduler: Any) -> list[Any]:
    modules = scheduler.tp_worker.model_runner.model.modules()
    return [module for module in modules if type(module).__name__.endswith(("Linear", "LogitsProcessor"))]


def is_marked(batch: Any, marker: int) -> bool:
    return any(marker in req.origin_input_ids for req in batch.reqs)
