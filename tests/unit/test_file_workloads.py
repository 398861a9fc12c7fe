"""Trace files of which probes are made: where seeds begin, and whether a log is of the same file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgl_flowprefill.bench.capacity.prober import Plan
from sgl_flowprefill.bench.capacity.probes import ProbeLog
from sgl_flowprefill.bench.workloads.synthetic import workload


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
        with nullcontext() if is_known else pytest.raises(ValueError, match="digest of the trace file None, not"):
            ProbeLog(log, settings)
