"""Preemption changes nothing but the order: tokens, log probabilities, KV pool and radix tree."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sgl_flowprefill.model import embedded_model_path
from sgl_flowprefill.policy import Limits
from tests.engine import PrefillEngine, generate_request
from tests.prompts import prompt

ENGINES: list[PrefillEngine] = []


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(embedded_model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def shared_engine() -> PrefillEngine:
    if not ENGINES:
        ENGINES.append(PrefillEngine(str(embedded_model_path())))
    return ENGINES[0]


@pytest.fixture
def engine(shared_engine: PrefillEngine) -> Iterator[PrefillEngine]:
    scheduler = shared_engine.scheduler
    limits = scheduler._policy.limits
    shared_engine.answers.clear()
    yield shared_engine
    scheduler._policy.__dict__.pop("pick", None)
    scheduler._policy.limits = limits
    scheduler._executor._interrupted = scheduler._events.pending


def chaos(engine: PrefillEngine, seed: int, switch_probability: float) -> dict[str, int]:
    """Suspend at random checkpoints and run whatever a coin says; figures of what happened."""
    rng = random.Random(seed)
    scheduler = engine.scheduler
    seen = {"suspensions": 0, "deepest": 0}

    def pick(now_s: float, running: Any, admit: bool = True) -> Any:
        tasks = sorted(scheduler._policy.tasks.first(now_s, 1000), key=lambda job: job.item.id)
        requests = scheduler._policy.requests.first(now_s, 1000) if admit else []
        choices = tasks + sorted(requests, key=lambda job: job.item.number)  # the coin alone decides, not the clock
        if not choices:
            return None
        choice = rng.choice(choices)
        seen["suspensions"] += running is not None and choice is not running
        started = sum(1 for job in tasks if job.item.checkpoint > 0)
        seen["deepest"] = max(seen["deepest"], started)
        return choice

    scheduler._policy.pick = pick
    scheduler._executor._interrupted = lambda: rng.random() < switch_probability
    return seen


def reference_logprobs(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)


def test_a_mix_that_is_suspended_all_the_time_gets_the_tokens_of_transformers(
    engine: PrefillEngine, reference: Any
) -> None:
    shared = prompt(99, 300)
    prompts = {
        f"r{i}": prompt(i, n, shared if i % 2 else None) for i, n in enumerate([40, 500, 900, 350, 1300, 310, 7, 700])
    }
    # A finished request puts the shared prefix into the radix cache before the mix starts.
    engine.submit("first", shared + prompt(5, 20))
    engine.run()
    engine.scheduler._policy.limits = Limits(max_suspended=100, max_batch_tokens=1)
    seen = chaos(engine, seed=1, switch_probability=0.9)
    for i, (rid, tokens) in enumerate(prompts.items()):
        engine.submit(rid, tokens, logprobs=i % 3 == 0, input_logprobs=i == 4)
    engine.run()

    assert seen["suspensions"] >= 40
    assert seen["deepest"] >= 5
    cached = [engine.answers[rid].req.cached_tokens for rid in prompts]
    assert max(cached) >= 300, "the mix must hold requests that share a cached prefix"
    for rid, tokens in prompts.items():
        expected = reference_logprobs(reference, tokens)
        answer = engine.answers[rid]
        assert answer.token == int(expected[-1].argmax()), rid
        if answer.logprob is not None:
            assert answer.logprob == pytest.approx(float(expected[-1].max()), abs=2e-3)
        if rid == "r4":
            assert answer.input_logprobs is not None
            wanted = expected[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
            got = torch.tensor(answer.input_logprobs[1:], dtype=torch.float64)
            assert torch.allclose(got, wanted[-len(got) :], atol=2e-3)
    engine.assert_clean()


def test_batches_are_preempted_like_single_requests(engine: PrefillEngine, reference: Any) -> None:
    scheduler = engine.scheduler
    shared = prompt(7, 128)
    prompts = {f"b{i}": prompt(100 + i, 140 + 30 * i, shared if i % 2 else None) for i in range(9)}
    seen = chaos(engine, seed=2, switch_probability=1.0)
    sizes: list[int] = []
    run_batch = scheduler.run_batch

    def spy(batch: Any) -> Any:
        sizes.append(len(batch.reqs))
        return run_batch(batch)

    scheduler.run_batch = spy
    try:
        for rid, tokens in prompts.items():
            engine.submit(rid, tokens, ttft_slo_s=100.0, logprobs=True)
        engine.run()
    finally:
        del scheduler.run_batch
    assert max(sizes) >= 2, "no batch of several requests was made"
    assert seen["suspensions"] >= 10
    for rid, tokens in prompts.items():
        expected = reference_logprobs(reference, tokens)[-1]
        assert engine.answers[rid].token == int(expected.argmax())
        assert engine.answers[rid].logprob == pytest.approx(float(expected.max()), abs=2e-3)
    engine.assert_clean()


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10_000),
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=8),
    aborts=st.sets(st.integers(0, 7), max_size=4),
)
def test_any_interleaving_and_any_aborts_leave_nothing_behind(
    shared_engine: PrefillEngine, seed: int, lengths: list[int], aborts: set[int]
) -> None:
    engine = shared_engine
    engine.answers.clear()
    rng = random.Random(seed)
    chaos(engine, seed, switch_probability=0.7)
    try:
        for i, tokens in enumerate(lengths):
            engine.submit(f"h{i}", prompt(seed + i, tokens, prompt(1, 64) if i % 2 and tokens > 64 else None))
            for _ in range(rng.randrange(4)):
                engine.step()
        for i in aborts:
            engine.abort(f"h{i}")
            for _ in range(rng.randrange(6)):
                engine.step()
        engine.run()
    finally:
        engine.scheduler._policy.__dict__.pop("pick", None)
        engine.scheduler._executor._interrupted = engine.scheduler._events.pending
    assert {f"h{i}" for i in range(len(lengths)) if i not in aborts} <= set(engine.answers)
    engine.assert_clean()


def test_a_grammar_that_is_compiled_during_a_prefill_interrupts_it(
    engine: PrefillEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = engine.scheduler
    backend = scheduler.grammar_manager.grammar_backend
    compile_it, may_end = backend._init_value_dispatch, threading.Event()

    def compile_late(*key: Any) -> Any:
        may_end.wait(30.0)
        return compile_it(*key)

    monkeypatch.setattr(backend, "_init_value_dispatch", compile_late)
    constrained = generate_request("constrained", prompt(2, 20), 1, ttft_slo_s=20.0)
    constrained.sampling_params.regex = "[a-z]+"
    engine.receive(constrained)
    engine.submit("long", prompt(1, 8000), ttft_slo_s=100.0)
    threading.Timer(0.1, may_end.set).start()
    while not may_end.is_set() or scheduler.grammar_manager.has_waiting_grammars():
        assert engine.step()
        assert "long" not in engine.answers
    engine.run()
    assert list(engine.answers) == ["constrained", "long"]
    assert not engine.answers["constrained"].aborted
    engine.assert_clean()


def test_more_kv_than_there_is_waits_for_tasks_that_hold_it(engine: PrefillEngine) -> None:
    scheduler = engine.scheduler
    seen = chaos(engine, seed=4, switch_probability=0.5)
    held = scheduler.max_total_num_tokens
    count = 14
    assert count * 6000 > held
    for i in range(count):
        engine.submit(f"k{i}", prompt(i, 6000))
    engine.run()
    assert len(engine.answers) == count
    assert not any(answer.aborted for answer in engine.answers.values())
    assert seen["deepest"] >= 3
    engine.assert_clean()


def test_a_client_that_leaves_frees_its_work_at_the_next_checkpoint(engine: PrefillEngine) -> None:
    scheduler = engine.scheduler
    scheduler._executor._interrupted = lambda: True
    engine.submit("suspended", prompt(1, 2000), ttft_slo_s=50.0)
    engine.step()
    engine.submit("running", prompt(2, 1000), ttft_slo_s=5.0)
    engine.step()
    engine.submit("waiting", prompt(3, 3000), ttft_slo_s=60.0)
    engine.submit("other", prompt(4, 300), ttft_slo_s=100.0)
    engine.step()
    states = {task.rids[0]: task.checkpoint for task in scheduler._live}
    assert set(states) == {"suspended", "running"}
    assert scheduler._running.rids == ["running"]
    before = scheduler.token_to_kv_pool_allocator.available_size()
    for rid in ("waiting", "suspended", "running"):
        engine.abort(rid)
    engine.step()
    assert scheduler.token_to_kv_pool_allocator.available_size() >= before + 3000 - 300
    assert {task.rids[0] for task in scheduler._live} <= {"other"}
    engine.run()
    assert engine.answers["other"].token is not None
    assert engine.answers["suspended"].aborted
    assert engine.answers["running"].aborted
    engine.assert_clean()


def test_what_an_aborted_prefill_was_shown_is_released(engine: PrefillEngine) -> None:
    scheduler = engine.scheduler
    scheduler._executor._interrupted = lambda: True
    engine.submit("leaves", prompt(1, 900))
    engine.step()
    [task] = scheduler._live
    released: list[str] = []
    [req] = task.batch.reqs
    req.multimodal_inputs = SimpleNamespace(release_features=lambda: released.append("leaves"))
    engine.abort("leaves")
    engine.run()
    assert engine.answers["leaves"].aborted
    assert released == ["leaves"]
    assert req.multimodal_inputs is None
    engine.assert_clean()


def test_a_hybrid_models_state_is_copied_when_a_prefill_starts_and_not_while_it_waits(
    engine: PrefillEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.managers.schedule_batch import Req

    scheduler = engine.scheduler
    copies: list[tuple[str, bool]] = []
    init = Req.init_next_round_input

    def watched(req: Any, tree_cache: Any = None, cow_mamba: bool | None = None) -> None:
        copies.append((req.rid, cow_mamba is not False))
        init(req, tree_cache, cow_mamba)

    monkeypatch.setattr(Req, "init_next_round_input", watched)
    engine.submit("waits", prompt(1, 200))
    scheduler._take_events()
    assert [job.item.req.rid for job in scheduler._policy.requests.first(0.0, 10)] == ["waits"]
    assert copies == [("waits", False)]
    engine.run()
    assert copies == [("waits", False), ("waits", True)]
    engine.assert_clean()


def test_each_batch_is_prepared_once_before_its_forward_pass(
    engine: PrefillEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what n-gram embeddings look up, in the models that have some, and with staging buffers, where there are."""
    scheduler = engine.scheduler
    prepared: list[Any] = []
    staged: list[Any] = []
    manager = type(scheduler.ngram_embedding_manager)
    prepare, run_batch = manager.prepare_for_forward, scheduler.run_batch

    def watched(self: Any, batch: Any, *, chunked_req: Any) -> Any:
        prepared.append(batch)
        return prepare(self, batch, chunked_req=chunked_req)

    def checked(batch: Any) -> Any:
        assert prepared == staged == [batch]
        return run_batch(batch)

    monkeypatch.setattr(manager, "prepare_for_forward", watched)
    monkeypatch.setattr(scheduler, "enable_staging", True)
    monkeypatch.setattr(scheduler, "maybe_prefetch_staging_for_batch", staged.append)
    monkeypatch.setattr(scheduler, "run_batch", checked)
    engine.submit("only", prompt(1, 200))
    engine.run()
    assert len(prepared) == 1
    engine.assert_clean()


def test_a_pause_lets_started_prefills_finish_and_the_others_wait(engine: PrefillEngine) -> None:
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

    scheduler = engine.scheduler
    scheduler._executor._interrupted = lambda: True
    scheduler._policy.limits = Limits(max_suspended=100, max_batch_tokens=1)
    engine.submit("suspended", prompt(1, 900), ttft_slo_s=50.0)
    engine.step()
    engine.submit("running", prompt(2, 500), ttft_slo_s=5.0)
    engine.step()
    engine.submit("waiting", prompt(3, 300), ttft_slo_s=100.0)
    engine.step()
    engine.receive(PauseGenerationReqInput(mode="in_place"))
    assert not engine.step()
    assert {"suspended", "running"} <= set(engine.answers)
    assert "waiting" not in engine.answers
    engine.receive(ContinueGenerationReqInput())
    engine.run()
    assert engine.answers["waiting"].token is not None
    engine.assert_clean()


def test_a_prefix_that_is_cached_meanwhile_makes_the_requests_that_wait_cheaper(engine: PrefillEngine) -> None:
    scheduler = engine.scheduler
    scheduler._policy.limits = Limits(max_suspended=100, max_batch_tokens=1)
    shared = prompt(31, 640)
    for number in range(4):
        engine.submit(f"{number}", [*shared, *prompt(40 + number, 100)], ttft_slo_s=20.0)
    engine.submit("alone", prompt(50, 740), ttft_slo_s=30.0)
    scheduler._take_events()
    before_s = {job.item.req.rid: job.remaining_s for job in scheduler._policy.requests.first(0.0, 9)}
    assert len(before_s) == 5
    while not engine.answers:
        engine.step()
    for _ in range(3):
        scheduler._take_events()  # as many as wait behind the first, one at each event
    jobs = scheduler._policy.requests.first(0.0, 9)
    assert {job.item.req.rid: job.item.shape.cached_tokens // 64 for job in jobs} == {
        **{rid: 10 for rid in before_s if rid not in engine.answers and rid != "alone"},
        "alone": 0,
    }
    for job in jobs:
        cheaper = job.remaining_s < 0.5 * before_s[job.item.req.rid]
        assert cheaper == (job.item.req.rid != "alone")
    engine.run()
    assert len(engine.answers) == 5
    engine.assert_clean()


def test_a_request_about_to_start_is_matched_before_it_is_judged(engine: PrefillEngine) -> None:
    """What another could be started for, had its price not dropped at the same event."""
    scheduler = engine.scheduler
    scheduler._policy.limits = Limits(max_suspended=100, max_batch_tokens=1)
    shared = prompt(61, 640)
    for number in range(4):
        engine.submit(f"{number}", [*shared, *prompt(70 + number, 100)], ttft_slo_s=20.0 + number)
    scheduler._take_events()
    while not engine.answers:
        engine.step()
    jobs = scheduler._policy.requests.first(0.0, 9)
    assert all(job.item.shape.cached_tokens == 0 for job in jobs)
    chosen = scheduler._choose(None)
    assert [job.item.shape.cached_tokens // 64 for job in chosen] == [10]
    engine.run()
    engine.assert_clean()
