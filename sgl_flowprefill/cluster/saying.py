"""What the launcher tells its user. Nobody has to read it: a closed pipe or a terminal that is gone ends no cluster."""

from __future__ import annotations

import os
import sys
from typing import Literal, TextIO


def say(line: str, where: Literal["stdout", "stderr"] = "stdout") -> None:
    """Print a line, and from the first one on that cannot be written, nothing more."""
    try:
        print(line, file=getattr(sys, where), flush=True)
    except OSError:
        setattr(sys, where, _nowhere())


def _nowhere() -> TextIO:
    return open(os.devnull, "w")
