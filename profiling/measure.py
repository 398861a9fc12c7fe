"""Measuring forward passes of a real engine, in its scheduler's process."""

from __future__ import annotations

import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.sampling.sampling_params import SamplingParams

from sgl_flowprefill.hub.device import Stamp
from sgl_flowprefill.profiling.design import SEED, Shape
from sgl_flowprefill.profiling.run import Timing
from sgl_flowprefill.runtime.checkpoints import find_decoder_layers
from sgl_flowprefill.runtime.draft_model import whole_model
from sgl_flowprefill.runtime.scheduler_role import SchedulerRole
from sgl_flowprefill.slo import TBT_KEY
from sgl_flowprefill.ttft.base import PrefillShape

LAUNCH_S: Final = 1e-3
"""The host needs no longer to launch the kernels of a layer."""
CYCLES_A_SECOND: Final = 3e9
"""No GPU runs faster: with so many a spin takes a second, or longer."""
SCHEDSTAT: Final = Path("/proc/thread-self/schedstat")

Forward = Callable[..., Any]


class SchedulerEngine:
    """Runs batches of given shapes through an idle scheduler, as serving does, and times their forward passes."""

    def __init__(self, role: SchedulerRole, most_tokens: int = sys.maxsize) -> None:
        """``most_tokens``: of a prompt, for which there is device memory."""
        self._role = role
        self._most_tokens = most_tokens
        self.scheduler = role.scheduler
        self._rng = np.random.default_rng(SEED)
        self.cached_prompt: list[int] = []

    @property
    def limit_tokens(self) -> int:
        """Longest prompt that fits the model's context and memory, with KV cache left for a cached prompt of the same
        length.
        """
        scheduler = self.scheduler
        kv_tokens = scheduler.max_total_num_tokens // 2 - 64
        of_context = min(scheduler.model_config.context_len, scheduler.max_req_input_len) - 1
        return int(min(of_context, kv_tokens, self._most_tokens))

    @property
    def is_gpu(self) -> bool:
        return bool(self.scheduler.device == "cuda")

    def cache_prefix(self, tokens: int) -> None:
        """Leave the KV of one prompt of ``tokens`` in the radix cache: any part of it can be a cached prefix."""
        self.scheduler.flush_cache()
        self.cached_prompt = self._random_ids(tokens)
        self._forward([self.cached_prompt], keep=True)

    def time(self, shape: Shape) -> Timing:
        """Run one batch of ``shape``."""
        return self._forward(self._prompts(shape))

    def time_operators(self, shape: Shape) -> tuple[Timing, float, float]:
        """Like ``time``, and the seconds spent in all attention and in all MLP modules. On a GPU the device's own, from
        the first layer on, however long it takes the host to launch what runs.
        """
        model = whole_model(self.scheduler)
        layers = find_decoder_layers(model)
        attention = [model.get_submodule(name) for layer in layers for name in layer.attention]
        mlp = [model.get_submodule(name) for layer in layers for name in layer.mlp]
        with (
            self.from_first_layer(behind_spin=True) as begin,
            self._spans(attention) as of_attention,
            self._spans(mlp) as of_mlp,
        ):
            timing, end = self._run(self._prompts(shape))
        if self.is_gpu:
            timing = timing._replace(time_s=begin[0].seconds_until(end), waited_s=0.0)
        return timing, _sum_s(of_attention), _sum_s(of_mlp)

    @contextmanager
    def from_first_layer(self, behind_spin: bool) -> Iterator[list[Stamp]]:
        """Where the first decoder layer of the next forward pass begins in the device's queue. On a GPU,
        ``behind_spin``, the device spins before it for as long as the host needs to queue the rest, and then waits for
        no launch. What is before that layer, the plan of its attention above all, may read back from the device.
        """
        model = whole_model(self.scheduler)
        layers = find_decoder_layers(model)
        begin: list[Stamp] = []

        def noted(forward: Forward) -> Forward:
            @wraps(forward)
            def layer(*args: Any, **kwargs: Any) -> Any:
                if behind_spin and self.is_gpu and not begin:
                    torch.cuda._sleep(int(LAUNCH_S * len(layers) * CYCLES_A_SECOND))
                begin.append(self._role.device.stamp())
                return forward(*args, **kwargs)

            return layer

        with _wrapped([model.get_submodule(layers[0].name)], noted):
            yield begin

    def time_steps(self, requests: int, tokens: int, steps: int) -> tuple[int, list[float]]:
        """Seconds of each of ``steps`` decode steps over ``requests`` prompts of so many ``tokens``, or over as many of
        them as one prefill takes, and how many these are.
        """
        batch = self._batch([self._random_ids(tokens) for _ in range(requests)])
        times_s = []
        with torch.no_grad():
            found = self.scheduler.run_batch(batch).next_token_ids.tolist()
            for _ in range(steps):
                for req, token in zip(batch.reqs, found, strict=True):
                    req.output_ids.append(token)
                started_s = time.perf_counter()
                batch.prepare_for_decode()
                batch = self._role.as_part(batch)
                found = self.scheduler.run_batch(batch).next_token_ids.tolist()
                times_s.append(time.perf_counter() - started_s)
        self.free(batch)
        return len(batch.reqs), times_s

    # ---- batches that others run ------------------------------------------------------------------------------------

    def can_run(self) -> bool:
        """Whether the server is not paused, and has its weights, as they are served, and KV cache in memory."""
        updater = self.scheduler.weight_updater
        return not self._role.is_paused and not updater.offload_tags and updater._session is None

    def find_prefix(self, interrupted: Callable[[], bool] = lambda: False) -> int:
        """Begin prompts with the prompt of a recent task from now on, with that of which most is cached; how many of
        its tokens are. What host memory has does not count: to load it back may evict others. Nor does an image, and
        what is behind it. No prompt is looked at after ``interrupted()``.
        """
        self.cached_prompt, cached_tokens = [], 0
        for prompt in self._role.recent_prompts:
            if interrupted():
                break
            text = self._text(prompt)
            if not text:
                continue
            req = self._req(0, text)
            self._role.match(req)
            found_tokens = int(req.prefix_len)
            if found_tokens > cached_tokens:
                self.cached_prompt, cached_tokens = text[:found_tokens], found_tokens
        return cached_tokens

    def has_room(self, requests: int, new_tokens: int) -> bool:
        """Whether there is free KV cache for so many requests with so many ``new_tokens``, without any eviction."""
        scheduler = self.scheduler
        free_tokens = int(scheduler.token_to_kv_pool_allocator.available_size())
        ends_tokens = requests * (1 + int(scheduler.page_size))  # the answer's, and what is left of a page
        return new_tokens + ends_tokens <= free_tokens and requests <= scheduler.req_to_token_pool.available_size()

    def make_batch(self, shape: Shape) -> Any | None:
        """SGLang's batch of ``shape``, of as many of its requests as one prefill takes; None if there is none."""
        return self._admit(self._prompts(shape))

    def shapes(self, batch: Any) -> list[PrefillShape]:
        """What ``batch`` computes: SGLang may have admitted fewer requests, and found another cached prefix."""
        return self._role.shapes(batch)

    def free(self, batch: Any, keep: bool = False) -> None:
        """Free what ``batch`` holds, or leave what has been computed in the radix cache."""
        for req in batch.reqs:
            release_kv_cache(req, self.scheduler.tree_cache, checkpoint=keep)

    # ---- the rest ---------------------------------------------------------------------------------------------------

    def _random_ids(self, tokens: int) -> list[int]:
        ids: list[int] = self._rng.integers(self.scheduler.model_config.vocab_size, size=tokens).tolist()
        return ids

    def _text(self, prompt: Sequence[int]) -> list[int]:
        """``prompt`` up to the first id that is no token: SGLang puts hashes in the places of images. Of a prefix less
        may be matched than has been cached, whole pages for example, and the rest of it is computed as text.
        """
        is_token = np.asarray(prompt) < self.scheduler.model_config.vocab_size
        return list(prompt if is_token.all() else prompt[: int(is_token.argmin())])

    def _prompts(self, shape: Shape) -> list[list[int]]:
        return [self.cached_prompt[: request.cached_tokens] + self._random_ids(request.new_tokens) for request in shape]

    def _forward(self, prompts: Sequence[list[int]], keep: bool = False) -> Timing:
        timing, _ = self._run(prompts, keep)
        return timing

    def _run(self, prompts: Sequence[list[int]], keep: bool = False) -> tuple[Timing, Stamp]:
        """Also where the forward pass ends in the device's queue."""
        batch = self._batch(prompts)
        shape = tuple(self.shapes(batch))
        self.synchronize()
        waited_s, started_s = _waited_s(), time.perf_counter()
        with torch.no_grad():
            result = self.scheduler.run_batch(batch)
            end = self._role.device.stamp()
            if result.copy_done is not None:  # with a draft model, SGLang has queued the copy to the host
                result.copy_done.synchronize()
            result.next_token_ids.tolist()
        elapsed_s, waited_s = time.perf_counter() - started_s, _waited_s() - waited_s
        self.free(batch, keep)
        return Timing(shape, elapsed_s, min(waited_s, elapsed_s)), end

    def _batch(self, prompts: Sequence[list[int]]) -> Any:
        """SGLang's batch of ``prompts``, of as many of them as one prefill takes."""
        batch = self._admit(prompts)
        assert batch is not None, "an idle server has KV cache for what is measured"
        return batch

    def _admit(self, prompts: Sequence[list[int]]) -> Any | None:
        batch = self._role.make_batch([self._req(index, prompt) for index, prompt in enumerate(prompts)])
        self.scheduler.waiting_queue = []
        return batch

    def _req(self, index: int, prompt: list[int], answer_tokens: int = 1, tbt_slo_s: float | None = None) -> Any:
        """SGLang's request for ``prompt`` and an answer of exactly so many tokens, with an objective between two of
        them or the server's default.
        """
        sampling = SamplingParams(
            temperature=0,
            max_new_tokens=answer_tokens,
            ignore_eos=True,
            custom_params=None if tbt_slo_s is None else {TBT_KEY: tbt_slo_s},
        )
        sampling.normalize(None)
        vocabulary = self.scheduler.model_config.vocab_size
        req = Req(f"flowprefill-profile-{index}", "", array("q", prompt), sampling, vocab_size=vocabulary)
        req.logprob_start_len = -1  # of no token of the prompt
        req.start_send_idx = len(prompt)  # nobody is there to whom a cached prefix could be sent early
        return req

    @contextmanager
    def _spans(self, modules: Sequence[torch.nn.Module]) -> Iterator[list[tuple[Stamp, Stamp]]]:
        """Where ``modules`` run in the device's queue while the context is open. They do not run inside one another."""
        spans: list[tuple[Stamp, Stamp]] = []
        device = self._role.device

        def spanned(forward: Forward) -> Forward:
            @wraps(forward)
            def operator(*args: Any, **kwargs: Any) -> Any:
                begin = device.stamp()
                output = forward(*args, **kwargs)
                spans.append((begin, device.stamp()))
                return output

            return operator

        with _wrapped(modules, spanned):
            yield spans

    def synchronize(self) -> None:
        """Wait for all that is queued on the device."""
        if self.is_gpu:
            torch.cuda.synchronize()


@contextmanager
def _wrapped(modules: Sequence[torch.nn.Module], wrap: Callable[[Forward], Forward]) -> Iterator[None]:
    """Let what ``wrap`` makes of it take the place of each module's ``forward`` while the context is open: SGLang calls
    some by it, which runs no hooks (``checkpoints.install_checkpoints``).
    """
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = wrap(module.forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


def _sum_s(spans: Sequence[tuple[Stamp, Stamp]]) -> float:
    return sum(begin.seconds_until(end) for begin, end in spans)


def _waited_s() -> float:
    """Seconds for which this thread has waited for a CPU so far (Linux: run-queue delay); 0 where nobody counts it."""
    try:
        return int(SCHEDSTAT.read_text().split()[1]) * 1e-9
    except (OSError, IndexError, ValueError):
        return 0.0
