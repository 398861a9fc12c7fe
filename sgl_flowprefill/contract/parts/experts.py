"""Rows of the contract: statistics of experts, of several forward passes at once."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows, source
from sgl_flowprefill.contract.symbols import MODEL_RUNNER

EXPERTS: Final = "sglang.srt.eplb.expert_distribution:"
RECORDER: Final = f"{EXPERTS}_ExpertDistributionRecorderReal"
MIXED: Final = "experts of one prefill are counted as those of another"
PARTS_COUNT: Final = "prefills that have been given up are counted as whole ones"

PART: Final = Part(
    "experts",
    "Statistics of experts, of several forward passes at once",
    ("scheduler",),
    (
        *rows("calls", EXPERTS, "get_global_expert_distribution_recorder()", "counts the experts of tokens", MIXED),
        *attributes(
            RECORDER,
            "_record_current_pass _disable_all _current_forward_pass_id _current_layer_idx _current_debug_name "
            "_single_pass_gatherers",
            "is what the recorder keeps of the forward pass that runs",
            MIXED,
        ),
        *attributes(
            RECORDER, "_expert_location_metadata", "says where experts are, and belongs to no forward pass", MIXED
        ),
        source(
            "assumes",
            f"{RECORDER}._on_hook",
            ["gatherer = self._single_pass_gatherers[", "layer_idx=self._current_layer_idx.value"],
            "counts by what the recorder keeps of the forward pass that runs",
            MIXED,
        ),
        *rows(
            "hooks",
            RECORDER,
            "with_forward_pass(self, forward_pass_id, forward_batch)",
            "is the begin and the end of a forward pass",
            PARTS_COUNT,
        ),
        source(
            "assumes",
            f"{MODEL_RUNNER}.forward",
            ["get_global_expert_distribution_recorder().with_forward_pass("],
            "tells the recorder when a forward pass begins and ends",
            PARTS_COUNT,
        ),
        source(
            "assumes",
            f"{RECORDER}._on_forward_pass_end",
            ["if not self._recording or not self._record_current_pass:", "self._accumulator.append("],
            "takes over the counts of a forward pass at its end",
            PARTS_COUNT,
        ),
        *attributes(
            RECORDER,
            "recording _recording",
            "says whether forward passes are counted",
            "prefills that the server measures are counted as those of clients",
        ),
    ),
)
