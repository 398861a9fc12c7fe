"""Tensor-parallel ranks agree on what runs and where it stops: rank 0 decides, the others follow.

Collectives pair up between ranks by their order, so every rank has to run the same tasks and leave each of them at the
same interruption point (a preemption checkpoint behind an operator, or the end of a tile). Two things are shared:

* ``Agreement.agree``, in the hub: what rank 0 has decided, in one all-reduce of the CPU process group. It ends when all
  ranks are there, and begins a *round*: the time until the next one, in which a task runs for a while.
* The *word*, at interruption points: one number that rank 0 writes. All ranks count the points of a round alike. At its
  own point ``i``, rank 0 permits the others to pass every point up to ``i + lead``; or, when an event is pending, it
  says that point ``i + lead`` is the stop. A rank at a point that is neither permitted nor the stop waits for rank 0,
  so none can be beyond a stop when it is published, however far apart the ranks run.

``word = 2 * permitted``, plus one when the point after the last permitted one is the stop. A round counts its points
from a number of its own, so what is left of an earlier round (a stop that its task did not reach) permits and stops
nothing. ``lead`` is what a device runs ahead, and one: without it the others would wait for rank 0 at every point.
"""

from __future__ import annotations

import mmap
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Final, NamedTuple

import psutil
import torch
import torch.distributed as dist

from sgl_flowprefill.processes import is_alive
from sgl_flowprefill.runtime.wakeup import Address, Wakeup

POINTS_PER_ROUND: Final = 1 << 24
"""More interruption points than a task has; rounds then last for years in the 63 bits of a word."""
MOST_VALUES: Final = 127
"""Numbers that one all-reduce carries; more go in several. A batch has at most 64 requests (``policy.Limits``)."""
WAIT_S: Final = 300.0
"""How long a rank waits for another before it gives the server up. SGLang's watchdog waits as long for a forward."""
FAILED_WAIT_S: Final = 20.0
"""How long a rank whose task has failed waits for the others to say that theirs has, too. A rank that failed alone has
left the others in a collective that will not end."""
POLL_S: Final = 20e-6
"""How often a rank that is ahead of rank 0 looks whether it may go on."""
SLICE_S: Final = 1.0
"""The longest part of a wait that counts at once, so the most that counts of a time for which a process was stopped."""
LOOK_S: Final = 0.1
"""How often a rank that waits looks whether the others of its node are there."""
WORD_TAG: Final = 0x464C
"""Tag of messages with the word, apart from others on the same process group."""
SHARED_MEMORY: Final = "/dev/shm"


class AgreementError(RuntimeError):
    """A tensor-parallel rank is gone or does not answer, so this one cannot go on."""


class Patience:
    """How long a rank goes on waiting for another, in the time for which its own process ran.

    When all ranks are stopped (SIGSTOP, a frozen cgroup) and continued later, the monotonic clock has gone on, and none
    has kept another waiting.
    """

    def __init__(self, limit_s: float) -> None:
        self._left_s = limit_s
        self._looked_s = time.monotonic()

    def is_over(self) -> bool:
        """Asked again and again during a wait, at least every ``SLICE_S``.

        Not during a wait for a message of the word between nodes: gloo closes the connections of a process whose wait
        for a message ends early, so that wait is one piece, and time for which all ranks are stopped counts there.
        """
        now_s = time.monotonic()
        self._left_s -= min(now_s - self._looked_s, SLICE_S)
        self._looked_s = now_s
        return self._left_s <= 0


class Leader:
    """Rank 0 at interruption points. Knows what is pending; writes the word."""

    def __init__(self, lead: int, pending: Callable[[], bool], write: Callable[[int], None]) -> None:
        self._lead = lead
        self.pending = pending
        self._write = write
        self.point = 0
        self.stop = 0

    def begin(self, point: int) -> None:
        """A round begins, whose points come after ``point``. Every other rank has left the last one."""
        self.point, self.stop = point, 0
        self._write(2 * (point + self._lead))

    def interrupted(self) -> bool:
        """Called at each interruption point. Whether all ranks suspend their task at this one."""
        self.point = point = self.point + 1
        if self.stop:
            return point == self.stop
        if self.pending():
            self.stop = point + self._lead
            self._write(2 * self.stop - 1)
        else:
            self._write(2 * (point + self._lead))
        return False


class Follower:
    """Another rank at interruption points. Reads the word, and calls ``wait`` while it does not say enough."""

    def __init__(self, read: Callable[[], int], wait: Callable[[], None], wait_s: float) -> None:
        self._read = read
        self._wait = wait
        self._wait_s = wait_s
        self.point = 0

    def begin(self, point: int) -> None:
        """See ``Leader``."""
        self.point = point

    def interrupted(self) -> bool:
        """See ``Leader``."""
        self.point = point = self.point + 1
        return False if self._read() >= 2 * point else self._ask(point)

    def _ask(self, point: int) -> bool:
        """Whether ``point``, which was not permitted a moment ago, is the stop."""
        patience = Patience(self._wait_s)
        while (word := self._read()) < 2 * point - 1:
            if patience.is_over():
                raise AgreementError(f"tensor-parallel rank 0 has not moved for {self._wait_s:g} s during a prefill")
            self._wait()
        return word == 2 * point - 1


class SharedWord:
    """The word in memory that the ranks of one node share. Written and read whole: it is aligned."""

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            memory = memoryview(mmap.mmap(file.fileno(), mmap.PAGESIZE)).cast("q")
        self.write: Callable[[int], None] = partial(memory.__setitem__, 0)
        self.read: Callable[[], int] = partial(memory.__getitem__, 0)

    def wait(self) -> None:
        """Give rank 0 some time."""
        time.sleep(POLL_S)

    def begin_round(self, word: int) -> None:
        """Rank 0 has written ``word`` to begin a round. What was under way before it is over when this returns."""


class SentWord(SharedWord):
    """The word at rank 0 of several nodes: each of the others gets it in messages to its first rank."""

    def __init__(self, path: str, group: dist.ProcessGroup, first_ranks: Sequence[int], wait_s: float) -> None:
        super().__init__(path)
        self._share, self.write = self.write, self._send
        self._group = group
        self._first_ranks = first_ranks
        self._timeout = timedelta(seconds=wait_s)
        self._under_way: list[tuple[Any, torch.Tensor]] = []

    def begin_round(self, word: int) -> None:
        for work, _ in self._under_way:
            work.wait(self._timeout)
        self._under_way.clear()

    def _send(self, word: int) -> None:
        self._share(word)
        message = torch.tensor([word])
        for rank in self._first_ranks:
            self._under_way.append((dist.isend(message, group=self._group, group_dst=rank, tag=WORD_TAG), message))


class ReceivedWord(SharedWord):
    """The word at the first rank of another node, which passes it on to its node. Messages come in order; it reads
    them when it needs to know more."""

    def __init__(self, path: str, group: dist.ProcessGroup, wait_s: float) -> None:
        super().__init__(path)
        self._group = group
        self._timeout = timedelta(seconds=wait_s)
        self._message = torch.zeros(1, dtype=torch.int64)

    def wait(self) -> None:
        work = dist.irecv(self._message, group=self._group, group_src=0, tag=WORD_TAG)
        assert work is not None
        work.wait(self._timeout)
        self.write(int(self._message))

    def begin_round(self, word: int) -> None:
        while self.read() < word:
            self.wait()


class _Card(NamedTuple):
    """What a rank tells the others about itself."""

    process_id: int
    word_path: str
    """Where the first rank of a node has made room for the word."""
    wakeup: Address | None
    """Where rank 0 takes wake-ups."""


class Agreement:
    """One rank's part in the decisions of rank 0."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        wakeup: Wakeup,
        pending: Callable[[], bool] | None,
        *,
        lookahead: int = 0,
        nodes: int = 1,
        host: str = "127.0.0.1",
        wait_s: float = WAIT_S,
    ) -> None:
        """Called by all ranks of the CPU process ``group`` together.

        ``pending`` tells rank 0 whether there is an event, and is None at the other ranks. What is notified to the
        ``wakeup`` of another rank reaches rank 0's, over UDP at its address ``host``. ``lookahead``: preemption
        checkpoints that the device runs ahead. Ranks are numbered node by node. A rank that waits for another for
        longer than ``wait_s`` raises AgreementError.
        """
        self.rank = dist.get_rank(group)
        self.decides = self.rank == 0
        self.ends_waiting = _never
        """Nothing ends a rank's wait for its device early, or ranks would not do the same."""
        self._group = group
        self._wait_s = wait_s
        self._round = 0
        self._ranks = ranks = dist.get_world_size(group)
        lead = lookahead + 1
        per_node = ranks // nodes
        first = self.rank - self.rank % per_node

        own_path = new_shared_page() if self.rank == first else ""
        address = wakeup.listen(host) if self.rank == 0 else None
        cards: list[_Card] = [_Card(0, "", None)] * ranks
        dist.all_gather_object(cards, _Card(os.getpid(), own_path, address), group=group)
        path = cards[first].word_path
        self._word: SharedWord
        self.side: Leader | Follower
        if pending is not None:
            others = range(per_node, ranks, per_node)
            self._word = SentWord(path, group, others, wait_s) if others else SharedWord(path)
            self.side = Leader(lead, pending, self._word.write)
        else:
            address = cards[0].wakeup
            assert address is not None
            wakeup.forward_to(address)
            self._word = ReceivedWord(path, group, wait_s) if self.rank == first else SharedWord(path)
            self.side = Follower(self._word.read, self._wait_for_word, wait_s)
        self.interrupted: Callable[[], bool] = self.side.interrupted
        """Called at each interruption point; true at the one at which all ranks suspend the running task."""
        self._lead = lead
        self._looked_s = 0.0
        self._peers = {r: psutil.Process(cards[r].process_id) for r in range(first, first + per_node) if r != self.rank}
        dist.barrier(group)
        if own_path:
            os.unlink(own_path)  # all of the node have it open, and nothing is left behind however they end

    def agree(self, values: Sequence[int] = (), failed_at: int = 0) -> list[int]:
        """The ``values`` of rank 0, at every rank, once all are here: a new round. Values of other ranks do not count.

        ``failed_at``: where this rank's task failed in the last round (``Failure.place``); 0: it has not. Raises
        AgreementError if another rank says otherwise: collectives of the task that one rank has queued and the other
        has not would pair up with collectives of the next task.
        """
        agreed: list[int] = []
        while True:
            left, part = self._meet(values[len(agreed) :], failed_at)
            agreed += part
            if left <= MOST_VALUES:
                return agreed

    def _meet(self, values: Sequence[int], failed_at: int) -> tuple[int, list[int]]:
        """One all-reduce: how many ``values`` rank 0 has, and as many of them as it carries."""
        message = torch.zeros(1 + MOST_VALUES + self._ranks, dtype=torch.int64)
        if self.rank == 0:
            part = values[:MOST_VALUES]
            message[: 1 + len(part)] = torch.tensor([len(values), *part])
        message[1 + MOST_VALUES + self.rank] = failed_at
        wait_s = min(self._wait_s, FAILED_WAIT_S) if failed_at else self._wait_s
        try:
            work = dist.all_reduce(message, group=self._group, async_op=True)
            assert work is not None
            _wait(work, wait_s)
            self._begin_round()
        except RuntimeError as error:
            raise AgreementError(
                f"a tensor-parallel rank has not answered rank {self.rank} within {wait_s:g} s, or has ended"
                + (f", after a prefill has failed at rank {self.rank}" if failed_at else "")
            ) from error
        places = message[1 + MOST_VALUES :].tolist()
        if len(set(places)) > 1:
            failed = ", ".join(str(rank) for rank, place in enumerate(places) if place)
            raise AgreementError(
                f"a prefill has failed at tensor-parallel rank {failed} and not at the same operator of all "
                f"{self._ranks} ranks, which cannot go on together; the log of rank {failed} has the error"
            )
        left = int(message[0])
        return left, message[1 : 1 + min(left, MOST_VALUES)].tolist()

    def exchange(self, value: Any = None) -> list[Any]:
        """What each rank says, at all ranks, in the order of ranks: any object. It costs least where all say None."""
        own = b"" if value is None else pickle.dumps(value)
        lengths = [int(length) for length in self._gather(torch.tensor([len(own)]))]
        if not any(lengths):
            return [None] * self._ranks
        padded = bytearray(own.ljust(max(lengths), b"\0"))
        said = self._gather(torch.frombuffer(padded, dtype=torch.uint8))
        return [
            pickle.loads(one[:length].numpy().tobytes()) if length else None
            for one, length in zip(said, lengths, strict=True)
        ]

    def _gather(self, own: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks, which have the same shape."""
        found = [torch.empty_like(own) for _ in range(self._ranks)]
        try:
            work = dist.all_gather(found, own, group=self._group, async_op=True)
            assert work is not None
            _wait(work, self._wait_s)
        except RuntimeError as error:
            raise AgreementError(
                f"a tensor-parallel rank has not answered rank {self.rank} within {self._wait_s:g} s, or has ended"
            ) from error
        return found

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """Errors in this context name the rank that has ended and so caused them, if one of this node has."""
        try:
            yield
        except Exception as error:
            self._name_the_lost(error)
            raise

    def _begin_round(self) -> None:
        self._round += 1
        point = self._round * POINTS_PER_ROUND
        self.side.begin(point)
        self._word.begin_round(2 * (point + self._lead))

    def _wait_for_word(self) -> None:
        """Nothing fails at a rank that waits for a word in shared memory whose writer has ended, so it looks."""
        self._word.wait()
        now_s = time.monotonic()
        if now_s - self._looked_s > LOOK_S:
            self._looked_s = now_s
            self._look_for_the_lost()

    def _name_the_lost(self, error: Exception) -> None:
        for _ in range(10):  # a process that ends closes its connections a moment before it has ended
            self._look_for_the_lost(error)
            time.sleep(LOOK_S)

    def _look_for_the_lost(self, error: Exception | None = None) -> None:
        """Raise AgreementError, because of ``error``, if a rank of this node has ended."""
        for rank, process in self._peers.items():
            if not is_alive(process):
                raise AgreementError(
                    f"tensor-parallel rank {rank} (process {process.pid}) has ended, and its server cannot go on "
                    "without it"
                ) from error


def _wait(work: Any, limit_s: float) -> None:
    """Wait for a collective, for at most ``limit_s`` of this process's own time. Raises RuntimeError."""
    patience = Patience(limit_s)
    while True:
        try:
            work.wait(timedelta(seconds=min(SLICE_S, limit_s)))
            return
        except RuntimeError:
            if work.is_completed():
                work.wait()  # raises what has happened, or it was done a moment after the slice
                return
            if patience.is_over():
                raise


def _never() -> bool:
    return False


def new_shared_page() -> str:
    """A file of one page of zeros in memory."""
    descriptor, path = tempfile.mkstemp(prefix="flowprefill-", dir=SHARED_MEMORY)
    os.truncate(descriptor, mmap.PAGESIZE)
    os.close(descriptor)
    return path
