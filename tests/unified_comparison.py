"""Answers of a server that prefills and decodes, compared with SGLang's own scheduler's to each request alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from tests.reference import LOGPROB_TOLERANCE
from tests.remote import Outcome, Remote
from tests.unified_asks import Answer, Ask
from tests.unified_engine import StockEngine


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

    def call(self, function: Callable[..., Outcome], *arguments: Any) -> Outcome:
        """What ``function`` of the engine and ``arguments`` returns, in the engine's process."""
        return self._remote.call(function, *arguments)


def _end_and_prompt(answer: Answer) -> tuple[str, int]:
    status = "" if answer.status is None else f", status {answer.status}"
    return f"{answer.reason} {answer.detail}{status}", answer.prompt_tokens


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
                    # A prefill computes a token even where none is asked for, and an abort tells it.
                    tokens = answer.tokens[: ask.max_new_tokens]
                    self._tokens(rid, tokens, expected[ask].tokens[: len(tokens)])
            else:
                self._answer(rid, answer, expected[ask])

    def _answer(self, rid: str, answer: Answer, expected: Answer) -> None:
        self.counts["answers"] += 1
        ends, prompts = zip(*map(_end_and_prompt, (answer, expected)), strict=True)
        self.counts["ends"] += 1
        if ends[0] != ends[1]:
            self.differences.append(f"{rid} ends with {ends[0]} instead of {ends[1]}")
        if prompts[0] != prompts[1]:
            self.differences.append(f"{rid}: the prompt has {prompts[0]} tokens instead of {prompts[1]}")
        if expected.status == HTTPStatus.BAD_REQUEST:
            # Its answer is the error. SGLang prefills a token all the same, which nobody gets.
            self.counts["refusals"] += 1
            return
        self._tokens(rid, answer.tokens, expected.tokens)
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
        assert self.counts.total(), "nothing was compared"

    def __str__(self) -> str:
        compared = ", ".join(f"{count:,} {what}" for what, count in self.counts.items())
        largest = ", ".join(f"{kind} {value:.2g}" for kind, value in self.largest.items())
        return f"compared with SGLang's own scheduler: {compared}; largest differences: {largest}"
