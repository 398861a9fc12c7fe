"""Lists of jobs hold what sorting gives, also where keys are equal and blocks are small."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_flowprefill.policy import Job
from sgl_flowprefill.policy import joblist as module
from sgl_flowprefill.policy.joblist import JobList


def by_deadline() -> JobList[None]:
    return JobList(lambda job: job.deadline_s)


def place(job: Job[None]) -> tuple[float, int]:
    return job.deadline_s, job.number


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 99)), max_size=80))
def test_a_list_holds_what_sorting_gives(script: Sequence[tuple[bool, int, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_JOBS", 3)
        jobs, live, out = by_deadline(), list[Job[None]](), list[Job[None]]()
        for comes, deadline, drawn in script:
            if comes:  # a new one, or one that has been there
                job = out.pop(drawn % len(out)) if out and drawn % 2 else Job(None, 0.0, float(deadline), 1.0)
                live.append(job)
                jobs.add(job)
            elif live:
                out.append(live.pop(drawn % len(live)))
                jobs.remove(out[-1])
            live.sort(key=place)
            assert list(jobs) == live
            assert len(jobs) == len(live)
            assert jobs.first() is (live[0] if live else None)
            assert jobs.first_before(deadline) is (live[0] if live and live[0].deadline_s < deadline else None)
            assert list(jobs.from_key(deadline)) == [job for job in live if job.deadline_s >= deadline]
            for key, number in ((deadline, drawn), (deadline, float("inf")), *map(place, live[:1] + out[:1])):
                before = [job for job in live if place(job) < (key, number)]
                assert list(jobs.before(key, number)) == before[::-1]


def test_a_list_of_many_equal_keys_is_in_the_order_of_numbers() -> None:
    jobs, random = by_deadline(), Random(0)
    live = [Job(None, 0.0, float(number % 2), 1.0) for number in range(2000)]
    random.shuffle(live)
    for job in live:
        jobs.add(job)
    for job in live[:1000]:
        jobs.remove(job)
    assert list(jobs) == sorted(live[1000:], key=place)
    assert next(islice(jobs.before(1.0, -1), 1)).deadline_s == 0.0


def test_a_job_that_is_there_is_not_put_in_again_and_one_that_is_not_is_not_taken_out() -> None:
    jobs, job = by_deadline(), Job(None, 0.0, 1.0, 1.0)
    jobs.add(job)
    with pytest.raises(AssertionError, match="at most once"):
        jobs.add(job)
    for key in (0.0, 1.0, 2.0):
        with pytest.raises((AssertionError, IndexError)):
            jobs.remove(Job(None, 0.0, key, 1.0))
