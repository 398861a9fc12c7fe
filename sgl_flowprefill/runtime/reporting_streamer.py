"""SGLang's way of answers to the client, with what happened to their requests beside the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from sgl_flowprefill.answers import REPORT_KEY


class ReportingStreamer(SchedulerOutputStreamer):
    """Adds reports to answers. Subclasses say what is in them."""

    @property
    def has_additional_customized_info(self) -> bool:
        return self.rust_server is None  # whose way of answers has none

    def is_request_level_customized_info_key(self, key: str) -> bool:
        return key == REPORT_KEY or bool(super().is_request_level_customized_info_key(key))

    def build_additional_customized_info(self, reqs: Sequence[Any]) -> dict[str, list[Any]]:
        """SGLang's hook for what goes with the tokens of ``reqs``."""
        found = dict(super().build_additional_customized_info(reqs))
        if any(of_reqs := [self._report(req) for req in reqs]):
            found[REPORT_KEY] = of_reqs
        return found

    def _report(self, req: Any) -> list[dict[str, Any]]:
        """The report that goes with what is sent of ``req`` now: one with its last event, none before."""
        raise NotImplementedError
