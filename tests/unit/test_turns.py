"""The hub takes the same turns in the simulator as on a device: what runs is decided by the same code."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Sequence

import pytest

pytest.importorskip("sglang")

from sgl_flowprefill.bench.simulator.checkpoints import Preemption
from sgl_flowprefill.bench.simulator.cost import CostModel
from sgl_flowprefill.bench.simulator.engine import simulate
from sgl_flowprefill.bench.simulator.flowprefill import Blocking, FlowPrefillInstance
from sgl_flowprefill.bench.simulator.instance import Machine
from sgl_flowprefill.bench.simulator.requests import SimRequest
from sgl_flowprefill.bench.simulator.router import RoundRobin
from sgl_flowprefill.hub.parts import TTFT
from sgl_flowprefill.hub.task import PrefillTask
from sgl_flowprefill.policy import POLICIES, Limits, make_policy
from sgl_flowprefill.ttft import Prediction, PrefillShape
from tests.simulated_device import HostCosts, Model, SimulatedDevice, SimulatedRequest, SimulatedServer

COST = CostModel("line", layers=8, fixed_s=0.01, per_token_s=1e-4, per_pair_s=0.0, projection_share=0.5)
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

    def completed(self, task: PrefillTask, prediction: Prediction, ttft: TTFT, live_tasks: int) -> None:
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


def turns_of_hub(requests: Sequence[tuple[float, int, float]], policy: str) -> Turns:
    model = Model(
        COST.layers,
        attention_s=lambda tokens: 0.5 * COST.predict_s([PrefillShape(tokens)]) / COST.layers,
        mlp_s=lambda tokens: 0.5 * COST.predict_s([PrefillShape(tokens)]) / COST.layers,
    )
    device = Synchronous(0, HostCosts(0.0, 0.0, 0.0, 0.0, 0.0))
    arriving = [SimulatedRequest(str(index), *request) for index, request in enumerate(requests)]
    server = device.server = SimulatedServer(device, model, arriving, policy=make_policy(policy, LIMITS, 60.0))
    checkpoint, executor = server.engine.checkpoint, server.hub.executor

    def checkpoint_but_the_last() -> None:
        """A simulated forward pass is over with its last operator; here, its token is sampled behind that."""
        running = executor.running  # type: ignore[attr-defined]
        if running.checkpoint + 1 < 2 * COST.layers:
            checkpoint()
        else:
            running.checkpoint += 1
            device.synchronize()

    server.engine.checkpoint = checkpoint_but_the_last
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
