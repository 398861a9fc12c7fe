"""``launch.py top``: what a server or a cluster does now, in a terminal."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import requests
from rich.console import Console
from rich.live import Live

from sgl_flowprefill.cluster.base import (
    EXIT_CANNOT_START,
    EXIT_FAILED,
    GATEWAY_PORT,
    KEY_VARIABLE,
    LIVE_PORT,
    LOOPBACK,
    StartError,
)
from sgl_flowprefill.cluster.free_ports import is_free
from sgl_flowprefill.cluster.gateway import bearer
from sgl_flowprefill.cluster.parsing import Parser, text_of_key_file
from sgl_flowprefill.cluster.proxies import ask_directly
from sgl_flowprefill.live import PAGE, STATE
from sgl_flowprefill.live.state import Document, decode_document
from sgl_flowprefill.live.terminal import screen

CONNECT_S: Final = 10
WIDE: Final = 140
"""Columns of what is written to a file or a pipe."""
SILENCE_S: Final = 30
"""Servers send something every other second."""


def main(argv: Sequence[str]) -> int:
    """Show what is told until it is interrupted or the server ends; returns the exit code."""
    arguments = _parser().parse_args(argv)
    url = (arguments.url or _default_url()).removesuffix("/").removesuffix(PAGE)
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE
    try:
        told = documents(url, _key(arguments.api_key_file))
        if arguments.once or not console.is_terminal:
            for document in told:
                console.print(screen(document, sys.maxsize))
                return 0
            raise StartError(f"{url} has ended the connection")
        with Live(console=console, screen=True, auto_refresh=False) as live:
            for document in told:
                live.update(screen(document, max(3, console.height // 4)), refresh=True)
    except StartError as error:
        print(f"launch.py top: {error}", file=sys.stderr)
        return EXIT_CANNOT_START
    except requests.RequestException as error:
        print(f"launch.py top: {url} has ended the connection: {error}", file=sys.stderr)
        return EXIT_FAILED
    print(f"{url} has ended the connection")
    return EXIT_FAILED


def documents(url: str, api_key: str | None) -> Iterator[Document]:
    """What the server at ``url`` tells those who watch. Raises StartError where there is none that does."""
    try:
        ask_directly(urlsplit(url).hostname)
        response = requests.get(
            url + STATE, headers=bearer(api_key), stream=True, timeout=(CONNECT_S, SILENCE_S), allow_redirects=False
        )
    except (requests.RequestException, ValueError) as error:
        raise StartError(f"--url {url}: nothing answers there ({type(error).__name__})") from None
    if response.status_code == HTTPStatus.UNAUTHORIZED:
        raise StartError(f"--url {url} asks for an API key: give --api-key-file, or set {KEY_VARIABLE}")
    if not response.ok or not response.headers.get("content-type", "").startswith("text/event-stream"):
        raise StartError(
            f"--url {url} is no server with FlowPrefill (status {response.status_code}): name the URL that a cluster's "
            "launcher prints, or a unified server's own"
        )
    for line in response.iter_lines():
        if line.startswith(b"data: "):
            yield decode_document(line.removeprefix(b"data: "))


def _default_url() -> str:
    """A launcher's page is at LIVE_PORT, the default port of its gateway has none."""
    port = GATEWAY_PORT if is_free(LOOPBACK, LIVE_PORT) else LIVE_PORT
    return f"http://{LOOPBACK}:{port}"


def _key(file: Path | None) -> str | None:
    """Raises StartError."""
    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    return text_of_key_file(file).strip()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch.py top",
        description="Show what a server or a cluster does now: what runs, what waits and why in this order, who met "
        "the objectives of the last minutes, and the last misses with their causes.",
        allow_abbrev=False,
    )
    parser.add_argument("--url", metavar="URL", help="of a server that prefills, or of a cluster's launcher, which "
                        f"prints it (default: what this machine has at port {LIVE_PORT}, a launcher's, or "
                        f"{GATEWAY_PORT}, a unified server's)")  # fmt: skip
    parser.add_argument("--once", action="store_true", help="print the present state and end, as without a terminal")
    parser.add_argument("--api-key-file", metavar="FILE", type=Path, help="file with the server's API key (default: "
                        f"the environment variable {KEY_VARIABLE}, or none)")  # fmt: skip
    return parser
