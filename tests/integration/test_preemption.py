"""Preemption changes nothing but the order: tokens, log probabilities, the KV cache that is handed over, KV pool and
radix tree.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sgl_flowprefill.policy import Limits
from sgl_flowprefill.ttft import PrefillShape
from tests.chaos import Rounds
from tests.engine import PrefillEngine, generate_request
from tests.mutants import wrong_kv_slot_after_a_resume
from tests.prompts import population, prompt
from tests.reference import Comparison

PROMPTS = population(24, longest_tokens=2000)


@pytest.fixture
def rounds(engine: PrefillEngine, comparison: Comparison) -> Iterator[Rounds]:
    rounds = Rounds(engine, comparison, PROMPTS)
    yield rounds
    rounds.close()


def assert_compared(rounds: Rounds, answers: int) -> None:
    """So many answers were compared, each with its log probability and its KV cache, and none differs."""
    rounds.comparison.assert_same()
    counts = rounds.comparison.counts
    assert counts["answers"] == counts["log probabilities"] == counts["KV caches"] == answers


def test_a_mix_that_is_suspended_all_the_time_gets_the_answers_of_transformers(
    engine: PrefillEngine, rounds: Rounds
) -> None:
    shared = prompt(99, 300)
    prompts = {
        f"r{i}": prompt(i, n, shared if i % 2 else None) for i, n in enumerate([40, 500, 900, 350, 1300, 310, 7, 700])
    }
    # A finished request puts the shared prefix into the radix cache before the mix starts.
    engine.submit("first", shared + prompt(5, 20))
    engine.run()
    engine.scheduler.hub.work.policy.limits = Limits(max_suspended=100, max_batch_tokens=1)
    rounds.ask(random.Random(1), prompts, with_inputs={"r4"}, dropped=set(), switch_probability=0.9, at_once=True)
    rounds.comparison.assert_same()
    assert rounds.seen["suspensions"] >= 40
    assert rounds.seen["deepest"] >= 5
    cached = [engine.answers[rid].req.cached_tokens for rid in prompts]
    assert max(cached) >= 300, "the mix must hold requests that share a cached prefix"
    assert rounds.comparison.counts["answers"] == rounds.comparison.counts["KV caches"] == len(prompts)
    assert rounds.comparison.counts["log probabilities of prompts"] == 1299
    engine.assert_clean()


def test_log_probabilities_of_a_long_prompt_are_computed_in_the_chunks_that_its_memory_is_counted_by(
    engine: PrefillEngine, comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.layers.logits_processor import LogitsProcessor

    scheduler = engine.scheduler
    rows: list[int] = []
    get_logits = LogitsProcessor._get_logits

    def watched(self: Any, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(states))
        return get_logits(self, states, *args, **kwargs)

    monkeypatch.setattr(LogitsProcessor, "_get_logits", watched)
    tokens = prompt(88, 2500)
    scheduler.hub.executor.interrupted = lambda: True
    engine.submit("long", tokens, inputs_from=0)
    engine.turn()
    assert scheduler.hub.work.tasks.live[0].logprob_rows == 2500
    engine.run()
    assert max(rows) == scheduler.hub.work.memory.activations.logits_chunk_tokens == 2048
    assert sum(rows) >= 2500
    answer = engine.answers["long"]
    comparison.answer("long", tokens, [answer.token], [answer.logprob])
    comparison.inputs("long", tokens, answer.input_logprobs[1:])
    comparison.assert_same()
    assert comparison.counts["log probabilities of prompts"] == 2499
    engine.assert_clean()


def test_batches_are_preempted_like_single_requests(engine: PrefillEngine, rounds: Rounds) -> None:
    shared = prompt(7, 128)
    prompts = {f"b{i}": prompt(100 + i, 140 + 30 * i, shared if i % 2 else None) for i in range(9)}
    rounds.ask(random.Random(2), prompts, with_inputs=set(), dropped=set(), switch_probability=1.0, at_once=True)
    rounds.comparison.assert_same()
    assert max(engine.batch_sizes) >= 2, "no batch of several requests was made"
    assert rounds.seen["suspensions"] >= 10
    assert rounds.comparison.counts["KV caches"] == len(prompts)
    engine.assert_clean()


def test_rounds_of_random_suspensions_and_aborts_change_no_answer_and_no_kv(
    engine: PrefillEngine, rounds: Rounds
) -> None:
    rounds.run(8)
    print(rounds)
    assert rounds.seen["suspensions"] >= 200
    assert rounds.seen["batches of several"] >= 4
    assert rounds.seen["answers with a cached prefix"] >= 7
    assert rounds.comparison.counts["aborts"] >= 5
    assert rounds.comparison.counts["KV caches"] == rounds.comparison.counts["answers"] >= 40


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10_000),
    asked=st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=6),
    dropped=st.sets(st.integers(0, 5), max_size=3),
)
def test_any_interleaving_and_any_aborts_change_no_answer_and_leave_nothing_behind(
    rounds: Rounds, seed: int, asked: list[int], dropped: set[int]
) -> None:
    prompts = {f"h{i}": PROMPTS[place] for i, place in enumerate(asked)}
    left = {f"h{i}" for i in dropped} & prompts.keys()
    rounds.ask(random.Random(seed), prompts, with_inputs=set(), dropped=left, switch_probability=0.7)
    rounds.comparison.assert_same()
    rounds.engine.assert_clean()


def test_a_planted_defect_is_caught(engine: PrefillEngine, rounds: Rounds) -> None:
    """The one of ``tests.mutants`` that strikes however fast the machine: two tokens exchange their KV slots."""
    struck: list[bool] = []
    wrong_kv_slot_after_a_resume(engine, lambda: struck.append(True))
    engine.scheduler.hub.work.policy.limits = Limits(max_suspended=100, max_batch_tokens=1)
    prompts = {f"d{i}": prompt(110 + i, 300) for i in range(4)}
    try:
        rounds.ask(random.Random(3), prompts, with_inputs=set(), dropped=set(), switch_probability=0.9, at_once=True)
    finally:
        del engine.scheduler.hub.executor.run
    engine.assert_clean()
    assert struck
    with pytest.raises(AssertionError, match="not what transformers answers"):
        rounds.comparison.assert_same()
    assert rounds.comparison.differences["KV"]


def test_a_grammar_that_is_compiled_during_a_prefill_interrupts_it(
    engine: PrefillEngine, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = engine.scheduler
    backend = scheduler.grammar_manager.grammar_backend
    # What takes how long is decided here: the first compilation of a process may outlast the prefill.
    compiled, may_end = backend._init_value_dispatch(("regex", "[a-z]+"), False), threading.Event()

    def compile_late(key: Any, require_reasoning: bool) -> Any:
        assert key == ("regex", "[a-z]+")
        may_end.wait(30.0)
        return compiled

    monkeypatch.setattr(backend, "_init_value_dispatch", compile_late)
    short, long = prompt(2, 20), prompt(1, 4000)
    constrained = generate_request("constrained", short, 1, ttft_slo_s=20.0, logprobs=True)
    constrained.sampling_params.regex = "[a-z]+"
    engine.receive(constrained)
    engine.submit("long", long, ttft_slo_s=100.0, logprobs=True)
    threading.Timer(0.1, may_end.set).start()
    while not may_end.is_set() or scheduler.grammar_manager.has_waiting_grammars():
        assert engine.turn()
        assert "long" not in engine.answers
    engine.run()
    assert list(engine.answers) == ["constrained", "long"]
    assert not engine.answers["constrained"].aborted
    rounds.compare("long", long)
    rounds.compare("constrained", short, pattern="[a-z]+")
    assert_compared(rounds, 2)
    engine.assert_clean()


def test_a_start_does_not_wait_for_grammars_that_are_being_compiled(
    engine: PrefillEngine, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars = engine.scheduler.grammar_manager
    compile_it, may_end = grammars.grammar_backend._init_value_dispatch, threading.Event()

    def compile_late(*key: Any) -> Any:
        may_end.wait(120.0)
        return compile_it(*key)

    monkeypatch.setattr(grammars.grammar_backend, "_init_value_dispatch", compile_late)
    monkeypatch.setattr(grammars, "SGLANG_GRAMMAR_POLL_INTERVAL", 60.0)
    constrained = generate_request("constrained", prompt(2, 20), 1, ttft_slo_s=20.0, logprobs=True)
    constrained.sampling_params.regex = "[a-c]+"
    engine.receive(constrained)
    engine.submit("urgent", prompt(1, 20), ttft_slo_s=1.0, logprobs=True)
    started_s = time.monotonic()
    while "urgent" not in engine.answers:
        engine.turn()
    assert time.monotonic() - started_s < 30.0
    assert [req.rid for req in grammars.grammar_queue] == ["constrained"]
    may_end.set()
    engine.run()
    assert not engine.answers["constrained"].aborted
    rounds.compare("urgent", prompt(1, 20))
    rounds.compare("constrained", prompt(2, 20), pattern="[a-c]+")
    assert_compared(rounds, 2)
    engine.assert_clean()


def test_the_policy_sees_all_requests_however_many_and_the_urgent_one_that_comes_last_runs_first(
    engine: PrefillEngine, rounds: Rounds
) -> None:
    scheduler = engine.scheduler
    count = 4200
    assert count > 4096 > 2 * scheduler.max_running_requests
    for i in range(count):
        engine.submit(f"w{i}", prompt(i, 8), ttft_slo_s=1000.0)
    engine.submit("urgent", prompt(7, 9), ttft_slo_s=100.0, logprobs=True)
    scheduler.hub.look()
    waiting = {job.item.req.rid for job in scheduler.hub.work.policy.first_waiting(time.monotonic(), count + 1)}
    assert len(waiting) == count + 1
    scheduler.hub.work.policy.limits = Limits(max_suspended=100, max_batch_tokens=1)
    engine.turn()
    assert scheduler.hub.work.tasks.started
    assert "urgent" not in {req.rid for req in scheduler.waiting_queue}
    assert len(scheduler.waiting_queue) == count
    for rid in waiting - {"urgent"}:
        engine.abort(rid)
    engine.run()
    rounds.compare("urgent", prompt(7, 9))
    assert_compared(rounds, 1)
    engine.assert_clean()


def test_a_metadata_buffer_goes_to_the_next_request_in_the_look_that_frees_it(
    engine: PrefillEngine, rounds: Rounds
) -> None:
    """A server that looked for a buffer before it freed those of ended transfers would sleep with one free."""
    scheduler = engine.scheduler
    buffers = scheduler.req_to_metadata_buffer_idx_allocator
    taken = [buffers.alloc() for _ in range(buffers.available_size() - 1)]
    prompts = {"first": prompt(81, 200), "second": prompt(82, 300)}
    try:
        for rid, tokens in prompts.items():
            engine.submit(rid, tokens, logprobs=True)
        while not scheduler.disagg_prefill_inflight_queue:
            assert engine.turn()
        assert [req.rid for req in scheduler.disagg_prefill_inflight_queue] == ["first"]
        assert [req.rid for req in scheduler.disagg_prefill_bootstrap_queue.queue] == ["second"]
        assert buffers.available_size() == 0
        scheduler.hub.look()
        assert not scheduler.disagg_prefill_inflight_queue
        assert [job.item.req.rid for job in scheduler.hub.work.policy.first_waiting(0.0, 9)] == ["second"]
        engine.run()
    finally:
        for buffer in taken:
            buffers.free(buffer)
    for rid, tokens in prompts.items():
        rounds.compare(rid, tokens)
    assert_compared(rounds, len(prompts))
    engine.assert_clean()


def test_other_weights_do_not_meet_a_prefill_that_has_started(
    engine: PrefillEngine, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

    scheduler = engine.scheduler
    prompts = {"suspended": prompt(41, 900), "running": prompt(42, 500)}
    scheduler.hub.executor.interrupted = lambda: True
    scheduler.hub.work.policy.limits = Limits(max_suspended=100, max_batch_tokens=1)
    engine.submit("suspended", prompts["suspended"], ttft_slo_s=50.0, logprobs=True)
    engine.turn()
    engine.submit("running", prompts["running"], ttft_slo_s=5.0, logprobs=True)
    engine.turn()
    model = scheduler.tp_worker.model_runner.model
    live: list[int] = []

    def ruin(recv_req: Any) -> Any:
        live.append(len(scheduler.hub.work.tasks.live))
        for parameter in model.parameters():
            parameter.data.neg_()
        return None

    monkeypatch.setitem(scheduler._request_dispatcher._mapping, UpdateWeightFromDiskReqInput, ruin)
    try:
        engine.receive(UpdateWeightFromDiskReqInput(model_path="other", load_format=None))
        engine.run()
    finally:
        if live:
            for parameter in model.parameters():
                parameter.data.neg_()
    assert live == [0]
    for rid, tokens in prompts.items():
        rounds.compare(rid, tokens)
    assert_compared(rounds, 2)
    engine.assert_clean()


def test_more_kv_than_there_is_waits_for_tasks_that_hold_it(engine: PrefillEngine, rounds: Rounds) -> None:
    allocator = engine.scheduler.token_to_kv_pool_allocator
    taken = allocator.alloc(allocator.available_size() - 3500)
    engine.scheduler.hub.work.policy.limits = Limits(max_suspended=100, max_batch_tokens=1)
    prompts = {f"k{i}": prompt(i, 700) for i in range(8)}
    rounds.ask(random.Random(4), prompts, with_inputs=set(), dropped=set(), switch_probability=0.5, at_once=True)
    rounds.comparison.assert_same()
    assert rounds.comparison.counts["answers"] == len(prompts)
    assert rounds.seen["deepest"] >= 3
    allocator.free(taken)
    engine.assert_clean()


def test_a_client_that_leaves_frees_its_work_at_the_next_checkpoint(engine: PrefillEngine, rounds: Rounds) -> None:
    scheduler = engine.scheduler
    scheduler.hub.executor.interrupted = lambda: True
    engine.submit("suspended", prompt(1, 2000), ttft_slo_s=50.0)
    engine.turn()
    engine.submit("running", prompt(2, 1000), ttft_slo_s=5.0)
    engine.turn()
    engine.submit("waiting", prompt(3, 3000), ttft_slo_s=60.0)
    engine.submit("other", prompt(4, 300), ttft_slo_s=100.0, logprobs=True)
    engine.turn()
    states = {task.rids[0]: task.operators_passed for task in scheduler.hub.work.tasks.live}
    assert set(states) == {"suspended", "running"}
    assert scheduler.hub.work.tasks.running.rids == ["running"]
    before = scheduler.token_to_kv_pool_allocator.available_size()
    for rid in ("waiting", "suspended", "running"):
        engine.abort(rid)
    engine.turn()
    assert scheduler.token_to_kv_pool_allocator.available_size() >= before + 3000 - 300
    assert {task.rids[0] for task in scheduler.hub.work.tasks.live} <= {"other"}
    engine.run()
    rounds.compare("other", prompt(4, 300))
    assert_compared(rounds, 1)
    assert engine.answers["suspended"].aborted
    assert engine.answers["running"].aborted
    engine.assert_clean()


def test_who_leaves_a_batch_in_which_another_stays_is_freed_with_its_result(
    engine: PrefillEngine, rounds: Rounds
) -> None:
    scheduler = engine.scheduler
    scheduler.hub.executor.interrupted = lambda: True
    shared = prompt(70, 100)
    prompts = {f"m{i}": prompt(71 + i, 160 + 20 * i, shared) for i in range(4)}
    for rid, tokens in prompts.items():
        engine.submit(rid, tokens, ttft_slo_s=100.0, logprobs=True)
    engine.turn()
    [task] = scheduler.hub.work.tasks.live
    assert len(task.batch.reqs) == 4
    held = scheduler.token_to_kv_pool_allocator.available_size()
    for rid in ("m0", "m1", "m3"):
        engine.abort(rid)
    engine.turn()
    assert scheduler.hub.work.tasks.live == [task]
    assert scheduler.token_to_kv_pool_allocator.available_size() == held
    engine.run()
    assert {rid for rid, answer in engine.answers.items() if answer.aborted} == {"m0", "m1", "m3"}
    engine.submit("again", prompts["m3"], logprobs=True)
    engine.run()
    cached = engine.answers["again"].req.cached_tokens
    assert cached <= len(shared), "the KV cache of a request that has left is a cached prefix"
    rounds.compare("m2", prompts["m2"])
    rounds.compare("again", prompts["m3"])
    assert_compared(rounds, 2)
    engine.assert_clean()


def test_what_an_aborted_prefill_was_shown_is_released(engine: PrefillEngine) -> None:
    scheduler = engine.scheduler
    scheduler.hub.executor.interrupted = lambda: True
    engine.submit("leaves", prompt(1, 900))
    engine.turn()
    [task] = scheduler.hub.work.tasks.live
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
    engine: PrefillEngine, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.managers.schedule_batch import Req

    scheduler = engine.scheduler
    copies: list[tuple[str, bool]] = []
    init = Req.init_next_round_input

    def watched(req: Any, tree_cache: Any = None, cow_mamba: bool | None = None) -> None:
        copies.append((req.rid, cow_mamba is not False))
        init(req, tree_cache, cow_mamba)

    monkeypatch.setattr(Req, "init_next_round_input", watched)
    engine.submit("waits", prompt(1, 200), logprobs=True)
    scheduler.hub.look()
    assert [job.item.req.rid for job in scheduler.hub.work.policy.first_waiting(0.0, 10)] == ["waits"]
    assert copies == [("waits", False)]
    engine.run()
    assert copies == [("waits", False), ("waits", True)]
    rounds.compare("waits", prompt(1, 200))
    assert_compared(rounds, 1)
    engine.assert_clean()


def test_each_batch_is_prepared_once_before_its_forward_pass(
    engine: PrefillEngine, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what n-gram embeddings look up, in the models that have some."""
    scheduler = engine.scheduler
    prepared: list[Any] = []
    manager = type(scheduler.ngram_embedding_manager)
    prepare, run_batch = manager.prepare_for_forward, scheduler.run_batch

    def watched(self: Any, batch: Any, *, chunked_req: Any) -> Any:
        prepared.append(batch)
        return prepare(self, batch, chunked_req=chunked_req)

    def checked(batch: Any) -> Any:
        assert prepared == [batch]
        return run_batch(batch)

    monkeypatch.setattr(manager, "prepare_for_forward", watched)
    monkeypatch.setattr(scheduler, "run_batch", checked)
    engine.submit("only", prompt(1, 200), logprobs=True)
    engine.run()
    assert len(prepared) == 1
    rounds.compare("only", prompt(1, 200))
    assert_compared(rounds, 1)
    engine.assert_clean()


def test_a_pause_lets_started_prefills_finish_and_the_others_wait(engine: PrefillEngine, rounds: Rounds) -> None:
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

    scheduler = engine.scheduler
    scheduler.hub.executor.interrupted = lambda: True
    scheduler.hub.work.policy.limits = Limits(max_suspended=100, max_batch_tokens=1)
    prompts = {"suspended": prompt(1, 900), "running": prompt(2, 500), "waiting": prompt(3, 300)}
    for (rid, tokens), slo_s in zip(prompts.items(), (50.0, 5.0, 100.0), strict=True):
        if rid != "suspended":
            engine.turn()
        engine.submit(rid, tokens, ttft_slo_s=slo_s, logprobs=True)
    engine.turn()
    engine.receive(PauseGenerationReqInput(mode="in_place"))
    assert not engine.turn()
    assert {"suspended", "running"} <= set(engine.answers)
    assert "waiting" not in engine.answers
    engine.receive(ContinueGenerationReqInput())
    engine.run()
    for rid, tokens in prompts.items():
        rounds.compare(rid, tokens)
    assert_compared(rounds, len(prompts))
    engine.assert_clean()


def test_a_prefix_that_is_cached_meanwhile_makes_the_requests_that_wait_cheaper(
    engine: PrefillEngine, rounds: Rounds
) -> None:
    scheduler = engine.scheduler
    scheduler.hub.work.policy.limits = Limits(max_suspended=100, max_batch_tokens=1)
    shared = prompt(31, 640)
    prompts = {f"{number}": [*shared, *prompt(40 + number, 100)] for number in range(4)} | {"alone": prompt(50, 740)}
    for rid, tokens in prompts.items():
        engine.submit(rid, tokens, ttft_slo_s=30.0 if rid == "alone" else 20.0, logprobs=True)
    scheduler.hub.look()
    before_s = {job.item.req.rid: job.remaining_s for job in scheduler.hub.work.policy.first_waiting(0.0, 9)}
    assert len(before_s) == 5
    assert list(before_s.values()) == pytest.approx([before_s["alone"]] * 5)
    while not engine.answers:
        engine.turn()
    for _ in range(3):
        scheduler.hub.look()  # as many as wait behind the first, one at each event
    jobs = scheduler.hub.work.policy.first_waiting(0.0, 9)
    assert {job.item.req.rid: job.item.shape.cached_tokens // 64 for job in jobs} == {
        **{rid: 10 for rid in before_s if rid not in engine.answers and rid != "alone"},
        "alone": 0,
    }
    remaining_s = {job.item.req.rid: job.remaining_s for job in jobs}
    alone_s = remaining_s.pop("alone")
    assert max(remaining_s.values()) < alone_s, "by how much, depends on what the profile has measured"
    assert alone_s > 0.5 * before_s["alone"]
    engine.run()
    assert len(engine.answers) == 5
    for rid, tokens in prompts.items():
        rounds.compare(rid, tokens)
    assert_compared(rounds, len(prompts))
    assert rounds.seen["answers with a cached prefix"] == 3
    engine.assert_clean()


def test_an_idle_server_looks_after_itself_every_few_seconds(
    engine: PrefillEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, slept_s, rests = engine.scheduler.hub, [], []
    rest = hub.role.rest

    def sleep(timeout_s: float) -> None:
        slept_s.append(timeout_s)
        if len(slept_s) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(hub.role, "rest", lambda: rests.append(rest()) or rests[-1])
    monkeypatch.setattr(hub.events, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        hub.serve()
    assert rests == [True] * 3
    assert slept_s == [5.0] * 3


def test_a_flush_that_waits_for_the_end_of_all_is_done_when_nothing_is_left_and_needs_no_other_request(
    engine: PrefillEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.managers.io_struct import FlushCacheReqInput

    scheduler = engine.scheduler
    answers: list[bool] = []
    monkeypatch.setattr(scheduler.flush_wrapper, "_send_output", lambda output, asked: answers.append(output.success))
    scheduler.hub.executor.interrupted = lambda: True
    engine.submit("suspended", prompt(65, 900), ttft_slo_s=50.0)
    engine.turn()
    engine.receive(FlushCacheReqInput(timeout_s=100.0))
    engine.run()
    assert not answers
    assert scheduler.role.rest(), "the server has nothing to do"
    assert answers == [True]
    assert scheduler.tree_cache.evictable_size() == 0
    engine.assert_clean()


def cached_and_other(engine: PrefillEngine) -> dict[str, list[int]]:
    """The prompts of two requests that wait: all but 40 tokens of the first, which is due before, are cached."""
    prefix = prompt(61, 1500)
    engine.submit("first", prefix + prompt(62, 20))
    engine.run()
    tokens = {"cached": prefix + prompt(63, 40), "other": prompt(64, 500)}
    for rid, due_s in (("cached", 50.0), ("other", 60.0)):
        engine.submit(rid, tokens[rid], ttft_slo_s=due_s, logprobs=True)
    engine.scheduler.hub.look()
    return tokens


def test_a_request_whose_cached_prefix_is_evicted_while_it_waits_is_judged_by_what_is_left(
    engine: PrefillEngine, rounds: Rounds
) -> None:
    hub, tokens = engine.scheduler.hub, cached_and_other(engine)
    jobs = {job.item.req.rid: job for job in hub.work.policy.first_waiting(time.monotonic(), 2)}
    assert jobs["cached"].item.shape.new_tokens == 40
    hub.work.policy.limits = Limits(max_suspended=100, max_batch_tokens=600)
    assert [job.item.req.rid for job in hub.choose()] == ["cached", "other"]
    allocator = engine.scheduler.token_to_kv_pool_allocator  # which evicts what an allocation lacks
    allocator.evict_to_free_tokens(engine.scheduler.tree_cache, allocator.available_size() + 1000)
    assert [job.item.req.rid for job in hub.choose()] == ["cached"], "the two are more than a batch now"
    assert jobs["cached"].item.shape.new_tokens >= 1000
    engine.run()
    for rid in tokens:
        rounds.compare(rid, tokens[rid])
    assert_compared(rounds, 2)
    engine.assert_clean()


def test_a_flush_in_a_pause_leaves_no_cached_prefix_to_the_requests_that_wait(
    engine: PrefillEngine, rounds: Rounds
) -> None:
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

    hub, tokens = engine.scheduler.hub, cached_and_other(engine)
    hub.work.policy.limits = Limits(max_suspended=100, max_batch_tokens=600)
    assert [job.item.shape for job in hub.choose()] == [PrefillShape(40, 1500), PrefillShape(500)]
    engine.receive(PauseGenerationReqInput(mode="in_place"))
    assert engine.scheduler.flush_cache()
    engine.receive(ContinueGenerationReqInput())
    assert [(job.item.req.rid, job.item.shape) for job in hub.choose()] == [("cached", PrefillShape(1540))]
    engine.run()
    for rid in tokens:
        rounds.compare(rid, tokens[rid])
    assert_compared(rounds, 2)
    engine.assert_clean()


def test_a_request_about_to_start_is_matched_before_it_is_judged(engine: PrefillEngine, rounds: Rounds) -> None:
    """What another could be started for, had its price not dropped at the same event."""
    scheduler = engine.scheduler
    scheduler.hub.work.policy.limits = Limits(max_suspended=100, max_batch_tokens=1)
    shared = prompt(61, 640)
    prompts = {f"{number}": [*shared, *prompt(70 + number, 100)] for number in range(4)}
    for number, (rid, tokens) in enumerate(prompts.items()):
        engine.submit(rid, tokens, ttft_slo_s=20.0 + number, logprobs=True)
    scheduler.hub.look()
    while not engine.answers:
        engine.turn()
    jobs = scheduler.hub.work.policy.first_waiting(0.0, 9)
    assert all(job.item.shape.cached_tokens == 0 for job in jobs)
    chosen = scheduler.hub.choose()
    assert [job.item.shape.cached_tokens // 64 for job in chosen] == [10]
    engine.run()
    for rid, tokens in prompts.items():
        rounds.compare(rid, tokens)
    assert_compared(rounds, len(prompts))
    assert rounds.seen["answers with a cached prefix"] == 3
    engine.assert_clean()
