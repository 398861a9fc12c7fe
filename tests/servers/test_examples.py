"""The programs in examples/ run as they are, print what their heads say, and ask for the objectives in them."""

from __future__ import annotations

import re
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sgl_flowprefill.cluster import Cluster
from sgl_flowprefill.frontend import PREFIX_TTFT_SLO_S
from tests.reference import TOKENS, Comparison
from tests.servers.conftest import objectives_since

FOLDER = Path(__file__).parents[2] / "examples"
SERVERS = ["flowprefill_cluster", "unified_server", pytest.param("stock_unified_server", marks=pytest.mark.stress)]
SECONDS = re.compile(r"\d+\.\d\d s")


Answers = list[tuple[str, str]]
"""Prompts and what the example's program got for each."""


class Example(NamedTuple):
    """One of the programs."""

    name: str
    objectives_s: set[float]
    """Of the requests that it makes."""
    answers: Callable[[dict[str, Any], list[str]], Answers]
    """By the program's names and the lines that it has printed."""


def last(state: Any, name: str) -> tuple[str, str]:
    """The prompt and the answer ``name``, with which the text of ``state`` ends."""
    answer = state[name]
    return state.text().removesuffix(answer), answer


def batch(names: dict[str, Any], lines: list[str]) -> Answers:
    return [last(state, "answer") for state in (*names["batch"], names["urgent"])]


def chat_beside_map_reduce(names: dict[str, Any], lines: list[str]) -> Answers:
    return [last(names["turn"], "answer"), last(names["document"].result(), "report")]


def forked_tree(names: dict[str, Any], lines: list[str]) -> Answers:
    answers = []
    for name, (plan, step) in names["state"].ret_value.items():
        branch = f"{names['MANUAL']}Plan {name[0]}"
        answers += [(branch, plan), (f"{branch}{plan} Step {name[1]}", step)]
    return answers


def openai_client(names: dict[str, Any], lines: list[str]) -> Answers:
    chat, completion = (re.split(r"(?<=s|n):", line, maxsplit=1)[1] for line in lines)
    return [("<|user|>is anybody there?<|end|><|assistant|>", chat), ("Report of the night shift:", completion)]


EXAMPLES = [
    Example("batch", {2.0, 0.3}, batch),
    Example("chat_beside_map_reduce", {60.0, 0.3}, chat_beside_map_reduce),
    Example("forked_tree", {5.0, 1.0, PREFIX_TTFT_SLO_S}, forked_tree),
    Example("openai_client", {0.3, 20.0}, openai_client),
]


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_prints_what_its_head_says_and_asks_for_its_objectives(
    example: Example,
    server: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    comparison: Comparison,
) -> None:
    cluster: Cluster = request.getfixturevalue(server)
    path = FOLDER / f"{example.name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), cluster.url])
    capsys.readouterr()
    start_s = time.monotonic()
    names = runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    print(f"{example.name} at {server}:\n{printed}")
    lines = printed.splitlines()
    for prompt, answer in example.answers(names, lines):
        assert answer in printed
        comparison.text(prompt[-40:], prompt, answer, None)
    comparison.assert_same()
    assert comparison.counts["tokens"] >= 2 * TOKENS
    head = names["__doc__"].rpartition("in invented words:")[2]
    assert [SECONDS.sub("", line) for line in lines] == [
        SECONDS.sub("", line.strip()) for line in head.split("\n") if line
    ]
    if cluster.config.flowprefill:
        assert set(objectives_since(cluster, start_s)) == example.objectives_s


def test_every_example_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {example.name for example in EXAMPLES}
