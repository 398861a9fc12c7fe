"""An independent reference: transformers computes every prompt alone, on the same checkpoint, and answers are compared.

What is compared of an answer: its tokens, their log probabilities, those of its prompt where they were asked for, and
the KV cache that the prefill server hands over for it: every key and value of every layer, and then the first eight
tokens and log probabilities that transformers decodes from it.

Of an answer that has to match a pattern, transformers has the likeliest tokens among those behind which the text can
still match it, by Python's ``regex``: another implementation than the server's grammars.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import regex
import torch

TOKENS: Final = 8
"""How many tokens of an answer are compared."""
LOGPROB_TOLERANCE: Final = 2e-4
"""Two float32 implementations differ by rounding; ``Comparison.largest`` says by how much they did: about a tenth."""
KV_TOLERANCE: Final = 1e-4
"""Keys and values are about 1."""
PARTS: Final = ("keys", "values")
KEPT_PROMPTS: Final = 1000
"""References that are kept; of the embedded model each takes about 1 kB a token."""


@dataclass(frozen=True)
class Kv:
    """Keys and values of a prompt, each [layers, tokens, kv_heads, head_dim]."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def tensors(self) -> int:
        """How many tensors a server has of it: keys and values of every layer."""
        return 2 * len(self.keys)

    @classmethod
    def of_heads(cls, parts: Sequence[Kv]) -> Kv:
        """That of all heads, of which each of ``parts`` has some, in their order."""
        return cls(*(torch.cat([getattr(part, of) for part in parts], dim=2) for of in PARTS))

    def __add__(self, later: Kv) -> Kv:
        """With that of the tokens that follow."""
        return Kv(torch.cat([self.keys, later.keys], dim=1), torch.cat([self.values, later.values], dim=1))


@dataclass(frozen=True)
class Choices:
    """What greedy decoding chose, step by step."""

    tokens: list[int]
    logprobs: list[float]
    runners_up: list[int]
    gaps: list[float]
    """By how much the log probability of each token exceeds that of its runner-up."""

    @classmethod
    def of(cls, logits: torch.Tensor) -> Choices:
        """``logits`` [steps, vocabulary]."""
        best = torch.log_softmax(logits.double(), dim=-1).topk(2)
        (tokens, runners_up), (logprobs, others) = best.indices.T.tolist(), best.values.T.tolist()
        return cls(tokens, logprobs, runners_up, [a - b for a, b in zip(logprobs, others, strict=True)])

    def __add__(self, later: Choices) -> Choices:
        return Choices(
            self.tokens + later.tokens,
            self.logprobs + later.logprobs,
            self.runners_up + later.runners_up,
            self.gaps + later.gaps,
        )


@dataclass(frozen=True)
class Expected:
    """What transformers says of one prompt."""

    choices: Choices
    """The first ``TOKENS`` tokens of the answer; fewer where a pattern lets it end before."""
    kv: Kv | None


class Reference:
    """A checkpoint in transformers, float32. Prompts run one at a time, and are kept."""

    def __init__(self, model: Any, keep_kv: bool = True) -> None:
        """``model``: a path, or a model of transformers. KV can be kept where all layers have it of all tokens."""
        if isinstance(model, str | Path):
            from transformers import AutoModelForCausalLM

            self._path = model
            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._model = model.eval()
        self._keep_kv = keep_kv
        self._kept: dict[tuple[tuple[int, ...], str | None], Expected] = {}

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's, where there is one."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._path)

    def ids(self, text: str) -> list[int]:
        """The tokens of ``text``. Those of an answer of the embedded model, which consists of words, are its own."""
        return list(self.tokenizer(text)["input_ids"])

    @torch.no_grad()
    def expect(self, prompt: Sequence[int], pattern: str | None = None) -> Expected:
        """The answer to ``prompt`` alone, where it has to match ``pattern`` if there is one."""
        key = (tuple(prompt), pattern)
        expected = self._kept.get(key)
        if expected is None:
            output = self._model(torch.tensor([list(prompt)]), use_cache=True, logits_to_keep=1)
            past = output.past_key_values
            kv = _copy(past) if self._keep_kv else None
            choices = Choices.of(self._allowed(output.logits[0], [], pattern))
            while len(choices.tokens) < TOKENS and not self._has_ended(choices.tokens, pattern):
                step = self._model(torch.tensor([choices.tokens[-1:]]), past_key_values=past, use_cache=True)
                choices = choices + Choices.of(self._allowed(step.logits[0], choices.tokens, pattern))
            expected = Expected(choices, kv)
            if len(self._kept) >= KEPT_PROMPTS:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = expected
        return expected

    def _has_ended(self, tokens: Sequence[int], pattern: str | None) -> bool:
        """Whether an answer that begins with ``tokens`` ends there: another one ends where its client wants it."""
        return pattern is not None and tokens[-1] == self.tokenizer.eos_token_id

    def _allowed(self, logits: torch.Tensor, tokens: Sequence[int], pattern: str | None) -> torch.Tensor:
        """``logits`` [1, vocabulary] of what follows ``tokens``, without those that ``pattern`` rules out."""
        if pattern is None:
            return logits
        compiled, text = regex.compile(pattern), self.tokenizer.decode(tokens)
        fits = [bool(word) and compiled.fullmatch(text + word, partial=True) is not None for word in self._words]
        fits[self.tokenizer.eos_token_id] = compiled.fullmatch(text) is not None
        return logits.masked_fill(~torch.tensor([fits]), float("-inf"))

    @cached_property
    def _words(self) -> list[str]:
        """The text of each token; none of special ones."""
        special = set(self.tokenizer.all_special_ids)
        count = int(self._model.config.vocab_size)
        return ["" if token in special else self.tokenizer.decode([token]) for token in range(count)]

    @torch.no_grad()
    def inputs(self, prompt: Sequence[int], last: int) -> list[float]:
        """Log probabilities of the ``last`` tokens of ``prompt``, each behind those before it."""
        logits = self._model(torch.tensor([list(prompt)]), logits_to_keep=last + 1).logits[0, :-1]
        tokens = torch.tensor(prompt[-last:])
        found: list[float] = torch.log_softmax(logits.double(), dim=-1).gather(1, tokens[:, None])[:, 0].tolist()
        return found

    @torch.no_grad()
    def decode(self, kv: Kv, tokens: Sequence[int]) -> Choices:
        """Greedy choices after each of ``tokens``, which follow a prompt with this ``kv``."""
        from transformers import DynamicCache

        past = DynamicCache()
        for layer, (keys, values) in enumerate(zip(kv.keys, kv.values, strict=True)):
            past.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], layer)
        return Choices.of(self._model(torch.tensor([list(tokens)]), past_key_values=past).logits[0])


def _copy(past: Any) -> Kv:
    """The KV in transformers' cache ``past`` now: the cache goes on growing."""
    return Kv(*(torch.stack([getattr(layer, part)[0].transpose(0, 1) for layer in past.layers]) for part in PARTS))


class Comparison:
    """Compares answers with those of a reference, counts what was compared, and collects what differs."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.counts: Counter[str] = Counter()
        """Answers, tokens, log probabilities and so on that were compared."""
        self.largest: dict[str, float] = defaultdict(float)
        """Largest difference of each kind."""
        self.differences: dict[str, list[str]] = defaultdict(list)
        """By kind, what differs by more than rounding."""

    def answer(
        self,
        name: str,
        prompt: Sequence[int],
        tokens: Sequence[int],
        logprobs: Sequence[float] | None,
        pattern: str | None = None,
        *,
        new_tokens: int | None = None,
    ) -> None:
        """Compare the first tokens of an answer, which had to match ``pattern`` if there is one, and their log
        probabilities. ``new_tokens``: how many it has to have, where it ends at its length and nowhere else.
        """
        self.counts["answers"] += 1
        if new_tokens is not None and len(tokens) != new_tokens:
            self.differences["length"].append(f"{name}: {len(tokens)} tokens instead of {new_tokens}")
        choices = self.reference.expect(prompt, pattern).choices
        if not tokens:
            self.differences["token"].append(f"{name} ({len(prompt)} tokens) has no answer")
        self._choices("", name, prompt, choices, tokens[:TOKENS], logprobs)

    def text(self, name: str, prompt: str, text: str, logprobs: Sequence[float] | None) -> None:
        """Compare the first tokens of the text of an answer to that of a prompt, and their log probabilities."""
        self.answer(name, self.reference.ids(prompt), self.reference.ids(text), logprobs)

    def chat(self, name: str, messages: Sequence[Mapping[str, str]], choice: Mapping[str, Any]) -> None:
        """Compare a choice of /v1/chat/completions, of which log probabilities were asked for."""
        tokenizer = self.reference.tokenizer
        prompt = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        self.text(name, prompt, choice["message"]["content"], logprobs)

    def generated(
        self, name: str, prompt: Sequence[int] | str, meta_info: Mapping[str, Any], pattern: str | None = None
    ) -> None:
        """Compare an answer of /generate to a request that asked for log probabilities, by its ``meta_info``."""
        entries = meta_info["output_token_logprobs"]
        ids = self.reference.ids(prompt) if isinstance(prompt, str) else prompt
        self.answer(name, ids, [entry[1] for entry in entries], [entry[0] for entry in entries], pattern)

    def inputs(self, name: str, prompt: Sequence[int], logprobs: Sequence[float]) -> None:
        """Compare the log probabilities of the last tokens of ``prompt``."""
        self.counts["log probabilities of prompts"] += len(logprobs)
        expected = self.reference.inputs(prompt, len(logprobs)) if logprobs else []
        for i, (got, wanted) in enumerate(zip(logprobs, expected, strict=True)):
            if self._differs("input log probability", got - wanted, LOGPROB_TOLERANCE):
                text = f"{name} ({len(prompt)} tokens): {got:.5f} instead of {wanted:.5f}, token {i} of those asked for"
                self.differences["input log probability"].append(text)
                return

    def kv(self, name: str, prompt: Sequence[int], kv: Kv) -> None:
        """Compare what was handed over for ``prompt``, and what transformers decodes from it."""
        expected = self.reference.expect(prompt)
        assert expected.kv is not None
        self.counts["KV caches"] += 1
        self.counts["KV tensors"] += kv.tensors
        for part in PARTS:
            got, wanted = getattr(kv, part), getattr(expected.kv, part)
            if got.shape != wanted.shape:
                text = f"{name}: {part} of shape {list(got.shape)} instead of {list(wanted.shape)}"
                self.differences["KV"].append(text)
                return
            off = (got.float() - wanted).abs().amax(dim=(2, 3)).nan_to_num(nan=float("inf"))
            if self._differs("KV", float(off.max()), KV_TOLERANCE):
                layer, token = divmod(int(off.argmax()), off.shape[1])
                wrong = int((off > KV_TOLERANCE).any(dim=0).sum())
                self.differences["KV"].append(
                    f"{name} ({len(prompt)} tokens): {part} off by {float(off.max()):.3g} in layer {layer} at token "
                    f"{token}; {wrong} tokens are wrong"
                )
        decoded = self.reference.decode(kv, expected.choices.tokens[:-1])
        later = Choices(*(getattr(expected.choices, part)[1:] for part in ("tokens", "logprobs", "runners_up", "gaps")))
        self._choices(" decoded from KV", name, prompt, later, decoded.tokens, decoded.logprobs)

    def kv_of_ranks(self, name: str, prompt: Sequence[int], parts: Sequence[Kv]) -> None:
        """Compare what ranks handed over for ``prompt``: each its own heads, in their order, or each all of them."""
        expected = self.reference.expect(prompt)
        assert expected.kv is not None
        if sum(part.keys.shape[2] for part in parts) == expected.kv.keys.shape[2]:
            self.kv(name, prompt, Kv.of_heads(parts))
        else:
            for rank, part in enumerate(parts):
                self.kv(f"{name} of rank {rank}", prompt, part)

    def assert_same(self) -> None:
        """Raise AssertionError with what differs, if something does, or where nothing was compared."""
        self.assert_nothing_differs()
        assert self.counts.total(), "nothing was compared"

    def assert_same_with_logprobs(self) -> None:
        """As ``assert_same``, where all answers were asked for log probabilities: none is missing, but of the tokens of
        runners-up.
        """
        self.assert_same()
        missing = self.counts["tokens"] - self.counts["log probabilities"]
        assert missing <= self.counts["tokens of a runner-up"], f"log probabilities are missing: {self}"

    def assert_nothing_differs(self) -> None:
        """Raise AssertionError with what differs, if something does; what was not compared does not."""
        if self.differences:
            lines = [f"{kind}: {len(texts)} differ; {'; '.join(texts[:3])}" for kind, texts in self.differences.items()]
            raise AssertionError("\n".join(["not what transformers answers:", *lines]))
        assert self.counts["tokens of a runner-up"] <= 0.01 * self.counts["tokens"], str(self)

    def __str__(self) -> str:
        compared = ", ".join(f"{count:,} {what}" for what, count in self.counts.items())
        largest = ", ".join(f"{kind} {value:.2g}" for kind, value in self.largest.items())
        return f"compared with transformers: {compared}; largest differences: {largest}"

    def _choices(
        self,
        how: str,
        name: str,
        prompt: Sequence[int],
        expected: Choices,
        tokens: Sequence[int],
        logprobs: Sequence[float] | None,
    ) -> None:
        for step, token in enumerate(tokens):
            self.counts["tokens" + how] += 1
            if expected.gaps[step] < LOGPROB_TOLERANCE:
                self.counts["near ties"] += 1
            if token != expected.tokens[step]:
                if expected.gaps[step] < LOGPROB_TOLERANCE and token == expected.runners_up[step]:
                    self.counts["tokens of a runner-up"] += 1  # rounding decides; what follows it is another answer
                else:
                    text = f"{name} ({len(prompt)} tokens): {token} instead of {expected.tokens[step]} at step {step}"
                    self.differences["token" + how].append(text)
                return
            if logprobs is not None:
                self.counts["log probabilities" + how] += 1
                got, wanted = logprobs[step], expected.logprobs[step]
                if self._differs("log probability" + how, got - wanted, LOGPROB_TOLERANCE):
                    text = f"{name} ({len(prompt)} tokens): {got:.5f} instead of {wanted:.5f} at step {step}"
                    self.differences["log probability" + how].append(text)
                    return

    def _differs(self, kind: str, difference: float, tolerance: float) -> bool:
        size = float("inf") if difference != difference else abs(difference)
        self.largest[kind] = max(self.largest[kind], size)
        return size > tolerance
