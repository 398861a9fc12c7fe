"""Real scheduler processes of a tensor-parallel prefill server, started as SGLang's own launcher starts them.

The test is their tokenizer and detokenizer process: requests go in and answers come out over ZeroMQ, and the ranks run
their event loops. Requests carry SGLang's fake bootstrap host, so no KV is sent anywhere (see ``tests.engine``).
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import torch
import zmq

from sgl_flowprefill.cluster.free_ports import free_port
from sgl_flowprefill.events import read_events
from tests import warm
from tests.engine import FIRST_START_S, compile_nothing, generate_request, keep_prefixes, measure_for
from tests.kv import watch_kv
from tests.late_device import LateDevice
from tests.rank_notes import note_finishes, notes_path
from tests.reference import Comparison, Kv


@dataclass(frozen=True)
class Chaos:
    """How rank 0 decides instead of by its policy: it suspends by chance, and runs whatever a coin says."""

    seed: int
    switch_probability: float


class Ranks:
    """``tp`` scheduler processes, as a context manager. Spread over ``nodes``, which are this machine all the same.

    ``prepare``: a function of a module, called in each rank's process with its scheduler and its rank.

    ``pass_probabilities``: each rank's device is late (``tests.late_device``), and how soon its work is over.
    """

    settings: Mapping[str, Any] = {"disaggregation_mode": "prefill", "disaggregation_transfer_backend": "nixl"}
    """What kind of server it is."""

    def __init__(
        self,
        model_path: str,
        tp: int,
        directory: Path,
        chaos: Chaos | None = None,
        *,
        nodes: int = 1,
        pass_probabilities: Sequence[float] = (),
        prepare: Callable[[Any, int], object] | None = None,
    ) -> None:
        self.event_log = directory / "events.jsonl"
        self.log = directory / "ranks.log"
        self.tokens: dict[str, int | None] = {}
        self.logprobs: dict[str, float] = {}
        self.reasons: dict[str, dict[str, Any]] = {}
        """Why each request is finished, as SGLang tells its tokenizer process."""
        self._prepare = prepare
        self._start = (model_path, tp, nodes, chaos)
        self._late = pass_probabilities
        self._sent = 0

    def __enter__(self) -> Ranks:
        from sglang.srt.server_args import PortArgs, ServerArgs

        model_path, tp, nodes, chaos = self._start
        self._sigquit = signal.signal(signal.SIGQUIT, lambda number, frame: None)  # sent by a rank that fails
        rendezvous = f"127.0.0.1:{free_port('127.0.0.1')}" if nodes > 1 else None
        node_args = []
        for node in range(nodes):
            args = ServerArgs(
                model_path=model_path,
                tp_size=tp,
                nnodes=nodes,
                node_rank=node,
                dist_init_addr=rendezvous,
                **{"max_total_tokens": 60_000, **self.settings},
                disable_overlap_schedule=True,
                chunked_prefill_size=-1,
                mem_fraction_static=0.9,  # what others take while weights are loaded is no reason not to start
                log_level="warning",
            )
            args.resolve_once()
            node_args.append(args)
        ports = PortArgs.init_new(node_args[0])
        self._context = zmq.Context()
        tokenizer, detokenizer = (
            self._bind(zmq.PULL, name) for name in (ports.tokenizer_ipc_name, ports.detokenizer_ipc_name)
        )
        self._answers = tokenizer if node_args[0].skip_tokenizer_init else detokenizer
        self._bind(zmq.DEALER, ports.rpc_ipc_name)
        rank_ports = self.bind_inputs(node_args[0], ports, tp)
        self.processes, pipes = [], []
        for rank in range(tp):
            receiver, sender = warm.CONTEXT.Pipe(duplex=False)
            args = node_args[rank * nodes // tp]
            late = self._late[rank] if self._late else None
            work = (
                args,
                rank_ports[rank],
                rank,
                sender,
                str(self.event_log),
                str(self.log),
                chaos,
                late,
                self._prepare,
            )
            self.processes.append(warm.CONTEXT.Process(target=warm.warm(self.run_rank), args=work, daemon=True))
            self.processes[-1].start()
            sender.close()
            pipes.append(receiver)
        try:
            for pipe in pipes:
                pipe.recv()
        except EOFError:
            self.__exit__(None, None, None)
            raise AssertionError(f"a rank has ended:\n{self.log.read_text()}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self._context.destroy(linger=0)
        signal.signal(signal.SIGQUIT, self._sigquit)

    def bind_inputs(self, args: Any, ports: Any, tp: int) -> list[Any]:
        """Open the way of requests to the ranks; each rank's ports."""
        self._inputs = [self._bind(zmq.PUSH, ports.scheduler_input_ipc_name)]
        return [ports] * tp

    @staticmethod
    def run_rank(*work: Any) -> None:
        """The body of a rank's process."""
        run_rank(*work)

    def submit(
        self,
        rid: str,
        prompt: Sequence[int],
        ttft_slo_s: float | None = None,
        rank: int = 0,
        pattern: str | None = None,
    ) -> None:
        request = generate_request(rid, prompt, self._sent, ttft_slo_s, logprobs=True)
        request.sampling_params.regex = pattern
        self.send(request, rank)
        self._sent += 1

    def abort(self, rid: str) -> None:
        from sglang.srt.managers.io_struct import AbortReq

        self.send(AbortReq(rid=rid))

    def send(self, message: Any, rank: int = 0) -> None:
        """Send what the tokenizer process would."""
        from sglang.srt.managers.io_struct import sock_send

        sock_send(self._inputs[rank], message)

    def take(self, timeout_s: float) -> bool:
        """Take the answers that come within ``timeout_s`` or at once after it. Whether there were any."""
        from sglang.srt.managers.io_struct import sock_recv

        some = False
        while self._answers.poll(0 if some else int(timeout_s * 1e3)):
            output = sock_recv(self._answers)
            if not hasattr(output, "finished_reasons"):
                continue  # the end of something that was asked of the server, not of a request
            logprobs = output.output_token_logprobs_val or [None] * len(output.rids)
            for rid, ids, values, reason in zip(
                output.rids, output.output_ids, logprobs, output.finished_reasons, strict=True
            ):
                aborted = reason is not None and reason.get("type") == "abort"
                self.reasons[rid] = reason or {}
                self.tokens[rid] = None if aborted or not ids else ids[0]
                if values:
                    self.logprobs[rid] = float(values[0])
            some = True
        return some

    def finish(self, rids: Sequence[str], silence_s: float = 180.0) -> None:
        """Wait until all of ``rids`` are answered; an AssertionError when nothing comes for ``silence_s``."""
        while missing := [rid for rid in rids if rid not in self.tokens]:
            deadline_s = time.monotonic() + silence_s
            while not self.take(0.5):
                assert all(process.is_alive() for process in self.processes), self.log.read_text()
                assert time.monotonic() < deadline_s, f"no answer for {silence_s:g} s; {len(missing)} are missing"

    def compare(
        self,
        comparison: Comparison,
        prompts: Mapping[str, Sequence[int]],
        patterns: Mapping[str, str] | None = None,
    ) -> None:
        """Compare the answers to all ``prompts`` (by their ids, as ``patterns``, which some had to match), and the KV
        cache that each rank handed over for them.
        """
        for rid, tokens in prompts.items():
            token = self.tokens[rid]
            answer = [] if token is None else [token]
            logprobs = [self.logprobs[rid]] if answer and rid in self.logprobs else None
            comparison.answer(rid, tokens, answer, logprobs, (patterns or {}).get(rid))
            parts = [self._take_kv(rank, rid, len(tokens)) for rank in self.ranks_of(rid)]
            comparison.kv_of_ranks(rid, tokens, parts)
        comparison.assert_same_with_logprobs()

    def ranks_of(self, rid: str) -> Iterable[int]:
        """The ranks that compute ``rid``."""
        return range(len(self.processes))

    def _take_kv(self, rank: int, rid: str, tokens: int, timeout_s: float = 30.0) -> Kv:
        """What ``rank`` handed over for ``rid``: in one part, or more when a prefix was cached."""
        deadline_s = time.monotonic() + timeout_s
        whole: Kv | None = None
        while whole is None or whole.keys.shape[1] < tokens:
            path = _kv_path(str(self.log), rank, rid, 0 if whole is None else whole.keys.shape[1])
            if path.exists():
                part = torch.load(path, weights_only=False)
                whole = part if whole is None else whole + part
                path.unlink()
            else:
                assert time.monotonic() < deadline_s, f"rank {rank} has not handed over the KV cache of {rid}"
                time.sleep(0.005)
        return whole

    def preemptions(self, timeout_s: float = 30.0) -> int:
        """Suspensions so far, from the event log, which is written when there is nothing to run."""
        answered = {rid for rid, token in self.tokens.items() if token is not None}
        deadline_s = time.monotonic() + timeout_s
        while True:
            events = list(read_events(self.event_log))
            if answered <= {rid for event in events if event.kind == "complete" for rid in event.rids}:
                return sum(event.kind == "suspend" for event in events)
            assert time.monotonic() < deadline_s, "the event log does not have all that was answered"
            time.sleep(0.1)

    def notes(self, what: str, rank: int) -> list[dict[str, Any]]:
        """Lines of ``what`` happened at ``rank``, in its order: what ``tests.rank_notes.noting`` has written there."""
        return [json.loads(line) for line in notes_path(self.event_log, what, rank).read_text().splitlines()]

    def _bind(self, kind: int, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set_hwm(0)
        socket.bind(address)
        return socket


def run_rank(
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
    from sglang.srt.runtime_context import get_disagg

    load_plugins()
    measure_for(FIRST_START_S)
    from sgl_flowprefill.runtime import setup
    from sgl_flowprefill.runtime.scheduler import FlowPrefillScheduler

    if late is not None:
        os.environ["FLOWPREFILL_MAX_BATCH_TOKENS"] = "1"  # a task for each request
        setup.make_device = lambda device_type, lookahead: LateDevice(lookahead, rank, late)
    init = FlowPrefillScheduler.__init__

    def with_chaos(scheduler: Any, *arguments: Any) -> None:
        get_disagg()._set("disaggregation_transfer_backend", "fake")
        init(scheduler, *arguments)
        keep_prefixes(scheduler)
        if chaos is not None and rank == 0:
            _unleash(scheduler, chaos)
        _keep_kv(scheduler, log, rank)
        if late is not None:
            note_finishes(scheduler, rank)
        if prepare is not None:
            prepare(scheduler, rank)

    FlowPrefillScheduler.__init__ = with_chaos  # type: ignore[method-assign]
    run_scheduler_process(args, ports, rank, rank, 0, dp_rank, pipe)


def become_rank(args: Any, event_log: str, log: str) -> None:
    """Let this process be that of a rank: its output, its environment, its one thread."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    bind = "|".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0)) * args.tp_size)
    os.environ |= {
        "FLOWPREFILL": "1",
        "FLOWPREFILL_EVENT_LOG": event_log,
        "FLOWPREFILL_MAX_SUSPENDED": "100",
        "SGLANG_CPU_OMP_THREADS_BIND": bind,
    }
    torch.set_num_threads(1)
    compile_nothing()


def _unleash(scheduler: Any, chaos: Chaos) -> None:
    from tests.chaos import chaos as unleash

    unleash(SimpleNamespace(scheduler=scheduler), chaos.seed, chaos.switch_probability)
    agree_on_interruptions(scheduler)


def agree_on_interruptions(scheduler: Any) -> None:
    """What interrupts tasks of this rank, the first, by chance now, interrupts those of the others."""
    from sgl_flowprefill.runtime.agreement import Agreement

    agreement, executor = scheduler.hub.agreement, scheduler.hub.executor
    if isinstance(agreement, Agreement):
        switch, pending = executor.interrupted, agreement.side.pending
        agreement.side.pending = lambda: switch() or pending()
        executor.interrupted, executor.ends_waiting = agreement.interrupted, agreement.ends_waiting


def _keep_kv(scheduler: Any, log: str, rank: int) -> None:
    """Write what is handed over of each request to files, one for each part; whoever wants it removes them."""
    written: dict[str, int] = {}

    def write(rid: str, kv: Kv) -> None:
        first = written.get(rid, 0)
        written[rid] = first + kv.keys.shape[1]
        path = _kv_path(log, rank, rid, first)
        torch.save(kv, path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)

    watch_kv(scheduler, write)


def _kv_path(log: str, rank: int, rid: str, first_token: int) -> Path:
    return Path(log).with_name(f"kv-{rank}-{rid}-{first_token}.pt")
