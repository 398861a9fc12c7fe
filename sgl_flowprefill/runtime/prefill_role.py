"""SGLang's scheduler as a prefill server: the requests of its bootstrap queue run, and their KV is sent."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final

from sglang.srt.disaggregation.base import KVPoll

from sgl_flowprefill.deadline import objective, received_s, sent_s
from sgl_flowprefill.hub.role import Arrival
from sgl_flowprefill.hub.task import PrefillTask
from sgl_flowprefill.runtime.bootstraps import Bootstraps
from sgl_flowprefill.runtime.scheduler_role import SchedulerRole, fail_unless_aborted, input_logprobs, noticed_s

STALL_CHECK_REQUESTS: Final = 512
"""Most waiting requests that are looked at for stalls: SGLang takes about 1.5 us each, and a prefill may be stopped."""


@dataclass(eq=False)
class PrefillRole(SchedulerRole):
    """What the hub asks of a prefill server."""

    bootstraps: Bootstraps = field(default_factory=Bootstraps, init=False)
    """Which of the requests without a place at a decode server are to be looked at."""
    _looks_at_all: bool = field(default=False, init=False)
    """Whether all of them are, at the next look."""
    bootstrapped_s: dict[int, float] = field(default_factory=dict, init=False)
    """When the decode server had reserved its KV cache, by the room of a request that has not come here yet."""
    _reindexed: Any = field(default=None, init=False)
    """The last request whose KV indices were queued again after its prefill had run."""

    # ---- what the hub asks ----------------------------------------------------------------------------------------

    def take_news(self, stalls_due: bool) -> bool:
        """Messages, and KV transfers that ended."""
        has_transferred = self.take_messages()
        # What has ended gives back its metadata buffer, before those that need one are looked at.
        has_sent = bool(self.scheduler.process_disagg_prefill_inflight_queue())
        if stalls_due:
            self._looks_at_all = True
            self.drop_stalled()
            self.forget_rooms()
            self.recorder.close_lost(self.held())
        self.reads.forget_all_but(self.scheduler.waiting_queue)
        return has_sent or has_transferred

    def arrived(self) -> Iterator[Arrival]:
        """Requests that have bootstrapped, and do not wait for prefixes from storage."""
        bootstrapped = self._pop_bootstrapped()
        self.scheduler.waiting_queue.extend(bootstrapped)
        for req in self.may_start(bootstrapped):
            arrival_s, promised = received_s(req), objective(req, self.resolver)
            yield Arrival(
                req=req,
                shape=self.match(req),
                prompt=req.origin_input_ids,
                received_s=arrival_s,
                deadline_s=arrival_s + promised.ttft_s,
                readable_s=max(sent_s(req), self.bootstrapped_s.pop(req.bootstrap_room, 0.0), noticed_s(req)),
                logprob_rows=input_logprobs(req),
                objective=promised,
            )

    def finish(self, task: PrefillTask) -> None:
        drafted = task.result.next_draft_input
        if drafted is not None:
            # SGLang's own copy to the host would wait for all that is queued behind.
            with self.device.beside_the_queue():
                drafted.hidden_states = drafted.hidden_states.cpu()
        super().finish(task)

    def drop(self, task: PrefillTask) -> None:
        scheduler, batch = self.scheduler, task.batch
        fail_unless_aborted(batch.reqs, task.failure)
        self._retire(batch.reqs)
        scheduler._maybe_clear_mm_inputs(batch)

    def retire(self, req: Any) -> None:
        self._retire([req])

    def answer_tokens(self, req: Any) -> int:
        return 1

    # ---- what SGLang's scheduler tells ------------------------------------------------------------------------------

    def note_transfer_status(self, bootstrap_room: int, status: Any) -> None:
        """On a transfer thread: a bootstrap is complete, or a transfer has ended. Here: a bootstrap begins, with an
        arrival that is being read; that is no news.
        """
        if status == KVPoll.Bootstrapping:
            return
        if status == KVPoll.WaitingForInput:
            self.bootstrapped_s[bootstrap_room] = time.monotonic()
        elif status == KVPoll.Failed:
            self.bootstrapped_s.pop(bootstrap_room, None)
        self.bootstraps.tell(bootstrap_room)
        self.wakeup.notify()

    def note_abort(self, rid_prefix: str, abort_all: bool) -> None:
        """SGLang ends the requests that have not bootstrapped when it looks at them."""
        super().note_abort(rid_prefix, abort_all)
        self.bootstraps.mark("" if abort_all else rid_prefix)

    @contextmanager
    def noticing_new_indices(self, req: Any) -> Iterator[None]:
        """A context in which SGLang gives the KV cache of ``req``, whose prefill has run, to the radix cache. The role
        notes whether ``req`` gets new KV indices there: where another request has cached the same prefix since ``req``
        started, SGLang frees the slots of ``req`` and queues a write of the other request's indices.
        """
        others = self._cached_tokens() - req.kv.cache_protected_len
        yield
        if self._cached_tokens() - req.kv.cache_protected_len != others:
            self._reindexed = req

    def reading_indices(self, req: Any, has_run: bool) -> Any:
        """A context in which SGLang reads the KV indices of ``req`` back: beside the queue, where its prefill has run
        with them. Those of a cached prefix that is sent before are read in the queue: they, and loads of the prefix
        from host memory, are queued just before.
        """
        return self.device.beside_the_queue() if has_run and req is not self._reindexed else nullcontext()

    # ---- the rest -------------------------------------------------------------------------------------------------

    def _pop_bootstrapped(self) -> list[Any]:
        """The requests that have bootstrapped, of those that SGLang is shown of its queue. It asks how far each is, and
        ranks agree on that: the new ones, those of which something was told, and once a second all, for failures that
        nobody tells.
        """
        scheduler, bootstraps = self.scheduler, self.bootstraps
        queue = scheduler.disagg_prefill_bootstrap_queue
        queued = queue.queue
        if not queued:
            bootstraps.take_told()
            bootstraps.looked_at(bootstraps, (), out_of_buffers=False)
            return []
        new = bootstraps.take_in(queued)
        told = bootstraps.take_told(new, self.bootstrapped_s)
        shown = bootstraps.due(self.agree_on_numbers(told), new)
        looked_at, others = shown, list[Any]()
        if self._looks_at_all:
            self._looks_at_all = False
            looked_at, shown = list(bootstraps), queued
        elif shown:
            chosen = set(shown)
            others = [req for req in queued if req not in chosen]
            if len(shown) + len(others) > len(queued):  # some have left on another way
                shown = [req for req in queued if req in chosen]
        else:
            return []
        queue.queue = shown
        bootstrapped: list[Any] = scheduler.disagg_prefill_bootstrap_queue.pop_bootstrapped()
        staying = queue.queue
        queue.queue = others + staying
        out_of_buffers = scheduler.req_to_metadata_buffer_idx_allocator.available_size() == 0
        bootstraps.looked_at(looked_at, staying, out_of_buffers)
        return bootstrapped

    def drop_stalled(self) -> None:
        """SGLang drops waiting requests whose decode server is gone; here a part of them each time, in turns."""
        scheduler = self.scheduler
        later = scheduler.waiting_queue[STALL_CHECK_REQUESTS:]
        scheduler.waiting_queue = scheduler.waiting_queue[:STALL_CHECK_REQUESTS]
        scheduler.resolve_waiting_queue_bootstrap()
        scheduler.waiting_queue = later + scheduler.waiting_queue

    @property
    def not_ready(self) -> int:
        return super().not_ready + len(self.scheduler.disagg_prefill_bootstrap_queue.queue)

    def held(self) -> list[Any]:
        return [*self.scheduler.disagg_prefill_bootstrap_queue.queue, *super().held()]

    def leaving(self) -> Iterable[Any]:
        return list(self.scheduler.disagg_prefill_inflight_queue)

    def forget_rooms(self) -> None:
        """A bootstrap may be complete when its request has been aborted, or though it never comes here."""
        rooms = [req.bootstrap_room for req in self.scheduler.disagg_prefill_bootstrap_queue.queue]
        known = self.bootstrapped_s  # a transfer thread may change it meanwhile
        self.bootstrapped_s = {room: since_s for room in rooms if (since_s := known.get(room)) is not None}

    def _retire(self, reqs: Sequence[Any]) -> None:
        """Free what ``reqs`` hold that have not been retired yet, and answer these."""
        scheduler = self.scheduler
        retired = [req for req in reqs if scheduler._retire_aborted_prefill_result(req)]
        for req in retired:
            req.time_stats.set_completion_time()
        scheduler.output_streamer.stream_output(retired, any(req.return_logprob for req in retired))

    def _cached_tokens(self) -> int:
        tree = self.scheduler.tree_cache
        return int(tree.evictable_size() + tree.protected_size())
