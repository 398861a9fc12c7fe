"""Downloading a trace: what arrives is checked, kept whole or not at all, and known again."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sgl_flowprefill.bench.__main__ import main
from sgl_flowprefill.bench.cli import fetch_trace
from sgl_flowprefill.bench.cli.fetch_trace import Published

ROW = (
    b'{"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 20, "output_length": 3, "type": "text", '
    b'"turn": 1, "hash_ids": [1, 2]}\n'
)
CONTENT = ROW * 2_000
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 1\n"


@pytest.fixture
def broken_off() -> set[str]:
    """Paths whose connection ends before all bytes were sent."""
    return set()


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, broken_off: set[str]) -> Iterator[dict[str, bytes]]:
    """Files of a local server, by path: ``/raw`` and ``/media``."""
    served: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = served.get(self.path)
            self.send_response(200 if content is not None else 404)
            promised = len(content or b"") + (100 if self.path in broken_off else 0)
            self.send_header("Content-Length", str(promised))
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


@pytest.mark.parametrize("content", [b"this is not a trace\n", b'{"ttft_s": 1}\n', b"", ROW + b"<html>"])
def test_a_file_that_was_put_there_and_is_no_trace_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    monkeypatch.setattr(Published, "url", property(lambda self: "http://127.0.0.1:9/raw"))
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert fetch(path) == 2
    line = " ".join(capsys.readouterr().err.split())
    assert str(path) in line
    assert f"delete it and get it from {fetch_trace.TRACES['qwen-a'].page}" in line


def test_a_file_that_was_put_there_is_said_not_to_be_compared_where_nothing_can_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Published, "url", property(lambda self: "http://127.0.0.1:9/raw"))
    path = tmp_path / "a.jsonl"
    path.write_bytes(ROW * 3)
    assert fetch(path) == 0
    assert "with 3 requests, but not compared with what is published" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("there", "code"), [(CONTENT, 0), (CONTENT + ROW, 2)], ids=["the same", "longer"])
def test_a_file_that_was_put_there_is_compared_with_the_size_of_a_file_without_a_checksum(
    files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str], there: bytes, code: int
) -> None:
    files["/raw"] = CONTENT
    path = tmp_path / "a.jsonl"
    path.write_bytes(there)
    assert fetch(path) == code
    out, err = capsys.readouterr()
    said = " ".join((out + err).split())
    assert ("no checksum is published" if code == 0 else "delete it and download it again") in said


@pytest.mark.parametrize(("there", "code"), [(CONTENT, 0), (CONTENT[: len(ROW)] + CONTENT, 2)])
def test_a_file_that_was_put_there_is_compared_with_a_published_checksum(
    files: dict[str, bytes], tmp_path: Path, there: bytes, code: int
) -> None:
    files["/raw"] = POINTER % hashlib.sha256(CONTENT).hexdigest().encode()
    files["/media"] = CONTENT
    path = tmp_path / "a.jsonl"
    path.write_bytes(there)
    assert fetch(path) == code
    assert path.with_name("a.jsonl.sha256").exists() == (code == 0)


def test_a_page_in_place_of_a_trace_is_not_kept(files: dict[str, bytes], tmp_path: Path) -> None:
    files["/raw"] = b"<html>please log in</html>" * 5000
    path = tmp_path / "a.jsonl"
    assert fetch(path) == 2
    assert not path.exists()


@pytest.mark.parametrize("is_lfs", [False, True])
def test_a_download_that_breaks_off_leaves_nothing_and_says_what_to_do(
    files: dict[str, bytes], broken_off: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], is_lfs: bool
) -> None:
    files["/raw"] = POINTER % hashlib.sha256(CONTENT).hexdigest().encode() if is_lfs else CONTENT
    files["/media"] = CONTENT
    broken_off.add("/media" if is_lfs else "/raw")
    path = tmp_path / "a.jsonl"
    assert fetch(path) == 2
    assert fetch_trace.TRACES["qwen-a"].page in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []
    broken_off.clear()
    assert fetch(path) == 0


def test_what_an_earlier_download_left_is_not_taken_for_the_file(files: dict[str, bytes], tmp_path: Path) -> None:
    files["/raw"] = CONTENT
    path = tmp_path / "a.jsonl"
    path.with_name("a.jsonl.partial").write_bytes(ROW)
    assert fetch(path) == 0
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_terminal_shows_progress(
    files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_terminal: bool,
) -> None:
    files["/raw"] = CONTENT
    monkeypatch.setattr(fetch_trace.sys.stderr, "isatty", lambda: is_terminal, raising=False)
    assert fetch(tmp_path / "a.jsonl") == 0
    err = capsys.readouterr().err
    assert ("100%" in err) if is_terminal else err == ""
