"""The table of what is expected of SGLang is complete: the code uses nothing of SGLang that is not in it, and the table
has nothing that the code does not use.

Imports, targets of hooks and overridden methods are found for certain, wherever in the project they are. Attributes of
SGLang's objects cannot be: Python has no types here. Found are those that a subclass of SGLang's reads of ``self``, and
those that are read of what is called as such objects are called in this project (``tests.sglang_uses.RECEIVERS``:
``req.rid``, ``batch.reqs``, ``model_runner.dtype``). An attribute that is read under another name, or by ``getattr``
with a name that is computed, is not found. Of a row of an attribute this test wants no more than that its name occurs
somewhere in the project; of a row that says what the code takes for granted, that the part has other rows.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("sglang")

from sgl_flowprefill import plugin
from sgl_flowprefill.contract import PARTS, Row, Tree
from tests.sglang_uses import ROOT, Uses, copy_project, find_uses, parts_checked

ROWS = [row for part in PARTS for row in part.rows]


@cache
def installed() -> Tree:
    return Tree()


@cache
def uses() -> Uses:
    return find_uses(installed())


def dotted(row: Row) -> str:
    return row.target.rstrip(":").replace(":", ".")


def missing(found: Uses, rows: Iterable[Row]) -> dict[str, str]:
    """What the code uses and no row names, with a place. A row of a method names its class, too."""
    known = {dotted(row) for row in rows}
    classes = {name.rpartition(".")[0] for name in known}
    return {name: place for name, place in found.all.items() if name not in known and name not in classes}


def is_used(row: Row, found: Uses) -> bool:
    name = dotted(row)
    own_name = name.rpartition(".")[2]
    if row.use == "assumes":
        part = next(part for part in PARTS if row in part.rows)
        return any(other.use != "assumes" for other in part.rows)
    if row.use == "overrides":
        return name in found.overridden
    if name in found.all or any(used.startswith(f"{name}.") for used in found.all):
        return True
    return (row.is_attribute or row.use in ("reads", "hooks") or own_name in found.called) and own_name in found.words


def test_all_that_the_code_uses_is_in_the_table() -> None:
    absent = missing(uses(), ROWS)
    assert not absent, "\n".join(f"{place} uses {name}" for name, place in sorted(absent.items()))
    counts = {kind: len(getattr(uses(), kind)) for kind in ("imported", "named", "overridden", "read")}
    print(counts)
    assert counts["imported"] > 30
    assert counts["named"] > 15
    assert counts["overridden"] > 35
    assert counts["read"] > 150


def test_all_that_is_in_the_table_the_code_uses() -> None:
    dead = [f"{row.use} {dotted(row)}" for row in ROWS if not is_used(row, uses())]
    assert not dead, "\n".join(dead)


def test_a_row_that_is_taken_out_is_missed() -> None:
    """The row of each symbol that the code imports, names, overrides or reads."""
    found = uses()
    by_name: dict[str, list[Row]] = {}
    for row in ROWS:
        by_name.setdefault(dotted(row), []).append(row)
    parents = {name.rpartition(".")[0] for name in by_name}
    taken_out = 0
    for name in found.all:
        if name in by_name and name not in parents:
            assert name in missing(found, [row for row in ROWS if row not in by_name[name]])
            taken_out += 1
    print(f"{taken_out} of {len(by_name)} symbols taken out one by one")
    assert taken_out > 200


def test_a_row_that_nothing_uses_is_found() -> None:
    scheduler = "sglang.srt.managers.scheduler:Scheduler"
    for row in (
        Row(f"{scheduler}.get_load", "calls", "", ""),
        Row(f"{scheduler}.run_batch", "overrides", "", ""),
        Row(f"{scheduler}.is_a_name_that_nobody_uses", "reads", "", "", is_attribute=True),
        Row("sglang.srt.managers.utils:validate_input_length", "calls", "", ""),
    ):
        assert not is_used(row, uses())


PLACES = {
    "sgl_flowprefill/runtime/other.py": """
from sglang.srt.managers.schedule_batch import Req, sanity_check_mm_pad_shift_value
from sgl_flowprefill.runtime.scheduler import FlowPrefillScheduler

class Other(FlowPrefillScheduler):
    def handle_embedding_request(self, recv_req):
        return self.nccl_port, [req.hidden_states for req in self.waiting_queue]
""",
    "patches/other.py": 'HOOK = "sglang.srt.managers.scheduler.Scheduler.get_loads"',
    "profiling/deep/other.py": """
from sgl_flowprefill.runtime.other import Other

class Another(Other):
    def handle_generate_request(self, recv_req): ...
""",
}


def test_uses_are_found_wherever_in_the_project_they_are(tmp_path: Path) -> None:
    copy_project(tmp_path)
    for place, text in PLACES.items():
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(text)
    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    found = set(missing(find_uses(installed(), tmp_path), ROWS))
    assert found == {
        "sglang.srt.managers.schedule_batch.sanity_check_mm_pad_shift_value",
        "sglang.srt.managers.schedule_batch.Req.hidden_states",
        f"{scheduler}.get_loads",
        f"{scheduler}.handle_embedding_request",
        f"{scheduler}.handle_generate_request",
        f"{scheduler}.nccl_port",
    }


def test_each_part_is_checked_by_what_needs_it() -> None:
    """When a server starts; what only the launcher and clients need is checked by the doctor."""
    checked = parts_checked(ROOT) | set(plugin.SCHEDULER_PARTS)
    in_servers = {part.name for part in PARTS if {"HTTP server", "scheduler"} & set(part.processes)}
    assert in_servers <= checked <= {part.name for part in PARTS}
    assert {part.name for part in PARTS} - checked == {"launcher", "frontend"}


def overrides() -> list[Row]:
    return [row for row in ROWS if row.use == "overrides" and row.signature is not None]


@pytest.mark.parametrize("row", overrides(), ids=dotted)
def test_an_override_can_be_called_as_the_table_says(row: Row) -> None:
    """Whatever SGLang passes by the signature in the table, ours takes."""
    ours = pkgutil.resolve_name(uses().overriding[dotted(row)])
    ours = ours.fget if isinstance(ours, property) else inspect.unwrap(ours)
    names, _ = row.parameters
    parameters = inspect.signature(ours).parameters.values()
    kinds = {parameter.kind for parameter in parameters}
    own = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    plain = [name for name in names if not name.startswith("*")]
    taken = plain[: len(own)]
    assert own[: len(taken)] == taken or inspect.Parameter.VAR_KEYWORD in kinds
    if len(plain) > len(own):
        assert {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} & kinds
