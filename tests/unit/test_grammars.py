"""Requests whose grammars are being compiled."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.managers.scheduler import Scheduler

from tests.roles import Grammars, with_role
from tests.waiting import until


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A scheduler whose input is put into the queue of grammars."""

    def process(scheduler: Any, recv_reqs: list[Any]) -> None:
        scheduler.grammar_manager.grammar_queue += recv_reqs

    monkeypatch.setattr(Scheduler, "process_input_requests", process)
    return with_role(grammar_manager=Grammars())


def test_a_compiled_grammar_is_an_event_and_the_others_are_not_waited_for(scheduler: Any) -> None:
    grammars = scheduler.grammar_manager
    first, second = grammars.request(), grammars.request()
    scheduler.process_input_requests([first])
    scheduler.process_input_requests([second])
    assert not scheduler.role.wakeup.pending
    assert not scheduler.role.has_compiled_grammars()
    compiled = SimpleNamespace(copy=lambda: None)
    threading.Thread(target=second.grammar.set_result, args=(compiled,)).start()
    until(lambda: scheduler.role.wakeup.pending, 10.0)
    assert scheduler.role.has_compiled_grammars()
    assert grammars.get_ready_grammar_requests() == [second]
    assert second.grammar is compiled
    assert not scheduler.role.has_compiled_grammars()
    first.grammar = None  # aborted
    assert scheduler.role.has_compiled_grammars()
    assert grammars.get_ready_grammar_requests() == [first]
    assert not scheduler.role.has_compiled_grammars()


def test_a_grammar_that_takes_too_long_is_given_up_when_sglang_would(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars, now_s = scheduler.grammar_manager, time.monotonic()
    late, in_time = grammars.request(), grammars.request()
    for request, began_s in ((late, now_s - 51.0), (in_time, now_s - 40.0)):
        with monkeypatch.context() as earlier:
            earlier.setattr("sgl_flowprefill.runtime.scheduler_role.time.monotonic", lambda began_s=began_s: began_s)
            scheduler.process_input_requests([request])
    assert scheduler.role.has_compiled_grammars()
    assert grammars.get_ready_grammar_requests() == [late]
    assert "timed out" in late.failures[0]
    assert not scheduler.role.has_compiled_grammars()


def test_a_grammar_is_as_old_as_this_process_has_compiled_it(scheduler: Any) -> None:
    """The HTTP server may run on another machine, whose clock shows other numbers."""
    grammars = scheduler.grammar_manager
    for received_s in (time.monotonic() - 1e6, 0.0, time.monotonic() + 1e6):
        scheduler.process_input_requests([grammars.request(received_s)])
    assert not scheduler.role.has_compiled_grammars()
    assert all(req.grammar_wait_ct == 0 for req in grammars.grammar_queue)


def test_rank_0_decides_when_ranks_look_at_their_grammars(scheduler: Any) -> None:
    said: list[list[bool]] = []
    scheduler.role.agreement = SimpleNamespace(agree=lambda values: said.append(values) or [1])
    assert not scheduler.role.has_compiled_grammars()
    assert not said
    scheduler.process_input_requests([scheduler.grammar_manager.request()])
    assert scheduler.role.has_compiled_grammars()
    assert said == [[False]]
