"""Definitions in Python source, found by their lines: nothing is imported, and no file is parsed whole.

To parse all files that the table is about takes a second; to look for what it names takes a twentieth of it. A
definition begins at its ``def`` or ``class``, and ends before the next line that is indented no deeper, which is how
formatted code looks (tests/unit/test_contract.py compares every definition of the table with what the parser finds).
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

Kind = Literal["module", "class", "function", "value"]

_KEYWORDS: Final = ("def ", "class ", "async def ")
_IMPORT: Final = re.compile(r"\nfrom ([.\w]+) import (\([^)]*\)|[^\n]*)")
_OWN: Final = "sgl_flowprefill"


@dataclass(frozen=True)
class Parameters:
    """What a function can be called with."""

    names: tuple[str, ...]
    """All parameters, in their order; with their stars, ``*args`` and ``**kwargs``."""
    required: frozenset[str]
    """Parameters without a default."""

    @classmethod
    def of_live(cls, function: Any) -> Parameters:
        """Parameters of a function of this process."""
        stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        parameters = inspect.signature(function).parameters.values()
        return cls(
            tuple(stars.get(p.kind, "") + p.name for p in parameters),
            frozenset(p.name for p in parameters if p.default is p.empty and p.kind not in stars),
        )

    @classmethod
    def of_source(cls, header: str) -> Parameters:
        """Parameters of ``def name(...)``, without what follows."""
        [function] = ast.parse(f"{header}: pass").body
        assert isinstance(function, ast.FunctionDef)
        given = function.args
        positional = [*given.posonlyargs, *given.args]
        plain = positional[: len(positional) - len(given.defaults)]
        plain += [a for a, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default is None]
        names = [a.arg for a in positional]
        names += [f"*{given.vararg.arg}"] if given.vararg else []
        names += [a.arg for a in given.kwonlyargs]
        names += [f"**{given.kwarg.arg}"] if given.kwarg else []
        return cls(tuple(names), frozenset(a.arg for a in plain))


@dataclass(frozen=True)
class Found:
    """What is at a target."""

    kind: Kind
    module: Module | None
    text: str = ""
    """Source of a class or function."""
    start: int = 0
    """Where that begins in the module."""
    live: Any = None
    """The function of this process, if it is imported."""

    @cached_property
    def parameters(self) -> Parameters:
        """Parameters of a function. Raises ValueError for what is none."""
        if self.kind != "function":
            raise ValueError(f"it is a {self.kind}, not a function")
        if self.live is not None:
            return Parameters.of_live(self.live)
        text = self.text[self.text.index("def ") :]
        return Parameters.of_source(text[: _after_brackets(text)])


class Module:
    """One source file."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self.text = "\n" + path.read_text(encoding="utf-8")

    @cached_property
    def imports(self) -> dict[str, tuple[str, str]]:
        """Module and name there of each name that is imported from one."""
        package = self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]
        found: dict[str, tuple[str, str]] = {}
        for match in _IMPORT.finditer(self.text):
            source, names = match.groups()
            if source.startswith("."):
                above = package.split(".")
                level = len(source) - len(source.lstrip("."))
                source = ".".join([*above[: len(above) - level + 1], source.lstrip(".")]).rstrip(".")
            for part in re.sub(r"#[^\n]*", "", names.strip("()")).split(","):
                name, _, alias = part.strip().partition(" as ")
                if name:
                    found[(alias or name).strip()] = (source, name.strip())
        return found

    def definition(self, name: str) -> Found | None:
        """A class, function or value at the top of the module."""
        return self._defined(name, 0, len(self.text), "") or self._assigned(name, 0, len(self.text), "")

    def conditional(self, name: str) -> Found | None:
        """A class or function inside of an ``if`` or ``try`` at the top of the module."""
        return self._defined(name, 0, len(self.text), "    ")

    def member(self, owner: Found, name: str) -> Found | None:
        """What the body of a class of this module has by that name."""
        start, end = owner.start, owner.start + len(owner.text)
        indent = " " * (len(owner.text) - len(owner.text.lstrip(" ")) + 4)
        return self._defined(name, start, end, indent) or self._assigned(name, start, end, indent)

    def at_line(self, line: int) -> str:
        """Source of the function whose code begins at that line, or at a decorator above it."""
        lines = self.text.split("\n")  # the first is empty, so they count from 1
        while not lines[line].lstrip().startswith(_KEYWORDS):
            if not lines[line].lstrip().startswith(("@", ")", "#")) and "lambda" in lines[line]:
                return lines[line]
            line += 1
        return self._block(sum(len(text) + 1 for text in lines[:line]))

    def _defined(self, name: str, start: int, end: int, indent: str) -> Found | None:
        for keyword in _KEYWORDS:
            place = self._find(f"\n{indent}{keyword}{name}", start, end)
            if place is not None:
                kind: Kind = "class" if keyword == "class " else "function"
                return Found(kind, self, self._block(place + 1), place + 1)
        return None

    def _assigned(self, name: str, start: int, end: int, indent: str) -> Found | None:
        while (place := self._find(f"\n{indent}{name}", start, end)) is not None:
            start = place + len(indent) + len(name) + 1
            if re.compile(r"\s*[:=](?!=)").match(self.text, start):
                return Found("value", self)
        return None

    def _find(self, text: str, start: int, end: int) -> int | None:
        """Where ``text`` begins, with no further letter of a name behind it."""
        while (start := self.text.find(text, start, end)) >= 0:
            following = self.text[start + len(text) : start + len(text) + 1]
            if not (following.isalnum() or following == "_"):
                return start
            start += 1
        return None

    def _block(self, start: int) -> str:
        """The definition whose line begins at ``start``."""
        text = self.text
        indent = len(text[start : start + 200]) - len(text[start : start + 200].lstrip(" "))
        header = re.compile(r"[^(:\n]*[(:\[]").match(text, start)
        begin = start if header is None or text[header.end() - 1] == ":" else start + _after_brackets(text[start:])
        end = re.compile(rf"\n {{0,{indent}}}[^\s#)\]}}\"']").search(text, begin)
        return text[start : end.start() + 1 if end else len(text)]


class Tree:
    """SGLang as it is in a folder of packages; what is elsewhere (``nixl``) is as it is installed."""

    def __init__(self, folder: Path | None = None) -> None:
        """``folder`` holds ``sglang``; None: the installed SGLang, and functions that this process has imported are
        looked at as they are in it.
        """
        self._folder = folder
        self._modules: dict[str, Module | None] = {}
        self._files: dict[Path, Module] = {}
        self._tops: dict[tuple[str, str], Found | None] = {}
        self._mros: dict[str, list[Found]] = {}

    @property
    def is_installed(self) -> bool:
        return self._folder is None

    def module(self, name: str) -> Module | None:
        if name not in self._modules:
            path = self._path(name)
            self._modules[name] = None if path is None else Module(name, path)
        return self._modules[name]

    def find(self, target: str) -> Found | None:
        """What is at ``module:Qualified.name``, in base classes and behind imports too; ``module:`` is the module."""
        module_name, _, qualified = target.partition(":")
        if self.is_installed:
            live, known = self._live(module_name, qualified)
            if known:
                return live
        if not qualified:
            module = self.module(module_name)
            return None if module is None else Found("module", module, module.text)
        owner, _, name = qualified.rpartition(".")
        if not owner:
            return self._top(module_name, name)
        path = f"{module_name}:{owner}"
        found = self.find(path)
        return None if found is None else self._member(path, found, name)

    def attribute(self, owner: str, name: str) -> bool:
        """Whether objects of the class at ``owner`` have an attribute: defined in it, or set by one of its methods.
        ``package:*`` is any class in a module of the package.
        """
        package, star, _ = owner.partition(":*")
        if star:
            fields = (f"\n    {name}: ", f"\n    {name} = ")
            return any(field in module.text for module in self._modules_of(package) for field in fields)
        found = self.find(owner)
        return found is not None and any(
            base.module is not None and (base.module.member(base, name) is not None or _sets(base.text, name))
            for base in self._mro(owner, found)
        )

    def _modules_of(self, package: str) -> Iterator[Module]:
        path = self._path(package)
        for file in sorted(path.parent.glob("*.py")) if path is not None else ():
            module = self.module(f"{package}.{file.stem}")
            if module is not None:
                yield module

    def _named(self, module_name: str, name: str, depth: int = 8) -> Found | None:
        module = self.module(module_name)
        if module is None or not depth:
            return None
        found = module.definition(name)
        if found is None and name in module.imports:
            source, original = module.imports[name]
            found = self._named(source, original, depth - 1)
            if found is None and self._path(f"{source}.{original}"):
                return Found("module", None)
        return found or module.conditional(name)

    def _top(self, module_name: str, name: str) -> Found | None:
        key = (module_name, name)
        if key not in self._tops:
            self._tops[key] = self._named(module_name, name)
        return self._tops[key]

    def _member(self, path: str, owner: Found, name: str) -> Found | None:
        for base in self._mro(path, owner):
            found = base.module.member(base, name) if base.module is not None else None
            if found is not None:
                return found
        return None

    def _mro(self, path: str, found: Found) -> list[Found]:
        if path not in self._mros:
            self._mros[path] = self._lineage(found)
        return self._mros[path]

    def _lineage(self, found: Found) -> list[Found]:
        """A class and its bases by depth: near enough where names of methods are looked for."""
        if found.kind != "class" or found.module is None:
            return []
        classes = [found]
        header = found.text[: _after_brackets(found.text)] if "(" in found.text.partition(":")[0] else ""
        for base in re.findall(r"[\w.]+", re.sub(r"\w+\s*=\s*[\w.]+|\[[^\]]*\]|#[^\n]*", "", header.partition("(")[2])):
            parent = self._top(found.module.name, base)
            if parent is not None and parent.text != found.text:
                classes += self._lineage(parent)
        return classes

    def _path(self, name: str) -> Path | None:
        package, *rest = name.split(".")
        if self._folder is not None and package == "sglang":
            folder = self._folder / package
        else:
            spec = find_spec(package)
            if spec is None or not spec.submodule_search_locations:
                return None
            folder = Path(spec.submodule_search_locations[0])
        path = folder.joinpath(*rest)
        candidates = (path.with_suffix(".py"), path / "__init__.py") if rest else (path / "__init__.py",)
        return next((candidate for candidate in candidates if candidate.is_file()), None)

    def _live(self, module_name: str, qualified: str) -> tuple[Found | None, bool]:
        """The function at a target in this process, and whether the process knows; other packages are imported."""
        if module_name.partition(".")[0] != "sglang":
            try:
                import_module(module_name)
            except ImportError:
                return None, True
        found: Any = sys.modules.get(module_name)
        if found is None or not qualified:
            return None, False
        for name in qualified.split("."):
            found = getattr(found, name, None)
            if isinstance(found, type) and found.__module__.startswith(_OWN):  # it took the place of SGLang's
                found = next(base for base in found.__mro__ if not base.__module__.startswith(_OWN))
        if found is None and not module_name.startswith("sglang"):
            return None, True
        function = inspect.unwrap(getattr(found, "__func__", found)) if callable(found) else None
        if not inspect.isfunction(function) or function.__module__.startswith(_OWN):
            return (None, False) if module_name.startswith("sglang") else (Found("value", None), True)
        path = Path(function.__code__.co_filename)
        if path not in self._files:
            self._files[path] = Module(function.__module__, path)
        text = self._files[path].at_line(function.__code__.co_firstlineno)
        return Found("function", None, text, live=function), True


def _sets(class_text: str, name: str) -> bool:
    """Whether a method assigns ``self.name``, declares it, or has it among several that it assigns."""
    place = 0
    while (place := class_text.find(f"self.{name}", place)) >= 0:
        place += len(name) + 5
        if re.compile(r"\s*(?:=(?!=)|:\s*[\w\"'(\[])").match(class_text, place):
            return True
        if re.compile(r",[^()=]*\)?\s=\s").match(class_text, place):  # one of several
            return True
    return False


def _after_brackets(text: str) -> int:
    """Index behind the bracket that closes the first one."""
    depth = 0
    for match in re.compile(r"\"\"\"(?:.|\n)*?\"\"\"|'[^'\n]*'|\"[^\"\n]*\"|#[^\n]*|[()\[\]{}]").finditer(text):
        bracket = match.group()
        if bracket in "([{":
            depth += 1
        elif bracket in ")]}":
            depth -= 1
            if not depth:
                return match.end()
    return len(text)
