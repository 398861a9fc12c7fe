"""Real schedulers that prefill and decode, each in a process of its own: FlowPrefill's, and SGLang's own beside it.

A test asks for answers and gets them; what it compares them with is what SGLang's own scheduler answers to the same
requests, each alone.
"""

from __future__ import annotations

import os
import random
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any, Final, TypeVar

import torch

from tests.engine import make_scheduler
from tests.prompts import population

LOGPROB_TOLERANCE: Final = 2e-4
"""Log probabilities of one token, computed in batches of other sizes, differ by rounding."""
CHECKS: Final = {
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
}
"""SGLang's checks of its KV pool, which raise an error in the turn after the mistake."""


@dataclass(frozen=True)
class Ask:
    """A request."""

    prompt: tuple[int, ...]
    max_new_tokens: int = 8
    sampling: tuple[tuple[str, Any], ...] = ()
    """Sampling parameters beside greedy decoding."""
    inputs_from: int | None = None
    """Log probabilities of the prompt's tokens behind this place are asked for, too."""
    ttft_slo_s: float | None = None
    tbt_slo_s: float | None = None

    @property
    def alone(self) -> Ask:
        """What decides the answer."""
        return replace(self, ttft_slo_s=None, tbt_slo_s=None)

    def message(self, rid: str, tokenizer: Any) -> Any:
        """What the tokenizer process sends to the scheduler."""
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.observability.req_time_stats import APIServerReqTimeStats
        from sglang.srt.sampling.sampling_params import SamplingParams

        objectives = {"ttft_slo": self.ttft_slo_s, "tbt_slo": self.tbt_slo_s}
        custom_params = {name: value for name, value in objectives.items() if value is not None} or None
        sampling = SamplingParams(
            **({"temperature": 0.0} | dict(self.sampling)),
            max_new_tokens=self.max_new_tokens,
            custom_params=custom_params,
        )
        sampling.normalize(tokenizer)
        recv = TokenizedGenerateReqInput(
            rid=rid,
            input_text="",
            input_ids=array("q", self.prompt),
            input_embeds=None,
            mm_inputs=None,
            sampling_params=sampling,
            return_logprob=True,
            logprob_start_len=-1 if self.inputs_from is None else self.inputs_from,
            top_logprobs_num=0,
            token_ids_logprob=None,
            token_type_ids=None,
            stream=True,
        )
        recv.time_stats = APIServerReqTimeStats()
        recv.time_stats.flowprefill_received_s = recv.time_stats.flowprefill_sent_s = time.monotonic()
        return recv


@dataclass(frozen=True)
class Answer:
    """What a client got."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    input_logprobs: tuple[float | None, ...]
    reason: str
    """How it ended: SGLang's type of it."""
    detail: str = ""
    """What it matched, or the error."""
    status: int | None = None
    prompt_tokens: int = 0
    """Tokens that were prefilled: SGLang puts another prompt in the place of one that it refuses late."""


class Unfinished(AssertionError):
    """Requests that have no answer."""


class Engine:
    """Drives a scheduler turn by turn, and keeps what it would send to the clients."""

    def __init__(self, scheduler: str, model_path: str, environment: Mapping[str, str], **server_args: Any) -> None:
        os.environ.update(environment)
        from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

        self.scheduler = make_scheduler(scheduler, model_path, **server_args)
        self.answers: dict[str, Answer] = {}
        self.seen: Counter[str] = Counter()
        self.strikes = 0
        """Times that a planted defect struck."""
        self._streamed: dict[str, int] = {}
        """Tokens that each client has."""
        streamer = self.scheduler.output_streamer
        record = {"stream_output": lambda _, reqs, return_logprob, skip_req=None: self._record(reqs)}
        to_here = type("ToHere", (SchedulerOutputStreamer,), record)
        streamer.__class__ = type("Streamer", (type(streamer), to_here), {})
        self.sent: list[Any] = []
        """What was sent to the HTTP process past the output streamer."""
        self.scheduler.ipc_channels.send_to_tokenizer.send_output = self._sent

    def _sent(self, output: Any, *_: Any) -> None:
        self.sent.append(output)
        if type(output).__name__ == "AbortReq":
            reason = output.finished_reason or {}
            message, status = str(reason.get("message", "")), reason.get("status_code")
            assert output.rid not in self.answers, f"{output.rid} ends twice"
            self.answers[output.rid] = Answer((), (), (), "abort", message, status)

    @torch.no_grad()
    def receive(self, *messages: Any) -> None:
        """Hand the scheduler what came over its socket."""
        self.scheduler.process_input_requests(list(messages))

    def submit(self, rid: str, ask: Ask) -> None:
        self._streamed[rid] = 0
        self.receive(ask.message(rid, self.scheduler.tokenizer))

    def abort(self, rid: str) -> None:
        from sglang.srt.managers.io_struct import AbortReq

        self.receive(AbortReq(rid=rid))

    def turn(self) -> bool:
        """One round of the event loop, without the sleep. Whether there was anything to do."""
        raise NotImplementedError

    def run(self, limit: int = 200_000) -> None:
        """Go on until nothing is left to do."""
        for _ in range(limit):
            if not self.turn() and self.scheduler.is_fully_idle():
                return
        raise Unfinished(f"still not idle after {limit} turns")

    def forget(self) -> None:
        self.answers.clear()
        self._streamed.clear()

    def assert_clean(self) -> None:
        """SGLang's own idle checks pass (KV pool, request rows, radix tree), and everything can be flushed."""
        scheduler = self.scheduler
        assert scheduler.is_fully_idle()
        scheduler.on_idle()
        assert scheduler.flush_cache()
        assert scheduler.token_to_kv_pool_allocator.available_size() == scheduler.max_total_num_tokens
        assert scheduler.req_to_token_pool.available_size() == scheduler.req_to_token_pool.size

    def _record(self, reqs: Sequence[Any]) -> None:
        for req in reqs:
            tokens = len(req.output_ids)
            had = self._streamed.get(req.rid, 0)
            assert tokens in (had, had + 1), f"{req.rid} has {had} tokens, and gets {tokens - had} more at once"
            assert tokens > had or req.finished(), f"{req.rid} is sent nothing new"
            self._streamed[req.rid] = tokens
            if req.finished():
                assert req.rid not in self.answers, f"{req.rid} ends twice"
                reason = req.finished_reason.to_json()
                logprobs = req.logprob
                self.answers[req.rid] = Answer(
                    tuple(req.output_ids_through_stop),
                    tuple(map(float, logprobs.output_token_logprobs_val or ())),
                    tuple(logprobs.input_token_logprobs_val or ()) if req.logprob_start_len >= 0 else (),
                    str(reason["type"]),
                    str(reason.get("matched", reason.get("message", ""))),
                    reason.get("status_code"),
                    len(req.origin_input_ids),
                )


def stock_scheduler(server_args: Any, port_args: Any) -> Any:
    """SGLang's own, with a streamer whose class can be changed."""
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

    class Streamer(SchedulerOutputStreamer):
        pass

    class Stock(Scheduler):
        def get_output_streamer_class(self) -> type[SchedulerOutputStreamer]:
            return Streamer

    return Stock(server_args, port_args)


class StockEngine(Engine):
    """SGLang's own scheduler, in its own loop."""

    def __init__(self, model_path: str, **server_args: Any) -> None:
        super().__init__("tests.unified_engine:stock_scheduler", model_path, {}, **server_args)

    @torch.no_grad()
    def turn(self) -> bool:
        scheduler = self.scheduler
        plan = scheduler.get_next_batch_to_run(running_batch=scheduler.running_batch, last_batch=scheduler.last_batch)
        scheduler.running_batch, batch = plan.running_batch, plan.batch_to_run
        if batch:
            scheduler.process_batch_result(batch, scheduler.run_batch(batch))
        scheduler.last_batch = batch
        return bool(batch) or scheduler.grammar_manager.has_waiting_grammars()

    def answer(self, ask: Ask) -> Answer:
        """The answer to one request, with nothing else on the server."""
        self.forget()
        self.scheduler.flush_cache()
        self.submit("alone", ask)
        self.run()
        return self.answers["alone"]


class UnifiedEngine(Engine):
    """FlowPrefill's scheduler, in the hub's loop. SGLang's checks of the KV pool run in every turn."""

    def __init__(self, model_path: str, environment: Mapping[str, str] | None = None, **server_args: Any) -> None:
        super().__init__(
            "sgl_flowprefill.runtime.unified_scheduler:UnifiedScheduler",
            model_path,
            CHECKS | dict(environment or {}),
            **server_args,
        )
        drop = self.hub.role.drop

        def drop_or_raise(task: Any) -> None:
            failure = task.failure  # a test's own assertion, from within a forward pass
            assert failure is None or failure.kind != "AssertionError", failure.traceback
            drop(task)

        self.hub.role.drop = drop_or_raise
        run_batch = self.scheduler.run_batch

        def flagged(batch: Any, *arguments: Any, **options: Any) -> Any:
            """As SGLang does where a forward pass is one of several ranks'."""
            from sglang.srt.layers.dp_attention import set_is_extend_in_batch

            set_is_extend_in_batch(batch.forward_mode.is_extend())
            return run_batch(batch, *arguments, **options)

        self.scheduler.run_batch = flagged

    @property
    def hub(self) -> Any:
        return self.scheduler.hub

    @torch.no_grad()
    def turn(self) -> bool:
        found = bool(self.hub.turn())
        self.check()
        return found

    def check(self) -> None:
        """All KV cache and all rows are free, cached, or owned by a request that is known; nothing is freed twice."""
        scheduler = self.scheduler
        scheduler.invariant_checker.self_check_during_busy()
        owners = len(scheduler.invariant_checker._requests_owning_rows())
        rows = scheduler.req_to_token_pool.size - scheduler.req_to_token_pool.available_size()
        assert rows == owners, f"{rows} rows are taken, and {owners} requests own one"
        self.seen["checks of the KV pool"] += 1

    def assert_clean(self) -> None:
        super().assert_clean()
        role = self.hub.role
        assert not any((role.joining, role._streams, role._come, role._held_back)), role
        assert not role.policy.streams.requests
        assert not self.hub.work.tasks
        assert not len(self.hub.work.waiting)


# ---- engines in processes of their own -------------------------------------------------------------------------------

_engine: Any = None
"""This process's."""
Outcome = TypeVar("Outcome")


class Remote:
    """An engine in a process of its own, in which functions of it are called."""

    def __init__(self, make: Callable[..., Engine], *arguments: Any, **options: Any) -> None:
        self._pool = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_make, initargs=(make, arguments, options)
        )

    def call(self, function: Callable[..., Outcome], *arguments: Any) -> Outcome:
        """What ``function(engine, *arguments)`` returns or raises there."""
        return self._pool.submit(_call, function, *arguments).result()

    def close(self) -> None:
        self._pool.shutdown()


def _make(make: Callable[..., Engine], arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
    global _engine
    _engine = make(*arguments, **options)


def _call(function: Callable[..., Outcome], *arguments: Any) -> Outcome:
    return function(_engine, *arguments)


class Stock:
    """What SGLang's own scheduler answers to each request alone; what it has computed for one test, others have."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._kept: dict[Ask, Answer] = {}

    def answers(self, asks: Collection[Ask]) -> dict[Ask, Answer]:
        alone = {ask.alone for ask in asks}
        missing = [ask for ask in alone if ask not in self._kept]
        if missing:
            self._kept |= self._remote.call(_answer_each, missing)
        return {ask: self._kept[ask.alone] for ask in asks}


def _answer_each(engine: StockEngine, asks: Sequence[Ask]) -> dict[Ask, Answer]:
    return {ask: engine.answer(ask) for ask in asks}


@dataclass
class StockComparison:
    """Compares answers with those of SGLang's own scheduler, counts what was compared, and collects what differs."""

    stock: Stock
    counts: Counter[str] = field(default_factory=Counter)
    largest: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    differences: list[str] = field(default_factory=list)

    def compare(self, asked: Mapping[str, Ask], answers: Mapping[str, Answer], left: Collection[str] = ()) -> None:
        """All of ``asked``, but for those who ``left`` before their answers, of which nothing is compared but that what
        they got is the beginning of it.
        """
        expected = self.stock.answers(set(asked.values()))
        for rid, ask in asked.items():
            answer = answers.get(rid)
            if answer is None:
                self.differences.append(f"{rid} has no answer")
            elif rid in left and answer.reason == "abort":
                self.counts["aborts"] += 1
                if answer.prompt_tokens == len(ask.prompt):
                    self._tokens(rid, answer.tokens, expected[ask].tokens[: len(answer.tokens)])
            else:
                self._answer(rid, answer, expected[ask])

    def _answer(self, rid: str, answer: Answer, expected: Answer) -> None:
        self.counts["answers"] += 1
        self._tokens(rid, answer.tokens, expected.tokens)
        if (answer.reason, answer.detail) != (expected.reason, expected.detail):
            self.differences.append(
                f"{rid} ends with {answer.reason} {answer.detail} instead of {expected.reason} {expected.detail}"
            )
        # Where no token is asked for, SGLang has one or none by what else is in the batch.
        found, wanted = (one.logprobs[: len(one.tokens)] for one in (answer, expected))
        self._logprobs(f"{rid}: log probability", "log probabilities", found, wanted)
        self._logprobs(
            f"{rid}: log probability of the prompt",
            "log probabilities of prompts",
            answer.input_logprobs,
            expected.input_logprobs,
        )

    def _tokens(self, rid: str, tokens: Sequence[int], expected: Sequence[int]) -> None:
        self.counts["tokens"] += len(tokens)
        if tuple(tokens) != tuple(expected):
            step = next((i for i, pair in enumerate(zip(tokens, expected, strict=False)) if pair[0] != pair[1]), None)
            self.differences.append(
                f"{rid} has {len(tokens)} tokens instead of {len(expected)}"
                if step is None
                else f"{rid}: token {step} is {tokens[step]} instead of {expected[step]}"
            )

    def _logprobs(self, name: str, kind: str, found: Sequence[float | None], expected: Sequence[float | None]) -> None:
        self.counts[kind] += len(found)
        if len(found) != len(expected):
            self.differences.append(f"{name}: {len(found)} instead of {len(expected)}")
            return
        for i, (mine, its) in enumerate(zip(found, expected, strict=True)):
            if (mine is None) != (its is None):
                self.differences.append(f"{name} {i} is {mine} instead of {its}")
            elif mine is not None and its is not None:
                self.largest[kind] = max(self.largest[kind], abs(mine - its))
                if not abs(mine - its) <= LOGPROB_TOLERANCE:
                    self.differences.append(f"{name} {i} is {mine:.5f} instead of {its:.5f}")
                    return

    def assert_same(self) -> None:
        assert not self.differences, f"{len(self.differences)} differ from SGLang's own: " + "; ".join(
            self.differences[:6]
        )

    def __str__(self) -> str:
        compared = ", ".join(f"{count:,} {what}" for what, count in self.counts.items())
        largest = ", ".join(f"{kind} {value:.2g}" for kind, value in self.largest.items())
        return f"compared with SGLang's own scheduler: {compared}; largest differences: {largest}"


# ---- chance in place of the policy -----------------------------------------------------------------------------------


def coin(colocated: Any, rng: random.Random, seen: Counter[str]) -> Callable[..., Any]:
    """In place of what ``colocated`` decides: a task, a request or a step, by chance."""
    from sgl_flowprefill.policy import Act
    from sgl_flowprefill.policy.colocated import Turn

    def decide(now_s: float, running: Any, admit: bool = True) -> Any:
        tasks = sorted(colocated.prefills.started, key=lambda job: job.item.id)
        requests = colocated.prefills.first_waiting(now_s, 1000) if admit else []
        choices: list[Any] = tasks + sorted(requests, key=lambda job: job.item.number)
        if colocated.streams.requests:
            choices += [Act.STEP] * max(1, len(choices))
        if not choices:
            return Turn(Act.NOTHING)
        choice = rng.choice(choices)
        started = sum(1 for job in tasks if job.item.has_run)
        if choice is Act.STEP:
            seen["steps"] += 1
            seen["steps inside prefills"] += started > 0
            return Turn(Act.STEP)
        seen["suspensions"] += running is not None and choice is not running
        seen["deepest"] = max(seen["deepest"], started)
        return Turn(Act.TASK if choice.started else Act.START, choice)

    return decide


@contextmanager
def chance(engine: UnifiedEngine, seed: int, switch_probability: float) -> Iterator[Counter[str]]:
    """Suspend prefills at random interruption points, and run whatever a coin says: a task, a request, a step."""
    rng = random.Random(seed)
    hub, seen = engine.hub, engine.seen
    colocated, executor, role = hub.work.colocated, hub.executor, hub.role

    def interrupted() -> bool:
        from sglang.srt.layers.dp_attention import get_is_extend_in_batch

        assert get_is_extend_in_batch(), "a prefill takes itself for a decode step"
        return rng.random() < switch_probability

    def retracted(req: Any, is_retracted: bool = False) -> None:
        if is_retracted and "SGLANG_TEST_RETRACT" not in os.environ:
            assert not hub.work.tasks.live, f"stream {req.rid} is retracted while prefills hold KV cache"
        add(req, is_retracted)

    scheduler, add = engine.scheduler, engine.scheduler._add_request_to_queue
    before = Counter(retractions=role.retractions, given_back=role.given_back)
    was_interrupted, ends_waiting = executor.interrupted, executor.ends_waiting
    colocated.next, scheduler._add_request_to_queue = coin(colocated, rng, seen), retracted
    executor.interrupted = executor.ends_waiting = interrupted
    try:
        yield seen
    finally:
        del colocated.next, scheduler._add_request_to_queue
        executor.interrupted, executor.ends_waiting = was_interrupted, ends_waiting
        seen["retractions"] += role.retractions - before["retractions"]
        seen["given back"] += role.given_back - before["given_back"]


def asks(
    count: int,
    seed: int,
    longest_tokens: int = 2000,
    longest_answer_tokens: int = 24,
    always_ignore_eos: bool = False,
) -> list[Ask]:
    """Requests of all kinds: penalties, grammars, stop tokens, log probabilities of the prompt, answers of 0 tokens."""
    rng = random.Random(seed)
    made = []
    for prompt in population(count, seed=seed, longest_tokens=longest_tokens):
        sampling: dict[str, Any] = {}
        kind = rng.random()
        if kind < 0.15:
            sampling["frequency_penalty"] = rng.choice([0.5, 1.5])
        elif kind < 0.25:
            sampling["presence_penalty"] = 1.0
        elif kind < 0.35:
            sampling["repetition_penalty"] = 1.3
        elif kind < 0.45:
            sampling["regex"] = rng.choice(["[a-z ]+", "(yes|no|maybe)( and (yes|no))*"])
        elif kind < 0.5:
            sampling["min_new_tokens"] = 4
        if rng.random() < 0.7 or always_ignore_eos:
            sampling["ignore_eos"] = True
        answer_tokens = rng.choice([0, 1, 2]) if rng.random() < 0.2 else rng.randrange(2, longest_answer_tokens)
        if "min_new_tokens" in sampling:
            answer_tokens = max(answer_tokens, 4)
        made.append(
            Ask(
                tuple(prompt),
                answer_tokens,
                tuple(sampling.items()),
                inputs_from=rng.choice([0, len(prompt) // 2]) if rng.random() < 0.1 else None,
            )
        )
    return made


def without_penalties(requests: Sequence[Ask]) -> list[Ask]:
    """Those without penalties for tokens that came before: SGLang forgets these tokens when it retracts a stream."""
    return [ask for ask in requests if not any(name.endswith("penalty") for name, _ in ask.sampling)]


@dataclass
class Play:
    """What became of a round."""

    answers: dict[str, Answer]
    left: set[str]
    seen: Counter[str]


def play(
    engine: UnifiedEngine,
    asked: Mapping[str, Ask],
    dropped: Collection[str],
    seed: int,
    switch_probability: float,
    at_once: bool = False,
) -> Play:
    """Submit what is ``asked``, now and then or ``at_once``, abort what is ``dropped`` at some time, and run it all."""
    rng = random.Random(seed)
    engine.forget()
    engine.seen.clear()
    left: set[str] = set()

    def abort(rid: str) -> None:
        if rid not in engine.answers:
            left.add(rid)
        engine.seen[f"aborts: {state_of(engine, rid)}"] += 1
        engine.abort(rid)
        engine.turn()

    with chance(engine, rng.randrange(1 << 30), switch_probability):
        for rid, ask in asked.items():
            engine.submit(rid, ask)
            if rid in dropped and rng.random() < 0.2:
                abort(rid)
            for _ in range(0 if at_once else rng.randrange(6)):
                engine.turn()
        for rid in sorted(set(dropped) - left):
            abort(rid)
            for _ in range(rng.randrange(12)):
                engine.turn()
        engine.run()
    return Play(dict(engine.answers), left, Counter(engine.seen))


def state_of(engine: UnifiedEngine, rid: str) -> str:
    """Where a request is."""
    scheduler, role, tasks = engine.scheduler, engine.hub.role, engine.hub.work.tasks

    def holds(reqs: Collection[Any]) -> bool:
        return any(req.rid == rid for req in reqs)

    if rid in engine.answers:
        return "ended"
    if holds(scheduler.grammar_manager.grammar_queue):
        return "compiling"
    for req in scheduler.waiting_queue:
        if req.rid == rid:
            return "given back" if req in role._held_back else "retracted" if req.is_retracted else "waiting"
    for task in tasks.live:
        if rid in task.rids:
            return "running" if task is tasks.running else "suspended" if task.has_run else "started"
    if any(rid in task.rids for task in tasks.finishing):
        return "result on its way"
    if any(holds(batch.reqs) for batch in role.joining):
        return "joining"
    return "decoding" if holds(scheduler.running_batch.reqs) else "nowhere"


def play_and_flush(engine: UnifiedEngine, *arguments: Any) -> Play:
    """``play``, and nothing is left behind."""
    played = play(engine, *arguments)
    engine.assert_clean()
    return played
