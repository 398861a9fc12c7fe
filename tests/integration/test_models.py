"""Every model class of SGLang's registry against docs/models.md, and real preemption of model families."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import warm
from tests.families import preempt

FAMILIES = ("DeepSeek-V2-Lite",)
"""Experts and latent attention. Nearly all other tests serve a Llama; every family runs in tests/stress."""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_that_is_suspended_all_the_time_gets_the_answers_of_transformers(name: str) -> None:
    outcome = warm.call(preempt, name)
    print(name, outcome)
    outcome.check()


@pytest.mark.stress
def test_what_is_found_in_every_registered_model_is_what_docs_models_md_says() -> None:
    command = [sys.executable, "-m", "tests.model_registry", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, "\n".join([*done.stdout.splitlines()[-60:], *done.stderr.splitlines()[-10:]])
