"""Streams of a unified instance: their KV cache, who gets a token in a step, and when each token came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final

import numpy as np

from sgl_flowprefill.bench.simulator.instance import STEADY, KvCache, Machine, Slowdown
from sgl_flowprefill.bench.simulator.requests import SimRequest
from sgl_flowprefill.bench.simulator.step_cost import StepCost
from sgl_flowprefill.ttft import PrefillShape

CLIPPED_TOKENS: Final = 4096
"""SGLang's SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION: of an answer, admission reserves no more."""
FIRST_RATIO: Final = 0.7
LEAST_RATIO: Final = 0.7 * 0.14
RATIO_STEPS: Final = 600
"""SGLang's new-token ratio: which share of the tokens that answers may still have is reserved, and how it falls."""
RETRACT_STEPS: Final = 20
"""SGLang's SGLANG_RETRACT_DECODE_STEPS: tokens of each stream that are counted in after a retraction."""


class OutputKv(KvCache):
    """KV cache of an instance that decodes: a request holds its prompt, and each token of its answer once it has come.

    Admission is that of SGLang's ``PrefillAdder``: a share of the answers of all that have started is reserved, and the
    whole answers of those that ask for admission.
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.ratio = FIRST_RATIO
        self.reserved_tokens = 0
        """Tokens that streams get in the forward that admission is for."""
        self.to_come_tokens = 0
        """Tokens that the answers of all that have started still lack."""

    @property
    def free_tokens(self) -> int:
        return self._free_tokens

    def can_hold(self, request: SimRequest) -> bool:
        # All of its answer: as the last stream that is left, it has to find room again when it has been retracted.
        return sum(request.shape) + _to_come(request) + 1 < self.total_tokens

    def fitting(self, requests: Sequence[SimRequest]) -> int:
        left = self._free_tokens - self.reserved_tokens - self.ratio * self.to_come_tokens
        for count, request in enumerate(requests):
            needed = sum(request.shape) + min(_to_come(request), CLIPPED_TOKENS) + 1
            if needed >= left:
                return count
            left -= needed
        return len(requests)

    def take(self, requests: Sequence[SimRequest]) -> None:
        super().take(requests)
        self.to_come_tokens += sum(map(_to_come, requests))

    def send(self, request: SimRequest, tokens: int, now_s: float) -> None:
        pass

    def first_tokens(self, requests: Sequence[SimRequest], now_s: float) -> None:
        """The prefills of ``requests`` have ended: each has a token."""
        for request in requests:
            if request.came_tokens == 0:
                request.first_token_s = now_s
            request.came_tokens += 1
        self.to_come_tokens -= len(requests)

    def step(self, requests: int) -> None:
        """Each of ``requests`` streams has a further token."""
        self._free_tokens -= requests
        self.to_come_tokens -= requests
        assert self._free_tokens >= 0, "streams are retracted before a step that does not fit"
        self.ratio = max(LEAST_RATIO, self.ratio - (FIRST_RATIO - LEAST_RATIO) / RATIO_STEPS)

    def free(self, request: SimRequest, held_tokens: int) -> None:
        """``request`` holds its ``held_tokens`` no longer."""
        self._free_tokens += held_tokens
        self.to_come_tokens -= _to_come(request)


@dataclass(slots=True, eq=False)
class _Member:
    request: SimRequest
    joined_s: float
    first_step: int


class RunningStreams:
    """All requests of an instance that decode. Each gets one token in each step."""

    def __init__(self, kv: OutputKv) -> None:
        self._kv = kv
        self._members: dict[SimRequest, _Member] = {}
        self._ends_s: list[float] = []
        """When each step ended."""
        self._last_steps: list[tuple[int, int, SimRequest]] = []
        """A heap: after which step each is over."""
        self._left_s: dict[SimRequest, float] = {}
        """When retracted requests had their last tokens."""
        self._prompts = 0
        self.context_tokens = 0
        self.retractions = 0

    def __len__(self) -> int:
        return len(self._members)

    def join(self, request: SimRequest, now_s: float) -> bool:
        """``request`` has a token from its prefill. Whether it goes on."""
        if (left_s := self._left_s.pop(request, None)) is not None:
            request.gaps_s.append(np.array([now_s - left_s]))
        if not _to_come(request):
            self._kv.free(request, sum(request.shape))
            return False
        self._members[request] = _Member(request, now_s, len(self._ends_s))
        heappush(self._last_steps, (len(self._ends_s) + _to_come(request), request.index, request))
        self.context_tokens += sum(request.shape)
        return True

    def step(self, end_s: float) -> list[SimRequest]:
        """All streams have got a token at ``end_s``. The requests whose answers are complete."""
        self._kv.step(len(self._members))
        self.context_tokens += len(self._members)
        self._ends_s.append(end_s)
        ended = []
        while self._last_steps and self._last_steps[0][0] <= len(self._ends_s):
            last_step, _, request = heappop(self._last_steps)
            member = self._members.get(request)
            if member is not None and member.first_step + _to_come(request) == last_step:
                self._take_out(member)
                self._kv.free(request, self._held(member))
                ended.append(request)
        return ended

    def retract(self) -> SimRequest:
        """Take out the stream that SGLang takes out: the one with fewest tokens, of these the longest prompt. It starts
        anew with its prompt and what it has of its answer.
        """

        def order(member: _Member) -> tuple[int, int, int]:
            came = member.request.came_tokens + len(self._ends_s) - member.first_step
            return came, -sum(member.request.shape), member.request.index

        member = min(self._members.values(), key=order)
        request = member.request
        held_tokens = self._held(member)
        last_s = self._ends_s[-1] if len(self._ends_s) > member.first_step else member.joined_s
        self._take_out(member)
        self._kv.free(request, held_tokens)
        self._left_s[request] = last_s
        cached_tokens = request.shape.cached_tokens
        request.shape = PrefillShape(held_tokens - cached_tokens, cached_tokens)
        self.retractions += 1
        if self._members:
            came = sum(m.request.came_tokens + len(self._ends_s) - m.first_step for m in self._members.values())
            most = sum(m.request.output_tokens for m in self._members.values())
            self._kv.ratio = min(1.0, (came + RETRACT_STEPS * len(self._members)) / (most + 1))
        return request

    def held_tokens(self, request: SimRequest) -> int:
        """KV cache that ``request`` holds."""
        return self._held(self._members[request])

    def _held(self, member: _Member) -> int:
        return sum(member.request.shape) + len(self._ends_s) - member.first_step

    def _take_out(self, member: _Member) -> None:
        """``member`` gets no more tokens: note when its tokens came."""
        request = member.request
        ends_s = self._ends_s[member.first_step :]
        self.context_tokens -= self._held(member)
        if ends_s:
            request.gaps_s.append(np.diff([member.joined_s, *ends_s]))
            request.came_tokens += len(ends_s)
        del self._members[request]


class StepTimes:
    """How long steps take: the model's time, off by a random factor, on a machine that may become slower."""

    def __init__(self, model: StepCost, error: float, slowdown: Slowdown = STEADY, seed: int = 0) -> None:
        self._model = model
        self._error = error
        self._slowdown = slowdown
        self._random = np.random.default_rng(seed)
        self.total_s = 0.0
        self.steps = 0

    def end_s(self, begin_s: float, requests: int, context_tokens: int) -> float:
        """When the step that begins at ``begin_s`` ends."""
        factor = float(np.exp(self._error * self._random.standard_normal())) if self._error else 1.0
        end_s = self._slowdown.end_s(begin_s, factor * self._model.predict_s(requests, context_tokens))
        self.total_s += end_s - begin_s
        self.steps += 1
        return end_s


def _to_come(request: SimRequest) -> int:
    """Tokens that the answer still lacks."""
    return request.output_tokens - request.came_tokens
