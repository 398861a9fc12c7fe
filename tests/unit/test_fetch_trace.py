"""Downloading a trace: what arrives is checked, kept whole or not at all, and known again."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sgl_flowprefill.bench import fetch_trace
from sgl_flowprefill.bench.__main__ import main
from sgl_flowprefill.bench.fetch_trace import Published

CONTENT = b'{"timestamp": 0}\n' * 20_000
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 1\n"


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """Files of a local server, by path: ``/raw`` and ``/media``."""
    served: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = served.get(self.path)
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(Published, "url", property(lambda self: f"{url}/raw"))
    monkeypatch.setattr(Published, "lfs_url", property(lambda self: f"{url}/media"))
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(path: Path) -> int:
    return main(["fetch-trace", "qwen-a", "--out", str(path)])


def test_the_first_download_records_its_checksum_and_later_ones_have_to_agree(
    files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files["/raw"] = CONTENT
    path = tmp_path / "traces" / "a.jsonl"
    assert fetch(path) == 0
    assert path.read_bytes() == CONTENT
    assert hashlib.sha256(CONTENT).hexdigest() in path.with_name("a.jsonl.sha256").read_text()
    assert fetch(path) == 0
    path.unlink()
    files["/raw"] = CONTENT + b"more"
    assert fetch(path) == 2
    assert "was expected" in capsys.readouterr().err
    assert not path.exists()


def test_a_file_that_was_changed_is_noticed(files: dict[str, bytes], tmp_path: Path) -> None:
    files["/raw"] = CONTENT
    path = tmp_path / "a.jsonl"
    assert fetch(path) == 0
    path.write_bytes(CONTENT[:-1])
    assert fetch(path) == 2


@pytest.mark.parametrize(("published", "code"), [(CONTENT, 0), (b"something else", 2)])
def test_a_checksum_that_git_lfs_publishes_is_checked(
    files: dict[str, bytes], tmp_path: Path, published: bytes, code: int
) -> None:
    files["/raw"] = POINTER % hashlib.sha256(published).hexdigest().encode()
    files["/media"] = CONTENT
    path = tmp_path / "a.jsonl"
    assert fetch(path) == code
    assert path.exists() == (code == 0)


def test_without_internet_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Published, "url", property(lambda self: "http://127.0.0.1:9/raw"))
    path = tmp_path / "a.jsonl"
    assert fetch(path) == 2
    line = " ".join(capsys.readouterr().err.split())
    assert fetch_trace.TRACES["qwen-a"].page in line
    assert str(path) in line
    assert not path.exists()
