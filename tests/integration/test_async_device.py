"""The real scheduler on a device whose work is over later than it was queued: results that come late change nothing."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sgl_flowprefill.policy import Limits
from sgl_flowprefill.runtime.tiles import Tiles
from tests.chaos import Rounds, chaos
from tests.engine import PrefillEngine
from tests.late_device import LateDevice
from tests.prompts import prompt
from tests.reference import Comparison


@pytest.fixture
def rounds(engine: PrefillEngine, comparison: Comparison) -> Iterator[Rounds]:
    rounds = Rounds(engine, comparison)
    yield rounds
    rounds.close()


@pytest.mark.parametrize("lookahead", [0, 2])
def test_late_results_and_early_wakes_change_no_answer_and_no_kv(
    engine: PrefillEngine,
    rounds: Rounds,
    lookahead: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = engine.scheduler
    shared = prompt(98, 200)
    prompts = {f"d{i}": prompt(i, 40 + 97 * i, shared if i % 3 else None) for i in range(12)}
    device = LateDevice(lookahead, seed=lookahead)
    engine.use(device)
    scheduler.hub.work.policy.limits = Limits(max_suspended=6, max_batch_tokens=1)
    seen = chaos(engine, seed=11, switch_probability=0.2)
    late, most = 0, 0
    finish = scheduler.role.finish

    def watched(task: Any) -> None:
        nonlocal late
        late += task.result.copy_done.place > device.passed
        finish(task)

    monkeypatch.setattr(scheduler.role, "finish", watched)
    for rid, tokens in prompts.items():
        engine.submit(rid, tokens, logprobs=True)
    while len(engine.answers) < len(prompts):
        engine.turn()
        most = max(most, len(scheduler.hub.work.tasks.finishing))
        assert len(scheduler.hub.work.tasks.finishing) <= 1
        assert not (scheduler.hub.work.tasks.finishing and scheduler.is_fully_idle())
    assert late == 0, "a result was processed before it had arrived, though the device could have been waited for"
    assert most == 1, "no task waited for its result"
    assert seen["suspensions"] >= 10
    assert device.early_wakes >= 5
    assert device.deepest <= lookahead + 1
    for rid, tokens in prompts.items():
        rounds.compare(rid, tokens)
    rounds.comparison.assert_same()
    engine.run()
    engine.assert_clean()


def test_kv_indices_that_are_queued_again_are_not_read_beside_the_queue(
    engine: PrefillEngine,
    rounds: Rounds,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The radix cache keeps the KV of the first of several prefills of the same prompt and frees what the others have:
    what could be read beside the queue is their rows as they were before.
    """
    scheduler = engine.scheduler
    device = LateDevice(2, seed=3)
    engine.use(device)
    scheduler.hub.work.policy.limits = Limits(max_suspended=100, max_batch_tokens=1)
    chaos(engine, seed=3, switch_probability=0.9)
    shared = prompt(4, 300)
    prompts = {f"s{i}": prompt(50 + i // 2, 500, shared) for i in range(8)} | {"other": prompt(60, 450)}
    before: dict[str, torch.Tensor] = {}
    sent: dict[str, tuple[bool, bool]] = {}
    finish, send = scheduler.role.finish, scheduler._send_kv_chunk

    def row(req: Any) -> torch.Tensor:
        indices: torch.Tensor = scheduler.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        return indices[: len(req.origin_input_ids)].clone()

    def watched_finish(task: Any) -> None:
        before.update({req.rid: row(req) for req in task.batch.reqs})
        finish(task)

    def watched_send(req: Any, **arguments: Any) -> None:
        sent[req.rid] = device.is_beside, torch.equal(row(req), before[req.rid])
        send(req, **arguments)

    monkeypatch.setattr(scheduler.role, "finish", watched_finish)
    monkeypatch.setattr(scheduler, "_send_kv_chunk", watched_send)
    for rid, tokens in prompts.items():
        engine.submit(rid, tokens)
    engine.run()
    assert set(sent) == set(prompts)
    assert all(is_beside == unchanged for is_beside, unchanged in sent.values()), sent
    assert sent["other"] == (True, True)
    assert sum(not unchanged for _, unchanged in sent.values()) >= 4
    for rid, tokens in prompts.items():
        rounds.compare(rid, tokens)
    rounds.comparison.assert_same()
    engine.assert_clean()


def test_a_client_that_leaves_while_its_result_is_on_the_way(
    engine: PrefillEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = engine.scheduler
    device = LateDevice(2, seed=5)
    engine.use(device)
    monkeypatch.setattr(device.rng, "random", lambda: 1.0)  # nothing passes
    scheduler.hub.executor.interrupted = lambda: False
    monkeypatch.setattr(type(device), "catch_up", lambda self, interrupted: True)
    engine.submit("leaves", prompt(1, 300))
    engine.turn()
    assert [task.rids for task in scheduler.hub.work.tasks.finishing] == [["leaves"]]
    assert not scheduler.is_fully_idle()
    assert scheduler._collect_inflight_batches()
    engine.abort("leaves")
    device.passed = device.recorded
    engine.run()
    assert engine.answers["leaves"].aborted
    engine.assert_clean()


def test_an_aborted_task_leaves_nothing_queued_that_reads_its_slot(
    engine: PrefillEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = engine.scheduler
    device = LateDevice(2, seed=7)
    engine.use(device)
    scheduler.hub.executor.interrupted = lambda: True
    engine.submit("leaves", prompt(2, 700))
    engine.turn()
    [task] = scheduler.hub.work.tasks.live
    queued = device.recorded
    assert device.passed < queued
    engine.abort("leaves")
    scheduler.hub.look()
    assert scheduler.hub.slots.is_free(task.attn_backend)
    assert device.passed >= queued
    scheduler.hub.executor.interrupted = lambda: False
    engine.run()
    engine.assert_clean()


@pytest.mark.parametrize("is_inside", [False, True])
def test_a_suspended_task_holds_the_activations_that_are_accounted_for(
    engine: PrefillEngine, rounds: Rounds, is_inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that exist only while it is suspended: at preemption checkpoints, and inside operators that run in tiles,
    of which some are shorter than the prompt.
    """
    scheduler = engine.scheduler
    activations, tiles = scheduler.hub.work.memory.activations, scheduler.hub.tiles
    tokens, asked = 1777, prompt(3 + is_inside, 1777)  # none that is cached
    monkeypatch.setattr(tiles, "now", Tiles(rows=512, attention_rows=512, norm_rows=2048, pairs=512 * tokens))
    monkeypatch.setattr(tiles, "follow", lambda yardstick_s: None)

    def held() -> dict[int, int]:
        """Bytes of each tensor that has rows of hidden states, or of what is made of them."""
        tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
        storages = (item.untyped_storage() for item in tensors if item.numel() > tokens)
        return {storage.data_ptr(): storage.nbytes() for storage in storages}

    where = "between_tiles" if is_inside else "checkpoint"
    scheduler.hub.executor.interrupted = lambda: sys._getframe(2).f_code.co_name == where
    gc.unfreeze()  # KV cache and weights are among what is not listed since the start
    gc.collect()
    before = held()
    gc.freeze()
    engine.submit("only", asked, ttft_slo_s=100.0)
    held_bytes = []
    while "only" not in engine.answers:
        engine.turn()
        if scheduler.hub.work.tasks.live:
            held_bytes.append(sum(nbytes for pointer, nbytes in held().items() if pointer not in before))
    accounted = activations.suspended_bytes(tokens) if is_inside else activations.checkpoint_bytes(tokens)
    print(f"\nheld at {len(held_bytes)} places ({where}): {max(held_bytes)} bytes, accounted for {accounted}")
    assert len(held_bytes) >= scheduler.hub.work.progress.checkpoints - 1
    assert accounted / 2 < max(held_bytes) <= accounted
    rounds.compare("only", asked)
    rounds.comparison.assert_same()
    engine.assert_clean()
