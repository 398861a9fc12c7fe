"""Real schedulers inside the test's process, driven turn by turn: real model, KV pool and radix cache.

``PrefillEngine`` is a prefill server's, which sends its KV nowhere: requests carry SGLang's fake bootstrap host, which
completes a handshake and a transfer at once, as SGLang's own warm-up and health-check requests do; unlike those, they
leave their KV in the radix cache. One process can hold one scheduler.
"""

from __future__ import annotations

import ctypes
import os
import pkgutil
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

M_TRIM_THRESHOLD: Final = -1
M_TOP_PAD: Final = -2
M_MMAP_MAX: Final = -4
"""Parameters of glibc's mallopt (malloc.h)."""
FIRST_START_S: Final = 3.0
"""How long models that tests alone serve are measured: what they are predicted to take says little of their tests."""
FIRST_STEPS: Final = ((1, 64), (4, 64), (16, 64), (1, 1024), (4, 256))
"""Their decode steps that are measured, as the server's own ``SHAPES`` of these."""


@dataclass
class Answer:
    """What a request got: its first token, and log probabilities where it asked for them."""

    token: int | None
    logprob: float | None
    input_logprobs: list[float] | None
    aborted: bool
    req: Any = field(repr=False)


class Unfinished(AssertionError):
    """Requests that have no answer."""


def tokenized_request(
    rid: str,
    prompt: Sequence[int],
    sampling: Mapping[str, Any],
    *,
    logprobs: bool = True,
    inputs_from: int | None = None,
    tokenizer: Any = None,
    **address: Any,
) -> Any:
    """What the tokenizer process sends to the scheduler; greedy, if ``sampling`` does not say otherwise.

    ``inputs_from``: log probabilities of the prompt's tokens behind this place are asked for, too.
    """
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.observability.req_time_stats import APIServerReqTimeStats
    from sglang.srt.sampling.sampling_params import SamplingParams

    sampling_params = SamplingParams(**({"temperature": 0.0} | dict(sampling)))
    sampling_params.normalize(tokenizer)
    recv = TokenizedGenerateReqInput(
        rid=rid,
        input_text="",
        input_ids=array("q", prompt),
        input_embeds=None,
        mm_inputs=None,
        sampling_params=sampling_params,
        return_logprob=logprobs or inputs_from is not None,
        logprob_start_len=-1 if inputs_from is None else inputs_from,
        top_logprobs_num=0,
        token_ids_logprob=None,
        token_type_ids=None,
        stream=True,
        **address,
    )
    recv.time_stats = APIServerReqTimeStats()
    recv.time_stats.flowprefill_received_s = recv.time_stats.flowprefill_sent_s = time.monotonic()
    return recv


def generate_request(
    rid: str,
    prompt: Sequence[int],
    room: int,
    ttft_slo_s: float | None = None,
    logprobs: bool = False,
    inputs_from: int | None = None,
    **fields: Any,
) -> Any:
    """What the tokenizer process of a prefill server sends to its scheduler for a greedy request."""
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

    custom_params = None if ttft_slo_s is None else {"ttft_slo": ttft_slo_s}
    return tokenized_request(
        rid,
        prompt,
        {"max_new_tokens": 4, "custom_params": custom_params},
        logprobs=logprobs,
        inputs_from=inputs_from,
        bootstrap_host=FAKE_BOOTSTRAP_HOST,
        bootstrap_room=room,
        **fields,
    )


def keep_prefixes(scheduler: Any) -> None:
    """Let the prompts of requests whose transfer is a fake become cached prefixes, as those of others do."""
    add = scheduler._add_request_to_queue

    def add_cached(req: Any, *arguments: Any, **options: Any) -> None:
        req.skip_radix_cache_insert = False
        add(req, *arguments, **options)

    scheduler._add_request_to_queue = add_cached


def keep_freed_memory() -> None:
    """Let this process reuse what it frees, as its environment lets a server (``cluster.commands``): what comes from
    the system is cleared page by page, in the middle of an operator.
    """
    glibc = ctypes.CDLL(None)
    for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, (1 << 31) - 1), (M_TOP_PAD, 64 << 20)):
        assert glibc.mallopt(parameter, value) == 1


def compile_nothing() -> None:
    """Let this process run as Python what SGLang compiles: a compiler takes longer than most tests, and servers are
    tested with what it makes.
    """
    torch.compiler.set_stance("force_eager")


def measure_for(first_start_s: float) -> None:
    """Let a server that is made in this process, and finds no profile, measure one within that time, and few steps."""
    from sgl_flowprefill.runtime import profile, step_profile

    profile.FIRST_START_S = first_start_s  # type: ignore[misc]
    step_profile.SHAPES = FIRST_STEPS  # type: ignore[misc,assignment]


def make_scheduler(scheduler: str, model_path: str, first_start_s: float | None = None, **server_args: Any) -> Any:
    """The scheduler of that dotted name, as in a process that SGLang spawns for it.

    ``first_start_s``: how long it measures where no profile is cached, for models that tests alone serve.
    """
    os.environ["SGLANG_EAGER_INPUT_NO_COPY"] = "1"
    # What tests do to an engine is nothing that servers should know of it from then on.
    os.environ.setdefault("FLOWPREFILL_LEARNING", "false")
    os.environ.setdefault("FLOWPREFILL_MAX_BATCH_TOKENS", "2048")  # whatever the profile of a busy machine says of it
    torch.set_num_threads(1)
    compile_nothing()
    import sglang.srt.managers.scheduler  # noqa: F401 - what tells the plugin that this process runs one
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import SpawnRanks, get_disagg, publish
    from sglang.srt.server_args import PortArgs, ServerArgs

    from sgl_flowprefill.patches import before_0_5_23, request_times, wakeups

    before_0_5_23.apply()
    request_times.apply()
    wakeups.apply()
    load_plugins()
    if first_start_s is not None:
        measure_for(first_start_s)
    settings: dict[str, Any] = {
        "disable_overlap_schedule": True,
        "chunked_prefill_size": -1,
        "max_total_tokens": 60_000,
        "mem_fraction_static": 0.9,  # what others take while weights are loaded is no reason not to start
        "log_level": "warning",
    }
    args = ServerArgs(model_path=model_path, **(settings | server_args))
    args.resolve_once()
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    if args.disaggregation_mode == "prefill":
        get_disagg()._set("disaggregation_transfer_backend", "fake")
    return pkgutil.resolve_name(scheduler)(args, PortArgs.init_new(args))


class Engine(ABC):
    """Drives a scheduler turn by turn, in place of its event loop, and takes what it would send to the clients."""

    def __init__(self, scheduler: str, model_path: str, **server_args: Any) -> None:
        self.scheduler = make_scheduler(scheduler, model_path, **server_args)
        from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

        # Other components hold the streamer as well, so it stays the same object; what SGLang's would send comes here.
        streamer = self.scheduler.output_streamer
        record = {"stream_output": lambda _, reqs, return_logprob, skip_req=None: self.record_outputs(reqs)}
        to_here = type("ToHere", (SchedulerOutputStreamer,), record)
        streamer.__class__ = type("Streamer", (type(streamer), to_here), {})

    @property
    def hub(self) -> Any:
        return self.scheduler.hub

    def use(self, device: Any) -> None:
        """Let kernels run on ``device`` from now on; what was queued on the one before has run."""
        hub = self.hub
        hub.device.wait(hub.device.stamp(), lambda: False)
        hub.device = hub.executor.device = hub.role.device = device

    @abstractmethod
    def record_outputs(self, reqs: Sequence[Any]) -> None:
        """Called in place of SGLang's ``stream_output``, with ``reqs`` that have got tokens or an end."""

    def record(self, recorder: Any) -> None:
        """Tell ``recorder`` what happens from now on."""
        hub = self.hub
        hub.recorder = hub.role.recorder = self.scheduler.output_streamer.recorder = recorder

    def abort(self, rid: str) -> None:
        """What the tokenizer process sends when a client disconnects."""
        from sglang.srt.managers.io_struct import AbortReq

        self.receive(AbortReq(rid=rid))

    @torch.no_grad()
    def receive(self, *messages: Any) -> None:
        """Hand the scheduler what came over its socket."""
        self.scheduler.process_input_requests(list(messages))

    @torch.no_grad()
    def turn(self) -> bool:
        """One round of the event loop, without the sleep. Whether anything could run."""
        return bool(self.hub.turn())

    def run(self, limit: int = 200_000) -> None:
        """Go on until nothing is left to do."""
        for _ in range(limit):
            if not self.turn() and self.scheduler.is_fully_idle():
                return
        raise Unfinished(f"still not idle after {limit} turns")

    def abandon(self) -> None:
        """End what a test has left behind that has failed: the next one finds nothing of it."""
        from sglang.srt.managers.io_struct import AbortReq

        self.receive(AbortReq(rid="", abort_all=True))
        self.run()
        self.scheduler.flush_cache()

    def assert_clean(self) -> None:
        """SGLang's own idle checks pass (KV pool, request rows, radix tree), and everything can be flushed."""
        scheduler = self.scheduler
        assert scheduler.is_fully_idle()
        scheduler.on_idle()
        assert scheduler.flush_cache()
        assert scheduler.token_to_kv_pool_allocator.available_size() == scheduler.max_total_num_tokens
        assert scheduler.req_to_token_pool.available_size() == scheduler.req_to_token_pool.size


def raise_assertions(role: Any) -> None:
    """Let a test's own assertion, raised within a forward pass, end the test: ``role`` drops no task for it."""
    drop = role.drop

    def drop_or_raise(task: Any) -> None:
        failure = task.failure
        assert failure is None or failure.kind != "AssertionError", failure.traceback
        drop(task)

    role.drop = drop_or_raise


class PrefillEngine(Engine):
    """A prefill server's scheduler, and the first tokens that it computes."""

    def __init__(self, model_path: str, **server_args: Any) -> None:
        super().__init__(
            "sgl_flowprefill.runtime.scheduler:FlowPrefillScheduler",
            model_path,
            disaggregation_mode="prefill",
            disaggregation_transfer_backend="nixl",
            **server_args,
        )
        self.answers: dict[str, Answer] = {}
        self.batch_sizes: list[int] = []
        """Requests of every forward pass."""
        raise_assertions(self.scheduler.role)
        keep_prefixes(self.scheduler)
        run_batch = self.scheduler.run_batch

        def counted(batch: Any, *arguments: Any, **options: Any) -> Any:
            self.batch_sizes.append(len(batch.reqs))
            return run_batch(batch, *arguments, **options)

        self.scheduler.run_batch = counted

    def submit(
        self,
        rid: str,
        prompt: Sequence[int],
        ttft_slo_s: float | None = None,
        logprobs: bool = False,
        inputs_from: int | None = None,
    ) -> None:
        """Hand a request to the scheduler as the tokenizer process would."""
        self.receive(generate_request(rid, prompt, len(self.answers), ttft_slo_s, logprobs, inputs_from))

    def assert_clean(self) -> None:
        super().assert_clean()
        metadata = self.scheduler.req_to_metadata_buffer_idx_allocator
        assert metadata.available_size() == metadata.size

    def record_outputs(self, reqs: Sequence[Any]) -> None:
        for req in reqs:
            outputs = list(req.output_ids)
            values = req.logprob.output_token_logprobs_val if req.return_logprob else None
            inputs = req.logprob.input_token_logprobs_val if req.return_logprob else None
            self.answers[req.rid] = Answer(
                token=outputs[0] if outputs else None,
                logprob=float(values[0]) if values else None,
                input_logprobs=list(inputs) if inputs else None,
                aborted=type(req.finished_reason).__name__ == "FINISH_ABORT",
                req=req,
            )
