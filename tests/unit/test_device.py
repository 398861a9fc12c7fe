"""The device interface: on a simulated asynchronous device under the real hub, and its CUDA part on stand-in events."""

from __future__ import annotations

import ctypes
import math
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sgl_flowprefill.hub.device import CpuDevice, never
from sgl_flowprefill.hub.loop import Hub
from sgl_flowprefill.hub.parts import OneRank
from sgl_flowprefill.runtime import cuda_device
from sgl_flowprefill.runtime.cuda_device import CudaDevice, make_device

pytest.importorskip("sglang")

from sglang.srt.managers.scheduler import Scheduler

from sgl_flowprefill.hub.task import DecodeStep, PrefillTask, Tasks
from sgl_flowprefill.policy import ColocatedPolicy, DecodeLimits, Limits, make_policy
from sgl_flowprefill.policy import Stream as DecodeStream
from sgl_flowprefill.profiling.steps import LinearSteps
from sgl_flowprefill.runtime.event_recorder import EventRecorder
from sgl_flowprefill.runtime.executor import Executor
from sgl_flowprefill.runtime.prefill_role import PrefillRole
from sgl_flowprefill.runtime.scheduler import FlowPrefillScheduler
from sgl_flowprefill.runtime.wakeup import Wakeup
from tests.simulated_device import (
    HostCosts,
    Model,
    OnlyBackend,
    SimulatedDevice,
    SimulatedRequest,
    SimulatedServer,
    SimulatedSteps,
    simulate,
)

PR_GET_TIMERSLACK = 30

LLAMA_8B = Model(
    # Of the order of an H100's operators: products at some 500 TFLOP/s, attention growing with the prompt.
    layers=32,
    attention_s=lambda tokens: 40e-6 + tokens * 0.2e-6 + tokens**2 * 1.3e-11,
    mlp_s=lambda tokens: 60e-6 + tokens * 0.7e-6,
)


def mix(seed: int, count: int, gap_s: float) -> list[SimulatedRequest]:
    rng = random.Random(seed)
    now_s, requests = 0.0, []
    for index in range(count):
        now_s += rng.expovariate(1 / gap_s)
        tokens = rng.choice([600, 1000, 2000, 4000, 8000, 16000])
        requests.append(SimulatedRequest(f"r{index}", now_s, tokens, LLAMA_8B.forward_s(tokens) * rng.uniform(1.2, 4)))
    return requests


def idle_share(requests: Sequence[SimulatedRequest], server: SimulatedServer) -> float:
    idle_s, work_s = server.device.idle_s(requests)
    return float(idle_s / work_s)


def test_the_device_never_idles_while_there_is_work() -> None:
    shares, preemptions = {}, {}
    for lookahead in (0, 2):
        requests = mix(seed=7, count=60, gap_s=0.12)
        server = simulate(LLAMA_8B, requests, lookahead)
        assert all(request.answered_s < float("inf") for request in requests)
        shares[lookahead], preemptions[lookahead] = idle_share(requests, server), len(server.recorder.suspensions)
    print(f"\nidle share with 2 operators ahead {shares[2]:.4f}, synchronised at every operator {shares[0]:.4f}; "
          f"{preemptions[2]} preemptions")  # fmt: skip
    assert preemptions[2] >= 15
    assert shares[2] < 0.01
    assert shares[0] > 3 * shares[2]


def test_it_idles_when_the_finish_is_not_deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the deferred finish is worth: the same hub, made to wait for each result before it goes on."""
    shares = []
    for defer in (True, False):
        requests = mix(seed=3, count=60, gap_s=0.02)
        for request in requests:
            request.tokens = 600
        with monkeypatch.context() as patch:
            if not defer:
                patch.setattr(Hub, "finish_arrived", Hub.finish_done)
            shares.append(idle_share(requests, simulate(LLAMA_8B, requests, lookahead=2)))
    print(f"\nidle share of short prompts: finish deferred {shares[0]:.4f}, at once {shares[1]:.4f}")
    assert shares[0] < 0.8 * shares[1]


def test_nothing_that_is_read_back_waits_for_the_queue() -> None:
    """What plans from lengths on the host, and KV indices read beside the queue, are worth for short prompts."""
    shares = []
    for costs in (HostCosts(), HostCosts(plan_waits=True), HostCosts(plan_waits=True, send_waits=True)):
        requests = mix(seed=3, count=60, gap_s=0.02)
        for request in requests:
            request.tokens = 600
        shares.append(idle_share(requests, simulate(LLAMA_8B, requests, lookahead=2, costs=costs)))
    print(f"\nidle share of short prompts: {shares[0]:.4f}, with plans that wait {shares[1]:.4f}, and KV indices too "
          f"{shares[2]:.4f}")  # fmt: skip
    assert shares[0] < 0.01
    assert shares[0] < shares[1] < shares[2]


TBT_S = 0.06
STEP_S = 0.008


def serve_beside_streams() -> tuple[float, float, int]:
    """Long prompts on a server that has streams: the share of the time of prefills in which the device ran nothing, the
    longest gap between two tokens of a stream, and how many steps ran between the operators of a prefill.
    """
    requests = mix(seed=5, count=40, gap_s=0.4)
    for request in requests:
        request.tokens = max(4000, request.tokens // 2)  # operators of a millisecond at least
    device = SimulatedDevice(2, HostCosts())
    policy = make_policy("s-edf", Limits(max_suspended=16, max_batch_tokens=1), 60.0)
    colocated = ColocatedPolicy(policy, LinearSteps(STEP_S, 0.0, 0.0), DecodeLimits(margin_s=0.02))
    colocated.joined(DecodeStream(TBT_S, 500, 0.0) for _ in range(16))
    steps = SimulatedSteps(device, colocated, STEP_S)
    server = SimulatedServer(device, LLAMA_8B, requests, colocated=colocated, decoder=steps)
    while any(request.answered_s == math.inf for request in requests):
        server.hub.turn()
    running = []
    for request in requests:
        own = [operator for operator in device.operators if operator.label and request in as_batch(operator.label[0])]
        assert [operator.label[1:] for operator in own] == [
            *((kind, layer) for layer in range(LLAMA_8B.layers) for kind in ("attention", "mlp")),
            ("sample", 0),
        ]
        running.append(replace(request, arrival_s=own[0].start_s))
    inside = sum(
        operator.label is not None
        and operator.label[0] is steps
        and any(request.arrival_s < operator.start_s < request.ran_s for request in running)
        for operator in device.operators
    )
    idle_s, work_s = device.idle_s(running)
    return idle_s / work_s, max(later - earlier for earlier, later in pairwise(steps.ended_s)), inside


def as_batch(owner: Any) -> list[Any]:
    return owner if isinstance(owner, list) else []


def test_steps_between_operators_leave_the_device_no_idle_time_while_prefills_run() -> None:
    idle, longest_gap_s, inside = serve_beside_streams()
    print(f"\nidle while prefills run {idle:.4%}, with {inside} steps inside them; longest gap {longest_gap_s:.4f} s")
    assert inside >= 100
    assert idle == 0.0
    assert longest_gap_s <= TBT_S


def test_it_idles_when_the_tokens_of_a_step_are_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Hub.step

    def step_and_wait(hub: Any) -> None:
        step(hub)
        hub.finish_done()

    monkeypatch.setattr(Hub, "step", step_and_wait)
    idle, _, inside = serve_beside_streams()
    print(f"\nidle while prefills run, each step awaited: {idle:.4%}, with {inside} steps inside them")
    assert inside >= 100
    assert idle > 0.002


def test_streams_wait_when_the_result_of_a_step_interrupts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that is processed when the task is done, and not when it has arrived."""
    has_news = Hub.has_news

    def without_steps(hub: Any) -> bool:
        finishing = hub.work.tasks.finishing
        return False if finishing and isinstance(finishing[0], DecodeStep) else has_news(hub)

    monkeypatch.setattr(Hub, "has_news", without_steps)
    _, longest_gap_s, _ = serve_beside_streams()
    assert longest_gap_s > 2 * TBT_S


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_interleaving_keeps_the_order_and_the_bounds(data: st.DataObject) -> None:
    lookahead = data.draw(st.integers(0, 5), "lookahead")
    layers = data.draw(st.integers(1, 6), "layers")
    unit_s = data.draw(st.sampled_from([2e-5, 2e-4, 2e-3]), "operator time")
    costs = HostCosts(*(data.draw(st.sampled_from([0.0, 3e-5, 4e-4]), name) for name in HostCosts.__dataclass_fields__))
    model = Model(layers, lambda tokens: unit_s * tokens / 100, lambda tokens: unit_s * tokens / 40)
    requests = [
        SimulatedRequest(f"r{index}", arrival * unit_s, tokens, slo * unit_s)
        for index, (arrival, tokens, slo) in enumerate(
            data.draw(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 400), st.integers(1, 3000)), min_size=1,
                               max_size=12), "requests"))
    ]  # fmt: skip
    max_suspended = data.draw(st.integers(0, 6), "max_suspended")
    server = simulate(model, requests, lookahead, costs, max_suspended)
    device = server.device

    whole = [(kind, layer) for layer in range(layers) for kind in ("attention", "mlp")] + [("sample", 0)]
    for request in requests:
        assert request.trace == whole
        assert request.ran_s <= request.answered_s < float("inf")
    assert not server.hub.work.tasks
    # The attention state of a live task, and of one whose result is on its way, is nobody else's (asserted as it runs).
    assert server.engine.backends_made <= max_suspended + 2
    assert device.most_queued <= lookahead + 1
    assert device.events_made <= lookahead + 2 + len(requests)
    # A task's own time on the device, however often it was suspended, and without that of the tasks in between.
    for tokens, executed_s in server.times.observed:
        assert executed_s >= model.forward_s(tokens)

    starts_s: dict[str, float] = {}
    for operator in device.operators:
        if operator.label is not None:
            starts_s.setdefault(operator.label[0][0].rid, operator.start_s)
    for readable_s, rid in server.recorder.suspensions:
        ahead = [o for o in device.operators if o.label is not None and readable_s < o.start_s < starts_s[rid]]
        assert len([o for o in ahead if o.label[1] != "sample"]) <= max(1, lookahead), (
            "more operators than were queued started between an arrival and the task that it preempted another for"
        )


def executor_on(device: SimulatedDevice) -> Executor:
    """One whose tasks are suspended at their first preemption checkpoint."""
    return Executor(SimpleNamespace(attn_backend=None), lambda: True, device, capture=OnlyBackend.capture)


def test_a_task_that_ends_early_is_waited_for_and_not_what_others_have_queued_since() -> None:
    device = SimulatedDevice(2, HostCosts())
    executor, task = executor_on(device), PrefillTask(0, None, [], [], 0.0, 1.0, 0.1)

    def forward(batch: Any) -> None:
        device.launch("its own", 0.01)
        executor.checkpoint()

    executor.run(task, forward)
    end_s = device.busy_until_s
    device.launch("another's", 1.0)
    device.record()
    assert device.now_s < end_s
    executor.cancel(task)
    assert end_s <= device.now_s < device.busy_until_s


def test_what_a_task_queued_that_failed_before_its_first_interruption_point_is_waited_for() -> None:
    """Copies from the host buffers of its plan, which the next plan in its attention slot overwrites."""
    device = SimulatedDevice(2, HostCosts())
    executor, task = executor_on(device), PrefillTask(0, None, [], [], 0.0, 1.0, 0.1)

    def forward(batch: Any) -> None:
        device.launch("copies of a plan", 0.01)
        raise ValueError("no such adapter")

    executor.run(task, forward)
    assert task.failure is not None
    assert device.now_s < device.busy_until_s
    executor.cancel(task)
    assert device.now_s >= device.busy_until_s


class Stream:
    """Stand-in for a CUDA stream: events pass when told to."""

    def __init__(self) -> None:
        self.recorded: list[StreamEvent] = []
        self.passed = 0
        self.made = 0

    def event(self, enable_timing: bool = False) -> StreamEvent:
        self.made += 1
        return StreamEvent(self)


class StreamEvent:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._place = 0

    def record(self) -> None:
        self._stream.recorded.append(self)
        self._place = len(self._stream.recorded)

    def query(self) -> bool:
        return self._place <= self._stream.passed

    def synchronize(self) -> None:
        self._stream.passed = max(self._stream.passed, self._place)

    def elapsed_time(self, later: StreamEvent) -> float:
        assert later.query(), "CUDA refuses the time of what has not happened"
        return float(later._place - self._place)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream = Stream()
    monkeypatch.setattr(cuda_device.torch.cuda, "Event", stream.event)
    return stream


def test_cuda_waits_for_the_checkpoint_before_the_look_ahead(stream: Stream) -> None:
    device = CudaDevice(lookahead=2)
    for passed in range(40):
        device.record()
        if len(stream.recorded) > 2:
            interrupted = SimpleNamespace(times=0)

            def twice(count: SimpleNamespace = interrupted) -> bool:
                count.times += 1
                return count.times == 2

            assert not device.catch_up(twice), "the oldest of three operators has not run"
            stream.passed = passed - 1
        assert device.catch_up(never)
    assert stream.made <= 4, "events are reused"


def test_cuda_wakes_early_and_lets_other_threads_run(stream: Stream) -> None:
    device = CudaDevice(lookahead=0)
    device.record()
    arrived = threading.Event()
    threading.Timer(0.05, arrived.set).start()
    spins = 0

    def count() -> None:
        nonlocal spins
        while not arrived.is_set():
            spins += 1

    worker = threading.Thread(target=count)
    begin_s = time.monotonic()
    worker.start()
    assert not device.catch_up(arrived.is_set)
    assert time.monotonic() - begin_s < 1.0
    worker.join()
    assert spins > 1_000


def test_results_are_copied_behind_the_forward_pass_once(stream: Stream) -> None:
    device = CudaDevice(lookahead=2)
    copies: list[dict[str, bool]] = []
    result = SimpleNamespace(copy_done=None)

    def copy_to_cpu(**what: bool) -> None:
        copies.append(what)
        result.copy_done.record()

    result.copy_to_cpu = copy_to_cpu
    batch = SimpleNamespace(return_logprob=True, return_hidden_states=False)
    device.fetch(batch, result)
    assert copies == [{"return_logprob": True, "return_hidden_states": False}]
    assert not result.copy_done.query()
    device.fetch(batch, result)  # SGLang has copied already
    assert len(copies) == 1


def test_spans_are_timed_on_the_device(stream: Stream) -> None:
    device = CudaDevice(lookahead=2)
    begin = device.stamp()
    device.record()
    end = device.stamp()
    assert begin.seconds_until(end) == pytest.approx(2e-3)


def test_a_cpu_has_nothing_to_wait_for() -> None:
    device = make_device("cpu", 2)
    assert isinstance(device, CpuDevice)
    for _ in range(100):
        device.record()
        assert device.catch_up(lambda: True)
    assert device.wait(SimpleNamespace(query=never), lambda: True)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no timer slack")
def test_the_thread_that_waits_for_a_gpu_wakes_when_it_is_to() -> None:
    slack_ns: list[int] = []

    def wait() -> None:
        prctl = ctypes.CDLL(None).prctl
        make_device("cpu", 2)
        slack_ns.append(prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0))
        assert isinstance(make_device("cuda", 2), CudaDevice)
        slack_ns.append(prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0))

    waiter = threading.Thread(target=wait)
    waiter.start()
    waiter.join()
    usual_ns, set_ns = slack_ns
    assert set_ns == 1 < usual_ns


def test_only_indices_that_were_there_when_the_prefill_ran_are_read_beside_the_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is sent before its prefill has run, or was indexed again after that, must be read behind what writes it."""
    entered: list[str] = []
    sent: list[tuple[Any, bool, Any, list[str]]] = []

    @contextmanager
    def enter(stream: str) -> Iterator[None]:
        entered.append(stream)
        yield
        entered.pop()

    monkeypatch.setattr(cuda_device.torch.cuda, "Stream", lambda priority: "its own" if priority < 0 else "anyone's")
    monkeypatch.setattr(cuda_device.torch.cuda, "stream", enter)
    monkeypatch.setattr(Scheduler, "send_kv_chunk", lambda self, *args: sent.append((*args, list(entered))))
    scheduler = FlowPrefillScheduler.__new__(FlowPrefillScheduler)
    scheduler.output_streamer = SimpleNamespace(reports=None)
    scheduler.enable_hierarchical_cache = False
    scheduler.tree_cache = SimpleNamespace(evictable_size=lambda: 0, protected_size=lambda: 0)
    scheduler.role = PrefillRole(scheduler, 1.0, Tasks(), Wakeup(), CpuDevice(), OneRank(never), EventRecorder(None))
    for scheduler.role.device in (CudaDevice(lookahead=2), CpuDevice()):
        scheduler.send_kv_chunk("req", last_chunk=True)
        scheduler.send_kv_chunk("req", last_chunk=False, end_idx=7)
    scheduler.role.device = CudaDevice(lookahead=2)
    again = SimpleNamespace(kv=SimpleNamespace(cache_protected_len=0))
    with scheduler.role.noticing_new_indices(again):
        again.kv.cache_protected_len = 64
    scheduler.send_kv_chunk(again, last_chunk=True)
    scheduler.send_kv_chunk("req", last_chunk=True)
    assert sent == [
        ("req", True, None, ["its own"]),
        ("req", False, 7, []),
        ("req", True, None, []),
        ("req", False, 7, []),
        (again, True, None, []),
        ("req", True, None, ["its own"]),
    ]
