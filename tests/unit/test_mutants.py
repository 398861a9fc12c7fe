"""Which end of the rounds with a planted defect shows that a comparison catches it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.utils.common import raise_error_or_warn

from tests.mutants.outcome import Crash, Outcome, raise_crashes

DIFFERS = AssertionError("not what transformers answers")


def leak(message: str) -> Exception:
    """What SGLang's checks raise."""
    with pytest.raises(ValueError, match=message) as caught:
        raise_error_or_warn(None, True, "", message)
    return caught.value


@pytest.mark.parametrize(
    "error", [DIFFERS, leak("req_to_token_pool memory leak detected!"), leak("KV double free: 2 duplicate pages.")]
)
def test_a_defect_that_strikes_and_differs_is_caught(error: Exception) -> None:
    outcome = Outcome(3, error)
    assert outcome.is_as_it_should_be(is_planted=True)
    assert not outcome.is_as_it_should_be(is_planted=False)
    assert str(outcome).startswith("caught by")


@pytest.mark.parametrize(
    ("strikes", "error"),
    [
        (0, DIFFERS),
        (0, None),
        (3, None),
        (3, AttributeError("'Role' object has no attribute 'abandoned'")),
        (3, IndexError("list index out of range")),
        (3, ValueError("not enough values to unpack")),
        (3, Crash("ModelFault")),
    ],
)
def test_a_defect_that_never_strikes_or_only_crashes_is_not_caught(strikes: int, error: Exception | None) -> None:
    assert not Outcome(strikes, error).is_as_it_should_be(is_planted=True)


@pytest.mark.parametrize(("strikes", "error", "is_good"), [(0, None, True), (1, None, False), (0, DIFFERS, False)])
def test_without_a_defect_nothing_must_happen(strikes: int, error: Exception | None, is_good: bool) -> None:
    assert Outcome(strikes, error).is_as_it_should_be(is_planted=False) == is_good


def test_a_prefill_that_raises_ends_the_rounds_and_is_not_mistaken_for_a_missing_answer() -> None:
    dropped: list[Any] = []
    role = SimpleNamespace(drop=dropped.append)
    raise_crashes(role)
    whole = SimpleNamespace(failure=None)
    role.drop(whole)
    assert dropped == [whole]
    with pytest.raises(Crash, match="no attribute"):
        role.drop(SimpleNamespace(failure=SimpleNamespace(kind="AttributeError", traceback="no attribute")))
    assert dropped == [whole]
