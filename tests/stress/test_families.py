"""Preemption of every family that SGLang serves on the CPU; docs/models.md says which it does not."""

from __future__ import annotations

import pytest

from tests.families import FAMILIES, preempt_in_subprocess

pytestmark = [pytest.mark.stress, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.missing])
def test_a_family_that_is_suspended_all_the_time_gets_the_answers_of_transformers(name: str) -> None:
    outcome = preempt_in_subprocess(name)
    print(name, outcome)
    outcome.check()


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.missing])
def test_a_family_that_the_cpu_cannot_serve_ends_with_what_is_missing(name: str) -> None:
    with pytest.raises(AssertionError, match=FAMILIES[name].missing):
        preempt_in_subprocess(name)
