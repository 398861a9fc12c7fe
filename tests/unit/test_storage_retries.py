"""What SGLang is given where it asks again for prefixes that storage did not have in time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.scheduler import Scheduler

from sgl_flowprefill.runtime.data_parallel import DataParallelRole
from sgl_flowprefill.runtime.hub_scheduler import HubScheduler


def test_only_requests_of_the_rank_itself_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of another rank has no fields of SGLang's, and its id may be that of one that is waited for here."""
    given: list[list[Any]] = []
    monkeypatch.setattr(
        Scheduler, "_process_storage_prefetch_retries", lambda scheduler: given.append(scheduler.waiting_queue)
    )
    own, awaited = SimpleNamespace(rid="own"), SimpleNamespace(rid="awaited")
    scheduler: Any = object.__new__(HubScheduler)
    scheduler.waiting_queue = waiting = [awaited, own]
    role: Any = object.__new__(DataParallelRole)
    role.scheduler, role.reads = scheduler, SimpleNamespace(awaited=[awaited])
    vars(role)["_remote_startable"] = {"of another rank": None}
    scheduler.role = role
    assert list(role.waiting()) == [own, "of another rank"]
    scheduler._process_storage_prefetch_retries()
    assert given == [[own]]
    assert given[0][0] is own
    assert scheduler.waiting_queue is waiting
