"""SGLang's own scheduler on a server that prefills and decodes: prefill first, mixed chunks, or steps in between."""

from __future__ import annotations

import math

from sgl_flowprefill.bench.simulator.instance import Machine
from sgl_flowprefill.bench.simulator.step_cost import StepCost
from sgl_flowprefill.bench.simulator.stock import StockInstance
from sgl_flowprefill.bench.simulator.streams import FIRST_RATIO, OutputKv, RunningStreams, StepTimes
from sgl_flowprefill.ttft import PrefillShape


class StockUnifiedInstance(StockInstance):
    """One forward after the other. A forward of prompts goes before a decode step whenever one can be made.

    With ``mixed``, streams get a token in each forward of prompts, which has as many new tokens less
    (``--enable-mixed-chunk``). With ``interval``, as many decode steps follow each forward of prompts
    (``--prefill-decode-interval``). Streams are retracted where KV cache is short for a step.
    """

    kv: OutputKv

    def __init__(
        self,
        machine: Machine,
        order: str,
        chunk_tokens: int | None,
        step_cost: StepCost,
        *,
        mixed: bool = False,
        interval: int = 0,
        step_error: float = 0.0,
    ) -> None:
        super().__init__(machine, order, chunk_tokens, OutputKv(machine))
        self.streams = RunningStreams(self.kv)
        self.step_times = StepTimes(step_cost, step_error, machine.slowdown)
        self._step_cost = step_cost
        self._mixed = mixed
        self._interval = interval
        self._steps_to_go = 0
        """Decode steps until a forward of prompts may run again."""
        self._decodes = False
        """Whether streams get a token at the end of the forward that runs."""

    def step(self) -> None:
        now_s = self.next_s
        if self._decodes:
            self.streams.step(now_s)
        if self._finishing:
            self.kv.first_tokens(self._finishing, now_s)
            for request in self._finishing:
                self.streams.join(request, now_s)
            self.completed.extend(request for request in self._finishing if request.came_tokens == 1)
            self._finishing = []
        self._forward(now_s)

    def _forward(self, now_s: float) -> None:
        if self._mixed:
            self._retract()
        shapes = self._prompts(now_s)
        if shapes:
            self._steps_to_go = self._interval
            self._decodes = self._mixed and len(self.streams) > 0
            self.next_s = self._slowdown.end_s(now_s, self._forward_s(shapes))
        else:
            self._retract()
            self._decodes = len(self.streams) > 0
            if self._decodes:
                self.next_s = self.step_times.end_s(now_s, len(self.streams), self.streams.context_tokens)
            else:
                self.kv.ratio = FIRST_RATIO
                shapes = self._next_batch(now_s)  # what the ratio or the interval had kept out
                self.next_s = self._slowdown.end_s(now_s, self._forward_s(shapes)) if shapes else math.inf
        self._busy = self.next_s < math.inf

    def _prompts(self, now_s: float) -> list[PrefillShape]:
        if self._steps_to_go and len(self.streams):
            self._steps_to_go -= 1
            return []
        self.kv.reserved_tokens = len(self.streams) if self._mixed else 0
        return self._next_batch(now_s, self.kv.reserved_tokens)

    def _forward_s(self, shapes: list[PrefillShape]) -> float:
        if not self._decodes:
            return self._cost.predict_s(shapes)
        steps = self._step_cost
        context_s = steps.per_context_s * self.streams.context_tokens
        return self._cost.mixed_s(shapes, len(self.streams), steps.per_request_s) + context_s

    def _retract(self) -> None:
        """Retract streams until the next tokens have KV cache."""
        while len(self.streams) > self.kv.free_tokens:
            self._enqueue(self.streams.retract())
