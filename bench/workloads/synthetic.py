"""Built-in workloads: seeded generators, for machines with no trace file at hand.

A generator draws its requests one after the other, so the first *k* requests of a longer trace are the trace of
length *k*. Times are those of the paper's setup (Llama-3.1-8B on one A800); ``Trace.scaled`` brings them to others.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Final

import numpy as np

from sgl_flowprefill.bench.workloads.formats import load_trace
from sgl_flowprefill.bench.workloads.trace import QWEN_SLOS, Slo, Trace, TraceRequest, share_prefixes

QWEN_RATE_RPS: Final = 2.75
BLOCK_TOKENS: Final = 16
CONTINUE_PROBABILITY: Final = 0.3
"""Share of text requests that continue an earlier chat (an assumption: the reference excerpt does not say)."""
MAX_CHAT_TOKENS: Final = 8192
THINK_S: Final = 10.0
"""Least time between the turns of a chat."""
OPEN_CHATS: Final = 64
"""Chats that can still be continued: the ones used last."""

GOLDEN_RATIO: Final = 0.6180339887498949
"""Share of a trace file between the places at which seeds begin: the places of few seeds and of many lie well apart."""
DIGEST_CHARS: Final = 16


@dataclass(frozen=True)
class Quantiles:
    """A distribution given by its quantile function, straight between the knots."""

    probabilities: tuple[float, ...]
    values: tuple[float, ...]

    def draw(self, rng: np.random.Generator) -> int:
        """One value, rounded to a whole number of at least 1."""
        return max(1, round(float(np.interp(rng.random(), self.probabilities, self.values))))


@dataclass(frozen=True)
class ClassShape:
    """How often a class of requests arrives, and how long its prompts (new tokens) and outputs are."""

    share: float
    prompt: Quantiles
    output: Quantiles


# Quantiles of the first two minutes of QwenTrace (to-C, Apache-2.0), 327 requests. For the next turn of a chat the
# prompt counts only what the turn before did not have, as the paper counts it.
QWEN_SHAPE: Final[Mapping[str, ClassShape]] = {
    "text": ClassShape(
        share=226 / 327,
        prompt=Quantiles(
            (0, 0.01, 0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1),
            (18, 53, 71, 75, 92, 130, 191, 354, 746, 808, 906, 1102, 1420, 3256, 4615),
        ),
        output=Quantiles((0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1), (5, 32, 74, 118, 276, 442, 682, 821, 1982)),
    ),
    "image": ClassShape(
        share=24 / 327,
        prompt=Quantiles((0, 0.2, 0.5, 0.7, 0.95, 0.96, 1), (352, 354, 372, 388, 402, 900, 931)),
        output=Quantiles((0, 0.25, 0.5, 0.75, 0.9, 1), (47, 52, 69, 88, 178, 212)),
    ),
    "search": ClassShape(
        share=66 / 327,
        prompt=Quantiles(
            (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 1),
            (243, 525, 1210, 2153, 2975, 3239, 4380, 5869, 8068, 10821, 15127, 16744),
        ),
        output=Quantiles((0, 0.1, 0.25, 0.5, 0.75, 0.9, 1), (128, 205, 254, 350, 447, 659, 1488)),
    ),
    "file": ClassShape(
        share=11 / 327,
        prompt=Quantiles(
            (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1),
            (113, 477, 737, 853, 2680, 3212, 4174, 6361, 7005, 9118, 10722),
        ),
        output=Quantiles((0, 0.25, 0.5, 0.75, 1), (288, 415, 701, 821, 978)),
    ),
}

MIXED_SLOS: Final[Mapping[str, Slo]] = {"interactive": Slo(1.0, 0.1), "background": Slo(8.0, 0.2)}
MIXED_MAX_PROMPT_TOKENS: Final = 8192
"""Longest prompt of the mixed workload: one that can meet the interactive SLO (0.62 s alone on an A800)."""

LONG_PROMPT_TOKENS: Final = (512, 32_768)
LONG_URGENT_TOKENS: Final = 2048
LONG_SLOS: Final[Mapping[str, Slo]] = {"urgent": Slo(0.5, 0.1), "patient": Slo(30.0, 0.2)}


def qwen_like(requests: int, seed: int, rate_rps: float = QWEN_RATE_RPS) -> Trace:
    """A trace with the shape of QwenTrace: its classes, lengths and SLOs, Poisson arrivals, chats of several turns.

    A text request continues an earlier chat with CONTINUE_PROBABILITY; its prompt is then the whole prompt of the turn
    before plus new tokens, and its hash ids share that prefix.
    """
    rng = np.random.default_rng(seed)
    new_ids = count()
    chats: deque[TraceRequest] = deque(maxlen=OPEN_CHATS)
    names, shares = list(QWEN_SHAPE), [shape.share for shape in QWEN_SHAPE.values()]
    drawn: list[TraceRequest] = []
    arrival_s = 0.0
    for _ in range(requests):
        arrival_s += rng.exponential(1 / rate_rps)
        name = names[rng.choice(len(names), p=shares)]
        new_tokens = QWEN_SHAPE[name].prompt.draw(rng)
        parent = _continued_chat(rng, chats, arrival_s, new_tokens) if name == "text" else None
        shared_ids = parent.hash_ids[: parent.prompt_tokens // BLOCK_TOKENS] if parent else ()
        prompt_tokens = new_tokens + (parent.prompt_tokens if parent else 0)
        blocks = -(-prompt_tokens // BLOCK_TOKENS)
        request = TraceRequest(
            arrival_s=arrival_s,
            prompt_tokens=prompt_tokens,
            output_tokens=QWEN_SHAPE[name].output.draw(rng),
            request_class=name,
            ttft_slo_s=QWEN_SLOS[name].ttft_s,
            tbt_slo_s=QWEN_SLOS[name].tbt_s,
            hash_ids=(*shared_ids, *(next(new_ids) for _ in range(blocks - len(shared_ids)))),
            block_tokens=BLOCK_TOKENS,
            shared_tokens=len(shared_ids) * BLOCK_TOKENS,
        )
        if name == "text":
            if parent:
                chats.remove(parent)
            chats.append(request)
        drawn.append(request)
    return Trace("qwen-like", drawn)


def mixed(requests: int, seed: int, rate_rps: float = QWEN_RATE_RPS) -> Trace:
    """A workload whose SLOs do not follow length: 30% interactive and 70% background requests of the same lengths.

    On QwenTrace the short classes are the urgent ones, so that shortest-first comes close to deadline order. Here the
    lengths are drawn from all of QwenTrace's classes alike, and prompts share nothing.
    """
    rng = np.random.default_rng(seed)
    shapes, shares = list(QWEN_SHAPE.values()), [shape.share for shape in QWEN_SHAPE.values()]
    drawn = []
    arrival_s = 0.0
    for _ in range(requests):
        arrival_s += rng.exponential(1 / rate_rps)
        shape = shapes[rng.choice(len(shapes), p=shares)]
        name = "interactive" if rng.random() < 0.3 else "background"
        drawn.append(
            TraceRequest(
                arrival_s=arrival_s,
                prompt_tokens=min(shape.prompt.draw(rng), MIXED_MAX_PROMPT_TOKENS),
                output_tokens=shape.output.draw(rng),
                request_class=name,
                ttft_slo_s=MIXED_SLOS[name].ttft_s,
                tbt_slo_s=MIXED_SLOS[name].tbt_s,
            )
        )
    return Trace("mixed", drawn)


def long_prompts(requests: int, seed: int, rate_rps: float = QWEN_RATE_RPS) -> Trace:
    """Prompts of 512 to 32,768 tokens, every length class as frequent; those of up to 2,048 tokens are the urgent ones.

    For what a preemption behind a very long prompt costs.
    """
    rng = np.random.default_rng(seed)
    drawn = []
    arrival_s = 0.0
    for _ in range(requests):
        arrival_s += rng.exponential(1 / rate_rps)
        prompt_tokens = round(float(np.exp(rng.uniform(*np.log(LONG_PROMPT_TOKENS)))))
        name = "urgent" if prompt_tokens <= LONG_URGENT_TOKENS else "patient"
        drawn.append(TraceRequest(arrival_s, prompt_tokens, 8, name, *LONG_SLOS[name]))
    return Trace("long", drawn)


WORKLOADS: Final[Mapping[str, Callable[[int, int, float], Trace]]] = {
    "qwen-like": qwen_like,
    "mixed": mixed,
    "long": long_prompts,
}
"""Built-in workloads by name: (number of requests, seed, rate in req/s) -> Trace."""


@dataclass(frozen=True)
class Workload:
    """A workload from which traces are drawn by seed, at its own rate."""

    name: str
    rate_rps: float
    draw: Callable[[int, int], Trace]
    """(number of requests, seed) -> Trace. Fewer requests are the beginning of more."""
    file_digest: str | None = None
    """Tells what a trace file holds; None for a built-in workload."""
    file_requests: int | None = None
    """How many a trace file holds; None for a built-in workload, which has no end."""

    def apart(self, seeds: int) -> int | None:
        """How long the traces of ``seeds`` seeds can be before a request is in two of them, or twice in one; None for a
        built-in workload, which draws all anew.
        """
        if self.file_requests is None:
            return None
        places = sorted(_place(self.file_requests, seed) for seed in range(seeds))
        return min(after - before for before, after in pairwise([*places, places[0] + self.file_requests]))


def workload(name: str) -> Workload:
    """The built-in workload of that name (``qwen`` is qwen-like), or a trace file, in which a seed is a place to begin.

    Raises ValueError with a sentence for what is neither, or cannot be read, or has no rate.
    """
    name = "qwen-like" if name == "qwen" else name
    if name in WORKLOADS:
        return Workload(name, QWEN_RATE_RPS, lambda requests, seed: WORKLOADS[name](requests, seed, QWEN_RATE_RPS))
    if not Path(name).is_file():
        raise ValueError(f"workload {name!r} is no file and none of {', '.join(WORKLOADS)}")
    whole = load_trace(Path(name))
    digest = hashlib.sha256(Path(name).read_bytes()).hexdigest()[:DIGEST_CHARS]
    return Workload(whole.name, whole.positive_rate_rps(), partial(_from_place, whole), digest, len(whole.requests))


def _place(requests: int, seed: int) -> int:
    """Where a seed begins in a trace file of that many requests."""
    return int(requests * (seed * GOLDEN_RATIO % 1))


def _from_place(whole: Trace, requests: int, seed: int) -> Trace:
    """``requests`` of a trace, from a place that depends on ``seed`` on. After its end it begins again, with other
    prompts, which share as much among themselves.
    """
    there = len(whole.requests)
    first = _place(there, seed)
    begin_s = whole.requests[first].arrival_s
    span_s = whole.requests[-1].arrival_s + 1 / whole.rate_rps
    ids = 1 + max(max(request.hash_ids, default=0) for request in whole.requests)
    drawn = []
    for place in range(first, first + requests):
        again, at = divmod(place, there)
        request = whole.requests[at]
        drawn.append(
            dataclasses.replace(
                request,
                arrival_s=request.arrival_s + again * span_s - begin_s,
                hash_ids=tuple(block + again * ids for block in request.hash_ids),
            )
        )
    return Trace(whole.name, share_prefixes(drawn))


def _continued_chat(
    rng: np.random.Generator, chats: Iterable[TraceRequest], arrival_s: float, new_tokens: int
) -> TraceRequest | None:
    """The last turn of the chat that a text request continues, or None if it begins a new chat."""
    if rng.random() >= CONTINUE_PROBABILITY:
        return None
    open_chats = [
        turn
        for turn in chats
        if turn.arrival_s + THINK_S <= arrival_s and turn.prompt_tokens + new_tokens <= MAX_CHAT_TOKENS
    ]
    return open_chats[rng.integers(len(open_chats))] if open_chats else None
