"""What counts as another answer where answers are compared with those of SGLang's own scheduler."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, cast

import pytest

pytest.importorskip("torch")

from tests.unified_asks import Answer, Ask
from tests.unified_comparison import StockComparison

ASK = Ask((1, 2, 3), 3)
EXPECTED = Answer((5, 6, 7), (-0.1, -0.2, -0.3), (None, -1.0, -2.0), "length", "3", None, 3, 2)


class Kept:
    """Stands in for SGLang's scheduler."""

    def answers(self, asks: Collection[Ask]) -> dict[Ask, Answer]:
        return dict.fromkeys(asks, EXPECTED)


@pytest.fixture
def comparison() -> StockComparison:
    return StockComparison(cast(Any, Kept()))


def test_the_same_answer_is_the_same_whatever_was_cached(comparison: StockComparison) -> None:
    comparison.compare({"r": ASK}, {"r": replace(EXPECTED, cached_tokens=0)})
    comparison.assert_same()
    assert comparison.counts["ends"] == comparison.counts["answers"] == 1


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"tokens": (5, 6)}, "r has 2 tokens instead of 3"),
        ({"tokens": (5, 6, 8)}, "r: token 2 is 8 instead of 7"),
        ({"logprobs": (-0.1, -0.2, -0.31)}, "r: log probability 2 is -0.31000 instead of -0.30000"),
        ({"input_logprobs": (None, -1.0)}, "r: log probability of the prompt: 2 instead of 3"),
        ({"reason": "stop"}, "r ends with stop 3 instead of length 3"),
        ({"detail": "4"}, "r ends with length 4 instead of length 3"),
        ({"status": 500}, "r ends with length 3, status 500 instead of length 3"),
        ({"prompt_tokens": 1}, "r: the prompt has 1 tokens instead of 3"),
    ],
)
def test_another_answer_differs(comparison: StockComparison, other: dict[str, Any], said: str) -> None:
    comparison.compare({"r": ASK}, {"r": replace(EXPECTED, **other)})
    assert comparison.differences[0] == said
    with pytest.raises(AssertionError, match="differ from SGLang's own"):
        comparison.assert_same()


def test_a_missing_answer_differs(comparison: StockComparison) -> None:
    comparison.compare({"r": ASK}, {})
    assert comparison.differences == ["r has no answer"]


def test_nothing_compared_is_not_the_same(comparison: StockComparison) -> None:
    comparison.compare({}, {})
    with pytest.raises(AssertionError, match="nothing was compared"):
        comparison.assert_same()
