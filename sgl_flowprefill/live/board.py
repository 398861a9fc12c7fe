"""What became of a server's requests in the last minutes, kept where somebody watches: in the HTTP server's process."""

from __future__ import annotations

from collections import deque
from typing import Final

from sgl_flowprefill.events import AnyEvent, Arrival, Step, decode_events
from sgl_flowprefill.live.attainment import Attainment
from sgl_flowprefill.live.state import Answer, Miss, Server
from sgl_flowprefill.outcomes import Outcome, Outcomes

MOST_MISSES: Final = 25


class Board:
    """Reads a scheduler's answers, one after the other, and says how things are."""

    def __init__(self, name: str) -> None:
        self.next = 0
        """Number of the event to ask for next."""
        self._server = Server(name)
        self._now_s = 0.0
        self._outcomes: Outcomes | None = None
        self._head = b""
        """The first line of the scheduler's log."""
        self._classes: dict[str, str] = {}
        """The class of each request whose outcome is not known."""
        self._attainment = Attainment()
        self._misses: deque[tuple[float, Miss]] = deque(maxlen=MOST_MISSES)

    def read(self, answer: Answer) -> bool:
        """Take ``answer``. Whether there are events that it had no room for."""
        if answer.first != self.next or answer.head != self._head:
            # What lies between is not kept any more, or the scheduler was started again.
            self._outcomes = None
            self._classes.clear()
        if answer.state is not None:
            self._server.state = answer.state
            if self._outcomes is None:
                self._outcomes = Outcomes(answer.state.decodes)
        for event in decode_events(answer.lines):
            self._read(event)
        self.next, self._head = answer.next, answer.head
        self._now_s = answer.now_s
        return answer.next < answer.written

    def server(self) -> Server:
        """How things are at the time of the last answer."""
        server, now_s = self._server, self._now_s
        if server.state is not None:
            for waiting in server.state.waiting:
                waiting.slo_class = self._classes.get(waiting.rid, "")
            for task in server.state.tasks:
                task.slo_class = self._classes.get(task.rids[0], "") if task.rids else ""
        server.attainment = self._attainment.told(now_s)
        server.misses = [_aged(miss, ended_s - now_s) for ended_s, miss in reversed(self._misses)]
        return server

    def _read(self, event: AnyEvent) -> None:
        if self._outcomes is None:
            return
        if isinstance(event, Arrival):
            self._classes[event.rid] = event.slo_class
        elif isinstance(event, Step):
            return
        for outcome in self._outcomes.read(event):
            self._classes.pop(outcome.rid, None)
            if outcome.met is not None:
                self._attainment.add(outcome.arrival.slo_class, event.t_s, outcome.met, outcome.ttft_s)
            if outcome.met is False:
                self._misses.append((event.t_s, miss_of(outcome)))


def miss_of(outcome: Outcome) -> Miss:
    """What is told of a request that missed its objective."""
    arrival = outcome.arrival
    return Miss(
        rid=outcome.rid,
        slo_class=arrival.slo_class,
        slo_source=arrival.slo_source,
        cause=str(outcome.cause),
        ended_s=0.0,
        ttft_slo_s=arrival.ttft_slo_s,
        ttft_s=outcome.ttft_s,
        predicted_s=outcome.predicted_s,
        waited_s=outcome.waited_s,
        slack_at_admission_s=outcome.slack_at_admission_s,
        blocked_s=outcome.blocked_s,
        suspensions=outcome.suspensions,
        suspended_s=outcome.suspended_s,
        prompt_tokens=arrival.prompt_tokens,
        reason=outcome.reason,
    )


def _aged(miss: Miss, ended_s: float) -> Miss:
    miss.ended_s = ended_s
    return miss
