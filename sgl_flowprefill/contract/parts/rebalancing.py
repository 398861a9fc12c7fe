"""Rows of the contract: rebalancing of experts between forward passes."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows, source
from sgl_flowprefill.contract.symbols import MODEL_RUNNER

MANAGER: Final = "sglang.srt.eplb.eplb_manager:EPLBManager"
MOVES: Final = "experts move beside suspended prefills, of which others are counted then"
STAYS: Final = "experts are never rebalanced"

PART: Final = Part(
    "rebalancing",
    "Rebalancing of experts between forward passes",
    ("scheduler",),
    (
        *attributes(MODEL_RUNNER, "eplb_manager", "moves experts between ranks", STAYS),
        *rows("hooks", MANAGER, "on_forward_pass_end(self)", "is told that a forward pass has ended", MOVES),
        source(
            "assumes",
            f"{MODEL_RUNNER}.forward",
            ["self.eplb_manager.on_forward_pass_end()"],
            "tells that a forward pass has ended, by the manager's own method",
            MOVES,
        ),
        *rows("calls", MANAGER, "rebalance(self)", "moves experts, part by part", STAYS),
        source(
            "assumes",
            f"{MANAGER}._entrypoint",
            ["for _ in range(self._rebalance_num_iterations):", "yield from self.rebalance()"],
            "moves experts after so many forward passes, and keeps nothing else of when",
            STAYS,
        ),
        *attributes(
            MANAGER, "_rebalance_num_iterations", "says after how many forward passes experts are moved", STAYS
        ),
        *rows(
            "calls",
            "sglang.srt.eplb.expert_distribution:",
            "get_global_expert_distribution_recorder()",
            "says whether forward passes are counted",
            STAYS,
        ),
    ),
)
