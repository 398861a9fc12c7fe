"""Which versions of SGLang this release supports: the range in pyproject.toml, by the installed metadata."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Final

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

DISTRIBUTION: Final = "sgl-flowprefill"


def installed() -> str:
    """Version of the installed SGLang."""
    try:
        return version("sglang")
    except PackageNotFoundError:
        return "(not installed)"


@cache
def supported() -> SpecifierSet:
    """The range of versions of SGLang that pip installs this release with."""
    requirements = map(Requirement, requires(DISTRIBUTION) or ())
    return next(requirement.specifier for requirement in requirements if requirement.name == "sglang")


def is_supported(of_version: str) -> bool:
    """Whether a version is in the range; what is no version is not."""
    try:
        return Version(of_version) in supported()
    except InvalidVersion:
        return False
