"""All that could run: the requests that wait and the tasks that have started, as the policy's jobs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from sgl_flowprefill.hub.parts import TTFT, Memory
from sgl_flowprefill.hub.progress import Progress
from sgl_flowprefill.hub.role import Arrival
from sgl_flowprefill.hub.task import NO_TASK, PrefillTask, Tasks
from sgl_flowprefill.hub.waiting import WaitingRequest, WaitingRequests
from sgl_flowprefill.policy import Act, ColocatedPolicy, Job, Policy
from sgl_flowprefill.ttft import Prediction, PrefillShape

Choice = PrefillTask | list[Job[WaitingRequest]] | Literal[Act.STEP] | None
"""What runs next: a task that has started, the requests for a new one in order of priority, or a decode step."""
STEP: Final = NO_TASK - 1
"""In place of a task's id: a decode step."""


def half(shapes: Sequence[PrefillShape]) -> float:
    """The share of attention in the time of a forward pass, where nothing is known of it."""
    return 0.5


@dataclass(eq=False)
class Work:
    """Keeps the jobs up to date, and has the policy choose among them."""

    policy: Policy[WaitingRequest, PrefillTask]
    ttft: TTFT
    memory: Memory
    progress: Progress
    tasks: Tasks
    attention_share: Callable[[Sequence[PrefillShape]], float] = half
    """Share of the time of a batch that attention takes."""
    waiting: WaitingRequests = field(default_factory=WaitingRequests)
    colocated: ColocatedPolicy[WaitingRequest, PrefillTask] | None = None
    """``policy`` beside the decode steps of streams, on a server that has streams."""
    ask_again_s: float = field(default=math.inf, init=False)
    """When to choose anew if nothing has happened until then: a decode step has to start."""

    # ---- requests that come and go --------------------------------------------------------------------------------

    def add(self, arrival: Arrival) -> None:
        """A request waits for its turn."""
        waiting = WaitingRequest(
            arrival.req,
            self.waiting.next_number(),
            arrival.prompt,
            arrival.shape,
            arrival.readable_s,
            arrival.logprob_rows,
        )
        shapes = (arrival.shape,)
        pace = self.ttft.pace(shapes)
        work_s = self.ttft.predict_s(shapes) / pace.factor
        job = Job(waiting, arrival.received_s, arrival.deadline_s, work_s, pace=pace)
        self.waiting.add(job)
        self.policy.add(job)
        if arrival.retracted and self.colocated is not None:
            self.colocated.returned(job)

    def forget_all_but(self, reqs: Collection[Any]) -> None:
        """Drop the jobs of requests that wait no longer: their client has left, or their decode server is gone."""
        for job in self.waiting.take_all_but(reqs):
            self.policy.remove(job)

    def match_again(self, jobs: Iterable[Job[WaitingRequest]], match: Callable[[Any], PrefillShape]) -> bool:
        """Match the ``jobs`` again of whose prompts more has been cached since. Whether there were any."""
        outdated = list(filter(self.waiting.is_outdated, jobs)) if self.waiting.any_outdated else []
        for job in outdated:
            self.policy.remove(job)
            shape = match(job.item.req)
            self.waiting.matched(job, shape)
            job.pace = self.ttft.pace([shape])
            job.remaining_s = self.ttft.predict_s([shape])
            self.policy.add(job)
        return bool(outdated)

    # ---- choosing -------------------------------------------------------------------------------------------------

    def choose(self, now_s: float, admit: bool, last: bool) -> Choice:
        """The policy's choice. Requests that do not fit beside the live tasks stay out of it, unless some are to be
        matched again before the choice is made anew: not so if it is the ``last``.
        """
        running = self.tasks.running.job if self.tasks.running else None
        if self.colocated is None:
            job = self.policy.pick(now_s, running, admit)
        else:
            turn = self.colocated.next(now_s, running, admit)
            self.ask_again_s = turn.ask_again_s
            if turn.act is Act.STEP:
                return Act.STEP
            job = turn.job
        if job is None or isinstance(job.item, PrefillTask):
            return None if job is None else job.item
        jobs = self.policy.batch(job, now_s, _new_tokens, self._predict_s)
        if not last and self.waiting.any_outdated and any(map(self.waiting.is_outdated, jobs)):
            return jobs
        while jobs and not self._fits(jobs):
            jobs = jobs[:-1]  # the winner is the first: those that join it stay out where they do not fit beside it
        # Where not even the winner fits beside the tasks, these go on.
        return jobs or self.choose(now_s, admit=False, last=True)

    def plan_step(self) -> None:
        """The next step starts when the streams of now need it, whatever else is chosen."""
        assert self.colocated is not None
        self.ask_again_s = self.colocated.load.start_by_s

    def to_give_back(self, now_s: float, tokens: int) -> list[PrefillTask]:
        """The tasks that are given up so that ``tokens`` of KV cache get free for streams."""
        assert self.colocated is not None

        def held_tokens(task: PrefillTask) -> int:
            return sum(map(sum, task.shapes))

        def executed_s(task: PrefillTask) -> float:
            return task.predicted_s - self._remaining_s(task)

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

    def _fits(self, jobs: Sequence[Job[WaitingRequest]]) -> bool:
        """Whether the activations of a task of ``jobs`` fit beside the live tasks', and its requests among the
        streams.
        """
        live = self.tasks.live
        if self.colocated is not None:
            shapes = [shape for task in live for shape in task.shapes] + [job.item.shape for job in jobs]
            if not self.colocated.may_join(len(shapes), sum(map(sum, shapes))):
                return False
        return not live or self.memory.admits(
            [task.new_tokens for task in live],
            sum(job.item.shape.new_tokens for job in jobs),
            max([sum(job.item.logprob_rows for job in jobs), *(task.logprob_rows for task in live)]),
        )

    def _predict_s(self, requests: Sequence[WaitingRequest]) -> float:
        return self.ttft.predict_s([request.shape for request in requests])

    # ---- tasks ----------------------------------------------------------------------------------------------------

    def start(
        self, winner: Job[WaitingRequest], batch: Any, reqs: Sequence[Any], shapes: Sequence[PrefillShape], slot: Any
    ) -> PrefillTask:
        """The task of ``batch``, which was made of ``reqs`` for ``winner`` and computes ``shapes``."""
        members = self.waiting.take(reqs)
        for member in members:
            self.policy.remove(member)
        task = PrefillTask(
            id=self.tasks.started,
            batch=batch,
            members=[member.item for member in members],
            shapes=shapes,
            arrival_s=min(member.arrival_s for member in members),
            deadline_s=winner.deadline_s,
            predicted_s=self.ttft.predict_s(shapes),
            attention_share=self.attention_share(shapes),
            number=winner.number,
            pace=self.ttft.pace(shapes),
            readable_s=winner.item.readable_s,
            attn_backend=slot,
        )
        self.tasks.start(task)
        self.policy.add(task.job)
        return task

    def update(self, task: PrefillTask) -> None:
        """Tell the policy how much of a task that has run is left."""
        self.policy.remove(task.job)
        task.job.remaining_s = self._remaining_s(task)
        self.policy.add(task.job)

    def end(self, task: PrefillTask) -> None:
        """Forget a task that is done or dropped."""
        self.policy.remove(task.job)
        self.tasks.end(task)

    def observe(self, task: PrefillTask) -> Prediction:
        """Learn from a task that is done; what was predicted before this was known."""
        self.progress.passed_all(task.checkpoint)
        return self.ttft.observe(task.shapes, task.executed_s)

    def computed(self, task: PrefillTask) -> None:
        """The KV of a task that is done can be a cached prefix of others, and the paces are those of today."""
        self.waiting.cached(member.prompt for member in task.members)
        self.follow()

    def follow(self) -> None:
        """Predict what has started, and pace what waits, by what the TTFT model knows now."""
        if self.ttft.follow():
            for live in self.tasks.live:
                live.predicted_s = self.ttft.predict_s(live.shapes)
            self.policy.repaced()

    def _remaining_s(self, task: PrefillTask) -> float:
        """Predicted time left, from the preemption checkpoints that the task has passed, not from wall time."""
        if not self.progress.checkpoints:
            return max(0.0, task.predicted_s - task.executed_s)
        return task.predicted_s * self.progress.left(task.checkpoint, task.attention_share)


def _new_tokens(request: WaitingRequest) -> int:
    return request.shape.new_tokens
