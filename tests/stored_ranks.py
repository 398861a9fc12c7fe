"""Ranks with a storage behind their hierarchical caches: see ``tests.ranks`` and ``tests.stored``."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Final

from tests.data_parallel_ranks import DataParallelRanks
from tests.rank_notes import noting
from tests.ranks import Ranks
from tests.stored import evict, keep_in, options
from tests.unified_ranks import UnifiedRanks

POOL_TOKENS: Final = 5000
LEAVES: Final = "leaves"
"""Request id of an abort that asks all ranks to leave what they have cached in storage alone."""
TIMEOUT_S: Final = 2.0
"""Under ``timeout``, for how long requests wait for storage by the clock of any rank but the first."""
NEVER_S: Final = 1e6
"""By that of the first one."""
UNREAD: Final = "w1-"
"""What requests begin with for which the other ranks read nothing under ``timeout``, before their time is over."""


def keep(event_log: str) -> None:
    """Let storage of this rank's process be beside the event log. Its calls take longer, each rank's by chances of its
    own.
    """
    folder = Path(event_log).with_name("storage")
    folder.mkdir(exist_ok=True)
    keep_in(str(folder), delay_s=0.01)


class StoredRanks(Ranks):
    """A prefill server's."""

    settings: Mapping[str, Any] = {**Ranks.settings, **options(POOL_TOKENS)}

    @staticmethod
    def run_rank(*work: Any) -> None:
        keep(work[4])
        Ranks.run_rank(*work)


class StoredUnifiedRanks(UnifiedRanks):
    """Those of a server that decodes, too."""

    settings: Mapping[str, Any] = {**UnifiedRanks.settings, **options(POOL_TOKENS)}

    @staticmethod
    def run_rank(*work: Any) -> None:
        keep(work[4])
        UnifiedRanks.run_rank(*work)


class StoredJointRanks(DataParallelRanks):
    """Those of a prefill server with requests of their own, which have one storage."""

    settings: Mapping[str, Any] = {**DataParallelRanks.settings, **options(POOL_TOKENS)}

    @staticmethod
    def run_rank(*work: Any) -> None:
        keep(work[4])
        DataParallelRanks.run_rank(*work)


def note_reads(scheduler: Any, rank: int) -> None:
    """Write a line for each prefill whose result is processed: its request, how many tokens of it came from storage,
    and how many requests waited for storage then. And one each time that the rank has left all in storage: what is
    still held.
    """
    role, tree = scheduler.role, scheduler.tree_cache
    note_abort, finish, rest = role.note_abort, role.finish, role.rest
    reads, left = noting("reads", rank), noting("left", rank)
    is_asked = False
    tree.prefetch_timeout_base, tree.prefetch_timeout_per_page = TIMEOUT_S if rank else NEVER_S, 0.0
    if rank and tree.prefetch_stop_policy == "timeout":
        _read_late(tree.cache_controller)

    def noted_abort(rid_prefix: str, abort_all: bool) -> None:
        nonlocal is_asked
        is_asked = is_asked or rid_prefix == LEAVES
        note_abort(rid_prefix, abort_all)

    def noted_finish(task: Any) -> None:
        for req in task.batch.reqs:
            line = {"rid": req.rid, "tokens": int(req.cached_tokens_storage), "waiting": len(role.reads.awaited)}
            reads.write(json.dumps(line) + "\n")
        finish(task)

    def noted_rest() -> bool:
        nonlocal is_asked
        if is_asked and scheduler.is_fully_idle():
            is_asked = False
            evict(scheduler)
            left.write(json.dumps(_held(scheduler)) + "\n")
        return bool(rest())

    role.note_abort, role.finish, role.rest = noted_abort, noted_finish, noted_rest


def _read_late(controller: Any) -> None:
    read = controller.page_get_func

    def read_late(operation: Any, *arguments: Any, **named: Any) -> int:
        if not operation.request_id.startswith(UNREAD):
            return int(read(operation, *arguments, **named))
        while not operation.is_terminated():
            time.sleep(1e-3)
        return 0

    controller.page_get_func = read_late


def _held(scheduler: Any) -> dict[str, int]:
    tree = scheduler.tree_cache
    host, allocator, rows = (
        tree.cache_controller.mem_pool_host,
        scheduler.token_to_kv_pool_allocator,
        scheduler.req_to_token_pool,
    )
    return {
        "tokens on the device": int(scheduler.max_total_num_tokens - allocator.available_size()),
        "tokens in host memory": int(host.size - host.available_size()),
        "rows": int(rows.size - rows.available_size()),
        "tokens that are read": int(tree.cache_controller.prefetch_tokens_occupied),
        "reads": len(tree.ongoing_prefetch) + len(tree._storage_prefetch_wait) + len(scheduler.role.reads.awaited),
        "writes": len(tree.ongoing_backup),
    }


def leave_in_storage(ranks: Ranks, timeout_s: float = 180.0) -> None:
    """Let all ranks leave what they have cached in storage alone, when it is there; an AssertionError if something is
    held for longer. A read that nobody waits for any longer gives back its memory when its thread notices.
    """
    numbers, deadline_s = range(len(ranks.processes)), time.monotonic() + timeout_s
    while True:
        before = [len(ranks.notes("left", rank)) for rank in numbers]
        ranks.abort(LEAVES)
        while any(len(ranks.notes("left", rank)) == before[rank] for rank in numbers):
            assert time.monotonic() < deadline_s, "a rank has something to do though all is answered"
            time.sleep(0.02)
        held = [ranks.notes("left", rank)[-1] for rank in numbers]
        if not any(chain.from_iterable(rank.values() for rank in held)):
            return
        assert time.monotonic() < deadline_s, held
