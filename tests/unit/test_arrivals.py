"""What roles tell the hub of requests that come and go, and how many they look at: bootstraps, queues, health."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.scheduler import Scheduler

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.hub.device import CpuDevice
from sgl_flowprefill.hub.parts import OneRank
from sgl_flowprefill.hub.task import Tasks
from sgl_flowprefill.policy import Stream
from sgl_flowprefill.runtime.event_recorder import EventRecorder
from sgl_flowprefill.runtime.unified_role import UnifiedRole
from sgl_flowprefill.runtime.wakeup import Wakeup
from tests.roles import Grammars, with_role


def test_many_waiting_requests_are_looked_at_in_turns_for_those_whose_decode_server_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[int] = []

    def drop_negative(scheduler: Any) -> None:
        looks.append(len(scheduler.waiting_queue))
        scheduler.waiting_queue = [number for number in scheduler.waiting_queue if number >= 0]

    monkeypatch.setattr(Scheduler, "resolve_waiting_queue_bootstrap", drop_negative)
    numbers = [number if number % 3 else -number - 1 for number in range(2000)]
    scheduler = with_role(waiting_queue=list(numbers))
    for _ in range(4):
        scheduler.role.drop_stalled()
    assert max(looks) <= 512
    assert sorted(scheduler.waiting_queue) == [number for number in numbers if number >= 0]


@dataclass(eq=False)
class Bootstrapping:
    """A request that has not bootstrapped."""

    bootstrap_room: int
    is_ready: bool = False

    @property
    def rid(self) -> str:
        return f"r{self.bootstrap_room}"


@dataclass
class BootstrapQueue:
    """SGLang's queue of them. Counts what it is asked to look at."""

    queue: list[Bootstrapping]
    looked_at: int = 0

    def pop_bootstrapped(self) -> list[Bootstrapping]:
        self.looked_at += len(self.queue)
        ready = [req for req in self.queue if req.is_ready]
        self.queue = [req for req in self.queue if not req.is_ready]
        return ready


def test_of_many_requests_without_a_place_at_a_decode_server_those_are_looked_at_of_which_something_was_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Scheduler, "process_disagg_prefill_inflight_queue", lambda scheduler: [])
    monkeypatch.setattr(Scheduler, "resolve_waiting_queue_bootstrap", lambda scheduler: None)
    reqs = [Bootstrapping(room) for room in range(5000)]
    queue, buffers = BootstrapQueue(list(reqs)), SimpleNamespace(available_size=lambda: 9)
    role = with_role(
        waiting_queue=[],
        disagg_prefill_bootstrap_queue=queue,
        disagg_prefill_inflight_queue=[],
        req_to_metadata_buffer_idx_allocator=buffers,
        grammar_manager=Grammars(),
    ).role
    monkeypatch.setattr(role, "take_messages", lambda: False)
    bootstrapped: list[Bootstrapping] = []

    def may_start(queued: list[Bootstrapping]) -> list[Bootstrapping]:
        bootstrapped.extend(queued)
        return []

    monkeypatch.setattr(role, "may_start", may_start)

    def look(stalls_due: bool = False) -> tuple[int, list[int]]:
        """How many requests are looked at, and the rooms of those that have bootstrapped."""
        queue.looked_at = 0
        bootstrapped.clear()
        role.take_news(stalls_due)
        assert not list(role.arrived())
        return queue.looked_at, [req.bootstrap_room for req in bootstrapped]

    assert look() == (5000, []), "all are new"
    assert look() == (0, [])
    reqs[7].is_ready = True
    role.note_transfer_status(7, KVPoll.WaitingForInput)
    assert look() == (1, [7])
    reqs[8].is_ready = True
    assert look() == (0, []), "nobody has told of it"
    assert look(stalls_due=True) == (4999, [8])
    role.note_transfer_status(9, KVPoll.WaitingForInput)
    assert look() == look() == (1, []), "another rank, or a buffer, is waited for"
    reqs[9].is_ready = True
    assert look() == (1, [9])
    role.note_transfer_status(9, KVPoll.Success)
    queue.queue += [Bootstrapping(5000), Bootstrapping(5001, is_ready=True)]
    assert look() == (2, [5001])
    role.note_abort("r4999", abort_all=False)
    reqs[4999].is_ready = True  # SGLang takes it out in the same way
    assert look() == (1, [4999])
    role.note_transfer_status(6000, KVPoll.WaitingForInput)
    assert look() == (0, []), "it has not come"
    queue.queue += [Bootstrapping(6000)]
    assert look() == look() == (1, []), "it bootstrapped here before it came, and not at another rank"
    queue.queue[-1].is_ready = True
    assert look() == (1, [6000])
    buffers.available_size = lambda: 0
    queue.queue += [Bootstrapping(5002)]
    assert look() == look() == (1, []), "it may be for want of a buffer that it has not bootstrapped"
    assert len(queue.queue) == len(set(queue.queue)) == 4998
    gone = queue.queue.pop(0)
    role.note_transfer_status(gone.bootstrap_room, KVPoll.Failed)
    assert look() == (1, [])
    assert gone not in queue.queue
    queue.queue.clear()
    assert look() == (0, [])
    queue.queue.append(reqs[0])
    assert look() == (1, [])


def test_a_bootstrap_whose_request_never_comes_is_forgotten() -> None:
    queue = [SimpleNamespace(bootstrap_room=7)]
    role = with_role(disagg_prefill_bootstrap_queue=SimpleNamespace(queue=queue)).role
    for room in (7, 8):
        role.note_transfer_status(room, KVPoll.WaitingForInput)
    role.forget_rooms()
    assert list(role.bootstrapped_s) == [7]


def test_a_bootstrap_that_begins_is_no_event() -> None:
    role = with_role().role
    role.note_transfer_status(7, KVPoll.Bootstrapping)
    assert not role.wakeup.pending
    role.note_transfer_status(7, KVPoll.WaitingForInput)
    assert role.wakeup.pending


def test_a_batch_goes_on_while_somebody_waits_for_one_of_its_requests() -> None:
    role = with_role().role
    batches: list[Any] = [
        SimpleNamespace(
            batch=SimpleNamespace(reqs=[SimpleNamespace(to_finish=None, finished_reason=None) for _ in "ab"])
        )
        for _ in "ab"
    ]
    for req in batches[0].batch.reqs:
        assert role.abandoned(batches) == []
        req.to_finish = FINISH_ABORT()
    assert role.abandoned(batches) == batches[:1]


def test_all_health_checks_are_answered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each HTTP worker of a server sends its own, and nothing else may happen for the rest of a long prefill."""
    sent: list[Any] = []
    channels = SimpleNamespace(send_to_tokenizer=SimpleNamespace(send_output=sent.append))
    scheduler = with_role(
        return_health_check_ipcs=deque(["one", "another"]),
        ipc_channels=channels,
        rust_server=None,
        grammar_manager=Grammars(),
    )
    monkeypatch.setattr(Scheduler, "ingest_requests", lambda scheduler: None)
    scheduler.role.take_messages()
    assert [output.http_worker_ipc for output in sent] == ["one", "another"]


class LongQueue(list[Any]):
    """Counts what is looked at of it."""

    looked_at = 0

    def __iter__(self) -> Iterator[Any]:
        for req in super().__iter__():
            self.looked_at += 1
            yield req

    def __reversed__(self) -> Iterator[Any]:
        for req in super().__reversed__():
            self.looked_at += 1
            yield req


def test_the_hub_is_told_of_requests_without_a_look_at_all_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler: Any = SimpleNamespace(
        enable_hierarchical_cache=False, waiting_queue=LongQueue(object() for _ in range(10_000))
    )
    parts = (FlowPrefillConfig().default_ttft_slo, Tasks(), Wakeup(), CpuDevice(), OneRank(lambda: False))
    role: Any = UnifiedRole(scheduler, *parts, EventRecorder(None))  # type: ignore[arg-type]
    monkeypatch.setattr(role, "as_arrival", lambda req: req)
    monkeypatch.setattr(role, "take_messages", lambda: False)
    queue, known = scheduler.waiting_queue, scheduler.waiting_queue[:]

    def come(*reqs: object) -> None:
        for req in reqs:
            queue.append(req)
            role.note_queued(req)

    role.streams["a stream"] = Stream(0.1, 10, 0.0)  # which may free KV cache for what was given back
    come("first", "second")
    role.held_back.append("given back")
    queue.insert(10_000, "given back")
    role.take_news(stalls_due=False)
    assert len(role.waiting()) == 10_000
    assert list(role.arrived()) == ["first", "second"]
    assert len(role.waiting()) == 10_002
    assert queue.looked_at < 20
    assert list(role.waiting()) == [*known, "first", "second"]
    come("aborted", "third")
    for req in ("given back", "aborted"):
        queue.remove(req)
    role.take_news(stalls_due=False)
    assert len(role.waiting()) == 10_002
    assert (list(role.arrived()), role.held_back) == (["third"], [])
    assert list(role.waiting()) == [*known, "first", "second", "third"]
