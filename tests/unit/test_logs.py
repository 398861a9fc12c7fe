"""Log files of servers: what is rotated away, without lines, or gone."""

import os
import time
from pathlib import Path

import pytest

from sgl_flowprefill.cluster import StartError, logs
from sgl_flowprefill.cluster.process import Guard, Server


def test_a_server_goes_on_at_the_begin_of_a_log_that_was_rotated(tmp_path):
    """logrotate's ``copytruncate``."""
    log, go_on = tmp_path / "logs" / "server.log", tmp_path / "go on"
    script = 'echo first; while [ ! -e "$0" ]; do sleep 0.02; done; echo second'
    with logs.held(log):
        server = Server("test", ["sh", "-c", script, str(go_on)], os.environ, log)
        try:
            while not log.read_text():
                time.sleep(0.02)
            os.truncate(log, 0)
        finally:
            go_on.touch()
            os.waitpid(server.pid, 0)
    assert log.read_bytes() == b"second\n"


def test_a_log_is_emptied_by_a_launcher_and_kept_by_its_servers(tmp_path):
    log = tmp_path / "server.log"
    log.write_text("of another run\n")
    with logs.held(log):
        for word in ("one", "two"):
            server = Server("test", ["echo", word], os.environ, log)
            os.waitpid(server.pid, 0)
    assert log.read_text() == "one\ntwo\n"
    assert server.log_start == len("one\n")


def test_what_a_launcher_has_logged_is_kept_until_the_second_one_after_it(tmp_path):
    log = tmp_path / "server.log"
    kept = []
    for number in range(3):
        with logs.held(log):
            kept.append(logs.earlier(log).read_text() if logs.earlier(log).exists() else None)
            log.write_text(f"of launcher {number}\n")
    assert kept == [None, "of launcher 0\n", "of launcher 1\n"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["server.1.log", "server.log"]


def test_of_a_long_log_the_end_is_kept(tmp_path):
    log = tmp_path / "server.log"
    with open(log, "wb") as file:
        file.truncate(logs.KEPT_BYTES + (1 << 30))  # of zeros, which take no place on the disk
        file.seek(0, os.SEEK_END)
        file.write(b"\nthe last line\n")
    with logs.held(log):
        pass
    assert log.stat().st_size == 0
    assert logs.earlier(log).stat().st_size == logs.KEPT_BYTES == 64 * 1024**2
    assert logs.last_lines(logs.earlier(log)).endswith("\nthe last line")


def test_the_last_lines_are_the_end_of_a_log_whatever_it_has(tmp_path):
    log = tmp_path / "server.log"
    assert logs.last_lines(log) == ""
    log.write_text("".join(f"line {number}\n" for number in range(100)))
    assert logs.last_lines(log).splitlines() == [f"line {number}" for number in range(75, 100)]
    with open(log, "wb") as file:
        file.truncate(1 << 27)
        file.seek(0, os.SEEK_END)
        file.write(b"\nthe last line\n")
    shown = logs.last_lines(log)
    assert shown.endswith("\nthe last line")
    assert len(shown) <= logs.LAST_BYTES


def test_two_launchers_may_log_to_no_file():
    with logs.held(Path(os.devnull)), logs.held(Path(os.devnull)):
        pass


def test_a_process_whose_log_cannot_be_written_is_not_started(tmp_path):
    (tmp_path / "logs").touch()
    with Guard() as guard, pytest.raises(StartError, match=r"server\.log cannot be written .* with --log-dir"):
        guard.follow(["sleep", "60"], os.environ, tmp_path / "logs" / "server.log")
