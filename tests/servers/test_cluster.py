"""The cluster serves through its gateway, and ends as a whole."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import requests

from sgl_flowprefill import paths
from sgl_flowprefill.cluster import phases
from sgl_flowprefill.cluster.guard import SHM, look, mapped_segments
from tests.namespaces import PrivateMemory, unshare
from tests.processes import alive, still_alive
from tests.reference import TOKENS
from tests.stopwatch import Stopwatch

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 400
SLO = {"custom_params": {"ttft_slo": 5.0}}


def post(cluster, path, **body):
    response = requests.post(cluster.url + path, json={"model": "embedded", **body}, timeout=120)
    assert response.ok, response.text
    return response


def events(response):
    """Server-sent events of a streamed answer."""
    data = [line.removeprefix(b"data: ") for line in response.content.splitlines() if line.startswith(b"data: ")]
    assert data[-1] == b"[DONE]"
    return [json.loads(line) for line in data[:-1]]


PROMPT = " bake lomi tura"


class Answers:
    """Streamed or not, they are those of transformers."""

    def test_generate(self, cluster, comparison):
        params = {"max_new_tokens": TOKENS, "temperature": 0, **SLO}
        body = {"text": PROMPT, "sampling_params": params, "return_logprob": True}
        whole = post(cluster, "/generate", **body).json()
        streamed = events(post(cluster, "/generate", **body, stream=True))
        assert whole["meta_info"]["completion_tokens"] == TOKENS
        assert len(streamed) > 1
        assert streamed[-1]["text"] == whole["text"]
        comparison.generated("whole", PROMPT, whole["meta_info"])
        comparison.generated("streamed", PROMPT, streamed[-1]["meta_info"])
        comparison.text("text", PROMPT, whole["text"], None)
        assert_compared(comparison, answers=3, logprobs=2)

    def test_completions(self, cluster, comparison):
        body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, **SLO}
        whole = post(cluster, "/v1/completions", **body, logprobs=1).json()
        streamed = events(post(cluster, "/v1/completions", **body, stream=True))
        assert whole["usage"]["completion_tokens"] == TOKENS
        choice = whole["choices"][0]
        assert "".join(event["choices"][0]["text"] for event in streamed) == choice["text"]
        comparison.text("whole", PROMPT, choice["text"], choice["logprobs"]["token_logprobs"])
        assert_compared(comparison, answers=1, logprobs=1)

    def test_chat_completions(self, cluster, comparison):
        messages = [{"role": "user", "content": "bake lomi tura"}]
        body = {"messages": messages, "max_tokens": TOKENS, "temperature": 0, **SLO}
        whole = post(cluster, "/v1/chat/completions", **body, logprobs=True).json()
        streamed = events(post(cluster, "/v1/chat/completions", **body, stream=True))
        assert whole["usage"]["completion_tokens"] == TOKENS
        choice = whole["choices"][0]
        deltas = [event["choices"][0]["delta"].get("content") or "" for event in streamed]
        assert "".join(deltas) == choice["message"]["content"]
        comparison.chat("whole", messages, choice)
        assert_compared(comparison, answers=1, logprobs=1)

    def test_the_prefill_scheduler_has_its_cpus_to_itself(self, cluster):
        if cluster.cpus is None:
            pytest.skip("a machine with GPUs")
        for name, pid in cluster.processes.items():
            server = psutil.Process(pid)
            for process in (server, *server.children(recursive=True)):
                scheduler = name in ("prefill", "unified") and "scheduler" in process.name()
                expected = cluster.cpus.scheduler if scheduler else cluster.cpus.others
                assert tuple(process.cpu_affinity()) == expected, (name, process)


def assert_compared(comparison, answers, logprobs):
    """So many answers were compared, ``logprobs`` of them with their log probabilities, and none differs."""
    comparison.assert_same()
    assert comparison.counts["tokens"] == TOKENS * answers
    assert comparison.counts["log probabilities"] == TOKENS * logprobs


class TestFlowPrefill(Answers):
    @pytest.fixture
    def cluster(self, flowprefill_cluster):
        return flowprefill_cluster


@pytest.mark.stress
class TestSGLangsOwnScheduler(Answers):
    @pytest.fixture
    def cluster(self, stock_cluster):
        return stock_cluster


class TestFlowPrefillOnOneServer(Answers):
    @pytest.fixture
    def cluster(self, unified_server):
        return unified_server


class TestSGLangsOwnSchedulerOnOneServer(Answers):
    @pytest.fixture
    def cluster(self, stock_unified_server):
        return stock_unified_server


class Launch:
    """``launch.py`` as a process. It is not hung up on, whatever the tests were started under, unless it is to be."""

    def __init__(self, directory, *options, memory=None, env=None, under_nohup=False):
        self.logs = directory / "logs"
        self.output = directory / "output"
        self.memory = memory
        command = [sys.executable, "launch.py", "--ports", "0", "--log-dir", str(self.logs), *options]
        if memory is not None:
            command = [*memory.prefix, *command]
        on_hangup = signal.SIG_IGN if under_nohup else signal.SIG_DFL
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | (env or {}),
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: signal.signal(signal.SIGHUP, on_hangup),
            )

    def text(self):
        return self.output.read_text()

    def wait_for(self, text):
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while text not in self.text():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < give_up_s, self.text()
            time.sleep(0.2)

    def curl_line(self):
        self.wait_for("\ncurl ")
        return next(line for line in self.text().splitlines() if line.startswith("curl "))

    def note(self):
        """Remember its processes, their shared memory and their directories for temporary files."""
        self.processes = psutil.Process(self.process.pid).children(recursive=True)
        self.segments = {inode for process in self.processes for inode in mapped_segments(process.pid)}
        self.directories = {process.environ().get("TMPDIR", "") for process in self.processes} - {""}

    @property
    def servers(self):
        """The processes that lead a session of their own, but for the guard."""
        found = [(process, look(process.pid)) for process in self.processes if process != self.guard]
        return [process for process, now in found if now is not None and now.session == process.pid and now.is_alive]

    @property
    def guard(self):
        return next(process for process in self.processes if process.cmdline()[-1].endswith("guard.py"))

    def assert_nothing_is_left(self, timeout_s=0):
        assert still_alive(self.processes, timeout_s) == []
        assert [path for path in self.directories if os.path.exists(path)] == []
        if self.memory is None:
            assert [entry.path for entry in os.scandir(SHM) if entry.inode() in self.segments] == []
        else:
            assert self.memory.files() == []


@pytest.fixture
def launch(no_cluster, tmp_path):
    launches = []

    def start(*options, **how):
        launches.append(Launch(tmp_path, *options, **how))
        return launches[-1]

    yield start
    for started in launches:
        started.process.kill()
        started.process.wait()


@pytest.fixture
def private_memory(no_cluster, tmp_path, monkeypatch):
    """A /dev/shm and a /tmp where only what a test starts can leave something; None where nobody may have them."""
    monkeypatch.chdir(ROOT)
    try:
        unshare("--mount")
    except pytest.skip.Exception:
        yield None
        return
    with PrivateMemory(needed=[ROOT, Path(sys.prefix), paths.cache_dir()], shared=tmp_path) as memory:
        yield memory


KEY = "n0b0dy-shall-see-this"


def test_launch_prints_a_curl_line_that_works_keeps_its_key_and_ends_when_a_server_dies(launch, private_memory):
    launcher = launch(
        "--flowprefill", "--host", "0.0.0.0", memory=private_memory, env={"FLOWPREFILL_API_KEY": KEY}
    )  # fmt: skip
    curl = launcher.curl_line()
    command = ["sh", "-c", curl]
    if shutil.which("curl"):
        env = os.environ | {"FLOWPREFILL_API_KEY": KEY}
        answer = json.loads(subprocess.run(command, env=env, capture_output=True, check=True).stdout)
        assert answer["usage"]["completion_tokens"] == 16
    launcher.note()
    assert len(launcher.processes) > 6
    gateway_port = urlsplit(shlex.split(curl)[1]).port
    assert_closed_without_key(launcher.processes, gateway_port)
    assert_no_command_line_shows_the_key(launcher)
    assert_no_output_shows_the_key(launcher, "decode", "gateway", "prefill")
    assert_only_the_gateway_is_open(launcher.processes, gateway_port)
    assert_phases_are_told(launcher)
    victim = next(process for process in launcher.processes if process.name() == "sglang::scheduler")
    victim.kill()
    assert launcher.process.wait(20) == 1
    assert f"process {victim.pid} of the " in launcher.text()
    assert "The last lines of " in launcher.text()
    assert_no_output_shows_the_key(launcher, "decode", "gateway", "prefill")
    launcher.assert_nothing_is_left()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--flowprefill"], id="FlowPrefill"),
        pytest.param([], id="SGLang's own scheduler", marks=pytest.mark.stress),
    ],
)
def test_one_server_has_the_port_keeps_its_key_and_ends_with_its_launcher(launch, private_memory, options):
    launcher = launch(*options, "--unified", memory=private_memory, env={"FLOWPREFILL_API_KEY": KEY})
    curl = launcher.curl_line()
    url = shlex.split(curl)[1].removesuffix("/v1/completions")
    if shutil.which("curl"):
        env = os.environ | {"FLOWPREFILL_API_KEY": KEY}
        answer = subprocess.run(["sh", "-c", curl], env=env, capture_output=True, check=True).stdout
        assert json.loads(answer)["usage"]["completion_tokens"] == 16
    assert requests.post(f"{url}/generate", json={"text": "Hello"}, timeout=60).status_code == 401
    launcher.note()
    assert [process for process in launcher.processes if process.name().startswith("smg")] == []
    assert_no_command_line_shows_the_key(launcher)
    assert_no_output_shows_the_key(launcher, "unified")
    assert "waiting for the unified server (" in launcher.text()
    assert "on one server at http://127.0.0.1:" in launcher.text()
    end_and_assert_nothing_is_left(launcher, signal.SIGINT)


def assert_closed_without_key(processes, gateway_port):
    commands = [process.cmdline() for process in processes if "sglang.launch_server" in process.cmdline()]
    ports = [int(command[command.index("--port") + 1]) for command in commands]
    assert len(ports) == 2
    for port in (gateway_port, *ports):
        url = f"http://127.0.0.1:{port}/generate"
        assert requests.post(url, json={"text": "Hello"}, timeout=60).status_code == 401, port
        assert requests.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code == 200, port
    assert requests.get(f"http://127.0.0.1:{gateway_port}/readiness", timeout=60).status_code == 200


def assert_no_command_line_shows_the_key(launcher):
    everyone = [psutil.Process(launcher.process.pid), *launcher.processes]
    commands = [Path(f"/proc/{process.pid}/cmdline").read_bytes() for process in everyone]
    assert [command for command in commands if KEY.encode() in command] == []


def assert_no_output_shows_the_key(launcher, *names):
    assert KEY not in launcher.text()
    logs = sorted(launcher.logs.iterdir())
    assert [log.stem for log in logs] == sorted(names)
    assert [log.name for log in logs if KEY.encode() in log.read_bytes()] == []
    assert "'api_key': '***'" in (launcher.logs / f"{names[-1]}.log").read_text()


def assert_only_the_gateway_is_open(processes, gateway_port):
    listening = [
        (process.name(), connection.laddr.ip, connection.laddr.port)
        for process in processes
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN and not ip_address(connection.laddr.ip).is_loopback
    ]
    # The store of torch.distributed, one a scheduler, takes no address.
    others = [(name, ip) for name, ip, port in listening if port != gateway_port]
    assert sorted(others) == [("sglang::scheduler", "::")] * 2
    assert ("smg::router", "0.0.0.0", gateway_port) in listening


def assert_phases_are_told(launcher):
    told = [line for line in launcher.text().splitlines() if "waiting for the prefill server" in line]
    assert told
    waits = [line for line in launcher.text().splitlines() if "waiting for the " in line]
    assert [line for line in waits if "no connection" in line] == []
    names = {name for _, name in phases.PHASES}
    assert {line.split("; ")[1].rstrip(")") for line in told} <= names
    logs = [(launcher.logs / f"{name}.log").read_text() for name in ("prefill", "decode")]
    for marker, _ in phases.PHASES:
        elsewhere = "CUDA" in marker or "FlowPrefill measure" in marker  # on a GPU; where there is no profile yet
        assert elsewhere or all(marker in log for log in logs), marker


def test_a_server_that_cannot_start_shows_why(launch, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "llama"}')
    launcher = launch("--unified", "--model-path", str(model))
    assert launcher.process.wait(START_TIMEOUT_S) == 1
    assert "server has ended" in launcher.text()


ENDS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, "SIGKILL of the guard"]


END_S = 5.0
"""How long a cluster may take to end, however it ends."""


def end_and_assert_nothing_is_left(launcher, end):
    """End it in one of ENDS. Its servers are killed within END_S, also on a busy machine. All processes and what they
    had are gone within END_S, not counting the time for which some process of the machine waited for a CPU."""
    launcher.note()
    servers = launcher.servers
    watch = Stopwatch()
    if end == "SIGKILL of the guard":
        launcher.guard.kill()
    else:
        launcher.process.send_signal(end)
    while all(alive(server) for server in servers):
        assert watch.passed_s < END_S, f"{end!r}: no server was killed: {launcher.text()}"
        time.sleep(0.01)
    decided_s = watch.passed_s
    exit_code = launcher.process.wait(20)
    if end == "SIGKILL of the guard":
        assert exit_code == 1
        assert "guard has ended (killed by signal 9)" in launcher.text()
    else:
        assert exit_code == (-end if end == signal.SIGKILL else 128 + end)
    launcher.assert_nothing_is_left(timeout_s=20)
    took_s, waited_s = watch.passed_s, watch.waited_s
    took = f"{end!r}: killed after {decided_s:.1f} s, nothing is left after {took_s:.1f} s, {waited_s:.1f} s of waiting"
    print(took)
    assert took_s - waited_s < END_S, took


@pytest.mark.parametrize(
    "end",
    [pytest.param(end, marks=pytest.mark.stress) if end == signal.SIGHUP else end for end in ENDS],  # ends like SIGTERM
    ids=str,
)
def test_a_launcher_that_is_ended_while_it_starts_leaves_nothing(launch, private_memory, end):
    launcher = launch("--flowprefill", memory=private_memory)
    launcher.wait_for("starting the prefill and decode servers")
    time.sleep(5)
    end_and_assert_nothing_is_left(launcher, end)


@pytest.mark.stress
@pytest.mark.parametrize("end", ENDS, ids=str)
def test_a_launcher_that_is_ended_while_it_serves_leaves_nothing(launch, private_memory, end):
    launcher = launch("--flowprefill", memory=private_memory)
    launcher.curl_line()
    assert private_memory is None or len(private_memory.files()) > 4
    end_and_assert_nothing_is_left(launcher, end)


def test_a_launcher_under_nohup_goes_on_when_it_is_hung_up_on(launch):
    launcher = launch("--role", "gateway", under_nohup=True)
    launcher.wait_for("the gateway listens at")
    url = launcher.text().split("the gateway listens at ")[1].split(";")[0]
    launcher.process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert launcher.process.poll() is None
    assert requests.get(f"{url}/health", timeout=10).status_code == 200
    launcher.note()
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.process.wait(30) == 128 + signal.SIGTERM
    launcher.assert_nothing_is_left()
