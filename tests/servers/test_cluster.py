"""The cluster serves through its gateway, and ends as a whole."""

import json
import signal
import time
from ipaddress import ip_address
from urllib.parse import urlsplit

import psutil
import pytest
import requests

from sgl_flowprefill.cluster import ClusterError, phases
from sgl_flowprefill.cluster.base import KEY_VARIABLE
from tests.launched import (
    DRAINED_S,
    ENDS,
    KEY,
    START_TIMEOUT_S,
    Launch,
    Remembered,
    assert_a_stream_outlives_sigterm,
    assert_curl_line_works,
    assert_no_output_shows_the_key,
    assert_nobody_sees_the_key,
    assert_phases_are_told,
    end_and_assert_nothing_is_left,
    is_guard,
    private_memory,
)
from tests.processes import still_alive
from tests.reference import TOKENS

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


@pytest.mark.stress
class TestSGLangsOwnSchedulerOnOneServer(Answers):
    @pytest.fixture
    def cluster(self, stock_unified_server):
        return stock_unified_server


@pytest.fixture
def launch(no_cluster, tmp_path):
    launches = []

    def start(*options, **how):
        launches.append(Launch(tmp_path, *options, **how))
        return launches[-1]

    yield start
    for started in launches:
        started.kill()


@pytest.fixture
def memory(no_cluster, tmp_path):
    with private_memory(tmp_path) as memory:
        yield memory


def test_it_is_told_what_servers_do_while_they_start(flowprefill_cluster, one_cluster):
    assert_phases_are_told(one_cluster.said, flowprefill_cluster.config.log_dir, "prefill", "decode")


def test_a_cluster_on_this_machine_alone_is_open_to_nobody_else(flowprefill_cluster):
    processes = [psutil.Process(pid) for pid in flowprefill_cluster.processes.values()]
    everyone = [*processes, *(child for process in processes for child in process.children(recursive=True))]
    assert_open(everyone, "127.0.0.1", urlsplit(flowprefill_cluster.url).port)


def test_a_cluster_ends_when_a_scheduler_dies_and_leaves_nothing(ending_cluster, one_cluster):
    processes = [psutil.Process(pid) for pid in ending_cluster.processes.values()]
    guards = [process for process in psutil.Process().children() if is_guard(process)]
    assert len(guards) == 1
    started = Remembered([*guards, *processes, *(one for each in processes for one in each.children(recursive=True))])
    assert len(started.processes) > 6
    victim = next(process for process in started.processes if process.name() == "sglang::scheduler")
    victim.kill()
    assert still_alive([victim], within_s=20) == []
    with pytest.raises(ClusterError, match="the prefill server has ended") as ended:
        ending_cluster.wait()
    assert_it_names(victim, str(ended.value))
    one_cluster.close()
    started.assert_nothing_is_left()


def assert_it_names(victim, text):
    """``text`` names the process that has ended first: itself, or in SGLang's last lines, where SGLang was faster."""
    assert "The last lines of " in text
    assert f"process {victim.pid} of the " in text or f"(pid={victim.pid}) crashed" in text


@pytest.mark.stress
def test_launch_prints_a_curl_line_that_works_keeps_its_key_and_ends_when_a_server_dies(launch, memory):
    launcher = launch("--flowprefill", "--host", "0.0.0.0", memory=memory, env={KEY_VARIABLE: KEY})
    assert_curl_line_works(launcher)
    started = launcher.remember()
    assert len(started.processes) > 6
    gateway_port = urlsplit(launcher.curl_url).port
    assert_closed_without_key(started.processes, gateway_port)
    assert_nobody_sees_the_key(launcher, "decode", "gateway", "prefill")
    assert_open(started.processes, "0.0.0.0", gateway_port)
    assert_phases_are_told(launcher.text().splitlines(), launcher.logs, "prefill", "decode")
    victim = next(process for process in started.processes if process.name() == "sglang::scheduler")
    victim.kill()
    assert launcher.process.wait(20) == 1
    assert_it_names(victim, launcher.text())
    assert_no_output_shows_the_key(launcher, "decode", "gateway", "prefill")
    started.assert_nothing_is_left(memory)


@pytest.mark.stress
def test_one_server_with_sglangs_own_scheduler_keeps_its_key_and_ends_with_its_launcher(launch, memory):
    """With FlowPrefill, tests/servers/test_unified_serving.py does the same."""
    launcher = launch("--unified", memory=memory, env={KEY_VARIABLE: KEY})
    assert_curl_line_works(launcher)
    url = launcher.curl_url.removesuffix("/v1/completions")
    assert requests.post(f"{url}/generate", json={"text": "Hello"}, timeout=60).status_code == 401
    assert_nobody_sees_the_key(launcher, "unified")
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


def assert_open(processes, host, gateway_port):
    """The gateway listens at ``host``, and no server is open to other machines."""
    listening = [
        (process.name(), connection.laddr.ip, connection.laddr.port)
        for process in processes
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert ("smg::router", host, gateway_port) in listening
    # The store of torch.distributed, one a scheduler, takes no address.
    others = [(name, ip) for name, ip, port in listening if port != gateway_port and not ip_address(ip).is_loopback]
    assert sorted(others) == [("sglang::scheduler", "::")] * 2


@pytest.mark.stress
def test_a_server_that_cannot_start_shows_why(launch, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "llama"}')
    launcher = launch("--unified", "--model-path", str(model))
    assert launcher.process.wait(START_TIMEOUT_S) == 1
    assert "server has ended" in launcher.text()


IN_THE_MIDDLE_S = 2.0
"""How long servers have been starting when something ends: they import SGLang then."""
LIKE_SIGTERM = (signal.SIGHUP, signal.SIGINT)
"""What also ends a launcher by an exception. SIGINT ends one that serves in tests/servers/test_unified_serving.py."""


def test_a_server_that_ends_while_it_starts_ends_its_launcher_which_shows_the_log(launch, memory):
    launcher = launch("--flowprefill", memory=memory)
    launcher.wait_for("starting the prefill and decode servers")
    log, line = launcher.logs / "decode.log", phases.importing("sglang.launch_server")
    while not log.exists() or line not in log.read_text():
        assert launcher.process.poll() is None
        time.sleep(0.1)
    started = launcher.remember()
    victim = next(server for server in started.servers if "decode" in server.cmdline())
    victim.kill()
    assert launcher.process.wait(20) == 1
    assert f"the decode server has ended (killed by signal 9). The last lines of {log}:\n" in launcher.text()
    assert line in launcher.text()
    started.assert_nothing_is_left(memory)


@pytest.mark.parametrize(
    "end",
    [pytest.param(end, marks=pytest.mark.stress) if end in LIKE_SIGTERM else end for end in ENDS],
    ids=str,
)
def test_a_launcher_that_is_ended_while_it_starts_leaves_nothing(launch, memory, end):
    launcher = launch("--flowprefill", memory=memory)
    launcher.wait_for("starting the prefill and decode servers")
    time.sleep(IN_THE_MIDDLE_S)
    end_and_assert_nothing_is_left(launcher, end)


@pytest.mark.stress
@pytest.mark.parametrize("end", ENDS, ids=str)
def test_a_launcher_that_is_ended_while_it_serves_leaves_nothing(launch, memory, end):
    launcher = launch("--flowprefill", memory=memory)
    launcher.curl_line()
    assert memory is None or len(memory.files()) >= 4  # there is something to leave behind
    end_and_assert_nothing_is_left(launcher, end, DRAINED_S if end == signal.SIGTERM else 0.0)


@pytest.mark.stress
def test_at_sigterm_a_stream_runs_to_its_end_through_the_gateway(launch, memory):
    launcher = launch("--flowprefill", memory=memory)
    url = launcher.curl_url.removesuffix("/v1/completions")
    assert_a_stream_outlives_sigterm(launcher, url)


def test_a_launcher_under_nohup_goes_on_when_it_is_hung_up_on(launch):
    launcher = launch("--role", "gateway", under_nohup=True)
    launcher.wait_for("the gateway listens at")
    url = launcher.text().split("the gateway listens at ")[1].split(";")[0]
    launcher.process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert launcher.process.poll() is None
    assert requests.get(f"{url}/health", timeout=10).status_code == 200
    started = launcher.remember()
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.process.wait(30) == 128 + signal.SIGTERM
    started.assert_nothing_is_left()
