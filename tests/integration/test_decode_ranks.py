"""Two tensor-parallel ranks of a decode server with hardly any running slots: both give them out in the same order, and
one of them tells the event log.

Requests carry SGLang's fake bootstrap host: their KV cache counts as there once they have a slot. Answers of real
servers are compared in ``tests/servers/test_decode_ranks.py``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from sgl_flowprefill.deadline import RECEIVED
from sgl_flowprefill.events import Decoded, of_decode_server, read_events
from sgl_flowprefill.model import embedded_model_path
from tests.engine import tokenized_request
from tests.integration.conftest import OWN_HEADS
from tests.prompts import prompt
from tests.rank_notes import noting
from tests.ranks import Chaos, Ranks, become_rank
from tests.waiting import until

SLOS_S = (90.0, 60.0, 30.0, 30.0)
"""Of lists of prompts, in the order in which they come: what comes last is due first."""
LIST_LENGTH = 6
AT_ONCE = 8
"""More requests than find a slot before all are there."""


class DecodeRanks(Ranks):
    settings: Mapping[str, Any] = {
        "disaggregation_mode": "decode",
        "disaggregation_transfer_backend": "nixl",
        "disaggregation_decode_retraction_backup": "cpu_tensor",
        "max_running_requests": 1,
    }

    @staticmethod
    def run_rank(*work: Any) -> None:
        run_decode_rank(*work)


def run_decode_rank(
    args: Any,
    ports: Any,
    rank: int,
    pipe: Any,
    event_log: str,
    log: str,
    chaos: Chaos | None,
    late: float | None,
    prepare: Callable[[Any, int], object] | None,
) -> None:
    become_rank(args, event_log, log)
    from sglang.srt.managers.scheduler import Scheduler, run_scheduler_process
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import get_disagg

    load_plugins()
    init = Scheduler.__init__

    def with_notes(scheduler: Any, *arguments: Any, **options: Any) -> None:
        get_disagg()._set("disaggregation_transfer_backend", "fake")
        init(scheduler, *arguments, **options)
        note_slots(scheduler, rank)

    Scheduler.__init__ = with_notes  # type: ignore[method-assign]
    run_scheduler_process(args, ports, rank, rank, 0, None, pipe)


def note_slots(scheduler: Any, rank: int) -> None:
    """Write a line for each request that gets a running slot."""
    queue, notes = scheduler.disagg_decode_prealloc_queue, noting("slots", rank)
    pop = queue.pop_preallocated

    def noted_pop(*arguments: Any, **options: Any) -> Any:
        given, failed = pop(*arguments, **options)
        for decode_req in given:
            notes.write(json.dumps({"rid": decode_req.req.rid}) + "\n")
        return given, failed

    queue.pop_preallocated = noted_pop


def decoded(ranks: Ranks) -> list[Decoded]:
    """What the event log tells of requests."""
    return [event for event in read_events(of_decode_server(ranks.event_log)) if isinstance(event, Decoded)]


@pytest.fixture
def times_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process sends has the times of an HTTP server, as ``patches/request_times.py`` has it there."""
    from sglang.srt.observability.req_time_stats import APIServerReqTimeStats

    state = APIServerReqTimeStats.__getstate__

    def with_received(stats: Any) -> Any:
        return state(stats) | {RECEIVED: getattr(stats, RECEIVED)}  # type: ignore[operator]

    monkeypatch.setattr(APIServerReqTimeStats, "__getstate__", with_received)


def test_two_ranks_give_the_scarce_slots_of_lists_of_prompts_to_those_that_are_due_first(
    times_travel: None, tmp_path: Path
) -> None:
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

    due_s: dict[str, float] = {}
    rooms = count(1)
    with DecodeRanks(str(embedded_model_path(OWN_HEADS)), 2, tmp_path) as ranks:
        for number, slo_s in enumerate(SLOS_S):
            received_s = time.monotonic()  # one for all prompts of a list
            for place in range(LIST_LENGTH):
                rid = f"list {number}, prompt {place}"
                sampling = {"max_new_tokens": 16, "ignore_eos": True, "custom_params": {"ttft_slo": slo_s}}
                address = {"bootstrap_host": FAKE_BOOTSTRAP_HOST, "bootstrap_room": next(rooms)}
                request = tokenized_request(rid, prompt(place, 12), sampling, logprobs=False, **address)
                setattr(request.time_stats, RECEIVED, received_s)
                due_s[rid] = received_s + slo_s
                ranks.send(request)
        ranks.finish(list(due_s))
        assert not [reason for reason in ranks.reasons.values() if reason.get("type") == "abort"]
        until(lambda: len(decoded(ranks)) >= len(due_s), within_s=30.0)  # answers come before the lines
        first, second = ([note["rid"] for note in ranks.notes("slots", rank)] for rank in range(2))
    assert first == second
    assert sorted(first) == sorted(due_s)
    assert sorted(one.rid for one in decoded(ranks)) == sorted(due_s), "one rank of the two tells of each, once"
    for one in decoded(ranks):
        times_s = (one.received_s, one.queued_s, one.place_s, one.kv_s, one.first_token_s, one.t_s)
        known_s = [time_s for time_s in times_s if time_s is not None]
        assert len(known_s) == len(times_s), one
        assert known_s == sorted(known_s), one
        assert (one.tokens, one.retractions, one.reason) == (16, 0, None)
        assert one.received_s + SLOS_S[int(one.rid[5])] == pytest.approx(due_s[one.rid], abs=1e-5)
    waited = first[AT_ONCE:]
    assert waited == sorted(sorted(waited, key=list(due_s).index), key=due_s.__getitem__)
    assert waited[0] in list(due_s)[2 * LIST_LENGTH :], "what came first is not first"
