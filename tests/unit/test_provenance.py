"""Results: each says by itself what it is of, and is read without computing anything."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sgl_flowprefill import provenance
from sgl_flowprefill.bench.__main__ import main
from sgl_flowprefill.bench.cli.uncontended import Isolated, write_figures
from sgl_flowprefill.bench.reports.goodput import rates_table
from sgl_flowprefill.provenance import PROVENANCE, RECORDED_IN, SCHEMA, read_result, result, write_result

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))
CHECKS: dict[str, Callable[[Any], Any]] = {
    "schema": lambda value: value == SCHEMA,
    "kind": lambda value: value == "simulate",
    "command": lambda value: value.startswith("python -m sgl_flowprefill.bench simulate --requests 20 "),
    "date": lambda value: abs(datetime.now(UTC) - datetime.fromisoformat(value)) < timedelta(minutes=5),
    "commit": lambda value: set(value) == {"hash", "dirty"},
    "versions": lambda value: {"python", "sglang", "torch", "sgl-flowprefill"} <= set(value),
    "machine": lambda value: {"cpu", "cores", "memory_bytes"} <= set(value),
}


def test_a_command_writes_where_its_figures_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "figures.json"
    options = ["--requests", "20", "--seeds", "1", "--policy", "stock-fcfs", "--no-limit", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench", "simulate", *options])
    assert main() == 0
    document = json.loads(out.read_text())
    assert set(CHECKS) == set(PROVENANCE)
    for name, is_right in CHECKS.items():
        assert is_right(document[name]), (name, document[name])
    found = read_result(out)
    assert found.figures["traces"]["qwen-like"]
    assert (found.schema, found.kind, found.command) == (SCHEMA, "simulate", document["command"])


def test_every_command_writes_its_json_with_its_provenance() -> None:
    """Nothing in bench/ writes JSON files in another way; logs have a line for each event and no provenance."""
    logs = {"bench/capacity/probes.py", "bench/loadgen/replay.py"}
    writers, kinds = set(), set()
    for path in (ROOT / "sgl_flowprefill" / "provenance.py", *sorted((ROOT / "bench").rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("write_bytes", "write", "dump"):
                writers.add(str(path.relative_to(ROOT)))
            if name == "result" and node.args and isinstance(node.args[0], ast.Constant):
                kinds.add(node.args[0].value)
            if name == "Comparison":
                kinds |= {str(one.value.value) for one in node.keywords if isinstance(one.value, ast.Constant)}
    assert writers - logs - {"bench/cli/fetch_trace.py"} == {"sgl_flowprefill/provenance.py"}
    assert kinds == {"breakdown", "demo", "goodput", "replay", "simulate", "uncontended", "validate"}


def test_turns_of_isolated_prompts_are_written_as_they_were(tmp_path: Path) -> None:
    turns = {"flowprefill": {512: [[Isolated(0.1, 0.2), Isolated(0.3, 0.4)]]}}
    write_figures(tmp_path / "uncontended.json", [{"tokens": 512}], turns, "embedded Llama")
    figures = read_result(tmp_path / "uncontended.json").figures
    assert figures["turns"] == {
        "flowprefill": {"512": [[{"ttft_s": 0.1, "took_s": 0.2}, {"ttft_s": 0.3, "took_s": 0.4}]]}
    }


def test_a_document_without_its_provenance_is_not_written(tmp_path: Path) -> None:
    document = result("demo", {"figure": 1})
    write_result(tmp_path / "a.json", document)
    del document["commit"]
    with pytest.raises(ValueError, match=r"b\.json lacks commit: make it with provenance\.result"):
        write_result(tmp_path / "b.json", document)
    assert not (tmp_path / "b.json").exists()


def test_the_commit_is_that_of_the_tree_and_says_whether_it_has_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "SOURCES", tmp_path)
    source = tmp_path / "provenance.py"
    source.write_text("one = 1\n")

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    untracked = provenance.commit()
    git("add", "provenance.py")
    git("commit", "-q", "-m", "first")
    assert provenance.commit() == {"hash": git("rev-parse", "HEAD"), "dirty": False}
    assert untracked["hash"] != git("rev-parse", "HEAD"), "a package in somebody else's repository has not its commit"
    source.write_text("two = 2\n")
    assert provenance.commit() == {"hash": git("rev-parse", "HEAD"), "dirty": True}


@pytest.mark.parametrize(("written", "dirty"), [("abc123", False), ("abc123-dirty", True)])
def test_a_bundle_says_which_commit_it_was_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, dirty: bool
) -> None:
    bundled = tmp_path / "COMMIT"
    bundled.write_text(f"{written}\n")
    monkeypatch.setattr(provenance, "COMMIT_FILE", bundled)
    assert provenance.commit() == {"hash": "abc123", "dirty": dirty}


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_published_results_are_read_whatever_version_wrote_them(path: Path) -> None:
    found = read_result(path)
    assert found.figures
    assert found.schema in (1, SCHEMA)
    assert (found.schema == 1) == (found.date is None) == (found.commit is None)
    assert found.schema == SCHEMA or found.recorded_in is not None
    if "max_rate_rps" in str(found.figures):
        console = Console(file=StringIO(), width=200)
        console.print(rates_table(found.figures))
        printed = console.file.getvalue()  # type: ignore[attr-defined]
        for system in found.figures["systems"].values():
            assert system["label"] in printed


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_a_published_result_has_its_provenance_or_the_commit_that_it_was_recorded_in(path: Path) -> None:
    document = json.loads(path.read_text())
    if set(PROVENANCE) <= document.keys():
        assert RECORDED_IN not in document
        return
    recorded = document[RECORDED_IN]
    assert recorded.keys() == {"commit", "date"}
    assert re.fullmatch(r"[0-9a-f]{40}", recorded["commit"])
    assert datetime.fromisoformat(recorded["date"]) < datetime.now(UTC)
    if not (ROOT / ".git").exists() or git("rev-parse", "--is-shallow-repository") != "false":
        return  # an archive or a shallow clone has no history to compare with
    date, *files = git("show", "--format=%cI", "--name-only", recorded["commit"]).split()
    assert date == recorded["date"]
    assert str(path.relative_to(ROOT)) in files


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_what_is_no_result_or_of_a_later_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("[]", "{"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"a\.json is no result of a benchmark: give a JSON file"):
            read_result(path)
    path.write_text(json.dumps({"schema": SCHEMA + 1}))
    with pytest.raises(ValueError, match=f"schema {SCHEMA + 1}, this version reads up to {SCHEMA}"):
        read_result(path)
