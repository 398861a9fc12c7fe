"""Real schedulers that prefill and decode, turn by turn: FlowPrefill's, and SGLang's own beside it."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from sgl_flowprefill.hub.task import STEP
from tests.engine import Engine, raise_assertions
from tests.unified_asks import Answer, Ask

CHECKS: Final = {
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
}
"""SGLang's checks of its KV pool, which raise an error in the turn after the mistake."""
OBJECTIVE: Final = {"FLOWPREFILL_DEFAULT_TBT_SLO": "60"}
"""How many stream at a time is not to depend on the machine's speed: who asks for an objective names it."""


class AnsweringEngine(Engine):
    """Keeps the whole answers that its scheduler would send to clients, and sees that none comes twice."""

    def __init__(self, scheduler: str, model_path: str, environment: Mapping[str, str], **server_args: Any) -> None:
        os.environ.update(environment)
        super().__init__(scheduler, model_path, **server_args)
        self.answers: dict[str, Answer] = {}
        self.seen: Counter[str] = Counter()
        self.strikes = 0
        """Times that a planted defect struck."""
        self.streamed: dict[str, int] = {}
        """Tokens that each client has."""
        self.reports: defaultdict[str, list[dict[str, Any] | None]] = defaultdict(list)
        """What answers said of their requests, in the order of their ends; None for an end past the output streamer."""
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
            self.reports[output.rid].append(None)

    def submit(self, rid: str, ask: Ask) -> None:
        self.streamed[rid] = 0
        self.receive(ask.message(rid, self.scheduler.tokenizer))

    def forget(self) -> None:
        self.answers.clear()
        self.streamed.clear()

    def record_outputs(self, reqs: Sequence[Any]) -> None:
        reqs = [req for req in reqs if not req.finished_output]  # as SGLang's, which a step ahead tells of twice
        added = self.scheduler.output_streamer.build_additional_customized_info(reqs)
        for req, reports in zip(reqs, added.get("flowprefill", ()), strict=bool(added)):
            assert len(reports) == req.finished(), f"{req.rid} has {len(reports)} reports"
            self.reports[req.rid] += reports
        for req in reqs:
            tokens = len(req.output_ids)
            had = self.streamed.get(req.rid, 0)
            assert tokens in (had, had + 1), f"{req.rid} has {had} tokens, and gets {tokens - had} more at once"
            assert tokens > had or req.finished(), f"{req.rid} is sent nothing new"
            self.streamed[req.rid] = tokens
            if req.finished():
                req.finished_output = True
                assert req.rid not in self.answers, f"{req.rid} ends twice"
                self.seen["retractions told"] += req.retraction_count
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
                    req.cached_tokens,
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


class StockEngine(AnsweringEngine):
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


class UnifiedEngine(AnsweringEngine):
    """FlowPrefill's scheduler, in the hub's loop. SGLang's checks of the KV pool run at the beginning of every turn."""

    def __init__(self, model_path: str, environment: Mapping[str, str] | None = None, **server_args: Any) -> None:
        super().__init__(
            "sgl_flowprefill.runtime.unified_scheduler:UnifiedScheduler",
            model_path,
            CHECKS | OBJECTIVE | dict(environment or {}),
            **server_args,
        )
        raise_assertions(self.hub.role)
        run_batch = self.scheduler.run_batch

        def flagged(batch: Any, *arguments: Any, **options: Any) -> Any:
            """As SGLang does where a forward pass is one of several ranks'."""
            from sglang.srt.layers.dp_attention import set_is_extend_in_batch

            set_is_extend_in_batch(batch.forward_mode.is_extend())
            return run_batch(batch, *arguments, **options)

        self.scheduler.run_batch = flagged

    @torch.no_grad()
    def turn(self) -> bool:
        found = super().turn()
        self.check()
        return found

    @torch.no_grad()
    def step(self) -> None:
        """A decode step now, whatever the policy says."""
        self.hub.step()
        self.check()

    def check(self) -> None:
        """All rows are free or owned by a request that is known. SGLang's checks, with which the next turn begins, say
        so of all KV cache, and that nothing is freed twice.
        """
        scheduler = self.scheduler
        owners = len(scheduler.invariant_checker._requests_owning_rows())
        rows = scheduler.req_to_token_pool.size - scheduler.req_to_token_pool.available_size()
        assert rows == owners, f"{rows} rows are taken, and {owners} requests own one"
        self.seen["checks of the KV pool"] += 1

    def assert_clean(self) -> None:
        super().assert_clean()
        role = self.hub.role
        assert not any((role.joining, role.streams, role.not_told, role.held_back)), role
        assert not role.policy.streams.requests
        assert not self.hub.work.tasks
        assert not len(self.hub.work.waiting)


def log_to(engine: UnifiedEngine, path: Path) -> None:
    """Write what happens from now on to an event log of its own."""
    from sgl_flowprefill.runtime.event_recorder import AnswerReports, EventRecorder

    recorder = EventRecorder(path, decodes=True)
    engine.record(recorder)
    engine.scheduler.output_streamer.reports = AnswerReports(recorder)
    engine.reports.clear()


def reports_of(engine: UnifiedEngine) -> tuple[dict[str, list[dict[str, Any] | None]], int]:
    """What answers have said of their requests since the event log began, and of how many there is still to say."""
    return dict(engine.reports), len(engine.scheduler.output_streamer.reports)


def flush_log(engine: UnifiedEngine) -> None:
    """Write the whole event log."""
    engine.hub.recorder.flush()


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
            return "given back" if req in role.held_back else "retracted" if req.is_retracted else "waiting"
    for task in tasks.live:
        if rid in task.rids:
            return "running" if task is tasks.running else "suspended" if task.has_run else "started"
    if any(rid in task.rids for task in tasks.prefills):
        return "result on its way"
    if any(holds(batch.reqs) for batch in role.joining):
        return "joining"
    if holds(scheduler.running_batch.reqs):
        return "step in flight" if STEP in [done.id for done in tasks.finishing] else "decoding"
    return "nowhere"
