"""The cluster serves through its gateway, and ends as a whole."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import requests

from sgl_flowprefill.cluster.guard import mapped_segments

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 400
SLO = {"custom_params": {"ttft_slo": 5.0}}


def post(cluster, path, **body):
    response = requests.post(cluster.gateway_url + path, json={"model": "embedded", **body}, timeout=120)
    assert response.ok, response.text
    return response


def events(response):
    """Server-sent events of a streamed answer."""
    data = [line.removeprefix(b"data: ") for line in response.content.splitlines() if line.startswith(b"data: ")]
    assert data[-1] == b"[DONE]"
    return [json.loads(line) for line in data[:-1]]


class Answers:
    def test_generate(self, cluster):
        params = {"max_new_tokens": 8, "temperature": 0, **SLO}
        whole = post(cluster, "/generate", text=" bake lomi tura", sampling_params=params).json()
        streamed = events(post(cluster, "/generate", text=" bake lomi tura", sampling_params=params, stream=True))
        assert whole["meta_info"]["completion_tokens"] == 8
        assert len(streamed) > 1
        assert streamed[-1]["text"] == whole["text"]

    def test_completions(self, cluster):
        body = {"prompt": " bake lomi tura", "max_tokens": 8, "temperature": 0, **SLO}
        whole = post(cluster, "/v1/completions", **body).json()
        streamed = events(post(cluster, "/v1/completions", **body, stream=True))
        assert whole["usage"]["completion_tokens"] == 8
        assert "".join(event["choices"][0]["text"] for event in streamed) == whole["choices"][0]["text"]

    def test_chat_completions(self, cluster):
        messages = [{"role": "user", "content": "bake lomi tura"}]
        body = {"messages": messages, "max_tokens": 8, "temperature": 0, **SLO}
        whole = post(cluster, "/v1/chat/completions", **body).json()
        streamed = events(post(cluster, "/v1/chat/completions", **body, stream=True))
        assert whole["usage"]["completion_tokens"] == 8
        deltas = [event["choices"][0]["delta"].get("content") or "" for event in streamed]
        assert "".join(deltas) == whole["choices"][0]["message"]["content"]

    def test_the_prefill_scheduler_has_its_cpus_to_itself(self, cluster):
        if cluster.cpus is None:
            pytest.skip("a machine with GPUs")
        for name, pid in cluster.processes.items():
            server = psutil.Process(pid)
            for process in (server, *server.children(recursive=True)):
                scheduler = name == "prefill" and "scheduler" in process.name()
                expected = cluster.cpus.scheduler if scheduler else cluster.cpus.others
                assert tuple(process.cpu_affinity()) == expected, (name, process)


class TestFlowPrefill(Answers):
    @pytest.fixture
    def cluster(self, flowprefill_cluster):
        return flowprefill_cluster


class TestSGLangsOwnScheduler(Answers):
    @pytest.fixture
    def cluster(self, stock_cluster):
        return stock_cluster


class Launch:
    """``launch.py`` as a process."""

    def __init__(self, directory, *options):
        self.logs = directory / "logs"
        self.output = directory / "output"
        command = [sys.executable, "launch.py", "--ports", "0", "--log-dir", str(self.logs), *options]
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)

    def text(self):
        return self.output.read_text()

    def wait_for(self, text):
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while text not in self.text():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < give_up_s, self.text()
            time.sleep(0.2)

    def note(self):
        """Remember its processes and their shared memory."""
        self.processes = psutil.Process(self.process.pid).children(recursive=True)
        self.segments = {path for process in self.processes for path in mapped_segments(process.pid)}

    def assert_nothing_is_left(self):
        assert [process for process in self.processes if alive(process)] == []
        assert [path for path in self.segments if os.path.exists(path)] == []


def alive(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def launch(no_cluster, tmp_path):
    launches = []

    def start(*options):
        launches.append(Launch(tmp_path, *options))
        return launches[-1]

    yield start
    for started in launches:
        started.process.kill()
        started.process.wait()


def test_launch_prints_a_curl_line_that_works_and_ends_with_ctrl_c(launch):
    launcher = launch("--flowprefill")
    launcher.wait_for("\ncurl ")
    curl = next(line for line in launcher.text().splitlines() if line.startswith("curl "))
    if shutil.which("curl"):
        answer = json.loads(subprocess.run(shlex.split(curl), capture_output=True, check=True).stdout)
        assert answer["usage"]["completion_tokens"] == 16
    assert sorted(path.name for path in launcher.logs.iterdir()) == ["decode.log", "gateway.log", "prefill.log"]
    launcher.note()
    assert len(launcher.processes) > 6
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.process.wait(20) == 128 + signal.SIGINT
    launcher.assert_nothing_is_left()


def test_a_server_that_dies_takes_the_others_along_and_shows_its_last_lines(launch):
    launcher = launch()
    launcher.wait_for("\ncurl ")
    launcher.note()
    victim = next(process for process in launcher.processes if process.name() == "sglang::scheduler")
    victim.kill()
    assert launcher.process.wait(20) == 1
    assert f"process {victim.pid} of the " in launcher.text()
    assert "The last lines of " in launcher.text()
    launcher.assert_nothing_is_left()


def test_a_server_that_cannot_start_shows_why(launch, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "llama"}')
    launcher = launch("--model-path", str(model))
    assert launcher.process.wait(START_TIMEOUT_S) == 1
    assert "server has ended" in launcher.text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_launcher_that_is_ended_while_it_starts_leaves_nothing(launch, number):
    launcher = launch("--flowprefill")
    launcher.wait_for("starting the prefill and decode servers")
    time.sleep(5)
    launcher.note()
    launcher.process.send_signal(number)
    assert launcher.process.wait(20) == 128 + number
    launcher.assert_nothing_is_left()
