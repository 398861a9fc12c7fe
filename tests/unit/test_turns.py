"""The hub takes the same turns in the simulator as on a device: what runs is decided by the same code."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sgl_flowprefill.bench.simulator.checkpoints import Preemption
from sgl_flowprefill.bench.simulator.cost import CostModel
from sgl_flowprefill.bench.simulator.engine import simulate
from sgl_flowprefill.bench.simulator.flowprefill import Blocking, FlowPrefillInstance
from sgl_flowprefill.bench.simulator.instance import Machine
from sgl_flowprefill.bench.simulator.requests import SimRequest
from sgl_flowprefill.bench.simulator.router import RoundRobin
from sgl_flowprefill.bench.simulator.step_cost import StepCost
from sgl_flowprefill.bench.simulator.streams import OutputKv
from sgl_flowprefill.bench.simulator.unified import UnifiedEngine, UnifiedInstance
from sgl_flowprefill.hub.role import Arrival, Decoder
from sgl_flowprefill.hub.task import DecodeStep, PrefillTask
from sgl_flowprefill.hub.waiting import WaitingRequest
from sgl_flowprefill.policy import POLICIES, ColocatedPolicy, DecodeLimits, Limits, Policy, make_policy
from sgl_flowprefill.ttft import Prediction, PrefillShape
from tests.simulated_device import (
    HostCosts,
    Model,
    SimulatedDevice,
    SimulatedEngine,
    SimulatedRequest,
    SimulatedServer,
)

COST = CostModel("line", layers=8, fixed_s=0.01, per_token_s=1e-4, per_pair_s=0.0, projection_share=0.5)
MODEL = Model(
    COST.layers,
    attention_s=lambda tokens: 0.5 * COST.predict_s([PrefillShape(tokens)]) / COST.layers,
    mlp_s=lambda tokens: 0.5 * COST.predict_s([PrefillShape(tokens)]) / COST.layers,
)
LIMITS = Limits(max_suspended=3, max_batch_tokens=800)
Turns = list[tuple[str, tuple[int, ...]]]
"""What became of which requests, in its order."""


def script(seed: int) -> list[tuple[float, int, float]]:
    """Arrival, prompt and objective of requests that compete, now and then for more than there is time for."""
    rng = random.Random(seed)
    now_s, requests = 0.0, []
    for _ in range(60):
        now_s += rng.expovariate(1 / 0.15) if rng.random() < 0.6 else 1e-4  # many come right behind another
        tokens = rng.choice([30, 60, 200, 900, 2500])
        requests.append((now_s, tokens, COST.predict_s([PrefillShape(tokens)]) * rng.uniform(1.1, 12.0)))
    return requests


class TurnsOfInstance(Blocking):
    """Keeps what happens to the tasks of a simulated instance."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: Turns = []

    def suspended(
        self, task: PrefillTask, winner: PrefillTask, stopped_s: float, now_s: float, news_readable_s: float
    ) -> None:
        super().suspended(task, winner, stopped_s, now_s, news_readable_s)
        self._keep("suspend", task)

    def resumed(self, task: PrefillTask, now_s: float) -> None:
        self._keep("resume" if task.has_run else "start", task)

    def completed(self, task: PrefillTask, prediction: Prediction) -> None:
        self._keep("complete", task)

    def _keep(self, turn: str, task: PrefillTask) -> None:
        self.turns.append((turn, tuple(req.index for req in task.reqs)))


def turns_of_instance(requests: Sequence[tuple[float, int, float]], policy: str) -> Turns:
    recorder = TurnsOfInstance()
    instance = FlowPrefillInstance(
        Machine(COST, COST.kv_tokens), make_policy(policy, LIMITS, 60.0), Preemption(), recorder=recorder
    )
    arriving = []
    for index, (arrival_s, tokens, slo_s) in enumerate(requests):
        shape = PrefillShape(tokens)
        arriving.append(SimRequest(index, arrival_s, arrival_s, arrival_s + slo_s, shape, COST.predict_s([shape])))
    simulate(arriving, [instance], RoundRobin(1))
    return recorder.turns


class Synchronous(SimulatedDevice):
    """The host does not run ahead and takes no time: it waits for each operator, and looks at each arrival."""

    server: SimulatedServer

    def launch(self, label: object, duration_s: float) -> None:
        is_operator = isinstance(label, tuple) and label[1] != "sample"
        super().launch(label, duration_s if is_operator else 0.0)

    def _pause(self) -> None:
        arriving = self.server.engine.requests_to_come
        next_s = arriving[0].arrival_s if arriving else self.busy_until_s
        self.now_s = min(self.busy_until_s, next_s) if next_s > self.now_s else self.busy_until_s


def sample_behind_the_last_operator(server: SimulatedServer) -> None:
    """A simulated forward pass is over with its last operator."""
    checkpoint, executor = server.engine.checkpoint, server.hub.executor

    def checkpoint_but_the_last() -> None:
        """On the device, too: its token is sampled behind that."""
        running = executor.running  # type: ignore[attr-defined]
        if running.operators_passed + 1 < 2 * COST.layers:
            checkpoint()
        else:
            running.operators_passed += 1
            server.device.synchronize()

    server.engine.checkpoint = checkpoint_but_the_last


def turns_of_hub(requests: Sequence[tuple[float, int, float]], policy: str) -> Turns:
    device = Synchronous(0, HostCosts(0.0, 0.0, 0.0, 0.0, 0.0))
    arriving = [SimulatedRequest(str(index), *request) for index, request in enumerate(requests)]
    server = device.server = SimulatedServer(device, MODEL, arriving, policy=make_policy(policy, LIMITS, 60.0))
    sample_behind_the_last_operator(server)
    server.run_all()
    return [(turn, tuple(map(int, rids))) for turn, rids in server.recorder.turns]


def test_the_hub_needs_neither_torch_nor_sglang() -> None:
    script = (
        "import sys; import sgl_flowprefill.hub.loop, sgl_flowprefill.bench.simulator.flowprefill;"
        "assert not {'torch', 'sglang'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_script_of_arrivals_makes_the_same_turns_in_the_simulator_and_on_the_device(policy: str) -> None:
    suspensions = batches = 0
    for seed in range(5):
        requests = script(seed)
        turns = turns_of_hub(requests, policy)
        assert turns == turns_of_instance(requests, policy)
        assert sorted(index for turn, members in turns if turn == "complete" for index in members) == list(range(60))
        suspensions += sum(turn == "suspend" for turn, _ in turns)
        batches += sum(turn == "start" and len(members) > 1 for turn, members in turns)
    print(f"\n{policy}: {suspensions} suspensions, {batches} batches of several requests")
    assert suspensions >= (0 if policy == "fcfs" else 20)
    assert batches >= 5


# ---- unified servers -------------------------------------------------------------------------------------------------

STEPS = StepCost(fixed_s=0.0101237, per_request_s=0.00051337, per_context_s=1.0371e-6)
"""Their ends lie on no grid with those of operators: what comes first does not hang on the last digit of a float."""
UNIFIED_LIMITS = Limits(max_suspended=3, max_batch_tokens=400)
NOT_ASKED_ANEW = math.inf
"""Not every second for KV cache: the device looks at an arrival while an operator runs, and so at other times."""


def unified_script(seed: int, longest_tokens: int) -> list[SimRequest]:
    """Short prompts with long answers, whose streams need the KV cache that long prompts with short answers hold, or,
    where there are no long prompts, that other streams hold.
    """
    rng = random.Random(seed)
    now_s, requests = 0.0, []
    for index in range(50):
        now_s += rng.expovariate(1 / 0.2)
        shape = PrefillShape(rng.choice([50, 100, longest_tokens]))
        alone_s = COST.predict_s([shape])
        request = SimRequest(index, now_s, now_s, now_s + alone_s * rng.uniform(1.5, 12.0), shape, alone_s)
        request.output_tokens = 1 if shape.new_tokens > 1000 else rng.choice([100, 300])
        request.tbt_slo_s = rng.choice([0.05, 0.1, 0.5])
        requests.append(request)
    return requests


class UnifiedTurns(TurnsOfInstance):
    """Also which tasks are given back."""

    def given_back(self, task: PrefillTask) -> None:
        self._keep("give back", task)


class StreamingEngine(SimulatedEngine, Decoder):
    """A simulated unified instance's KV cache and streams, whose forward passes and steps the simulated device runs."""

    def __init__(
        self, device: SimulatedDevice, model: Model, requests: Sequence[SimRequest], books: UnifiedEngine
    ) -> None:
        super().__init__(device, model, requests)  # type: ignore[arg-type]
        self.books = books

    def take_news(self, stalls_due: bool) -> bool:
        return self._now().take_news(stalls_due)

    def arrived(self) -> Iterator[Arrival]:
        while self.has_arrivals():
            request: Any = self.requests_to_come.popleft()
            self.books.come(request, request.ready_s)
        yield from self.books.arrived()

    def waiting(self) -> Any:
        return self.books.waiting()

    def match(self, req: Any) -> PrefillShape:
        return self.books.match(req)

    def make_batch(self, reqs: Any) -> Any:
        return self._now().make_batch(reqs)

    def requests(self, batch: Any) -> Any:
        return self.books.requests(batch)

    def shapes(self, batch: Any) -> Any:
        return self.books.shapes(batch)

    def forward(self, batch: Any) -> Any:
        tokens = sum(shape.new_tokens for shape in batch.shapes)
        for layer in range(self.model.layers):
            for kind, duration_s in (("attention", self.model.attention_s), ("mlp", self.model.mlp_s)):
                self.device.launch((batch, kind, layer), duration_s(tokens))
                self.checkpoint()
        return SimpleNamespace(copy_done=None)

    def finish(self, task: PrefillTask) -> None:
        self._now().finish(task)

    def missing_tokens(self) -> int:
        return self.books.missing_tokens()

    def give_back(self, task: PrefillTask) -> None:
        self._now().give_back(task)

    def step(self) -> DecodeStep:
        streams = self.books.streams
        step = self._now().step()
        step_s = STEPS.predict_s(len(streams), streams.context_tokens)
        self.device.launch(("streams", "step", 0), step_s)
        self.device.synchronize()
        return step

    def finish_step(self, step: DecodeStep) -> None:
        self._now().finish_step(step)

    def _now(self) -> UnifiedEngine:
        self.books.now_s = self.device.now_s
        return self.books


def unified_turns_of_instance(requests: Sequence[SimRequest], policy: str, kv_tokens: int) -> Turns:
    recorder = UnifiedTurns()
    instance = UnifiedInstance(
        Machine(COST, kv_tokens),
        make_policy(policy, UNIFIED_LIMITS, 60.0),
        Preemption(),
        STEPS,
        DecodeLimits(),
        recorder=recorder,
    )
    instance.hub.stall_check_s = NOT_ASKED_ANEW
    simulate(requests, [instance], RoundRobin(1))
    return recorder.turns


def unified_turns_of_hub(requests: Sequence[SimRequest], policy: str, kv_tokens: int) -> Turns:
    prefills: Policy[WaitingRequest, PrefillTask] = make_policy(policy, UNIFIED_LIMITS, 60.0)
    colocated = ColocatedPolicy(prefills, STEPS, DecodeLimits())
    books = UnifiedEngine(Machine(COST, kv_tokens), Preemption(), colocated)
    device = Synchronous(0, HostCosts(0.0, 0.0, 0.0, 0.0, 0.0))
    engine = StreamingEngine(device, MODEL, requests, books)
    server = device.server = SimulatedServer(device, MODEL, (), engine=engine, colocated=colocated, decoder=engine)
    recorder = server.hub.recorder = UnifiedTurns()
    server.hub.stall_check_s = NOT_ASKED_ANEW
    sample_behind_the_last_operator(server)
    server.run_all()
    return recorder.turns


@pytest.mark.parametrize("policy", POLICIES)
def test_a_script_of_arrivals_and_streams_makes_the_same_turns_in_the_simulator_and_on_the_device(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_is_reserved_for_answers = property(lambda kv: 0.0, lambda kv, ratio: None)
    monkeypatch.setattr(OutputKv, "ratio", nothing_is_reserved_for_answers, raising=False)
    seen: Counter[str] = Counter()
    for seed, longest_tokens, kv_tokens in [(0, 2500, 4500), (1, 2500, 4500), (2, 200, 1200)]:
        simulated, ran = unified_script(seed, longest_tokens), unified_script(seed, longest_tokens)
        turns = unified_turns_of_instance(simulated, policy, kv_tokens)
        assert unified_turns_of_hub(ran, policy, kv_tokens) == turns
        for one, other in zip(simulated, ran, strict=True):
            assert one.first_token_s == pytest.approx(other.first_token_s, abs=1e-6)
            assert len(one.tbt_s) == one.output_tokens - 1
            assert one.tbt_s == pytest.approx(other.tbt_s, abs=1e-6)
        seen.update(turn for turn, _ in turns)
        prefills = Counter(index for turn, members in turns if turn == "complete" for index in members)
        seen["retract"] += prefills.total() - len(prefills)
    print(f"\n{policy}: {dict(seen)}")
    assert seen["suspend"] >= (0 if policy == "fcfs" else 5)
    assert seen["give back"] >= 1
    assert seen["retract"] >= 1
