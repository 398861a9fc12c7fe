"""Real scheduler processes of a server with data-parallel attention that prefills and decodes: see ``tests.ranks``."""

from __future__ import annotations

import json
import os
from typing import Any

from tests.data_parallel_ranks import DataParallelRanks, lack_kv_cache_now_and_then, note_passes, note_rests
from tests.rank_notes import noting
from tests.unified_asks import Ask
from tests.unified_ranks import UnifiedRanks, run_unified_rank


class JointUnifiedRanks(DataParallelRanks, UnifiedRanks):
    """Ranks with requests and all attention of their own, that give whole answers."""

    @staticmethod
    def run_rank(*work: Any) -> None:
        os.environ["FLOWPREFILL_MAX_BATCH_TOKENS"] = "1"  # a task for each request, and what takes no longer beside it
        rank = work[2]
        run_unified_rank(*work, rank)

    def ask(self, rid: str, ask: Ask, rank: int = 0) -> None:
        self._rank_of[rid] = rank
        super().ask(rid, ask, rank)


def note_all(scheduler: Any, rank: int) -> None:
    """Write lines for joint passes, for steps, and for what is held at rest; let admission fail now and then."""
    note_rests(scheduler, rank)
    note_passes(scheduler, rank)
    note_steps(scheduler, rank)
    lack_kv_cache_now_and_then(scheduler, rank)


def note_steps(scheduler: Any, rank: int) -> None:
    """Write a line for each decode step that is queued: the streams of this rank in it, those that the policy counts of
    all ranks, and where each prefill that has started is suspended meanwhile.
    """
    notes = noting("steps", rank)
    role = scheduler.role
    step = role.step

    def noted_step() -> Any:
        queued = step()
        line = {
            "own": None if queued is None else len(queued.batch.reqs),
            "all": role.policy.streams.requests,
            "live": [(task.id, task.operators_passed) for task in role.tasks.live],
        }
        notes.write(json.dumps(line) + "\n")
        return queued

    role.step = noted_step
