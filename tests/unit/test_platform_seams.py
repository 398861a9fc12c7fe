"""Seams of the platform: each refuses a target of another shape, and does what it is for on one that fits."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch
import zmq
from hypothesis import given
from hypothesis import strategies as st
from sglang.api.v1 import api_types
from sglang.srt.disaggregation.common.conn import CommonKVManager
from sglang.srt.entrypoints.api_contract import generate_contract_error
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache import common
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.sampling.sampling_params import SamplingParams

from sgl_flowprefill.config import (
    ENV_DECODE_SLEEP,
    ENV_SCHEDULER_CPUS,
    ENV_SWITCH,
    ConfigError,
    FlowPrefillConfig,
)
from sgl_flowprefill.contract import installed, supported
from sgl_flowprefill.patches import (
    affinity,
    attention_choice,
    cpu_tp,
    decode_idle,
    decode_order,
    handed_back,
    lone_prefill,
    made_weights,
    nixl_dram,
    nixl_sleep,
    page_indices,
    static_memory,
    token_ids,
    wakeups,
)
from sgl_flowprefill.patches.base import SeamError
from sgl_flowprefill.policy.places import PlaceOrder
from sgl_flowprefill.runtime import kv_share
from sgl_flowprefill.slo import Objective
from sgl_flowprefill.slo.asked import body_ask
from sgl_flowprefill.slo.resolve import Ask
from tests import warm


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    monkeypatch.setenv(ENV_SCHEDULER_CPUS, str(min(os.sched_getaffinity(0))))


def other_shape(*_anything: Any) -> None:
    """What a future SGLang might put in a target's place."""


def apply_decode_order() -> None:
    decode_order.apply(FlowPrefillConfig())


NIXL_AGENT_INIT = "nixl._api.nixl_agent.__init__"

SEAMS: list[tuple[Callable[[], None], str]] = [
    (nixl_dram.apply, nixl_dram.TARGET),
    (nixl_dram.apply, NIXL_AGENT_INIT),
    (cpu_tp.apply, cpu_tp.TARGET),
    (cpu_tp.apply, "sglang.srt.model_executor.model_runner.ModelRunner.load_model"),
    (nixl_sleep.apply, NIXL_AGENT_INIT),
    (token_ids.apply, token_ids.TARGET),
    (decode_idle.apply, decode_idle.ON_IDLE),
    (decode_idle.apply, "sglang.srt.managers.scheduler.Scheduler.event_loop_normal_disagg_decode"),
    (decode_idle.apply, "sglang.srt.managers.scheduler.Scheduler.event_loop_overlap_disagg_decode"),
    (wakeups.apply, wakeups.TARGET),
    (affinity.apply, affinity.TARGET),
    (affinity.apply, "sglang.srt.managers.scheduler.run_scheduler_process"),
    (apply_decode_order, decode_order.TARGET),
    (handed_back.apply, handed_back.TARGET),
    (page_indices.apply, page_indices.TARGET),
    (lone_prefill.apply, lone_prefill.TARGET),
    (made_weights.apply, made_weights.TARGET),
    (static_memory.apply, static_memory.TARGET),
    (attention_choice.apply, attention_choice.DEFAULT),
    (attention_choice.apply, attention_choice.OF_MODELS),
    (kv_share.apply, kv_share.TARGET),
]


@pytest.mark.parametrize(
    ("apply", "target"), SEAMS, ids=[target.rsplit(".", 2)[-1] + str(i) for i, (_, target) in enumerate(SEAMS)]
)
def test_a_changed_target_is_refused_by_name(
    apply: Callable[[], None], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, other_shape)
    with pytest.raises(SeamError, match=target.rsplit(".", 1)[0]) as refusal:
        apply()
    assert f"SGLang {installed()}" in str(refusal.value)
    assert f"Install sglang{supported()}" in str(refusal.value)
    assert not HookRegistry._hooks


@pytest.mark.parametrize(
    "apply",
    [
        *(nixl_dram.apply, nixl_sleep.apply, cpu_tp.apply, wakeups.apply, decode_idle.apply, affinity.apply),
        *(token_ids.apply, apply_decode_order, handed_back.apply, lone_prefill.apply, made_weights.apply),
        *(static_memory.apply, kv_share.apply, attention_choice.apply, page_indices.apply),
    ],
)
def test_the_installed_sglang_has_the_expected_shape(apply: Callable[[], None]) -> None:
    apply()
    assert HookRegistry._hooks


def test_kv_memory_is_named_host_memory() -> None:
    manager = SimpleNamespace(agent=SimpleNamespace(nixl_mems={"DRAM": 1, "VRAM": 2}))
    nixl_dram.name_host_memory(manager)
    assert manager.agent.nixl_mems == {"DRAM": 1, "VRAM": 1}


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda values: st.lists(values, max_size=4),
    max_leaves=6,
)


@given(JSON_VALUES | st.lists(st.integers(), max_size=8) | st.lists(st.integers() | st.booleans(), max_size=4))
def test_token_ids_are_checked_as_by_sglang(value: Any) -> None:
    before = generate_contract_error({"input_ids": value})
    whole: list[int] = []

    def decode(value: Any) -> list[int]:
        ids = token_ids.decode(one_by_one, value)
        whole.extend(ids)
        return ids

    one_by_one = api_types.decode_TokenIds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_ids.TARGET, decode)
        assert generate_contract_error({"input_ids": value}) == before
        if before is None and value and not isinstance(value[0], list):
            assert whole == value  # this is what SGLang calls
            assert token_ids.decode(lambda _: [], value) == value


def idle_agent_cpu_s() -> float:
    """CPU time of a process with an agent, in two seconds in which nothing happens."""
    nixl_sleep.apply()
    HookRegistry.apply_hooks()
    from nixl._api import nixl_agent, nixl_agent_config

    agent = nixl_agent("sleeper", nixl_agent_config(backends=["UCX"]))
    time.sleep(0.5)
    before = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(2)
    after = resource.getrusage(resource.RUSAGE_SELF)
    del agent
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_an_idle_nixl_agent_uses_no_cpu() -> None:
    assert warm.call(idle_agent_cpu_s) < 0.2


class IdleScheduler:
    """The parts of a decode scheduler that its sleeper looks at, with real sockets."""

    def __init__(self) -> None:
        context = zmq.Context.instance()
        self.requests, self.client = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        port = self.requests.bind_to_random_port("tcp://127.0.0.1")
        self.client.connect(f"tcp://127.0.0.1:{port}")
        self.ipc_channels = SimpleNamespace(recv_from_tokenizer=self.requests, recv_from_rpc=None)
        self.disagg_decode_prealloc_queue = SimpleNamespace(pending_reqs=[])
        self.attn_dp_enabled = False
        self.forward_ct = 0
        self.idle = True

    def is_fully_idle(self) -> bool:
        return self.idle


@pytest.fixture
def scheduler() -> Iterator[IdleScheduler]:
    scheduler = IdleScheduler()
    yield scheduler
    scheduler.requests.close(0)
    scheduler.client.close(0)


@pytest.fixture
def wakeup() -> Iterator[int]:
    descriptor = os.eventfd(0, os.EFD_NONBLOCK)
    yield descriptor
    os.close(descriptor)


def slept_s(sleeper: decode_idle.DecodeSleeper) -> float:
    start = time.monotonic()
    sleeper.sleep()
    return time.monotonic() - start


def hears_of_transfers() -> bool:
    """Whether a process that runs a scheduler hears of them, with the plugin in the environment that is now."""
    import sglang.srt.managers.scheduler  # noqa: F401 - what tells the plugin that this process runs one
    from sglang.srt.plugins import load_plugins

    load_plugins()
    return hasattr(CommonKVManager.update_status, "__wrapped__")


@pytest.mark.parametrize(("variables", "hears"), [({}, False), ({ENV_DECODE_SLEEP: "1"}, True)])
def test_who_has_nothing_of_the_plugin_on_has_no_hook(
    variables: Mapping[str, str], hears: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (ENV_SWITCH, ENV_DECODE_SLEEP):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert warm.call(hears_of_transfers) is hears


def test_a_request_ends_the_sleep(scheduler: IdleScheduler, wakeup: int) -> None:
    sleeper = decode_idle.DecodeSleeper(scheduler, wakeup)
    threading.Timer(0.1, lambda: scheduler.client.send(b"request")).start()
    assert slept_s(sleeper) < 0.6


def test_a_transfer_status_ends_the_sleep_even_when_it_came_before(scheduler: IdleScheduler, wakeup: int) -> None:
    sleeper = decode_idle.DecodeSleeper(scheduler, wakeup)
    os.eventfd_write(wakeup, 1)
    assert slept_s(sleeper) < 0.5
    threading.Timer(0.1, lambda: os.eventfd_write(wakeup, 1)).start()
    assert slept_s(sleeper) < 0.6
    assert slept_s(sleeper) > 0.9  # each status wakes once


def test_a_rank_without_sockets_leaves_the_waiting_to_the_broadcast(scheduler: IdleScheduler, wakeup: int) -> None:
    scheduler.ipc_channels.recv_from_tokenizer = None
    sleeper = decode_idle.DecodeSleeper(scheduler, wakeup)
    assert slept_s(sleeper) < 0.1
    scheduler.disagg_decode_prealloc_queue.pending_reqs.append("request")
    assert sum(slept_s(sleeper) for _ in range(9)) < 0.1


def test_a_rank_that_others_meet_in_each_round_keeps_none_waiting(scheduler: IdleScheduler, wakeup: int) -> None:
    """With data-parallel attention, where each has sockets."""
    scheduler.attn_dp_enabled = True
    sleeper = decode_idle.DecodeSleeper(scheduler, wakeup)
    assert sum(slept_s(sleeper) for _ in range(9)) < 0.1
    scheduler.disagg_decode_prealloc_queue.pending_reqs.append("request")
    assert sum(slept_s(sleeper) for _ in range(9)) < 0.1


def test_waiting_requests_are_looked_at_soon_and_then_less_often(scheduler: IdleScheduler, wakeup: int) -> None:
    sleeper = decode_idle.DecodeSleeper(scheduler, wakeup)
    scheduler.disagg_decode_prealloc_queue.pending_reqs.append("request")
    waits = [slept_s(sleeper) for _ in range(9)]
    assert waits[0] < 0.05
    assert 0.05 < waits[-1] < 0.5
    scheduler.forward_ct += 1
    assert slept_s(sleeper) < 0.05


@pytest.mark.parametrize(("text", "cpus"), [("0", {0}), ("0,2-3", {0, 2, 3}), ("1-2", {1, 2})])
def test_cpu_lists(text: str, cpus: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert affinity.parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["a", "", "7", "0-9", "3-2"])
def test_cpus_that_are_not_there_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(ConfigError, match=ENV_SCHEDULER_CPUS):
        affinity.parse_cpus(text)


def bound() -> tuple[int, list[set[int]], int]:
    """A CPU that this process was bound to, those of each of its threads, and the number of PyTorch's threads."""
    stop = threading.Event()
    threading.Thread(target=stop.wait).start()
    torch.set_num_threads(2)
    cpu = min(os.sched_getaffinity(0))
    affinity.bind({cpu})
    threads = [os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")]
    stop.set()
    return cpu, threads, torch.get_num_threads()


def test_binding_covers_every_thread_and_the_number_of_torch_threads() -> None:
    cpu, threads, torch_threads = warm.call(bound)
    assert len(threads) > 1
    assert all(cpus == {cpu} for cpus in threads), threads
    assert torch_threads == 1


@pytest.mark.parametrize(
    ("custom_params", "asked"),
    [
        (Objective(0.3, 0.05, "vip", "policy file", 2.0).to_custom_params(), Ask("body", 0.3, 0.05)),
        ({"ttft_slo": 0.3}, None),  # of a request that no HTTP process has resolved
        (None, None),
    ],
)
def test_a_stream_that_is_handed_back_asks_for_what_it_was_promised(custom_params: Any, asked: Ask | None) -> None:
    handed_back.apply()
    ((_, keep, _),) = HookRegistry._hooks[handed_back.TARGET]
    stream: Any = SimpleNamespace(
        sampling_params=SamplingParams(custom_params=custom_params),
        origin_input_ids=[1, 2],
        output_ids=[3],
        rid="r",
        bootstrap_host="localhost",
        bootstrap_port=1,
        bootstrap_room=2,
        priority=None,
        extra_key=None,
        cache_salt=None,
        routing_key=None,
        disagg_prefill_dp_rank=None,
    )
    payload = Req.build_rebootstrap_payload(stream)
    assert "custom_params" not in payload["sampling_params"], "SGLang passes them on: the seam is not needed"
    keep(payload, stream)
    params = payload["sampling_params"].get("custom_params")
    assert (None if params is None else body_ask(params)) == asked


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_page_indices_that_the_host_divides_are_sglangs(page_size: int, dtype: torch.dtype) -> None:
    page_indices.apply()
    ((_, read, _),) = HookRegistry._hooks[page_indices.TARGET]
    pages = torch.randperm(40, dtype=dtype)
    row = (pages[:, None] * page_size + torch.arange(page_size, dtype=dtype)).flatten()
    for tokens in (0, 1, page_size, 3 * page_size + 1, len(row)):
        indices = row[:tokens]
        found, expected = read(indices, page_size), common.kv_to_page_indices(indices, page_size)
        assert found.dtype == expected.dtype
        assert found.tolist() == expected.tolist()
    row.zero_()
    assert found.tolist() == pages.tolist(), "what is sent is what was there"


def test_a_gpu_is_asked_for_a_copy_of_kv_indices_and_for_nothing_else() -> None:
    """A division there would be a kernel that waits for the one that runs."""
    copied: list[torch.Tensor] = []

    class OnAGpu:
        def cpu(self) -> torch.Tensor:
            copied.append(torch.arange(32, dtype=torch.int32))
            return copied[-1]

    assert page_indices.read_page_indices(OnAGpu(), 16).tolist() == [0, 1]  # type: ignore[arg-type]
    assert len(copied) == 1


def waiting_request(rid: str, arrival_s: float, custom_params: Any) -> SimpleNamespace:
    req = SimpleNamespace(
        rid=rid,
        time_stats=SimpleNamespace(flowprefill_received_s=arrival_s),
        sampling_params=SimpleNamespace(custom_params=custom_params),
    )
    return SimpleNamespace(req=req)


def test_the_queue_is_in_order_when_places_are_given_out() -> None:
    decode_order.apply(FlowPrefillConfig(default_ttft_slo=3.0))
    ((_, pop, _),) = HookRegistry._hooks[decode_order.TARGET]
    queue = SimpleNamespace(
        queue=[
            waiting_request("relaxed", 10.0, {"ttft_slo": 20.0}),
            waiting_request("default", 11.0, None),
            waiting_request("urgent", 12.0, {"ttft_slo": 0.5}),
            waiting_request("invalid", 10.5, {"ttft_slo": "soon"}),  # as if it named none
        ]
    )
    seen: list[str] = []

    def original(queue: Any) -> tuple[list[Any], list[Any]]:
        seen.extend(entry.req.rid for entry in queue.queue)
        return [queue.queue.pop(0)], []

    given, failed = pop(original, queue)
    assert seen == ["urgent", "invalid", "default", "relaxed"]
    assert [entry.req.rid for entry in given] == ["urgent"]
    assert not failed


def test_without_times_from_the_http_server_the_order_stays() -> None:
    decode_order.apply(FlowPrefillConfig())
    ((_, pop, _),) = HookRegistry._hooks[decode_order.TARGET]
    queue = SimpleNamespace(
        queue=[waiting_request("first", 0.0, None), waiting_request("second", 0.0, {"ttft_slo": 0.5})]
    )
    pop(lambda _queue: ([], []), queue)
    assert [entry.req.rid for entry in queue.queue] == ["first", "second"]


class PreallocQueue:
    """SGLang's queue as a decode server changes it: by appending and by what ``pop_preallocated`` takes out."""

    def __init__(self) -> None:
        decode_order.apply(FlowPrefillConfig())
        ((_, self._hook, _),) = HookRegistry._hooks[decode_order.TARGET]
        self.queue: list[Any] = []
        self.seen: list[str] = []

    def add(self, rid: str, arrival_s: float, slo_s: float) -> None:
        self.queue.append(waiting_request(rid, arrival_s, {"ttft_slo": slo_s}))

    def pop(self, places: int = 0, failed: str | None = None) -> list[str]:
        """Give out ``places``; who got one."""

        def original(queue: PreallocQueue) -> tuple[list[Any], list[Any]]:
            self.seen = [entry.req.rid for entry in queue.queue]
            failures = [entry for entry in queue.queue if entry.req.rid == failed]
            given = [entry for entry in queue.queue if entry not in failures][:places]
            queue.queue = [entry for entry in queue.queue if entry not in failures and entry not in given]
            return given, failures

        return [entry.req.rid for entry in self._hook(original, self)[0]]


def test_the_order_follows_what_comes_and_goes_between_steps() -> None:
    queue = PreallocQueue()
    assert queue.pop() == []
    queue.add("a", 10.0, 9.0)
    queue.add("b", 10.0, 5.0)
    assert queue.pop(1) == ["b"]
    queue.add("c", 11.0, 1.0)
    queue.add("d", 11.0, 1.0)
    queue.pop()
    assert queue.seen == ["c", "d", "a"]
    queue.pop(failed="c")
    queue.add("e", 12.5, 2.0)
    assert queue.pop(2) == ["e", "a"]
    assert queue.pop(2) == ["d"]  # late since e has come
    assert queue.pop() == []


def test_the_order_notices_what_sglang_does_not_do_between_steps() -> None:
    queue = PreallocQueue()
    for i in range(6):
        queue.add(f"a{i}", 10.0 + i, 20.0 - 2 * i)
    queue.pop()
    in_order = queue.seen
    queue.queue = [entry for entry in queue.queue if entry.req.rid != in_order[2]]  # another list
    queue.pop()
    assert queue.seen == [rid for rid in in_order if rid != in_order[2]]
    queue.queue.clear()
    for i in range(7):
        queue.add(f"b{i}", 20.0, 9.0 - i)
    queue.pop()
    assert queue.seen == [f"b{i}" for i in reversed(range(7))]
    del queue.queue[3]
    queue.add("b7", 20.0, 9.5)
    queue.pop()
    assert queue.seen == ["b6", "b5", "b4", "b2", "b1", "b0", "b7"]


def test_an_unchanged_queue_is_recognised_and_not_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_for: list[str] = []
    contains = PlaceOrder.__contains__
    monkeypatch.setattr(
        PlaceOrder, "__contains__", lambda places, entry: looked_for.append(entry.req.rid) or contains(places, entry)
    )
    order = decode_order.QueueOrder(FlowPrefillConfig())
    queue = order.sorted([waiting_request(str(i), float(i + 1), None) for i in range(100)])
    order.note([], [], queue)
    looked_for.clear()
    assert order.sorted(queue) == queue
    assert not looked_for
    queue.append(waiting_request("new", 200.0, None))
    assert len(order.sorted(queue)) == 101
    assert looked_for == ["new"]
