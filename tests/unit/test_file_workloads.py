"""Trace files of which probes are made: where seeds begin, what comes behind the end, and whether a log is of the same
file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgl_flowprefill.bench.capacity.prober import Plan
from sgl_flowprefill.bench.capacity.probes import ProbeLog
from sgl_flowprefill.bench.capacity.results import GoodputResult
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.bench.workloads.synthetic import workload
from tests.simulated_servers import Model, campaign_of, verdict, write_toy_profile


def trace_file(path: Path, times_s: Iterable[float], first_tokens: int = 100) -> Path:
    """A trace with a request at each of ``times_s``, each longer than the one before; all begin with the same block."""
    path.parent.mkdir(exist_ok=True)
    rows = [
        {
            "timestamp": time_s * 1e3,
            "input_length": first_tokens + place,
            "output_length": 5,
            "hash_ids": [0, place + 1],
        }
        for place, time_s in enumerate(times_s)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_seed_has_a_place_of_its_own(tmp_path: Path) -> None:
    path = trace_file(tmp_path / "trace.jsonl", np.arange(100) / 2)
    traces = [workload(str(path)).draw(60, seed) for seed in range(3)]
    assert len({trace.requests[0].prompt_tokens for trace in traces}) == 3
    for trace in traces:
        arrivals_s = [request.arrival_s for request in trace.requests]
        assert len(trace.requests) == 60
        assert arrivals_s == sorted(arrivals_s)
        assert arrivals_s[0] == 0.0
    with pytest.raises(ValueError, match="no file and none of qwen-like, mixed"):
        workload("qwenlike")


def test_a_probe_is_as_long_and_has_the_rate_that_is_asked_for(tmp_path: Path) -> None:
    times_s = np.cumsum(np.where(np.arange(400) % 100 < 50, 2.0, 0.25))  # quiet and busy in turns
    plan = Plan(workload(str(trace_file(tmp_path / "trace.jsonl", times_s))), 3, 60.0)
    for seed in range(3):
        for rate_rps in (0.35, 2.0, 5.0, 20.0):
            trace = plan.trace(seed, rate_rps, scale=3.0)
            assert len(trace.requests) == round(60.0 * rate_rps)
            assert trace.rate_rps == pytest.approx(rate_rps)
            assert trace.requests[-1].arrival_s == pytest.approx(60.0)
            assert trace.requests[0].ttft_slo_s == 3 * 0.5
        few, many = plan.trace(seed, 2.0, 1.0).requests, plan.trace(seed, 4.0, 1.0).requests
        assert [one.prompt_tokens for one in few] == [one.prompt_tokens for one in many[:120]]


def test_behind_its_end_a_file_begins_again_with_other_prompts(tmp_path: Path) -> None:
    plan = Plan(workload(str(trace_file(tmp_path / "trace.jsonl", range(100), first_tokens=600))), 2, 60.0)
    for seed, first in ((0, 0), (1, 61)):
        trace = plan.trace(seed, rate_rps=5.0, scale=1.0)
        expected = [600 + (first + place) % 100 for place in range(300)]
        assert [request.prompt_tokens for request in trace.requests] == expected
        prompts = [PromptBuilder(seed).build(request, index) for index, request in enumerate(trace.requests)]
        rounds = [(first + place) // 100 for place in range(300)]
        for number, (prompt, request) in enumerate(zip(prompts, trace.requests, strict=True)):
            shared = [before[:512] == prompt[:512] for before in prompts[:number]]
            assert shared == [before == rounds[number] for before in rounds[:number]]
            assert request.shared_tokens == (512 if any(shared) else 0)
        arrivals_s = [request.arrival_s for request in trace.requests]
        assert np.diff(arrivals_s) == pytest.approx(arrivals_s[1], rel=0.05), "a round follows the one before"


def test_seeds_that_have_requests_in_common_are_a_problem(tmp_path: Path) -> None:
    profile = write_toy_profile(tmp_path)
    short = workload(str(trace_file(tmp_path / "short.jsonl", range(100))))
    assert [short.apart(seeds) for seeds in (1, 2, 3)] == [100, 39, 23], "they begin at 0, 61 and 23"
    assert workload("mixed").apart(3) is None
    for seeds, total, is_problem in ((1, 100, False), (1, 101, True), (3, 23, False), (3, 24, True)):
        folder = tmp_path / f"{seeds} {total}"
        campaign = campaign_of(Model(profile), folder, ("stock-fcfs",), seeds, attainments=(0.9,), replayed=short)
        campaign.run(budget_s=0.0)
        campaign.log.add(dataclasses.replace(verdict("stock-fcfs", 0, 1.0, True), total=total))
        problems = GoodputResult.of(campaign, "").problems
        expected = f"short.jsonl has 100 requests and probes have up to {total}: some are in several seeds"
        assert [problem.startswith(expected) for problem in problems] == [True] * is_problem


def test_probes_of_another_file_of_the_same_name_are_refused(tmp_path: Path) -> None:
    log, one, other = tmp_path / "probes.jsonl", tmp_path / "day1" / "trace.jsonl", tmp_path / "day2" / "trace.jsonl"

    def settings(file: Path, first_tokens: int) -> dict[str, Any]:
        return Plan(workload(str(trace_file(file, range(100), first_tokens))), 1, 60.0).settings()

    for file in (one, one, other):
        ProbeLog(log, settings(file, first_tokens=100))  # what counts is what is replayed
    for file in (one, other):
        with pytest.raises(ValueError, match=r"digest of the trace file \w+, not \w+\): give another --out"):
            ProbeLog(log, settings(file, first_tokens=200))


def test_probes_from_before_files_had_a_digest_go_on_if_they_are_of_a_built_in_workload(tmp_path: Path) -> None:
    file = trace_file(tmp_path / "trace.jsonl", range(100))
    for name, is_known in (("mixed", True), (str(file), False)):
        log, settings = tmp_path / f"{is_known}.jsonl", Plan(workload(name), 1, 60.0).settings()
        ProbeLog(log, {key: value for key, value in settings.items() if "digest" not in key})
        with nullcontext() if is_known else pytest.raises(ValueError, match="trace file not recorded, not"):
            ProbeLog(log, settings)
