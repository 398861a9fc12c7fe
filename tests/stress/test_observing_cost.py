"""What it costs a scheduling event that somebody looks: metrics, logs, reports, spans."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.otlp import collecting

MOST_US = 20.0


@pytest.mark.stress
@pytest.mark.alone
def test_no_way_of_looking_adds_more_than_20_us_of_cpu_time_to_the_most_expensive_events() -> None:
    """In a process of its own: the client library keeps metrics in files if it is told so before it is imported."""
    with collecting() as collector:
        command = [sys.executable, "-W", "ignore", "-m", "tests.observing_cost", collector.endpoint]
        run = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = json.loads(run.stdout)
    print("added CPU time of an event, us: median, p99")
    for row in rows:
        print(f"{row['way']}, {row['event']}: {row['median_us']:.1f}, {row['p99_us']:.1f}")
    bounded = [row for row in rows if row["is_bounded"]]
    assert len({row["way"] for row in bounded}) == 6
    assert [row for row in bounded if row["median_us"] > MOST_US] == []
    assert any(span.name == "flowprefill_run" for span in collector.spans), "spans were made"
