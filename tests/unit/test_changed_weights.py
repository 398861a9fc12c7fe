"""Before other weights, or none, are put where a prefill reads them, all that have started run to their ends."""

from __future__ import annotations

import ast
import inspect
from unittest.mock import Mock

import pytest

pytest.importorskip("sglang")

from sglang.srt.managers.scheduler import Scheduler

from sgl_flowprefill.runtime.hub_scheduler import CHANGES_WEIGHTS
from tests.roles import Grammars, with_role

CHANGE_NONE = {"InitWeightsUpdateGroupReqInput", "DestroyWeightsUpdateGroupReqInput", "GetWeightsByNameReqInput"}


@pytest.mark.parametrize("kind", CHANGES_WEIGHTS, ids=lambda kind: kind.__name__)
def test_what_has_started_ends_before_a_message_that_may_change_weights_is_handed_on(
    kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []
    monkeypatch.setattr(Scheduler, "process_input_requests", lambda self, recv_reqs: done.extend(recv_reqs))
    scheduler = with_role(grammar_manager=Grammars(), finish_started=lambda: done.append("all that had started"))
    other, message = object(), Mock(spec=kind)
    scheduler.process_input_requests([other])
    scheduler.process_input_requests([other, message])
    assert done == [other, "all that had started", other, message]


def test_all_that_sglang_hands_to_its_weight_updater_is_known() -> None:
    handed: set[str] = set()
    for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(Scheduler)))):  # type: ignore[arg-type]
        if isinstance(node, ast.Tuple) and len(node.elts) == 2:
            message, handler = map(ast.unparse, node.elts)
            if handler.startswith("self.weight_updater."):
                handed.add(message)
    assert handed > CHANGE_NONE
    assert handed - CHANGE_NONE <= {kind.__name__ for kind in CHANGES_WEIGHTS}
