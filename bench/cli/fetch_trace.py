"""``bench fetch-trace``: download a published trace, once, and know it again afterwards.

The file is checked against the checksum that its publisher gives (a Git LFS pointer names one). Where none is
published, it has to read as a trace; the checksum of the first download is written beside it, and later ones have to
agree with that. A file that was put there by hand is compared with what is published, where that can be reached.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

import pooch
import requests
from rich.console import Console

from sgl_flowprefill import paths
from sgl_flowprefill.bench.cli.options import FetchTrace
from sgl_flowprefill.bench.workloads.formats import TraceFormatError, load_trace

TIMEOUT_S: Final = 30.0
BLOCK_BYTES: Final = 1 << 16
AS_IT_IS: Final = {"Accept-Encoding": "identity"}


class Published(NamedTuple):
    """A file of a public GitHub repository."""

    repository: str
    file: str
    licence: str

    @property
    def url(self) -> str:
        """Where the file is, or its Git LFS pointer."""
        return f"https://raw.githubusercontent.com/{self.repository}/main/{self.file}"

    @property
    def lfs_url(self) -> str:
        """Where the file is if it is kept in Git LFS."""
        return f"https://media.githubusercontent.com/media/{self.repository}/main/{self.file}"

    @property
    def page(self) -> str:
        """Where a person finds it."""
        return f"https://github.com/{self.repository}/blob/main/{self.file}"


QWEN: Final = "alibaba-edu/qwen-bailian-usagetraces-anon"
TRACES: Final[Mapping[str, Published]] = {
    "qwen-a": Published(QWEN, "qwen_traceA_blksz_16.jsonl", "Apache-2.0"),
    "qwen-b": Published(QWEN, "qwen_traceB_blksz_16.jsonl", "Apache-2.0"),
}
"""QwenTrace: two hours of a service for consumers (a, the paper's) and of one for businesses (b)."""


class FetchError(OSError):
    """A trace cannot be had; the message says what to do."""


def run(options: FetchTrace, console: Console) -> int:
    """Download, or check what is there. Raises FetchError for a file that is not the trace."""
    published = TRACES[options.trace]
    path = options.out or paths.cache_dir() / "traces" / published.file
    if path.exists():
        console.print(f"{path} is there, {check(published, path)}.", highlight=False, soft_wrap=True)
    else:
        download(published, path, console)
        console.print(f"{path} ({published.licence}, {published.page})", highlight=False, soft_wrap=True)
    console.print(f"Use it with --trace {path}, or bench goodput --workload {path}", highlight=False, soft_wrap=True)
    return 0


def check(published: Published, path: Path) -> str:
    """What the file at ``path`` was found to be. Raises FetchError for one that is not the trace."""
    found, recorded = pooch.file_hash(str(path)), _recorded(path)
    if recorded is not None:
        _compare(path, found, recorded)
        return "and is what was downloaded"
    requests_read = _read(published, path)
    try:
        response, expected = _open(published)
    except requests.RequestException as error:
        return f"with {requests_read} requests, but not compared with what is published: {_reason(error)}"
    response.close()
    size = int(response.headers.get("Content-Length", 0))
    if expected is not None:
        _compare(path, found, expected)
        _record(path).write_text(f"{found}  {path.name}\n")
        return "and is what is published"
    bytes_here = path.stat().st_size
    if size and size != bytes_here:
        raise FetchError(
            f"{path} has {bytes_here:,} bytes, and {published.url} has {size:,}: delete it and download it again"
        )
    return f"with {requests_read} requests; no checksum is published that it could be compared with"


def download(published: Published, path: Path, console: Console) -> None:
    """Download into ``path``, which appears when it is whole and checked. Raises FetchError."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    pooch.get_logger().setLevel(logging.WARNING)  # what it would say is said here
    try:
        response, published_sha256 = _open(published)
        response.close()
        expected = published_sha256 or _recorded(path)
        downloader = pooch.HTTPDownloader(
            progressbar=sys.stderr.isatty(), chunk_size=BLOCK_BYTES, timeout=TIMEOUT_S, headers=AS_IT_IS
        )
        pooch.retrieve(response.url, expected, partial.name, path.parent, downloader=downloader)
    except requests.RequestException as error:
        raise FetchError(
            f"{published.file} could not be downloaded ({_reason(error)}): get it from {published.page} on a machine "
            f"with internet and put it at {path}"
        ) from None
    except ValueError as error:
        raise FetchError(f"another {published.file} was expected: {error} Try again, or see {published.page}") from None
    if expected is None:
        try:
            _read(published, partial)
        except FetchError:
            partial.unlink()
            raise
        console.print("No checksum is published: this download's is recorded, and later ones have to agree with it.")
    _record(path).write_text(f"{pooch.file_hash(str(partial))}  {path.name}\n")
    partial.rename(path)


def _open(published: Published) -> tuple[requests.Response, str | None]:
    """The file as a stream, and the checksum that Git LFS publishes for it."""
    response = _get(published.url)
    if int(response.headers.get("Content-Length", BLOCK_BYTES)) >= BLOCK_BYTES:
        return response, None
    pointer = re.fullmatch(rb"version https://git-lfs\S+\noid sha256:([0-9a-f]{64})\nsize \d+\n", response.content)
    if pointer is None:
        return response, None
    return _get(published.lfs_url), pointer[1].decode()


def _get(url: str) -> requests.Response:
    response = requests.get(url, stream=True, timeout=TIMEOUT_S, headers=AS_IT_IS)
    response.raise_for_status()
    return response


def _read(published: Published, path: Path) -> int:
    """The number of requests in ``path``. Raises FetchError where it is no trace."""
    try:
        return len(load_trace(path, "qwen").requests)
    except TraceFormatError as error:
        raise FetchError(
            f"this is not {published.file}: {error.problem}; delete it and get it from {published.page}"
        ) from None


def _reason(error: requests.RequestException) -> str:
    return type(error).__name__ if error.response is None else f"http {error.response.status_code}"


def _compare(path: Path, found: str, expected: str | None) -> None:
    if expected is not None and found != expected:
        raise FetchError(f"{path} has the sha256 {found}, and {expected} was expected: delete it and download it again")


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _recorded(path: Path) -> str | None:
    record = _record(path)
    return record.read_text().split()[0] if record.exists() else None
