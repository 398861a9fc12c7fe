"""A cluster that is watched at its launcher, the same in a terminal, and timelines that are written at the end."""

from __future__ import annotations

import socket
from io import StringIO
from pathlib import Path

import pytest
import requests
from rich.console import Console

from sgl_flowprefill.cluster.base import Ports, StartError
from sgl_flowprefill.cluster.cli import EXIT_CANNOT_START, main, parse
from sgl_flowprefill.cluster.commands import Layout
from sgl_flowprefill.cluster.live import page
from sgl_flowprefill.cluster.top_command import documents
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.events import Arrival, EventLog
from sgl_flowprefill.live import PAGE, TIMELINE
from sgl_flowprefill.live.state import Document, Miss, Server, State, Task, Waiting
from sgl_flowprefill.live.terminal import screen
from tests.watched import HOSTILE, Scheduler, served


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_servers_are_shown_by_their_names_and_one_that_is_gone_with_the_reason() -> None:
    first, second = Scheduler(), Scheduler()
    with served(first, "key") as one, served(second, "key") as other:
        urls = {"prefill-0": one, "prefill-1": other, "prefill-2": f"http://127.0.0.1:{free_port()}"}
        with page(urls, "127.0.0.1", 0, "key") as url:
            base = url.removesuffix(PAGE)
            with pytest.raises(StartError, match="asks for an API key"):
                next(documents(base, None))
            assert first.asked == 0, "nobody watches yet"
            for document in documents(base, "key"):
                if all(server.state for server in document.servers[:2]) and document.servers[2].error:
                    break
            assert [server.name for server in document.servers] == list(urls)
            assert "cannot be reached" in str(document.servers[2].error)
            assert document.servers[0].attainment[0].slo_class == "chat"
            refused = requests.get(base + TIMELINE, timeout=30)
            assert refused.status_code == 401
            trace = requests.get(base + TIMELINE, timeout=30, headers={"Authorization": "Bearer key"})
            assert b"prefill-0" in trace.content
            assert b"prefill-1" in trace.content


def test_a_terminal_shows_what_the_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    with served(Scheduler()) as url:
        document = next(documents(url, None))
        console = Console(width=200, record=True, file=StringIO())
        console.print(screen(document, 7))
        shown = console.export_text()
        assert main(["top", "--url", url + PAGE, "--once"]) == 0
    for text in ("×1.07", "runs +2", "kept-1", "late-0", "too late", "misprediction", "chat", HOSTILE):
        assert text in shown, shown
    assert "late-1" not in shown
    assert "and 5 more" in shown
    assert "late-2" in capsys.readouterr().out


def test_the_id_of_a_request_is_no_command_to_a_terminal() -> None:
    rid = "clear\x1b[2Jthe\x07screen\u202e"
    waiting = [Waiting(rid, 1, 0, 0.0, 1.0, 1.0, "kept")]
    tasks = [Task(1, [rid], 1, 1, 0, True, 0.0, 1.0, 1.0, "kept")]
    missed = Miss(rid, "chat", "body", "overload", 0.0, 1.0, None, None, None, None, 0.0, 0, 0.0, 1)
    state = State("feasible", False, False, False, 1.0, tasks, waiting, 1, 0)
    console = Console(width=200, file=StringIO(), force_terminal=True)
    console.print(screen(Document([Server("prefill", state, misses=[missed])], 1.0, 1.0)))
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert written.count("clear\ufffd[2Jthe\ufffdscreen\ufffd") == 3
    assert "\x1b[2J" not in written


def test_a_server_that_ends_the_connection_before_it_tells_anything_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sgl_flowprefill.cluster.top_command.documents", lambda url, api_key: iter(()))
    assert main(["top", "--url", "http://here", "--once"]) == EXIT_CANNOT_START
    assert "http://here has ended the connection" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "reason"), [("http://127.0.0.1:{port}", "nothing answers there"), ("nonsense", "nothing answers there")]
)
def test_where_nobody_is_to_be_watched_the_terminal_says_so(
    url: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = url.format(port=free_port())
    assert main(["top", "--url", url]) == EXIT_CANNOT_START
    said = capsys.readouterr().err
    assert url in said
    assert reason in said


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"--live-port {port}"), page({}, "127.0.0.1", port, None):
            pass


def test_a_launchers_page_is_where_top_looks_for_it_if_nobody_else_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port, gateway_port = free_port(), free_port()
    for module in ("live", "top_command"):
        monkeypatch.setattr(f"sgl_flowprefill.cluster.{module}.LIVE_PORT", port)
    monkeypatch.setattr("sgl_flowprefill.cluster.top_command.GATEWAY_PORT", gateway_port)
    with page({}, "127.0.0.1", None, None) as first, page({}, "127.0.0.1", None, None) as second:
        assert first == f"http://127.0.0.1:{port}{PAGE}"
        assert second != first
        assert main(["top", "--once"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["top", "--once"]) == EXIT_CANNOT_START
    assert f"http://127.0.0.1:{gateway_port}: nothing answers there" in capsys.readouterr().err


def test_only_a_launcher_with_servers_behind_a_gateway_has_a_page_of_its_own() -> None:
    assert parse(["--flowprefill"]).has_live_page
    assert parse(["--flowprefill", "--unified", "2", "--live-port", "7000"]).live_port == 7000
    assert not parse(["--flowprefill", "--unified"]).has_live_page
    assert not parse(["--flowprefill", "--flowprefill-recent-events", "0"]).has_live_page
    assert not parse([]).has_live_page
    for argv in (["--unified", "--live-port", "7000"], ["--role", "gateway", "--live-port", "7000"]):
        with pytest.raises(StartError, match="--live-port 7000"):
            parse(["--flowprefill", *argv])
    with pytest.raises(StartError, match="--live-port 70000"):
        parse(["--flowprefill", "--live-port", "70000"])


def test_a_launchers_servers_leave_the_timeline_to_it_and_have_event_logs_of_their_own() -> None:
    config = parse(["--flowprefill", "--prefill", "2", "--flowprefill-timeline", "run.pftrace"])
    layout = Layout(config, "model", Ports(), None, "127.0.0.1")
    env = layout.server_env("prefill", 1)
    assert env["FLOWPREFILL_EVENT_LOG"] == str(layout.event_log("prefill", 1)) == "run.pftrace-prefill-1.jsonl"
    assert "FLOWPREFILL_TIMELINE" not in env


@pytest.mark.parametrize("node_rank", [0, 1])
def test_the_first_node_of_a_server_writes_its_timeline_when_it_ends_however_it_ends(
    tmp_path: Path, node_rank: int
) -> None:
    pytest.importorskip("sglang")
    from sgl_flowprefill.patches.live import writing_timeline

    file = tmp_path / "run.pftrace"
    config = FlowPrefillConfig(timeline=str(file))
    assert config.events_file == f"{file}.jsonl"
    Path(config.events_file).write_text("of another run\n")

    class Mode:
        disaggregation_mode = "null"

        def __init__(self, node_rank: int) -> None:
            self.node_rank = node_rank

    def launch_server(server_args: Mode) -> None:
        log = EventLog(config.events_file)
        log.write(Arrival, 1.0, "the-request", 100, 1.0, 2.0, 1.0)
        log.flush()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writing_timeline(config)(launch_server, Mode(node_rank))
    assert file.exists() == (node_rank == 0)
    assert Path(config.events_file).read_text().startswith("of another run") == (node_rank > 0)
    if node_rank == 0:
        assert b"the-request" in file.read_bytes()
