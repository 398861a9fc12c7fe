"""Real scheduler processes of a tensor-parallel server that prefills and decodes: see ``tests.ranks``."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from typing import Any, Final

from tests.engine import FIRST_START_S, measure_for
from tests.late_device import LateDevice
from tests.rank_notes import note_finishes
from tests.ranks import Chaos, Ranks, agree_on_interruptions, become_rank
from tests.reference import Comparison
from tests.unified_asks import Ask
from tests.unified_rounds import coin

BEHIND: Final = 10
"""Decode steps of a late device whose results are to be processed with operators queued behind them. How many requests
that takes is a matter of the machine's speed."""
MOST_WAVES: Final = 6


class UnifiedRanks(Ranks):
    """Ranks that give whole answers."""

    settings: Mapping[str, Any] = {"disaggregation_mode": "null"}

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.answers: dict[str, list[int]] = defaultdict(list)
        self.all_logprobs: dict[str, list[float]] = defaultdict(list)

    @staticmethod
    def run_rank(*work: Any) -> None:
        run_unified_rank(*work)

    def ask(self, rid: str, ask: Ask, rank: int = 0) -> None:
        self.send(ask.message(rid, None), rank)

    def take(self, timeout_s: float) -> bool:
        from sglang.srt.managers.io_struct import sock_recv

        some = False
        while self._answers.poll(0 if some else int(timeout_s * 1e3)):
            output = sock_recv(self._answers)
            values = output.output_token_logprobs_val or [[] for _ in output.rids]
            for rid, ids, logprobs, reason in zip(
                output.rids, output.output_ids, values, output.finished_reasons, strict=True
            ):
                self.answers[rid] += ids
                self.all_logprobs[rid] += map(float, logprobs)
                if reason is not None:
                    self.reasons[rid] = reason
                    self.tokens[rid] = ids[0] if ids else None
            some = True
        return some

    def steps_with_more_behind(self) -> int:
        """Decode steps of a late device whose results rank 0 has processed with operators queued behind them."""
        return sum(note["step"] and note["behind"] > 0 for note in self.notes("finishes", 0))

    def waves(self, asked: Mapping[str, Ask]) -> Iterator[dict[str, Ask]]:
        """``asked``, and when it is answered the same with prompts that are not cached, until there have been BEHIND
        steps with more behind them; MOST_WAVES at most.
        """
        for wave in range(MOST_WAVES):
            yield {f"{rid}-{wave}": replace(ask, prompt=ask.prompt[wave:]) for rid, ask in asked.items()}
            if self.steps_with_more_behind() >= BEHIND:
                return

    def compare_answers(self, comparison: Comparison, asked: Mapping[str, Ask]) -> None:
        """Compare the first tokens of all answers, none of which ends early, and their log probabilities."""
        for rid, ask in asked.items():
            tokens, logprobs = self.answers[rid], self.all_logprobs[rid]
            comparison.answer(rid, ask.prompt, tokens, logprobs, new_tokens=ask.max_new_tokens)
        comparison.assert_same_with_logprobs()


def run_unified_rank(
    args: Any,
    ports: Any,
    rank: int,
    pipe: Any,
    event_log: str,
    log: str,
    chaos: Chaos | None,
    late: float | None,
    prepare: Callable[[Any, int], object] | None,
    dp_rank: int | None = None,
) -> None:
    become_rank(args, event_log, log)
    from sglang.srt.managers.scheduler import run_scheduler_process
    from sglang.srt.plugins import load_plugins

    load_plugins()
    measure_for(FIRST_START_S)
    from sgl_flowprefill.runtime import setup
    from sgl_flowprefill.runtime.unified_scheduler import UnifiedScheduler

    if late is not None:
        setup.make_device = lambda device_type, lookahead: LateDevice(lookahead, rank, late)
    init = UnifiedScheduler.__init__

    def with_chaos(scheduler: Any, *arguments: Any) -> None:
        init(scheduler, *arguments)
        if chaos is not None:
            _lack_kv_cache_now_and_then()
        if chaos is not None and rank == 0:
            rng, hub = random.Random(chaos.seed), scheduler.hub
            hub.work.colocated.next = coin(hub.work.colocated, rng, Counter())
            hub.executor.interrupted = lambda: rng.random() < chaos.switch_probability
            agree_on_interruptions(scheduler)
        if late is not None:
            note_finishes(scheduler, rank)
        if prepare is not None:
            prepare(scheduler, rank)

    UnifiedScheduler.__init__ = with_chaos  # type: ignore[method-assign]
    run_scheduler_process(args, ports, rank, rank, 0, dp_rank, pipe)


def _lack_kv_cache_now_and_then() -> None:
    """Every fifth time that a step is asked what it lacks, it lacks a token, on each rank."""
    from sgl_flowprefill.runtime.unified_role import UnifiedRole

    looks = count(1)
    UnifiedRole.missing_tokens = lambda role: int(next(looks) % 5 == 0)  # type: ignore[method-assign]
