"""The simulator: times worked out by hand, costs against the published figures, systems against one another."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sgl_flowprefill.bench.__main__ import main
from sgl_flowprefill.bench.cli import simulate as simulate_command
from sgl_flowprefill.bench.simulator.checkpoints import Checkpoints, Preemption
from sgl_flowprefill.bench.simulator.cost import LLAMA_8B, MODELS, CostModel, cost_model, fit, fit_published
from sgl_flowprefill.bench.simulator.flowprefill import Blocking
from sgl_flowprefill.bench.simulator.instance import Machine
from sgl_flowprefill.bench.simulator.requests import Conditions, resampled
from sgl_flowprefill.bench.simulator.search import fewest_instances, highest, max_limit_rps, max_rate_rps
from sgl_flowprefill.bench.simulator.speed import KINDS
from sgl_flowprefill.bench.simulator.stock import MAX_PREFILL_TOKENS
from sgl_flowprefill.bench.simulator.systems import Run, Setup, Simulated, SimulatedStock
from sgl_flowprefill.bench.simulator.systems import run as simulate
from sgl_flowprefill.bench.systems.catalog import HEADLINE, find, simulated
from sgl_flowprefill.bench.workloads.synthetic import mixed, qwen_like
from sgl_flowprefill.bench.workloads.trace import Trace, TraceRequest
from sgl_flowprefill.policy import Limits
from sgl_flowprefill.profiling import Profile, Row, Setting, write_profile
from sgl_flowprefill.ttft import PrefillShape

TOY = CostModel("toy", layers=10, fixed_s=0.0, per_token_s=0.001, per_pair_s=0.0, projection_share=0.5)
"""A token takes a millisecond; a prompt of 1,000 tokens has an operator every 50 ms."""

# Fastest request of a length class in the 323 that the FlowPrefill repository's offline notebook prints.
PUBLISHED_ENVELOPE = [
    (72, 0.0240), (146, 0.0283), (210, 0.0299), (274, 0.0361), (356, 0.0375), (500, 0.0451), (691, 0.0607),
    (748, 0.0598), (1132, 0.0821), (1401, 0.1059), (2041, 0.1432), (2315, 0.1657), (3138, 0.2175), (4174, 0.2917),
    (6867, 0.4965), (8170, 0.6444),
]  # fmt: skip


def trace_of(*requests: tuple[float, int, float]) -> Trace:
    """Requests as (arrival in s, tokens, TTFT SLO in s)."""
    return Trace(
        "toy",
        [TraceRequest(arrival_s, tokens, 1, "all", slo_s, math.inf) for arrival_s, tokens, slo_s in requests],
    )


def toy_setup(**changes: object) -> Setup:
    setup = Setup(Machine(TOY, kv_tokens=10_000), limits=Limits(max_suspended=4, max_batch_tokens=1))
    return dataclasses.replace(setup, max_operator_s=math.inf, **changes)  # type: ignore[arg-type]


def run(system: str | Simulated, trace: Trace, setup: Setup) -> Run:
    return simulate(simulated(system) if isinstance(system, str) else system, trace, setup)


def ttfts(system: str | Simulated, trace: Trace, setup: Setup) -> list[float]:
    return [round(r.first_token_s - r.arrival_s, 6) for r in run(system, trace, setup).requests]


def test_kv_that_was_sent_while_an_instance_was_idle_is_free_when_a_request_comes() -> None:
    """And not before: nothing starts ahead of its arrival."""
    cost = dataclasses.replace(TOY, kv_bytes_per_token=1)
    setup = toy_setup(machine=Machine(cost, kv_tokens=1000, link_bytes_per_s=2000.0))
    assert ttfts("s-edf", trace_of((0.0, 800, 10.0), (2.0, 800, 10.0)), setup) == [1.2, 1.2]


def test_preemption_takes_effect_at_the_next_boundary_of_its_granularity() -> None:
    trace = trace_of((0.0, 1000, 10.0), (0.12, 10, 0.5))
    # Operators end every 50 ms, layers every 100 ms.
    for system, urgent_s in (("s-edf", 0.04), ("s-edf/layer", 0.09), ("s-edf/chunk", 0.89)):
        result = run(system, trace, toy_setup())
        last_s = 1.0 if system.endswith("chunk") else 1.01
        assert [round(r.first_token_s - r.arrival_s, 6) for r in result.requests] == [last_s, urgent_s]
        assert result.blocking_s == pytest.approx([] if system.endswith("chunk") else [urgent_s - 0.01])


def test_nobody_was_blocked_where_kv_cache_that_gets_free_lets_a_request_start() -> None:
    """As an event log has it: no news led to the switch."""
    machine = Machine(dataclasses.replace(TOY, kv_bytes_per_token=1), kv_tokens=1000, link_bytes_per_s=2000)
    # The first ends at 0.5 s and is sent by 0.75 s. Only then there is KV cache for the third, beside the second.
    trace = trace_of((0.0, 500, 10.0), (0.1, 400, 20.0), (0.61, 200, 1.0))
    result = run("s-edf", trace, toy_setup(machine=machine))
    assert [round(r.first_token_s, 6) for r in result.requests] == [0.75, 1.3, 1.06]
    assert (result.blocking_s, result.switches_without_news) == ([], 1)


@pytest.mark.parametrize("has_run", [False, True], ids=["a new task", "a task that goes on"])
def test_a_winner_that_waited_before_is_blocked_from_the_news_on_that_led_to_the_switch(has_run: bool) -> None:
    blocking = Blocking()
    running: Any = SimpleNamespace()
    winner: Any = SimpleNamespace(readable_s=1.0, has_run=has_run)
    blocking.suspended(running, winner, stopped_s=4.9, now_s=5.0, news_readable_s=4.5)
    blocking.suspended(running, winner, stopped_s=6.9, now_s=7.0, news_readable_s=math.inf)
    assert (blocking.blocking_s, blocking.switches_without_news) == ([0.5], 1)


def test_tiles_and_lookahead_move_the_stop() -> None:
    trace = trace_of((0.0, 1000, 10.0), (0.12, 10, 0.5))
    assert ttfts("s-edf", trace, dataclasses.replace(toy_setup(), max_operator_s=0.025))[1] == pytest.approx(0.015)
    assert ttfts("s-edf", trace, toy_setup(lookahead=1))[1] == pytest.approx(0.09)


def test_checkpoints_count_what_was_passed_and_always_make_progress() -> None:
    checkpoints = Checkpoints(1.0, 10, 0.3, Preemption())
    elapsed_s, stops = 0.0, []
    while elapsed_s < 1.0:
        elapsed_s = checkpoints.next_stop_s(elapsed_s)
        stops.append(elapsed_s)
    assert stops[:3] == pytest.approx([0.03, 0.1, 0.13])
    assert len(stops) == checkpoints.total == 20
    assert [checkpoints.passed(stop_s) for stop_s in stops] == list(range(1, 21))


def test_stock_runs_what_came_first_to_its_end() -> None:
    trace = trace_of((0.0, 1000, 10.0), (0.1, 300, 10.0), (0.2, 100, 0.5))
    assert ttfts("stock-fcfs", trace, toy_setup()) == [1.0, 1.3, 1.2]  # the two that wait share a forward
    # Chunks of 500: 500 of the first, its other 500, then the 300 and the 100 together.
    assert ttfts(SimulatedStock("fcfs", 500), trace, toy_setup()) == [1.0, 1.3, 1.2]
    # Chunks of 400: the third goes in a forward that the first leaves room in, a part of the second joins its end.
    assert ttfts(SimulatedStock("spf", 400), trace, toy_setup()) == [1.2, 1.3, 0.6]


def test_chunks_attend_to_the_chunks_before_and_cost_the_same_attention_in_all() -> None:
    model = dataclasses.replace(TOY, per_pair_s=1e-6)
    whole_s = model.predict_s([PrefillShape(1000)])
    assert sum(model.predict_s([PrefillShape(250, at)]) for at in (0, 250, 500, 750)) == pytest.approx(whole_s)


def test_a_request_waits_for_kv_cache_and_one_that_never_fits_fails() -> None:
    setup = toy_setup(machine=Machine(dataclasses.replace(TOY, kv_bytes_per_token=1), 1000, link_bytes_per_s=1000))
    trace = trace_of((0.0, 900, 10.0), (0.1, 200, 1.0), (0.1, 2000, 10.0))
    for system in ("s-edf", "stock-fcfs"):
        first, second, third = run(system, trace, setup).requests
        assert first.first_token_s == pytest.approx(0.9 + 0.9)  # forward, then transfer
        assert second.first_token_s == pytest.approx(1.8 + 0.2 + 0.2)  # starts when the first's KV is free
        assert third.first_token_s == math.inf


def test_kv_is_sent_while_a_prompt_goes_on() -> None:
    """At 1,000 tokens a second: only what the last forward made is still to be sent when it ends."""
    machine = Machine(dataclasses.replace(TOY, kv_bytes_per_token=1), 10_000, link_bytes_per_s=1000)
    trace = trace_of((0.0, 900, 10.0))
    assert ttfts("stock-fcfs", trace, toy_setup(machine=machine)) == [1.8]
    assert ttfts(SimulatedStock("fcfs", 300), trace, toy_setup(machine=machine)) == [1.2]
    cached = dataclasses.replace(trace.requests[0], shared_tokens=600)
    trace = dataclasses.replace(trace, requests=[cached])
    for system in ("s-edf", "stock-fcfs"):  # the cached 600 tokens are under way for 0.6 s from the start
        assert ttfts(system, trace, toy_setup(machine=machine)) == [0.9]


def test_unchunked_a_prompt_that_would_fill_the_forward_waits() -> None:
    setup = toy_setup(machine=Machine(TOY, 100_000))
    trace = trace_of((0.0, 100, 99.0), (0.05, MAX_PREFILL_TOKENS - 1000, 99.0), (0.06, 1000, 99.0), (0.07, 1, 99.0))
    _, first_s, filling_s, _ = ttfts("stock-fcfs", trace, setup)
    assert first_s == pytest.approx(0.05 + 15.384)
    assert filling_s == pytest.approx(0.04 + 15.384 + 1.001)


def test_bootstrap_and_serving_delay_the_start() -> None:
    setup = toy_setup(
        machine=Machine(dataclasses.replace(TOY, serving_s=0.2), 10_000), conditions=Conditions(bootstrap_s=0.1)
    )
    assert ttfts("s-edf", trace_of((0.0, 100, 1.0)), setup) == [0.4]


@pytest.mark.parametrize("system", [*HEADLINE, "edf", "fcfs", "feasible/layer", "stock-priority"])
def test_every_request_is_served_once_on_any_number_of_instances(system: str) -> None:
    trace = qwen_like(300, seed=1, rate_rps=12.0)
    for router in ("round-robin", "least-work"):
        setup = Setup(Machine(LLAMA_8B, 60_000, 20e9), instances=3, router=router)
        requests = run(system, trace, setup).requests
        assert all(request.ready_s < request.first_token_s < math.inf for request in requests)


def test_more_instances_serve_more_and_least_work_is_no_worse_than_round_robin() -> None:
    trace = resampled(mixed(500, seed=0), 2000, rate_rps=29.0, seed=0)
    setup = Setup(Machine(LLAMA_8B, LLAMA_8B.kv_tokens), instances=3)
    by_instances = [run("s-edf", trace, dataclasses.replace(setup, instances=n)).attainment for n in (1, 2, 3, 4)]
    assert by_instances == sorted(by_instances)
    round_robin = run("s-edf", trace, dataclasses.replace(setup, router="round-robin")).attainment
    assert run("s-edf", trace, setup).attainment >= round_robin


def test_the_papers_order_of_systems_appears() -> None:
    trace = qwen_like(1500, seed=0, rate_rps=5.5)
    setup = Setup(Machine(LLAMA_8B, LLAMA_8B.kv_tokens))
    ours, layer, chunked, unchunked = (
        run(name, trace, setup) for name in ("s-edf", "s-edf/layer", "stock-fcfs-2048", "stock-fcfs")
    )
    assert ours.attainment > 0.97  # the paper's own notebook at this rate: 318 of 323
    assert max(chunked.attainment, unchunked.attainment) < 0.8
    assert layer.blocking_s
    assert ours.blocking_s
    ratio = sum(layer.blocking_s) / len(layer.blocking_s) / (sum(ours.blocking_s) / len(ours.blocking_s))
    assert 3 < ratio < 6  # the paper: 3.5 to 4.2


def test_lasting_overload_does_not_end_as_first_come_first_served() -> None:
    trace = qwen_like(4000, seed=0, rate_rps=10.5)
    setup = Setup(Machine(LLAMA_8B, LLAMA_8B.kv_tokens), limits=Limits(max_suspended=64, max_batch_tokens=2048))
    for system in ("s-edf", "feasible"):
        assert run(system, trace, setup).attainment > 0.85


def test_published_figures_are_within_a_tenth_of_the_model() -> None:
    tokens, times_s = zip(*PUBLISHED_ENVELOPE, strict=True)
    fixed_s, per_token_s, per_pair_s, _ = fit_published(tokens, times_s)
    assert per_token_s == pytest.approx(LLAMA_8B.per_token_s, rel=0.1)
    assert per_pair_s == pytest.approx(LLAMA_8B.per_pair_s, rel=0.25)
    assert fixed_s == pytest.approx(LLAMA_8B.fixed_s + LLAMA_8B.serving_s, rel=0.1)
    for length, time_s in PUBLISHED_ENVELOPE:
        assert LLAMA_8B.serving_s + LLAMA_8B.predict_s([PrefillShape(length)]) == pytest.approx(time_s, rel=0.13)


def test_a_fit_finds_what_made_the_times_and_never_goes_negative() -> None:
    batches = [
        [PrefillShape(16)],
        [PrefillShape(256)],
        [PrefillShape(256, 4096)],
        [PrefillShape(1024), PrefillShape(512, 64)],
    ]
    made = dataclasses.replace(TOY, fixed_s=0.01, per_token_s=1e-4, per_pair_s=1e-8)
    times_s = [made.predict_s(batch) for batch in batches]
    assert fit(batches, times_s) == pytest.approx((0.01, 1e-4, 1e-8))
    # One of several repeats that something else disturbed does not count.
    assert fit([*batches * 3, batches[1]], [*times_s * 3, 1.0]) == pytest.approx((0.01, 1e-4, 1e-8))
    prompts = [[PrefillShape(n)] for n in (16, 64, 256, 1024, 4096)]
    assert min(fit(prompts, [1e-4 * n - 1e-9 * n * n for [(n, _)] in prompts])) >= 0
    with pytest.raises(ValueError, match="3 shapes"):
        fit([*prompts[:2], prompts[0]], [1.0, 2.0, 3.0])


def test_roofline_models_cost_what_their_size_says() -> None:
    llama, dense, experts = (MODELS[name] for name in MODELS)
    prompt = [PrefillShape(2048)]
    assert dense.predict_s(prompt) == pytest.approx(
        llama.predict_s(prompt), rel=0.2
    )  # twice the size on twice the GPUs
    assert experts.predict_s(prompt) < llama.predict_s(prompt)
    assert experts.predict_s([PrefillShape(16)]) > llama.predict_s([PrefillShape(16)])  # all experts' weights are read


def test_a_profile_is_a_cost_model_and_anything_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.parquet"
    setting = Setting(model="m", device="d", dtype="f", attention_backend="a", threads=1, sglang="0.5.23")
    # Long forwards cost more per token, which single prompts cannot tell from attention; a cached prefix can.
    rows = [Row((PrefillShape(n),), 0.01 + 1e-4 * n + 1e-8 * n * n, 0.0, 0, 0.0) for n in (16, 256, 1024, 4096)]
    write_profile(path, Profile(setting, 4096, rows, complete=True))
    model = cost_model(str(path), layers=4)
    assert (model.name, model.layers) == ("m", 4)
    assert model.predict_s([PrefillShape(2000)]) == pytest.approx(0.25, rel=0.01)
    chunk = [PrefillShape(2048, 6144)]
    guessed_s = model.predict_s(chunk)
    free = [Row((PrefillShape(n, 4 * n),), 0.01 + 1e-4 * n, 0.0, 0, 0.0) for n in (64, 256, 1024)]
    write_profile(path, Profile(setting, 4096, [*rows, *free], complete=True))
    assert cost_model(str(path), layers=4).predict_s(chunk) < guessed_s / 1.5
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a profile"):
        cost_model(str(path), layers=4)
    with pytest.raises(ValueError, match="none of llama"):
        cost_model("nothing", layers=4)


def test_searches_find_the_edge() -> None:
    assert highest(lambda value: value <= 3.7, 1.0) == pytest.approx(3.7, rel=0.011)
    assert highest(lambda value: value <= 0.2, 1.0) == pytest.approx(0.2, rel=0.011)
    assert highest(lambda value: False, 1.0) == 0.0
    setup = Setup(Machine(LLAMA_8B, LLAMA_8B.kv_tokens))
    traces = [mixed(400, seed=0, rate_rps=30.0)]
    rates = [max_rate_rps(simulated(system), traces, setup, 0.9) for system in ("stock-fcfs", "s-edf", "feasible")]
    rates.append(max_limit_rps(traces, setup, 0.9))
    assert rates == sorted(rates)
    instances = fewest_instances(simulated("s-edf"), traces, setup, 0.95)
    fewer = dataclasses.replace(setup, instances=instances - 1)
    assert run("s-edf", traces[0], fewer).attainment < 0.95
    with pytest.raises(ValueError, match="even alone"):
        fewest_instances(simulated("s-edf"), [trace_of((0.0, 8000, 0.1))], setup, 0.5)


def test_an_unknown_system_is_refused_with_the_names_there_are() -> None:
    for name in ("stock-lifo", "stock-fcfs-0", "s-edf/token", "sedf"):
        with pytest.raises(ValueError, match="s-edf"):
            find(name)


@pytest.mark.parametrize("action", [[], ["--goodput"], ["--plan", "--attainment", "0.9"], ["--speed"]])
def test_the_command_writes_its_figures(action: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate_command, "QUEUE_LENGTHS", (100, 1000))
    monkeypatch.setattr(simulate_command, "PLACES_WAITED_FOR", (100,))
    out = tmp_path / "figures.json"
    options = ["--requests", "100", "--seeds", "1", "--policy", "s-edf", "stock-fcfs", "--rate", "5", "--out", str(out)]
    assert main(["simulate", *action, *options]) == 0
    report = json.loads(out.read_text())
    if "--speed" in action:
        assert report["speed"]["s-edf"]["requests_per_s"] > 0
        costs = report["speed"]["s-edf"]["event_cost"]
        assert costs.keys() == KINDS.keys()
        assert all(cost.keys() == {"100", "1000"} for cost in costs.values())
        assert all(one["p50_s"] > 0 for cost in costs.values() for one in cost.values())
        assert report["speed"]["order_of_places"]["100"]["p50_s"] > 0
    else:
        assert report["traces"]["qwen-like"]


@pytest.mark.parametrize(
    ("options", "rate_rps"),
    [
        (("--rate", "5"), 5.0),
        (("--instances", "3"), 3 * 5.5 / 2),
    ],
    ids=["given", "three instances of 5.5, stretched"],
)
def test_a_rate_that_is_given_is_the_one_that_is_simulated(
    options: tuple[str, ...], rate_rps: float, tmp_path: Path
) -> None:
    out = tmp_path / "figures.json"
    command = ["simulate", "--requests", "50", "--seeds", "1", "--policy", "stock-fcfs", "--no-limit"]
    assert main([*command, "--time-scale", "2", *options, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["traces"]["qwen-like"]["rate_rps"] == pytest.approx(rate_rps)


def test_a_search_that_no_rate_ends_says_what_to_do() -> None:
    setup = Setup(Machine(LLAMA_8B, LLAMA_8B.kv_tokens))
    with pytest.raises(ValueError, match="simulate more with --requests"):
        max_rate_rps(simulated("feasible"), [trace_of((0.0, 100, 60.0), (1.0, 100, 60.0))], setup, 0.9)
