"""What ``bench uncontended`` makes of the turns of two systems, of which one is known to be so much faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from sgl_flowprefill.bench.cli import uncontended
from sgl_flowprefill.bench.cli.options import Uncontended
from sgl_flowprefill.bench.cli.uncontended import BURST_REQUESTS, UNIFIED_PAIR, Isolated
from sgl_flowprefill.bench.systems.system import System
from sgl_flowprefill.bench.workloads.trace import Trace
from sgl_flowprefill.cluster import ClusterError
from sgl_flowprefill.provenance import read_result


@dataclass
class Known:
    """Servers for which everything takes ``slowness`` times as long."""

    slowness: float
    error: str | None = None
    rested: bool = False
    bursts: list[Trace] = field(default_factory=list)
    client: Any = field(default_factory=lambda: SimpleNamespace(url="http://here"))

    def decode_tokens_per_s(self, prompts: Any) -> float:
        return 100 / self.slowness

    def come_to_rest(self) -> None:
        self.rested = True

    def replay(self, trace: Trace, prompts: Any) -> Any:
        assert self.rested, "cached prompts are no work"
        self.rested = False
        self.bursts.append(trace)
        ends_s = [self.slowness * index for index in range(len(trace.requests))]
        return SimpleNamespace(results=[SimpleNamespace(error=self.error, e2e_s=one) for one in ends_s])


@dataclass
class Turns:
    """Who was served, in order."""

    known: dict[str, Known]
    served: list[str] = field(default_factory=list)

    @contextmanager
    def serve(self, system: System) -> Iterator[Any]:
        self.served.append(system.name)
        yield self.known[system.name]


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    ours, stock = UNIFIED_PAIR
    found = Turns({ours: Known(2.0), stock: Known(1.0)})

    @contextmanager
    def serving(*_: Any, **__: Any) -> Iterator[Any]:
        yield found.serve

    async def ask(served: Known, prompts: Any, tokens: int, index: int) -> Isolated:
        return Isolated(tokens * served.slowness, tokens * served.slowness)

    monkeypatch.setattr(uncontended, "serving", serving)
    monkeypatch.setattr(uncontended, "ask", ask)
    return found


def measured(out: Path, **options: Any) -> dict[str, Any]:
    text = StringIO()
    assert uncontended.run(Uncontended(tokens=(64,), out=out, **options), Console(file=text, width=200)) == 0
    figures = read_result(out / "uncontended.json").figures
    assert ("requests at once" in text.getvalue()) == ("streams" in figures)
    return dict(figures)


def test_servers_that_decode_are_compared_by_their_streams_and_by_a_burst_too(turns: Turns, tmp_path: Path) -> None:
    figures = measured(tmp_path, unified=True, pairs=3)
    [row] = figures["rows"]
    assert row["ttft_s"]["ratio"] == {"p25": 2.0, "p50": 2.0, "p75": 2.0}
    assert row["tokens_per_s"]["ratio"]["p50"] == 0.5
    streams = figures["streams"]
    assert streams["decode_tokens_per_s"]["ratio"]["p50"] == 0.5
    assert streams["makespan_s"]["ratio"]["p50"] == 2.0
    assert streams["makespan_s"]["sglang"] == BURST_REQUESTS - 1, "until the last is answered"
    assert all(len(taken) == 3 for quantity in streams.values() for taken in quantity["turns"].values())


def test_who_begins_alternates_and_the_first_pair_counts_nothing(turns: Turns, tmp_path: Path) -> None:
    measured(tmp_path, unified=True, pairs=2)
    ours, stock = UNIFIED_PAIR
    assert turns.served == [stock, ours, ours, stock, stock, ours] * 3


def test_a_burst_is_the_same_for_both_and_arrives_at_once(turns: Turns, tmp_path: Path) -> None:
    measured(tmp_path, unified=True, pairs=1)
    bursts = [burst for known in turns.known.values() for burst in known.bursts]
    assert len(bursts) == 4
    assert all(burst == bursts[0] for burst in bursts)
    assert {request.arrival_s for request in bursts[0].requests} == {0.0}
    assert len({request.output_tokens for request in bursts[0].requests}) > 10, "answers of the workload's own lengths"


def test_a_request_of_a_burst_that_fails_ends_the_measurement(turns: Turns, tmp_path: Path) -> None:
    turns.known[UNIFIED_PAIR[0]].error = "http 503: no"
    with pytest.raises(ClusterError, match=f"{BURST_REQUESTS} of {BURST_REQUESTS} requests to http://here failed"):
        measured(tmp_path, unified=True, pairs=1)
