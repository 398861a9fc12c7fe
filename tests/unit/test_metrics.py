"""Figures of a run, against values worked out by hand."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from sgl_flowprefill.bench.loadgen.replay import RequestResult
from sgl_flowprefill.bench.metrics.joint import answered, meets, summarise_joint
from sgl_flowprefill.bench.metrics.requests import (
    SLO_SCALES,
    attainment,
    blocking_times_s,
    events_within,
    retractions,
    summarise,
    summarise_blocking,
    summarise_steps,
    suspensions,
)
from sgl_flowprefill.events import EventLog, GiveBack, Start, Step, Suspend


def result(ttft_s: float | None, name: str = "text", slo_s: float = 1.0, error: str | None = None) -> RequestResult:
    return RequestResult(
        index=0,
        request_class=name,
        prompt_tokens=10,
        output_tokens=3,
        shared_tokens=0,
        ttft_slo_s=slo_s,
        tbt_slo_s=0.1,
        scheduled_s=0.0,
        lateness_s=0.0,
        ttft_s=ttft_s,
        e2e_s=(ttft_s or 0.0) + 0.1,
        tbt_s=(0.05, 0.05),
        cached_tokens=None,
        error=error,
    )


def test_attainment_counts_failed_requests_as_misses() -> None:
    results = [result(0.5), result(1.0), result(1.5), result(0.5, error="http 503"), result(None, error="timeout")]
    summary = summarise(results, duration_s=10.0, classes=["text"])
    assert (summary.requests, summary.completed) == (5, 3)
    assert summary.ttft_attainment == pytest.approx(2 / 5)
    assert summary.goodput_rps == pytest.approx(0.2)
    assert summary.ttft_p50_s == pytest.approx(1.0)
    assert summary.ttft_p99_s == pytest.approx(np.percentile([0.5, 1.0, 1.5], 99))


def test_retractions_are_not_known_where_one_answer_does_not_say() -> None:
    told = [dataclasses.replace(result(0.5), retractions=count) for count in (0, 2, 1)]
    never_began = result(None, error="timeout")
    assert retractions([*told, never_began]) == 3
    assert retractions([*told, result(0.5)]) is None


def test_a_replayed_request_is_judged_by_its_first_token_its_gaps_or_their_mean() -> None:
    fine = result(0.5)
    one_late = dataclasses.replace(fine, tbt_s=(0.05,) * 98 + (0.3,))
    one_late_of_many = dataclasses.replace(fine, tbt_s=(0.05,) * 99 + (0.3,))
    slow = dataclasses.replace(fine, tbt_s=(0.2,) * 10)
    late, failed, one_token = result(1.5), result(0.5, error="http 503"), dataclasses.replace(fine, tbt_s=())
    judged = {
        judge: [meets(one, judge) for one in (fine, one_late, one_late_of_many, slow, late, failed, one_token)]
        for judge in ("ttft", "gaps", "mean")
    }
    assert judged == {
        "ttft": [True, True, True, True, False, False, True],
        "gaps": [True, False, True, False, False, False, True],
        "mean": [True, True, True, False, False, False, True],
    }
    figures = summarise_joint([answered(one) for one in (fine, one_late, slow, late)])
    assert (figures.joint_attainment, figures.joint_attainment_mean_tpot) == (0.25, 0.5)
    assert figures.tbt_attainment == pytest.approx(1 - 11 / 113)
    assert figures.tbt_max_s == 0.3


def test_decode_steps_of_a_run_are_counted_within_its_turns(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.write(Step, 5.0, 9, 4.9, None)  # before the run
    log.write(Step, 10.2, 4, 10.0, None)
    log.write(Step, 10.6, 4, 10.5, 10.4)
    log.write(GiveBack, 10.7, 1, ["a"], 3)
    log.write(Step, 30.1, 2, 30.0, 29.998)
    log.flush()
    steps = summarise_steps(events_within(path, [(10.0, 12.0), (30.0, 32.0)]), 4.0)
    assert steps is not None
    assert (steps.decode_steps, steps.give_backs, steps.streams_p50) == (3, 1, 4.0)
    assert steps.decode_share == pytest.approx((0.2 + 0.1 + 0.1) / 4.0)
    assert steps.step_lateness_p99_s == pytest.approx(np.percentile([0.1, 0.002], 99))
    assert summarise_steps(events_within(path, [(20.0, 21.0)]), 1.0) is None
    assert summarise_steps(events_within(tmp_path / "none", [(0.0, 1.0)]), 1.0) is None


def test_classes_are_judged_by_their_own_slo() -> None:
    results = [result(0.5), result(2.0), result(2.0, "file", slo_s=3.0)]
    summary = summarise(results, duration_s=2.0, classes=["text", "file"])
    assert list(summary.classes) == ["text", "file"]
    assert summary.classes["text"].ttft_attainment == pytest.approx(0.5)
    assert summary.classes["file"].ttft_attainment == pytest.approx(1.0)
    assert sum(part.goodput_rps for part in summary.classes.values()) == pytest.approx(summary.goodput_rps)


def test_attainment_over_slo_scale_runs_from_0_4_to_2_and_never_falls() -> None:
    assert SLO_SCALES == (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
    results = [result(ttft_s) for ttft_s in (0.3, 0.7, 1.1, 1.9, 3.0)]
    curve = summarise(results, 1.0, ["text"]).attainment_by_slo_scale
    assert list(curve) == [f"{scale:.1f}" for scale in SLO_SCALES]
    assert list(curve.values()) == sorted(curve.values())
    assert curve["0.4"] == pytest.approx(0.2)
    assert curve["2.0"] == pytest.approx(0.8)


def test_tbt_attainment_needs_every_token_in_time() -> None:
    slow = dataclasses.replace(result(0.5), tbt_s=(0.05, 0.2))
    assert summarise([result(0.5), slow], 1.0, ["text"]).tbt_attainment_of_requests == pytest.approx(0.5)


def test_no_requests_and_no_completed_request_have_no_percentiles() -> None:
    assert attainment([]) == 0
    summary = summarise([result(None, error="timeout")], 1.0, ["text"])
    assert summary.ttft_p50_s is None
    assert summary.ttft_attainment == 0


def test_blocking_comes_from_the_suspensions_of_the_run_only(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)

    def suspended(t_s: float, blocking_s: float | None, readable_s: float | None, stopped_s: float) -> None:
        log.write(Suspend, t_s, 1, ["a"], 5, ["b"], readable_s, stopped_s, blocking_s)

    suspended(5.0, 9.0, 4.0, 5.0)
    log.write(Start, 11.0, 1, ["b"], 100, 0, 0.1)
    suspended(12.0, 0.002, 11.998, 11.9995)
    suspended(13.0, 0.004, 12.996, 12.995)
    suspended(14.0, None, None, 13.9)
    suspended(99.0, 9.0, 90.0, 99.0)
    log.flush()
    with path.open("a") as file:
        file.write('{"event": "susp')
    switches = suspensions(events_within(path, [(10.0, 20.0)]))
    assert [one.blocking_s for one in switches] == [0.002, 0.004, None], "nobody waited for the last one"
    blocking_s = [one.blocking_s for one in switches if one.blocking_s is not None]
    assert blocking_times_s(events_within(path, [(10.0, 20.0)])) == blocking_s
    assert [one.stop_wait_s for one in switches[:2]] == pytest.approx([0.0015, 0.0])
    assert [one.stop_wait_s for one in switches[2:]] == [None]
    summary = summarise_blocking(blocking_s)
    assert summary.preemptions == 2
    assert summary.blocking_p50_s == pytest.approx(0.003)
    assert summary.blocking_max_s == 0.004
    assert summary.blocking_mean_s == pytest.approx(0.003)


def test_no_preemption_has_no_blocking_time(tmp_path: Path) -> None:
    assert events_within(tmp_path / "absent.jsonl", [(0, 1)]) == []
    assert summarise_blocking([]).preemptions == 0
    assert summarise_blocking([]).blocking_p99_s is None
