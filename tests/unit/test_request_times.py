"""Times on their way from the HTTP server to the scheduler's ranks: SGLang's own classes, and clocks that differ."""

from __future__ import annotations

import pickle
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.observability import req_time_stats
from sglang.srt.plugins.hook_registry import HookRegistry

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.deadline import received_by_http_s, received_s, sent_s
from sgl_flowprefill.patches import decode_order, request_times
from sgl_flowprefill.patches.base import SeamError


@pytest.fixture(autouse=True)
def stats(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """SGLang's module with the hook, as in each process; what the hook changes is put back."""
    base = req_time_stats.ReqTimeStatsBase
    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    monkeypatch.setattr(base, "__getstate__", base.__getstate__)
    monkeypatch.setattr(req_time_stats, "global_diff_realtime_monotonic", time.time() - time.perf_counter())
    request_times.apply()
    HookRegistry.apply_hooks()
    yield req_time_stats
    for name in request_times.SOURCES:
        delattr(base, name)


def sent_request(received_at_s: float | None = None) -> bytes:
    """What the HTTP server sends of a request's times, by itself or inside of the request."""
    stats = req_time_stats.APIServerReqTimeStats()
    stats.set_created_time(received_at_s)
    stats.set_api_server_dispatch_time()
    return pickle.dumps(stats)


def received_stats(message: bytes | None) -> Any:
    """What a scheduler makes of it (``Req.__init__``)."""
    sent = None if message is None else pickle.loads(message)
    stats = req_time_stats.SchedulerReqTimeStats.new_from_obj(sent)
    stats.set_scheduler_recv_time()
    return stats


@pytest.mark.parametrize("step_s", [0.0, 30.0, -30.0, 60.0])
def test_a_step_of_the_wall_clock_changes_no_time(step_s: float, stats: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before_s = time.monotonic()
    message = sent_request()
    after_s = time.monotonic()
    monkeypatch.setattr(stats.time, "time", lambda wall=time.time: wall() + step_s)
    stats.calibrate_time_diff()
    req = SimpleNamespace(time_stats=received_stats(message))
    assert before_s <= received_s(req) == received_by_http_s(req) <= sent_s(req) <= after_s


def test_times_pass_a_data_parallel_controller_unchanged(stats: Any) -> None:
    message = sent_request(5.0)
    at_controller = stats.DPControllerReqTimeStats.new_from_obj(pickle.loads(message))
    at_controller.set_dp_dispatch_time()
    again = received_stats(pickle.dumps(at_controller))
    straight = received_stats(message)
    assert again.flowprefill_received_s == straight.flowprefill_received_s == 5.0
    assert again.flowprefill_sent_s == straight.flowprefill_sent_s > 5.0


def test_times_that_one_rank_sends_to_the_next_stay_the_same(stats: Any) -> None:
    first = pickle.loads(sent_request(5.0))
    second = received_stats(pickle.dumps(first))
    assert second.flowprefill_received_s == 5.0


def test_a_request_that_came_another_way_was_received_when_the_scheduler_read_it() -> None:
    req = SimpleNamespace(time_stats=received_stats(None))
    assert received_by_http_s(req) == sent_s(req) == 0.0
    assert 0.0 <= time.monotonic() - received_s(req) < 10.0


@pytest.mark.parametrize("is_pickled_again", [True, False], ids=["pickled again by rank 0", "unpickled by each rank"])
def test_ranks_whose_clocks_differ_give_out_places_in_the_same_order(stats: Any, is_pickled_again: bool) -> None:
    """Many requests are received at the same instant, as all prompts of an OpenAI list are, or some ns apart; each rank
    measures the difference of its clocks anew at each request, as SGLang does, and one's wall clock is stepped.

    SGLang's rank 0 unpickles what it broadcasts, so that it is pickled again (SGLANG_USE_PICKLE_IPC=1, the default), or
    broadcasts the bytes that it got.
    """
    rng = random.Random(1)
    ranks = [decode_order.QueueOrder(FlowPrefillConfig()) for _ in range(3)]
    queues: list[list[Any]] = [[] for _ in ranks]
    received_at_s, number, compared = time.perf_counter(), 0, 0
    for step in range(600):
        for _ in range(rng.randrange(4)):  # lists of prompts
            received_at_s += rng.choice([0.0, 1e-9, 1e-7, 1e-6, 1e-3, 0.2])
            slo_s = rng.choice([0.2, 0.2, 1.0, 5.0])
            for _ in range(rng.randrange(1, 8)):
                message = sent_request(received_at_s)
                if is_pickled_again:
                    message = pickle.dumps(pickle.loads(message))
                for rank, queue in enumerate(queues):
                    stats.calibrate_time_diff()
                    if rank == 2:
                        stats.global_diff_realtime_monotonic += 30.0 * (step % 3 - 1)
                    req = SimpleNamespace(
                        rid=str(number),
                        time_stats=received_stats(message),
                        sampling_params=SimpleNamespace(custom_params={"ttft_slo": slo_s}),
                    )
                    assert received_by_http_s(req) == received_at_s
                    queue.append(SimpleNamespace(req=req))
                number += 1
        places = rng.randrange(18) if len(queues[0]) > 200 else rng.randrange(6)
        orders = []
        for rank, order in enumerate(ranks):
            in_order = order.sorted(queues[rank])
            orders.append([entry.req.rid for entry in in_order])
            order.note(in_order[:places], [], in_order[places:])
            queues[rank] = in_order[places:]
        assert orders[0] == orders[1] == orders[2]
        compared += len(orders[0])
    print(f"{number} requests, {compared} positions compared on 3 ranks")
    assert number > 3000


def test_a_stats_class_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(req_time_stats.ReqTimeStatsBase, "__setstate__", lambda self, state: None)
    with pytest.raises(SeamError, match="ReqTimeStatsBase"):
        request_times.apply()
