"""Data-parallel attention: the requests of several ranks, which run in joint forward passes, as those of one server.

Each rank has requests, KV cache and attention of its own, and all compute the MLPs of a forward pass together. So a
task is one pass of all ranks, to which each contributes a batch of its own or an idle one, and what is decided is
decided about the requests of all: every rank knows those of the others, by what they cost and when they are due, and in
the same order. With that, the hub does what it does for tensor parallelism: rank 0 decides, and all run the same tasks
to the same preemption checkpoints (docs/architecture.md).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any, ClassVar, Final, NamedTuple

import torch
from sglang.srt.disaggregation.utils import is_aborted
from sglang.srt.observability.req_time_stats import ReqTimeStatsBase

from sgl_flowprefill.deadline import objective, received_s
from sgl_flowprefill.hub.role import Arrival
from sgl_flowprefill.hub.task import NO_TASK, PrefillTask
from sgl_flowprefill.profiling.measure import SchedulerEngine
from sgl_flowprefill.runtime.agreement import Agreement
from sgl_flowprefill.runtime.event_recorder import LOST
from sgl_flowprefill.runtime.executor import Executor
from sgl_flowprefill.runtime.prefill_role import PrefillRole
from sgl_flowprefill.runtime.scheduler_role import SchedulerRole
from sgl_flowprefill.slo import Objective
from sgl_flowprefill.ttft import PrefillShape

PARTS: Final = "flowprefill_parts"
"""Attribute of SGLang's ScheduleBatch: the ``Parts`` of the joint pass that it belongs to."""
SHORT_TOKENS: Final = 8
"""Tokens of the joint pass by which ranks are checked at start."""


@dataclass(eq=False, slots=True)
class RemoteRequest:
    """A request of another rank."""

    rid: str
    rank: int
    origin_input_ids: Sequence[int]
    """Stands for its prompt, of which the length alone is known here."""
    origin_input_ids_unpadded: Sequence[int]
    bootstrap_room: int | None = None
    shape: PrefillShape | None = None
    """What it costs, as its rank has matched it last."""
    is_computed: bool = False
    """Whether its prefill has run."""
    time_stats: ClassVar[Any] = ReqTimeStatsBase()
    """Its trace is written at its own rank."""


class Noted(NamedTuple):
    """A request has come to a rank."""

    number: int
    rid: str
    prompt_tokens: int
    received_s: float
    objective: Objective
    bootstrap_room: int | None


class Ended(NamedTuple):
    """The client hears the last of a request from its rank (``EventRecorder.answered``)."""

    number: int
    reason: str | None
    http_status: int | None


class Tidings(NamedTuple):
    """What has happened at a rank since it was last asked. Requests go by the number that their rank gave them."""

    has_freed: bool
    """Whether KV cache has been freed."""
    noted: list[Noted]
    left: list[int]
    """Requests that could be started, and wait no longer."""
    ended: list[Ended]
    """Not of requests that wait still."""
    matched: list[tuple[int, PrefillShape]]
    """Requests that wait and whose prompts have been matched again, with what they cost now."""
    given_up: list[int]
    """Ids of tasks in which nobody waits any more for a request of this rank, which has some in them."""


class Parts(NamedTuple):
    """What a joint pass computes."""

    reqs: list[Any]
    """Those of all ranks, in their order of priority."""
    shapes: list[PrefillShape]
    """The part of the rank with the most to compute, for which the others wait."""
    tokens: list[int]
    """New tokens, by rank."""


@dataclass(eq=False)
class JointRole(SchedulerRole):
    """What the hub asks of one rank of a server with data-parallel attention, about the requests of all.

    A subclass is a role of a server without, too, which is asked about the requests of this rank.
    """

    agreement: Agreement
    _counter: Iterator[int] = field(default_factory=count, init=False)
    _numbers: dict[Any, int] = field(default_factory=dict, init=False)
    """The requests of this rank that the others know, by what they are called there."""
    _startable: dict[Any, int] = field(default_factory=dict, init=False)
    """Those of them that can be started and have not been."""
    _remote: dict[tuple[int, int], RemoteRequest] = field(default_factory=dict, init=False)
    """The requests of the other ranks, by rank and number."""
    _remote_startable: dict[RemoteRequest, None] = field(default_factory=dict, init=False)
    _given_up: dict[int, set[int]] = field(default_factory=dict, init=False)
    """By id of a task, the ranks at which nobody waits for it."""
    _noted: list[Noted] = field(default_factory=list, init=False)
    _ended: list[Ended] = field(default_factory=list, init=False)
    _matched: list[tuple[int, PrefillShape]] = field(default_factory=list, init=False)
    """What the others have still to be told."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.recorder.on_answer(self._note_end)

    # ---- what is this rank's alone ----------------------------------------------------------------------------------

    @abstractmethod
    def own_news(self, stalls_due: bool) -> bool:
        """``take_news`` of this rank."""

    @abstractmethod
    def own_arrivals(self) -> Iterable[Arrival]:
        """``arrived`` of this rank."""

    @abstractmethod
    def own_waiting(self) -> Collection[Any]:
        """``waiting`` of this rank."""

    # ---- what the hub asks ----------------------------------------------------------------------------------------

    def take_news(self, stalls_due: bool) -> bool:
        """That of this rank, and what the others have to tell. Whether KV cache has been freed at any of them."""
        has_freed = self.own_news(stalls_due)
        if stalls_due:
            self._forget_lost()
        left, ended = self._take_left(), self._take_answered()
        own = Tidings(has_freed, self._noted, left, ended, self._matched, self._take_given_up())
        self._noted, self._matched = [], []
        for rank, tidings in enumerate(self.agreement.exchange(own if any(own) else None)):
            if tidings is not None:
                has_freed = has_freed or tidings.has_freed
                for task in tidings.given_up:
                    self._given_up.setdefault(task, set()).add(rank)
                if rank != self.agreement.rank:
                    self._hear(rank, tidings)
        return has_freed

    def arrived(self) -> Iterator[Arrival]:
        """The requests of all ranks that can be started, rank by rank."""
        own = [arrival._replace(dp_rank=self.agreement.rank) for arrival in self.own_arrivals()]
        for arrival in own:
            self._startable[arrival.req] = self._number(arrival.req)
        # Without its prompt: what is cached at other ranks does not concern it.
        told = [one._replace(req=self._startable[one.req], prompt=()) for one in own]
        for rank, theirs in enumerate(self.agreement.exchange(told or None)):
            if rank == self.agreement.rank:
                yield from own
            else:
                yield from (self._arrival(rank, one) for one in theirs or ())

    def waiting(self) -> Collection[Any]:
        return [*self.own_waiting(), *self._remote_startable]

    def abandoned(self, live: Sequence[PrefillTask]) -> list[PrefillTask]:
        """A task goes on while a request of any rank is waited for."""
        self._given_up = {task.id: self._given_up[task.id] for task in live if task.id in self._given_up}
        return [task for task in live if self._given_up.get(task.id, set()).issuperset(self._ranks(task))]

    def match(self, req: Any) -> PrefillShape:
        """A request of another rank costs what that has said last; the others hear what one of this rank costs now."""
        if isinstance(remote := req, RemoteRequest):
            assert remote.shape is not None
            return remote.shape
        shape = super().match(req)
        if req in self._startable and shape != self.scheduler.hub.work.waiting.shape(req):
            self._matched.append((self._startable[req], shape))
        return shape

    def make_batch(self, reqs: Sequence[Any]) -> Any | None:
        """This rank's part of a joint pass over ``reqs``, of all ranks, which may be idle. None at all ranks where the
        rank of the first has no KV cache for it: what would join it there and elsewhere stays as it is.
        """
        own = [req for req in reqs if not isinstance(req, RemoteRequest)]
        begins = bool(own) and own[0] is reqs[0]
        batch = super().make_batch(own) if begins else None
        if not any(self.agreement.exchange(batch is not None or None)):
            return None
        if own and not begins:
            batch = super().make_batch(own)
        admitted = [] if batch is None else list(zip(map(reqs.index, batch.reqs), super().shapes(batch), strict=True))
        batch = self.as_part(batch)
        of_ranks = [part or [] for part in self.agreement.exchange(admitted or None)]
        started = [reqs[place] for place, _ in sorted(chain.from_iterable(of_ranks))]
        for req in started:
            self._startable.pop(req, None)
            self._remote_startable.pop(req, None)
        shapes = [[shape for _, shape in part] for part in of_ranks]
        setattr(batch, PARTS, Parts(started, max(shapes, key=_most), [_most(part)[0] for part in shapes]))
        return batch

    def as_part(self, batch: Any | None) -> Any:
        """Where this rank has no ``batch``, SGLang makes it an idle one."""
        return self.scheduler.dp_attn_adapter.maybe_prepare_mlp_sync_batch(batch)

    def requests(self, batch: Any) -> Sequence[Any]:
        return parts(batch).reqs

    def shapes(self, batch: Any) -> list[PrefillShape]:
        return parts(batch).shapes

    def note_computed(self, task: PrefillTask) -> None:
        """The prefills of the requests of ``task`` have run."""
        for one in task.reqs:
            if isinstance(one, RemoteRequest):
                one.is_computed = True

    # ---- what SGLang's scheduler tells ------------------------------------------------------------------------------

    def note_arrival(self, req: Any) -> None:
        super().note_arrival(req)
        self._number(req)

    # ---- the rest -------------------------------------------------------------------------------------------------

    @property
    def not_ready(self) -> int:
        known = {*self._remote_startable, *chain.from_iterable(task.reqs for task in self.tasks.prefills)}
        return super().not_ready + sum(not (one.is_computed or one in known) for one in self._remote.values())

    def held(self) -> list[Any]:
        return [*super().held(), *self._remote.values()]

    def agree_on(self, found: bool) -> bool:
        """Each rank compiles the grammars of its own requests."""
        return found

    def agree_on_numbers(self, numbers: Sequence[int]) -> Sequence[int]:
        """Each rank has bootstraps of its own."""
        return numbers

    def _number(self, req: Any) -> int:
        """What ``req`` of this rank is called at the others, which are told of it the first time."""
        number = self._numbers.get(req)
        if number is None:
            number = self._numbers[req] = next(self._counter)
            promised = objective(req, self.resolver)
            prompt_tokens, at_s, room = len(req.origin_input_ids), received_s(req), req.bootstrap_room
            self._noted.append(Noted(number, req.rid, prompt_tokens, at_s, promised, room))
        return number

    def _note_end(self, req: Any, reason: str | None, http_status: int | None) -> None:
        number = self._numbers.pop(req, None)
        if number is not None:
            self._ended.append(Ended(number, reason, http_status))

    def _take_left(self) -> list[int]:
        """The numbers of the requests that could be started and that SGLang has dropped."""
        queue = self.own_waiting()
        if len(queue) == len(self._startable):
            return []
        waiting = set(queue)
        return [self._startable.pop(req) for req in list(self._startable) if req not in waiting]

    def _take_answered(self) -> list[Ended]:
        waiting = set(self._startable.values())
        ended, self._ended = self._ended, [one for one in self._ended if one.number in waiting]
        return [one for one in ended if one.number not in waiting]

    def _take_given_up(self) -> list[int]:
        rank = self.agreement.rank
        return [
            task.id
            for task in self.tasks.live
            if task.batch.reqs and rank not in self._given_up.get(task.id, ()) and all(map(is_aborted, task.batch.reqs))
        ]

    def _hear(self, rank: int, tidings: Tidings) -> None:
        """Another ``rank`` has something to tell."""
        for noted in tidings.noted:
            prompt, room = range(noted.prompt_tokens), noted.bootstrap_room
            req = self._remote[rank, noted.number] = RemoteRequest(noted.rid, rank, prompt, prompt, room)
            self.recorder.arrived(req, noted.received_s, noted.objective)
        for number in tidings.left:
            self._remote_startable.pop(self._remote[rank, number], None)
        for number, shape in tidings.matched:
            self._remote[rank, number].shape = shape
            self.scheduler.hub.work.waiting.note_outdated(self._remote[rank, number])
        for ended in tidings.ended:
            self.recorder.answered(self._remote.pop((rank, ended.number)), ended.reason, ended.http_status)

    def _arrival(self, rank: int, told: Arrival) -> Arrival:
        """What another ``rank`` has ``told``, by the number that the request has there."""
        req = self._remote[rank, told.req]
        self._remote_startable[req] = None
        return told._replace(req=req)

    def _ranks(self, task: PrefillTask) -> set[int]:
        """The ranks that have requests in ``task``."""
        return {one.rank if isinstance(one, RemoteRequest) else self.agreement.rank for one in task.reqs}

    def _forget_lost(self) -> None:
        """Requests that are lost have ended for the others too."""
        held = {*super().held(), *self.leaving(), *self.scheduler.grammar_manager.grammar_queue}
        for req in self._numbers.keys() - held:
            self._note_end(req, LOST, None)


@dataclass(eq=False)
class DataParallelRole(JointRole, PrefillRole):
    """What the hub asks of one rank of a prefill server with data-parallel attention."""

    def own_news(self, stalls_due: bool) -> bool:
        return PrefillRole.take_news(self, stalls_due)

    def own_arrivals(self) -> Iterable[Arrival]:
        return PrefillRole.arrived(self)

    def own_waiting(self) -> Collection[Any]:
        return PrefillRole.waiting(self)

    def finish(self, task: PrefillTask) -> None:
        self.note_computed(task)
        if task.batch.reqs:
            PrefillRole.finish(self, task)

    def drop(self, task: PrefillTask) -> None:
        if task.batch.reqs:
            PrefillRole.drop(self, task)


def check_idle_pass(role: JointRole, executor: Executor, checkpoints: int) -> None:
    """Raise SystemExit where a rank without a token passes other preemption checkpoints than those with some: they
    would be suspended behind different layers, and wait for each other for ever.
    """
    engine, runner = SchedulerEngine(role), role.scheduler.tp_worker.model_runner
    if role.agreement.rank == 0:
        batch = engine.make_batch((PrefillShape(SHORT_TOKENS),))
    else:
        batch = role.make_batch([RemoteRequest("of the first rank", 0, (), ())])
    task = PrefillTask(NO_TASK, batch, [], [], 0.0, 0.0, 0.0, attn_backend=runner.attn_backend)
    interrupted, executor.interrupted = executor.interrupted, lambda: False
    with torch.no_grad():
        executor.run(task, role.forward)
    executor.interrupted = interrupted
    engine.free(batch)
    passed = role.agreement.exchange(task.operators_passed)
    if task.failure is not None:
        raise SystemExit(f"sgl-flowprefill: a joint forward pass fails:\n{task.failure.traceback}")
    if set(passed) != {checkpoints}:
        raise SystemExit(
            f"sgl-flowprefill: with data-parallel attention, {type(runner.model).__name__} skips layers at ranks that "
            f"are idle (of {checkpoints}, its ranks run {', '.join(map(str, passed))}), so its ranks cannot be "
            "suspended together; leave --enable-dp-attention out, or serve it without FlowPrefill"
        )


def _most(part: Sequence[PrefillShape]) -> tuple[int, int]:
    """By what parts of a joint pass are compared, which a rank each computes."""
    return sum(shape.new_tokens for shape in part), sum(shape.cached_tokens for shape in part)


def parts(batch: Any) -> Parts:
    """What the joint pass computes that ``batch``, a rank's ScheduleBatch, belongs to."""
    found: Parts = getattr(batch, PARTS)
    return found
