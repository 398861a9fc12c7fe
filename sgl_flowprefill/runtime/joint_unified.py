"""A server with data-parallel attention that prefills and decodes: decode steps are joint forward passes, too.

Each rank has streams of its own, and a step gives a token to those of all ranks; a rank without any takes part in it
with an idle batch, which SGLang makes. So that rank 0 can say when a step has to start, every rank knows of the streams
of the others what its policy asks for: their objectives, contexts, and when their last tokens came. Ranks tell each
other where all of them are at the same place anyway: when a task or a step ends, when a step begins, and when SGLang
has paused. What becomes of the KV cache of a rank, and so which of its streams it retracts, is decided there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

from sgl_flowprefill.hub.role import Arrival
from sgl_flowprefill.hub.task import PrefillTask
from sgl_flowprefill.policy import Stream
from sgl_flowprefill.runtime.data_parallel import PARTS, JointRole, RemoteRequest, parts
from sgl_flowprefill.runtime.unified_role import UnifiedRole


class Joined(NamedTuple):
    """A stream of a rank, by the number that it has there."""

    number: int
    tbt_s: float
    context_tokens: int
    joined_s: float


class StreamTidings(NamedTuple):
    """What has become of the streams of a rank since it last told of them."""

    joined: list[Joined]
    left: list[int]
    late: list[bool]
    """Of those that were retracted and have got their next token: whether it was late."""


@dataclass(eq=False)
class JointUnifiedRole(JointRole, UnifiedRole):
    """What the hub asks of one rank of a server that prefills and decodes with data-parallel attention."""

    _stream_counter: Iterator[int] = field(default_factory=count, init=False)
    _stream_numbers: dict[Stream, int] = field(default_factory=dict, init=False)
    """The streams of this rank that the others know."""
    _remote_streams: dict[tuple[int, int], Stream] = field(default_factory=dict, init=False)
    """The streams of the other ranks, by rank and number."""
    _retracted: list[Stream] = field(default_factory=list, init=False)
    """What the others have still to be told."""
    _late: list[bool] = field(default_factory=list, init=False)
    """Likewise, of ``StreamTidings.late``."""
    _lacking: list[int] = field(default_factory=list, init=False)
    """The ranks at which the next step lacks KV cache, of those where prefills hold some."""
    _gave_way: bool = field(default=False, init=False)
    """Whether requests have been kept out since the last look."""

    # ---- what is this rank's alone ----------------------------------------------------------------------------------

    def own_news(self, stalls_due: bool) -> bool:
        """Requests that were kept out come again when KV cache has been freed here, or may have been."""
        has_freed = UnifiedRole.take_news(self, stalls_due)
        if self.kept_out:
            waiting = set(self.scheduler.waiting_queue)
            self.kept_out = [req for req in self.kept_out if req in waiting]
            if has_freed or stalls_due:
                self.not_told += self.kept_out
                self.kept_out = []
        gave_way, self._gave_way = self._gave_way, False
        return has_freed or gave_way

    def own_arrivals(self) -> Iterable[Arrival]:
        return UnifiedRole.arrived(self)

    def own_waiting(self) -> Collection[Any]:
        return UnifiedRole.waiting(self)

    # ---- what the hub asks ----------------------------------------------------------------------------------------

    def make_batch(self, reqs: Sequence[Any]) -> Any | None:
        """Where this rank has no KV cache for the first of ``reqs``, its requests do not stand in the way of those of
        others: streams may hold it for long.
        """
        batch = super().make_batch(reqs)
        if batch is None and not isinstance(reqs[0], RemoteRequest):
            self.kept_out += self.own_waiting()
            self._gave_way = True
            self.wakeup.notify()
        return batch

    def finish(self, task: PrefillTask) -> None:
        self.note_computed(task)
        delattr(task.batch, PARTS)  # streams go on with the batch
        self.tell_policy(joined=self.new_streams(task) if task.batch.reqs else ())

    def drop(self, task: PrefillTask) -> None:
        if task.batch.reqs:
            UnifiedRole.drop(self, task)

    def missing_tokens(self) -> int:
        """Of all ranks together where prefills hold some."""
        has_some = any(task.batch.reqs for task in self.tasks.prefills)
        own = max(0, UnifiedRole.missing_tokens(self)) if has_some else 0
        missing = self.agreement.exchange(own or None)
        self._lacking = [rank for rank, tokens in enumerate(missing) if tokens]
        return sum(tokens or 0 for tokens in missing)

    def held_tokens(self, task: PrefillTask) -> int:
        """Where some is lacking."""
        return sum(parts(task.batch).tokens[rank] for rank in self._lacking)

    # ---- streams ----------------------------------------------------------------------------------------------------

    @property
    def steps_ahead(self) -> bool:
        """Rank 0 does not know what the streams of the other ranks wait for."""
        return False

    def tell_policy(self, joined: Sequence[Stream] = (), left: Sequence[Stream] = ()) -> None:
        """Of the streams of all ranks. Called at all of them together."""
        super().tell_policy(*self._exchange(joined, left))

    def ended_streams(self) -> list[Stream]:
        return self._exchange((), super().ended_streams())[1]

    def note_paused(self) -> None:
        super().note_paused()
        self.tell_policy()

    def note_retracted(self, stream: Stream) -> None:
        self._retracted.append(stream)

    def note_gaps(self, late: Sequence[bool]) -> None:
        self._late += late

    def _exchange(self, joined: Sequence[Stream], left: Sequence[Stream]) -> tuple[list[Stream], list[Stream]]:
        """The streams that have ``joined`` and ``left`` at any rank, rank by rank."""
        gone, self._retracted = [*self._retracted, *left], []
        for stream in joined:
            stream.dp_rank = self.agreement.rank
            self._stream_numbers[stream] = next(self._stream_counter)
        own = StreamTidings(
            [Joined(self._stream_numbers[one], one.tbt_s, one.context_tokens, one.joined_s) for one in joined],
            [self._stream_numbers.pop(stream) for stream in gone],
            self._late,
        )
        all_joined: list[Stream] = []
        all_left: list[Stream] = []
        all_late: list[bool] = []
        self._late = []
        for rank, told in enumerate(self.agreement.exchange(own if any(own) else None)):
            all_late += () if told is None else told.late
            if rank == self.agreement.rank:
                all_joined += joined
                all_left += gone
            elif told is not None:
                all_joined += [self._hear_of(rank, one) for one in told.joined]
                all_left += [self._remote_streams.pop((rank, number)) for number in told.left]
        super().note_gaps(all_late)
        return all_joined, all_left

    def _hear_of(self, rank: int, one: Joined) -> Stream:
        stream = Stream(one.tbt_s, one.context_tokens, one.joined_s, rank)
        self._remote_streams[rank, one.number] = stream
        return stream
