"""The agreement of ranks, in every interleaving of small cases: a search of the states of the real code.

Ranks run the transitions of ``runtime.agreement`` one at a time, in any order. The word is one number; a rank reads or
writes it once in a transition, so nothing finer can happen on a machine. The hub's all-reduce lets a rank go once all
have come, one by one. Two tasks are there to run, and rank 0 picks either at will and sees an event whenever it wants.
Where ``collectives`` are, a rank that comes to the place waits until all others have come there, as on a CPU; without
them nothing keeps the ranks together, as on a device that runs ahead.

On such a device the result of a finished task arrives later, at each rank whenever it likes once all have queued the
task. When it is processed is up to the hub (``finish_arrived``), and has to be the same for all ranks: it changes what
the next tasks find.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sgl_flowprefill.hub.task import NO_TASK, Tasks
from sgl_flowprefill.runtime import agreement
from sgl_flowprefill.runtime.agreement import Follower, Leader

POINTS = (6, 5)
"""Interruption points of the two tasks, the last of which comes before the end of the task."""


class Blocked(Exception):
    """The rank waits."""


class Wrong(Exception):
    """A state that must not be."""


@dataclass(frozen=True)
class Rank:
    point: int = 0
    stop: int = 0
    round: int = 0
    in_hub: bool = False
    at_collective: bool = False
    passed: tuple[int, ...] = (0,) * len(POINTS)
    """Interruption points passed, by task; one more than there are when the task is done."""
    finishing: tuple[int, ...] = ()
    """Tasks that are done, whose results are not processed."""
    arrived: frozenset[int] = frozenset()
    """Tasks whose results have arrived."""
    finished: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """Tasks whose results are processed, and what was passed by then."""


@dataclass(frozen=True)
class State:
    word: int
    picks: tuple[int, ...]
    """The task of each round, or NO_TASK when rank 0 could only wait for a result."""
    arrivals: tuple[int, ...]
    """The task whose result rank 0 had at the beginning of each round, or NO_TASK."""
    ranks: tuple[Rank, ...]

    def moved(self, index: int, rank: Rank, word: int | None = None) -> State:
        ranks = (*self.ranks[:index], rank, *self.ranks[index + 1 :])
        return replace(self, ranks=ranks, word=self.word if word is None else word)


@dataclass(frozen=True)
class Model:
    ranks: int
    lead: int
    collectives: frozenset[int]
    """Interruption points before which there is a collective."""
    late: bool = False
    """Whether results arrive later than their task is done."""
    each_by_itself: bool = False
    """A mistake: every rank processes what has arrived there."""
    leader: type[Leader] = Leader
    follower: type[Follower] = Follower

    def start(self) -> Iterator[State]:
        """All ranks are in the hub, and rank 0 has picked."""
        waiting = Rank(in_hub=True)
        for task in range(len(POINTS)):
            yield State(0, (task,), (NO_TASK,), (waiting,) * self.ranks)

    def successors(self, state: State) -> Iterator[State]:
        for index, rank in enumerate(state.ranks):
            yield from self.hub(state, index, rank) if rank.in_hub else self.run(state, index, rank)
            on_the_way = [task for task in rank.finishing if task not in rank.arrived]
            if on_the_way and all(other.passed[on_the_way[0]] > POINTS[on_the_way[0]] for other in state.ranks):
                yield state.moved(index, replace(rank, arrived=rank.arrived | {on_the_way[0]}))

    def hub(self, state: State, index: int, rank: Rank) -> Iterator[State]:
        """The all-reduce ends: a round begins for this rank."""
        if not all((other.round, other.in_hub) >= (rank.round, True) for other in state.ranks):
            return
        if rank.round == len(state.picks):  # all tasks are done
            if index == 0 and rank.finishing and rank.finishing[0] in rank.arrived:
                picks, arrivals = (*state.picks, NO_TASK), (*state.arrivals, rank.finishing[0])
                yield replace(state, picks=picks, arrivals=arrivals)
            return
        try:
            rank = self.finish_arrived(state, rank, state.arrivals[rank.round])
        except Blocked:
            return
        if state.picks[rank.round] == NO_TASK:
            yield state.moved(index, replace(rank, round=rank.round + 1))
            return
        writes: list[int] = []
        side = self.side(state, index, rank, False, writes)
        side.begin((rank.round + 1) * agreement.POINTS_PER_ROUND)
        rank = replace(rank, point=side.point, stop=0, round=rank.round + 1, in_hub=False)
        yield state.moved(index, rank, *writes)

    def run(self, state: State, index: int, rank: Rank) -> Iterator[State]:
        """The task of this round goes on, up to and through its next interruption point."""
        task = state.picks[rank.round - 1]
        next_point = rank.passed[task] + 1
        if next_point in self.collectives and not rank.at_collective:
            yield state.moved(index, replace(rank, at_collective=True))
            return
        if rank.at_collective and not all(
            other.passed[task] >= next_point or (other.passed == rank.passed and other.at_collective)
            for other in state.ranks
        ):
            return
        passed = tuple(next_point if t == task else count for t, count in enumerate(rank.passed))
        rank = replace(rank, at_collective=False, passed=passed)
        if next_point > POINTS[task]:
            rank = replace(rank, finishing=(*rank.finishing, task))
            try:
                rank = self.finish_arrived(state, rank, state.arrivals[rank.round - 1])
            except Blocked:
                return
            yield from self.leave(state, index, rank, done=True)
            return
        for pending in (False, True) if index == 0 else (False,):
            writes: list[int] = []
            side = self.side(state, index, rank, pending, writes)
            try:
                interrupted = side.interrupted()
            except Blocked:
                return
            ran = replace(rank, point=side.point, stop=side.stop if isinstance(side, Leader) else 0)
            moved = state.moved(index, ran, *writes)
            if interrupted:
                yield from self.leave(moved, index, ran, done=False)
            else:
                yield moved

    def leave(self, state: State, index: int, rank: Rank, done: bool) -> Iterator[State]:
        """Into the hub, where rank 0 picks what the next round runs."""
        if index == 0 and rank.stop and not done and rank.point != rank.stop:
            raise Wrong("rank 0 has not honoured its stop")
        for other in state.ranks:
            if other.round == rank.round and other.in_hub and other.passed != rank.passed:
                raise Wrong(f"ranks stop at {other.passed} and {rank.passed} points")
        state = state.moved(index, replace(rank, in_hub=True))
        left = [task for task, points in enumerate(POINTS) if rank.passed[task] <= points]
        if index > 0 or not left:
            yield state
        else:
            has_arrived = rank.finishing and rank.finishing[0] in rank.arrived
            arrivals = (*state.arrivals, rank.finishing[0] if has_arrived else NO_TASK)
            for task in left:
                yield replace(state, picks=(*state.picks, task), arrivals=arrivals)

    def finish_arrived(self, state: State, rank: Rank, agreed_arrival: int) -> Rank:
        """``rank`` after ``Tasks.take_arrived``; Blocked when it waits for a result."""

        def wait(copy_done: Any, interrupted: Any) -> None:
            if not copy_done.query():
                raise Blocked

        def task(number: int) -> Any:
            copy_done = SimpleNamespace(query=lambda: number in rank.arrived) if self.late else None
            return SimpleNamespace(id=number, result=SimpleNamespace(copy_done=copy_done))

        finished: list[int] = []
        tasks = Tasks()
        tasks.finishing.extend(map(task, rank.finishing))
        if self.each_by_itself:
            agreed_arrival = tasks.finishing[0].id if tasks.result_arrived() else NO_TASK
        for done in tasks.take_arrived(agreed_arrival, SimpleNamespace(wait=wait)):  # type: ignore[arg-type]
            finished.append(done.id)
        processed = rank.finished + tuple((number, rank.passed) for number in finished)
        for other in state.ranks:
            if any(ours != theirs for ours, theirs in zip(processed, other.finished, strict=False)):
                raise Wrong(f"ranks process results differently: {other.finished} and {processed}")
        return replace(rank, finishing=tuple(left.id for left in tasks.finishing), finished=processed)

    def side(self, state: State, index: int, rank: Rank, pending: bool, writes: list[int]) -> Leader | Follower:
        """The real thing, in the state that ``rank`` is in."""

        def wait() -> None:
            raise Blocked

        side: Leader | Follower
        if index == 0:
            side = self.leader(self.lead, lambda: pending, writes.append)
            side.stop = rank.stop
        else:
            side = self.follower(lambda: state.word, wait, wait_s=1e9)
        side.point = rank.point
        return side


def search(model: Model) -> int:
    """Visit every state that can be reached; their number. Raises Wrong for one that must not be."""
    seen = set(model.start())
    frontier = list(seen)
    while frontier:
        state = frontier.pop()
        following = list(model.successors(state))
        if not following and not all(len(rank.finished) == len(POINTS) for rank in state.ranks):
            raise Wrong(f"nobody can go on in {state}")
        new = set(following) - seen
        seen |= new
        frontier += new
    return len(seen)


COLLECTIVES = [(), (1, 2, 3, 4, 5, 6, 7), (2, 4), (7,)]


@pytest.mark.parametrize("collectives", COLLECTIVES, ids=str)
@pytest.mark.parametrize(("ranks", "lead"), [(2, 1), (2, 2), (2, 3), (3, 1)])
def test_all_ranks_stop_at_the_same_points_and_none_waits_for_ever(
    ranks: int, lead: int, collectives: tuple[int, ...]
) -> None:
    states = search(Model(ranks, lead, frozenset(collectives)))
    print(f"{ranks} ranks, lead {lead}, collectives {collectives}: {states} states")
    assert states > 2000


@pytest.mark.parametrize(("ranks", "lead"), [(2, 1), (2, 3), (3, 2)])
def test_results_that_come_late_are_processed_at_the_same_place_by_all_ranks(ranks: int, lead: int) -> None:
    states = search(Model(ranks, lead, frozenset(), late=True))
    print(f"{ranks} ranks, lead {lead}, results late: {states} states")
    assert states > 4000


class UncheckedFollower(Follower):
    """Looks at the stop, but not whether it may go on."""

    def interrupted(self) -> bool:
        self.point += 1
        return self._read() == 2 * self.point - 1


class ImmediateLeader(Leader):
    """Stops where it is."""

    def interrupted(self) -> bool:
        self.point += 1
        if self.pending():
            self.stop = self.point
            self._write(2 * self.stop - 1)
            return True
        self._write(2 * (self.point + self._lead))
        return False


@pytest.mark.parametrize("broken", [UncheckedFollower, ImmediateLeader, "rounds", "arrivals"])
def test_the_search_finds_what_is_wrong(
    broken: type[Leader] | type[Follower] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(2, 1, frozenset())
    if broken is UncheckedFollower:
        model = replace(model, follower=UncheckedFollower)
    elif broken == "arrivals":
        model = replace(model, late=True, each_by_itself=True)
    elif broken is ImmediateLeader:
        model = replace(model, leader=ImmediateLeader)
    else:  # rounds whose points overlap: a stop that was not reached counts again
        monkeypatch.setattr(agreement, "POINTS_PER_ROUND", 1)
    with pytest.raises(Wrong):
        search(model)
