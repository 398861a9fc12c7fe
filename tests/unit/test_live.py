"""What those are told who watch: the hub's state, what became of requests, and who is asked when."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from itertools import islice
from math import ceil
from random import Random
from statistics import median

import httpx
import pytest
from starlette.applications import Starlette

from sgl_flowprefill.events import (
    AnyEvent,
    Arrival,
    Complete,
    EventLog,
    Leave,
    Log,
    Ready,
    RecentEvents,
    Resume,
    Start,
    Suspend,
    decode_events,
)
from sgl_flowprefill.hub.snapshot import snapshot
from sgl_flowprefill.live import EVENTS, PAGE, STATE, TIMELINE
from sgl_flowprefill.live.ask import Ask
from sgl_flowprefill.live.attainment import BIN_S, WINDOW_S, Attainment
from sgl_flowprefill.live.board import Board
from sgl_flowprefill.live.feed import SchedulerFeed
from sgl_flowprefill.live.routes import FILE, routes
from sgl_flowprefill.live.state import Answer, Document, State, decode_answer, decode_document, encode_answer
from sgl_flowprefill.metrics.table import CAUSES
from sgl_flowprefill.policy import Limits, Standing, make_policy
from tests.simulated_device import HostCosts, Model, SimulatedDevice, SimulatedRequest, SimulatedServer
from tests.trace_processor import trace_processor

IDLE = State("feasible", False, False, False, 1.0, [], [], 0, 0)
SECOND_PER_TOKEN = Model(1, lambda tokens: tokens / 2, lambda tokens: tokens / 2)


# ---- the state of a hub ---------------------------------------------------------------------------------------------


def hub_of(requests: list[SimulatedRequest], policy: str) -> SimulatedServer:
    """A hub that has looked at ``requests``, all of which arrive at once and take a second a token."""
    orders = make_policy(policy, Limits(16, max_batch_tokens=1), 60.0)
    server = SimulatedServer(SimulatedDevice(0, HostCosts()), SECOND_PER_TOKEN, requests, policy=orders)
    server.hub.look()
    return server


def asked(tokens_and_slos: Iterable[tuple[int, float]]) -> list[SimulatedRequest]:
    return [SimulatedRequest(f"r{i}", 0.0, tokens, slo_s) for i, (tokens, slo_s) in enumerate(tokens_and_slos)]


def test_what_waits_is_told_in_the_policys_order_with_the_reason() -> None:
    server = hub_of(asked([(9, 10.0), (3, 2.0), (2, 4.0), (1, 4.5)]), "feasible")
    state = snapshot(server.hub.work, "feasible", 0.0)
    found = [(one.rid, Standing(one.standing)) for one in state.waiting]
    assert found == [
        ("r2", Standing.KEPT),
        ("r3", Standing.KEPT),
        ("r0", Standing.LEFT_OUT),
        ("r1", Standing.INFEASIBLE),
    ]
    first = state.waiting[0]
    assert (first.needs_s, first.due_s, first.slack_s, first.new_tokens) == (2.0, 4.0, 2.0, 2)


def test_the_first_of_those_told_is_the_one_that_runs_next() -> None:
    for policy in ("feasible", "s-edf", "edf", "fcfs"):
        server = hub_of(asked([(9, 10.0), (3, 2.0), (2, 4.0), (1, 4.5)]), policy)
        told = snapshot(server.hub.work, policy, 0.0).waiting[0].rid
        choice = server.hub.choose()
        assert isinstance(choice, list)
        assert choice[0].item.req.rid == told, policy


def test_orders_that_do_not_ask_for_deadlines_say_so() -> None:
    assert {one.standing for one in snapshot(hub_of(asked([(1, 9.0)]), "edf").hub.work, "edf", 0.0).waiting} == {
        Standing.IN_LINE
    }
    standings = [
        one.standing for one in snapshot(hub_of(asked([(1, 9.0), (4, 2.0)]), "s-edf").hub.work, "", 0.0).waiting
    ]
    assert standings == [Standing.FEASIBLE, Standing.INFEASIBLE]


def test_a_suspended_task_stands_behind_the_running_one_with_what_it_has_behind_it() -> None:
    requests = [SimulatedRequest("long", 0.0, 8, 100.0), SimulatedRequest("urgent", 3.0, 1, 2.5)]
    quarters = Model(2, lambda tokens: tokens / 4, lambda tokens: tokens / 4)
    server = SimulatedServer(SimulatedDevice(0, HostCosts()), quarters, requests)
    server.hub.turn()
    server.hub.next_task()
    running, suspended = snapshot(server.hub.work, "s-edf", server.device.now_s).tasks
    assert (running.rids, running.runs, suspended.rids, suspended.runs) == (["urgent"], True, ["long"], False)
    assert (suspended.done, suspended.left_s) == (0.5, 4.0)


def test_no_more_is_told_than_the_first_of_many() -> None:
    state = snapshot(hub_of(asked([(1, 100.0 + i) for i in range(80)]), "feasible").hub.work, "feasible", 0.0)
    assert (len(state.waiting), state.waiting_requests) == (50, 80)
    assert [one.rid for one in state.waiting] == [f"r{i}" for i in range(50)]


def test_a_state_costs_hardly_more_when_many_wait() -> None:
    """CPU time of this thread, printed with -s."""

    def cost_s(requests: int) -> float:
        random = Random(requests)
        sizes = [(random.randrange(20, 3000), 10 * random.choice((0.4, 0.8, 6.3, 9.4))) for _ in range(requests)]
        model = Model(8, lambda tokens: 1e-5 * tokens, lambda tokens: 1e-5 * tokens)
        orders = make_policy("feasible", Limits(16, max_batch_tokens=2048), 60.0)
        server = SimulatedServer(SimulatedDevice(0, HostCosts()), model, asked(sizes), policy=orders)
        server.hub.look()
        costs_s = []
        for turn in range(200):
            begin_s = time.thread_time()
            state = snapshot(server.hub.work, "feasible", 0.001 * turn)
            encode_answer(Answer(0.0, 0, 1, 1, b"", state))
            costs_s.append(time.thread_time() - begin_s)
        print(f"a state with {requests} waiting: {1e6 * median(costs_s):.0f} us")
        return median(costs_s)

    cost_s(0)
    few_s, many_s = cost_s(50), cost_s(2000)
    assert many_s < 5 * few_s

    for where, recent in (("nowhere", None), ("into memory", RecentEvents(20_000))):
        log = EventLog(None, recent)
        begin_s = time.thread_time()
        for i in range(20_000):
            log.write(Resume, float(i), task=i, rids=["0123456789abcdef0123456789abcdef"], checkpoint=3)
        print(f"an event that goes {where}: {1e6 * (time.thread_time() - begin_s) / 20_000:.1f} us")


# ---- events in memory -----------------------------------------------------------------------------------------------


def arrival(rid: str, t_s: float, slo_s: float = 1.0, slo_class: str = "chat") -> Arrival:
    return Arrival(t_s, rid, 100, slo_s, t_s + slo_s, t_s, slo_class)


def course(rid: str, task: int, t_s: float, took_s: float, slo_s: float = 1.0) -> list[AnyEvent]:
    """A request that arrives at ``t_s`` and whose prefill takes ``took_s``."""
    end_s = t_s + took_s
    return [
        arrival(rid, t_s, slo_s),
        Ready(t_s, rid, t_s, 100, 0, 0.2),
        Start(t_s, task, [rid], 100, 0, 0.2),
        Complete(end_s, task, [rid], 8, took_s, 0.2, 0.2, 0.2),
        Leave(end_s, rid),
    ]


def recorded(events: Iterable[AnyEvent], most: int = 1000) -> RecentEvents:
    recent = RecentEvents(most)
    log = EventLog(None, recent)
    log.begin(decodes=False)
    for event in events:
        log.write(lambda event=event: event)  # type: ignore[misc]
    return recent


def test_events_are_kept_without_a_file_and_the_oldest_go_first() -> None:
    recent = recorded([arrival(f"r{i}", float(i)) for i in range(10)], most=4)
    first, following, lines = recent.since(0, 100)
    assert (first, following, recent.written) == (6, 10, 10)
    assert [event.t_s for event in decode_events(lines)] == [6.0, 7.0, 8.0, 9.0]
    assert recent.since(8, 1)[:2] == (8, 9)
    assert recent.since(10, 5) == (10, 10, b"")
    assert recent.since(11, 5)[0] == 6, "a number of a server's that ran before"


def test_a_log_that_goes_nowhere_makes_no_event() -> None:
    log = EventLog(None)
    log.write(lambda: pytest.fail("an event was made"))  # type: ignore[arg-type]
    assert not log.is_written


# ---- what became of requests ----------------------------------------------------------------------------------------


class Scheduler:
    """Answers as a scheduler does."""

    def __init__(self, recent: RecentEvents, now_s: float, state: State = IDLE, most: int = 500) -> None:
        self.recent, self.now_s, self.state, self.most = recent, now_s, state, most
        self.asked: list[Ask] = []

    async def ask(self, question: Ask) -> Answer:
        ask = Ask.from_rid(question.as_rid())
        assert ask is not None
        self.asked.append(ask)
        first, following, lines = self.recent.since(ask.since, self.most)
        state = self.state if ask.with_state else None
        answer = Answer(self.now_s, first, following, self.recent.written, lines, state, self.recent.head)
        return decode_answer(encode_answer(answer))


def board_of(events: Iterable[AnyEvent], now_s: float) -> Board:
    board = Board("prefill")
    scheduler = Scheduler(recorded(events), now_s)
    while board.read(asyncio.run(scheduler.ask(Ask(board.next)))):
        pass
    return board


def test_attainment_is_told_by_class_and_a_miss_with_its_cause() -> None:
    events = [*course("in-time", 0, 10.0, 0.5), *course("late", 1, 20.0, 3.0), *course("old", 2, -600.0, 0.1)]
    server = board_of(sorted(events, key=lambda event: event.t_s), now_s=30.0).server()
    [chat] = server.attainment
    assert (chat.slo_class, chat.met, chat.missed, chat.last_minute) == ("chat", 1, 1, 0.5)
    assert chat.ttft_p99_s == pytest.approx(3.0, rel=0.01)
    assert (chat.bins[-1], chat.bins[-2], chat.bins[0]) == (0.0, 1.0, None)
    [miss] = server.misses
    assert (miss.rid, miss.cause, miss.ended_s) == ("late", "misprediction", -7.0)
    assert miss.ttft_s == pytest.approx(3.0)


def test_attainment_is_what_counting_all_requests_of_the_last_minutes_finds() -> None:
    random, told = Random(3), Attainment()
    fates: list[tuple[float, bool, float | None]] = []
    for second in range(900):
        for _ in range(random.randrange(4)):
            fate = (second + 0.5, random.random() < 0.8, random.choice((None, random.lognormvariate(0.0, 1.5))))
            fates.append(fate)
            told.add("chat", *fate)
        [chat] = told.told(now_s := second + 1.0) or [None]
        last = [fate for fate in fates if fate[0] >= now_s - WINDOW_S]
        assert (chat is None) == (not last)
        if chat is None:
            continue
        bins: list[list[bool]] = [[] for _ in range(20)]
        for ended_s, met, _ in last:
            bins[-1 - int((now_s - ended_s) / BIN_S)].append(met)
        minute = [met for ended_s, met, _ in last if ended_s >= now_s - 60]
        assert (chat.met, chat.met + chat.missed) == (sum(met for _, met, _ in last), len(last))
        assert [chat.last_minute, *chat.bins] == [sum(met) / len(met) if met else None for met in (minute, *bins)]
        ttfts_s = sorted(ttft_s for *_, ttft_s in last if ttft_s is not None)
        if ttfts_s:
            assert chat.ttft_p50_s == pytest.approx(ttfts_s[ceil(0.5 * len(ttfts_s)) - 1], rel=0.01, abs=1e-3)
            assert chat.ttft_p99_s == pytest.approx(ttfts_s[ceil(0.99 * len(ttfts_s)) - 1], rel=0.01, abs=1e-3)
    assert told.told(2000.0) == []


def test_attainment_costs_hardly_more_of_many_requests() -> None:
    """CPU time of this thread, printed with -s. A document is made four times a second, in the HTTP server's loop."""

    def cost_s(requests: int) -> float:
        random, counted = Random(requests), Attainment()
        costs_s: list[float] = []
        for number in range(requests):
            counted.add("chat", WINDOW_S * number / requests, True, random.lognormvariate(0.0, 1.0))
        for _ in range(50):
            begin_s = time.thread_time()
            counted.told(WINDOW_S)
            costs_s.append(time.thread_time() - begin_s)
        print(f"attainment of {requests} requests: {1e6 * median(costs_s):.0f} us")
        return median(costs_s)

    cost_s(300)
    assert cost_s(60_000) < 5 * cost_s(300)


def test_who_waits_is_told_with_its_class() -> None:
    hub = hub_of(asked([(1, 9.0)]), "feasible").hub
    scheduler = Scheduler(recorded([arrival("r0", 0.0)]), 0.0, snapshot(hub.work, "feasible", 0.0))
    board = Board("prefill")
    board.read(asyncio.run(scheduler.ask(Ask(0))))
    state = board.server().state
    assert state is not None
    assert state.waiting[0].slo_class == "chat"


def test_what_is_not_kept_any_more_is_not_guessed_and_a_restarted_scheduler_is_read_from_its_beginning() -> None:
    begun = [*course("before", 0, 0.0, 0.1), arrival("half", 1.0)]
    board = board_of(begun, now_s=1.0)
    late = [Complete(9.0, 1, ["half"], 8, 8.0, 0.2, 0.2, 0.2), Leave(9.0, "half")]
    many = recorded([*begun, *islice(course("half", 1, 1.0, 8.0), 1, 3), *late, *course("after", 2, 9.0, 0.1)], most=7)
    assert not board.read(asyncio.run(Scheduler(many, 10.0).ask(Ask(board.next))))
    assert (board.server().attainment[0].met, board.server().misses) == (2, [])
    again = recorded(course("again", 0, 5.0, 0.1))
    board.read(asyncio.run(Scheduler(again, 6.0).ask(Ask(board.next))))
    assert (board.server().attainment[0].met, board.next) == (3, 5)


def test_the_page_has_words_for_every_cause_of_a_miss() -> None:
    page = FILE.read_text()
    told = page[page.index("const CAUSES") : page.index("let shown")]
    assert set(re.findall(r'^  "(.+?)":', told, re.MULTILINE)) == {str(cause) for cause in CAUSES}


# ---- who watches ----------------------------------------------------------------------------------------------------


async def documents(feed: SchedulerFeed, most: int) -> AsyncIterator[Document]:
    async with aclosing(feed.frames()) as frames:
        async for frame in frames:
            if frame.startswith(b"data: "):
                yield decode_document(frame.removeprefix(b"data: "))
                most -= 1
                if not most:
                    return


def test_the_scheduler_is_asked_only_while_somebody_watches_and_once_for_all() -> None:
    scheduler = Scheduler(recorded(course("r", 0, 0.0, 0.1)), 1.0)

    async def watch() -> None:
        feed = SchedulerFeed("prefill", scheduler.ask, every_s=0.02)
        await asyncio.sleep(0.1)
        assert scheduler.asked == []

        async def one() -> int:
            return len([document async for document in documents(feed, 5)])

        assert await asyncio.gather(one(), one(), one()) == [5, 5, 5]
        asked_while_watched = len(scheduler.asked)
        assert asked_while_watched < 12
        await asyncio.sleep(0.2)
        assert len(scheduler.asked) <= asked_while_watched + 1
        assert scheduler.asked[0] == Ask(0)
        assert scheduler.asked[-1] == Ask(5), "events are asked for once"

    asyncio.run(watch())


def test_who_watches_is_not_waited_for_by_a_server_that_ends() -> None:
    async def watch() -> list[bytes]:
        ending = False
        feed = SchedulerFeed("prefill", Scheduler(recorded([]), 0.0).ask, is_ending=lambda: ending, every_s=0.01)
        frames = []
        async for frame in feed.frames():
            frames.append(frame)
            ending = len(frames) > 3
        return frames

    assert len(asyncio.run(watch())) == 4


def test_a_scheduler_that_cannot_be_asked_is_told_of_and_asked_again() -> None:
    asked_before = 0

    async def ask(question: Ask) -> Answer:
        nonlocal asked_before
        asked_before += 1
        if asked_before == 1:
            raise KeyError("flowprefill_live")
        return await Scheduler(recorded([]), 0.0).ask(question)

    async def watch() -> list[Document]:
        return [document async for document in documents(SchedulerFeed("prefill", ask, every_s=0.01), 2)]

    lost, found = asyncio.run(watch())
    assert lost.servers[0].error is not None
    assert "flowprefill_live" in lost.servers[0].error
    assert (found.servers[0].error, found.servers[0].state) == (None, IDLE)


# ---- routes ---------------------------------------------------------------------------------------------------------


def answers(scheduler: Scheduler, *paths: str, api_key: str | None = None, **headers: str) -> list[httpx.Response]:
    async def get() -> list[httpx.Response]:
        feed = SchedulerFeed("prefill", scheduler.ask, every_s=0.01)
        app = Starlette(routes=routes(lambda: feed, api_key))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return [await client.get(path, headers=headers) for path in paths]

    return asyncio.run(get())


def test_the_last_seconds_are_given_as_lines_of_an_event_log_and_in_full_where_answers_are_short() -> None:
    events = [event for i in range(20) for event in course(f"r{i}", i, 10.0 * i, 0.1)]
    scheduler = Scheduler(recorded(events), 200.0, most=7)
    [response] = answers(scheduler, f"{EVENTS}?seconds=30")
    first, *events = decode_events(response.content)
    assert isinstance(first, Log), "it says what server it is, though the oldest events are not kept"
    assert [event.rid for event in events if isinstance(event, Arrival)] == ["r17", "r18", "r19"]


def test_the_past_is_told_to_one_after_the_other() -> None:
    """Each answer takes a thread of those that SGLang prepares requests in."""
    at_once = most_at_once = 0

    class Slow(SchedulerFeed):
        async def events(self) -> list[tuple[str, bytes]]:
            nonlocal at_once, most_at_once
            at_once += 1
            most_at_once = max(most_at_once, at_once)
            await asyncio.sleep(0.02)
            at_once -= 1
            return await super().events()

    async def get() -> list[httpx.Response]:
        feed = Slow("prefill", Scheduler(recorded(course("r", 0, 0.0, 0.1)), 1.0).ask)
        transport = httpx.ASGITransport(Starlette(routes=routes(lambda: feed)))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await asyncio.gather(*(client.get(path) for path in (TIMELINE, EVENTS) * 3))

    assert [response.status_code for response in asyncio.run(get())] == [200] * 6
    assert most_at_once == 1


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon", "1e9"])
def test_what_is_no_number_of_seconds_is_refused_with_what_is(seconds: str) -> None:
    for response in answers(
        Scheduler(recorded([]), 0.0), f"{TIMELINE}?seconds={seconds}", f"{EVENTS}?seconds={seconds}"
    ):
        assert response.status_code == 400
        assert seconds in response.text
        assert "above 0" in response.text


def test_with_an_api_key_only_the_page_without_data_is_given_to_all() -> None:
    scheduler = Scheduler(recorded(course("r", 0, 0.0, 0.1)), 1.0)
    page, *others = answers(scheduler, PAGE, STATE, TIMELINE, EVENTS, api_key="secret")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert [response.status_code for response in others] == [401] * 3
    assert scheduler.asked == []
    [events] = answers(scheduler, EVENTS, api_key="secret", authorization="Bearer secret")
    assert events.status_code == 200
    [wrong] = answers(scheduler, EVENTS, api_key="secret", authorization="secret")
    assert wrong.status_code == 401


def test_a_suspension_within_the_last_seconds_is_in_the_timeline_and_what_ended_before_is_not() -> None:
    events = [
        *course("before", 0, 0.0, 0.1),
        *islice(course("long", 1, 100.0, 9.0), 3),
        arrival("urgent", 101.0),
        Ready(101.0, "urgent", 101.0, 100, 0, 0.2),
        Suspend(101.1, 1, ["long"], 3, ["urgent"], 101.0, 101.05, 0.1),
        Start(101.1, 2, ["urgent"], 100, 0, 0.2),
    ]
    [response] = answers(Scheduler(recorded(events), 102.0), f"{TIMELINE}?seconds=30")
    assert response.headers["content-type"] == "application/x-protobuf"
    with trace_processor(response.content) as trace:
        found = trace.query("select distinct name from slice where name like 'task %' or name = 'suspended'")
    assert sorted(found) == [("suspended",), ("task 1",), ("task 2",)]
