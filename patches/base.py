"""What the seam modules of this package share: their rows of the contract with SGLang, and access to its objects."""

from __future__ import annotations

import pkgutil
from typing import Any

from sgl_flowprefill.contract import SeamError, expect, installed, supported

__all__ = ["SeamError", "expect", "resolve"]


def resolve(seam: str, target: str) -> Any:
    """Object at the dotted path ``target``. Raises SeamError when it is not there."""
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        raise SeamError(
            f"{seam}: SGLang {installed()} has no {target} ({error}). Install sglang{supported()}, or a newer "
            "sgl-flowprefill."
        ) from error
