"""Exploration on a real scheduler that a test drives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sgl_flowprefill.profiling.measure import SchedulerEngine
from sgl_flowprefill.runtime.exploration import Explorer
from sgl_flowprefill.ttft.learning import RefittedTTFT
from tests.engine import Engine
from tests.unit.test_ttft_learning import FITTED, PROFILE, LearnsAtOnce

if TYPE_CHECKING:
    from tests.unified_asks import Answer, Ask
    from tests.unified_engine import UnifiedEngine

LONGEST_TOKENS = 1000


class ShortPrompts(SchedulerEngine):
    """Makes no long prompts, of which each would take a test seconds."""

    @property
    def limit_tokens(self) -> int:
        return LONGEST_TOKENS


def explorer_of(engine: Engine, ttft: RefittedTTFT | None = None) -> Explorer:
    """Explores on ``engine`` whenever it is asked to. What it learns, ``ttft`` knows, and nothing else."""
    from sgl_flowprefill.runtime.experts import uncounted

    hub = engine.hub
    hours = iter(range(10**9))
    return Explorer(
        ShortPrompts(hub.role),
        hub.executor,
        hub.slots,
        hub.device,
        ttft or LearnsAtOnce(False, FITTED, PROFILE),
        hub.recorder,
        hub.agreement,
        pending=lambda: bool(hub.executor.interrupted()),
        share=0.5,
        now_s=lambda: 3600.0 * next(hours),
        uncounted=uncounted,
    )


def explore(engine: Engine, explorer: Explorer) -> bool:
    """What the hub does where nothing can run."""
    import torch

    with torch.no_grad():
        return explorer.explore(0.0, engine.hub.forward)


def held(engine: Engine) -> tuple[Any, ...]:
    """KV cache and rows that are free, and tokens in the radix cache."""
    scheduler = engine.scheduler
    tree = scheduler.tree_cache
    return (
        int(scheduler.token_to_kv_pool_allocator.available_size()),
        scheduler.req_to_token_pool.available_size(),
        int(tree.evictable_size()),
        int(tree.protected_size()),
        list(scheduler.waiting_queue),
    )


def serve_and_explore(engine: UnifiedEngine, asked: Mapping[str, Ask]) -> tuple[dict[str, Answer], dict[str, float]]:
    """Answer each of ``asked`` alone, and explore after each, half of the times until something happens."""
    engine.forget()
    explorer = explorer_of(engine)
    executor = engine.hub.executor
    for number, (rid, ask) in enumerate(asked.items()):
        engine.submit(rid, ask)
        engine.run()
        before, passed, interrupted = held(engine), executor.points_passed, executor.interrupted
        if number % 2:
            executor.interrupted = lambda after=passed + 7 * number: executor.points_passed >= after
        assert explore(engine, explorer)
        executor.interrupted = interrupted
        engine.check()
        assert held(engine) == before
    engine.assert_clean()
    return dict(engine.answers), dict(explorer.state())
