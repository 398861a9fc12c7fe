"""What the phases ask of a prefill server's engine: forward passes alone, in company and suspended, and their times.

All that asks the hub and its scheduler is here and in ``runtime.selfcheck.Tasks``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.hub.device import QueueDevice
from sgl_flowprefill.hub.task import PrefillTask
from sgl_flowprefill.profiling.file import Setting
from sgl_flowprefill.runtime.checkpoints import find_decoder_layers
from sgl_flowprefill.runtime.profile import current_setting, load_or_measure
from sgl_flowprefill.runtime.selfcheck import Finding, Tasks, checks
from sgl_flowprefill.runtime.tiles import WHOLE, Tiles, TileSizes, find_norms, plan_tiles


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


class Engine(Tasks):
    """An idle scheduler, on the stream on which it would serve."""

    @property
    def on_card(self) -> bool:
        return bool(self.scheduler.device == "cuda")

    @property
    def setting(self) -> Setting:
        return current_setting(self.scheduler)

    @property
    def layers(self) -> int:
        return int(self.scheduler.model_config.num_hidden_layers)

    @property
    def max_blocking_s(self) -> float:
        return FlowPrefillConfig.from_env().max_blocking_ms * 1e-3

    @property
    def default_lookahead(self) -> int:
        return FlowPrefillConfig.from_env().lookahead

    def describe(self) -> dict[str, Any]:
        """What serves, for the report and for the phases that start servers."""
        scheduler = self.scheduler
        runner = scheduler.tp_worker.model_runner
        weights = sum(weight.nbytes for weight in runner.model.parameters())
        pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
        return {
            **self.setting.model_dump(),
            "layers": self.layers,
            "context_tokens": int(scheduler.model_config.context_len),
            "weights_bytes": int(weights),
            "kv_tokens": int(scheduler.max_total_num_tokens),
            "kv_bytes_per_token": int(sum(pool.get_kv_size_bytes()) / scheduler.max_total_num_tokens),
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
        self._release(batch)
        return [First(token, row) for token, row in zip(tokens, logits, strict=True)]

    def nested(
        self, prompts: Sequence[Sequence[int]], rng: random.Random, probability: float
    ) -> tuple[list[First], int, int]:
        """Prompts that are suspended inside one another, at any interruption point with ``probability``; how often,
        and how many were live at a time at most.
        """
        suspensions = depth = 0
        with self.interrupted_by(lambda: rng.random() < probability):
            started = [self.start(list(prompt)) for prompt in prompts]
            live = list(started)
            while live:
                task = rng.choice(live)
                self.resume(task)
                depth = max(depth, sum(one.has_run and not one.done for one in started))
                if task.done:
                    live.remove(task)
                else:
                    suspensions += 1
            return [self.first(task) for task in started], suspensions, depth

    def points(self, prompt: Sequence[int]) -> int:
        """Interruption points of a prompt's forward pass."""
        with self.interrupted_by(lambda: False):
            task = self.start(list(prompt))
            self.resume(task)
            self.finish(task)
        return int(task.points)

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
        norms = find_norms(model, layers)
        return plan_tiles(max_blocking_s, len(layers), len(norms), ttft.model, operators)

    def _release(self, batch: Any) -> None:
        from sglang.srt.mem_cache.common import release_kv_cache

        for req in batch.reqs:
            release_kv_cache(req, self.scheduler.tree_cache, checkpoint=False)
