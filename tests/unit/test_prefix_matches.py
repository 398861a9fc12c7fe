"""Prompts that are matched with the radix cache again, because more of them has been cached since, or less may be."""

from __future__ import annotations

import math
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sgl_flowprefill.hub.progress import Progress
from sgl_flowprefill.hub.role import Arrival
from sgl_flowprefill.hub.task import Tasks
from sgl_flowprefill.hub.work import Work
from sgl_flowprefill.pace import Pace
from sgl_flowprefill.policy import ColocatedPolicy, Limits, make_policy
from sgl_flowprefill.runtime.memory import Activations, TaskMemory
from sgl_flowprefill.ttft import PrefillShape
from tests.simulated_device import HostCosts, Model, SimulatedDevice, SimulatedRequest, SimulatedServer


def test_requests_that_begin_alike_are_matched_again_when_one_of_them_has_been_computed() -> None:
    pace = Pace(2.0)
    ttft: Any = SimpleNamespace(
        predict_s=lambda shapes: float(sum(shape.new_tokens for shape in shapes)), pace=lambda shapes: pace
    )
    unlimited: Any = TaskMemory(Activations(1, 1, 1, None), math.inf)
    policy = make_policy("fcfs", Limits(16, 1), 60.0)
    work = Work(ColocatedPolicy(policy), ttft, unlimited, Progress([]), Tasks())
    waiting = work.waiting
    cached = {"0": 0, "1": 0, "2": 256, "other": 0}
    shared = list(range(1000, 1300))
    prompts = {
        rid: array("q", [*shared, *range(start, start + 100)]) for rid, start in zip("012", (0, 200, 400), strict=True)
    }
    prompts["other"] = array("q", range(5000, 5400))

    def match(rid: str) -> PrefillShape:
        return PrefillShape(len(prompts[rid]) - cached[rid], cached[rid])

    for number, (rid, prompt) in enumerate(prompts.items()):
        work.add(Arrival(rid, prompt, match(rid), number, 1.0, 0.0))
    jobs = dict(zip(prompts, policy.first_waiting(0.0, 4), strict=True))
    assert [job.remaining_s for job in jobs.values()] == [400.0, 400.0, 144.0, 400.0]
    waiting.take(["0"])
    waiting.cached([prompts["0"]])
    assert waiting.outdated() == [jobs["1"]], "the third has all whole blocks that it shares with the first"
    cached["1"] = 300
    assert work.match_again(list(jobs.values()), match)
    assert jobs["1"].remaining_s == 100.0
    assert not waiting.outdated()
    waiting.cached([prompts["0"]])
    assert not waiting.outdated(), "no more of it is cached than before"
    waiting.cached([prompts["1"], prompts["other"]])
    assert waiting.outdated() == [jobs["1"], jobs["other"]]
    waiting.take(["1", "2", "other"])
    assert not waiting.outdated()
    assert not waiting.watches


def test_only_who_would_start_is_matched_again_because_something_was_evicted_and_once() -> None:
    requests = [SimulatedRequest(f"r{i}", 0.0, 100, 100.0) for i in range(4)]
    model = Model(1, lambda tokens: 1e-9, lambda tokens: 1e-9)
    hub = SimulatedServer(SimulatedDevice(0, HostCosts()), model, requests).hub
    hub.work.policy.limits = Limits(max_suspended=16, max_batch_tokens=10_000)
    hub.look()
    shape, waiting, matched = PrefillShape(60, 40), hub.work.waiting, list[str]()
    for job in hub.work.policy.first_waiting(0.0, 9):
        waiting.matched(job, shape)

    def match(req: SimulatedRequest) -> PrefillShape:
        matched.append(req.rid)
        return shape

    hub.role.match = match  # type: ignore[method-assign]
    activations = Activations(hidden=1, attention=20, mlp=1, mlp_tile_tokens=None)
    hub.work.tasks.live = [SimpleNamespace(new_tokens=30_000, logprob_rows=0, shapes=[], members=[])]  # type: ignore[list-item]

    def chosen(room_tokens: int) -> list[str]:
        """The requests that would start beside a live task and ``room_tokens`` more."""
        budget_bytes = activations.running_bytes(30_000) + activations.suspended_bytes(room_tokens)
        hub.work.memory = TaskMemory(activations, budget_bytes)
        choice = hub.choose()
        return [job.item.req.rid for job in choice] if isinstance(choice, list) else []

    assert len(chosen(120)) == 2
    assert not matched, "nothing was evicted"
    for _ in range(10):
        waiting.evicted()
        assert not chosen(59)
    assert not matched, "none fits"
    starting = chosen(120)
    assert matched == starting
    assert chosen(120) == starting
    assert matched == starting, "nothing was evicted since"
    shape = PrefillShape(100, 0)
    waiting.evicted()
    assert chosen(120) == starting[:1]
    assert matched == [*starting, *starting]


def test_ranks_that_match_their_own_requests_match_those_again_that_are_next_one_at_an_event() -> None:
    requests = [SimulatedRequest(f"r{i}", 0.0, 100, 100.0 + i) for i in range(12)]
    model = Model(1, lambda tokens: 1e-9, lambda tokens: 1e-9)
    hub = SimulatedServer(SimulatedDevice(0, HostCosts()), model, requests).hub
    matched: list[str] = []

    def match(req: SimulatedRequest) -> PrefillShape:
        matched.append(req.rid)
        return PrefillShape(100)

    hub.role.match = match  # type: ignore[method-assign]
    hub.look()
    for job in hub.work.policy.first_waiting(0.0, 99):
        hub.work.waiting.matched(job, PrefillShape(60, 40))
    hub.work.waiting.evicted()
    hub.look()
    assert not matched, "where all ranks have the same requests, they are matched when they would start"
    hub.match_rounds = 1
    for _ in range(12):
        hub.look()
    assert matched == [f"r{i}" for i in range(8)], "the first ones, and as long as they wait none behind them"
