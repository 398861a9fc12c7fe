"""What every seam module in this package shares: the check that its target still has the shape that it expects."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any


class SeamError(RuntimeError):
    """SGLang is not shaped as a seam expects; the message names the seam, the target and the version found."""


def resolve(seam: str, target: str) -> Any:
    """Object at the dotted path ``target``. Raises SeamError when it is not there."""
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        raise _mismatch(seam, target, str(error)) from error


def expect_parameters(seam: str, target: str, names: Sequence[str]) -> Any:
    """Callable at ``target`` whose leading parameters are ``names``. Raises SeamError otherwise."""
    function = resolve(seam, target)
    found = list(inspect.signature(function).parameters)
    if found[: len(names)] != list(names):
        raise _mismatch(seam, target, f"parameters are ({', '.join(found)}), expected ({', '.join(names)}, …)")
    return function


def expect_source(seam: str, target: str, *fragments: str) -> Any:
    """Object at ``target`` whose source holds every one of ``fragments``. Raises SeamError otherwise."""
    found = resolve(seam, target)
    source = inspect.getsource(found)
    for fragment in fragments:
        if fragment not in source:
            raise _mismatch(seam, target, f"its source no longer holds {fragment!r}")
    return found


def _mismatch(seam: str, target: str, reason: str) -> SeamError:
    return SeamError(
        f"{seam}: {target} of SGLang {version('sglang')} is not what this release of sgl-flowprefill was checked "
        f"against (0.5.23): {reason}. Install sglang==0.5.23 or a newer sgl-flowprefill."
    )
