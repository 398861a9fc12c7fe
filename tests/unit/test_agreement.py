"""The agreement between real processes, on one node and on what is meant to be two: shared memory and process group."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from sgl_flowprefill.processes import is_alive
from sgl_flowprefill.runtime.agreement import Agreement, AgreementError, Follower, Leader, SharedWord, new_shared_page
from sgl_flowprefill.runtime.wakeup import Wakeup
from tests import warm


class Processes:
    """``count`` processes that run ``body(rank, pipe, *arguments)`` in one gloo process group, as a context manager."""

    def __init__(self, count: int, directory: Path, body: Callable[..., Any], *arguments: Any) -> None:
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(count):
            ours, theirs = warm.CONTEXT.Pipe()
            work = (rank, count, str(directory / "rendezvous"), theirs, body, arguments)
            self.processes.append(warm.CONTEXT.Process(target=warm.warm(_in_group), args=work, daemon=True))
            self.processes[-1].start()
            self.pipes.append(ours)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def receive(self, rank: int, timeout_s: float = 60.0) -> Any:
        assert self.pipes[rank].poll(timeout_s), f"nothing from rank {rank} within {timeout_s:g} s"
        return self.pipes[rank].recv()


def _in_group(
    rank: int, count: int, rendezvous: str, pipe: Connection, body: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count)
    body(rank, pipe, *arguments)
    time.sleep(60)  # until it is killed: a rank that ends closes the others' connections


def run_rounds(rank: int, pipe: Connection, rounds: int, nodes: int, collectives: bool) -> None:
    """Rounds of tasks of random length, with an event now and then; where each round ended, and if at a stop."""
    events, pace = random.Random(0), random.Random(rank)
    pending = None if rank else lambda: events.random() < 0.1
    agreement = Agreement(dist.group.WORLD, Wakeup(), pending, nodes=nodes, wait_s=30.0)
    ends = []
    for _ in range(rounds):
        (length,) = agreement.agree([events.randrange(1, 40)] if rank == 0 else [])
        point, stopped = 0, False
        while point < length and not stopped:
            if collectives and point % 3 == 0:
                dist.all_reduce(torch.zeros(1))
            if pace.random() < 0.05:
                time.sleep(pace.random() * 1e-3)
            point, stopped = point + 1, agreement.interrupted()
        ends.append((length, point, stopped))
    pipe.send(ends)


@pytest.mark.parametrize("collectives", [False, True], ids=["apart", "collectives"])
@pytest.mark.parametrize(("ranks", "nodes"), [(2, 1), (4, 2)])
@pytest.mark.parametrize("rounds", [100, pytest.param(1000, marks=pytest.mark.stress)])
def test_all_ranks_leave_every_round_at_the_same_point(
    rounds: int, ranks: int, nodes: int, collectives: bool, tmp_path: Path
) -> None:
    with Processes(ranks, tmp_path, run_rounds, rounds, nodes, collectives) as processes:
        ends = [processes.receive(rank) for rank in range(ranks)]
    assert all(other == ends[0] for other in ends)
    stops = sum(stopped for _, _, stopped in ends[0])
    assert rounds / 2 < stops < rounds
    assert all(point == length or stopped for length, point, stopped in ends[0])


def agree_on_many(rank: int, pipe: Connection) -> None:
    agreement = Agreement(dist.group.WORLD, Wakeup(), (lambda: False) if rank == 0 else None, wait_s=30.0)
    for count in MANY:
        pipe.send(agreement.agree(range(count)))


MANY = (0, 127, 128, 129, 254, 255, 1000)
"""Requests that an overloaded server refuses at once may be more than an all-reduce carries."""


def test_a_decision_may_have_any_number_of_values(tmp_path: Path) -> None:
    with Processes(2, tmp_path, agree_on_many) as processes:
        for count in MANY:
            assert processes.receive(0) == processes.receive(1) == list(range(count))


def wake_rank_0(rank: int, pipe: Connection) -> None:
    wakeup = Wakeup()
    Agreement(dist.group.WORLD, wakeup, (lambda: False) if rank == 0 else None)
    if rank == 1:
        for _ in range(100):
            pipe.recv()
            wakeup.clear()
            wakeup.notify()
    else:
        for _ in range(100):
            pipe.send("ready")
            while not wakeup.pending:
                time.sleep(1e-4)
            wakeup.clear()
        pipe.send("done")


def test_what_is_notified_at_another_rank_wakes_rank_0(tmp_path: Path) -> None:
    with Processes(2, tmp_path, wake_rank_0) as processes:
        while processes.receive(0) == "ready":
            processes.pipes[1].send("notify")


def run_for_ever(rank: int, pipe: Connection, wait_s: float) -> None:
    agreement = Agreement(dist.group.WORLD, Wakeup(), (lambda: False) if rank == 0 else None, wait_s=wait_s)
    try:
        with agreement.naming_the_lost():
            for round_number in itertools.count():
                agreement.agree()
                if round_number == 10:
                    pipe.send("running")
                for _ in range(20):
                    agreement.interrupted()
    except AgreementError as error:
        pipe.send(str(error))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_ends_is_named_by_the_others(lost: int, tmp_path: Path) -> None:
    with Processes(2, tmp_path, run_for_ever, 60.0) as processes:
        assert [processes.receive(rank) for rank in range(2)] == ["running"] * 2
        processes.processes[lost].kill()
        process_id = processes.processes[lost].pid
        expected = f"tensor-parallel rank {lost} (process {process_id}) has ended"
        assert expected in processes.receive(1 - lost, timeout_s=20.0)


def test_a_rank_that_is_reaped_while_it_is_looked_at_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen(["true"])
    process = psutil.Process(child.pid)

    def before_it_is_reaped() -> bool:
        child.wait()
        return True

    monkeypatch.setattr(process, "is_running", before_it_is_reaped)
    assert not is_alive(process)


def run_ahead(rank: int, pipe: Connection) -> None:
    """Rank 0 never comes to the interruption point for whose permission the other rank waits."""
    agreement = Agreement(dist.group.WORLD, Wakeup(), (lambda: False) if rank == 0 else None)
    try:
        with agreement.naming_the_lost():
            agreement.agree()
            pipe.send("running")
            if rank == 0:
                time.sleep(60.0)
            while True:
                agreement.interrupted()
    except AgreementError as error:
        pipe.send(str(error))


def test_the_end_of_rank_0_is_seen_by_a_rank_that_waits_for_it_within_a_prefill(tmp_path: Path) -> None:
    with Processes(2, tmp_path, run_ahead) as processes:
        assert [processes.receive(rank) for rank in range(2)] == ["running"] * 2
        time.sleep(0.5)
        processes.processes[0].kill()
        assert "tensor-parallel rank 0" in processes.receive(1, timeout_s=10.0)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_hangs_is_not_waited_for_for_ever(lost: int, tmp_path: Path) -> None:
    with Processes(2, tmp_path, run_for_ever, 1.0) as processes:
        assert [processes.receive(rank) for rank in range(2)] == ["running"] * 2
        process_id = processes.processes[lost].pid
        assert process_id is not None
        os.kill(process_id, signal.SIGSTOP)
        assert "1 s" in processes.receive(1 - lost, timeout_s=20.0)


def test_time_for_which_all_ranks_are_stopped_does_not_count(tmp_path: Path) -> None:
    """As while another system has its turn in a comparison: the clock goes on, and nobody has kept anybody waiting."""
    with Processes(2, tmp_path, run_for_ever, 3.0) as processes:
        assert [processes.receive(rank) for rank in range(2)] == ["running"] * 2
        ids = [process.pid for process in processes.processes]
        for process_id in ids:  # the first stops a moment before the other, which waits for it by then
            assert process_id is not None
            os.kill(process_id, signal.SIGSTOP)
            time.sleep(0.2)
        time.sleep(4.0)
        for process_id in reversed(ids):
            assert process_id is not None
            os.kill(process_id, signal.SIGCONT)
            time.sleep(0.2)
        assert not wait(processes.pipes, 3.0), "a rank has given the other up"
        assert all(process.is_alive() for process in processes.processes)


def run_until_one_fails(rank: int, pipe: Connection, places: tuple[int, int]) -> None:
    agreement = Agreement(dist.group.WORLD, Wakeup(), (lambda: False) if rank == 0 else None, wait_s=30.0)
    try:
        for values in ([1], [2]):
            pipe.send(agreement.agree(values, failed_at=7))
        pipe.send(agreement.agree([3], failed_at=places[rank]))
    except AgreementError as error:
        pipe.send(str(error))


@pytest.mark.parametrize(("places", "named"), [((9, 9), ""), ((9, 0), "0"), ((0, 9), "1"), ((8, 9), "0, 1")])
def test_ranks_go_on_together_only_if_their_tasks_failed_at_the_same_place(
    places: tuple[int, int], named: str, tmp_path: Path
) -> None:
    with Processes(2, tmp_path, run_until_one_fails, places) as processes:
        for rank in range(2):
            assert processes.receive(rank) == [1]
            assert processes.receive(rank) == [2]
            answer = processes.receive(rank)
            if named:
                assert answer.startswith(f"a prefill has failed at tensor-parallel rank {named} and not")
            else:
                assert answer == [3]


POINTS = 100_000


def time_points(rank: int, pipe: Connection, path: str) -> None:
    """Both ranks pass interruption points at the same time; the best time of one in five tries."""
    word = SharedWord(path)
    leader = Leader(10 * POINTS, lambda: False, word.write)
    side = leader if rank == 0 else Follower(word.read, word.wait, 10.0)
    leader.begin(0)
    best_s = 1.0
    for _ in range(5):
        dist.barrier()
        points = range(POINTS)
        started_s = time.perf_counter()
        for _ in points:
            side.interrupted()
        best_s = min(best_s, (time.perf_counter() - started_s) / POINTS)
    pipe.send(best_s)


def test_a_checkpoint_without_an_event_costs_less_than_a_microsecond(tmp_path: Path) -> None:
    path = new_shared_page()
    with Processes(2, tmp_path, time_points, path) as processes:
        leader_s, follower_s = processes.receive(0), processes.receive(1)
    os.unlink(path)
    figures = f"{leader_s * 1e9:.0f} ns at rank 0, {follower_s * 1e9:.0f} ns at another"
    print(f"\na preemption checkpoint without an event: {figures}")
    assert max(leader_s, follower_s) < 1e-6


def exchange_rounds(rank: int, pipe: Connection) -> None:
    """What each rank hears of all, where it says something of another length each time, or nothing."""
    agreement = Agreement(dist.group.WORLD, Wakeup(), None if rank else lambda: False, wait_s=30.0)
    heard = []
    for turn in range(30):
        rng = random.Random(f"{turn} {rank}")
        says = rng.random() < 0.5 and turn % 3
        heard.append(agreement.exchange({"rank": rank, "turn": turn, "x": "x" * rng.randrange(1000)} if says else None))
    pipe.send(heard)


def test_all_ranks_hear_what_each_has_to_say(tmp_path: Path) -> None:
    with Processes(3, tmp_path, exchange_rounds) as processes:
        heard = [processes.receive(rank) for rank in range(3)]
    assert heard[0] == heard[1] == heard[2]
    said = [one for turn in heard[0] for one in turn if one is not None]
    assert all(
        one is None or (one["rank"], one["turn"]) == (rank, turn)
        for turn, all_ in enumerate(heard[0])
        for rank, one in enumerate(all_)
    )
    assert len(said) > 10
    assert any(not any(turn) for turn in heard[0])


def exchange_with_the_dead(rank: int, pipe: Connection) -> None:
    agreement = Agreement(dist.group.WORLD, Wakeup(), None if rank else lambda: False, wait_s=30.0)
    pipe.send("ready")
    pipe.recv()
    try:
        agreement.exchange("news")
    except AgreementError as error:
        pipe.send(str(error))


def test_a_rank_that_ends_ends_an_exchange(tmp_path: Path) -> None:
    with Processes(2, tmp_path, exchange_with_the_dead) as processes:
        assert [processes.receive(rank) for rank in range(2)] == ["ready"] * 2
        processes.processes[1].kill()
        processes.processes[1].join()
        processes.pipes[0].send("go")
        assert "has not answered rank 0" in processes.receive(0)
