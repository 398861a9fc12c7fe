"""Adding a policy is adding one file: command lines, simulator and documents list what registers itself there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sgl_flowprefill
from sgl_flowprefill.config import ConfigError, FlowPrefillConfig
from sgl_flowprefill.policy import POLICIES, Limits, Policy, make_policy, register

ROOT = Path(__file__).parents[2]
NEWEST_FIRST = """
from sgl_flowprefill.policy.orders.static import StaticOrder
from sgl_flowprefill.policy.registry import register


@register("lcfs", "last come, first served")
def lcfs(limits, max_starvation_s):
    return StaticOrder(limits, lambda job: -job.arrival_s)
"""


@pytest.fixture(scope="module")
def with_one_more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place to run in, whose package is this one with one more file among the orders."""
    place = tmp_path_factory.mktemp("checkout")
    source, copy = Path(sgl_flowprefill.__file__).parent, place / "sgl_flowprefill"
    copy.mkdir()
    for entry in source.iterdir():
        if entry.name != "policy":
            (copy / entry.name).symlink_to(entry.resolve())
    shutil.copytree(source / "policy", copy / "policy")
    (copy / "policy" / "orders" / "newest_first.py").write_text(NEWEST_FIRST)
    return place


def run(place: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(place), "COLUMNS": "200"}
    return subprocess.run([sys.executable, *args], cwd=place, env=env, capture_output=True, text=True, timeout=120)


def test_a_policy_in_a_new_file_is_an_option_of_the_launcher(with_one_more: Path) -> None:
    told = run(with_one_more, "-c", "from sgl_flowprefill.cluster.cli import main; main()", "--help")
    assert "lcfs (last come, first served)" in " ".join(told.stdout.split()), told.stderr


def test_a_policy_in_a_new_file_can_be_simulated(with_one_more: Path) -> None:
    options = ("--policy", "lcfs", "fcfs", "--requests", "50", "--seeds", "1", "--no-limit")
    told = run(with_one_more, "-m", "sgl_flowprefill.bench", "simulate", *options)
    assert "lcfs" in told.stdout, told.stderr
    told = run(with_one_more, "-m", "sgl_flowprefill.bench", "simulate", "--help")
    assert "lcfs" in told.stdout, told.stderr


def test_a_policy_that_is_not_registered_is_refused_with_the_names_of_those_that_are() -> None:
    names = ", ".join(POLICIES)
    with pytest.raises(ConfigError, match=f"--flowprefill-policy lcfs: input should be one of {names}"):
        FlowPrefillConfig.parse({"policy": "lcfs"})
    with pytest.raises(ValueError, match=f"no policy is called 'lcfs'; there are {names}"):
        make_policy("lcfs", Limits(1, 1), 1.0)


def test_two_policies_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two policies are called 'fcfs'"):
        register("fcfs", "another")(make_policy)  # type: ignore[type-var]


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_configured_and_made_by_its_name(name: str) -> None:
    assert FlowPrefillConfig(policy=name).policy == name
    assert isinstance(make_policy(name, Limits(1, 1), 1.0), Policy)


def test_the_table_of_policies_in_the_documents_is_the_registry() -> None:
    """On failure, the table to write into docs/simulator.md is the first string of the assertion."""
    rows = [f"| `{policy.name}` | {policy.summary} |" for policy in POLICIES.values()]
    table = "\n".join(["| policy | order |", "| --- | --- |", *rows, ""])
    assert table in (ROOT / "docs" / "simulator.md").read_text()
