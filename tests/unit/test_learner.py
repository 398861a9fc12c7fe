"""The process that refits while a server serves: what it finds is adopted; whatever becomes of it, serving goes on."""

from __future__ import annotations

import dataclasses
import io
import itertools
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_flowprefill.config import ENV_SCHEDULER_CPUS
from sgl_flowprefill.profiling import Profile, ProfileError, Row, Setting, make_design
from sgl_flowprefill.profiling.fitted import fit
from sgl_flowprefill.profiling.learned import Learned, begin, learned_path, read_learned, write_learned
from sgl_flowprefill.profiling.refit import Question, write_frame
from sgl_flowprefill.runtime.learner import (
    CPU_SHARE,
    MOST_SAVED_S,
    CpuAllowance,
    Learner,
    LearningTTFT,
    other_cpus,
)
from sgl_flowprefill.ttft import PrefillShape
from sgl_flowprefill.ttft.learning import REFIT_TASKS
from tests.unit.test_ttft_learning import Cost, cost_s, rows_for, slow_attention, tasks
from tests.waiting import until

SETTING = Setting(model="m-1", device="made up", dtype="float32", attention_backend="none", threads=1, sglang="0")
WAIT_S = 120.0


def known(cost: Cost = slow_attention) -> Learned:
    """What a server knows at its first start; by default its profile is another machine's."""
    rng = random.Random(0)
    rows = [Row(shape, cost(shape) * rng.lognormvariate(0, 0.02), 0.0, 1, 0.0) for shape in make_design(4096)]
    profile = Profile(SETTING, 4096, rows, complete=True)
    return begin(profile, fit(profile))


KNOWN = known()


class Server:
    """What serves: tasks complete one after another, and an offer is adopted at the next event."""

    def __init__(self, learner: Learner, learned: Learned = KNOWN) -> None:
        self.learner = learner
        hours_s = itertools.count(0.0, 3600.0)  # no refit waits for its share of the CPU
        self.ttft = LearningTTFT(learned, 0.75, learner, now_s=lambda: next(hours_s))
        self._rng = random.Random(1)
        self._tasks = iter(tasks(5000, 7))

    def serve(self, count: int) -> float:
        """The longest time that the scheduler spent on a task that completed."""
        longest_s = 0.0
        for _ in range(count):
            batch = next(self._tasks)
            measured_s = cost_s(batch) * self._rng.lognormvariate(0, 0.02)
            begin_s = time.thread_time()
            self.ttft.observe(batch, measured_s)
            longest_s = max(longest_s, time.thread_time() - begin_s)
        return longest_s

    def answered(self) -> None:
        """Wait until nothing is asked any more."""
        until(lambda: not self.learner.is_busy, WAIT_S)

    def look(self) -> None:
        """What a hub does at an event."""
        if self.ttft.look_for_offer():
            self.ttft.adopt()

    @property
    def error(self) -> float:
        apes = [abs(self.ttft.predict(batch).expected_s / cost_s(batch) - 1) for batch in tasks(200, 99)]
        return float(np.median(apes))


@pytest.fixture
def learner(tmp_path: Path) -> Iterator[Learner]:
    learner = Learner(tmp_path / "p.learned.npz", set(), nice=os.getpriority(os.PRIO_PROCESS, 0))
    yield learner
    if learner.process is not None:
        learner.process.kill()


def test_a_better_model_is_offered_adopted_kept_and_there_after_a_restart(
    learner: Learner, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(learner)
    server.serve(2 * REFIT_TASKS)
    before = server.error
    server.answered()
    assert server.ttft.look_for_offer()
    assert server.error == before, "not before it is adopted"
    with caplog.at_level(logging.INFO):
        server.ttft.adopt()
    assert not server.ttft.look_for_offer()
    assert "predicts with a model of its first" in caplog.text
    for _ in range(2):
        server.serve(REFIT_TASKS)
        server.answered()
        server.look()
    assert server.error < before / 2
    state = server.ttft.state()
    assert state["refits"] == 3
    assert state["adopted"] >= 1
    assert state["rows"] > len(make_design(4096)) + 4 * REFIT_TASKS - 50

    assert learner.path is not None
    again = Server(Learner(None, set()), read_learned(learner.path))
    shape = [PrefillShape(900, 900)]
    assert again.ttft.model.predict_s(shape) == server.ttft.model.predict_s(shape)
    assert again.error == pytest.approx(server.error, abs=0.02)
    assert again.ttft.state()["adopted"] == state["adopted"]
    assert 3 * REFIT_TASKS <= again.ttft.state()["tasks"] <= 4 * REFIT_TASKS


def test_the_process_ends_with_the_server(learner: Learner) -> None:
    server = Server(learner)
    server.serve(REFIT_TASKS)
    server.answered()
    assert 0 < learner.cpu_s < 30
    assert learner.process is not None
    assert learner.process.stdin is not None
    learner.process.stdin.close()
    assert learner.process.wait(60) == 0


def test_it_runs_after_everything_else_on_other_cpus_than_the_scheduler(tmp_path: Path) -> None:
    cpu = max(os.sched_getaffinity(0))
    learner = Learner(None, {cpu})
    learner.start()
    until(lambda: learner.process is not None, WAIT_S)
    process = learner.process
    assert process is not None
    until(lambda: os.getpriority(os.PRIO_PROCESS, process.pid) == 19, WAIT_S)
    assert os.sched_getaffinity(process.pid) == {cpu}
    process.kill()


def test_the_other_cpus_are_those_of_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_SCHEDULER_CPUS, raising=False)
    assert other_cpus() == set()
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setenv(ENV_SCHEDULER_CPUS, "0|2")
    assert other_cpus() == {1, 3}


def test_serving_goes_on_when_the_process_is_killed_and_another_one_learns(
    learner: Learner, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(learner)
    server.serve(REFIT_TASKS)
    server.answered()
    server.look()
    first = learner.process
    assert first is not None
    os.kill(first.pid, signal.SIGSTOP)  # in the middle of its work, as far as the server can tell
    server.serve(REFIT_TASKS)
    assert server.serve(REFIT_TASKS) < 0.2, "nobody waits for it"
    first.kill()
    server.answered()
    server.look()
    assert "has ended (-9); the next refit starts another" in caplog.text
    server.serve(REFIT_TASKS)
    server.answered()
    assert learner.process is not None
    assert learner.process is not first
    server.look()
    assert server.ttft.state()["refits"] >= 2
    assert server.error < 0.1


def test_serving_goes_on_with_a_full_disk_and_says_so_once(learner: Learner, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(learner)
    server.serve(REFIT_TASKS)
    server.answered()
    server.look()
    assert learner.process is not None
    assert learner.path is not None
    learner.path.unlink()
    part = learner.path.with_name(f".{learner.path.name}.{learner.process.pid}")
    for _ in range(3):
        part.symlink_to("/dev/full")
        server.serve(REFIT_TASKS)
        server.answered()
        server.look()
        part.unlink(missing_ok=True)
    assert caplog.text.count("cannot be written (No space left on device)") == 1
    assert not learner.path.exists()
    assert server.ttft.state()["refits"] >= 3
    assert server.error < 0.1


@pytest.mark.parametrize("idle_s", [0.0, 12 * 3600.0])
def test_refits_take_about_one_percent_of_a_core_in_any_hour(learner: Learner, idle_s: float) -> None:
    """Also in the hour after a night without tasks."""
    now_s = 0.0
    server = Server(learner)
    server.ttft = LearningTTFT(KNOWN, 0.75, learner, now_s=lambda: now_s)
    asked = 0

    def ask(question: object) -> None:
        nonlocal asked
        asked += 1
        learner.cpu_s += 1.0
        learner.last_cpu_s = 1.0

    learner.ask = ask  # type: ignore[method-assign]
    now_s = idle_s
    for _ in range(100):
        now_s += 36.0
        server.serve(REFIT_TASKS)
    assert 30 <= asked <= 36


def test_a_refit_that_took_more_than_was_saved_up_is_paid_off_before_the_next() -> None:
    allowance = CpuAllowance(0.0)
    assert allowance.covers(1.0, spent_s=0.0, now_s=0.0)
    paid_off_s = (30.0 - MOST_SAVED_S) / CPU_SHARE
    assert not allowance.covers(1.0, spent_s=30.0, now_s=0.99 * paid_off_s)
    assert allowance.covers(1.0, spent_s=30.0, now_s=paid_off_s + 1.01 / CPU_SHARE)


def test_what_a_process_took_that_ended_without_an_answer_counts(learner: Learner) -> None:
    server = Server(learner)
    learner.start()
    until(lambda: learner.process is not None, WAIT_S)
    assert learner.process is not None
    first = psutil.Process(learner.process.pid)
    until(lambda: cpu_s(first) > 0.2, WAIT_S)
    first_s = cpu_s(first)
    first.kill()
    # It counts as ended when the last of its threads has: its first one may be a zombie before.
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    server.serve(REFIT_TASKS)
    server.answered()
    assert learner.process.pid != first.pid
    assert learner.cpu_s >= first_s + cpu_s(psutil.Process(learner.process.pid)) - 0.1


def test_a_refit_that_takes_too_long_is_ended() -> None:
    asked = io.BytesIO()
    write_frame(asked, Question(KNOWN.model_copy(update={"rows": rows_for(cost_s, 100, 0.02, 0)}), None))
    command = [sys.executable, "-m", "sgl_flowprefill.profiling.refit_process", "--cpu-limit-s", "0.01"]
    ended = subprocess.run(command, input=asked.getvalue(), stdout=subprocess.DEVNULL, timeout=WAIT_S, check=False)
    assert ended.returncode == -signal.SIGPROF


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def test_what_another_profile_or_setting_began_is_told_apart() -> None:
    assert known().profile == KNOWN.profile
    assert known(cost_s).profile != KNOWN.profile


@given(st.data())
def test_a_damaged_file_is_found_out(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = learned_path(tmp_path_factory.mktemp("learned") / "p.parquet")
    write_learned(path, KNOWN)
    body = bytearray(path.read_bytes())
    damage = data.draw(st.sampled_from(["cut", "flip"]))
    place = data.draw(st.integers(0, len(body) - 1))
    if damage == "cut":
        del body[place:]
    else:
        body[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(body)
    with suppress(ProfileError):
        found = read_learned(path)  # what was damaged is not what is read: a time, say
        assert found.fitted.model.is_sound()
        np.testing.assert_array_equal(found.rows, KNOWN.rows)


@pytest.mark.parametrize(
    ("part", "offset", "bit"), [(b"), }", 0, 2), (b"PK\x01\x02", 8, 0)], ids=["shape", "encrypted"]
)
def test_damage_to_what_says_how_to_read_a_file_is_found_out(
    tmp_path: Path, part: bytes, offset: int, bit: int
) -> None:
    path = learned_path(tmp_path / "p.parquet")
    write_learned(path, KNOWN)
    body = bytearray(path.read_bytes())
    body[body.index(part, body.index(b"rows.npy")) + offset] ^= 1 << bit
    path.write_bytes(body)
    with pytest.raises(ProfileError, match="not what a server has learned"):
        read_learned(path)


def test_numbers_that_no_server_can_have_learned_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.learned.npz"
    model = KNOWN.fitted.model
    wrong_rows = KNOWN.rows.copy()
    wrong_rows[3, 4] = -1.0
    leaves = np.random.default_rng(0).normal(size=model.trees.leaf.shape)
    falling = dataclasses.replace(model, trees=dataclasses.replace(model.trees, leaf=leaves))
    negative = dataclasses.replace(model, physics=dataclasses.replace(model.physics, weights=-model.physics.weights))
    for learned in (
        KNOWN.model_copy(update={"rows": wrong_rows}),
        KNOWN.model_copy(update={"rows": KNOWN.rows[:, :3]}),
        KNOWN.model_copy(update={"fitted": dataclasses.replace(KNOWN.fitted, model=falling)}),
        KNOWN.model_copy(update={"fitted": dataclasses.replace(KNOWN.fitted, model=negative)}),
    ):
        write_learned(path, learned)
        with pytest.raises(ProfileError, match="not what a server has learned"):
            read_learned(path)
    write_learned(path, KNOWN)
    assert read_learned(path).fitted.model.predict_s([PrefillShape(500)]) == model.predict_s([PrefillShape(500)])
