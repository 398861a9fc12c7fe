"""How a launcher ends: by which signals, in which order, and how long it waits for requests."""

import errno
import os
import signal
import sys
import time
from functools import partial
from io import StringIO

import pytest

from sgl_flowprefill.cluster import cli, free_ports, machine
from sgl_flowprefill.cluster.cluster import Cluster
from sgl_flowprefill.cluster.process import Guard
from sgl_flowprefill.cluster.saying import say

pytestmark = pytest.mark.usefixtures("fast_waiting")


@pytest.mark.parametrize(("before", "ends"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_hanging_up_ends_a_launcher_unless_it_was_started_under_nohup(before, ends, monkeypatch):
    seen = []

    def serve(config):
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.1)
        seen.append("goes on")

    monkeypatch.setattr(cli, "serve", serve)
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    signal.signal(signal.SIGHUP, before)
    try:
        if ends:
            with pytest.raises(SystemExit) as end:
                cli.main(["--role", "gateway", "--ports", "0"])
            assert end.value.code == 128 + signal.SIGHUP
        else:
            assert cli.main(["--role", "gateway", "--ports", "0"]) == 0
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    assert seen == ([] if ends else ["goes on"])


class NobodyReads(StringIO):
    """A standard output whose reader is gone."""

    tried = 0

    def write(self, text):
        self.tried += 1
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_launcher_whose_output_nobody_reads_goes_on_and_says_no_more(monkeypatch):
    output = NobodyReads()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, output)
        say("first", name)
        assert output.tried == 1
        say("second", name)
        assert output.tried == 1, "the second goes nowhere"
        output.tried = 0


STAND_IN = """
import json, signal, sys, threading, time, urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

takes_s, *command = sys.argv[1:]
urls = [word for word in command if word.startswith("http://")]  # of a gateway, its servers

def value(option):
    return command[command.index(option) + 1]

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.dumps({"workers": [{"id": url, "url": url, "is_healthy": True} for url in urls]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *args):
        pass

def end():
    time.sleep(float(takes_s))
    for url in urls:
        urllib.request.urlopen(url, timeout=10).read()
    print("ended", len(urls), flush=True)
    server.shutdown()

def asked(number, frame):
    print("asked to end", flush=True)
    threading.Thread(target=end).start()

signal.signal(signal.SIGTERM, asked)
server = ThreadingHTTPServer((value("--host"), int(value("--port"))), Handler)
server.serve_forever()
"""
"""A server or gateway that answers everything, and ends a while after it is asked to, when its servers still answer."""


class StandIns(Guard):
    """Starts stand-ins for servers, which take ``takes_s`` to end."""

    def __init__(self, takes_s):
        self.takes_s = takes_s

    def start(self, name, command, env, log):
        return super().start(name, [sys.executable, "-c", STAND_IN, str(self.takes_s), *command], env, log)


@pytest.fixture
def ending(monkeypatch, tmp_path):
    """Serves with stand-ins until it is ended by what ``wait`` raises; gives the logs by name, and how long it took to
    end. ``again`` comes while requests are waited for."""

    def run(options, end, takes_s=0.5, again=None):
        since_s = []

        class Ending(Cluster):
            def wait(self):
                since_s.append(time.monotonic())
                raise end

            def check_guard(self):
                super().check_guard()
                if since_s and again is not None:
                    raise again

        monkeypatch.setattr(cli, "Cluster", partial(Ending, guard=StandIns(takes_s)))
        config = cli.parse(["--log-dir", str(tmp_path / "logs"), *options])
        with pytest.raises(type(end if again is None else again)):
            cli.serve(config)
        took_s = time.monotonic() - since_s[0]
        return {log.stem: log.read_text().splitlines() for log in (tmp_path / "logs").iterdir()}, took_s

    monkeypatch.setattr(machine, "gpu_count", lambda: 0)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 64 * 10**9)
    return run


SIGTERM = SystemExit(128 + signal.SIGTERM)
PAIR = ["--ports", "0"]
KINDS = [(PAIR, "gateway", 2), (["--unified", "--port", "0"], "unified", 0), (["--unified", "2", *PAIR], "gateway", 2)]


@pytest.mark.parametrize(("options", "first", "servers"), KINDS)
def test_at_sigterm_what_answers_clients_ends_first_and_its_servers_serve_on(ending, capsys, options, first, servers):
    logs, took_s = ending(options, SIGTERM)
    assert {name: lines for name, lines in logs.items() if lines} == {first: ["asked to end", f"ended {servers}"]}
    assert len(logs) == 1 + servers
    assert 0.5 < took_s < 10
    waiting = [line for line in capsys.readouterr().out.splitlines() if "waiting up to 120 s for the requests" in line]
    assert len(waiting) == 1


@pytest.mark.parametrize("end", [SystemExit(128 + signal.SIGHUP), KeyboardInterrupt()])
def test_ctrl_c_and_hanging_up_wait_for_no_request(ending, end):
    logs, _ = ending(PAIR, end, takes_s=60)
    assert sorted(logs) == ["decode", "gateway", "prefill"]
    assert list(logs.values()) == [[], [], []]


@pytest.mark.parametrize("again", [SIGTERM, KeyboardInterrupt()])
def test_a_second_signal_does_not_wait(ending, again):
    logs, took_s = ending(PAIR, SIGTERM, takes_s=60, again=again)
    assert "ended 2" not in logs["gateway"]
    assert took_s < 10


@pytest.mark.parametrize(("timeout_s", "least_s"), [("1.5", 1.5), ("0", 0.0)])
def test_requests_get_as_long_as_the_launcher_was_told(ending, timeout_s, least_s):
    logs, took_s = ending([*PAIR, "--drain-timeout-s", timeout_s], SIGTERM, takes_s=60)
    assert "ended 2" not in logs["gateway"]
    assert least_s <= took_s < least_s + 10


def test_the_port_of_the_gateways_metrics_is_free_where_they_listen(ending, monkeypatch):
    asked, free_port = [], free_ports.free_port

    def recorded(host, *arguments):
        asked.append(host)
        return free_port(host, *arguments)

    monkeypatch.setattr(free_ports, "free_port", recorded)
    ending(["--host", "127.0.0.2", *PAIR], KeyboardInterrupt())
    assert asked[0] == "127.0.0.2"  # the gateway's own
    assert asked[-1] == "127.0.0.1"


def test_requests_end_although_nobody_reads_what_the_launcher_says(ending, monkeypatch):
    monkeypatch.setattr(sys, "stdout", NobodyReads())
    logs, _ = ending(["--unified", "--port", "0"], SIGTERM)
    assert logs["unified"] == ["asked to end", "ended 0"]
