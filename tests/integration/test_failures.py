"""A prefill that fails harms its own requests alone."""

from __future__ import annotations

import gc
import logging
import random
import re
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sgl_flowprefill.policy import Limits
from sgl_flowprefill.runtime.memory import EmptyPool
from tests.chaos import chaos
from tests.engine import PrefillEngine
from tests.faults import FAULTS, MARKER, ModelFault, raise_in_marked_prompts
from tests.prompts import prompt
from tests.reference import Comparison

SHARED = prompt(77, 300)
PROMPTS = {
    f"g{i}": prompt(200 + i, tokens, SHARED if i % 2 else None)
    for i, tokens in enumerate([40, 900, 350, 1300, 500, 310, 700, 1100])
}


BAD = {f"bad{i}": [*prompt(300 + i, tokens, SHARED), MARKER] for i, tokens in enumerate([400, 1200, 2000])}


@pytest.fixture
def hooks() -> Iterator[list[Any]]:
    handles: list[Any] = []
    yield handles
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("fault", "seed"),
    [
        ("error", 0),
        ("memory", 0),
        ("memory", 1),
        ("stop", 1),
        pytest.param("error", 1, marks=pytest.mark.stress),
        pytest.param("stop", 0, marks=pytest.mark.stress),
    ],
)
def test_the_others_get_their_tokens_and_nothing_is_left_behind(
    engine: PrefillEngine,
    comparison: Comparison,
    hooks: list[Any],
    caplog: pytest.LogCaptureFixture,
    fault: str,
    seed: int,
) -> None:
    scheduler = engine.scheduler
    rng = random.Random(seed)
    most = scheduler.hub.work.progress.checkpoints
    hooks += raise_in_marked_prompts(scheduler, fault, rng.randrange(most + 1))
    scheduler.hub.work.policy.limits = Limits(max_suspended=100, max_batch_tokens=1)
    seen = chaos(engine, seed, switch_probability=0.8)
    requests = list((PROMPTS | BAD).items())
    rng.shuffle(requests)
    for rid, tokens in requests:
        engine.submit(rid, tokens, logprobs=True, inputs_from=0 if rid == "bad1" else None)
    with caplog.at_level(logging.ERROR):
        engine.run()
    assert seen["deepest"] >= 3
    for rid, tokens in PROMPTS.items():
        comparison.answer(rid, tokens, [engine.answers[rid].token], [engine.answers[rid].logprob])
    for rid in BAD:
        reason = engine.answers[rid].req.finished_reason.to_json()
        assert reason["type"] == "abort"
        assert reason["status_code"] == 500
        found = re.search(r"error ([0-9a-f]{12})", reason["message"])
        assert found is not None
        [line] = [record.getMessage() for record in caplog.records if found[1] in record.getMessage()]
        assert rid in line
        assert "Traceback" in line
        assert type(FAULTS[fault]()).__name__ in line
    while hooks:
        hooks.pop().remove()
    for rid, tokens in BAD.items():
        engine.submit(rid, tokens, logprobs=True)
        engine.run()
        assert engine.answers[rid].req.cached_tokens <= len(SHARED), "KV that was never computed is a cached prefix"
        comparison.answer(rid, tokens, [engine.answers[rid].token], [engine.answers[rid].logprob])
    comparison.assert_same()
    assert comparison.counts["answers"] == len(PROMPTS) + len(BAD)
    engine.assert_clean()


def test_all_requests_of_a_batch_that_fails_are_answered_but_those_that_have_left(
    engine: PrefillEngine,
    hooks: list[Any],
) -> None:
    scheduler = engine.scheduler
    hooks += raise_in_marked_prompts(scheduler, "error", 3)
    scheduler.hub.executor.interrupted = lambda: True
    for i in range(3):
        engine.submit(f"m{i}", [*prompt(400 + i, 60), MARKER], ttft_slo_s=100.0)
    engine.turn()
    [task] = scheduler.hub.work.tasks.live
    assert len(task.batch.reqs) == 3
    engine.abort("m1")
    engine.run()
    reasons = {rid: answer.req.finished_reason.to_json() for rid, answer in engine.answers.items()}
    assert {rid: reason["status_code"] for rid, reason in reasons.items()} == {"m0": 500, "m1": None, "m2": 500}
    engine.assert_clean()


def test_the_tensors_of_a_forward_pass_that_failed_are_freed(engine: PrefillEngine, hooks: list[Any]) -> None:
    scheduler = engine.scheduler
    held: list[Any] = []

    def hook(_module: Any, args: Any) -> None:
        held.append(weakref.ref(args[0]))

    model = scheduler.tp_worker.model_runner.model
    hooks.append(model.model.layers[1].mlp.register_forward_pre_hook(hook))
    hooks += raise_in_marked_prompts(scheduler, "memory", 3)
    gc.disable()
    try:
        engine.submit("bad", [*prompt(1, 500), MARKER])
        engine.run()
        assert held
        assert all(reference() is None for reference in held)
    finally:
        gc.enable()
    engine.assert_clean()


def test_what_fails_before_the_model_runs_fails_its_task_alone(
    engine: PrefillEngine,
    comparison: Comparison,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plan of an attention backend, for one."""
    backend = type(engine.scheduler.tp_worker.model_runner.attn_backend)
    plan = backend.init_forward_metadata

    def plan_or_fail(self: Any, forward_batch: Any) -> None:
        if forward_batch.extend_num_tokens == 123:
            raise ModelFault("no plan")
        plan(self, forward_batch)

    monkeypatch.setattr(backend, "init_forward_metadata", plan_or_fail)
    engine.scheduler.hub.executor.interrupted = lambda: True
    engine.submit("good", prompt(1, 900), ttft_slo_s=50.0, logprobs=True)
    engine.turn()
    engine.submit("bad", prompt(2, 123), ttft_slo_s=0.5)
    engine.run()
    assert engine.answers["bad"].aborted
    good = engine.answers["good"]
    comparison.answer("good", prompt(1, 900), [good.token], [good.logprob])
    comparison.assert_same()
    assert comparison.counts["log probabilities"] == 1
    engine.assert_clean()


def test_a_pause_outlives_a_started_prefill_that_fails(engine: PrefillEngine, hooks: list[Any]) -> None:
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

    scheduler = engine.scheduler
    hooks += raise_in_marked_prompts(scheduler, "error", 4)
    scheduler.hub.executor.interrupted = lambda: True
    engine.submit("bad", [*prompt(1, 500), MARKER])
    engine.turn()
    assert len(scheduler.hub.work.tasks.live) == 1
    engine.receive(PauseGenerationReqInput(mode="in_place"))
    assert engine.answers["bad"].aborted
    engine.receive(ContinueGenerationReqInput())
    engine.run()
    engine.assert_clean()


def test_errors_that_no_prefill_can_be_blamed_for_end_the_server(
    engine: PrefillEngine,
    hooks: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = engine.scheduler

    def lost() -> bool:
        raise RuntimeError("a socket is gone")

    scheduler.hub.executor.interrupted = lost
    engine.submit("first", prompt(1, 500))
    with pytest.raises(RuntimeError, match="a socket is gone"):
        engine.run()
    scheduler.hub.executor.interrupted = scheduler.hub.events.pending
    engine.abort("first")
    engine.turn()
    hooks += raise_in_marked_prompts(scheduler, "poison", 3)
    engine.submit("bad", [*prompt(2, 500), MARKER])
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        engine.run()
    engine.abort("bad")
    engine.run()
    engine.assert_clean()


def test_a_prompt_for_which_there_is_no_room_on_an_empty_server_is_refused_and_nobody_waits_behind_it(
    engine: PrefillEngine,
    comparison: Comparison,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = engine.scheduler
    monkeypatch.setattr(scheduler.hub, "stall_check_s", 0.0)  # KV cache is asked for anew in each turn
    engine.submit("no room", prompt(1, 57_000), ttft_slo_s=1e5)
    [req] = scheduler.disagg_prefill_bootstrap_queue.queue
    req.sampling_params.max_new_tokens = 10_000  # SGLang asks for room for one token at a prefill server
    engine.submit("behind", prompt(2, 300), ttft_slo_s=1e6, logprobs=True)
    engine.run()
    reason = engine.answers["no room"].req.finished_reason.to_json()
    assert (reason["type"], reason["status_code"]) == ("abort", 400)
    assert re.search(r"prompt has 57000 tokens, .* 60000 tokens in pages of 1,.* --max-total-tokens", reason["message"])
    behind = engine.answers["behind"]
    comparison.answer("behind", prompt(2, 300), [behind.token], [behind.logprob])
    comparison.assert_same()
    assert comparison.counts["log probabilities"] == 1
    engine.assert_clean()


def test_a_prompt_that_never_fits_by_the_size_of_the_pool_is_refused_when_it_arrives(
    engine: PrefillEngine,
    comparison: Comparison,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with pages of 64 tokens, of which a prompt leaves less than one free."""
    monkeypatch.setattr(engine.scheduler, "empty_pool", EmptyPool(448, 64))
    engine.submit("no room", prompt(1, 383))
    assert engine.answers["no room"].req.finished_reason.to_json()["status_code"] == 400
    engine.submit("fits", prompt(2, 382), logprobs=True)
    engine.run()
    fits = engine.answers["fits"]
    comparison.answer("fits", prompt(2, 382), [fits.token], [fits.logprob])
    comparison.assert_same()
    assert comparison.counts["log probabilities"] == 1
    engine.assert_clean()
