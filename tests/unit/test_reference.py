"""The comparison itself: what it lets pass, and that it cannot be passed by what is wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.prompts import population, prompt
from tests.reference import LOGPROB_TOLERANCE, Comparison, Expected, Kv, Reference

TOKENS = prompt(1, 200)


@pytest.fixture
def expected(reference: Reference) -> Expected:
    return reference.expect(TOKENS)


def kv_of(expected: Expected) -> Kv:
    assert expected.kv is not None
    return Kv(expected.kv.keys.clone(), expected.kv.values.clone())


def test_what_the_reference_itself_says_passes_and_is_counted(
    comparison: Comparison, reference: Reference, expected: Expected
) -> None:
    comparison.answer("a", TOKENS, expected.choices.tokens, expected.choices.logprobs)
    comparison.inputs("a", TOKENS, reference.inputs(TOKENS, 199))
    comparison.kv("a", TOKENS, kv_of(expected))
    comparison.assert_same()
    assert comparison.counts == {
        "answers": 1,
        "tokens": 8,
        "log probabilities": 8,
        "log probabilities of prompts": 199,
        "KV caches": 1,
        "KV tensors": 16,
        "tokens decoded from KV": 7,
        "log probabilities decoded from KV": 7,
    }


@pytest.mark.parametrize(
    ("kind", "tokens", "logprobs"),
    [
        ("token", [0], [0.0]),
        ("token", [], None),
        ("log probability", None, [-1.5 * LOGPROB_TOLERANCE]),
        ("log probability", None, [float("nan")]),
    ],
)
def test_another_answer_differs(
    comparison: Comparison, expected: Expected, kind: str, tokens: list[int] | None, logprobs: list[float] | None
) -> None:
    """``logprobs`` are added to the right ones."""
    right = expected.choices
    got = right.tokens[:1] if tokens is None else tokens
    comparison.answer("a", TOKENS, got, None if logprobs is None else [right.logprobs[0] + logprobs[0]])
    assert list(comparison.differences) == [kind]
    with pytest.raises(AssertionError, match=kind):
        comparison.assert_same()


def test_an_answer_that_ends_early_differs_where_its_length_is_known(
    comparison: Comparison, expected: Expected
) -> None:
    right = expected.choices
    comparison.answer("whole", TOKENS, right.tokens, right.logprobs, new_tokens=8)
    comparison.answer("ends where it may", TOKENS, right.tokens[:1], right.logprobs[:1])
    comparison.assert_same()
    comparison.answer("ends early", TOKENS, right.tokens[:1], right.logprobs[:1], new_tokens=8)
    assert comparison.differences == {"length": ["ends early: 1 tokens instead of 8"]}


def test_a_missing_log_probability_is_no_answer_that_is_the_same(comparison: Comparison, expected: Expected) -> None:
    comparison.answer("with", TOKENS, expected.choices.tokens, expected.choices.logprobs)
    comparison.assert_same_with_logprobs()
    comparison.answer("without", TOKENS, expected.choices.tokens, None)
    comparison.assert_same()
    with pytest.raises(AssertionError, match="log probabilities are missing"):
        comparison.assert_same_with_logprobs()


def test_nothing_compared_is_not_the_same(comparison: Comparison) -> None:
    comparison.assert_nothing_differs()
    with pytest.raises(AssertionError, match="nothing was compared"):
        comparison.assert_same()


def test_an_answer_that_has_to_match_a_pattern_is_compared_with_the_likeliest_that_does(
    comparison: Comparison, reference: Reference, expected: Expected
) -> None:
    pattern = "(yes|no) sir"
    right = reference.expect(TOKENS, pattern).choices
    assert reference.tokenizer.decode(right.tokens) in ("yes sir<|end|>", "no sir<|end|>")
    assert sum(math.exp(logprob) for logprob in right.logprobs[-2:]) == 2.0, "nothing else was allowed"
    comparison.answer("a", TOKENS, right.tokens, right.logprobs, pattern)
    comparison.assert_same()
    assert comparison.counts["tokens"] == len(right.tokens) < len(expected.choices.tokens)
    comparison.answer("without", TOKENS, expected.choices.tokens, expected.choices.logprobs, pattern)
    comparison.answer("second", TOKENS, right.runners_up[:1], right.logprobs[:1], pattern)
    comparison.answer("of all tokens", TOKENS, right.tokens[:1], [right.logprobs[0] - 9.0], pattern)
    assert {kind: len(texts) for kind, texts in comparison.differences.items()} == {"token": 2, "log probability": 1}


def test_a_text_is_compared_by_its_tokens(comparison: Comparison, reference: Reference) -> None:
    text = reference.tokenizer.decode(reference.expect(reference.ids("bake lomi")).choices.tokens)
    comparison.text("right", "bake lomi", text, None)
    comparison.assert_same()
    assert comparison.counts["tokens"] == 8
    comparison.text("another prompt", "bake lomi tura", text, None)
    assert list(comparison.differences) == ["token"]


def test_only_the_runner_up_of_a_near_tie_may_take_the_place_of_a_token(
    comparison: Comparison, reference: Reference, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied = replace(expected.choices, gaps=[LOGPROB_TOLERANCE / 2, *expected.choices.gaps[1:]])
    monkeypatch.setattr(reference, "expect", lambda prompt, pattern: replace(expected, choices=tied))
    comparison.answer("a", TOKENS, tied.runners_up[:1], tied.logprobs[:1])
    assert not comparison.differences
    assert comparison.counts["tokens of a runner-up"] == 1
    with pytest.raises(AssertionError):
        comparison.assert_same()  # all of one answer: far more than one in a hundred
    comparison.answer("a", TOKENS, [tied.tokens[0] ^ 1], tied.logprobs[:1])
    assert list(comparison.differences) == ["token"]


def test_two_neighbouring_rows_that_are_exchanged_in_one_layer_differ(
    comparison: Comparison, expected: Expected
) -> None:
    kv = kv_of(expected)
    kv.values[5, [60, 61]] = kv.values[5, [61, 60]]
    comparison.kv("a", TOKENS, kv)
    assert "KV" in comparison.differences


def test_one_wrong_row_of_one_layer_shows_in_the_log_probabilities_of_eight_tokens(reference: Reference) -> None:
    """All that is seen of the KV at a decode server."""
    smallest = float("inf")
    for i, tokens in enumerate(population(16, seed=3, longest_tokens=1400)):
        if len(tokens) < 20:
            continue
        expected = reference.expect(tokens)
        kv = kv_of(expected)
        layer, row = i % len(kv.keys), (i * 7919) % (len(tokens) - 1)
        kv.keys[layer, row] = kv.values[layer, row] = 0.0
        decoded = reference.decode(kv, expected.choices.tokens[:-1])
        changes = torch.tensor(decoded.logprobs) - torch.tensor(expected.choices.logprobs[1:])
        smallest = min(smallest, float(changes.abs().max()))
    print(f"\nsmallest change {smallest:.2g}")
    assert smallest > LOGPROB_TOLERANCE
