"""Requests that are refused on an overloaded server: which, when, and what their clients are told."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import BackgroundTasks, HTTPException
from fastapi.responses import JSONResponse, StreamingResponse

from sgl_flowprefill.config import ConfigError, FlowPrefillConfig
from sgl_flowprefill.events import AnyEvent, Arrival, Complete, Resume, Shed, Start, Step, Suspend
from sgl_flowprefill.hub.role import Arrival as Arrived
from sgl_flowprefill.hub.shedding import Backlog, Shedding, retry_after_s
from sgl_flowprefill.hub.waiting import WaitingRequest
from sgl_flowprefill.pace import Pace
from sgl_flowprefill.patches import overload
from sgl_flowprefill.policy import Job, Limits, Policy, make_policy
from sgl_flowprefill.policy.decode import NO_LOAD, DecodeLoad
from sgl_flowprefill.policy.orders.feasible import FeasibleSet
from sgl_flowprefill.runtime.setup import check_settings
from sgl_flowprefill.shadow import MOST_FOLLOWED, Shadows
from sgl_flowprefill.slo import Objective
from sgl_flowprefill.ttft import PrefillShape

LIMITS = Limits(max_suspended=4, max_batch_tokens=2048)


def job(number: int, deadline_s: float, work_s: float, pace: Pace | None = None) -> Job[Any]:
    waiting = WaitingRequest(object(), number, [], PrefillShape(1, 0), 0.0, 0)
    return Job(waiting, 0.0, deadline_s, work_s, pace=pace or Pace())


class Server:
    """A policy and what it would shed."""

    def __init__(self, policy: Policy[Any, Any] | None = None) -> None:
        # With an endless window the past says nothing about what will arrive.
        self.policy = policy or FeasibleSet(LIMITS, 1e9, math.inf)
        self.shedding = Shedding()

    def add(self, *jobs: Job[Any], sheddable: bool = False) -> None:
        for one in jobs:
            self.policy.add(one)
            if sheddable:
                self.shedding.add(one, "default", sheddable=True)

    def shed(self, now_s: float) -> list[int]:
        jobs = [one.job for one in self.shedding.refused(self.policy, now_s)]
        for one in jobs:
            self.policy.remove(one)
            self.shedding.remove(one)
        return [one.item.number for one in jobs]


def test_a_request_is_refused_when_it_comes_if_what_goes_before_it_leaves_too_little_time() -> None:
    server = Server()
    server.add(job(0, 5.0, 3.0))
    server.add(job(1, 6.0, 4.0), job(2, 8.0, 4.0), sheddable=True)
    assert server.shed(0.0) == [1]
    assert server.shed(0.0) == []


def test_requests_that_may_not_be_refused_are_served() -> None:
    server = Server()
    server.add(job(0, 5.0, 3.0), job(1, 6.0, 4.0))
    assert server.shed(0.0) == server.shed(100.0) == []


def test_a_request_is_refused_later_when_its_time_has_run_out_and_not_if_it_waits_no_more() -> None:
    server = Server(make_policy("edf", LIMITS, max_starvation_s=1e9))
    server.add(job(0, 5.0, 3.0), job(1, 6.0, 3.0), job(2, 90.0, 3.0), sheddable=True)
    assert server.shed(0.0) == server.shed(1.9) == []
    assert server.shed(2.5) == [0]
    one = next(entry for entry in server.policy.waiting if entry.item.number == 1)
    server.policy.remove(one)
    server.shedding.remove(one)
    assert server.shed(50.0) == []


def test_a_request_that_has_got_cheaper_or_whose_pace_has_changed_is_looked_at_anew() -> None:
    server, pace = Server(make_policy("edf", LIMITS, max_starvation_s=1e9)), Pace(2.0)
    slow = job(0, 6.0, 2.0, pace)
    server.add(slow, sheddable=True)
    pace.factor = 1.0
    server.policy.repaced()
    assert server.shed(3.0) == [], "it takes 2 s by now"
    assert server.shed(4.5) == [0]


def test_a_request_that_an_idle_server_would_not_meet_either_is_served() -> None:
    server = Server()
    server.add(job(0, 1.0, 2.0), sheddable=True)
    assert server.shed(0.0) == server.shed(5.0) == []


def test_steps_of_streams_count_until_the_deadline() -> None:
    server = Server()
    server.policy.charge(DecodeLoad(step_s=0.5, period_s=1.0, start_by_s=0.0))
    server.add(job(0, 6.0, 4.0), sheddable=True)
    assert server.shed(0.0) == [0]


def test_what_is_remembered_of_requests_that_wait_no_more_is_bounded() -> None:
    server = Server(make_policy("edf", LIMITS, max_starvation_s=1e9))
    for number in range(1000):
        one = job(number, 1e9, 1.0)
        server.add(one, sheddable=True)
        assert server.shed(0.0) == []
        server.policy.remove(one)
        server.shedding.remove(one)
    assert server.shedding.remembered <= 64


@pytest.mark.parametrize(("retracted", "given_back"), [(False, False), (True, False), (False, True)])
def test_only_requests_of_which_nothing_was_computed_may_be_refused(retracted: bool, given_back: bool) -> None:
    promised = Objective(1.0, 0.1, sheddable=True)
    arrival = Arrived(None, [], PrefillShape(1, 0), 0.0, 1.0, 0.0, 0, retracted, promised, 3 if given_back else None)
    assert arrival.is_fresh is not (retracted or given_back)


def tokens_job(number: int, tokens: int) -> Job[Any]:
    waiting = WaitingRequest(object(), number, [], PrefillShape(tokens, 0), 0.0, 0)
    return Job(waiting, 0.0, 100.0, 1.0)


def test_a_class_has_at_most_so_many_tokens_waiting_whether_sheddable_or_not() -> None:
    policy = make_policy("edf", LIMITS, max_starvation_s=1e9)
    shedding = Shedding(sheds=False, most_tokens={"batch": 100})
    first, second, third = tokens_job(0, 60), tokens_job(1, 30), tokens_job(2, 20)
    for one in (first, second, third):
        shedding.add(one, "batch", sheddable=False)
    shedding.add(tokens_job(3, 5000), "chat", sheddable=False)
    [refused] = shedding.refused(policy, 0.0)
    assert refused.job is third
    assert refused.why == "90 tokens of class batch wait, and with these 20 there would be more than 100"
    shedding.remove(third)
    shedding.remove(first)
    again = tokens_job(4, 70)
    shedding.add(again, "batch", sheddable=False)
    assert shedding.refused(policy, 0.0) == [], "the first one runs, and 30 wait"


def test_a_prompt_that_is_longer_than_the_limit_is_let_in_if_nothing_of_its_class_waits() -> None:
    policy = make_policy("edf", LIMITS, max_starvation_s=1e9)
    shedding = Shedding(sheds=False, most_tokens={"batch": 100})
    shedding.add(tokens_job(0, 500), "batch", sheddable=False)
    assert shedding.refused(policy, 0.0) == []
    shedding.add(tokens_job(1, 1), "batch", sheddable=False)
    assert len(shedding.refused(policy, 0.0)) == 1


def test_a_request_that_was_let_in_stays_so_while_it_cannot_start_and_comes_again() -> None:
    """Such as one whose adapter finds no slot beside those of streams."""
    policy = make_policy("edf", LIMITS, max_starvation_s=1e9)
    shedding = Shedding(sheds=False, most_tokens={"batch": 100})
    first, second, third = tokens_job(0, 60), tokens_job(1, 30), tokens_job(2, 20)

    def refused(job: Job[Any]) -> bool:
        shedding.add(job, "batch", sheddable=False)
        return [one.job for one in shedding.refused(policy, 0.0)] == [job]

    assert not refused(first)
    assert not refused(second)
    shedding.set_aside([first.item.req])
    shedding.remove(first)
    assert refused(third), "90 tokens wait as before"
    shedding.set_aside([], come_again=[first.item.req])
    again = tokens_job(3, 80)  # less of it is cached by now
    again.item.req = first.item.req
    assert not refused(again)
    assert refused(third)
    shedding.set_aside([first.item.req])
    shedding.remove(again)
    shedding.set_aside([])
    assert not refused(tokens_job(4, 70)), "its client has left while it could not start"
    shedding.remove(second)
    assert refused(tokens_job(5, 40))
    assert not refused(tokens_job(6, 30))


@pytest.mark.parametrize("text", ["batch", "batch:", ":5", "batch:-1", "batch:1,batch:2", "batch:1.5"])
def test_a_limit_that_is_none_is_refused_with_what_is_expected(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--flowprefill-max-queued-tokens .*: expected CLASS:TOKENS"):
        FlowPrefillConfig.parse({"max_queued_tokens": text})


def test_serving_all_is_the_policy_edf() -> None:
    assert FlowPrefillConfig.parse({"overload": "serve"}).order == "edf"
    assert FlowPrefillConfig.parse({"overload": "serve", "policy": "edf"}).order == "edf"
    assert {FlowPrefillConfig.parse({"overload": how}).order for how in ("demote", "shed")} == {"feasible"}
    with pytest.raises(ConfigError, match=r"--flowprefill-overload serve: serve is the policy edf.*policy s-edf"):
        FlowPrefillConfig.parse({"overload": "serve", "policy": "s-edf"})


def test_limits_are_by_class(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("classes: {batch: {}}")
    limits = {"max_queued_tokens": "default:100000, batch:20000"}
    config = FlowPrefillConfig.parse(limits | {"slo_policy": str(policy)})
    assert config.queue_limits == {"default": 100000, "batch": 20000}
    assert config.refuses
    assert not FlowPrefillConfig().refuses
    with pytest.raises(ConfigError, match=r"no class is called batch; there are default, by --flowprefill-slo-policy"):
        FlowPrefillConfig.parse(limits)


@pytest.mark.parametrize(("decodes", "attn_dp_enabled"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("options", [{"overload": "shed"}, {"max_queued_tokens": "default:100000"}])
def test_a_server_that_cannot_refuse_requests_does_not_start(
    options: dict[str, str], decodes: bool, attn_dp_enabled: bool
) -> None:
    scheduler = SimpleNamespace(attn_dp_enabled=attn_dp_enabled, enable_priority_scheduling=False)
    config = FlowPrefillConfig.parse(options)
    check_settings(scheduler, FlowPrefillConfig(), decodes, [])
    check_settings(SimpleNamespace(attn_dp_enabled=False, enable_priority_scheduling=False), config, True, [])
    why = "cannot work with data-parallel attention" if decodes else "for servers that prefill and decode"
    with pytest.raises(SystemExit, match=rf"--flowprefill-overload shed and --flowprefill-max-queued-tokens .*{why}"):
        check_settings(scheduler, config, decodes, [])


def test_the_backlog_is_the_predicted_work_of_all_jobs() -> None:
    random, backlog, paces = Random(0), Backlog(), [Pace(), Pace(), Pace()]
    jobs: list[Job[Any]] = []
    for number in range(500):
        if jobs and random.random() < 0.45:
            backlog.remove(jobs.pop(random.randrange(len(jobs))))
        else:
            jobs.append(job(number, 10.0, random.random(), random.choice(paces)))
            backlog.add(jobs[-1])
        random.choice(paces).factor = random.choice([0.5, 1.0, 3.0])
        assert backlog.work_s == pytest.approx(sum(one.remaining_s for one in jobs))
    for one in jobs:
        backlog.remove(one)
    assert backlog.work_s == 0.0


def test_nobody_is_told_to_come_back_before_the_backlog_has_run() -> None:
    assert retry_after_s(0.0, NO_LOAD) == 1
    assert retry_after_s(4.2, NO_LOAD) == 5
    assert retry_after_s(4.2, DecodeLoad(step_s=0.5, period_s=1.0)) == 9


# ---- what would have become of them ----------------------------------------------------------------------------------


def arrival(t_s: float, rid: str, deadline_s: float) -> Arrival:
    return Arrival(t_s, rid, 100, deadline_s - t_s, deadline_s, t_s)


def counted(*events: AnyEvent) -> dict[str, int]:
    shadows = Shadows()
    for event in events:
        shadows.read(event)
    return {name: count for name, count in shadows.state().items() if count}


SHED_BEHIND_A = [
    arrival(10.0, "a", 13.0),
    Start(10.0, 0, ["a"], 100, 0, 4.0),
    arrival(10.0, "shed", 14.0),
    Shed(10.0, "shed", 1.0, 4.0, 4),
]


def test_a_request_would_have_been_met_in_the_time_in_which_nothing_ran() -> None:
    ended_early = Complete(12.5, 0, ["a"], 9, 2.5, 4.0, 4.0, 4.0)
    assert counted(*SHED_BEHIND_A, ended_early, arrival(13.4, "b", 99.0)) == {"shed": 1, "followed": 1}
    assert counted(*SHED_BEHIND_A, ended_early, arrival(13.6, "b", 99.0)) == {"shed": 1, "met_after_all": 1}


def test_a_request_would_not_have_been_met_beside_what_is_due_before_it() -> None:
    ended = Complete(13.5, 0, ["a"], 9, 3.5, 4.0, 4.0, 4.0)
    assert counted(*SHED_BEHIND_A, ended, arrival(20.0, "b", 99.0)) == {"shed": 1, "late_anyway": 1}


def test_prefills_that_are_due_later_would_have_waited_for_it_and_steps_would_not() -> None:
    later = [
        arrival(10.1, "b", 20.0),
        Suspend(10.2, 0, ["a"], 1, ["b"], 10.1, 10.2, 0.1),
        Start(10.2, 1, ["b"], 9, 0, 2.0),
    ]
    assert counted(*SHED_BEHIND_A, *later, Resume(11.3, 0, ["a"], 1)) == {"shed": 1, "met_after_all": 1}
    step = Step(11.0, 3, 10.5, None)
    assert counted(*SHED_BEHIND_A, *later, step, Resume(11.3, 0, ["a"], 1)) == {"shed": 1, "followed": 1}


def test_only_so_many_are_followed_at_a_time() -> None:
    sheds = [Shed(10.0, "shed", 1.0, 4.0, 4)] * (MOST_FOLLOWED + 3)
    state = counted(*SHED_BEHIND_A[:3], *sheds)
    assert state == {"shed": MOST_FOLLOWED + 3, "followed": MOST_FOLLOWED, "not_followed": 3}


# ---- what the client is told -----------------------------------------------------------------------------------------

REFUSED = {"meta_info": {"finish_reason": {"status_code": 429, "message": "later", overload.RETRY_AFTER: 7}}}


async def sglang_refuses(_: Any, out: dict[str, Any], __: Any, is_stream: bool) -> dict[str, Any]:
    """What SGLang does with a refusal."""
    reason = out["meta_info"]["finish_reason"]
    if is_stream:
        return out
    raise HTTPException(reason["status_code"], reason["message"])


async def refused(is_stream: bool = False, out: dict[str, Any] = REFUSED) -> Any:
    """What the scheduler's refusal is for the endpoint that waits for it."""
    return await overload.refuse(sglang_refuses, None, out, SimpleNamespace(), is_stream)


def error_response(_: Any, message: str, err_type: str = "", status_code: int = 400) -> JSONResponse:
    """How the OpenAI endpoints make an error."""
    return JSONResponse({"message": message, "code": status_code}, status_code)


def told(response: Any) -> tuple[int, str | None, str]:
    return response.status_code, response.headers.get("Retry-After"), json.loads(response.body)["message"]


def test_generate_answers_with_429_and_retry_after() -> None:
    async def generate(*_: Any) -> Any:
        return await refused()

    response = asyncio.run(overload.answer(generate, None, None))
    assert (response.status_code, response.headers["Retry-After"]) == (429, "7")
    assert b'"message":"later"' in response.body


def test_other_refusals_are_as_sglang_makes_them() -> None:
    full = {"meta_info": {"finish_reason": {"status_code": 503, "message": "full"}}}

    async def generate(*_: Any) -> Any:
        return await refused(out=full)

    with pytest.raises(HTTPException, match="full") as raised:
        asyncio.run(overload.answer(generate, None, None))
    assert raised.value.headers is None
    assert asyncio.run(refused(True, full)) is full


@pytest.mark.parametrize("is_list", [False, True], ids=["one prompt", "a list"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_openai_endpoints_answer_with_429_and_retry_after_streams_and_lists_too(is_stream: bool, is_list: bool) -> None:
    async def handle(handler: Any) -> Any:
        try:
            # SGLang waits for each prompt of a list in a task of its own.
            await (asyncio.create_task(refused(is_stream)) if is_list else refused(is_stream))
        except HTTPException as raised:
            return overload.tell_refusal(error_response, handler, raised.detail, "429", raised.status_code)

    assert told(asyncio.run(overload.answer(handle, None, raises=True))) == (429, "7", "later")

    async def other(handler: Any) -> Any:
        return overload.tell_refusal(error_response, handler, "of somebody else", "429", 429)

    assert told(asyncio.run(overload.answer(other, None, raises=True))) == (429, None, "of somebody else")


def test_an_endpoint_that_makes_any_exception_a_400_answers_with_429_all_the_same() -> None:
    """As /v1/responses does."""

    async def create(handler: Any) -> Any:
        try:
            await refused()
        except Exception as error:
            return overload.tell_refusal(error_response, handler, str(error))

    assert told(asyncio.run(overload.answer(create, None))) == (429, "7", "later")


def test_an_endpoint_that_makes_the_answer_itself_says_when_to_come_back_too() -> None:
    """As /v1/messages does."""

    async def handle(handler: Any) -> Any:
        try:
            await refused()
        except HTTPException as error:
            return error_response(handler, error.detail, "rate_limit_error", error.status_code)

    assert told(asyncio.run(overload.answer(handle, None))) == (429, "7", "later")


def test_a_stream_that_has_begun_stays_as_sglang_makes_it() -> None:
    """Where another choice of the same request was sent already, an exception would cut the connection."""

    async def handle(handler: Any) -> Any:
        return asyncio.create_task(later())

    async def later() -> Any:
        await asyncio.sleep(0)
        return await refused(True)

    async def client() -> Any:
        return await (await overload.answer(handle, None, raises=True))

    assert asyncio.run(client()) is REFUSED
    assert asyncio.run(refused(True)) is REFUSED, "of /generate"


@pytest.mark.parametrize("raises", [True, False], ids=["/generate", "/v1/messages"])
def test_a_stream_is_refused_with_429_before_it_begins(raises: bool) -> None:
    aborts = BackgroundTasks()

    async def events() -> AsyncIterator[Any]:
        yield await refused(is_stream=True)

    async def handle(*_: Any) -> Any:
        return StreamingResponse(events(), background=aborts)

    response = asyncio.run(overload.answer(handle, None, None, raises=raises))
    assert (response.status_code, response.headers["Retry-After"]) == (429, "7")
    assert json.loads(response.body)["error"]["message"] == "later"
    assert response.background is (None if raises else aborts)


def test_a_stream_that_is_served_has_all_of_its_events_and_may_still_be_refused_in_part() -> None:
    async def events() -> AsyncIterator[Any]:
        yield b"first"
        yield await refused(is_stream=True)
        yield b"last"

    async def handle(*_: Any) -> Any:
        return StreamingResponse(events())

    async def client() -> tuple[int, list[Any]]:
        response = await overload.answer(handle, None, None, raises=True)
        return response.status_code, [event async for event in response.body_iterator]

    assert asyncio.run(client()) == (200, [b"first", REFUSED, b"last"])


class Client:
    """The HTTP request of a client that leaves after it was looked for so often."""

    def __init__(self, stays_for: float) -> None:
        self.stays_for = stays_for
        self.looked = 0

    async def is_disconnected(self) -> bool:
        self.looked += 1
        return self.looked > self.stays_for


@pytest.mark.parametrize("is_response", [True, False], ids=["most endpoints", "/v1/responses"])
def test_a_client_that_leaves_before_its_stream_begins_has_it_cancelled_at_once(is_response: bool) -> None:
    ends: list[type[BaseException]] = []

    async def events() -> AsyncIterator[Any]:
        yield CREATED[0]
        try:
            await asyncio.sleep(60)
        except BaseException as error:  # where SGLang aborts
            ends.append(type(error))
            raise
        yield b"never"

    async def handle(*_: Any) -> Any:
        return StreamingResponse(events()) if is_response else events()

    async def gone() -> list[Any]:
        answering = overload.answer(handle, None, SimpleNamespace(tools=[]), Client(stays_for=1))
        response = await asyncio.wait_for(answering, 30)
        assert ends == [asyncio.CancelledError]
        return [event async for event in (response.body_iterator if is_response else response)]

    assert asyncio.run(gone()) == CREATED[:1]


def test_a_stream_that_begins_late_is_served_while_its_client_waits() -> None:
    client = Client(stays_for=math.inf)

    async def events() -> AsyncIterator[bytes]:
        await asyncio.sleep(2.5 * overload.POLL_S)
        yield b"first"
        yield b"last"

    async def handle(*_: Any) -> Any:
        return StreamingResponse(events())

    async def served() -> list[Any]:
        response = await overload.answer(handle, None, client, raises=True)
        return [event async for event in response.body_iterator]

    assert asyncio.run(served()) == [b"first", b"last"]
    assert client.looked >= 1


CREATED = ["event: response.created\ndata: {}\n\n", "event: response.in_progress\ndata: {}\n\n"]


@pytest.mark.parametrize("tools", [[], ["a tool"]])
@pytest.mark.parametrize("is_refused", [False, True])
def test_events_before_the_answer_are_held_back_unless_more_of_them_may_be(is_refused: bool, tools: list[str]) -> None:
    """Streams of /v1/responses, which say that a response is created before anything is computed."""

    async def events() -> AsyncIterator[str]:
        for event in CREATED:
            yield event
        if is_refused:
            await refused(is_stream=True)
        yield "event: response.output_item.added\ndata: {}\n\n"

    async def create(*_: Any) -> Any:
        return events()

    handler = SimpleNamespace(
        create_error_response=lambda message: overload.tell_refusal(error_response, None, message)
    )

    async def client() -> Any:
        response = await overload.answer(create, handler, SimpleNamespace(tools=tools), None)
        return [event async for event in response] if isinstance(response, AsyncGenerator) else told(response)

    sent = asyncio.run(client())
    if is_refused and not tools:
        assert sent == (429, "7", "later")
    else:
        assert sent[:2] == CREATED
        assert len(sent) == 3
