"""SGLang's rebalancing of experts between ranks (EPLB), between forward passes and beside none that is suspended.

SGLang counts forward passes, and after so many of them moves the weights of experts at the end of one. Beside suspended
prefills, what has been counted of these would be of other experts from then on. So experts are moved when the hub looks
next, and started tasks run to their ends before. All ranks end the same forward passes in the same round of the hub, so
they do so in the same round.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder

from sgl_flowprefill.contract import require


class Rebalancing:
    """What a role asks of the rebalancing of experts. They stay where they are."""

    @property
    def is_due(self) -> bool:
        """Whether experts are to be moved as soon as nothing is suspended."""
        return False

    def move(self) -> None:
        """Nothing is suspended: move experts, if it is due."""


@dataclass(eq=False)
class EPLB(Rebalancing):
    """SGLang's."""

    manager: Any
    """``EPLBManager``."""
    passes: int = field(default=0, init=False)
    """That have been counted since experts were moved."""

    def __post_init__(self) -> None:
        self.manager.on_forward_pass_end = self.note_pass

    def note_pass(self) -> None:
        """A forward pass has ended. One that nobody has asked for is not counted, nor are its experts."""
        self.passes += bool(get_global_expert_distribution_recorder().recording)

    @property
    def is_due(self) -> bool:
        return self.passes >= int(self.manager._rebalance_num_iterations)

    def move(self) -> None:
        if self.is_due:
            self.passes = 0
            for _ in self.manager.rebalance():  # layers in parts, between which SGLang would run forward passes
                pass


def rebalancing(scheduler: Any) -> Rebalancing:
    """The rebalancing of SGLang's ``scheduler``, if it is on. Raises SystemExit with one line where it is not as
    expected.
    """
    manager = scheduler.tp_worker.model_runner.eplb_manager
    if manager is None:
        return Rebalancing()
    require("rebalancing")
    return EPLB(manager)
