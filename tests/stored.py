"""Engines with a storage behind their hierarchical cache: SGLang's ``file`` backend, in a folder."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch

from sgl_flowprefill.model import embedded_model_path
from tests.engine import Engine, PrefillEngine, Unfinished
from tests.unified_engine import UnifiedEngine

if TYPE_CHECKING:
    from tests.chaos import Rounds

LONGEST_SLEEP_S: Final = 300.0
"""What nobody wakes from is an error. SGLang compiles its hashes of pages when they are first wanted."""
THRESHOLD_TOKENS: Final = 64
"""Shorter prefixes are not read."""
POLICIES: Final = ("wait_complete", "timeout", "best_effort")


def options(pool_tokens: int) -> dict[str, Any]:
    """Of a server whose host memory has room for four times what the device has."""
    return {
        "enable_hierarchical_cache": True,
        "hicache_ratio": 4.0,
        "hicache_write_policy": "write_through",
        "hicache_storage_backend": "file",
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_storage_backend_extra_config": f'{{"prefetch_threshold": {THRESHOLD_TOKENS}}}',
        "max_total_tokens": pool_tokens,
    }


def keep_in(folder: str, delay_s: float) -> None:
    """Storage of this process is in ``folder``, and SGLang makes each call of it take up to ``delay_s`` longer."""
    os.environ["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] = folder
    os.environ["SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY"] = str(delay_s)
    os.environ["SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE"] = "0"
    sys.setswitchinterval(2e-4)  # its threads, which handle a file for each token, get on beside what computes


def evict(scheduler: Any) -> None:
    """Leave nothing that nobody holds on the device and in host memory of ``scheduler``."""
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    tree = scheduler.tree_cache
    tree.evict(EvictParams(num_tokens=scheduler.max_total_num_tokens))
    tree.evict_host(tree.cache_controller.mem_pool_host.size)


class Asleep(Engine):
    """An engine that sleeps when nothing can run, as a server does, and whose storage is watched."""

    watched: Counter[str]

    def watch(self) -> None:
        """Count from now on."""
        self.watched = Counter()

    @property
    def tree(self) -> Any:
        return self.scheduler.tree_cache

    @torch.no_grad()
    def turn(self) -> bool:
        has_run = super().turn()
        waiting, hub = len(self.hub.role.reads.awaited), self.hub
        self.watched["turns with requests that wait for storage"] += waiting > 0
        self.watched["turns of those beside tasks"] += waiting > 0 and len(hub.work.tasks.live) > 0
        return has_run

    def run(self, limit: int = 200_000) -> None:
        for _ in range(limit):
            if not self.turn():
                if self.scheduler.is_fully_idle():
                    return
                self.hub.role.rest()
                self.watched["sleeps"] += 1
                if not self.hub.events.sleep(LONGEST_SLEEP_S):
                    raise Unfinished(f"nobody woke the hub: {self.tree.ongoing_prefetch} {self.tree.ongoing_backup}")
        raise Unfinished(f"still not idle after {limit} turns")

    def assert_nothing_held(self) -> None:
        """What is in host memory is in the tree and can be evicted, and no request is remembered that has gone. A read
        that nobody waits for any longer gives back its memory when its thread notices.
        """
        controller, deadline_s = self.tree.cache_controller, time.monotonic() + 20.0
        pool = controller.mem_pool_host
        while True:
            self.turn()
            self.evict()
            if pool.available_size() == pool.size or time.monotonic() > deadline_s:
                break
            time.sleep(0.05)
        assert pool.available_size() == pool.size, f"{pool.size - pool.available_size()} tokens of host memory leak"
        assert self.tree.cache_controller.prefetch_tokens_occupied == 0
        assert not self.hub.role.reads.awaited
        left = (self.tree.ongoing_prefetch, self.tree.ongoing_backup, self.tree._storage_prefetch_wait)
        assert not any(left), left
        self.watched["looks for leaks"] += 1

    def evict(self) -> None:
        evict(self.scheduler)

    def assert_clean(self) -> None:
        """What was in host memory is overwritten: a page that nobody reads from storage is not there by chance."""
        assert self.scheduler.is_fully_idle()
        self.assert_nothing_held()
        super().assert_clean()
        for entry in self.tree.cache_controller.mem_pool_host.entries:
            entry.host_pool.kv_buffer.zero_()


class AsleepPrefill(Asleep, PrefillEngine):
    """A prefill server's."""

    def from_storage(self, *rids: str) -> int:
        """Tokens of the prompts of ``rids`` that came from storage, or of all that are answered."""
        reqs = [self.answers[rid].req for rid in rids or self.answers]
        return sum(int(req.cached_tokens_storage) for req in reqs)

    def store(self, *prompts: list[int]) -> None:
        """Leave ``prompts`` in storage alone."""
        for i, tokens in enumerate(prompts):
            self.submit(f"stores{i}", tokens)
        self.run()
        self.assert_clean()
        self.answers.clear()


class StoredPrefill(AsleepPrefill):
    """That of the embedded model."""

    def __init__(self, folder: str, pool_tokens: int, delay_s: float = 0.01) -> None:
        keep_in(folder, delay_s)
        self.watch()
        super().__init__(str(embedded_model_path()), **options(pool_tokens))


class StoredUnified(Asleep, UnifiedEngine):
    """A unified server's."""

    def __init__(self, folder: str, pool_tokens: int, delay_s: float = 0.01) -> None:
        keep_in(folder, delay_s)
        self.watch()
        super().__init__(str(embedded_model_path()), **options(pool_tokens))


@contextmanager
def gate(engine: Asleep) -> Iterator[threading.Event]:
    """Nothing is read from storage in this context before the event is set."""
    controller, is_open = engine.tree.cache_controller, threading.Event()
    read = controller.page_get_func

    def waiting(*arguments: Any, **named: Any) -> Any:
        is_open.wait(60)
        return read(*arguments, **named)

    controller.page_get_func = waiting
    try:
        yield is_open
    finally:
        is_open.set()
        controller.page_get_func = read


@contextmanager
def policy(engine: Asleep, name: str, timeout_s: float = 1.0) -> Iterator[None]:
    """``--hicache-storage-prefetch-policy`` is ``name`` in this context; a read may take ``timeout_s``."""
    tree = engine.tree
    before = tree.prefetch_stop_policy, tree.prefetch_timeout_base, tree.prefetch_timeout_per_page
    tree.prefetch_stop_policy, tree.prefetch_timeout_base, tree.prefetch_timeout_per_page = name, timeout_s, 0.0
    try:
        yield
    finally:
        tree.prefetch_stop_policy, tree.prefetch_timeout_base, tree.prefetch_timeout_per_page = before


def play(
    engine: AsleepPrefill, chance: Rounds, numbers: Iterable[int], failures: float, assert_same: Callable[[], None]
) -> Counter[str]:
    """Rounds of prompts whose prefixes are in storage alone, under each policy in turn; of the calls of storage, the
    share ``failures`` fails. What became of them, with tokens from storage by policy.
    """
    engine.tree.cache_controller.storage_backend._failure_prob = failures
    engine.watch()
    seen: Counter[str] = Counter()
    submit = engine.submit

    def submit_and_wait(*arguments: Any, **named: Any) -> None:
        submit(*arguments, **named)
        time.sleep(rng.choice([0.0, 0.2]))  # what is read meanwhile is there, whatever the policy

    engine.submit = submit_and_wait  # type: ignore[method-assign]
    for number in numbers:
        rng = random.Random(number)
        name = POLICIES[number % len(POLICIES)]
        with policy(engine, name, timeout_s=rng.choice([0.02, 0.5])):
            chance.play(rng)
        assert_same()
        seen[f"tokens from storage, {name}"] += engine.from_storage()
        seen["answers from storage"] += sum(a.req.cached_tokens_storage > 0 for a in engine.answers.values())
        seen["flushes"] += 1
        engine.assert_clean()
    engine.tree.cache_controller.storage_backend._failure_prob = 0.0
    del engine.submit
    chance.close()
    return seen + chance.seen + engine.watched
