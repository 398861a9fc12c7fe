"""What one row of the table says, and how it is checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sgl_flowprefill.contract.sources import Found, Parameters, Tree

Use = Literal["overrides", "hooks", "calls", "reads", "assumes"]
"""A subclass of this project defines it anew; something of this project is put in its place; it is called; it is read;
it is not touched, but works as the code around it takes for granted.
"""
Process = Literal["HTTP server", "scheduler", "launcher", "client"]
State = Literal["ok", "differs", "gone"]


@dataclass(frozen=True)
class Row:
    """One symbol of SGLang that the project depends on."""

    target: str
    """``module:Qualified.name``; an attribute of a class' objects is one of its names."""
    use: Use
    why: str
    breaks: str
    """What does not work where it is not as expected."""
    is_attribute: bool = False
    """Whether it need not be defined in the class, but may be set by one of its methods."""
    signature: str | None = None
    """``(self, req, last_chunk)``: all parameters; with ``...`` at the end, the first ones. Others have defaults then,
    or are passed on by a hook.
    """
    holds: tuple[str, ...] = ()
    """What its source must contain."""
    lacks: tuple[str, ...] = ()
    """What it must not contain."""
    otherwise: Row | None = None
    """What it may be instead, in another version that is supported."""

    @property
    def parameters(self) -> tuple[tuple[str, ...], bool]:
        """The names in the signature, and whether there are others."""
        assert self.signature is not None
        names = [name.strip() for name in self.signature.strip("()").split(",") if name.strip()]
        has_others = bool(names) and names[-1] == "..."
        return tuple(names[:-1] if has_others else names), has_others


@dataclass(frozen=True)
class Verdict:
    """What was found of a row."""

    row: Row
    state: State
    reason: str = ""


@dataclass(frozen=True)
class Part:
    """Rows that one part of the project needs, and the processes of a server that it runs in."""

    name: str
    title: str
    processes: tuple[Process, ...]
    rows: tuple[Row, ...]


def check(row: Row, tree: Tree) -> Verdict:
    """Whether ``tree`` has what the row expects, or what may take its place."""
    verdict = _check(row, tree)
    if verdict.state != "ok" and row.otherwise is not None and check(row.otherwise, tree).state == "ok":
        return Verdict(row, "ok", f"as {row.otherwise.target}")
    return verdict


def _check(row: Row, tree: Tree) -> Verdict:
    module, _, name = row.target.partition(":")
    if row.is_attribute:
        owner, _, attribute = name.rpartition(".")
        if owner != "*" and tree.find(f"{module}:{owner}") is None:
            return Verdict(row, "gone", f"there is no class {owner} in {module}")
        if not tree.attribute(f"{module}:{owner}", attribute):
            return Verdict(row, "gone", f"{owner} neither defines nor sets {attribute}")
        return Verdict(row, "ok")
    found = tree.find(row.target)
    if found is None:
        where = "it is not there" if tree.find(f"{module}:") else f"there is no module {module}"
        return Verdict(row, "gone", where)
    reason = _difference(row, found)
    return Verdict(row, "differs", reason) if reason else Verdict(row, "ok")


def _difference(row: Row, found: Found) -> str | None:
    if row.signature is not None:
        try:
            parameters = found.parameters
        except ValueError as error:
            return str(error)
        reason = other_parameters(row, parameters)
        if reason is not None:
            return reason
    missing = next((fragment for fragment in row.holds if fragment not in found.text), None)
    if missing is not None:
        return f"its source no longer holds {missing!r}"
    added = next((fragment for fragment in row.lacks if fragment in found.text), None)
    return None if added is None else f"its source now holds {added!r}"


def other_parameters(row: Row, found: Parameters) -> str | None:
    """Why the parameters that were found are not those of the row; None if they are."""
    expected, has_others = row.parameters
    first = found.names[: len(expected)]
    added = found.names[len(expected) :]
    needed = [name for name in added if name in found.required and row.use != "hooks"]  # a hook passes all on
    if first == expected and not needed and (has_others or not added):
        return None
    return f"parameters are ({', '.join(found.names)}), expected ({', '.join(expected)}{', …' if has_others else ''})"


# ---- rows, written shortly ----------------------------------------------------------------------------------------


def rows(use: Use, owner: str, names: str, why: str, breaks: str, otherwise: Row | None = None) -> Iterator[Row]:
    """A row for each of ``names`` of a module (``module:``) or a class. A name with parameters is a function."""
    separator = "" if owner.endswith(":") else "."
    for name in _names(names):
        plain, bracket, parameters = name.partition("(")
        yield Row(
            f"{owner}{separator}{plain}", use, why, breaks, signature=bracket + parameters or None, otherwise=otherwise
        )


def attributes(owner: str, names: str, why: str, breaks: str, otherwise: Row | None = None) -> Iterator[Row]:
    """A row for each attribute of the objects of a class."""
    for row in rows("reads", owner, names, why, breaks, otherwise):
        yield replace(row, is_attribute=True)


def source(
    use: Use,
    target: str,
    holds: Sequence[str],
    why: str,
    breaks: str,
    signature: str | None = None,
    lacks: Sequence[str] = (),
) -> Row:
    """A function whose source must contain something, and must not contain something else."""
    return Row(target, use, why, breaks, signature=signature, holds=tuple(holds), lacks=tuple(lacks))


def _names(text: str) -> Iterator[str]:
    """Names between spaces, which may be followed by parameters in brackets."""
    depth, name = 0, ""
    for letter in f"{text} ":
        depth += (letter == "(") - (letter == ")")
        if letter.isspace() and not depth:
            if name:
                yield name
            name = ""
        else:
            name += letter if not letter.isspace() or letter == " " else " "
