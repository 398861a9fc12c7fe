"""A scheduler whose answers are made, served by the real routes of those who watch."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from sgl_flowprefill.events import AnyEvent, Arrival, Complete, EventLog, Fail, Leave, Ready, RecentEvents, Start
from sgl_flowprefill.live.ask import Ask
from sgl_flowprefill.live.feed import SchedulerFeed
from sgl_flowprefill.live.routes import routes
from sgl_flowprefill.live.state import Answer, State, Task, Waiting

HOSTILE = "<img src=x onerror=alert(1)>"
"""A client chooses its request's id."""
LIKE_A_ROW = "more"
"""An id that the page has a row of its own for."""


class Scheduler:
    """A scheduler with a running prefill, a suspended one, and requests whose slack runs out."""

    def __init__(self) -> None:
        self.begin_s, self.asked = time.monotonic(), 0
        self._recent = RecentEvents(1000)
        log = EventLog(None, self._recent)
        log.begin(decodes=False)
        for event in self._past():
            log.write(lambda event=event: event)  # type: ignore[misc]

    def _past(self) -> Iterator[AnyEvent]:
        for i in range(40):
            t_s, slow = self.begin_s - 290 + 7 * i, i % 9 == 8
            rid, slo_class, took_s = f"past{i}", "chat" if i % 3 else "search", 3.0 if slow else 0.2
            yield Arrival(t_s, rid, 900 + i, 1.0, t_s + 1.0, t_s, slo_class, "body")
            yield Ready(t_s, rid, t_s, 900, 0, 0.25)
            yield Start(t_s + 0.1, i, [rid], 900, 0, 0.25)
            yield Complete(t_s + 0.1 + took_s, i, [rid], 16, took_s, 0.25, 0.25, 0.25)
            yield Leave(t_s + 0.1 + took_s, rid)
        yield Arrival(self.begin_s - 2, HOSTILE, 12_000, 1.0, self.begin_s - 1, self.begin_s - 2, "chat", "body")
        yield Fail(self.begin_s - 0.5, [HOSTILE], 500, f"the prefill of this request failed {HOSTILE}")

    async def ask(self, question: Ask) -> Answer:
        self.asked += 1
        gone_s = time.monotonic() - self.begin_s
        rids = [*(f"kept-{i}" for i in range(1, 6)), LIKE_A_ROW]
        waiting = [
            Waiting(rid, 400 * i, 128 * (i % 2), gone_s, 0.1 * i, 4.0 + 2 * i - gone_s % 4, "kept")
            for i, rid in enumerate(rids, start=1)
        ]
        waiting += [Waiting(f"late-{i}", 6000, 0, 9.0 + gone_s, 2.0, 0.5 - gone_s, "infeasible") for i in range(3)]
        tasks = [
            Task(7, ["runs"], 3, 3000, 0, True, gone_s % 5 / 5, 2 - gone_s % 5 * 0.4, 4 - gone_s % 5, "kept"),
            Task(6, [HOSTILE], 1, 12_000, 512, False, 0.4, 2.4, 31.0 - gone_s, "left out"),
        ]
        state = State("feasible", False, False, False, 1.07, tasks, waiting, 12, 2)
        first, following, lines = self._recent.since(question.since, 500)
        return Answer(time.monotonic(), first, following, self._recent.written, lines, state, self._recent.head)


@contextmanager
def served(scheduler: Scheduler, api_key: str | None = None) -> Iterator[str]:
    """The URL of an app with the routes of those who watch."""
    feed = SchedulerFeed("prefill", scheduler.ask)
    app = Starlette(routes=routes(lambda: feed, api_key))
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_config=None, log_level="warning", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)
