"""A prefill task, one forward pass over a batch; a decode step whose tokens are on their way; the tasks of a hub."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from sgl_flowprefill.hub.device import Device, Stamp
from sgl_flowprefill.hub.failure import Failure
from sgl_flowprefill.hub.waiting import WaitingRequest
from sgl_flowprefill.pace import AS_PREDICTED, Pace
from sgl_flowprefill.policy import Job
from sgl_flowprefill.ttft import PrefillShape

NO_TASK: Final = -1
"""In place of a task's id."""
STEP: Final = NO_TASK - 1
"""In place of a task's id: a decode step. The one whose result comes first, where one is queued behind another."""


@dataclass(eq=False, slots=True)
class PrefillTask:
    """A started batch."""

    id: int
    batch: Any
    """The role's own: SGLang's ScheduleBatch."""
    members: Sequence[WaitingRequest]
    """The requests of the batch, in its order."""
    shapes: Sequence[PrefillShape]
    """What the batch computes, with the cached prefixes that its admission found."""
    arrival_s: float
    deadline_s: float
    predicted_s: float
    attention_share: float = 0.5
    """Share of the task's time that attention takes."""
    number: int = 0
    """Number of the job of the request that the task was started for."""
    pace: Pace = AS_PREDICTED
    readable_s: float = 0.0
    """When the scheduler process could first have read that the request it was started for can be run."""
    attn_backend: Any = None
    weight: float = 1.0
    """How much it counts to meet one of its requests, on average."""
    job: Job[PrefillTask] = field(init=False)
    """What the policy sees of it."""
    operators_passed: int = 0
    """Preemption checkpoints passed so far: one behind each operator, or behind each layer."""
    points_passed: int = 0
    """Interruption points passed so far: preemption checkpoints, and those of tiles."""
    tiles_passed: int = 0
    """Interruption points of tiles passed since the last preemption checkpoint."""
    spans: list[tuple[Stamp, Stamp]] = field(default_factory=list, repr=False)
    """Where it ran in the device's queue, from each start or resume to the suspension or end that followed."""
    has_run: bool = False
    """Whether it has run before: it may have been suspended within its first operator."""
    result: Any = None
    """What the forward pass returned, once done."""
    done: bool = False
    failure: Failure | None = None
    """What ended the forward pass before it was done, if something did."""
    suspended_forward: Any = field(default=None, repr=False)
    """For the executor: the forward pass while it does not run."""

    def __post_init__(self) -> None:
        work_s, requests = self.predicted_s / self.pace.factor, len(self.shapes)
        self.job = Job(
            self, self.arrival_s, self.deadline_s, work_s, requests, self.number, self.pace, True, self.weight
        )

    @property
    def executed_s(self) -> float:
        """Device time for which it ran, without the time for which it was suspended. Known once that has passed."""
        return sum(begin.seconds_until(end) for begin, end in self.spans)

    @property
    def reqs(self) -> list[Any]:
        """Requests of the task, as the role knows them."""
        return [member.req for member in self.members]

    @property
    def rids(self) -> list[str]:
        return [member.req.rid for member in self.members]

    @property
    def new_tokens(self) -> int:
        return sum(shape.new_tokens for shape in self.shapes)

    @property
    def was_given_back(self) -> bool:
        """Whether one of its requests has begun before, and lost what was computed of it."""
        return any(member.was_given_back for member in self.members)

    @property
    def logprob_rows(self) -> int:
        """Tokens of its prompts whose log probabilities are asked for."""
        return sum(member.logprob_rows for member in self.members)


@dataclass(eq=False, slots=True)
class DecodeStep:
    """A decode step that has been queued. It ends when its result is processed."""

    id: ClassVar[int] = STEP
    result: Any
    """What the forward pass returned."""
    batch: Any = None
    """The role's own: SGLang's running batch."""
    spans: Sequence[tuple[Stamp, Stamp]] = ()
    """Where it runs in the device's queue."""
    is_ahead: bool = False
    """Whether it was queued behind another step, whose result had not been processed."""
    queueing_s: float = 0.0
    """What it took the host to queue it."""

    @property
    def executed_s(self) -> float:
        """Device time of it, without that of what was queued before. Known once that has passed."""
        return sum(begin.seconds_until(end) for begin, end in self.spans)

    @property
    def least_s(self) -> float:
        """What it took the device, at least: with nothing before it, that may have waited while it was queued."""
        return self.executed_s if self.is_ahead else max(0.0, self.executed_s - self.queueing_s)


class Tasks:
    """The tasks of a hub that are not finished, and the decode steps in flight."""

    def __init__(self) -> None:
        self.started = 0
        """Tasks so far: the id of the next one."""
        self.live: list[PrefillTask] = []
        """Tasks that have started and are not done, in the order of their start, which is the same on all ranks."""
        self.finishing: deque[PrefillTask | DecodeStep] = deque()
        """Tasks that are done, and decode steps: their results are on their way from the device, in its order."""
        self.running: PrefillTask | None = None
        """The live task that ran last, and has not been suspended for another."""

    @property
    def prefills(self) -> list[PrefillTask]:
        """All but the decode steps."""
        return [*self.live, *(done for done in self.finishing if isinstance(done, PrefillTask))]

    @property
    def step(self) -> DecodeStep | None:
        """The last decode step that has been queued, if it is in flight."""
        return next((one for one in reversed(self.finishing) if isinstance(one, DecodeStep)), None)

    def __len__(self) -> int:
        return len(self.live) + len(self.finishing)

    def numbered(self, number: int) -> PrefillTask:
        """The live task with that id."""
        return next(task for task in self.live if task.id == number)

    def start(self, task: PrefillTask) -> None:
        self.started += 1
        self.live.append(task)

    def end(self, task: PrefillTask) -> None:
        """Forget a live task that is done or dropped."""
        self.live.remove(task)
        if self.running is task:
            self.running = None

    def result_arrived(self) -> bool:
        """Whether what finishes next has its result on the host."""
        return bool(self.finishing) and bool(self.finishing[0].result.copy_done.query())

    @property
    def arrival(self) -> int:
        """The id of what finishes next, if its result is on the host; NO_TASK otherwise."""
        return self.finishing[0].id if self.result_arrived() else NO_TASK

    def take_arrived(self, agreed_arrival: int, device: Device) -> Iterator[PrefillTask | DecodeStep]:
        """What finishes now, in the order in which it was queued. One may wait for its result while the device runs the
        next.

        Of several ranks, the first decides: what it has, the id ``agreed_arrival`` or NO_TASK, is on its way at all of
        them, behind the same kernels.
        """
        while self.finishing:
            first = self.finishing[0]
            is_on_its_way = first.result.copy_done is not None and first.id != agreed_arrival
            if is_on_its_way and len(self.finishing) == 1:
                return
            yield self._take_first(device)

    def take_all(self, device: Device) -> Iterator[PrefillTask | DecodeStep]:
        """All that is on its way, in the order in which it was queued, each when its result has arrived."""
        while self.finishing:
            yield self._take_first(device)

    def _take_first(self, device: Device) -> PrefillTask | DecodeStep:
        """What was queued first, when its result has arrived."""
        first = self.finishing[0]
        if first.result.copy_done is not None:
            device.wait(first.result.copy_done, lambda: False)
        return self.finishing.popleft()
