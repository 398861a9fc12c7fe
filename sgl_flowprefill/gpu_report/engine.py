"""What the phases ask of a server's engine: forward passes alone, in company and suspended, decode steps between their
operators, and the times of all these.

All that asks the hub and its scheduler is here and in ``runtime.selfcheck.Tasks``.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.hub.device import QueueDevice
from sgl_flowprefill.hub.task import PrefillTask
from sgl_flowprefill.profiling.file import Setting
from sgl_flowprefill.runtime.checkpoints import find_decoder_layers
from sgl_flowprefill.runtime.memory import TaskMemory
from sgl_flowprefill.runtime.profile import current_setting, load_or_measure
from sgl_flowprefill.runtime.selfcheck import Finding, Tasks, checks
from sgl_flowprefill.runtime.setup import kv_token_bytes
from sgl_flowprefill.runtime.step_profile import load_or_measure_steps
from sgl_flowprefill.runtime.tiles import WHOLE, TilePlan, Tiles, TileSizes, find_norms

WAITED: Final = "synchronizing CUDA operation"
"""In what PyTorch warns of while it looks for these."""


@dataclass(frozen=True)
class First:
    """The first token of a prompt, and the logits that it was chosen by."""

    token: int
    logits: torch.Tensor
    """[vocabulary], float32, on the host."""

    @property
    def margin(self) -> float:
        """By how much the largest logit leads."""
        first, second = self.logits.topk(2).values.tolist()
        return float(first - second)

    def difference(self, other: First) -> float:
        """Largest difference of a logit, over the standard deviation of all of them."""
        return float((self.logits - other.logits).abs().max() / self.logits.std())


@dataclass(frozen=True)
class Step:
    """A decode step; times by the monotonic clock."""

    due_s: float
    """When it had to begin."""
    begin_s: float
    end_s: float

    @property
    def time_s(self) -> float:
        return self.end_s - self.begin_s


@dataclass
class Decoded:
    """Streams from their first tokens to their last."""

    answers: list[list[int]] = field(default_factory=list)
    """Tokens of each stream."""
    steps: list[Step] = field(default_factory=list)
    firsts: list[First] = field(default_factory=list)
    """What each prefill beside them has found."""


class Held(NamedTuple):
    """Device memory of a prefill, and what is counted for it when tasks are admitted."""

    points: int
    """Interruption points at which it was suspended."""
    suspended_bytes: int
    counted_suspended_bytes: int
    running_bytes: int
    counted_running_bytes: int


class Engine(Tasks):
    """An idle scheduler, on the stream on which it would serve."""

    @property
    def setting(self) -> Setting:
        return current_setting(self.scheduler)

    @property
    def layers(self) -> int:
        return int(self.scheduler.model_config.num_hidden_layers)

    @property
    def default_lookahead(self) -> int:
        return FlowPrefillConfig.from_env().lookahead

    def describe(self) -> dict[str, Any]:
        """What serves, for the report and for the phases that start servers."""
        scheduler = self.scheduler
        runner = scheduler.tp_worker.model_runner
        weights = sum(weight.nbytes for weight in runner.model.parameters())
        return {
            **self.setting.model_dump(),
            "layers": self.layers,
            "context_tokens": int(scheduler.model_config.context_len),
            "weights_bytes": int(weights),
            "kv_tokens": int(scheduler.max_total_num_tokens),
            "kv_bytes_per_token": round(kv_token_bytes(runner)),
        }

    def findings(self) -> Iterator[Finding]:
        """The doctor's checks, one after the other."""
        return checks(self.hub)

    # ---- forward passes ---------------------------------------------------------------------------------------------

    def first(self, task: PrefillTask) -> First:
        """What a task that is done has found; the task is over."""
        logits = task.result.logits_output.next_token_logits[0].float().cpu()
        return First(self.finish(task), logits)

    def alone(self, prompt: Sequence[int]) -> First:
        """One prompt, never suspended."""
        with self.interrupted_by(lambda: False):
            task = self.start(list(prompt))
            self.resume(task)
            return self.first(task)

    def together(self, prompts: Sequence[Sequence[int]]) -> list[First]:
        """Prompts in one batch, as SGLang would compute them without FlowPrefill, too."""
        scheduler = self.scheduler
        reqs = [self._req(index, list(prompt)) for index, prompt in enumerate(prompts)]
        batch = self._role.make_batch(reqs)
        scheduler.waiting_queue = []
        with torch.no_grad():
            result = scheduler.run_batch(batch)
        logits, tokens = result.logits_output.next_token_logits.float().cpu(), result.next_token_ids.tolist()
        self.free(batch)
        return [First(token, row) for token, row in zip(tokens, logits, strict=True)]

    def nested(
        self, prompts: Sequence[Sequence[int]], rng: random.Random, probability: float
    ) -> tuple[list[First], int, int]:
        """``run_nested``, and what each of the prompts has found."""
        started, suspensions, depth = self.run_nested(list(map(list, prompts)), rng, probability)
        return [self.first(task) for task in started], suspensions, depth

    def points(self, prompt: Sequence[int]) -> int:
        """Interruption points of a prompt's forward pass."""
        with self.interrupted_by(lambda: False):
            task = self.start(list(prompt))
            self.resume(task)
            self.finish(task)
        return int(task.points_passed)

    def held(self, prompt: Sequence[int]) -> Held:
        """Device memory that a prompt's prefill takes beside KV cache and weights, suspended at each interruption
        point. What is allocated the host knows, however far the device has come.
        """
        task, most_bytes = self.start(list(prompt)), 0
        self.synchronize()
        before_bytes = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with self.interrupted_by(lambda: True):
            while not task.done:
                self.resume(task)
                if not task.done:
                    most_bytes = max(most_bytes, torch.cuda.memory_allocated() - before_bytes)
                    self.synchronize()
        peak_bytes = torch.cuda.max_memory_allocated() - before_bytes
        self.finish(task)
        memory = self.hub.work.memory
        assert isinstance(memory, TaskMemory)
        counted = memory.activations
        return Held(
            points=task.points_passed,
            suspended_bytes=most_bytes,
            counted_suspended_bytes=counted.suspended_bytes(len(prompt)),
            running_bytes=peak_bytes,
            counted_running_bytes=counted.running_bytes(len(prompt)),
        )

    def tries(self) -> dict[str, int]:
        """How often PyTorch found no memory at first, and none at all, since the process began."""
        stats = torch.cuda.memory_stats()
        return {name: int(stats.get(name, 0)) for name in ("num_alloc_retries", "num_ooms")}

    def waits(self, prompt: Sequence[int]) -> list[str]:
        """Where, in files and lines, the host waits for the device inside a prompt's forward pass, as far as PyTorch
        notices: each time, the queue runs dry.
        """
        self.points(prompt)  # what waits once does not count
        task = self.start(list(prompt))
        self.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found, self.interrupted_by(lambda: False):
                warnings.simplefilter("always")
                self.resume(task)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        self.finish(task)
        return [f"{one.filename}:{one.lineno}" for one in found if WAITED in str(one.message)]

    def device_s(self, prompt: Sequence[int], behind_spin: bool = False) -> float:
        """Device time of a prompt's forward pass, from its first layer on. ``behind_spin``: without preemption
        checkpoints, and with all of it queued before the device begins, so that it waits for no launch.
        """
        task = self.start(list(prompt))
        self.synchronize()
        with self.from_first_layer(behind_spin) as begin:
            if behind_spin:
                with torch.no_grad():
                    task.result = self.hub.forward(task.batch)
                end = self.hub.device.stamp()
            else:
                with self.interrupted_by(lambda: False):
                    self.resume(task)
                _, end = task.spans[-1]
        self.finish(task)
        return float(begin[0].seconds_until(end))

    # ---- decode steps, on a server that has them --------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        answer_tokens: int,
        beside: Sequence[int] = (),
        interrupted: Callable[[], bool] = lambda: False,
        tbt_slo_s: float | None = None,
        ahead: bool = False,
    ) -> Decoded:
        """``prompts`` become streams and get answers of so many tokens, by the hub's own decode steps.

        With a prompt ``beside`` them, that is prefilled again and again meanwhile. Whenever it is ``interrupted`` a
        step is queued, or the one that is in flight is waited for; without a prompt, step follows step, or is queued
        ``ahead`` of the tokens of the one before.
        """
        found = Decoded()
        reqs = [self._join(prompt, answer_tokens, tbt_slo_s) for prompt in prompts]
        task = None
        with self._steps_noted_in(found.steps), self.interrupted_by(interrupted):
            while not all(req.finished() for req in reqs):
                if beside:
                    task = task or self.start(list(beside))
                    self.resume(task)
                    if task.done:
                        found.firsts.append(self.first(task))
                        task = None
                        continue
                if self.hub.work.tasks.finishing and not ahead:
                    self.hub.finish_done()
                else:
                    self.hub.turn()
            self.hub.finish_done()
        if task is not None:
            with self.interrupted_by(lambda: False):
                self.resume(task)
            found.firsts.append(self.first(task))
        found.answers = [list(req.output_ids) for req in reqs]
        self.scheduler.flush_cache()  # the same prompts shall be computed again
        return found

    def step_is_due(self) -> bool:
        """Whether the next decode step has to begin, or the tokens of one have come."""
        return bool(self.hub.work.tasks.result_arrived() or time.monotonic() >= self.hub.role.policy.step_by_s)

    def step_costs(self) -> dict[str, float]:
        """What a server takes decode steps to cost, from steps that were measured when it started."""
        steps = load_or_measure_steps(self._role).model
        return {"fixed_s": steps.fixed_s, "per_request_s": steps.per_request_s, "per_token_s": steps.per_token_s}

    @property
    def has_steps_ahead(self) -> bool:
        """Whether decode steps are queued before the tokens of those in flight are there."""
        return self.hub.ahead is not None

    @property
    def has_decode_graphs(self) -> bool:
        """Whether decode steps run as CUDA graphs."""
        runner = self.scheduler.tp_worker.model_runner
        return runner.decode_cuda_graph_runner not in (None, runner.eager_runner)

    def _join(self, prompt: Sequence[int], answer_tokens: int, tbt_slo_s: float | None) -> Any:
        """Prefill ``prompt``; its request is a stream from now on."""
        with self.interrupted_by(lambda: False):
            task = self.start(list(prompt), answer_tokens, tbt_slo_s)
            self.resume(task)
        self.hub.slots.give_back(task.attn_backend)
        self._role.finish(task)
        return task.batch.reqs[0]

    @contextmanager
    def _steps_noted_in(self, steps: list[Step]) -> Iterator[None]:
        """Let ``steps`` have what the event recorder is told of each."""

        def note(
            streams: int, begin_s: float, end_s: float, due_s: float, took_s: float, tokens: int, late_tokens: int
        ) -> None:
            steps.append(Step(due_s, begin_s, end_s))

        recorder = self._role.recorder
        usual, recorder.stepped = recorder.stepped, note  # type: ignore[method-assign]
        try:
            yield
        finally:
            recorder.stepped = usual  # type: ignore[method-assign]

    # ---- settings ---------------------------------------------------------------------------------------------------

    @contextmanager
    def lookahead(self, operators: int) -> Iterator[None]:
        """Let the CPU run ahead of the device by so many operators."""
        device = self.hub.device
        assert isinstance(device, QueueDevice)
        usual, device.lookahead = device.lookahead, operators
        try:
            yield
        finally:
            device.lookahead = usual

    @property
    def tiles(self) -> Tiles:
        """How long operators are split, of tasks that start now."""
        return self._tile_sizes.now

    @property
    def _tile_sizes(self) -> TileSizes:
        sizes = self.hub.tiles
        assert isinstance(sizes, TileSizes)
        return sizes

    @contextmanager
    def in_tiles(self, tiles: Tiles) -> Iterator[None]:
        """Let tasks that start meanwhile run in these."""
        sizes = self._tile_sizes
        usual, sizes.now = sizes.now, tiles
        try:
            yield
        finally:
            sizes.now = usual

    def whole(self) -> Any:
        """Let operators of tasks that start meanwhile run whole, however long they take."""
        return self.in_tiles(WHOLE)

    def planned_tiles(self, max_blocking_s: float) -> Tiles:
        """The tiles that serving would use with this longest blocking time."""
        model = self.scheduler.tp_worker.model_runner.model
        ttft, operators = load_or_measure(self._role, FlowPrefillConfig.from_env())
        layers = find_decoder_layers(model)
        plan = TilePlan.of(model, layers, find_norms(model, layers), max_blocking_s, operators)
        return plan.tiles(ttft.yardstick_s)
