"""What tests ask of servers that prefill and decode, and what a client gets."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tests.engine import tokenized_request
from tests.images import Image
from tests.prompts import population, prompt


@dataclass(frozen=True)
class Ask:
    """A request."""

    prompt: tuple[int, ...]
    max_new_tokens: int = 8
    sampling: tuple[tuple[str, Any], ...] = ()
    """Sampling parameters beside greedy decoding."""
    inputs_from: int | None = None
    """Log probabilities of the prompt's tokens behind this place are asked for, too."""
    ttft_slo_s: float | None = None
    tbt_slo_s: float | None = None
    sheddable: bool | None = None
    image: Image | None = None
    lora_id: str | None = None
    """SGLang's id of the adapter."""

    @property
    def alone(self) -> Ask:
        """What decides the answer."""
        return replace(self, ttft_slo_s=None, tbt_slo_s=None, sheddable=None)

    def message(self, rid: str, tokenizer: Any) -> Any:
        """What the tokenizer process sends to the scheduler."""
        objectives = {"ttft_slo": self.ttft_slo_s, "tbt_slo": self.tbt_slo_s, "sheddable": self.sheddable}
        custom_params = {name: value for name, value in objectives.items() if value is not None} or None
        sampling = dict(self.sampling) | {"max_new_tokens": self.max_new_tokens, "custom_params": custom_params}
        message = tokenized_request(
            rid, self.prompt, sampling, inputs_from=self.inputs_from, tokenizer=tokenizer, lora_id=self.lora_id
        )
        if self.image is not None:
            message.mm_inputs = self.image.inputs(len(self.prompt))
        return message


@dataclass(frozen=True)
class Answer:
    """What a client got."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    input_logprobs: tuple[float | None, ...]
    reason: str
    """How it ended: SGLang's type of it."""
    detail: str = ""
    """What it matched, or the error."""
    status: int | None = None
    prompt_tokens: int = 0
    """Tokens of the prompt that was prefilled: SGLang puts another one in the place of one that it refuses late."""
    cached_tokens: int = 0
    """How many of them were in the radix cache."""


def asks(
    count: int,
    seed: int,
    longest_tokens: int = 2000,
    longest_answer_tokens: int = 24,
    always_ignore_eos: bool = False,
) -> list[Ask]:
    """Requests of all kinds: penalties, grammars, stop tokens, log probabilities of the prompt, answers of 0 tokens."""
    rng = random.Random(seed)
    made = []
    for tokens in population(count, seed=seed, longest_tokens=longest_tokens):
        sampling: dict[str, Any] = {}
        kind = rng.random()
        if kind < 0.15:
            sampling["frequency_penalty"] = rng.choice([0.5, 1.5])
        elif kind < 0.25:
            sampling["presence_penalty"] = 1.0
        elif kind < 0.35:
            sampling["repetition_penalty"] = 1.3
        elif kind < 0.45:
            sampling["regex"] = rng.choice(["[a-z ]+", "(yes|no|maybe)( and (yes|no))*"])
        elif kind < 0.5:
            sampling["min_new_tokens"] = 4
        if rng.random() < 0.7 or always_ignore_eos:
            sampling["ignore_eos"] = True
        answer_tokens = rng.choice([0, 1, 2]) if rng.random() < 0.2 else rng.randrange(2, longest_answer_tokens)
        if "min_new_tokens" in sampling:
            answer_tokens = max(answer_tokens, 4)
        made.append(
            Ask(
                tuple(tokens),
                answer_tokens,
                tuple(sampling.items()),
                inputs_from=rng.choice([0, len(tokens) // 2]) if rng.random() < 0.1 else None,
            )
        )
    return made


def outgrowing(count: int, seed: int) -> list[Ask]:
    """Requests of which a server with some 200 tokens of KV cache gives prefills back, if it reserves nothing for
    answers that may end early: admission fills the cache with prompts that have hardly an answer, and answers to short
    prompts grow into what is left before these are computed.

    It happens to hardly any of ``asks``: admission leaves room for the whole answer of the request that it lets in, and
    reserves what is left of most others, so that streams would have to grow for longer than a prefill takes.
    """
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        grows = rng.random() < 0.3
        prompt_tokens = rng.randrange(5, 20) if grows else rng.randrange(20, 80)
        answer_tokens = rng.randrange(20, 60) if grows else rng.randrange(1, 3)
        inputs_from = 0 if rng.random() < 0.1 else None
        made.append(Ask(tuple(prompt(rng.randrange(1 << 30), prompt_tokens)), answer_tokens, inputs_from=inputs_from))
    return made


def without_penalties(requests: Sequence[Ask]) -> list[Ask]:
    """``requests`` without penalties for tokens that came before: SGLang forgets these when it retracts a stream."""
    return [ask for ask in requests if not any(name.endswith("penalty") for name, _ in ask.sampling)]
