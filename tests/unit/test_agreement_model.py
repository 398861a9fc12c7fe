"""The agreement of ranks, in every interleaving of small cases: a search of the states of the real code.

Ranks run the transitions of ``runtime.agreement`` one at a time, in any order. The word is one number; a rank reads or
writes it once in a transition, so nothing finer can happen on a machine. The hub's all-reduce lets a rank go once all
have come, one by one. Two tasks are there to run, and rank 0 picks either at will and sees an event whenever it wants.
Where ``collectives`` are, a rank that comes to the place waits until all others have come there, as on a CPU; without
them nothing keeps the ranks together, as on a device that runs ahead.

On such a device the result of a finished task arrives later, at each rank whenever it likes once all have queued the
task. When it is processed is up to the hub (``finish_arrived``), and has to be the same for all ranks: it changes what
the next tasks find. So it is with the result of a decode step, which rank 0 picks like a task, one at a time, or one
more behind it (``ahead``).

Before a step, each rank finds out by itself whether KV cache is lacking (``lacks_kv``), by what it has started and
processed. While it is, the ranks meet again, and rank 0 says which tasks that have started give theirs back; these
begin anew. Then the step is queued, by each rank when it comes to it. All ranks have to process, to give back and to
step in the same order and at the same points of all tasks: their ``history`` is the same, as far as it goes.

Where nothing runs, the ranks may meet for batches that nobody asked for (``nobodys``): rank 0 says which, they meet
again behind each that ran to its end, and one that is interrupted is given up by each rank, at the same point.

States that differ only in what nobody will read again are one state (``State.forgetting``), and so are those that
differ in the order of the ranks behind the first.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

pytest.importorskip("sglang")

from sgl_flowprefill.hub.task import NO_TASK, STEP, Tasks
from sgl_flowprefill.runtime import agreement
from sgl_flowprefill.runtime.agreement import Follower, Leader

POINTS = (6, 5)
"""Interruption points of the two tasks, the last of which comes before the end of the task."""
SHORT = (3, 2)
"""The same where decode steps run beside them."""
PLENTY = 1000
"""More KV cache than is ever needed."""
EXPLORE = STEP - 1
"""In place of a task: nothing runs, and the ranks meet for a batch that nobody asked for."""


class Blocked(Exception):
    """The rank waits."""


class Wrong(Exception):
    """A state that must not be."""


class Deed(NamedTuple):
    """What a rank has done that the next tasks and steps find."""

    what: str
    number: int
    """A task, or STEP."""
    passed: tuple[int, ...]
    """What was passed by then."""


class Rank(NamedTuple):
    passed: tuple[int, ...]
    """Interruption points passed, by task; one more than there are when the task is done."""
    point: int = 0
    stop: int = 0
    round: int = 0
    in_hub: bool = True
    """Whether it waits for the others: at the beginning of a turn, before a step that lacks KV cache, or before a batch
    that nobody asked for.
    """
    runs: int = NO_TASK
    """What was picked in this turn: a task, STEP or EXPLORE."""
    at_collective: bool = False
    finishing: tuple[int, ...] = ()
    """Tasks that are done, and STEP, whose results are not processed."""
    arrived: int = 0
    """The number of them whose results have arrived, the first ones."""
    steps: int = 0
    """Steps that have been queued."""
    history: tuple[Deed, ...] = ()

    def forgetting(self, done: int) -> Rank:
        """The same with the first ``done`` deeds of its history as if nothing had been passed."""
        if not done or not self.history[done - 1].passed:  # what is before a forgotten one is forgotten
            return self
        before = (deed._replace(passed=()) for deed in self.history[:done])
        return self._replace(history=(*before, *self.history[done:]))


class State(NamedTuple):
    word: int
    said: tuple[tuple[int, ...], ...]
    """What rank 0 has said in each round. At the beginning of a turn, what it has the result of, and a task, STEP or
    EXPLORE, each NO_TASK if there is none; before a step that lacks KV cache, the tasks that give theirs back; before a
    batch that nobody asked for, which one that is, or NO_TASK.
    """
    ranks: tuple[Rank, ...]

    def moved(self, index: int, rank: Rank, word: int | None = None) -> State:
        ranks = (*self.ranks[:index], rank, *self.ranks[index + 1 :])
        return State(self.word if word is None else word, self.said, ranks)

    def saying(self, *numbers: int) -> State:
        return self._replace(said=(*self.said, numbers))

    def sorted(self) -> State:
        """The same with the ranks behind the first, which are alike, in an order of their own."""
        if len(self.ranks) == 2:
            return self
        first, *others = self.ranks
        return State(self.word, self.said, (first, *sorted(others)))

    def forgetting(self) -> State:
        """The same without what nobody reads again: what was said in rounds that all ranks have begun, and where they
        were when they did what all have done. How much that was stays.
        """
        begun = min(rank.round for rank in self.ranks)
        done = min(len(rank.history) for rank in self.ranks)
        said = (*((),) * begun, *self.said[begun:])
        return State(self.word, said, tuple([rank.forgetting(done) for rank in self.ranks]))


@dataclass(frozen=True)
class Model:
    ranks: int
    lead: int
    collectives: frozenset[int]
    """Interruption points before which there is a collective. If there are any, each step has one, too."""
    points: tuple[int, ...] = POINTS
    late: bool = False
    """Whether results arrive later than their task is done."""
    steps: int = 0
    """Decode steps, which begin whenever rank 0 likes."""
    ahead: bool = False
    """Whether a step may be queued before the result of the one in flight has been processed."""
    kv: int = PLENTY
    """Size of the KV cache, in what a task has of it from its start on, and what a step needs for each task whose
    result has been processed.
    """
    nobodys: frozenset[int] = frozenset()
    """Those of the tasks that nobody asked for: each may run once while nothing else can, and has no result."""
    each_by_itself: bool = False
    """A mistake: every rank processes what has arrived there."""
    gives_back_the_newest: bool = False
    """A mistake: ranks other than 0 have the task give back that has passed the fewest points."""
    counts_arrived: bool = False
    """A mistake: what has arrived counts before it is processed, when a rank finds out whether KV cache is lacking."""
    ends_alone: bool = False
    """A mistake: ranks other than 0 do not meet behind a batch that nobody asked for."""
    forgets: bool = True
    """Whether states are one that differ only in what nobody reads again."""
    leader: type[Leader] = Leader
    follower: type[Follower] = Follower

    def start(self) -> Iterator[State]:
        """All ranks are in the hub, and rank 0 has picked."""
        waiting = Rank(passed=(0,) * len(self.points))
        yield from self.picked(State(0, (), (waiting,) * self.ranks), 0, waiting)

    def successors(self, state: State) -> Iterator[State]:
        for index, rank in enumerate(state.ranks):
            yield from self.hub(state, index, rank) if rank.in_hub else self.run(state, index, rank)
            on_the_way = rank.finishing[rank.arrived :]
            steps = rank.steps - on_the_way[1:].count(STEP)
            if on_the_way and all(self.has_queued(other, on_the_way[0], steps) for other in state.ranks):
                yield state.moved(index, rank._replace(arrived=rank.arrived + 1))

    def has_queued(self, rank: Rank, item: int, steps: int) -> bool:
        """Whether ``rank`` has queued all of ``item``, a task or the last of so many ``steps``."""
        return rank.steps >= steps if item == STEP else rank.passed[item] > self.points[item]

    # ---- in the hub -----------------------------------------------------------------------------------------------

    def hub(self, state: State, index: int, rank: Rank) -> Iterator[State]:
        """The all-reduce ends: a round begins for this rank."""
        if not all((other.round, other.in_hub) >= (rank.round, True) for other in state.ranks):
            return
        if any(other.round == rank.round and other.runs != rank.runs for other in state.ranks):
            raise Wrong("some ranks begin a turn, and others meet before a step or what nobody asked for")
        if rank.round == len(state.said):  # nothing can run before a result has arrived
            if index == 0 and rank.arrived:
                yield state.saying(rank.finishing[0], NO_TASK)
            return
        said = state.said[rank.round]
        try:
            if rank.runs == EXPLORE:
                rank = rank._replace(runs=said[0])
            else:
                rank = self.given_back(state, index, rank, said) if rank.runs == STEP else self.turn(state, rank, *said)
        except Blocked:
            return
        writes: list[int] = []
        side = self.side(state, index, rank, False, writes)
        side.begin((rank.round + 1) * agreement.POINTS_PER_ROUND)
        in_hub = rank.runs in (NO_TASK, EXPLORE)
        rank = rank._replace(point=side.point, stop=0, round=rank.round + 1, in_hub=in_hub)
        moved = state.moved(index, rank, *writes)
        if rank.runs == EXPLORE:
            yield from self.explored(moved, index, rank, may_end=False)
        elif in_hub:
            yield from self.picked(moved, index, rank)
        else:
            yield moved

    def turn(self, state: State, rank: Rank, arrival: int, choice: int) -> Rank:
        """``rank`` at the beginning of a turn."""
        return self.finish_arrived(state, rank, arrival)._replace(runs=choice)

    def given_back(self, state: State, index: int, rank: Rank, tasks: tuple[int, ...]) -> Rank:
        """``rank`` after ``Hub.give_back`` of each of ``tasks``."""
        for task in tasks:
            if self.gives_back_the_newest and index > 0:
                task = min(self.live(rank), key=rank.passed.__getitem__)
            rank = self.did(state, rank, "gave back", task)
            rank = rank._replace(passed=tuple(0 if t == task else count for t, count in enumerate(rank.passed)))
        return rank

    def picked(self, state: State, index: int, rank: Rank) -> Iterator[State]:
        """``rank`` is back in the hub; rank 0 picks."""
        choices = [task for task in self.unfinished(rank) if task not in self.nobodys]
        arrival = rank.finishing[0] if rank.arrived else NO_TASK
        waits = STEP in rank.finishing and arrival != STEP
        may_wait = waits and not choices
        if rank.steps < self.steps and (self.ahead or not waits):
            choices.append(STEP)
        if index > 0 or not choices or may_wait:
            yield state
        if not rank.finishing and not self.live(rank) and self.nobodys.intersection(self.unfinished(rank)):
            choices.append(EXPLORE)  # what is there to run has not arrived yet
        for choice in choices if index == 0 else ():
            yield state.saying(arrival, choice)

    def explored(self, state: State, index: int, rank: Rank, may_end: bool) -> Iterator[State]:
        """``rank`` waits for the others before a batch that nobody asked for. Rank 0 says which, or that all end."""
        if index > 0:
            yield state
            return
        for task in self.nobodys.intersection(self.unfinished(rank)):
            yield state.saying(task)
        if may_end:
            yield state.saying(NO_TASK)

    def unfinished(self, rank: Rank) -> list[int]:
        """Tasks that are not done."""
        return [task for task, points in enumerate(self.points) if rank.passed[task] <= points]

    # ---- running --------------------------------------------------------------------------------------------------

    def run(self, state: State, index: int, rank: Rank) -> Iterator[State]:
        """What this rank runs goes on."""
        if len(rank.finishing) > 1:
            yield from self.stopped(state, index, rank)
        elif rank.runs == STEP:
            yield from self.step(state, index, rank)
        else:
            yield from self.run_task(state, index, rank, rank.runs)

    def run_task(self, state: State, index: int, rank: Rank, task: int) -> Iterator[State]:
        """Up to and through the next interruption point of ``task``."""
        next_point = rank.passed[task] + 1
        if next_point in self.collectives and not rank.at_collective:
            yield state.moved(index, rank._replace(at_collective=True))
            return
        if rank.at_collective and not all(
            other.passed[task] >= next_point or (other.passed == rank.passed and other.at_collective)
            for other in state.ranks
        ):
            return
        passed = tuple(next_point if t == task else count for t, count in enumerate(rank.passed))
        rank = rank._replace(at_collective=False, passed=passed)
        if next_point > self.points[task]:
            if task in self.nobodys:
                yield from self.leave(state, index, rank, task)
            else:
                yield from self.queued(state, index, rank, task)
            return
        for pending in (False, True) if index == 0 else (False,):
            writes: list[int] = []
            side = self.side(state, index, rank, pending, writes)
            try:
                interrupted = side.interrupted()
            except Blocked:
                return
            ran = rank._replace(point=side.point, stop=side.stop if isinstance(side, Leader) else 0)
            moved = state.moved(index, ran, *writes)
            if interrupted:
                yield from self.leave(moved, index, ran)
            else:
                yield moved

    def step(self, state: State, index: int, rank: Rank) -> Iterator[State]:
        """``Hub.step``, up to the place where tasks give back, or to its collective, or through it."""
        if self.lacks_kv(rank):
            moved = state.moved(index, rank._replace(in_hub=True))
            if index > 0:
                yield moved
                return
            live = self.live(rank)
            for count in range(1, len(live) + 1):
                for tasks in combinations(live, count):
                    yield moved.saying(*tasks)
            return
        if self.collectives and not rank.at_collective:
            yield state.moved(index, rank._replace(at_collective=True))
            return
        if rank.at_collective and not all(other.steps > rank.steps or other.at_collective for other in state.ranks):
            return
        rank = self.did(state, rank, "queued", STEP)._replace(at_collective=False, steps=rank.steps + 1)
        yield from self.queued(state, index, rank, STEP)

    def live(self, rank: Rank) -> list[int]:
        """Tasks that have started and are not done."""
        return [task for task, points in enumerate(self.points) if 0 < rank.passed[task] <= points]

    def lacks_kv(self, rank: Rank) -> bool:
        """Whether the next step lacks KV cache, and there are tasks to give theirs back."""
        started = sum(count > 0 for count in rank.passed)
        streams = sum(deed.what == "processed" and deed.number != STEP for deed in rank.history)
        if self.counts_arrived:
            streams += sum(item != STEP for item in rank.finishing[: rank.arrived])
        return bool(self.live(rank)) and started + streams > self.kv

    def queued(self, state: State, index: int, rank: Rank, item: int) -> Iterator[State]:
        """``rank`` has queued all of ``item``, and may have to wait for the result of what it had queued before."""
        rank = rank._replace(finishing=(*rank.finishing, item))
        if len(rank.finishing) > 1:
            yield state.moved(index, rank)
        else:
            yield from self.stopped(state, index, rank)

    def stopped(self, state: State, index: int, rank: Rank) -> Iterator[State]:
        """What ran is queued completely."""
        try:
            rank = self.finish_arrived(state, rank, NO_TASK)
        except Blocked:
            return
        yield from self.leave(state, index, rank, rank.runs)

    def leave(self, state: State, index: int, rank: Rank, done: int = NO_TASK) -> Iterator[State]:
        """Into the hub, where rank 0 picks what the next round runs. ``done``: what has run to its end."""
        if index == 0 and rank.stop and done == NO_TASK and rank.point != rank.stop:
            raise Wrong("rank 0 has not honoured its stop")
        is_nobodys = rank.runs in self.nobodys
        if is_nobodys:
            rank = self.did(state, rank, "gave up" if done == NO_TASK else "explored", rank.runs)
            passed = (self.points[t] + 1 if t == rank.runs else count for t, count in enumerate(rank.passed))
            rank = rank._replace(passed=tuple(passed))
        for other in state.ranks:
            if other.round == rank.round and other.in_hub and other.passed != rank.passed:
                raise Wrong(f"ranks stop at {other.passed} and {rank.passed} points")
        meets = is_nobodys and done != NO_TASK and not (self.ends_alone and index > 0)
        rank = rank._replace(in_hub=True, runs=EXPLORE if meets else NO_TASK)
        if meets:
            yield from self.explored(state.moved(index, rank), index, rank, may_end=True)
        else:
            yield from self.picked(state.moved(index, rank), index, rank)

    # ---- the real code, and what it did ---------------------------------------------------------------------------

    def finish_arrived(self, state: State, rank: Rank, agreed_arrival: int) -> Rank:
        """``rank`` after ``Tasks.take_arrived``; Blocked when it waits for a result."""

        def wait(copy_done: Any, interrupted: Any) -> None:
            if not copy_done.query():
                raise Blocked

        def task(place: int, number: int) -> Any:
            copy_done = SimpleNamespace(query=lambda: place < rank.arrived) if self.late else None
            return SimpleNamespace(id=number, result=SimpleNamespace(copy_done=copy_done))

        tasks = Tasks()
        tasks.finishing.extend(task(place, number) for place, number in enumerate(rank.finishing))
        if self.each_by_itself:
            agreed_arrival = tasks.finishing[0].id if tasks.result_arrived() else NO_TASK
        after = rank
        for done in tasks.take_arrived(agreed_arrival, SimpleNamespace(wait=wait)):
            after = self.did(state, after, "processed", done.id)
        left = tuple(item.id for item in tasks.finishing)
        return after._replace(finishing=left, arrived=max(0, rank.arrived - len(rank.finishing) + len(left)))

    def did(self, state: State, rank: Rank, what: str, number: int) -> Rank:
        """``rank`` after it did something, which all others do in the same place."""
        history = (*rank.history, Deed(what, number, rank.passed))
        for other in state.ranks:
            if any(ours != theirs for ours, theirs in zip(history, other.history, strict=False)):
                raise Wrong(f"ranks have done {history} and {other.history}")
        return rank._replace(history=history)

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

    def is_over(self, rank: Rank) -> bool:
        """Whether all tasks that were asked for and steps are processed."""
        asked = len(self.points) - len(self.nobodys) + self.steps
        return sum(deed.what == "processed" for deed in rank.history) == asked


def reached(model: Model) -> set[State]:
    """Visit every state that can be reached, one of those that are alike. Raises Wrong for one that must not be."""

    def alike(state: State) -> State:
        return (state.forgetting() if model.forgets else state).sorted()

    frontier = [alike(state) for state in model.start()]
    seen = set(frontier)
    while frontier:
        state = frontier.pop()
        following = [alike(after) for after in model.successors(state)]
        if not following and not all(map(model.is_over, state.ranks)):
            raise Wrong(f"nobody can go on in {state}")
        for after in following:
            if after not in seen:
                seen.add(after)
                frontier.append(after)
    return seen


def search(model: Model) -> int:
    """The number of states that can be reached. Raises Wrong for one that must not be."""
    return len(reached(model))


search_once = cache(search)
"""The same for models to compare with, which several tests have in common."""


@pytest.fixture(scope="module", autouse=True)
def no_garbage() -> Iterator[None]:
    """Searches keep what they make, so nobody need look through it again and again for what is left behind."""
    gc.disable()
    yield
    gc.enable()


COLLECTIVES = [(), (1, 2, 3, 4, 5, 6, 7), (2, 4), (7,)]


@pytest.mark.parametrize("collectives", COLLECTIVES, ids=str)
@pytest.mark.parametrize(("ranks", "lead"), [(2, 1), (2, 2), (2, 3), (3, 1)])
def test_all_ranks_stop_at_the_same_points_and_none_waits_for_ever(
    ranks: int, lead: int, collectives: tuple[int, ...]
) -> None:
    states = search(Model(ranks, lead, frozenset(collectives)))
    print(f"{ranks} ranks, lead {lead}, collectives {collectives}: {states} states")
    assert states > 2000


@pytest.mark.parametrize(
    ("ranks", "lead", "points"),
    [(2, 1, POINTS), (2, 3, POINTS), (3, 2, (4, 3)), pytest.param(3, 2, POINTS, marks=pytest.mark.stress)],
)
def test_results_that_come_late_are_processed_at_the_same_place_by_all_ranks(
    ranks: int, lead: int, points: tuple[int, ...]
) -> None:
    states = search(Model(ranks, lead, frozenset(), points, late=True))
    print(f"{ranks} ranks, lead {lead}, results late: {states} states")
    assert states > 4000


@pytest.mark.parametrize(("ranks", "lead"), [(2, 1), (2, 2)])
def test_results_of_steps_are_processed_at_the_same_place_by_all_ranks(ranks: int, lead: int) -> None:
    states = search(Model(ranks, lead, frozenset(), SHORT, late=True, steps=2))
    print(f"{ranks} ranks, lead {lead}, 2 steps: {states} states")
    assert states > 2000


@pytest.mark.parametrize(("ranks", "lead"), [(2, 1), (2, 2)])
def test_results_of_steps_that_are_queued_ahead_are_processed_at_the_same_place_by_all_ranks(
    ranks: int, lead: int
) -> None:
    model = Model(ranks, lead, frozenset(), SHORT, late=True, steps=2)
    states = search(replace(model, ahead=True))
    print(f"{ranks} ranks, lead {lead}, 2 steps, one ahead: {states} states")
    assert states > search_once(model)


@pytest.mark.parametrize(
    "model",
    [
        Model(2, 1, frozenset(), SHORT, steps=1, kv=1, forgets=False),
        Model(2, 1, frozenset((1, 3)), SHORT, steps=1, kv=1, forgets=False),
        Model(2, 2, frozenset((1, 2, 3, 4)), (4, 3), steps=2, kv=2),
        Model(3, 1, frozenset((2,)), SHORT, steps=1, kv=1),
        Model(2, 1, frozenset(), SHORT, late=True, steps=1, kv=1),
        Model(2, 1, frozenset(), SHORT, late=True, steps=1, kv=2),
        Model(3, 2, frozenset(), SHORT, late=True, steps=1, kv=2),
        pytest.param(Model(2, 2, frozenset(), (4, 3), late=True, steps=2, kv=2), marks=pytest.mark.stress),
        pytest.param(Model(2, 1, frozenset((2, 4)), (4, 3), steps=2, kv=1), marks=pytest.mark.stress),
        pytest.param(Model(3, 2, frozenset(), (4, 3), late=True, steps=1, kv=1), marks=pytest.mark.stress),
    ],
)
def test_ranks_run_decode_steps_and_give_tasks_back_in_the_same_state(model: Model) -> None:
    states = search(model)
    print(f"{model}: {states} states")
    assert states > 5000
    assert states > search_once(replace(model, kv=PLENTY)) > search_once(replace(model, steps=0, kv=PLENTY))


NOBODYS = Model(2, 1, frozenset(), (3, 2, 2), nobodys=frozenset((1, 2)))


@pytest.mark.parametrize(
    "model",
    [
        NOBODYS,
        replace(NOBODYS, lead=2, late=True),
        replace(NOBODYS, lead=2, collectives=frozenset((1, 2, 3))),
        replace(NOBODYS, ranks=3, collectives=frozenset((2,))),
    ],
)
def test_ranks_run_what_nobody_asked_for_and_give_it_up_in_the_same_state(model: Model) -> None:
    states = search(model)
    print(f"{model}: {states} states")
    assert states > 2 * search_once(replace(model, points=model.points[:1], nobodys=frozenset()))


@pytest.mark.parametrize(
    "model",
    [
        Model(2, 3, frozenset((2, 4))),
        Model(2, 3, frozenset(), late=True),
        Model(3, 1, frozenset(), SHORT),
        Model(2, 1, frozenset((1, 3)), SHORT, steps=1, kv=1),
    ],
)
def test_what_is_forgotten_loses_no_state(model: Model) -> None:
    """A search that forgets nothing comes to the same states."""
    every = reached(replace(model, forgets=False))
    once = reached(model)
    assert {state.forgetting().sorted() for state in every} == once
    print(f"{model}: {len(every)} states, {len(once)} without what nobody reads again")
    assert 1000 < len(once) < len(every)


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


STEPS = Model(2, 1, frozenset(), SHORT, late=True, steps=2)


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        (Model(2, 1, frozenset(), follower=UncheckedFollower), "ranks stop|nobody can go on"),
        (Model(2, 1, frozenset(), leader=ImmediateLeader), "ranks stop|nobody can go on"),
        (Model(2, 1, frozenset(), late=True, each_by_itself=True), "processed"),
        (replace(STEPS, each_by_itself=True), "processed"),
        (replace(STEPS, each_by_itself=True, ahead=True), "processed"),
        (replace(STEPS, kv=1, gives_back_the_newest=True), "gave back"),
        (replace(STEPS, late=False, kv=1, gives_back_the_newest=True), "gave back"),
        (replace(STEPS, kv=2, counts_arrived=True), "others meet before a step"),
        (replace(NOBODYS, ends_alone=True), "others meet before .* what nobody asked for"),
    ],
    ids=[
        "UncheckedFollower",
        "ImmediateLeader",
        "arrivals",
        "steps",
        "steps ahead",
        "give-backs",
        "give-backs at once",
        "lacks",
        "what nobody asked for",
    ],
)
def test_the_search_finds_what_is_wrong(broken: Model, what: str) -> None:
    with pytest.raises(Wrong, match=what):
        search(broken)


def test_the_search_finds_rounds_whose_points_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop that was not reached counts again."""
    monkeypatch.setattr(agreement, "POINTS_PER_ROUND", 1)
    with pytest.raises(Wrong):
        search(Model(2, 1, frozenset()))
