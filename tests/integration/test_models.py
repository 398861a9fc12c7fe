"""Every model class of SGLang's registry against docs/models.md, and real preemption of model families."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.families import Outcome, preempt_in_subprocess

FAMILIES = ("DeepSeek-V2-Lite",)
"""Experts and latent attention. Nearly all other tests serve a Llama; every family runs in tests/stress."""


def walk() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.model_registry", "--check"]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


@dataclass
class Started:
    """Processes of one thread each, two of them at a time."""

    registry: Future[subprocess.CompletedProcess[str]]
    families: dict[str, Future[Outcome]]


@pytest.fixture(scope="module")
def started() -> Iterator[Started]:
    with ThreadPoolExecutor(2) as pool:
        yield Started(pool.submit(walk), {name: pool.submit(preempt_in_subprocess, name, 500) for name in FAMILIES})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_that_is_suspended_all_the_time_gets_the_answers_of_transformers(started: Started, name: str) -> None:
    outcome = started.families[name].result()
    print(name, outcome)
    outcome.check()


def test_what_is_found_in_every_registered_model_is_what_docs_models_md_says(started: Started) -> None:
    done = started.registry.result()
    assert done.returncode == 0, "\n".join([*done.stdout.splitlines()[-60:], *done.stderr.splitlines()[-10:]])
