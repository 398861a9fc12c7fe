"""What the launcher's command lines share. They are argparse's, as SGLang's is (``cluster.cli``)."""

from __future__ import annotations

import argparse
from typing import NoReturn

from sgl_flowprefill.cluster.base import StartError


class Parser(argparse.ArgumentParser):
    """Raises StartError for what it cannot read, which ends a command with one line."""

    def error(self, message: str) -> NoReturn:
        raise StartError(message)


def seconds(text: str) -> float:
    """Type of an option that takes a time."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text}")
    return value
