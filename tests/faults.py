"""A model that raises in the middle of the forward pass of chosen prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from sgl_flowprefill.model.embedded import FIRST_WORD_ID

MARKER: Final = FIRST_WORD_ID - 1
"""A prompt that holds this token, which ``tests.prompts`` never draws, is one whose forward pass raises."""


class ModelFault(Exception):
    """What no code expects."""


FAULTS: Final[dict[str, Callable[[], Exception]]] = {
    "error": lambda: ModelFault("a defect of the model"),
    "memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB."),
    "stop": lambda: StopIteration(),
    "poison": lambda: torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
}


def raise_in_marked_prompts(scheduler: Any, fault: str, checkpoint: int) -> list[Any]:
    """From now on, a batch with a marked prompt raises ``fault`` after ``checkpoint`` checkpoints, within an operator.
    Returns the hooks, to be removed.
    """
    executor = scheduler._executor

    def hook(*_: Any) -> None:
        task = executor._running
        if task is not None and task.checkpoint >= checkpoint and is_marked(task.batch):
            raise FAULTS[fault]()

    modules = scheduler.tp_worker.model_runner.model.modules()
    inside = [module for module in modules if type(module).__name__.endswith(("Linear", "LogitsProcessor"))]
    return [module.register_forward_pre_hook(hook) for module in inside]


def is_marked(batch: Any) -> bool:
    return any(MARKER in req.origin_input_ids for req in batch.reqs)
