"""Where files of this package are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

CACHE_VARIABLE: Final = "FLOWPREFILL_CACHE_DIR"


def cache_dir() -> Path:
    """``FLOWPREFILL_CACHE_DIR``, or sgl-flowprefill under the user's cache directory."""
    explicit = os.environ.get(CACHE_VARIABLE)
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sgl-flowprefill"
