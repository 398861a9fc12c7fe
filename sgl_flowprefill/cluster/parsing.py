"""What the launcher's command lines share. They are argparse's, as SGLang's is (``cluster.cli``)."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sgl_flowprefill.cluster.base import StartError


class Parser(argparse.ArgumentParser):
    """Raises StartError for what it cannot read, which ends a command with one line."""

    def error(self, message: str) -> NoReturn:
        raise StartError(message)


def seconds(text: str) -> float:
    """Type of an option that takes a time."""
    value = _number(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text}")
    return value


def seconds_or_0(text: str) -> float:
    """Type of an option that takes a time, which may be none."""
    value = _number(text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds, 0 or more, got {text}")
    return value


def _number(text: str) -> float:
    """A negative one for what is none."""
    try:
        return float(text)
    except ValueError:
        return -1.0


class Append(argparse.Action):
    """Of an option whose texts count together when it is given several times."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, f"{getattr(namespace, self.dest)} {values}".strip())


def words(option: str, text: str) -> list[str]:
    """The words of an option's ``text``, as a shell would split it. Raises StartError."""
    try:
        return shlex.split(text)
    except ValueError as error:
        reason = str(error)
        raise StartError(f"{option} {text}: {reason[:1].lower()}{reason[1:]}") from None


def text_of_key_file(file: Path) -> str:
    """What is in the file that --api-key-file names. Raises StartError."""
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"--api-key-file {file}: {getattr(error, 'strerror', None) or 'no text'}") from None
