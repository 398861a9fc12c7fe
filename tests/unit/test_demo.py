"""The demo's turns: who is measured and replayed when, and what becomes of the parts of the trace."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from sgl_flowprefill.bench.cli import demo as demo_module
from sgl_flowprefill.bench.cli.options import Demo, parse
from sgl_flowprefill.bench.cli.requested import requested_trace
from sgl_flowprefill.bench.loadgen.calibrate import REFERENCE_TTFT_S
from sgl_flowprefill.bench.loadgen.replay import ClientReport, ReplayRun, RequestResult
from sgl_flowprefill.bench.metrics.comparison import Comparison
from sgl_flowprefill.bench.systems.catalog import RIVAL, SYSTEMS, System, select
from sgl_flowprefill.bench.systems.serving import Servers
from sgl_flowprefill.bench.workloads.answers import DECODE_SHARE, UNIFIED_DECODE_SHARE
from sgl_flowprefill.bench.workloads.trace import Trace
from sgl_flowprefill.events import Arrival, EventLog

OURS, STOCK = SYSTEMS["flowprefill"], SYSTEMS["sglang"]
SLOWDOWNS = {"flowprefill": [2.0, 4.0], "sglang": [3.0, 6.0], "unified": [2.0, 4.0], RIVAL: [3.0, 6.0]}
DECODE_TOKENS_PER_S = {"flowprefill": 320.0, "sglang": 180.0, "unified": 320.0, RIVAL: 180.0}


@dataclass
class Machine:
    """Stands in for clusters: what happened, in order, and the prompts that each system got."""

    happened: list[tuple[str, str]] = field(default_factory=list)
    prompts: dict[str, list[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(list))
    clock_s: float = 1000.0
    up: str | None = None
    event_logs: Mapping[str, Path] = field(default_factory=dict)

    @contextmanager
    def serve(self, system: System) -> Iterator[FakeServed]:
        assert self.up is None, "one at a time"
        self.up = system.name
        yield FakeServed(self, system, self.event_logs.get(system.name))
        self.up = None


@dataclass
class FakeServed:
    machine: Machine
    system: System
    event_log: Path | None = None

    def solo_ttft_s(self, prompts: Any, say: Any) -> dict[int, float]:
        self.machine.happened.append(("lone", self.system.name))
        turn = self.machine.happened.count(("lone", self.system.name)) - 1
        return {tokens: ttft_s * SLOWDOWNS[self.system.name][turn] for tokens, ttft_s in REFERENCE_TTFT_S.items()}

    def decode_tokens_per_s(self, prompts: Any) -> float:
        self.machine.happened.append(("decode", self.system.name))
        return DECODE_TOKENS_PER_S[self.system.name]

    def settings(self) -> Mapping[str, Any]:
        return {"chunked_prefill_size": 4096}

    def replay(self, trace: Trace, prompts: Any, on_progress: Any) -> ReplayRun:
        self.machine.happened.append(("replay", self.system.name))
        built = [tuple(prompts.build(request, index)) for index, request in enumerate(trace.requests)]
        self.machine.prompts[self.system.name] += built
        results = [
            RequestResult(
                index, one.request_class, one.prompt_tokens, one.output_tokens, 0, one.ttft_slo_s, one.tbt_slo_s,
                one.arrival_s, 0.001, 0.01, 0.02, (), 0, None,
            )
            for index, one in enumerate(trace.requests)
        ]  # fmt: skip
        start_s = self.machine.clock_s
        duration_s = trace.requests[-1].arrival_s + 1
        self.machine.clock_s += duration_s + 100
        return ReplayRun(results, start_s, duration_s, ClientReport(0.001, 0.001, 0.001, 0.1, None))


def arguments(tmp_path: Path, *options: str) -> Demo:
    parsed = parse(["demo", "--out", str(tmp_path), "--duration", "60", *options])
    assert isinstance(parsed, Demo)
    return parsed


def compared(machine: Machine, options: Demo, systems: Sequence[System] = (OURS, STOCK)) -> Comparison:
    console = Console(file=StringIO(), width=200)
    return demo_module.ComparedInTurns(options, systems, cast(Any, machine.serve), console).run(Servers())


def test_no_system_always_meets_the_machine_first(tmp_path: Path) -> None:
    machine = Machine()
    comparison = compared(machine, arguments(tmp_path))
    for what in ("lone", "replay"):
        order = [name for kind, name in machine.happened if kind == what]
        assert order == ["flowprefill", "sglang", "sglang", "flowprefill"]
    turns = comparison.to_dict()["turns"]
    assert [turn["system"] for turn in turns] == ["flowprefill", "sglang", "sglang", "flowprefill"]
    assert turns[0]["start_s"] == 0 < turns[1]["start_s"]
    assert sum(turn["requests"] for turn in turns) == 2 * len(comparison.trace.requests)


def test_the_time_scale_comes_from_the_lone_requests_of_all_systems(tmp_path: Path) -> None:
    comparison = compared(Machine(), arguments(tmp_path))
    assert comparison.time_scale == pytest.approx(3.5), "the median of 2, 3, 4 and 6"
    ours, stock = comparison.systems
    assert ours.solo_ttft_s[512] == pytest.approx(3 * REFERENCE_TTFT_S[512])
    assert stock.solo_ttft_s[512] == pytest.approx(4.5 * REFERENCE_TTFT_S[512])


@pytest.mark.parametrize("name", ["qwen-like", "mixed"], ids=["shared prefixes", "unique prompts"])
def test_the_parts_make_the_whole_trace_with_the_same_prompts_for_all(tmp_path: Path, name: str) -> None:
    machine = Machine()
    comparison = compared(machine, arguments(tmp_path, "--trace", name))
    trace = comparison.trace
    prompts = demo_module.PromptBuilder(arguments(tmp_path).trace.seed)
    whole = [tuple(prompts.build(request, index)) for index, request in enumerate(trace.requests)]
    assert dict(machine.prompts) == {"flowprefill": whole, "sglang": whole}
    for system in comparison.systems:
        run = system.run
        assert [result.index for result in run.results] == list(range(len(trace.requests)))
        arrivals_s = [request.arrival_s for request in trace.requests]
        assert [result.scheduled_s for result in run.results] == pytest.approx(arrivals_s)
        assert run.duration_s == pytest.approx(trace.requests[-1].arrival_s + 1), "as if without pauses"
        assert (tmp_path / f"{system.name}.jsonl").exists()


def test_answers_take_a_share_of_what_the_decode_servers_carry_in_the_median_of_all_turns(tmp_path: Path) -> None:
    comparison = compared(Machine(), arguments(tmp_path))
    lengths = [request.output_tokens for request in comparison.trace.requests]
    per_s = comparison.trace.rate_rps * sum(lengths) / len(lengths)
    assert per_s == pytest.approx(DECODE_SHARE * 250.0, rel=0.02)
    assert comparison.to_dict()["answers"]["scale"] == pytest.approx(comparison.answers.scale)


def test_a_unified_server_gets_shorter_answers_and_is_judged_by_time_between_tokens_too(tmp_path: Path) -> None:
    options = arguments(tmp_path, "--unified")
    assert options.systems == ("unified", RIVAL, "unified-sglang")
    comparison = compared(Machine(), options, select(options.systems[:2]))
    lengths = [request.output_tokens for request in comparison.trace.requests]
    per_s = comparison.trace.rate_rps * sum(lengths) / len(lengths)
    assert per_s == pytest.approx(UNIFIED_DECODE_SHARE * 250.0, rel=0.03)
    assert comparison.judge == "gaps"
    assert set(comparison.to_dict()["systems"]) == {"unified", RIVAL}


def test_answers_that_are_cut_need_no_measurement(tmp_path: Path) -> None:
    machine = Machine()
    comparison = compared(machine, arguments(tmp_path, "--max-output-tokens", "8"))
    assert ("decode", "flowprefill") not in machine.happened
    assert max(request.output_tokens for request in comparison.trace.requests) == 8
    assert "cut at 8 tokens" in comparison.answers.text(comparison.trace)


def test_a_system_with_an_event_log_gets_a_timeline_beside_the_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EventLog(tmp_path / "flowprefill-events.jsonl")
    log.write(Arrival, 1001.0, rid="a", prompt_tokens=9, ttft_slo_s=1.0, deadline_s=1002.0, received_s=1001.0)
    log.flush()
    machine = Machine(event_logs={"flowprefill": tmp_path / "flowprefill-events.jsonl", "sglang": tmp_path / "none"})
    monkeypatch.setattr(demo_module, "serving", lambda *_, **__: nullcontext(machine.serve))
    said = StringIO()
    assert demo_module.run(arguments(tmp_path), Console(file=said, width=200)) == 0
    assert {path.name for path in tmp_path.glob("*.pftrace")} == {"flowprefill.pftrace"}
    assert f"Timeline, for https://ui.perfetto.dev: {tmp_path / 'flowprefill.pftrace'}" in said.getvalue()
    assert (tmp_path / "report.html").exists()


def test_a_trace_that_is_too_short_for_its_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give a longer --duration"):
        compared(Machine(), arguments(tmp_path, "--requests", "1"))


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "serving", lambda *_, **__: pytest.fail("servers start"))


@pytest.mark.parametrize(
    "option", [("--slo", "text=0.5"), ("--new-tokens-only",), ("--format", "qwen")], ids=lambda option: option[0]
)
def test_an_option_of_trace_files_is_refused_for_a_built_in_workload_before_servers_start(
    option: tuple[str, ...], tmp_path: Path, nothing_starts: None
) -> None:
    options = arguments(tmp_path, *option)
    with pytest.raises(ValueError, match=f"^{option[0]} is for trace files, and qwen-like is a built-in workload"):
        demo_module.run(options, Console(file=StringIO()))
    with pytest.raises(ValueError, match=option[0]):
        requested_trace(options.trace, 1.0)


def test_a_trace_that_is_too_short_is_refused_before_servers_start_where_the_time_scale_is_known(
    tmp_path: Path, nothing_starts: None
) -> None:
    options = arguments(tmp_path, "--requests", "1", "--time-scale", "2")
    with pytest.raises(ValueError, match="no request arrives in part 1 of the trace; give a longer --duration"):
        demo_module.run(options, Console(file=StringIO()))


def test_a_trace_of_which_the_time_scale_leaves_one_request_is_refused(tmp_path: Path) -> None:
    rows = [{"timestamp": ms, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]} for ms in (0, 50_000)]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="has no rate"):
        compared(Machine(), arguments(tmp_path, "--trace", str(tmp_path / "trace.jsonl")))
