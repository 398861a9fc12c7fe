"""Simulated servers that prefill and decode: times worked out by hand, KV cache, the search for the best setting."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgl_flowprefill.bench.__main__ import main
from sgl_flowprefill.bench.cli.unified import figures
from sgl_flowprefill.bench.metrics.joint import Answered, summarise_joint
from sgl_flowprefill.bench.simulator.cost import LLAMA_8B, CostModel
from sgl_flowprefill.bench.simulator.engine import simulate
from sgl_flowprefill.bench.simulator.instance import Machine
from sgl_flowprefill.bench.simulator.joint import Search, TunedSearch
from sgl_flowprefill.bench.simulator.requests import SimRequest, prepare
from sgl_flowprefill.bench.simulator.router import RoundRobin
from sgl_flowprefill.bench.simulator.step_cost import CPU_ENGINE, STEP_COSTS, StepCost, step_cost
from sgl_flowprefill.bench.simulator.stock_unified import StockUnifiedInstance
from sgl_flowprefill.bench.simulator.streams import FIRST_RATIO, LEAST_RATIO, OutputKv
from sgl_flowprefill.bench.simulator.systems import (
    Setup,
    Simulated,
    SimulatedFlowPrefill,
    SimulatedStock,
    SimulatedUnified,
    run,
)
from sgl_flowprefill.bench.simulator.unified import SimStep, UnifiedInstance
from sgl_flowprefill.bench.systems.catalog import UNIFIED_HEADLINE, UNIFIED_STOCK, VARIANTS, find, simulated
from sgl_flowprefill.bench.workloads.synthetic import mixed, qwen_like
from sgl_flowprefill.bench.workloads.trace import Trace, TraceRequest
from sgl_flowprefill.hub.failure import Failure, StepOutOfMemory
from sgl_flowprefill.hub.parts import OneRank
from sgl_flowprefill.hub.task import DecodeStep, PrefillTask
from sgl_flowprefill.policy import Act, DecodeLimits, Limits, Stream

TOY = CostModel("toy", layers=10, fixed_s=0.0, per_token_s=0.001, per_pair_s=0.0, projection_share=0.5)
"""A token takes a millisecond; a prompt of 1,000 tokens has an operator every 50 ms."""
STEPS = StepCost(fixed_s=0.01, per_request_s=0.0)


def unified(name: str) -> Simulated:
    """The unified system called ``name``."""
    return simulated(name, "unified")


def trace_of(*requests: tuple[float, int, int, float, float]) -> Trace:
    """Requests as (arrival in s, prompt, answer, TTFT objective, TBT objective)."""
    return Trace("toy", [TraceRequest(at_s, prompt, answer, "all", *slo) for at_s, prompt, answer, *slo in requests])


def toy_setup(kv_tokens: int = 100_000) -> Setup:
    return Setup(
        Machine(TOY, kv_tokens),
        limits=Limits(max_suspended=4, max_batch_tokens=1),
        max_operator_s=0.01,
        step_cost=STEPS,
    )


def tokens(system: str, trace: Trace, setup: Setup | None = None) -> list[list[float]]:
    """When each token of each request came, in milliseconds."""
    requests = run(unified(system), trace, setup or toy_setup()).requests
    return [
        [round(1e3 * s, 3) for s in np.cumsum([r.first_token_s, *r.tbt_s])] if r.came_tokens else [] for r in requests
    ]


STREAM_AND_PROMPT = trace_of((0.0, 100, 4, 9.0, 0.1), (0.105, 300, 1, 9.0, 0.1))
"""A stream from 100 ms on, and a prompt of 300 ms that comes while its first step runs."""


def test_stock_runs_prompts_first_and_streams_wait() -> None:
    assert tokens("stock-fcfs", STREAM_AND_PROMPT) == [[100.0, 110.0, 420.0, 430.0], [410.0]]


def test_an_interval_lets_streams_step_behind_each_forward_of_prompts() -> None:
    assert tokens("stock-fcfs-256", STREAM_AND_PROMPT)[0] == [100.0, 110.0, 420.0, 430.0]
    [stream, prompt] = tokens("stock-fcfs-256-interval-1", STREAM_AND_PROMPT)
    # The stream's own prompt asks for the first step; then 256 tokens, a step, and the other 44.
    assert stream == [100.0, 110.0, 376.0, 430.0]
    assert prompt == [420.0]


def test_streams_take_part_in_mixed_chunks_which_have_as_many_tokens_less() -> None:
    [stream, prompt] = tokens("stock-fcfs-256-mixed", STREAM_AND_PROMPT)
    # 255 of the prompt and 1 of the stream; then the other 45 and 1; then a step by itself.
    assert stream == [100.0, 110.0, 366.0, 412.0]
    assert prompt == [412.0]


def test_a_stream_takes_as_long_in_a_mixed_chunk_as_in_a_step_where_that_is_more() -> None:
    setup = dataclasses.replace(toy_setup(), step_cost=StepCost(fixed_s=0.01, per_request_s=0.005))
    [stream, prompt] = tokens("stock-fcfs-256-mixed", STREAM_AND_PROMPT, setup)
    # A step of 15 ms; 255 of the prompt and the stream's 5 ms; the other 45 and as much; a step by itself.
    assert stream == [100.0, 115.0, 375.0, 425.0]
    assert prompt == [425.0]


def test_ours_steps_at_the_latest_operator_that_keeps_the_objective() -> None:
    [stream, prompt] = tokens("feasible", STREAM_AND_PROMPT)
    # Due at 210 ms and every 100 ms. A step of 10 ms starts with a margin of 12 ms, at an operator behind that (10 ms).
    assert stream[:2] == [100.0, 110.0]
    for before_ms, after_ms in pairwise(stream[1:]):
        assert 100.0 - 12.0 <= after_ms - before_ms <= 100.0
    assert prompt == [430.0], "two steps of 10 ms went before its end"
    assert tokens("feasible/chunk", STREAM_AND_PROMPT) == [[100.0, 110.0, 420.0, 430.0], [410.0]]


@pytest.mark.parametrize(
    "system", ["feasible", "s-edf/layer", "fcfs/chunk", "stock-fcfs", "stock-spf-512", "stock-hrrn-2048"]
)
def test_answers_of_one_token_make_it_a_prefill_server(system: str) -> None:
    trace = qwen_like(400, seed=3, rate_rps=9.0)
    trace = dataclasses.replace(trace, requests=[dataclasses.replace(r, output_tokens=1) for r in trace.requests])
    setup = Setup(Machine(LLAMA_8B, 10_000_000))
    plain = unified(system)
    alone = (
        SimulatedFlowPrefill(plain.policy, plain.granularity)
        if isinstance(plain, SimulatedUnified)
        else SimulatedStock(plain.order, plain.chunk_tokens)  # type: ignore[attr-defined]
    )
    together, apart = run(plain, trace, setup), run(alone, trace, setup)
    assert [r.first_token_s for r in together.requests] == [r.first_token_s for r in apart.requests]
    assert together.blocking_s == apart.blocking_s


@pytest.mark.parametrize("kv_tokens", [22_000, 40_000, 414_600])
@pytest.mark.parametrize(
    "system", [*UNIFIED_HEADLINE, "feasible+ahead", "stock-fcfs", "stock-spf-512-mixed-interval-2", "fcfs/layer"]
)
def test_every_token_comes_once_and_all_kv_cache_is_free_in_the_end(system: str, kv_tokens: int) -> None:
    setup = Setup(Machine(LLAMA_8B, kv_tokens), step_error=0.05)
    requests = prepare(mixed(150, seed=2, rate_rps=8.0), LLAMA_8B, setup.conditions)
    instance = unified(system).new_instance(setup)
    simulate(requests, [instance], RoundRobin(1))
    for request in requests:
        assert request.ready_s < request.first_token_s < math.inf
        assert request.came_tokens == request.output_tokens == len(request.tbt_s) + 1
        assert (request.tbt_s > 0).all()
    kv = instance.engine.kv if isinstance(instance, UnifiedInstance) else instance.kv  # type: ignore[attr-defined]
    assert (kv.free_tokens, kv.to_come_tokens) == (kv_tokens, 0)
    assert (len(instance.streams), instance.streams.context_tokens) == (0, 0)  # type: ignore[attr-defined]
    if isinstance(instance, UnifiedInstance):
        assert (instance.policy.streams.requests, instance.policy.streams.context_tokens) == (0, 0)


def full(system: str, trace: Trace, kv_tokens: int) -> tuple[list[SimRequest], UnifiedInstance | StockUnifiedInstance]:
    """A run in which nothing is reserved for answers."""
    setup = toy_setup(kv_tokens)
    instance = unified(system).new_instance(setup)
    assert isinstance(instance, UnifiedInstance | StockUnifiedInstance)
    kv = instance.engine.kv if isinstance(instance, UnifiedInstance) else instance.kv
    kv.ratio = 0.0
    requests = prepare(trace, TOY, setup.conditions)
    simulate(requests, [instance], RoundRobin(1))
    return requests, instance


@pytest.mark.parametrize("system", ["feasible", "stock-fcfs"])
def test_a_server_that_was_idle_reserves_as_much_of_answers_as_at_first(system: str) -> None:
    _, instance = full(system, trace_of((0.0, 100, 50, 9.0, 0.1)), kv_tokens=1000)
    kv = instance.engine.kv if isinstance(instance, UnifiedInstance) else instance.kv
    assert kv.ratio == FIRST_RATIO


def test_a_prefill_is_given_back_before_a_stream_is_touched_and_computed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgl_flowprefill.bench.simulator.streams.LEAST_RATIO", 0.0)
    trace = trace_of((0.0, 100, 300, 9.0, 0.05), (0.2, 800, 1, 9.0, 0.05))
    [stream, prompt], instance = full("feasible", trace, kv_tokens=920)
    assert isinstance(instance, UnifiedInstance)
    assert (instance.give_backs, instance.streams.retractions) == (1, 0)
    assert stream.tbt_s.max() <= 0.05
    assert prompt.first_token_s >= stream.last_token_s + 0.8, "not admitted again before the stream has freed its KV"


def test_others_start_while_a_request_whose_prefill_was_given_back_waits_for_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sgl_flowprefill.bench.simulator.streams.LEAST_RATIO", 0.0)
    trace = trace_of((0.0, 100, 300, 9.0, 0.05), (0.2, 800, 1, 9.0, 0.05), (1.2, 50, 1, 9.0, 0.05))
    [stream, prompt, short], instance = full("feasible", trace, kv_tokens=920)
    assert isinstance(instance, UnifiedInstance)
    assert instance.give_backs == 1
    assert short.first_token_s < 1.4 < stream.last_token_s < prompt.first_token_s


def test_kv_cache_is_asked_for_anew_every_second_as_less_of_it_is_reserved_by_then() -> None:
    trace = trace_of((0.0, 100, 500, 9.0, 0.1), (0.105, 503, 50, 9.0, 0.1))
    [stream, other] = run(unified("feasible"), trace, toy_setup(kv_tokens=1000)).requests
    # 554 of 899 - 0.699 * 498 behind the first step; of 810 - 0.610 * 409 when a second is over.
    assert 1.5 < other.first_token_s < 2.0 < stream.last_token_s


@pytest.mark.parametrize("system", ["feasible", "stock-fcfs", "stock-fcfs-256-mixed"])
def test_the_stream_with_fewest_tokens_is_retracted_and_starts_anew_with_what_it_has(
    system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sgl_flowprefill.bench.simulator.streams.LEAST_RATIO", 0.0)
    trace = trace_of((0.0, 100, 100, 9.0, 0.1), (0.15, 100, 100, 9.0, 0.1))
    [first, second], instance = full(system, trace, kv_tokens=310)
    assert instance.streams.retractions == 1
    assert first.tbt_s.max() <= 0.1 + 0.11, "at most a prompt of 100 tokens lies between"
    left = int(second.tbt_s.argmax())
    assert second.tbt_s[left] > 0.4, "until the first one is over"
    assert second.shape == (100 + left, 0), "its prompt, and the tokens that were in the cache when it left"
    assert second.came_tokens == 100


def test_admission_reserves_a_share_of_answers_that_falls_as_sglangs_does() -> None:
    kv = OutputKv(Machine(TOY, 1000))
    [running, other] = prepare(
        trace_of((0.0, 100, 500, 9.0, 0.1), (0.0, 500, 50, 9.0, 0.1)), TOY, toy_setup().conditions
    )
    assert kv.can_hold(running)
    kv.take([running])
    assert kv.fitting([other]) == 0  # 551 of 900 - 0.7 * 500
    for _ in range(600):
        kv.step(0)
    assert kv.ratio == pytest.approx(LEAST_RATIO)
    assert kv.fitting([other]) == 1  # 551 of 900 - 0.098 * 500
    assert not kv.can_hold(prepare(trace_of((0.0, 500, 499, 9.0, 0.1)), TOY, toy_setup().conditions)[0])
    long = prepare(trace_of((0.0, 10_000, 6000, 9.0, 0.1), (0.0, 10_000, 4998, 9.0, 0.1)), TOY, toy_setup().conditions)
    assert list(map(OutputKv(Machine(TOY, 15_000)).can_hold, long)) == [False, True], "all of an answer fits, or none"


def test_steps_cost_what_the_machine_reads() -> None:
    llama = STEP_COSTS["llama-3.1-8b-a800"]
    assert llama.predict_s(0, 0) == pytest.approx(16.06e9 / 1.6e12)
    assert llama.predict_s(32, 32 * 2048) == pytest.approx(0.01004 + 0.0018 + 0.00537, abs=1e-4)
    assert step_cost(TOY) is CPU_ENGINE
    assert CPU_ENGINE.predict_s(10, 10_000) == pytest.approx(0.027)


# ---- joint attainment and its search --------------------------------------------------------------------------------


def test_a_request_is_served_if_its_first_token_is_and_all_but_a_hundredth_of_the_gaps() -> None:
    def answer(late: int, of: int, meets_ttft: bool = True) -> Answered:
        return Answered(meets_ttft, 0.1, np.array([0.2] * late + [0.05] * (of - late)))

    assert answer(2, 200).meets_both
    assert not answer(3, 200).meets_both
    assert not answer(1, 99).meets_both
    assert not answer(0, 99, meets_ttft=False).meets_both
    assert answer(30, 99).meets_both_by_mean
    assert not answer(60, 99).meets_both_by_mean
    assert answer(0, 0).meets_both
    assert answer(0, 0).meets_both_by_mean
    assert Answered(True, 0.1, np.array([0.1 + 1e-15])).meets_both, "a gap that is as long as the objective"
    figures = summarise_joint([answer(3, 200), answer(0, 200), answer(0, 200, meets_ttft=False), answer(0, 0)])
    assert (figures.joint_attainment, figures.joint_attainment_mean_tpot) == (0.5, 0.75)
    assert figures.tbt_attainment == pytest.approx(1 - 3 / 600)
    assert (figures.tbt_p50_s, figures.tbt_max_s) == (0.05, 0.2)
    assert summarise_joint([]).tbt_p99_s is None


def test_ours_meets_time_between_tokens_where_no_chunk_size_meets_both() -> None:
    trace = qwen_like(300, seed=0, rate_rps=4.0)
    setup = Setup(Machine(LLAMA_8B, LLAMA_8B.kv_tokens))
    search = Search([trace], setup)
    ours = search.attainment(unified("feasible"), 4.0, "gaps")
    assert ours > 0.95
    assert max(search.attainment(unified(f"stock-spf-{chunk}-mixed"), 4.0, "gaps") for chunk in (512, 768, 1024)) < ours


def test_the_tuned_search_finds_what_a_search_of_all_finds() -> None:
    traces = [qwen_like(120, seed, rate_rps=4.0) for seed in range(2)]
    setup = Setup(Machine(LLAMA_8B, LLAMA_8B.kv_tokens))
    systems = [
        unified(name) for name in ("stock-fcfs-8192", "stock-spf-768-mixed", "stock-spf-512-mixed", "stock-spf-2048")
    ]
    search = Search(traces, setup)
    best, rate_rps = TunedSearch(traces, setup, systems).best(0.7, "gaps")
    assert best is not None
    assert rate_rps == max(search.max_rate_rps(system, 0.7, "gaps") for system in systems)
    assert rate_rps == search.max_rate_rps(best, 0.7, "gaps")
    assert TunedSearch(traces, setup, systems[:1]).best(0.999, "gaps") == (None, 0.0)


def test_settings_of_stock_are_all_combinations_and_unknown_ones_are_refused() -> None:
    assert len(UNIFIED_STOCK) == 5 * (12 + 11) * 4
    chosen = find("stock-spf-768-mixed-interval-2", "unified")
    assert chosen is UNIFIED_STOCK["unified-stock-spf-768-mixed-interval-2"] is find(chosen.name)
    for name in VARIANTS:
        assert str(unified(f"feasible+{name}")) == f"feasible+{name}"
    for name in ("stock-spf-mixed", "stock-spf-77", "stock-spf-512-interval-3", "feasible+fast", "flowprefill"):
        with pytest.raises(ValueError, match="for example stock-spf-768-mixed"):
            unified(name)


def test_the_command_writes_what_a_comparison_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "unified.json"
    command = ["simulate", "--unified", "--requests", "60", "--seeds", "1", "--rate", "3", "--step-ms", "12", "--out"]
    assert main([*command, str(out), "--policy", "feasible", "stock-spf-768-mixed"]) == 0
    report = json.loads(out.read_text())
    assert report["step_cost"]["fixed_s"] == 0.012
    for entry in report["traces"]["qwen-like"]["systems"].values():
        assert 0 < entry["joint_attainment"] <= entry["ttft_attainment"]
        assert 0 < entry["decode_share"] < 1
        assert entry["tbt_p50_s"] <= entry["tbt_p99_s"] <= entry["tbt_max_s"]
    assert "stock-spf-768-mixed" in capsys.readouterr().out
    assert main(["simulate", "--unified", "--plan"]) == 2
    assert "--plan and --speed are of prefill instances" in capsys.readouterr().err


def test_the_share_of_time_in_steps_is_one_of_all_servers() -> None:
    trace = trace_of(*((0.1 * number, 100, 20, 9.0, 0.1) for number in range(5)))
    twice = Trace("toy", [request for request in trace.requests for _ in range(2)])
    on_two = dataclasses.replace(toy_setup(), instances=2, router="round-robin")
    for system in ("feasible", "stock-fcfs"):
        one = figures([run(unified(system), trace, toy_setup())])
        two = figures([run(unified(system), twice, on_two)])
        assert two["steps"] == 2 * one["steps"]
        assert two["decode_share"] == pytest.approx(one["decode_share"])
        assert 0 < two["decode_share"] < 1


def test_the_command_searches_the_highest_rates_and_names_the_best_stock_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("stock-fcfs-8192", "stock-spf-768-mixed")
    settings = {name: UNIFIED_STOCK[f"unified-{name}"] for name in names}
    monkeypatch.setattr("sgl_flowprefill.bench.cli.unified.UNIFIED_STOCK", settings)
    monkeypatch.setattr("sgl_flowprefill.bench.cli.unified.ATTAINMENTS", (0.7,))
    out = tmp_path / "goodput.json"
    command = ["simulate", "--unified", "--goodput", "--requests", "60", "--seeds", "1", "--out", str(out), "--policy"]
    assert main([*command, "feasible", *names]) == 0
    found = json.loads(out.read_text())["traces"]["qwen-like"]
    rates = {system: by_judge["gaps"]["0.7"] for system, by_judge in found["max_rate_rps"].items()}
    assert rates["best stock"] == max(rates[name] for name in names) < rates["feasible"]
    assert rates[found["best_stock"]["gaps"]["0.7"]] == rates["best stock"]
    assert f"({found['best_stock']['gaps']['0.7']})" in capsys.readouterr().out.replace("\n", "")


# ---- the hub's side --------------------------------------------------------------------------------------------------


def test_the_hub_runs_a_step_when_the_policy_says_so_and_all_ranks_hear_of_it() -> None:
    instance = unified("feasible").new_instance(toy_setup())
    assert isinstance(instance, UnifiedInstance)
    hub, ran = instance.hub, []

    class Steps:
        def step(self) -> DecodeStep:
            ran.append(hub.now_s())
            return DecodeStep(SimStep())

        def finish_step(self, step: DecodeStep) -> None:
            pass

        def missing_tokens(self) -> int:
            return 0

        def give_back(self, task: PrefillTask) -> None:
            raise AssertionError("nothing is missing")

    hub.decoder = Steps()
    assert not hub.turn()
    instance.policy.joined([Stream(0.1, 10, 0.0)])
    assert hub.turn()
    assert ran == [0.0]
    assert hub.choose() is Act.STEP
    assert hub.work.from_numbers(hub.work.as_numbers(Act.STEP)) is Act.STEP


class StepsWithoutRoom:
    """Steps that lack KV cache until ``wanted`` tasks have been given back."""

    def __init__(self, instance: UnifiedInstance, wanted: int) -> None:
        self._policy, self._hub = instance.policy, instance.hub
        self._wanted = wanted
        self.given: list[int] = []
        self.begun_s: list[float] = []

    def step(self) -> DecodeStep:
        self.begun_s.append(self._hub.now_s())
        self._policy.began(self._hub.now_s())
        return DecodeStep(SimStep())

    def finish_step(self, step: DecodeStep) -> None:
        self._policy.stepped(self._hub.now_s() + 0.001)

    def missing_tokens(self) -> int:
        return 1 if len(self.given) < self._wanted else 0

    def give_back(self, task: PrefillTask) -> None:
        assert task not in self._hub.work.tasks.live
        self.given.append(task.id)


def with_two_tasks() -> UnifiedInstance:
    """An instance whose tasks 0 and 1 are live."""
    instance = unified("feasible").new_instance(toy_setup())
    assert isinstance(instance, UnifiedInstance)
    for request in prepare(trace_of((0.0, 1000, 1, 9.0, 0.1), (0.0, 900, 1, 0.95, 0.1)), TOY, toy_setup().conditions):
        instance.submit(request, 0.0)
    instance.step()
    assert [task.id for task in instance.hub.work.tasks.live] == [0, 1]
    return instance


@pytest.mark.parametrize(("wanted", "given"), [(0, []), (1, [0]), (2, [0, 1]), (3, [0, 1])])
def test_a_step_takes_kv_cache_from_tasks_until_it_has_enough_or_none_is_left(wanted: int, given: list[int]) -> None:
    instance = with_two_tasks()
    hub = instance.hub
    hub.decoder = steps = StepsWithoutRoom(instance, wanted)
    hub.step()
    assert steps.given == given
    assert len(steps.begun_s) == 1
    assert [task.id for task in hub.work.tasks.live] == [number for number in (0, 1) if number not in given]


class StepsWithoutMemory(StepsWithoutRoom):
    """Steps for which the device has no memory until ``wanted`` tasks have been given back."""

    def step(self) -> DecodeStep:
        if len(self.given) < self._wanted:
            raise StepOutOfMemory(Failure("OutOfMemoryError", 7, "0123456789ab", "Traceback"), 3)
        return super().step()

    def missing_tokens(self) -> int:
        return 0


class Meetings(OneRank):
    """Keeps where it was said that something has failed."""

    def __init__(self) -> None:
        super().__init__(lambda: False)
        self.failed_at: list[int] = []

    def agree(self, values: Sequence[int] = (), failed_at: int = 0) -> Sequence[int]:
        if failed_at:
            self.failed_at.append(failed_at)
        return values


@pytest.mark.parametrize(
    ("wanted", "has_run", "given"),
    [(0, [0, 1], []), (1, [0, 1], [0]), (2, [0, 1], [0, 1]), (3, [0, 1], [0, 1]), (1, [1], [1]), (1, [], [])],
)
def test_a_step_takes_device_memory_from_tasks_that_have_run_until_it_has_enough_or_none_is_left(
    wanted: int, has_run: list[int], given: list[int]
) -> None:
    instance = with_two_tasks()
    hub = instance.hub
    for task in hub.work.tasks.live:
        task.has_run = task.id in has_run
    hub.decoder = steps = StepsWithoutMemory(instance, wanted)
    hub.agreement = meetings = Meetings()
    if len(given) < wanted:
        with pytest.raises(StepOutOfMemory, match="decode step of 3 requests, and no prefill is suspended"):
            hub.step()
    else:
        hub.step()
    assert steps.given == given
    assert len(steps.begun_s) == (len(given) >= wanted)
    assert meetings.failed_at == [7] * len(given), "all ranks have failed at the same place, or none goes on"
    assert [task.id for task in hub.work.tasks.live] == [number for number in (0, 1) if number not in given]


def test_a_task_comes_back_when_a_step_has_to_start() -> None:
    instance = unified("feasible").new_instance(toy_setup())
    assert isinstance(instance, UnifiedInstance)
    hub = instance.hub
    instance.policy.joined([Stream(0.1, 10, 0.0)])
    [request] = prepare(trace_of((0.0, 1000, 1, 9.0, 0.1)), TOY, toy_setup().conditions)
    instance.submit(request, 0.0)
    assert hub.work.tasks.running is not None
    instance.now_s = instance.policy.load.start_by_s - 0.001
    assert not hub.has_news()
    instance.now_s = instance.policy.load.start_by_s
    assert hub.has_news()


def test_no_request_starts_that_would_make_steps_too_long_for_a_stream() -> None:
    setup = dataclasses.replace(toy_setup(), step_cost=StepCost(0.0, 0.03))
    limits = DecodeLimits(max_share=0.9, margin_s=0.0)
    # Steps of four streams take 120 ms: more than 90% of 100 ms, so the fourth request waits for the end of a stream.
    trace = trace_of(*[(0.001 * number, 10, 10, 9.0, 0.1) for number in range(4)])
    requests = run(SimulatedUnified("fcfs", limits=limits), trace, setup).requests
    first_end_s = min(request.last_token_s for request in requests[:3])
    assert requests[3].first_token_s >= first_end_s
    assert all(request.first_token_s < first_end_s for request in requests[:3])


@pytest.mark.parametrize("system", ["feasible", "fcfs/layer"])
def test_no_request_waits_before_the_hub_has_been_told_of_it(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(Machine(LLAMA_8B, 22_000), step_error=0.05)
    instance = unified(system).new_instance(setup)
    assert isinstance(instance, UnifiedInstance)
    work, looks = instance.hub.work, []
    forget = work.forget_all_but

    def watched(reqs: Collection[Any]) -> None:
        told = {job.item.req for job in work.policy.waiting}
        assert set(reqs) <= told
        looks.append(len(told))
        forget(reqs)

    monkeypatch.setattr(work, "forget_all_but", watched)
    simulate(prepare(mixed(150, seed=2, rate_rps=8.0), LLAMA_8B, setup.conditions), [instance], RoundRobin(1))
    assert instance.streams.retractions >= 1
    assert max(looks) > 10
