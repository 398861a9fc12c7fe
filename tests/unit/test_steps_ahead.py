"""Decode steps that are queued behind those in flight: the hub on the simulated device, what the policy knows of
them, and which steps can be.
"""

from __future__ import annotations

import math
import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.hub.ahead import LEAD_FACTOR, StepAhead
from sgl_flowprefill.hub.device import CpuDevice, HostStamp
from sgl_flowprefill.hub.parts import OneRank
from sgl_flowprefill.hub.task import DecodeStep, PrefillTask, Tasks
from sgl_flowprefill.policy import ColocatedPolicy, DecodeLimits, Limits, Stream, make_policy
from sgl_flowprefill.policy.decode import Streams
from sgl_flowprefill.profiling.steps import LinearSteps

pytest.importorskip("sglang")

from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from sgl_flowprefill.runtime import unified_role
from sgl_flowprefill.runtime.event_recorder import EventRecorder
from sgl_flowprefill.runtime.joint_unified import JointUnifiedRole
from sgl_flowprefill.runtime.unified_role import UnifiedRole
from sgl_flowprefill.runtime.wakeup import Wakeup
from tests.simulated_device import HostCosts, Model, SimulatedDevice, SimulatedRequest, SimulatedServer, SimulatedSteps

STEP_S = 0.008
STREAMS = 16
OF_A_PREFILL = Model(32, lambda tokens: tokens * 0.3e-6, lambda tokens: tokens * 0.7e-6)


class AtOnce(StepAhead):
    """A step is queued as soon as one is in flight."""

    @property
    def queue_at_s(self) -> float:
        return -math.inf


def streaming(ahead: StepAhead | None, requests: list[SimulatedRequest] | None = None) -> SimulatedServer:
    """A server with streams that have no end."""
    device = SimulatedDevice(2, HostCosts())
    policy = make_policy("s-edf", Limits(max_suspended=16, max_batch_tokens=1), 60.0)
    colocated = ColocatedPolicy(policy, LinearSteps(STEP_S, 0.0, 0.0), DecodeLimits(margin_s=0.02))
    colocated.joined(Stream(0.06, 500, 0.0) for _ in range(STREAMS))
    steps = SimulatedSteps(device, colocated, STEP_S)
    return SimulatedServer(device, OF_A_PREFILL, requests or [], colocated=colocated, decoder=steps, ahead=ahead)


def steps_of(server: SimulatedServer) -> SimulatedSteps:
    steps = server.hub.decoder
    assert isinstance(steps, SimulatedSteps)
    return steps


def step_to_step(server: SimulatedServer, count: int) -> None:
    while len(steps_of(server).ended_s) < count:
        assert server.hub.turn()


def idle_share(device: SimulatedDevice) -> float:
    idle_s = sum(max(0.0, later.start_s - one.end_s) for one, later in pairwise(device.operators))
    return idle_s / (device.operators[-1].end_s - device.operators[0].start_s)


def test_the_device_never_idles_between_two_steps_when_nothing_else_waits() -> None:
    shares, rates = [], []
    for ahead in (None, StepAhead()):
        server = streaming(ahead)
        step_to_step(server, 500)
        ended_s = steps_of(server).ended_s
        shares.append(idle_share(server.device))
        rates.append(STREAMS * 499 / (ended_s[-1] - ended_s[0]))
    print(f"\nidle {shares[0]:.2%}, with steps ahead {shares[1]:.2%}; {rates[0]:.0f} and {rates[1]:.0f} tokens/s")
    assert shares[0] > 0.05
    assert shares[1] == 0.0
    assert rates[1] > 1.05 * rates[0]


def test_results_are_processed_in_their_order_when_they_have_come_and_one_step_is_ahead_at_most() -> None:
    server = streaming(StepAhead())
    hub, steps = server.hub, steps_of(server)
    queued: list[DecodeStep] = []
    processed: list[DecodeStep] = []
    step, finish_step = steps.step, steps.finish_step

    def noted_step() -> DecodeStep:
        queued.append(step())
        assert len(queued) - len(processed) <= 2
        return queued[-1]

    def noted_finish(done: DecodeStep) -> None:
        assert done.result.copy_done.query()
        processed.append(done)
        finish_step(done)

    steps.step, steps.finish_step = noted_step, noted_finish  # type: ignore[method-assign]
    step_to_step(server, 50)
    assert processed == queued[: len(processed)]
    assert [one.is_ahead for one in processed] == [False] + [True] * 49
    server.device.synchronize()
    hub.finish_done()
    assert hub.work.tasks.step is None
    assert hub.work.colocated.step is None


def waits_s(ahead: StepAhead) -> list[float]:
    """How long requests wait for their first operators that come now and then, while streams decode."""
    rng = random.Random(3)
    requests = [SimulatedRequest(f"r{i}", 0.2 + 0.2 * i + 0.1 * rng.random(), 600, 5.0) for i in range(60)]
    server = streaming(ahead, requests)
    while any(request.answered_s == math.inf for request in requests):
        server.hub.turn()
    starts_s: dict[str, float] = {}
    for operator in server.device.operators:
        if operator.label is not None and isinstance(operator.label[0], list):
            starts_s.setdefault(operator.label[0][0].rid, operator.start_s)
    return [starts_s[request.rid] - request.arrival_s for request in requests]


def test_a_step_is_queued_so_late_that_few_arrivals_wait_for_more_than_the_one_that_runs() -> None:
    late, at_once = waits_s(StepAhead()), waits_s(AtOnce())
    shares = [sum(wait_s > 1.02 * STEP_S for wait_s in waits) / len(waits) for waits in (late, at_once)]
    print(f"\nwait for more than a step: {shares[0]:.0%}, {shares[1]:.0%} where the next one is queued at once")
    assert shares[0] < 0.35
    assert shares[1] > 0.6
    assert max(*late, *at_once) < 2 * STEP_S + 0.003


def test_after_a_prefill_steps_are_queued_as_late_as_before() -> None:
    """The first one waits for the prefill's operators, and the device may wait for its begin."""
    requests = [SimulatedRequest(f"r{i}", 0.2 + 0.1 * i, 600, 5.0) for i in range(10)]
    server = streaming(StepAhead(), requests)
    steps = steps_of(server)
    step, left_s = steps.step, []

    def noted_step() -> DecodeStep:
        if server.hub.work.tasks.step is not None and server.device.now_s > 0.1:
            left_s.append(server.device.busy_until_s - server.device.now_s)
        return step()

    steps.step = noted_step  # type: ignore[method-assign]
    while server.device.now_s < 1.5:
        server.hub.turn()
    assert all(request.answered_s < math.inf for request in requests)
    assert len(left_s) > 50
    assert max(left_s) < STEP_S / 2


def test_no_step_is_ahead_while_a_prefill_can_run() -> None:
    requests = [SimulatedRequest("r", 0.1, 8000, 5.0)]
    server = streaming(AtOnce(), requests)
    steps = steps_of(server)
    step = steps.step

    def noted_step() -> DecodeStep:
        if server.hub.work.tasks.live:
            assert server.hub.work.tasks.step is None
        return step()

    steps.step = noted_step  # type: ignore[method-assign]
    while requests[0].answered_s == math.inf:
        server.hub.turn()


def test_a_step_waits_for_the_result_of_the_one_before_where_its_decoder_says_so() -> None:
    server = streaming(AtOnce())
    steps = steps_of(server)
    steps.can_step_ahead = lambda: False  # type: ignore[method-assign]
    assert server.hub.turn()
    for _ in range(200):
        server.hub.turn()
        assert not any(one.is_ahead for one in server.hub.work.tasks.finishing if isinstance(one, DecodeStep))
    assert len(steps.ended_s) > 50


def test_where_a_step_lacks_kv_cache_the_one_in_flight_ends_first_and_what_runs_is_chosen_anew() -> None:
    """Streams that end with it free some; whoever has to give up KV cache for it is to have its last token first, and
    requests that had found none may start then.
    """
    server = streaming(AtOnce())
    hub, steps = server.hub, steps_of(server)
    missing = iter([100, 0])
    assert hub.turn()
    assert hub.work.tasks.step is not None
    steps.missing_tokens = lambda: next(missing)  # type: ignore[method-assign]
    step, in_flight = steps.step, []

    def noted_step() -> DecodeStep:
        in_flight.append(hub.work.tasks.step)
        return step()

    steps.step = noted_step  # type: ignore[method-assign]
    assert hub.turn()
    assert (in_flight, len(steps.ended_s)) == ([], 1)
    assert hub.turn()
    assert (in_flight, len(steps.ended_s)) == ([None], 1)
    assert next(missing) == 0, "nothing is in flight, and no prefill has started: it is not asked again"


# ---- when ------------------------------------------------------------------------------------------------------------


def step_of(executed_s: float, is_ahead: bool, queueing_s: float = 0.0) -> DecodeStep:
    spans = [(HostStamp(1.0), HostStamp(1.0 + executed_s))]
    return DecodeStep(SimpleNamespace(copy_done=None), spans=spans, is_ahead=is_ahead, queueing_s=queueing_s)


def test_a_step_is_queued_as_long_before_the_end_of_the_one_in_flight_as_the_host_took_for_the_last_ones() -> None:
    ahead = StepAhead()
    assert ahead.queue_at_s == -math.inf, "nothing is known of any"
    first, second, third = step_of(0.01, False, 0.003), step_of(0.008, True), step_of(0.008, True)
    ahead.queued(first, looked_s=0.9, now_s=1.0)
    assert ahead.queue_at_s == -math.inf, "what a step takes the host that was not queued ahead says nothing"
    ahead.queued(second, looked_s=1.002, now_s=1.003)
    ahead.arrived(first, now_s=1.011)
    assert ahead.queue_at_s == pytest.approx(1.011 + 0.007 - LEAD_FACTOR * 0.001), "it may have waited for the host"
    ahead.queued(third, looked_s=1.012, now_s=1.014)
    ahead.arrived(second, now_s=1.019)
    assert ahead.queue_at_s == pytest.approx(1.019 + 0.008 - LEAD_FACTOR * 0.002)


def test_one_long_turn_of_the_host_has_no_step_queued_earlier() -> None:
    ahead = StepAhead()
    for took_s in (*[0.001] * 20, 0.006, *[0.001] * 5):
        ahead.queued(step_of(0.008, True), looked_s=1.0, now_s=1.0 + took_s)
    ahead.arrived(step_of(0.008, True), now_s=1.009)
    assert ahead.queue_at_s == pytest.approx(1.009 + 0.008 - LEAD_FACTOR * 0.001)


def test_a_step_that_was_not_queued_in_time_is_not_waited_for_again() -> None:
    """Streams have become fewer, so that steps end earlier than the last of them that were ahead."""
    ahead = StepAhead()
    for _ in range(2):
        ahead.queued(step_of(0.03, True), looked_s=0.999, now_s=1.0)
    ahead.arrived(step_of(0.03, True), now_s=1.03)
    late = step_of(0.004, False, 0.001)
    ahead.queued(late, looked_s=1.03, now_s=1.031)
    ahead.arrived(late, now_s=1.034)
    ahead.queued(step_of(0.003, False), looked_s=1.034, now_s=1.035)
    assert ahead.queue_at_s == pytest.approx(1.035 + 0.003 - LEAD_FACTOR * 0.001)


def test_a_step_behind_a_prefill_begins_when_that_is_over() -> None:
    ahead = StepAhead()
    ahead.queued(step_of(0.008, True), looked_s=0.999, now_s=1.0)
    ahead.arrived(step_of(0.008, True), now_s=1.008)
    ahead.queued(step_of(0.008, False), looked_s=1.01, now_s=1.011)
    ahead.arrived(PrefillTask(0, None, [], [], 0.0, 1.0, 0.1), now_s=1.02)
    assert ahead.queue_at_s == pytest.approx(1.02 + 0.008 - LEAD_FACTOR * 0.001)


# ---- what the policy knows -------------------------------------------------------------------------------------------


def test_streams_count_what_two_steps_in_flight_compute() -> None:
    streams = Streams()
    first, second = Stream(0.1, 10, 0.0), Stream(0.1, 20, 0.0)
    streams.join(first)
    streams.begin_step()
    streams.join(second)
    streams.begin_step()
    assert streams.late_tokens(0.05) == (1, 0), "the one that has joined takes part in the second one"
    streams.stepped(0.05)
    assert (streams.context_of(first), streams.context_of(second)) == (11, 20)
    assert streams.late_tokens(0.12) == (2, 1)
    streams.leave(first)  # it ended with the first step
    assert streams.late_tokens(0.12) == (1, 1)
    streams.stepped(0.12)
    assert (streams.requests, streams.context_tokens, streams.context_of(second)) == (1, 21, 21)
    assert streams.last_token_s(second) == 0.12
    streams.leave(second)
    assert streams.tightest_s() == math.inf


@pytest.mark.parametrize("is_followed", [False, True])
def test_a_step_takes_until_its_tokens_are_handed_out_whether_or_not_another_is_queued_behind_it(
    is_followed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a step has to begin follows from what the policy learns, however it ran."""
    now_s, learned = [2.0], []
    monkeypatch.setattr("time.monotonic", lambda: now_s[0])
    role = role_of(UnifiedRole, batch_of(req_of()))
    monkeypatch.setattr(role, "ended_streams", list)
    role.scheduler.running_batch.filter_batch = lambda: None
    role.scheduler.process_batch_result = lambda batch, result: now_s.insert(0, now_s[0] + 0.001)
    role.policy = SimpleNamespace(
        step=SimpleNamespace(requests=1, begin_s=1.0, load=SimpleNamespace(start_by_s=math.inf)),
        streams=SimpleNamespace(late_tokens=lambda end_s: (1, 0)),
        stepped=lambda end_s, ended, took_s: learned.append(took_s),
    )
    if is_followed:
        role.tasks.finishing.append(step_of(0.008, True))
    role.finish_step(step_of(0.008, False))
    assert learned == [pytest.approx(0.009)]
    assert role.step_s == pytest.approx(0.008 if is_followed else 0.009), "what others wait for"


def colocated_of(steps_s: float) -> ColocatedPolicy[Any, Any]:
    prefills: Any = make_policy("s-edf", Limits(max_suspended=1, max_batch_tokens=1), 60.0)
    return ColocatedPolicy(prefills, LinearSteps(steps_s, 0.0, 0.0), DecodeLimits())


def test_a_step_that_is_queued_ahead_begins_when_the_one_before_has_ended_and_shows_no_lateness() -> None:
    policy = colocated_of(0.01)
    policy.joined([Stream(0.05, 10, 0.0)])
    policy.began(0.0)
    margin_s = policy.margin.value_s()
    policy.began(0.008)
    assert policy.step is not None
    assert policy.step.begin_s == 0.0
    assert policy.step_by_s == math.inf
    assert not policy.may_step
    policy.stepped(0.01)
    assert policy.step is not None
    assert policy.step.begin_s == 0.01
    assert policy.step.load.start_by_s == math.inf
    policy.stepped(0.5)
    assert policy.step is None
    assert policy.may_step
    assert policy.margin.value_s() == margin_s


def test_two_steps_are_in_flight_at_most() -> None:
    policy = colocated_of(0.01)
    policy.joined([Stream(0.05, 10, 0.0)])
    policy.began(0.0)
    policy.began(0.001)
    with pytest.raises(AssertionError, match="one is queued behind it"):
        policy.began(0.002)


# ---- whose tokens have to be read first ------------------------------------------------------------------------------


def req_of(ends: bool = False) -> Any:
    """A request that ends with its next token, or does not."""
    return SimpleNamespace(next_output_finishes_by_length=lambda: ends)


def batch_of(*reqs: Any, grammar: bool = False, penalty: bool = False, processor: bool = False) -> Any:
    """SGLang's batch, whose requests have such."""
    sampling_info = SimpleNamespace(
        penalizer_orchestrator=SimpleNamespace(is_required=penalty), has_custom_logit_processor=processor
    )
    return SimpleNamespace(
        reqs=list(reqs),
        is_empty=lambda: not reqs,
        has_grammar=grammar,
        sampling_info=sampling_info if reqs else None,
    )


def model_runner(backend: str, *captured: int, window: bool = False) -> Any:
    """SGLang's, with graphs that were captured for so many streams, or none."""
    eager = SimpleNamespace()
    return SimpleNamespace(
        decode_attention_backend_str=backend,
        decode_cuda_graph_runner=SimpleNamespace(capture_bs=list(captured)) if captured else eager,
        eager_runner=eager,
        token_to_kv_pool=SWAKVPool.__new__(SWAKVPool) if window else None,
    )


def role_of(role: type[UnifiedRole], running: Any, *joining: Any) -> Any:
    worker = SimpleNamespace(model_runner=model_runner("triton"))
    scheduler = SimpleNamespace(
        enable_hierarchical_cache=False, waiting_queue=[], running_batch=running, tp_worker=worker
    )
    parts = FlowPrefillConfig().default_ttft_slo, Tasks(), Wakeup(), CpuDevice(), OneRank(lambda: False)
    made: Any = role(scheduler, *parts, EventRecorder(None))  # type: ignore[arg-type]
    made.joining += joining
    return made


@pytest.mark.parametrize("needs", ["grammar", "penalty", "processor"])
def test_a_step_waits_for_tokens_that_a_stream_needs_on_the_host(needs: str) -> None:
    plain = batch_of(req_of(), req_of(ends=True))
    assert role_of(UnifiedRole, plain).can_step_ahead()
    assert role_of(UnifiedRole, plain, batch_of(req_of())).can_step_ahead()
    special = batch_of(req_of(), **{needs: True})
    assert not role_of(UnifiedRole, special).can_step_ahead()
    assert not role_of(UnifiedRole, plain, special).can_step_ahead()


def test_no_step_is_ahead_of_the_last_tokens_of_all_streams() -> None:
    ending = batch_of(req_of(ends=True), req_of(ends=True))
    assert not role_of(UnifiedRole, ending).can_step_ahead()
    assert not role_of(UnifiedRole, batch_of()).can_step_ahead(), "those of the step in flight have ended"
    assert role_of(UnifiedRole, ending, batch_of(req_of(ends=True))).can_step_ahead(), "it is not in the step in flight"


def test_no_step_is_ahead_of_a_last_token_that_may_make_room_for_a_request_that_waits() -> None:
    going_on, ending = batch_of(req_of()), batch_of(req_of(), req_of(ends=True))
    for running, joining, may_be in ((going_on, (), True), (ending, (), False), (ending, (going_on,), False)):
        role = role_of(UnifiedRole, running, *joining)
        assert role.can_step_ahead()
        role.scheduler.waiting_queue.append(SimpleNamespace())
        assert role.can_step_ahead() == may_be


@pytest.mark.parametrize(
    ("runner", "may_be"),
    [
        (model_runner("triton", window=True), True),
        (model_runner("flashinfer", 1, 2, 4), True),
        (model_runner("flashinfer", 1, 2), False),
        (model_runner("flashinfer"), False),
        (model_runner("flashinfer", 1, 2, 4, window=True), False),
    ],
)
def test_no_step_is_ahead_for_which_the_host_waits_for_the_device(runner: Any, may_be: bool) -> None:
    role = role_of(UnifiedRole, batch_of(req_of(), req_of()), batch_of(req_of()))
    role.scheduler.tp_worker.model_runner = runner
    assert role.can_step_ahead() == may_be


def test_steps_are_queued_ahead_where_a_device_keeps_a_queue_and_a_step_writes_kv_cache_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writes_kv_alone = True
    monkeypatch.setattr(unified_role, "writes_kv_alone", lambda model_runner: writes_kv_alone)
    role, joint = (role_of(kind, batch_of()) for kind in (UnifiedRole, JointUnifiedRole))
    role.scheduler.tp_worker = SimpleNamespace(model_runner=None)
    assert not role.steps_ahead, "on the CPU, no step is in flight when the next one is chosen"
    role.device = joint.device = SimulatedDevice(2, HostCosts())
    assert role.steps_ahead
    assert not joint.steps_ahead
    role.device = SimulatedDevice(0, HostCosts())
    assert not role.steps_ahead, "each step would wait for the end of the one before"
    role.device = joint.device
    writes_kv_alone = False
    assert not role.steps_ahead
