"""A result is data: every JSON that a command writes says by itself what it is of, and can be read without computing.

``result`` makes every such document: of a benchmark, of a report on a GPU, of a report on a profile. Files of before
schema 2 have no ``schema``, ``kind``, ``date`` and ``commit``, and some no ``command``, ``versions`` and ``machine``:
``read_result`` gives None for what a file does not say. Such files in ``bench/results/`` have ``recorded_in``.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import orjson
import psutil

SCHEMA: Final = 2
"""Raised when a field changes its name or its meaning."""
PROVENANCE: Final = ("schema", "kind", "command", "date", "commit", "versions", "machine")
"""Fields that every result has."""
RECORDED_IN: Final = "recorded_in"
DISTRIBUTION: Final = "sgl-flowprefill"
VERSIONED_PACKAGES: Final = (DISTRIBUTION, "sglang", "torch", "nixl", "smg", "numpy")
SOURCES: Final = Path(__file__).resolve().parent
COMMIT_FILE: Final = Path(__file__).parent / "COMMIT"
"""In the package of a bundle, which has no git history: the commit that it was made from, as ``git describe --dirty``
writes it.
"""
GIT_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True)
class Result:
    """A result as it was written."""

    figures: Mapping[str, Any]
    """Everything but the provenance."""
    schema: int
    """1 for files that do not say."""
    kind: str | None
    """The command that wrote it."""
    command: str | None
    date: str | None
    commit: Mapping[str, Any] | None
    versions: Mapping[str, str] | None
    machine: Mapping[str, Any] | None
    recorded_in: Mapping[str, str] | None
    """The commit that brought the file into its repository, and its date; not of the code that ran. Only in files of
    before schema 2.
    """


def result(
    kind: str, figures: Mapping[str, Any], command: Sequence[str] | None = None, packages: Sequence[str] = ()
) -> dict[str, Any]:
    """The document of a result of ``kind``: its figures, and where they come from, versions of ``packages`` among it.

    ``command`` is the command line that has made it; None stands for the benchmark that this process runs.
    """
    return {
        "schema": SCHEMA,
        "kind": kind,
        **figures,
        "command": shlex.join(command or ["python", "-m", "sgl_flowprefill.bench", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(*packages),
        "machine": machine(),
    }


def write_result(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document of ``result``. Raises ValueError for one that does not say where it comes from."""
    if missing := [name for name in PROVENANCE if name not in document]:
        raise ValueError(f"a result for {path} lacks {', '.join(missing)}: make it with provenance.result")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2, default=float) + b"\n")


def read_result(path: Path) -> Result:
    """The result in ``path``. Raises ValueError for a file that is none, or is of a later schema."""
    try:
        document = orjson.loads(path.read_bytes())
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise ValueError(f"{path} is no result of a benchmark: give a JSON file that one has written")
    schema = document.get("schema", 1)
    if schema > SCHEMA:
        raise ValueError(f"{path} has schema {schema}, this version reads up to {SCHEMA}: read it with a later version")
    origin = {name: document.get(name) for name in (*PROVENANCE, RECORDED_IN) if name != "schema"}
    figures = {name: value for name, value in document.items() if name not in origin and name != "schema"}
    return Result(figures, schema, **origin)


def commit() -> dict[str, Any]:
    """Git commit of the code that runs, and whether its tree had changes; None for what is not known.

    A bundle has the commit in COMMIT_FILE, a package that was installed from a repository in its metadata.
    """
    if COMMIT_FILE.exists():
        described = COMMIT_FILE.read_text().strip()
        return {"hash": described.removesuffix("-dirty"), "dirty": described.endswith("-dirty")}
    head = _git("rev-parse", "HEAD")
    if head is not None:
        return {"hash": head, "dirty": bool(_git("status", "--porcelain"))}
    try:
        origin = json.loads(metadata.distribution(DISTRIBUTION).read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        origin = {}
    found = origin.get("vcs_info", {}).get("commit_id")
    return {"hash": found, "dirty": None if found is None else False}


def versions(*more: str) -> dict[str, str]:
    """Versions of Python, of the packages that matter for every result, and of ``more``."""
    found = {"python": platform.python_version()}
    for package in (*VERSIONED_PACKAGES, *more):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def cpu_name() -> str:
    """The CPU's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine() -> dict[str, Any]:
    """The machine: CPU model, cores that this process may use, memory."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
    }


def _git(*arguments: str) -> str | None:
    """What git says of the tree that this file is tracked in; None if it is in none, or there is no git."""
    command = ["git", "-C", str(SOURCES), *arguments]
    tracked = ["git", "-C", str(SOURCES), "ls-files", "--error-unmatch", Path(__file__).name]
    try:
        subprocess.run(tracked, capture_output=True, check=True, timeout=GIT_TIMEOUT_S)
        return subprocess.run(command, capture_output=True, check=True, text=True, timeout=GIT_TIMEOUT_S).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
