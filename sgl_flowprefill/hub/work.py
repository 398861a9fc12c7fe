"""All that could run: the requests that wait and the tasks that have started, as the policy's jobs."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Final, Literal

from sgl_flowprefill.hub.parts import TTFT, Memory
from sgl_flowprefill.hub.progress import Progress
from sgl_flowprefill.hub.role import Arrival
from sgl_flowprefill.hub.shedding import Refusal, Shedding, retry_after_s
from sgl_flowprefill.hub.task import NO_TASK, STEP, PrefillTask, Tasks
from sgl_flowprefill.hub.waiting import WaitingRequest, WaitingRequests
from sgl_flowprefill.policy import Act, ColocatedPolicy, Job, Joiner, Policy, Standing
from sgl_flowprefill.ttft import Prediction, PrefillShape

Choice = PrefillTask | list[Job[WaitingRequest]] | Literal[Act.STEP] | None
"""What runs next: a task that has started, the requests for a new one in order of priority, or a decode step."""
MOST_PASSED_OVER: Final = 8
"""Requests that an event passes over, at most: each is one more choice."""
PREDICTED_AT_ONCE: Final = 32
"""Requests that an event predicts anew, at most, when another TTFT model has been adopted."""
LOOKED_AT: Final = 8
"""Requests of which an event asks whether they have lost a cached prefix (``Work.first_evicted``)."""


def all_of(reqs: Sequence[Any]) -> Sequence[Any]:
    """The requests that there are adapters for, on a device without any."""
    return reqs


def own_tokens(task: PrefillTask) -> int:
    """The KV cache that ``task`` has for itself, on a device that has all of it. A cached prefix stays cached, if it is
    not needed: whoever has it evicted computes it again.
    """
    return task.new_tokens


def half(shapes: Sequence[PrefillShape]) -> float:
    """The share of attention in the time of a forward pass, where nothing is known of it."""
    return 0.5


@dataclass(eq=False)
class Work:
    """Keeps the jobs up to date, and has the policy choose among them."""

    colocated: ColocatedPolicy[WaitingRequest, PrefillTask]
    """Decides what runs: a prefill policy beside the decode steps of streams, where there are any."""
    ttft: TTFT
    memory: Memory
    progress: Progress
    tasks: Tasks
    attention_share: Callable[[Sequence[PrefillShape]], float] = half
    """Share of the time of a batch that attention takes."""
    waiting: WaitingRequests = field(default_factory=WaitingRequests)
    shedding: Shedding | None = None
    """The requests that may be refused, on a server that refuses any, at the rank that decides."""
    fitting: Callable[[Sequence[Any]], Sequence[Any]] = all_of
    """Those of some requests that the device has adapters for, beside all that it computes, each with those before it.
    Where it computes nothing, the first of them is one.
    """
    held_tokens: Callable[[PrefillTask], int] = own_tokens
    """KV cache that a task would give back where the next step lacks some."""
    batch_tokens: Callable[[], int] | None = None
    """Most new tokens of a batch, by what the TTFT model knows; None: as the policy's limits say."""
    dp_ranks: int = 1
    """Parts of the engine, each of which computes requests of its own in the same forward passes."""
    _of_former_model: deque[Job[WaitingRequest]] = field(default_factory=deque, init=False)
    ask_again_s: float = field(default=math.inf, init=False)
    """When to choose anew if nothing has happened until then: a decode step has to start."""

    @property
    def policy(self) -> Policy[WaitingRequest, PrefillTask]:
        """The prefill policy, which has all jobs."""
        return self.colocated.prefills

    # ---- requests that come and go --------------------------------------------------------------------------------

    def add(self, arrival: Arrival) -> Job[WaitingRequest]:
        """A request waits for its turn: its job. One that was given back has the number that it had, and so its turn,
        and counts no more among what arrives.
        """
        number = self.waiting.next_number() if arrival.number is None else arrival.number
        waiting = WaitingRequest(
            arrival.req,
            number,
            arrival.prompt,
            arrival.shape,
            arrival.readable_s,
            arrival.logprob_rows,
            arrival.dp_rank,
            math.inf if arrival.objective is None else arrival.objective.tbt_s,
            arrival.was_given_back,
        )
        shapes = (arrival.shape,)
        pace = self.ttft.pace(shapes)
        work_s = self.ttft.predict_s(shapes) / pace.factor
        weight = 1.0 if arrival.objective is None else arrival.objective.weight
        job = Job(waiting, arrival.received_s, arrival.deadline_s, work_s, 1, number, pace, weight=weight)
        self.waiting.add(job)
        self._put(job)
        promised = arrival.objective
        if self.shedding is not None and promised is not None and arrival.is_fresh:
            self.shedding.add(job, promised.slo_class, promised.sheddable)
        if arrival.retracted:
            self.colocated.returned(job)
        return job

    def forget_all_but(self, reqs: Collection[Any]) -> None:
        """Drop the jobs of requests that wait no longer: their client has left, or their decode server is gone."""
        for job in self.waiting.take_all_but(reqs):
            self._waits_no_longer(job)
            self.policy.withdrawn(job)

    def set_aside(self, reqs: Collection[Any], come_again: Collection[Any]) -> None:
        """``reqs`` wait and cannot start for now; others that could not ``come_again`` (``Shedding.set_aside``)."""
        if self.shedding is not None:
            self.shedding.set_aside(reqs, come_again)

    def refused(self, now_s: float) -> list[Refusal]:
        """The requests that are to be refused now, all of which wait."""
        if self.shedding is None:
            return []
        return [one for one in self.shedding.refused(self.policy, now_s) if self.waiting.holds(one.job)]

    def retry_after_s(self, without: Iterable[Job[WaitingRequest]]) -> tuple[float, int]:
        """The predicted work of all jobs ``without`` some, and whole seconds until it has run; 0 at a rank that does
        not decide.
        """
        if self.shedding is None:
            return 0.0, 0
        backlog_s = max(0.0, self.shedding.backlog.work_s - sum(job.remaining_s for job in without))
        return backlog_s, retry_after_s(backlog_s, self.colocated.load)

    def _put(self, job: Job[Any]) -> None:
        self.policy.add(job)
        if self.shedding is not None:
            self.shedding.backlog.add(job)

    def _take(self, job: Job[Any]) -> None:
        self.policy.remove(job)
        if self.shedding is not None:
            self.shedding.backlog.remove(job)

    def _waits_no_longer(self, job: Job[WaitingRequest]) -> None:
        self._take(job)
        self.colocated.waits_no_longer(job)
        if self.shedding is not None:
            self.shedding.remove(job)

    def match_again(self, jobs: Iterable[Job[WaitingRequest]], match: Callable[[Any], PrefillShape]) -> bool:
        """Match again those of ``jobs`` that have an outdated prefix match. Whether a choice is to be made anew: more
        of some has been cached since, or less of some is.
        """
        changed = False
        for job in list(filter(self.waiting.is_outdated, jobs)):
            shape = match(job.item.req)
            if not self.waiting.matched(job, shape):
                continue
            changed = True
            self._predict_again(job)
        return changed

    def _predict_again(self, job: Job[WaitingRequest]) -> None:
        """The prediction of ``job``, which waits, is that of now."""
        shapes = (job.item.shape,)
        self._take(job)
        job.pace = self.ttft.pace(shapes)
        job.remaining_s = self.ttft.predict_s(shapes)
        self._put(job)

    def first_evicted(self, now_s: float, most: int) -> list[Job[WaitingRequest]]:
        """Of the requests that are next in the order, ``most`` of those of which less may be cached than was."""
        if not self.waiting.evictions:
            return []
        first = self.policy.first_waiting(now_s, LOOKED_AT)
        return list(islice(filter(self.waiting.may_be_evicted, first), most))

    # ---- choosing -------------------------------------------------------------------------------------------------

    def choose(self, now_s: float, admit: bool, last: bool, passed_over: int = 0) -> Choice:
        """The policy's choice. Requests that do not fit beside the live tasks stay out of it, unless more of some has
        been cached, so that they are matched again and the choice is made anew: not so if it is the ``last``.
        ``passed_over``: requests that the policy prefers and that are out of it for now, as they may not join the
        streams yet.

        Requests of which less may be cached fit the less: only those that would start are matched again for that, so
        what an event costs does not depend on how much is evicted between the starts.
        """
        running = self.tasks.running.job if self.tasks.running else None
        turn = self.colocated.next(now_s, running, admit)
        self.ask_again_s = turn.ask_again_s
        if turn.act is Act.STEP:
            return Act.STEP
        job = turn.job
        if job is None or isinstance(job.item, PrefillTask):
            return None if job is None else job.item
        jobs = self.policy.batch(job, now_s, _new_tokens, self._predict_s, _dp_rank)
        if self.dp_ranks > 1:
            jobs += self.policy.beside(jobs, now_s, _new_tokens, self._predict_s, _dp_rank)
        if not last and any(map(self.waiting.has_more_cached, jobs)):
            return jobs
        jobs = self._with_adapters(jobs)
        if fitting := self._first_that_fit(jobs):
            return fitting
        is_waited_for = not self._may_pass_over(job, now_s)
        if not is_waited_for and passed_over < MOST_PASSED_OVER:
            self.policy.remove(job)
            try:
                return self.choose(now_s, admit, last, passed_over + 1)
            finally:
                self.policy.add(job)
        if jobs and self._fits(jobs[:1], with_own=False, is_waited_for=is_waited_for):
            return jobs[:1]
        # Where not even the winner fits beside the tasks, these go on.
        return self.choose(now_s, admit=False, last=True)

    def plan_step(self) -> None:
        """The next step starts when the streams of now need it, whatever else is chosen."""
        self.ask_again_s = self.colocated.step_by_s

    def to_give_back(self, now_s: float, tokens: int) -> list[PrefillTask]:
        """The tasks that are given up so that ``tokens`` of KV cache get free for streams. Who was given back before
        keeps its own while streams can be retracted in its place: it would lose all that was computed again.
        """
        can_retract = self.colocated.can_retract

        def held_tokens(task: PrefillTask) -> int:
            return 0 if can_retract and task.was_given_back else self.held_tokens(task)

        return self._given_up(now_s, tokens, held_tokens)

    def to_unwind(self, now_s: float) -> list[PrefillTask]:
        """The task that is given up first so that device memory gets free for streams. There is none where no task has
        begun to run: the others hold KV cache alone.
        """
        return self._given_up(now_s, 1, lambda task: max(1, task.new_tokens) if task.has_run else 0)

    def _given_up(self, now_s: float, tokens: int, held_tokens: Callable[[PrefillTask], int]) -> list[PrefillTask]:
        def executed_s(task: PrefillTask) -> float:
            return task.predicted_s - self.remaining_s(task)

        return [job.item for job in self.colocated.give_back(now_s, tokens, held_tokens, executed_s)]

    def as_numbers(self, choice: Choice) -> list[int]:
        """``choice`` for other ranks, which have the same tasks and requests: a task's id, NO_TASK and requests, or
        STEP.
        """
        if choice is None:
            return []
        if choice is Act.STEP:
            return [STEP]
        if isinstance(choice, PrefillTask):
            return [choice.id]
        return [NO_TASK, *(job.item.number for job in choice)]

    def from_numbers(self, numbers: Sequence[int]) -> Choice:
        """The choice that ``as_numbers`` was given."""
        if not numbers:
            return None
        if numbers[0] == STEP:
            return Act.STEP
        if numbers[0] != NO_TASK:
            return self.tasks.numbered(numbers[0])
        return self.waiting.numbered(numbers[1:])

    def _with_adapters(self, jobs: list[Job[WaitingRequest]]) -> list[Job[WaitingRequest]]:
        """The first of ``jobs`` and those that can be computed with it; none where it cannot."""
        fitting = set(self.fitting([job.item.req for job in jobs]))
        return [job for job in jobs if job.item.req in fitting] if jobs[0].item.req in fitting else []

    def _first_that_fit(self, jobs: list[Job[WaitingRequest]]) -> list[Job[WaitingRequest]]:
        """The winner, which is the first, and those that join it, but for those that do not fit beside it; none where
        not even the winner fits.
        """
        if not jobs or self._fits(jobs):
            return jobs
        return jobs[: bisect_left(range(1, len(jobs)), True, key=lambda count: not self._fits(jobs[:count]))]

    def _fits(self, jobs: Sequence[Job[WaitingRequest]], with_own: bool = True, is_waited_for: bool = False) -> bool:
        """Whether the activations of a task of ``jobs`` fit beside the live tasks', and its requests among the
        streams; ``with_own``: with the objectives between tokens that ``jobs`` have; ``is_waited_for``: all others
        wait with them.
        """
        parts = _by_dp_rank(jobs)
        if not self._may_join(jobs, parts, with_own, is_waited_for):
            return False
        live = self.tasks.live
        return not live or self.memory.admits(
            [task.new_tokens for task in live],
            max(sum(shape.new_tokens for shape in part) for part in parts),
            max([sum(job.item.logprob_rows for job in jobs), *(task.logprob_rows for task in live)]),
        )

    def _may_join(
        self,
        jobs: Sequence[Job[WaitingRequest]],
        parts: Sequence[Sequence[PrefillShape]],
        with_own: bool = True,
        is_waited_for: bool = False,
    ) -> bool:
        """Whether the streams can become as many as with those of all tasks, also of such whose results are on their
        way, and of ``jobs``, whose shapes are in ``parts``, one for each rank; ``with_own``: so that what ``jobs`` ask
        for themselves holds. One that was a stream before comes back whatever it asks for: somebody waits for the rest
        of its answer. ``is_waited_for``: all others wait with ``jobs``.
        """
        shapes = [shape for task in self.tasks.prefills for shape in task.shapes]
        requests = len(shapes) + max(map(len, parts))
        tokens = sum(map(sum, shapes)) + max(sum(map(sum, part)) for part in parts)
        new = [job.item for job in jobs if with_own and not self.colocated.returns(job)]
        joiners = [Joiner(one.tbt_s, sum(one.shape)) for one in new]
        return self.colocated.may_join(requests, tokens, joiners, is_waited_for)

    def _may_pass_over(self, winner: Job[WaitingRequest], now_s: float) -> bool:
        """Whether others may start before ``winner``, which has to wait for streams to end: a small request need not
        wait for them, too. Whoever has starved, was a stream before, or is in line by a fixed order, is waited for.
        """
        if self.colocated.returns(winner) or self._may_join([winner], [[winner.item.shape]]):
            return False
        [standing] = self.policy.standings([winner], now_s)
        return standing not in (Standing.STARVED, Standing.IN_LINE)

    def _predict_s(self, requests: Sequence[WaitingRequest]) -> float:
        return self.ttft.predict_s([request.shape for request in requests])

    # ---- tasks ----------------------------------------------------------------------------------------------------

    def start(
        self,
        now_s: float,
        winner: Job[WaitingRequest],
        batch: Any,
        reqs: Sequence[Any],
        shapes: Sequence[PrefillShape],
        slot: Any,
    ) -> PrefillTask:
        """The task of ``batch``, which was made of ``reqs`` for ``winner`` and computes ``shapes``. It is due when the
        first of its requests is that can be met: that may be a joiner, and the winner may be too late. It stays due
        then, also when that request's client leaves or it can be met no more: this is rare, and to follow it gains
        nothing (docs/simulator.md).
        """
        members = self.waiting.take(reqs)
        for member in members:
            self._waits_no_longer(member)
        predicted_s = self.ttft.predict_s(shapes)
        due_s = [member.deadline_s for member in members if now_s + predicted_s <= member.deadline_s]
        task = PrefillTask(
            id=self.tasks.started,
            batch=batch,
            members=[member.item for member in members],
            shapes=shapes,
            arrival_s=min(member.arrival_s for member in members),
            deadline_s=min(due_s, default=winner.deadline_s),
            predicted_s=predicted_s,
            attention_share=self.attention_share(shapes),
            number=winner.number,
            pace=self.ttft.pace(shapes),
            readable_s=winner.item.readable_s,
            attn_backend=slot,
            weight=sum(member.weight for member in members) / len(members),
        )
        self.tasks.start(task)
        self._put(task.job)
        return task

    def update(self, task: PrefillTask) -> None:
        """Tell the policy how much of a task that has started is left."""
        self._take(task.job)
        task.job.remaining_s = self.remaining_s(task)
        self._put(task.job)

    def end(self, task: PrefillTask) -> None:
        """Forget a task that is done or dropped."""
        self._take(task.job)
        self.tasks.end(task)

    def observe(self, task: PrefillTask) -> Prediction:
        """Learn from a task that is done; what was predicted before this was known. Log probabilities of prompts take
        time of which the TTFT model knows nothing: from a task with some it learns nothing.
        """
        self.progress.passed_all(task.operators_passed)
        if task.logprob_rows:
            return self.ttft.predict(task.shapes)
        return self.ttft.observe(task.shapes, task.executed_s)

    def computed(self, task: PrefillTask) -> None:
        """The KV of a task that is done can be a cached prefix of others, and the paces are those of today."""
        self.waiting.cached(member.prompt for member in task.members)
        self.follow()

    def adopted(self) -> None:
        """There is a better TTFT model: batches are as it says, and so are the predictions of all that has started.
        Those of what waits follow with ``predict_some``.
        """
        if self.batch_tokens is not None:
            self.policy.limits = replace(self.policy.limits, max_batch_tokens=self.batch_tokens())
        self.follow()
        for live in self.tasks.live:
            live.predicted_s = self.ttft.predict_s(live.shapes)
            self.update(live)
        self._of_former_model = deque(self.waiting.jobs)

    def predict_some(self) -> None:
        """Predict anew some of the requests that the former TTFT model predicted, if they still wait: an event cannot
        look at all.
        """
        former = self._of_former_model
        for _ in range(min(PREDICTED_AT_ONCE, len(former))):
            job = former.popleft()
            if self.waiting.holds(job):
                self._predict_again(job)

    def follow(self) -> None:
        """Predict what has started, and pace what waits, by what the TTFT model knows now."""
        if self.ttft.follow():
            for live in self.tasks.live:
                live.predicted_s = self.ttft.predict_s(live.shapes)
            self.policy.repaced()

    def remaining_s(self, task: PrefillTask) -> float:
        """Predicted time left, from the preemption checkpoints that the task has passed, not from wall time."""
        if not self.progress.checkpoints:
            return max(0.0, task.predicted_s - task.executed_s)
        return task.predicted_s * self.progress.left(task.operators_passed, task.attention_share)


def _new_tokens(request: WaitingRequest) -> int:
    return request.shape.new_tokens


def _dp_rank(request: WaitingRequest) -> int:
    return request.dp_rank


def _by_dp_rank(jobs: Sequence[Job[WaitingRequest]]) -> list[list[PrefillShape]]:
    """The shapes of ``jobs``, those of each rank together."""
    dp_ranks = {job.item.dp_rank for job in jobs}
    return [[job.item.shape for job in jobs if job.item.dp_rank == dp_rank] for dp_rank in dp_ranks]
