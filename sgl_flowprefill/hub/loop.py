"""The hub: one loop that takes what has happened, picks what runs now, and runs it until something happens.

It runs in the main greenlet and does everything but forward passes. A forward pass runs in its task's greenlet and
comes back at a preemption checkpoint with an event, or when it is done (docs/architecture.md). What differs between
engines is behind ``Role``; the hub imports neither SGLang nor torch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Literal, NamedTuple, TypeVar

from sgl_flowprefill.hub.ahead import StepAhead
from sgl_flowprefill.hub.device import Device
from sgl_flowprefill.hub.failure import StepOutOfMemory
from sgl_flowprefill.hub.parts import Agreement, Events, Executor, Exploration, Learning, Recorder, Slots, Tiles
from sgl_flowprefill.hub.role import Decoder, NoStreams, Role
from sgl_flowprefill.hub.task import NO_TASK, DecodeStep, PrefillTask
from sgl_flowprefill.hub.waiting import WaitingRequest
from sgl_flowprefill.hub.work import Choice, Work
from sgl_flowprefill.policy import Act, Job

logger = logging.getLogger(__name__)

RoleT = TypeVar("RoleT", bound=Role)

IDLE_CHECK_S: Final = 5.0
"""How often an idle server does its housekeeping (SGLang's leak check, metrics)."""
STALL_CHECK_S: Final = 1.0
"""How often a server that only waits for others looks for what sends no wake-up (a dead decode server)."""
MATCHES: Final = 1
"""Waiting requests with an outdated prefix match that a turn matches again, besides those about to start."""
MATCH_ROUNDS: Final = 3
"""``Hub.match_rounds``, where all ranks have the same requests."""
NO_MEMORY: Final = (
    "FlowPrefill: the device has no memory for a decode step of %d requests, so a prefill of %d gives its own back and "
    "will start again; lower --mem-fraction-static if this comes often (error %s):\n%s"
)


def refuse_nothing(reasons: Mapping[Any, str], retry_after_s: int) -> None:
    raise NotImplementedError("a hub that sheds was not told how its requests are refused")


class News(NamedTuple):
    """What a rank says when all meet at the beginning of a turn. What the rank that decides says counts."""

    stalls_due: int
    """Whether it is time to look for stalls."""
    arrival: int
    """Id of what finishes next, if its result is on the host; NO_TASK otherwise."""
    yardstick_us: int
    """Expected time of the YARDSTICK (``ttft.base``), by which tiles are as long on all ranks."""
    has_offer: int
    """Whether there is a better TTFT model."""


@dataclass(eq=False)
class Hub(Generic[RoleT]):
    """The loop of a server."""

    role: RoleT
    work: Work
    executor: Executor
    slots: Slots
    device: Device
    agreement: Agreement
    events: Events
    recorder: Recorder
    tiles: Tiles
    now_s: Callable[[], float] = time.monotonic
    stall_check_s: float = STALL_CHECK_S
    learning: Learning = field(default_factory=Learning)
    exploration: Exploration = field(default_factory=Exploration)
    decoder: Decoder = field(default_factory=NoStreams)
    """The decode steps, on a server that has streams."""
    ahead: StepAhead | None = None
    """When a step is queued behind the one in flight; None: when the result of that one has been processed."""
    match_rounds: int = MATCH_ROUNDS
    """Choices that a turn makes at most because requests about to start were matched again. With a single one, a look
    matches the first requests again of which less may be cached.
    """
    sheds: bool = False
    """Whether requests that wait may be refused."""
    refuse: Callable[[Mapping[Any, str], int], None] = refuse_nothing
    """Refuses requests that wait, each with its reason. Clients may come back after so many seconds."""
    kv_is_short: bool = field(default=False, init=False)
    """Whether KV for a new task was asked for in vain, and none has been freed since."""
    _refused_tokens: int = field(default=0, init=False)
    """New tokens of the request for which it was."""
    _short_until_s: float = field(default=math.inf, init=False)
    """When others may ask for some, if none is freed."""
    _stopped_s: float = field(default=0.0, init=False)
    """When a task was last done or interrupted."""
    _decide_by_s: float = field(default=math.inf, init=False)
    """When a decision is made at the latest: the recorder wants to be told of one, or others may start then."""
    _looked_s: float = field(default=-math.inf, init=False)
    """When the turn began."""
    _looked_for_stalls_s: float = field(default=-math.inf, init=False)
    _agreed_arrival: int = field(default=NO_TASK, init=False)
    """Id of what finishes next, if the rank that decides had its result when the ranks last met; then NO_TASK."""
    _has_finished: bool = field(default=False, init=False)
    """Whether results have been processed since the last look: more may be possible now."""

    # ---- the loop -------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Serve until the role exits."""
        with self.agreement.naming_the_lost():
            while not self.role.is_exiting:
                if not self.turn() and not self.role.is_exiting:
                    self._sleep()

    def turn(self) -> bool:
        """Run what is to run now until something happens. Whether there was anything, or its result is on the way."""
        task = self.next_task()
        if task is Act.STEP:
            self.step()
            return True
        if task is not None:
            self.executor.run(task, self.forward)
            self.stopped(task)
            return True
        return self._wait_for_result()

    def next_task(self) -> PrefillTask | Literal[Act.STEP] | None:
        """Take what has happened, and pick what runs now. A decode step leaves the task that ran where it is."""
        self.work.ask_again_s = self._decide_by_s = math.inf  # the choice that is made now says when
        cost_s, since_s, has_room = 0.0, self.now_s(), False
        self._looked_s = since_s
        while not has_room:
            self.look()
            self.finish_arrived()
            cost_s += self.now_s() - since_s
            # Picking late, when the device has room for another operator, is picking with all that is known by then.
            has_room = self.device.catch_up(self.agreement.ends_waiting)
            since_s = self.now_s()
        task = None if self.role.is_paused else self._pick()
        if task is not None and task is not Act.STEP:
            self._switch_to(task)
        if task is not None:
            now_s = self.now_s()
            self._decide_by_s = min(self.recorder.decided(cost_s + now_s - since_s, now_s), self._short_until_s)
        return task

    def look(self) -> None:
        """Take what has happened: arrivals, tasks that nobody waits for any more, KV cache that has been freed."""
        now_s, self._has_finished = self.now_s(), False
        stalls_due = self._agree_on_news(now_s)
        self.work.waiting.forget_news()
        if self.role.take_news(stalls_due) or stalls_due or now_s >= self._short_until_s:
            self.kv_is_short, self._short_until_s = False, math.inf
        self.work.forget_all_but(self.role.waiting())
        for task in self.role.abandoned(self.work.tasks.live):
            self.recorder.dropped(task)
            self._drop(task)
        for arrival in self.role.arrived():
            job = self.work.add(arrival)
            if arrival.shape.new_tokens < self._refused_tokens:  # it may fit
                self.kv_is_short = False
            self.recorder.ready(job)
        self.work.predict_some()
        outdated = self.work.waiting.outdated(MATCHES)
        if not outdated and self.match_rounds == 1:  # nobody is matched again before the start
            outdated = self.work.first_evicted(now_s, MATCHES)
        self._match_again(outdated)
        if self.sheds:
            self.shed()

    def shed(self) -> None:
        """Refuse the requests that may be refused and for which there is no time or room, at all ranks the same."""
        # Only the rank that decides has what may be refused.
        reasons = {one.job.item.number: one.why for one in self.work.refused(self.now_s())}
        jobs = self.work.waiting.numbered(self.agreement.agree(list(reasons)))
        if jobs:
            backlog_s, retry_after_s = self.work.retry_after_s(without=jobs)
            self.recorder.shed(jobs, backlog_s, retry_after_s)
            # It knows the reasons, and it alone answers.
            self.refuse({job.item.req: reasons.get(job.item.number, "") for job in jobs}, retry_after_s)
            self.work.forget_all_but(self.role.waiting())

    def stopped(self, task: PrefillTask) -> None:
        """``task``, which ran, is interrupted, or it is over: its result is on its way then, or it has failed."""
        if task.failure is not None:
            self._fail(task)
        elif task.done:
            self._end(task)
            self.work.tasks.finishing.append(task)
        self._stopped_s = self.now_s()
        if task.done:
            self.finish_arrived()

    def finish_arrived(self) -> None:
        """Process the results that are on the host."""
        arrival, self._agreed_arrival = self._agreed_arrival, NO_TASK
        for done in self.work.tasks.take_arrived(arrival, self.device):
            self._finish(done)

    def finish_started(self) -> None:
        """Run the tasks that have started to their ends, and process all results. Streams get their steps."""
        while self.work.tasks.live:
            self.work.plan_step()
            step_is_due, self._agreed_arrival = self.agreement.agree([self._step_is_due(), self.work.tasks.arrival])
            if self._agreed_arrival != NO_TASK:
                self.finish_arrived()
            elif step_is_due:
                self.step()
            else:
                task = self.work.tasks.running or self.work.tasks.live[0]
                self._switch_to(task)
                self.executor.run(task, self.forward)
                self.stopped(task)
        self.finish_done()

    def finish_done(self) -> None:
        """Process the results of all that is done or queued, which waits for results that have not arrived."""
        for done in self.work.tasks.take_all(self.device):
            self._finish(done)

    def has_news(self) -> bool:
        """Whether there is something to look at: an event, a result that has arrived from the device, or that it is
        time to choose anew whatever has happened.
        """
        by_s = self.ask_again_s
        return self.events.pending() or self.work.tasks.result_arrived() or (by_s < math.inf and self.now_s() >= by_s)

    @property
    def ask_again_s(self) -> float:
        """When to choose anew at the latest while what was chosen runs: a decode step has to start, others may ask for
        KV cache, or the recorder is to be told of a decision.
        """
        return min(self.work.ask_again_s, self._decide_by_s)

    def _step_is_due(self) -> bool:
        return self.work.ask_again_s < math.inf and self.now_s() >= self.work.ask_again_s

    # ---- decode steps ---------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Queue a decode step. What runs next is queued behind it, while its tokens are on their way to the host. Where
        that is the next step, the tokens of the one before are awaited and processed then. None is queued where the one
        before had to end for its KV cache: what that has freed may let others start.
        """
        is_ahead = self.work.tasks.step is not None
        self.make_room_for_step()
        if is_ahead and self.work.tasks.step is None:
            return
        since_s = self.now_s()
        step = self._queued_step()
        if step is not None:
            now_s = self.now_s()
            step.is_ahead, step.queueing_s = is_ahead, now_s - since_s
            if self.ahead is not None:
                self.ahead.queued(step, self._looked_s, now_s)
            self.work.tasks.finishing.append(step)
            self.finish_arrived()
        self._stopped_s = self.now_s()

    def _step_ahead_s(self) -> float:
        """When the next step is to be queued behind the one in flight, if nothing else can run until then; infinity
        where it has to wait for the result.
        """
        if self.ahead is None or self.work.tasks.step is None or not self.decoder.can_step_ahead():
            return math.inf
        return self.ahead.queue_at_s

    def make_room_for_step(self) -> None:
        """Where the next step lacks KV cache, tasks give theirs back before a stream loses its own. Where none does and
        streams cannot, prefills that have run end first: they free some, or become streams, of which there are several
        then. A step in flight ends before all that.
        """
        tasks = self.work.tasks
        while (tasks.live or tasks.finishing) and (missing_tokens := self.decoder.missing_tokens()) > 0:
            if tasks.step is not None:
                self.finish_done()
                continue
            given_up = self._agree_on(self.work.to_give_back, missing_tokens) if tasks.live else []
            for task in given_up:
                self.give_back(task)
            if not given_up and (not tasks.finishing or self.work.colocated.can_retract):
                return
            if not given_up:
                self.finish_done()

    def _queued_step(self) -> DecodeStep | None:
        """The decode step. Where the device has no memory for it, tasks that have run give theirs back, one after the
        other, until it has; without any, the server ends as SGLang's does.
        """
        while True:
            try:
                return self.decoder.step()
            except StepOutOfMemory as error:
                if not any(task.has_run for task in self.work.tasks.live):
                    raise
                failure, streams = error.failure, error.streams
            # Here, and not above: the error's traceback holds what the step had computed.
            self.agreement.agree(failed_at=failure.place)
            for task in self._agree_on(self.work.to_unwind):
                logger.warning(NO_MEMORY, streams, len(task.shapes), failure.id, failure.traceback)
                self.give_back(task)

    def _agree_on(self, given_up: Callable[..., list[PrefillTask]], *arguments: int) -> list[PrefillTask]:
        """The tasks that are ``given_up`` now at the rank that decides."""
        tasks = given_up(self.now_s(), *arguments) if self.agreement.decides else []
        return [self.work.tasks.numbered(number) for number in self.agreement.agree([task.id for task in tasks])]

    def give_back(self, task: PrefillTask) -> None:
        """Unwind a task whose requests wait again. Its KV cache, not computed, never becomes a cached prefix."""
        self.recorder.given_back(task)
        self._unwind(task)
        self.decoder.give_back(task)

    # ---- picking --------------------------------------------------------------------------------------------------

    def _pick(self) -> PrefillTask | Literal[Act.STEP] | None:
        """What runs now: a task that has started, a new one made of waiting requests, or a decode step."""
        if self.work.tasks.running is not None:
            self.work.update(self.work.tasks.running)
        while True:
            choice = self.choose()
            if not isinstance(choice, list):
                return choice
            task = self.start(choice)
            if task is not None:
                return task
            # Its KV does not fit. Work on what holds KV, and try again when some has been freed.
            self.kv_is_short, self._refused_tokens = True, choice[0].item.shape.new_tokens
            self._short_until_s = self.work.colocated.shut_until_s(choice[0], self.now_s())

    def choose(self) -> Choice:
        """What all ranks run next. Where its prompt can be matched farther, all do so, and the choice is made anew: a
        match touches the radix cache.
        """
        now_s = self.now_s()
        for left in reversed(range(self.match_rounds)):
            choice = self._agreed_choice(now_s, last=not left)
            if not isinstance(choice, list) or not left or not self._match_again(choice):
                break
        return choice

    def _agreed_choice(self, now_s: float, last: bool) -> Choice:
        proposal = self.work.choose(now_s, not self.kv_is_short, last) if self.agreement.decides else None
        if proposal is None and self.agreement.decides and now_s >= self._step_ahead_s():
            proposal = Act.STEP
        return self.work.from_numbers(self.agreement.agree(self.work.as_numbers(proposal)))

    def _match_again(self, jobs: list[Job[WaitingRequest]]) -> bool:
        return self.work.match_again(jobs, self.role.match)

    def start(self, jobs: list[Job[WaitingRequest]]) -> PrefillTask | None:
        """A new task for the first of ``jobs`` and those that join it, or None when the first one's KV does not fit."""
        batch = self.role.make_batch([job.item.req for job in jobs])
        if batch is None:
            return None
        reqs, shapes = self.role.requests(batch), self.role.shapes(batch)
        return self.work.start(self.now_s(), jobs[0], batch, reqs, shapes, self.slots.take())

    # ---- running --------------------------------------------------------------------------------------------------

    def _switch_to(self, task: PrefillTask) -> None:
        """``task`` runs next; the one that ran before is suspended."""
        now_s, tasks = self.now_s(), self.work.tasks
        if task is not tasks.running:
            if tasks.running is not None:
                news_readable_s = self.work.waiting.news_readable_s
                self.recorder.suspended(tasks.running, task, self._stopped_s, now_s, news_readable_s)
            self.recorder.resumed(task, now_s)
            tasks.running = task
        self.role.switch_to(task)

    def forward(self, batch: object) -> object:
        """In the task's greenlet: the whole forward pass, and the way back of its result."""
        result = self.role.forward(batch)
        self.device.fetch(batch, result)
        return result

    def _finish(self, done: PrefillTask | DecodeStep) -> None:
        """Process a result that is on the host."""
        self._has_finished = True
        if self.ahead is not None:
            self.ahead.arrived(done, self.now_s())
        if isinstance(done, DecodeStep):
            self.decoder.finish_step(done)
        else:
            self._finish_task(done)

    def _finish_task(self, task: PrefillTask) -> None:
        """Hand over the KV of a task that is done, and answer its requests."""
        self.slots.give_back(task.attn_backend)
        prediction = self.work.observe(task)
        self.recorder.completed(task, prediction)
        self.role.finish(task)
        self.work.computed(task)

    def _fail(self, task: PrefillTask) -> None:
        """Answer the requests of a task whose forward pass has raised with an error. Other tasks are not concerned."""
        failure = task.failure
        assert failure is not None
        logger.error("FlowPrefill: error %s in the prefill of %s:\n%s", failure.id, task.rids, failure.traceback)
        self.agreement.agree(failed_at=failure.place)
        self.recorder.failed(task, failure)
        self._drop(task)

    def _drop(self, task: PrefillTask) -> None:
        """End a task whose requests have all been given up: unwind its forward pass, free what it holds, and answer.

        Its KV cache is not computed, and so never becomes a cached prefix.
        """
        self._unwind(task)
        self.role.drop(task)

    def _unwind(self, task: PrefillTask) -> None:
        self.executor.cancel(task)
        self._end(task)
        self.slots.give_back(task.attn_backend)

    def _end(self, task: PrefillTask) -> None:
        """Forget a task that is done or dropped, and whose KV is or will be freed."""
        self.work.end(task)
        self.kv_is_short, self._short_until_s = False, math.inf

    # ---- meeting and waiting --------------------------------------------------------------------------------------

    def _agree_on_news(self, now_s: float) -> bool:
        """Meet the other ranks, which wait here while the first one sleeps. Whether it is time to look for stalls.

        The first one forgets what was notified before they meet: another may look before it does, and then tell it of
        what has come too late for that. The others, which tell of nothing twice, forget it when the wait is over.
        """
        if self.agreement.decides:
            self.events.clear()
        tasks = self.work.tasks
        stalls_due = now_s - self._looked_for_stalls_s >= self.stall_check_s
        yardstick_us = round(1e6 * self.work.ttft.yardstick_s)
        has_offer = self.agreement.decides and self.learning.look_for_offer()
        agreed = News(*self.agreement.agree(News(stalls_due, tasks.arrival, yardstick_us, has_offer)))
        if not self.agreement.decides:
            self.events.clear()
        self._agreed_arrival = agreed.arrival
        self.tiles.follow(agreed.yardstick_us / 1e6)
        if agreed.has_offer:
            self.learning.adopt()
            self.work.adopted()
        if agreed.stalls_due:
            self._looked_for_stalls_s = now_s
        return bool(agreed.stalls_due)

    def _wait_for_result(self) -> bool:
        """Nothing can run: wait for the result that is on its way, an event, or the time to queue a step behind it.
        Whether there is a result, or was one since the last look, which may have freed KV cache.
        """
        finishing = self.work.tasks.finishing
        if finishing and self.agreement.decides:  # the other ranks wait for what the first one decides next
            step_s = self._step_ahead_s()
            self.device.wait(finishing[0].result.copy_done, lambda: self.events.pending() or self.now_s() >= step_s)
        return bool(finishing) or self._has_finished

    def _sleep(self) -> None:
        """Nothing can run until something happens: housekeeping once, then explore, or sleep."""
        self.recorder.flush()
        is_idle = self.role.rest()
        if not self.exploration.explore(self._stopped_s if is_idle else math.inf, self.forward):
            self.events.sleep(IDLE_CHECK_S if is_idle else self.stall_check_s)
