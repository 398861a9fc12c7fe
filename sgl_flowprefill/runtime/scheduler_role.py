"""SGLang's scheduler as the hub's role: what prefill servers and unified servers do alike."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import chain
from typing import Any, Final, Self

from sglang.srt.disaggregation.utils import is_aborted
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.deadline import objective, received_s, resolver
from sgl_flowprefill.hub.device import Device
from sgl_flowprefill.hub.failure import Failure
from sgl_flowprefill.hub.parts import Agreement
from sgl_flowprefill.hub.role import Arrival, Decoder, NoStreams
from sgl_flowprefill.hub.snapshot import snapshot
from sgl_flowprefill.hub.task import PrefillTask, Tasks
from sgl_flowprefill.hub.waiting import BLOCK_TOKENS, WaitingRequest
from sgl_flowprefill.hub.work import Work, own_tokens
from sgl_flowprefill.live.state import State
from sgl_flowprefill.policy import ColocatedPolicy, Policy
from sgl_flowprefill.runtime.adapters import Adapters, adapters
from sgl_flowprefill.runtime.event_recorder import EventRecorder
from sgl_flowprefill.runtime.host_cache import HostCache, host_cache
from sgl_flowprefill.runtime.rebalancing import Rebalancing, rebalancing
from sgl_flowprefill.runtime.storage import READ_S, Reads, storage_reads
from sgl_flowprefill.runtime.wakeup import Wakeup
from sgl_flowprefill.slo.resolve import Resolver
from sgl_flowprefill.ttft import PrefillShape

RECENT_PROMPTS: Final = 16
STARTS_IN_VAIN: Final = 3
"""Times that a request may find no KV cache on an empty server before it is refused: a second or so apart, for what is
over by then, such as a load from the host that did not begin.
"""
IN_VAIN: Final = "flowprefill_starts_in_vain"
"""Attribute of SGLang's Req: how often it has found none there."""
COMPILES_SINCE: Final = "flowprefill_compiles_since_s"
"""Attribute of SGLang's Req: when its grammar began to be compiled here."""
GIVES_UP: Final = ("evict", "evict_for_alloc", "evict_host", "reset")
"""Methods by which SGLang's radix caches give up prefixes: as they are told to, where an allocation lacks KV cache,
where host memory is short on caches that have some, and all of them at a flush.
"""


@dataclass(frozen=True)
class Without(Collection[Any]):
    """Requests that wait ``without`` some of them, which are counted without a look at each."""

    waiting: Collection[Any]
    without: Collection[Any]

    def __len__(self) -> int:
        return len(self.waiting) - len(self.without)

    def __iter__(self) -> Iterator[Any]:
        return (req for req in self.waiting if req not in self.without)

    def __contains__(self, req: object) -> bool:
        return req in self.waiting and req not in self.without


@dataclass(eq=False)
class SchedulerRole(ABC):
    """What the hub asks of a server, by SGLang's own methods."""

    scheduler: Any
    """SGLang's scheduler."""
    resolver: Resolver
    tasks: Tasks
    wakeup: Wakeup
    device: Device
    agreement: Agreement
    recorder: EventRecorder
    policy_name: str = field(default="", init=False)
    """The policy that orders requests."""
    recent_prompts: deque[Sequence[int]] = field(default_factory=lambda: deque(maxlen=RECENT_PROMPTS), init=False)
    """Prompts of the last tasks: prefixes that are probably cached."""
    host_cache: HostCache = field(init=False)
    """Prefixes that the device had no room for."""
    reads: Reads = field(init=False)
    """Prefixes that are read from storage."""
    adapters: Adapters = field(default_factory=Adapters, init=False)
    """What requests ask for beside the base model."""
    rebalancing: Rebalancing = field(default_factory=Rebalancing, init=False)
    """Experts that move between ranks."""
    _looks_again: bool = field(default=False, init=False)
    """Whether, since the last look, no batch was made for a reason that is none for others: the first request has to
    wait for storage again, or has been refused.
    """

    def __post_init__(self) -> None:
        self.host_cache = host_cache(self.scheduler, self.wakeup.notify)
        self.reads = storage_reads(self.scheduler, self.wakeup.notify)

    @classmethod
    def make(cls, config: FlowPrefillConfig, scheduler: Any, *parts: Any) -> Self:
        """The role of ``scheduler``, of the other ``parts`` of a hub, as ``config`` has it."""
        role = cls(scheduler, resolver(config), *parts)
        role.policy_name = config.order
        role.adapters = adapters(scheduler, role.computed, config.max_starvation_s)
        role.rebalancing = rebalancing(scheduler)
        return role

    # ---- what its hub is made of ------------------------------------------------------------------------------------

    def decide(
        self, prefills: Policy[WaitingRequest, PrefillTask], config: FlowPrefillConfig
    ) -> ColocatedPolicy[WaitingRequest, PrefillTask]:
        """What decides here: ``prefills``, and beside it the steps of streams on a server that has some."""
        return ColocatedPolicy(prefills)

    @property
    def decoder(self) -> Decoder:
        """Who runs the steps."""
        return NoStreams()

    @property
    def steps_ahead(self) -> bool:
        """Whether steps can be queued behind those in flight."""
        return False

    # ---- what the hub asks ----------------------------------------------------------------------------------------

    @property
    def is_exiting(self) -> bool:
        return bool(self.scheduler.gracefully_exit)

    @property
    def is_paused(self) -> bool:
        return bool(self.scheduler._engine_paused)

    @abstractmethod
    def take_news(self, stalls_due: bool) -> bool: ...

    @abstractmethod
    def arrived(self) -> Iterator[Arrival]: ...

    @abstractmethod
    def drop(self, task: PrefillTask) -> None: ...

    @abstractmethod
    def retire(self, req: Any) -> None:
        """Answer ``req``, which is to end and waits in none of SGLang's queues any more, and free what it holds."""

    @abstractmethod
    def answer_tokens(self, req: Any) -> int:
        """The most tokens of its answer that are still to be computed here."""

    @abstractmethod
    def leaving(self) -> Iterable[Any]:
        """The requests of this rank whose prefill has run, and which this server is not done with."""

    def waiting(self) -> Collection[Any]:
        return Without(self.scheduler.waiting_queue, self.reads.awaited)

    def own_waiting(self) -> Collection[Any]:
        """``waiting``, without requests of other ranks."""
        return self.waiting()

    def abandoned(self, live: Sequence[PrefillTask]) -> list[PrefillTask]:
        """A request that leaves a batch in which others stay is computed to the end with it, and freed with the result:
        its rows are in every tensor that the suspended forward pass holds, and in the plan of its attention. At most
        ``max_batch_tokens`` are computed in vain.
        """
        return [task for task in live if all(map(is_aborted, task.batch.reqs))]

    def match(self, req: Any) -> PrefillShape:
        # Only to know how much of it is cached: what a start copies of a hybrid model's state takes a slot.
        req.init_next_round_input(self.scheduler.tree_cache, cow_mamba=False)
        cached_tokens = req.prefix_len + req.host_hit_length
        return PrefillShape(req.seqlen - cached_tokens, cached_tokens)

    def make_batch(self, reqs: Sequence[Any]) -> Any | None:
        """SGLang's own admission (prefix match, KV and slot allocation) for ``reqs`` alone, in their order, and what
        its loop does with a new batch.
        """
        scheduler, winner, reqs = self.scheduler, reqs[0], self.reads.with_prefixes(reqs)
        if not reqs or reqs[0] is not winner:
            self._looks_again = True
            return None
        chosen = set(reqs)
        others = [req for req in scheduler.waiting_queue if req not in chosen]
        scheduler.waiting_queue = list(reqs)
        # SGLang would wait for grammars that are not compiled yet. The hub has taken those that are.
        grammars = scheduler.grammar_manager
        compiling, grammars.grammar_queue = grammars.grammar_queue, []
        scheduler.running_batch.batch_is_full = False
        self.host_cache.before_batch()
        batch = scheduler.get_new_batch_prefill(scheduler.running_batch).batch_to_run
        grammars.grammar_queue = compiling
        scheduler.waiting_queue = scheduler.waiting_queue + others
        self.host_cache.after_batch(batch)
        self.reads.pass_by()
        if batch is None:
            self._note_start_in_vain(winner)
        return scheduler.ngram_embedding_manager.prepare_for_forward(batch, chunked_req=scheduler.chunked_req)

    def _note_start_in_vain(self, req: Any) -> None:
        """SGLang has not admitted ``req``. If it does not though nobody holds KV cache, it never will: ``req`` is
        refused, so that nobody waits behind it. What cannot be told when it arrives, such as of pools of several kinds,
        ends here.
        """
        scheduler = self.scheduler
        rows = scheduler.req_to_token_pool
        if rows.available_size() < rows.size or scheduler.tree_cache.protected_size() > 0:
            return
        in_vain = getattr(req, IN_VAIN, 0) + 1
        setattr(req, IN_VAIN, in_vain)
        if in_vain < STARTS_IN_VAIN:
            return
        scheduler.waiting_queue = [other for other in scheduler.waiting_queue if other is not req]
        req.set_finish_with_abort(scheduler.never_fits(req))
        self.retire(req)
        self._looks_again = True
        self.wakeup.notify()

    def fitting(self, reqs: Sequence[Any]) -> Sequence[Any]:
        """Those of ``reqs`` whose adapters find a slot (``Work.fitting``)."""
        return self.adapters.fitting(reqs, self.computed())

    def as_part(self, batch: Any) -> Any:
        """``batch``, which is to be computed, as this rank's part of what all ranks compute together, if they do."""
        return batch

    def held_tokens(self, task: PrefillTask) -> int:
        """KV cache that ``task`` would give back where the next step lacks some (``Work.held_tokens``)."""
        return own_tokens(task)

    def requests(self, batch: Any) -> Sequence[Any]:
        reqs: list[Any] = batch.reqs
        return reqs

    def shapes(self, batch: Any) -> list[PrefillShape]:
        return [PrefillShape(*lengths) for lengths in zip(batch.extend_lens, batch.prefix_lens, strict=True)]

    def switch_to(self, task: PrefillTask) -> None:
        self.scheduler.cur_batch_for_debug = task.batch

    def forward(self, batch: Any) -> Any:
        return self.scheduler.run_batch(batch)

    def finish(self, task: PrefillTask) -> None:
        self.recent_prompts.extend(member.prompt for member in task.members if len(member.prompt) >= BLOCK_TOKENS)
        self.scheduler.process_batch_result(task.batch, task.result)

    def shed(self, reasons: Mapping[Any, str], retry_after_s: int) -> None:
        """Refuse requests that wait, as the hub asks for where it sheds: ``Hub.refuse``."""
        raise NotImplementedError("this kind of server does not refuse requests that wait")

    def rest(self) -> bool:
        scheduler = self.scheduler
        scheduler.cur_batch_for_debug = None
        scheduler._sched_idled = True
        scheduler.on_idle()
        scheduler.flush_wrapper.check_pending()  # SGLang does so when it looks for messages, as it does all the time
        self.host_cache.wake_when_done()
        return bool(scheduler.is_fully_idle())

    # ---- what SGLang's scheduler tells ------------------------------------------------------------------------------

    def note_arrival(self, req: Any) -> None:
        """``req`` has come."""
        self.recorder.arrived(req, received_s(req), objective(req, self.resolver))

    def note_compiling(self, reqs: Sequence[Any]) -> None:
        """The grammars of ``reqs`` are being compiled: each is an event when it is done."""
        for req in reqs:
            setattr(req, COMPILES_SINCE, time.monotonic())
            if req.grammar is not None:
                req.grammar.add_done_callback(lambda _: self.wakeup.notify())

    def note_abort(self, rid_prefix: str, abort_all: bool) -> None:
        """Requests are to be aborted, wherever they are."""
        reqs = chain(self.held(), self.leaving(), self.scheduler.grammar_manager.grammar_queue)
        self.recorder.abort_asked(req for req in reqs if abort_all or req.rid.startswith(rid_prefix))

    def note_refusal(self, req: Any, reason: dict[str, Any] | None) -> None:
        """``req`` has ended with ``reason``, past the output streamer."""
        reason = reason or {}
        self.recorder.answered(req, reason.get("message"), reason.get("status_code"))

    # ---- the rest -------------------------------------------------------------------------------------------------

    @property
    def not_ready(self) -> int:
        """Requests that have arrived and that the hub cannot start yet."""
        return len(self.reads.awaited)

    def snapshot(self, work: Work, now_s: float, kv_is_short: bool) -> State:
        """What those are told who watch: what runs and waits at ``now_s``."""
        return snapshot(
            work,
            self.policy_name,
            now_s,
            decodes=not isinstance(self.decoder, NoStreams),
            is_paused=self.is_paused,
            kv_is_short=kv_is_short,
            not_ready=self.not_ready,
        )

    def computed(self) -> Iterable[Any]:
        """The requests for which forward passes are under way or to come."""
        return chain.from_iterable(task.batch.reqs for task in self.tasks.live)

    def in_flight(self) -> list[Any]:
        """The batches that SGLang's own scheduler would not know of."""
        return [task.batch for task in self.tasks.prefills]

    def held(self) -> list[Any]:
        """All requests that have arrived here and whose prefill has not run."""
        return [*self.scheduler.waiting_queue, *chain.from_iterable(task.batch.reqs for task in self.tasks.prefills)]

    def may_start(self, queued: Sequence[Any]) -> Sequence[Any]:
        """Those of the ``queued`` requests, and of those that waited for storage, that may start now."""
        ready = self.reads.may_start(queued)
        ended = self.reads.take_ended()
        if ended:
            self.scheduler.hub.work.waiting.cached([req.origin_input_ids for req in ended])
        return ready

    def take_messages(self) -> bool:
        """Arrivals, aborts and health checks; compiled grammars; transfers of the cache in host memory; that it is time
        to move experts. Whether a batch that could not be made may be possible now, for a transfer has ended or its
        first request waits.
        """
        scheduler = self.scheduler
        if self.rebalancing.is_due:
            scheduler.finish_started()
        has_transferred = self.host_cache.take_news()  # before a message that asks for a server without any
        looks_again, self._looks_again = self._looks_again, False
        scheduler.ingest_requests()
        while scheduler.return_health_check_ipcs:  # SGLang answers one a round; here the next may be long in coming
            scheduler.maybe_send_health_check_signal()
        if self.has_compiled_grammars():
            for req in scheduler.grammar_manager.get_ready_grammar_requests():
                scheduler._add_request_to_queue(req)
        return has_transferred or looks_again

    def has_compiled_grammars(self) -> bool:
        """Whether SGLang would find something among the grammars: its look waits for those that are not ready.

        It gives a grammar up after so many looks. Here one that has had the time which these take at least, by this
        rank's clock, is given up; SGLang gives up at all ranks what one of them does.
        """
        grammars = self.scheduler.grammar_manager
        if not grammars.has_waiting_grammars():
            return False
        most_looks = grammars.SGLANG_GRAMMAR_MAX_POLL_ITERATIONS
        too_old_s = time.monotonic() - most_looks * grammars.SGLANG_GRAMMAR_POLL_INTERVAL
        found = False
        for req in grammars.grammar_queue:
            if getattr(req, COMPILES_SINCE) < too_old_s:
                req.grammar_wait_ct = most_looks
                found = True
            found = found or req.finished() or req.grammar is None or req.grammar.done()
        return self.agree_on(found)

    def agree_on(self, found: bool) -> bool:
        """Whether the rank that decides has ``found`` something, at all ranks that have the same requests."""
        return bool(self.agreement.agree([found])[0])

    def agree_on_numbers(self, numbers: Sequence[int]) -> Sequence[int]:
        """The ``numbers`` of the rank that decides, at all ranks that have the same requests."""
        return self.agreement.agree(numbers)


def noticed_s(req: Any) -> float:
    """When the hub noticed that ``req``, which had to wait for storage, may start; 0 for one that had not."""
    return float(getattr(req, READ_S, 0.0))


def fail_unless_aborted(reqs: Sequence[Any], failure: Failure | None) -> None:
    """Requests among ``reqs`` that nobody has aborted end with ``failure``, if there was one."""
    for req in reqs:
        if failure is not None and not is_aborted(req):
            req.to_finish = FINISH_ABORT(failure.message, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")


def input_logprobs(req: Any) -> int:
    """Number of tokens of the prompt of SGLang's ``req`` whose log probabilities are asked for; cached ones are
    computed again for that.
    """
    if not req.return_logprob or req.logprob_start_len < 0:
        return 0
    return max(0, len(req.origin_input_ids) - int(req.logprob_start_len))


def tell_of_evictions(tree_cache: Any, evicted: Callable[[], None]) -> None:
    """Call ``evicted`` each time that ``tree_cache`` gives up prefixes that it has on the device or in host memory."""
    for name in GIVES_UP:
        give_up = getattr(tree_cache, name, None)
        if give_up is not None:
            setattr(tree_cache, name, _telling(give_up, evicted))


def _telling(give_up: Callable[..., Any], evicted: Callable[[], None]) -> Callable[..., Any]:
    def tell_and_give_up(*args: Any, **options: Any) -> Any:
        evicted()
        return give_up(*args, **options)

    return tell_and_give_up
