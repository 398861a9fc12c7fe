"""SGLang's statistics of experts, of several forward passes at once.

SGLang's recorder counts to which experts the tokens of a forward pass go, layer by layer, and takes the counts over
when the pass ends. Here other passes run while one is suspended, so what the recorder keeps of a pass (which pass and
layer it is in, and what has been counted) belongs to that pass: each task has its own, which a switch puts in place.
Decode steps count into SGLang's own, as captured graphs of them do.

A pass that does not end is no pass: what was counted of it is dropped. Nor is one that nobody has asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Final

from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder

from sgl_flowprefill.contract import require

PASS_STATE: Final = (
    "_record_current_pass",
    "_disable_all",
    "_current_forward_pass_id",
    "_current_layer_idx",
    "_current_debug_name",
    "_single_pass_gatherers",
)
"""What the recorder keeps of the forward pass that runs."""


def pass_state() -> dict[str, Any]:
    """What SGLang's recorder, if there is one, keeps of the forward pass that runs."""
    return {k: v for k, v in vars(get_global_expert_distribution_recorder()).items() if k in PASS_STATE}


def of_new_pass(state: dict[str, Any]) -> dict[str, Any]:
    """The same of a forward pass that is about to begin, with places of its own. ``state``: that of no pass."""
    if not state:
        return state
    shared = get_global_expert_distribution_recorder()._expert_location_metadata
    return copy.deepcopy(state, {id(shared): shared})


def set_pass_state(state: dict[str, Any]) -> None:
    vars(get_global_expert_distribution_recorder()).update(state)


def keep_whole_passes() -> None:
    """Let SGLang's recorder, if there is one, drop what it has counted of forward passes that do not end. Raises
    SystemExit with one line where it is not as expected.
    """
    recorder = get_global_expert_distribution_recorder()
    if vars(recorder):
        require("experts")
        recorder.with_forward_pass = partial(_whole_pass, recorder, recorder.with_forward_pass)


@contextmanager
def _whole_pass(
    recorder: Any, with_forward_pass: Callable[..., AbstractContextManager[Any]], *which: Any
) -> Iterator[Any]:
    with with_forward_pass(*which) as outputs:
        try:
            yield outputs
        except BaseException:  # the end of a task that is unwound among them
            recorder._record_current_pass = False
            raise


@contextmanager
def uncounted() -> Iterator[None]:
    """A context of forward passes that nobody has asked for: SGLang's recorder counts none of them."""
    recorder = get_global_expert_distribution_recorder()
    if not recorder.recording:
        yield
        return
    recorder._recording = False
    try:
        yield
    finally:
        recorder._recording = True
