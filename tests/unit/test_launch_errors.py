"""What launch.py refuses before it starts a server: one line on stderr and exit code 2."""

import json
import signal
import socket
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from sgl_flowprefill.cluster import Ports, StartError, cli, free_ports, logs, machine, preflight
from tests.http_server import answering

pytestmark = pytest.mark.usefixtures("no_server_may_start")


@pytest.fixture
def busy_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("place", range(4))
def test_a_port_in_use(refusal, busy_port, place):
    ports = ["0"] * 4
    ports[place] = str(busy_port)
    assert f"port {busy_port}" in refusal("--ports", ",".join(ports))


def test_a_live_port_in_use(refusal, busy_port):
    for servers in ([], ["--unified", "2"], ["--role", "prefill", "--join", "http://127.0.0.1:1"]):
        line = refusal("--flowprefill", *servers, "--ports", "0", "--live-port", str(busy_port))
        assert f"--live-port {busy_port} is in use; name another port, or 0 for any free one" in line
    with pytest.raises(AssertionError, match="a server was about to start"):
        cli.main(["--ports", "0", "--live-port", str(busy_port)])  # without FlowPrefill there is no page


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--ports", "29555"], "gateway"),
        (["--ports", "0,0,29555"], "decode"),
        (["--ports", "0,29554", "--prefill", "2"], "prefill"),
        (["--ports", "0,29554", "--unified", "2"], "unified"),
        (["--ports", "0,0,0,29554", "--prefill", "2"], "bootstrap"),
    ],
)
def test_a_live_port_that_a_server_is_to_have(refusal, options, name):
    line = refusal("--flowprefill", *options, "--live-port", "29555")
    assert f"--live-port 29555 is a port of the servers ({name}), too; name another port, or 0 for any free one" in line


def test_no_server_gets_the_port_of_the_live_page(monkeypatch):
    monkeypatch.setattr(free_ports, "FREE_PORTS", range(29550, 29555))
    ports = free_ports.choose_ports("127.0.0.1", Ports(), live=29552)
    assert set(vars(ports).values()) == {29550, 29551, 29553, 29554, 0}, "and none for servers that there are not"


@pytest.mark.parametrize("ports", ["x", "1,2,3,4,5", "70000", "-1", "29001,29001", ""])
def test_ports_that_are_none(refusal, ports):
    assert "--ports" in refusal(f"--ports={ports}")


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid"])
def test_an_address_that_is_not_ours(refusal, host):
    assert host in refusal("--host", host)


def test_one_gpu_for_two_servers(refusal, monkeypatch):
    monkeypatch.setattr(machine, "gpu_count", lambda: 1)
    assert "need 2 GPUs and there is 1" in refusal("--flowprefill", "--device", "cuda")
    assert "need 4 GPUs and there is 1" in refusal("--flowprefill", "--device", "cuda", "--tp", "2")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--flowprefill-max-suspended", "many"], "--flowprefill-max-suspended many"),
        (["--flowprefill-max-suspended=-1"], "--flowprefill-max-suspended -1"),
        (["--flowprefill-default-ttft-slo", "nan"], "--flowprefill-default-ttft-slo"),
        (["--flowprefill-default-ttft-slo"], "expected one argument"),
    ],
)
def test_a_wrong_flowprefill_option(refusal, options, text):
    assert text in refusal("--flowprefill", *options)


@pytest.mark.parametrize("in_the_way", ["logs", "logs/decode.log"])
def test_logs_that_cannot_be_written(refusal, tmp_path, in_the_way):
    folder, path = tmp_path / "logs", tmp_path / in_the_way
    path.touch() if path == folder else path.mkdir(parents=True)
    line = refusal("--ports", "0", "--log-dir", str(folder))
    assert f"the log {folder}/" in line
    assert "cannot be written (" in line
    assert "name another directory with --log-dir" in line


@pytest.mark.parametrize("name", ["decode", "gateway"])
def test_the_logs_of_another_launcher_that_runs(refusal, tmp_path, name):
    log = tmp_path / "out" / "logs" / f"{name}.log"
    with logs.held(log):
        log.write_text("a line of the other's")
        line = refusal("--ports", "0")
        assert f"another launcher that is running has its log in out/logs/{name}.log" in line
        assert "give this one another directory with --log-dir" in line
        assert log.read_text() == "a line of the other's"
    with pytest.raises(AssertionError, match="a server was about to start"):
        cli.main(["--ports", "0"])


def test_launchers_in_one_directory_whose_logs_differ_run_beside_each_other(tmp_path):
    with logs.held(tmp_path / "out/logs/prefill.log"), pytest.raises(AssertionError, match="a server was about to st"):
        cli.main(["--role", "gateway", "--ports", "0"])


def test_a_misspelt_option_in_the_environment(refusal, monkeypatch):
    monkeypatch.setenv("FLOWPREFILL_PORT_30000_TCP_ADDR", "10.0.0.1")  # of a Kubernetes service
    assert "FLOWPREFILL_PORT" not in refusal("--flowprefill", "--pp-size", "2")
    monkeypatch.setenv("FLOWPREFILL_MAX_SUSPEND", "3")
    assert "FLOWPREFILL_MAX_SUSPEND=3 in the environment is no option; FLOWPREFILL_MAX_SUSPENDED is" in refusal(
        "--flowprefill"
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--pp-size", "2"], "--pp-size 2 cannot work with FlowPrefill"),
        (["--enable-unified-memory"], "--enable-unified-memory cannot work with FlowPrefill"),
        (["--prefill-args", "--enable-lora --tp 2"], "--enable-lora with --tp-size 2 is refused by FlowPrefill"),
        (["--no-such-option"], "--no-such-option"),
        (["--decode-args", "--max-total-tokens many"], "--max-total-tokens"),
        (["--port", "30000"], "--port cannot be passed on to a server: use --ports"),
        (["--prefill-args", "--disaggregation-mode=null"], "--disaggregation-mode cannot be passed on"),
        (["--decode-args", "--api-key secret"], "--api-key cannot be passed on to a server: use --api-key of the"),
        (["--ssl-certfile=cert.pem"], "--ssl-certfile: servers and gateway speak plain HTTP here; use a proxy"),
        (["--enable-ssl-refresh"], "--enable-ssl-refresh: servers and gateway speak plain HTTP"),
        (["--gateway-args", "--tls-cert-path cert.pem"], "--tls-cert-path: servers and gateway speak plain HTTP"),
        (["--gateway-args", "--host 0.0.0.0"], "--host cannot be passed on to the gateway: use --host of the launcher"),
        (["--gateway-args", "--port=1"], "--port cannot be passed on to the gateway: use --ports of the launcher"),
        (["--gateway-args", "--worker-urls http://a"], "--worker-urls cannot be passed on to the gateway: use"),
        (["--gateway-args", "--prefill http://a 1"], "--prefill cannot be passed on to the gateway: use --prefill N"),
        (["--gateway-args", "--decode http://a"], "--decode cannot be passed on to the gateway: use --decode N, or"),
        (["--gateway-args", "--api-key secret"], "--api-key cannot be passed on to the gateway: use --api-key of the"),
        (["--nnodes", "2"], "--nnodes 2: launch.py starts the servers of this machine alone"),
        (["--nnode=2"], "on each node, run `FLOWPREFILL=1 sglang serve …`"),
        (["--decode-args", "--tp 16 --nnodes 2"], "tell the gateway of node 0 with POST /workers"),
        (["--prefill-args", "--tp '2"], "--prefill-args --tp '2: no closing quotation"),
        (["--decode-args", 'a"'], '--decode-args a": no closing quotation'),
        (["--gateway-args", "a\\"], "--gateway-args a\\: no escaped character"),
        (["--flowprefill-overload", "shed"], "are for servers that prefill and decode (--unified): the clients"),
        (["--flowprefill-max-queued-tokens", "default:9"], "are for servers that prefill and decode (--unified)"),
    ],
)
def test_an_sglang_option_that_cannot_work(refusal, options, text):
    assert text in refusal("--flowprefill", "--ports", "0", *options)


@pytest.mark.parametrize("option", ["--chunked-prefill-size 2048", "--schedule-policy lpm", "--tokenizer-worker-num 4"])
def test_what_flowprefill_sets_itself_is_not_refused(option):
    config = cli.parse(["--flowprefill", "--ports", "0", "--prefill-args", option])
    assert preflight.prepare(config).server_options("prefill")[-2:] == option.split()


@pytest.mark.parametrize("line", ["api-key: secret", "ssl-certfile: cert.pem"])
def test_a_config_file_with_a_key_or_a_certificate(refusal, tmp_path, line):
    (tmp_path / "config.yaml").write_text(line)
    text = refusal("--decode-args", f"--config {tmp_path / 'config.yaml'}")
    assert "the decode server's --config sets api-key or ssl-certfile" in text


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("missing.yaml", None, "Config file not found"),
        ("file.json", "{}", "must be YAML"),
        ("list.yaml", "- tp", "must contain a dictionary"),
        ("broken.yaml", "tp: [\n2", "while parsing"),
        ("number.yaml", "5: 2", "'int' object"),
        ("folder.yaml", None, "Is a directory"),
    ],
)
@pytest.mark.parametrize("role", ["all", "prefill"])
def test_a_config_file_that_cannot_be_read(refusal, caplog, tmp_path, name, text, reason, role):
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    elif name.startswith("folder"):
        file.mkdir()
    options = ["--config", str(file)] if role == "all" else ["--prefill-args", f"--config {file}"]
    line = refusal("--ports", "0", *options)
    assert f"--config {file}: " in line
    assert reason in line
    assert line.endswith("; a server takes one YAML file of SGLang's options")
    assert not caplog.records, "which would be more lines"


def test_a_config_file_that_asks_for_several_nodes(refusal, tmp_path):
    (tmp_path / "nodes.yaml").write_text("nnodes: 2")
    for options in (["--config", "nodes.yaml"], ["--prefill-args", "--config=nodes.yaml"]):
        assert "--nnodes 2: launch.py starts the servers of this machine alone" in refusal("--ports", "0", *options)


def test_a_plugin_that_sglang_does_not_find(refusal, monkeypatch):
    monkeypatch.setattr(preflight, "entry_points", lambda **which: ())
    line = refusal("--flowprefill", "--ports", "0")
    assert "SGLang finds no plugin flowprefill (entry point of the group sglang.srt.plugins)" in line
    assert "run `pip install .` in the folder of sgl-flowprefill" in line
    with pytest.raises(AssertionError, match="a server was about to start"):
        cli.main(["--ports", "0"])


def test_a_platform_of_another_package_that_keeps_the_plugin_from_being_loaded(refusal, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(machine, "gpu_count", lambda: 2)
    monkeypatch.setenv("SGLANG_PLATFORM", "other")
    options = ["--ports", "0", "--model-path", str(tmp_path)]
    assert "SGLANG_PLATFORM=other keeps SGLang from loading the plugins" in refusal("--flowprefill", *options)
    with pytest.raises(AssertionError, match="a server was about to start"):
        cli.main(options)


def test_a_second_config_file_of_a_server(refusal, tmp_path):
    for name in ("one.yaml", "two.yaml"):
        (tmp_path / name).write_text("enable-metrics: true")
    options = ["--config", "one.yaml", "--prefill-args", "--config two.yaml"]
    assert "a server takes one YAML file of SGLang's options" in refusal("--ports", "0", *options)


def test_the_same_options_are_fine_for_sglangs_own_scheduler():
    config = cli.parse(["--ports", "0", "--prefill-args", "--chunked-prefill-size 2048"])
    assert preflight.prepare(config).server_options("prefill")[-2:] == ["--chunked-prefill-size", "2048"]


def test_free_ports_are_chosen_where_none_is_given(busy_port):
    ports = free_ports.choose_ports("127.0.0.1", Ports())
    chosen = {ports.gateway, ports.prefill, ports.decode, ports.bootstrap}
    assert len(chosen) == 4
    assert 0 not in chosen
    with pytest.raises(StartError):
        free_ports.choose_ports("127.0.0.1", Ports(gateway=busy_port))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--prefill", "0"], "argument --prefill: expected a number of servers, got 0"),
        (["--decode", "two"], "argument --decode: expected a number of servers, got two"),
        (["--join", "http://127.0.0.1:1"], "--join needs --role prefill, decode or unified"),
        (["--startup-timeout-s", "0"], "argument --startup-timeout-s: expected seconds above 0, got 0"),
        (["--startup-timeout-s", "long"], "argument --startup-timeout-s: expected seconds above 0, got long"),
        (["--drain-timeout-s", "-1"], "argument --drain-timeout-s: expected seconds, 0 or more, got -1"),
        (["--drain-timeout-s", "long"], "argument --drain-timeout-s: expected seconds, 0 or more, got long"),
        (["--role", "router"], "argument --role: invalid choice: 'router'"),
        (["--role", "prefill"], "--role prefill needs --join URL"),
        (["--role", "decode", "--join", "gateway:30000"], "--join gateway:30000: expected a gateway's URL such as"),
        (["--role", "decode", "--join", "http://"], "--join http://: expected a gateway's URL"),
        (["--role", "decode", "--join", "http://no.such.host.invalid"], "--join http://no.such.host.invalid: "),
        (["--role", "decode", "--join", "http://10.0.0..1:30000"], "--join http://10.0.0..1:30000: "),
        (["--host", "10.0.0..1"], "--host 10.0.0..1: no such address"),
        (["--role", "prefill", "--join", "http://127.0.0.1:1", "--decode", "2"], "--role prefill takes no --decode"),
        (["--role", "gateway", "--join", "http://127.0.0.1:1"], "--role gateway takes no --join"),
        (["--role", "gateway", "--tp", "2"], "--role gateway starts no SGLang server, got --tp 2"),
        (
            ["--role", "prefill", "--join", "http://127.0.0.1:1", "--ports", "1,2"],
            "--ports 1,2: --role prefill takes the port of its first server only",
        ),
        (
            ["--role", "prefill", "--join", "http://203.0.113.7:1", "--host", "127.0.0.1"],
            "--host 127.0.0.1: the gateway at http://203.0.113.7:1 cannot reach that address; use ",
        ),
        (["--prefill", "2", "--ports", "29400,29401,29402"], "port 29402 (decode): "),
    ],
)
def test_a_fleet_that_cannot_work(refusal, options, text):
    assert text in refusal(*options)


@pytest.mark.parametrize(
    ("status", "text"), [(404, "what answers there is no gateway"), (401, "the gateway asks for the --api-key")]
)
def test_a_gateway_that_cannot_be_joined(refusal, status, text):
    with answering(lambda path, headers: (status, "{}")) as url:
        assert f"--join {url}: {text}" in refusal("--role", "decode", "--join", url)


@pytest.mark.parametrize(
    ("url", "is_here", "can_be_reached"),
    [
        ("http://127.0.0.1:29100", False, False),
        ("http://[::1]:29100", False, False),
        ("http://localhost:29100", False, False),
        ("http://10.1.2.4:29100", False, True),
        ("http://127.0.0.1:29100", True, True),
    ],
)
def test_a_gateway_whose_servers_only_its_own_machine_reaches(refusal, monkeypatch, url, is_here, can_be_reached):
    monkeypatch.setattr(machine, "address_towards", lambda host, port: "203.0.113.7")
    monkeypatch.setattr(machine, "is_here", lambda host: is_here)
    workers = json.dumps({"workers": [{"worker_type": "decode", "url": url}]})
    with answering(lambda path, headers: (200, workers)) as gateway:
        line = refusal("--role", "prefill", "--join", gateway)
    if can_be_reached:
        assert "--host 203.0.113.7: this machine does not have that address" in line
    else:
        assert f"--join {gateway}: the gateway has decode servers that listen on its own machine only" in line
        assert "where those at 203.0.113.7 cannot reach them; start that gateway with --role gateway" in line
        assert "or join with an address of the gateway's machine that others reach (--host)" in line


@pytest.mark.parametrize(
    ("role", "there", "is_here", "can_reach"),
    [
        ("prefill", {"worker_type": "decode", "url": "http://10.1.2.4:29100"}, False, False),
        ("decode", {"worker_type": "prefill", "url": "http://10.1.2.4:29100"}, False, False),
        ("prefill", {"worker_type": "prefill", "url": "http://10.1.2.4:29100"}, False, True),
        ("prefill", {"worker_type": "decode", "url": "http://10.1.2.4:29100"}, True, True),
        ("prefill", {"worker_type": "decode", "url": "http://127.0.0.1:29100"}, False, True),
        ("prefill", {"worker_type": "decode"}, False, True),
    ],
)
def test_a_server_that_only_its_own_machine_reaches(refusal, monkeypatch, role, there, is_here, can_reach):
    monkeypatch.setattr(machine, "is_here", lambda host: is_here)
    with answering(lambda path, headers: (200, json.dumps({"workers": [there]}))) as gateway:
        options = ["--role", role, "--join", gateway]
        if can_reach:
            assert preflight.prepare(cli.parse(options)).config.join == gateway
            return
        line = refusal(*options)
    assert f"--join {gateway}: the gateway has {there['worker_type']} servers on other machines, which cannot" in line
    assert "reach those at 127.0.0.1; join with an address of the gateway's machine that others reach (--host)" in line


def test_this_machine_is_known_by_its_addresses():
    assert all(machine.is_here(host) for host in ("127.0.0.1", "127.0.0.2", "localhost"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("203.0.113.7", 1))
        except OSError:
            pytest.skip("this machine has no network")
        assert machine.is_here(probe.getsockname()[0])
    assert not machine.is_here("203.0.113.7")
    assert not machine.is_here("10.0.0..1")


def test_memory_for_every_server(refusal, monkeypatch):
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 8 * 10**9)
    assert "prefill-0, prefill-1 and decode of this model need about" in refusal("--prefill", "2")


def test_gpus_for_every_server(refusal, monkeypatch):
    monkeypatch.setattr(machine, "gpu_count", lambda: 3)
    options = ["--prefill", "2", "--decode-args", "--tp 2", "--device", "cuda"]
    assert "prefill-0, prefill-1 and decode need 4 GPUs and there are 3" in refusal(*options)


def test_the_ports_of_servers_are_free_where_they_listen(refusal):
    port = free_ports.free_port("127.0.0.1")
    with socket.create_server(("127.0.0.2", port)):
        cli.preflight.prepare(cli.parse(["--host", "127.0.0.2", "--ports", f"0,{port}"]))
        assert f"port {port} (gateway)" in refusal("--host", "127.0.0.2", "--ports", str(port))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--prefill", "2"], "--unified starts one server and takes no --prefill: leave one of the two out"),
        (["--decode", "1"], "--unified starts one server and takes no --decode: leave one of the two out"),
        (["--prefill-args", "--tp 2"], "takes no --prefill-args: give SGLang's options as they are"),
        (["--decode-args", "--tp 2"], "takes no --decode-args: give SGLang's options as they are"),
        (["--gateway-args", "--policy random"], "takes no --gateway-args: it has no gateway"),
        (["--join", "http://127.0.0.1:1"], "--join needs --role prefill, decode or unified"),
        (["--ports", "1,2"], "--ports 1,2: --unified takes one port number, at most 65535"),
        (["--port", "70000"], "--port 70000: --unified takes one port number"),
        (["--port", "1", "--ports", "2"], "--port 1 and --ports 2: give one of them"),
        (["--disaggregation-mode", "null"], "--disaggregation-mode cannot be passed on to a server: use nothing"),
        (["--ssl-certfile=cert.pem"], "--ssl-certfile: the server speaks plain HTTP here; use a proxy in front of it"),
        (["--api-key", "one", "--api-key-file", "two"], "give one of them"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_what_a_unified_server_has_no_use_for(refusal, options, text):
    assert text in refusal("--unified", *options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--unified", "0"], "argument --unified: expected a number of servers, got 0"),
        (["--unified", "two"], "argument --unified: expected a number of servers, got two"),
        (["--unified", "2", "--prefill", "1"], "--unified 2 starts unified servers and takes no --prefill: leave one"),
        (["--unified", "2", "--decode-args", "--tp 2"], "takes no --decode-args: give SGLang's options as they are"),
        (["--unified", "2", "--ports", "1,2,3"], "--ports 1,2,3: expected up to 2 port numbers, GATEWAY,UNIFIED"),
        (["--unified", "2", "--ports", "29001,29001"], "--ports 29001,29001: each server needs a port of its own"),
        (["--unified", "2", "--ports", "29401,29400"], "port 29401 (unified): 2 servers count up from 29400"),
        (["--unified", "2", "--port", "70000"], "--port 70000: --unified takes one port number, at most 65535"),
        (["--unified", "2", "--lora-backend", "ascend"], "--lora-backend ascend cannot work with FlowPrefill"),
        (["--unified", "2", "--dp-size", "2"], "launch.py has --prefill N and --unified N"),
        (["--unified", "2", "--ssl-certfile=c"], "--ssl-certfile: servers and gateway speak plain HTTP here; use a"),
        (
            ["--unified", "2", "--flowprefill-overload", "shed", "--tp", "2", "--attn-dp-size", "2"],
            "--flowprefill-max-queued-tokens cannot work with data-parallel attention yet: the rank that decides knows",
        ),
        (["--role", "unified"], "--role unified needs --join URL, the gateway's (python launch.py --role gateway --un"),
        (["--role", "prefill", "--unified", "--join", "http://127.0.0.1:1"], "--role prefill takes no --unified"),
        (["--role", "unified", "--decode", "1", "--join", "http://127.0.0.1:1"], "--role unified takes no --decode"),
        (["--role", "gateway", "--unified", "2"], "--unified 2: --role gateway starts no server; --unified without"),
    ],
)
def test_a_fleet_of_unified_servers_that_cannot_work(refusal, options, text):
    assert text in refusal("--flowprefill", *options)


@pytest.mark.parametrize(("gpus", "options", "fewer"), [(1, [], 1), (3, ["--tp", "2"], 1), (5, ["--tp", "2"], 2)])
def test_too_few_gpus_for_every_unified_server(refusal, monkeypatch, gpus, options, fewer):
    monkeypatch.setattr(machine, "gpu_count", lambda: gpus)
    options = [*options, "--device", "cuda"]
    line = refusal("--unified", "3", *options)
    assert "unified-0, unified-1 and unified-2 need" in line
    assert f"and there {'is' if gpus == 1 else 'are'} {gpus}; start fewer (--unified {fewer})" in line
    assert "let them share with --base-gpu-id 0 --mem-fraction-static 0.4, or serve with --device cpu" in line
    preflight.prepare(cli.parse(["--unified", str(fewer), "--port", "0", *options]))


def test_ports_in_use_of_unified_servers(refusal, busy_port):
    for ports, name in ((f"{busy_port}", "gateway"), (f"0,{busy_port}", "unified")):
        line = refusal("--unified", "2", "--ports", ports)
        assert f"port {busy_port} ({name}) is in use; choose another with --ports GATEWAY,UNIFIED" in line


@pytest.mark.parametrize(
    ("role", "there", "text"),
    [
        ("unified", ["prefill", "decode"], "the gateway has decode and prefill servers and would send no request here; "
         "join one that was started with --role gateway --unified"),
        ("unified", ["regular", "decode"], "the gateway has decode servers and would send no request here"),
        ("prefill", ["regular"], "the gateway has unified servers and would send no request here; join one that was"),
    ],
)  # fmt: skip
def test_a_gateway_of_servers_of_another_kind_cannot_be_joined(refusal, role, there, text):
    workers = json.dumps({"workers": [{"worker_type": kind} for kind in there]})
    with answering(lambda path, headers: (200, workers)) as url:
        assert f"--join {url}: {text}" in refusal("--role", role, "--join", url)


@pytest.mark.parametrize(("role", "there"), [("unified", ["regular"]), ("decode", ["prefill", "decode"])])
def test_a_gateway_of_servers_of_the_same_kind_can_be_joined(role, there):
    workers = json.dumps({"workers": [{"worker_type": kind} for kind in there]})
    with answering(lambda path, headers: (200, workers)) as url:
        assert preflight.prepare(cli.parse(["--role", role, "--join", url])).config.join == url


def test_a_port_in_use_of_a_unified_server(refusal, busy_port):
    assert f"port {busy_port} is in use; choose another with --ports PORT" in refusal(
        "--unified", "--port", str(busy_port)
    )


def test_too_few_gpus_for_a_unified_server(refusal, monkeypatch):
    monkeypatch.setattr(machine, "gpu_count", lambda: 1)
    line = refusal("--unified", "--tp", "2", "--device", "cuda")
    assert "the unified server needs 2 GPUs and there is 1; give a smaller --tp, or serve with --device cpu" in line


def test_a_profile_is_measured_on_one_rank(capsys):
    from sgl_flowprefill.cluster import profile_command

    for options in (["--tp", "2"], ["--prefill-args", "--tp=2"]):
        assert profile_command.main(options) == 2
        assert "with --tp 2 measures its profile itself" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["profile_command", "doctor_command"])
def test_ctrl_c_ends_profile_and_doctor_without_a_traceback(monkeypatch, capsys, command):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"sgl_flowprefill.cluster.{command}.main", interrupt)
    assert cli.main([command.removesuffix("_command")]) == 128 + signal.SIGINT
    assert capsys.readouterr().out == "\nstopped\n"


def test_an_installed_package_has_the_launcher_as_a_command():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    entry_point = EntryPoint("sgl-flowprefill", project["scripts"]["sgl-flowprefill"], "console_scripts")
    assert entry_point.load() is cli.main
