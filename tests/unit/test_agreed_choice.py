"""Two tensor-parallel ranks in one process: what they match with the radix cache, and what they start, is alike."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import takewhile
from typing import Any

import pytest

pytest.importorskip("sglang")

from sgl_flowprefill.hub.loop import MATCH_ROUNDS
from sgl_flowprefill.hub.shedding import LATE, Shedding
from sgl_flowprefill.hub.waiting import BLOCK_TOKENS
from sgl_flowprefill.policy import Limits, make_policy
from sgl_flowprefill.slo import Objective
from sgl_flowprefill.ttft import PrefillShape
from tests.simulated_device import (
    HostCosts,
    Model,
    SimulatedDevice,
    SimulatedEngine,
    SimulatedRequest,
    SimulatedServer,
)

RANKS = 2
MODEL = Model(1, lambda tokens: tokens * 1e-4, lambda tokens: 0.0)


class Meeting:
    """Where the ranks meet."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(RANKS, timeout=30.0)
        self.said: list[int] = []


class InTurn:
    """The agreement of a rank: it waits for the other, and hears what the first one says."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.decides = rank == 0
        self.ends_waiting = lambda: False
        self.count = 0
        self._meeting = meeting

    def agree(self, values: Sequence[int] = (), failed_at: int = 0) -> list[int]:
        meeting = self._meeting
        self.count += 1
        if self.decides:
            meeting.said = list(values)
        meeting.barrier.wait()
        said = meeting.said
        meeting.barrier.wait()
        return said

    def naming_the_lost(self) -> Any:
        return nullcontext()


class CachingEngine(SimulatedEngine):
    """Prompts with the same beginning share a cached prefix, which a match finds. Keeps what is matched and started."""

    def __init__(self, requests: Sequence[SimulatedRequest], prompts: dict[str, list[int]]) -> None:
        super().__init__(SimulatedDevice(0, HostCosts()), MODEL, requests)
        self.prompts = prompts
        self.done: list[str] = []
        self.evicting: random.Random | None = None
        """What says when a prompt is evicted, and which."""
        self.evicted: Callable[[], None] = lambda: None
        self.log: list[tuple[str, list[str]]] = []

    def arrived(self) -> Any:
        for arrival in super().arrived():
            prompt = self.prompts[arrival.req.rid]
            yield arrival._replace(prompt=prompt, shape=self._shape(arrival.req))

    def match(self, req: SimulatedRequest) -> PrefillShape:
        self.log.append(("match", [req.rid]))
        return self._shape(req)

    def _shape(self, req: SimulatedRequest) -> PrefillShape:
        prompt = self.prompts[req.rid]
        cached = max((shared_tokens(prompt, self.prompts[rid]) for rid in self.done), default=0)
        return PrefillShape(len(prompt) - cached, cached)

    def make_batch(self, reqs: Sequence[SimulatedRequest]) -> list[SimulatedRequest]:
        self.log.append(("start", [req.rid for req in reqs]))
        return super().make_batch(reqs)

    def finish(self, task: Any) -> None:
        self.done += task.rids
        if self.evicting is not None and self.evicting.random() < 0.7:
            self.done.remove(self.evicting.choice(self.done))
            self.evicted()


def shared_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """The whole blocks that both begin with, but for the last token."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    return min(same, len(one) - 1) // BLOCK_TOKENS * BLOCK_TOKENS


class Rank:
    """A hub of which nothing but forward passes is left out."""

    def __init__(self, meeting: Meeting, rank: int, arrivals: dict[str, tuple[float, list[int], float]]) -> None:
        requests = [
            SimulatedRequest(rid, arrival_s, len(prompt), slo_s) for rid, (arrival_s, prompt, slo_s) in arrivals.items()
        ]
        self.engine = CachingEngine(requests, {rid: prompt for rid, (_, prompt, _) in arrivals.items()})
        policy = make_policy("s-edf", Limits(max_suspended=4, max_batch_tokens=500), 60.0)
        server = SimulatedServer(self.engine.device, MODEL, requests, policy=policy)
        self.hub: Any = server.hub
        self.engine.evicted = self.hub.work.waiting.evicted
        self.hub.role = self.engine
        self.hub.agreement = self.agreement = InTurn(meeting, rank)
        self.reasons: list[str] = []
        if rank:  # whose predictions count for nothing
            server.times.predict_s = lambda batch: 7.0  # type: ignore[method-assign]

    def refuse_late(self) -> None:
        """Refuse what cannot be met, of requests that may all be refused."""
        engine = self.engine
        arrived = engine.arrived
        engine.arrived = lambda: (one._replace(objective=PROMISE) for one in arrived())  # type: ignore[method-assign]

        def refuse(reasons: dict[SimulatedRequest, str], retry_after_s: int) -> None:
            engine.log.append(("refuse", [req.rid for req in reasons]))
            engine._waiting = [req for req in engine._waiting if req not in reasons]
            self.reasons += reasons.values()

        self.hub.sheds, self.hub.refuse = True, refuse

    def run(self) -> None:
        """Serve all requests, each task to its end at once."""
        waiting = self.hub.work.waiting
        while self.engine.requests_to_come or waiting:
            if not waiting and not self.engine.has_arrivals():
                self.engine.device.now_s = self.engine.requests_to_come[0].arrival_s
            self.hub.look()
            if not waiting:
                continue  # all were refused
            evicts = self.engine.evicting is not None
            outdated, before = evicts or bool(waiting.outdated()), self.agreement.count
            choice = self.hub.choose()
            assert isinstance(choice, list)
            agreements = self.agreement.count - before
            assert agreements <= (MATCH_ROUNDS if outdated else 1)
            if not evicts or agreements < MATCH_ROUNDS:
                assert not waiting.is_outdated(choice[0]), "the winner's prompt could be matched again"
            task = self.hub.start(choice)
            self.engine.device.now_s += 1e-4 * task.new_tokens
            task.done, task.result = True, Result
            self.hub.stopped(task)


class Result:
    copy_done = None


def run_ranks(
    arrivals: dict[str, tuple[float, list[int], float]], evicting: int | None = None
) -> list[list[tuple[str, list[str]]]]:
    """What each rank matched and started, in its order. ``evicting``: prompts are evicted by chance, of this seed."""
    meeting = Meeting()
    ranks = [Rank(meeting, number, arrivals) for number in range(RANKS)]
    for rank in ranks:
        rank.engine.evicting = None if evicting is None else random.Random(evicting)
    with ThreadPoolExecutor(RANKS) as pool:
        for done in [pool.submit(rank.run) for rank in ranks]:
            done.result()
    return [rank.engine.log for rank in ranks]


def test_a_winner_is_matched_at_all_ranks_before_its_batch_is_made() -> None:
    shared = list(range(400))
    arrivals = {
        "first": (0.0, [*shared, *range(1000, 1020)], 1.0),
        "second": (0.0, [*shared, *range(2000, 2020)], 2.0),
        "third": (0.0, [*shared, *range(3000, 3020)], 3.0),
        "fourth": (0.0, [*shared, *range(4000, 4020)], 4.0),
        "beside": (0.0, list(range(5000, 5150)), 5.0),
    }
    logs = run_ranks(arrivals)
    assert logs[0] == logs[1]
    assert logs[0] == [
        ("start", ["first"]),
        ("match", ["second"]),  # by the look
        ("match", ["third"]),  # because they would join it: each was too long to, before it was matched
        ("match", ["fourth"]),
        ("start", ["second", "third", "fourth", "beside"]),
    ]


def random_arrivals(seed: int) -> dict[str, tuple[float, list[int], float]]:
    rng = random.Random(seed)
    prefixes = [[rng.randrange(9000) for _ in range(rng.choice([0, 64, 300]))] for _ in range(3)]
    arrivals, now_s = {}, 0.0
    for number in range(25):
        now_s += rng.expovariate(1 / 0.02)
        prompt = rng.choice(prefixes) + [rng.randrange(9000) for _ in range(rng.randrange(1, 300))]
        arrivals[str(number)] = (now_s, prompt, rng.uniform(0.05, 1.0))
    return arrivals


@pytest.mark.parametrize("seed", range(40))
def test_ranks_match_and_start_alike_whatever_arrives(seed: int) -> None:
    logs = run_ranks(random_arrivals(seed))
    assert logs[0] == logs[1]
    assert sum(len(rids) for kind, rids in logs[0] if kind == "start") == 25


@pytest.mark.parametrize("seed", range(40))
def test_ranks_match_and_start_alike_whatever_is_evicted(seed: int) -> None:
    logs = run_ranks(random_arrivals(seed), evicting=seed)
    assert logs[0] == logs[1]
    assert sum(len(rids) for kind, rids in logs[0] if kind == "start") == 25


PROMISE = Objective(0.5, 0.1, sheddable=True)


def test_ranks_refuse_alike_and_only_the_first_one_keeps_what_may_be_refused() -> None:
    """More than there is time for, so that many are refused at once."""
    arrivals = {str(number): (0.0, list(range(500 * number, 500 * number + 100)), 0.5) for number in range(400)}
    meeting = Meeting()
    ranks = [Rank(meeting, number, arrivals) for number in range(RANKS)]
    for rank in ranks:
        rank.refuse_late()
    ranks[0].hub.work.shedding = Shedding()
    with ThreadPoolExecutor(RANKS) as pool:
        for done in [pool.submit(rank.run) for rank in ranks]:
            done.result()
    logs = [rank.engine.log for rank in ranks]
    assert logs[0] == logs[1]
    refused = [rids for kind, rids in logs[0] if kind == "refuse"]
    assert max(map(len, refused)) > 300
    assert sum(map(len, refused)) + sum(len(rids) for kind, rids in logs[0] if kind == "start") == 400
    assert set(ranks[0].reasons) == {LATE}
    assert set(ranks[1].reasons) == {""}, "who decides answers"


class Offers:
    """Has a better model for each rank when it has started some tasks. Notes what the rank had started by then."""

    def __init__(self, engine: CachingEngine, after: int) -> None:
        self.adopted_after: list[int] = []
        self._engine = engine
        self._after = after

    def look_for_offer(self) -> bool:
        return self._started >= self._after and not self.adopted_after

    def adopt(self) -> None:
        self.adopted_after.append(self._started)

    @property
    def _started(self) -> int:
        return sum(kind == "start" for kind, _ in self._engine.log)


def test_ranks_adopt_a_model_at_the_same_task_when_the_first_one_has_it() -> None:
    arrivals = {str(number): (0.1 * number, list(range(500 * number, 500 * number + 40)), 1.0) for number in range(9)}
    meeting = Meeting()
    ranks = [Rank(meeting, number, arrivals) for number in range(RANKS)]
    offers = [Offers(rank.engine, after) for rank, after in zip(ranks, (4, 1), strict=True)]
    for rank, offer in zip(ranks, offers, strict=True):
        rank.hub.learning = offer
    with ThreadPoolExecutor(RANKS) as pool:
        for done in [pool.submit(rank.run) for rank in ranks]:
            done.result()
    assert [offer.adopted_after for offer in offers] == [[4], [4]]
