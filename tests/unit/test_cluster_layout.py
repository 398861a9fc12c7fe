"""What a cluster is made of, as the command line asks for it: addresses, ports, CPUs and GPUs of each server."""

from itertools import pairwise

import pytest

from sgl_flowprefill.cluster import Ports, StartError, cli, machine, preflight
from sgl_flowprefill.cluster.commands import last_value


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "gpu_count", lambda: 0)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 64 * 10**9)
    monkeypatch.chdir(tmp_path)


def options_of(layout, role, index):
    options = layout.server_options(role, index)
    return dict(pairwise(options))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "127.0.0.1"])
def test_on_one_machine_only_the_gateway_listens_on_the_host(host):
    layout = preflight.prepare(cli.parse(["--host", host, "--ports", "0"]))
    for role in ("prefill", "decode"):
        assert options_of(layout, role, 0)["--host"] == "127.0.0.1"
        assert layout.server_env(role)["SGLANG_HOST_IP"] == "127.0.0.1"
        assert layout.server_url(role).startswith("http://127.0.0.1:")
    assert dict(pairwise(layout.gateway_command(29999)))["--host"] == host
    assert layout.url.startswith("http://[::1]:" if host == "::" else "http://127.0.0.1:")


def test_servers_that_join_listen_on_the_host():
    config = cli.parse(["--role", "prefill", "--join", "http://127.0.0.1:1", "--host", "0.0.0.0"])
    layout = preflight.prepare(config)
    assert options_of(layout, "prefill", 0)["--host"] == "0.0.0.0"
    assert "SGLANG_HOST_IP" not in layout.server_env("prefill")


def test_unified_servers_can_share_a_gpu(monkeypatch):
    monkeypatch.setattr(machine, "gpu_count", lambda: 1)
    share = ["--device", "cuda", "--base-gpu-id", "0", "--mem-fraction-static", "0.4"]
    layout = preflight.prepare(cli.parse(["--unified", "2", "--port", "0", *share]))
    assert [options_of(layout, *server)["--base-gpu-id"] for server in layout.servers] == ["0", "0"]


@pytest.mark.parametrize("flowprefill", [True, False])
def test_several_unified_servers_stand_behind_a_gateway(monkeypatch, flowprefill):
    monkeypatch.setattr(machine, "gpu_count", lambda: 4)
    switch = ["--flowprefill", "--flowprefill-event-log", "out/events.jsonl"] if flowprefill else []
    options = [*switch, "--unified", "2", "--tp", "2", "--host", "0.0.0.0", "--ports", "0,29200", "--api-key", "secret"]
    options += ["--device", "cuda"]
    layout = preflight.prepare(cli.parse([*options, "--gateway-args", "--policy cache_aware"]))
    assert layout.servers == [("unified", 0), ("unified", 1)]
    assert not layout.is_single
    servers = [options_of(layout, role, index) for role, index in layout.servers]
    assert [server["--port"] for server in servers] == ["29200", "29201"]
    assert [server["--base-gpu-id"] for server in servers] == ["0", "2"]
    assert {server["--host"] for server in servers} == {"127.0.0.1"}
    assert not [option for option in layout.server_options("unified", 1) if "disaggregation" in option]
    envs = [layout.server_env(role, index) for role, index in layout.servers]
    logs = [env.get("FLOWPREFILL_EVENT_LOG") for env in envs]
    assert logs == (["out/events-unified-0.jsonl", "out/events-unified-1.jsonl"] if flowprefill else [None, None])
    assert [env.get("FLOWPREFILL") for env in envs] == (["1", "1"] if flowprefill else [None, None])
    gateway = layout.gateway_command(29999)
    assert "--worker-urls http://127.0.0.1:29200 http://127.0.0.1:29201 --host 0.0.0.0" in " ".join(gateway)
    assert "--pd-disaggregation" not in gateway
    assert "--retry-max-retries 4" in " ".join(gateway)
    assert " ".join(gateway).endswith("--policy cache_aware")
    assert layout.url == f"http://127.0.0.1:{layout.ports.gateway}"
    assert f"{layout.url}/v1/completions" in layout.curl()
    assert ("tbt_slo" in layout.curl()) == flowprefill
    assert {env["FLOWPREFILL_API_KEY"] for env in (*envs, layout.gateway_env())} == {"secret"}
    commands = [layout.server_command(role, index) for role, index in layout.servers]
    assert "secret" not in repr([*commands, gateway]) + layout.curl() + repr(layout.config)


def test_a_single_unified_server_has_no_gateway_however_it_is_asked_for():
    alone, counted = (cli.parse([*options, "--port", "29123"]) for options in (["--unified"], ["--unified", "1"]))
    assert alone == counted
    assert not alone.has_gateway
    assert options_of(preflight.prepare(alone), "unified", 0)["--port"] == "29123"
    several = cli.parse(["--unified", "2", "--port", "29123"])
    assert several.has_gateway
    assert several.ports == Ports(gateway=29123)


def test_a_gateway_of_unified_servers_waits_for_them_to_join(monkeypatch):
    layout = preflight.prepare(cli.parse(["--role", "gateway", "--unified", "--ports", "0"]))
    command = layout.gateway_command(29999)
    assert not layout.servers
    assert {"--pd-disaggregation", "--worker-urls", "--disable-retries"} & set(command) == set()
    pair = preflight.prepare(cli.parse(["--role", "gateway", "--ports", "0"])).gateway_command(29999)
    assert "--pd-disaggregation" in pair

    monkeypatch.setattr(machine, "gpu_count", lambda: 2)
    join = ["--role", "unified", "--unified", "2", "--join", "http://localhost:1", "--ports", "29300"]
    joined = preflight.prepare(cli.parse(join))
    assert [joined.server_url(role, index).rpartition(":")[2] for role, index in joined.servers] == ["29300", "29301"]
    assert options_of(joined, "unified", 0)["--host"] in ("127.0.0.1", "::1")
    assert (joined.config.has_gateway, joined.config.is_one_server) == (False, False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "127.0.0.1"])
def test_a_unified_server_listens_where_clients_are_told_to_send_their_requests(host):
    layout = preflight.prepare(cli.parse(["--unified", "--host", host, "--port", "0"]))
    assert layout.servers == [("unified", 0)]
    options = options_of(layout, "unified", 0)
    assert options["--host"] == host
    assert layout.url == layout.server_url("unified")
    assert layout.url.endswith(f":{options['--port']}")
    assert not [option for option in layout.server_options("unified") if "disaggregation" in option]
    assert layout.is_single


@pytest.mark.parametrize("flowprefill", [True, False])
def test_a_unified_server_gets_what_a_prefill_server_gets(flowprefill):
    switch = ["--flowprefill"] if flowprefill else []
    asked = ["--flowprefill-max-suspended", "3", "--api-key", "secret"]
    unified = preflight.prepare(cli.parse([*switch, "--unified", "--port", "0", *asked]))
    pair = preflight.prepare(cli.parse([*switch, "--ports", "0", *asked]))
    ours, prefill = unified.server_env("unified"), pair.server_env("prefill")
    for between_servers in ("SGLANG_HOST_IP", "UCX_NET_DEVICES"):
        prefill.pop(between_servers)
    assert ours == prefill
    assert ours.get("FLOWPREFILL") == ("1" if flowprefill else None)
    assert "FLOWPREFILL_SCHEDULER_CPUS" in ours
    assert ("tbt_slo" in unified.curl()) == flowprefill
    assert "tbt_slo" not in pair.curl()
    assert "secret" not in unified.curl() + repr(unified.server_command("unified"))


def test_a_unified_server_has_its_ranks_in_cpus_and_gpus(monkeypatch):
    layout = preflight.prepare(cli.parse(["--unified", "--port", "0", "--tp", "2"]))
    assert layout.server_env("unified")["FLOWPREFILL_SCHEDULER_CPUS"].count("|") == 1
    monkeypatch.setattr(machine, "gpu_count", lambda: 2)
    layout = preflight.prepare(cli.parse(["--unified", "--port", "0", "--tp", "2", "--device", "cuda"]))
    assert layout.gpus_needed() == 2
    assert options_of(layout, "unified", 0)["--base-gpu-id"] == "0"


@pytest.mark.parametrize(
    ("gpus", "options", "device"),
    [
        (0, [], "the CPU in float32, as no NVIDIA GPU is visible"),
        (0, ["--model-path", "MODEL"], "the CPU in float32, as no NVIDIA GPU is visible"),
        (2, [], "the CPU in float32, as the embedded model is for CPUs; name another with --model-path"),
        (2, ["--device", "cpu"], "the CPU in float32"),
        (2, ["--model-path", "MODEL", "--device", "cpu", "--dtype", "bfloat16"], "the CPU in bfloat16"),
        (2, ["--model-path", "MODEL"], "GPU"),
        (2, ["--device", "cuda"], "GPU"),
    ],
)
def test_the_device_is_chosen_and_named(gpus, options, device, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "gpu_count", lambda: gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    (tmp_path / "config.json").write_text("{}")
    options = [str(tmp_path) if option == "MODEL" else option for option in options]
    layout = preflight.prepare(cli.parse(["--ports", "0", *options]))
    assert layout.device() == device
    on_cpu = device != "GPU"
    for role in ("prefill", "decode"):
        env = layout.server_env(role)
        assert env["CUDA_VISIBLE_DEVICES"] == ("" if on_cpu else "0,1")
        assert env.get("SGLANG_PLATFORM") == ("flowprefill_cpu" if on_cpu else None)


@pytest.mark.parametrize("given", [[], ["--model-path", "MODEL"]])
def test_a_decode_server_without_gpus_has_places_for_all_requests_that_a_policy_is_to_see(given, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    given = [str(tmp_path) if option == "MODEL" else option for option in given]
    layout = preflight.prepare(cli.parse(["--ports", "0", *given]))
    places = ("--max-running-requests", "--max-total-tokens")
    running, kv_tokens = (last_value(layout.server_options("decode"), name) for name in places)
    assert int(running) >= 4096
    assert kv_tokens == (None if given else str(1 << 20)), "the embedded model's alone is known to fit"
    assert not {*places} & {*layout.server_options("prefill")}

    own = "--max-running-requests 7 --max-total-tokens 9000"
    layout = preflight.prepare(cli.parse(["--ports", "0", *given, "--decode-args", own]))
    assert [last_value(layout.server_options("decode"), name) for name in places] == ["7", "9000"]


def test_each_server_has_ports_gpus_and_an_event_log_of_its_own(monkeypatch):
    monkeypatch.setattr(machine, "gpu_count", lambda: 4)
    config = cli.parse(
        ["--flowprefill", "--prefill", "2", "--decode", "2", "--ports", "0,29100,29200,29300", "--device", "cuda",
         "--flowprefill-event-log", "out/events.jsonl"]
    )  # fmt: skip
    layout = preflight.prepare(config)
    servers = [options_of(layout, role, index) for role, index in layout.servers]
    assert [server["--port"] for server in servers] == ["29100", "29101", "29200", "29201"]
    assert [server["--base-gpu-id"] for server in servers] == ["0", "1", "2", "3"]
    assert [server["--disaggregation-bootstrap-port"] for server in servers[:2]] == ["29300", "29301"]
    logs = [layout.server_env(role, index)["FLOWPREFILL_EVENT_LOG"] for role, index in layout.servers]
    names = ("prefill-0", "prefill-1", "decode-0", "decode-1")
    assert logs == [f"out/events-{name}.jsonl" for name in names]
    gateway = " ".join(layout.gateway_command(29999))
    assert "--prefill http://127.0.0.1:29100 29300 --prefill http://127.0.0.1:29101 29301" in gateway
    assert "--decode http://127.0.0.1:29200 --decode http://127.0.0.1:29201" in gateway
    assert "--retry-max-retries 4" in gateway


def test_one_prefill_and_one_decode_server_are_not_numbered_and_nothing_is_tried_again():
    layout = preflight.prepare(cli.parse(["--flowprefill-event-log", "events.jsonl", "--flowprefill", "--ports", "0"]))
    assert [layout.name(role, index) for role, index in layout.servers] == ["prefill", "decode"]
    assert layout.server_env("prefill")["FLOWPREFILL_EVENT_LOG"] == "events.jsonl"
    assert layout.server_env("decode")["FLOWPREFILL_EVENT_LOG"] == "events-decode.jsonl"
    assert "--disable-retries" in layout.gateway_command(29999)


def test_a_server_that_joins_listens_where_the_gateway_reaches_it():
    layout = preflight.prepare(cli.parse(["--role", "decode", "--join", "http://localhost:30000/"]))
    assert layout.server_url("decode").startswith(("http://127.0.0.1:", "http://[::1]:"))
    assert layout.config.join == "http://localhost:30000"


def test_several_prefill_schedulers_share_the_cpus():
    plan = machine.plan_cpus(range(8))
    assert [plan.scheduler_of(index, 2) for index in range(2)] == [(0, 1), (2, 3)]
    assert [plan.scheduler_of(index, 3) for index in range(3)] == [(0,), (1,), (2,)]
    assert [plan.scheduler_of(index, 5) for index in range(5)] == [(0,), (1,), (2,), (3,), (0,)]
    assert plan.scheduler_of(0, 1) == plan.scheduler
    assert (plan.decode_threads(1), plan.decode_threads(2), plan.decode_threads(4)) == (2, 1, 1)


@pytest.mark.parametrize(
    ("cpus", "ranks", "servers", "schedulers", "others"),
    [
        (1, 1, 2, [(0,), (0,)], (0,)),
        (2, 1, 2, [(0,), (0,)], (1,)),
        (3, 1, 2, [(0,), (1,)], (2,)),
        (4, 1, 3, [(0,), (1,), (2,)], (3,)),
        (4, 2, 2, [(0,), (1,)], (2, 3)),
        (8, 1, 3, [(0,), (1,), (2,)], (3, 4, 5, 6, 7)),
        (8, 1, 2, [(0, 1), (2, 3)], (4, 5, 6, 7)),
        (8, 2, 3, [(0, 1), (2, 3), (4, 5)], (6, 7)),
    ],
)
def test_each_unified_scheduler_has_cpus_of_its_own_as_far_as_there_are_some(cpus, ranks, servers, schedulers, others):
    plan = machine.plan_cpus(range(cpus), ranks, servers)
    assert [plan.scheduler_of(index, servers) for index in range(servers)] == schedulers
    assert plan.others == others


def test_unified_servers_of_a_machine_without_gpus_are_given_these_cpus(monkeypatch):
    monkeypatch.setattr(machine, "usable_cpus", lambda: [0, 1, 2, 3])
    layout = preflight.prepare(cli.parse(["--flowprefill", "--unified", "3", "--port", "0"]))
    given = [layout.server_env(role, index)["FLOWPREFILL_SCHEDULER_CPUS"] for role, index in layout.servers]
    assert given == ["0", "1", "2"]
    assert layout.cpus.others == (3,)


@pytest.mark.parametrize(
    ("cpus", "ranks", "scheduler", "others"),
    [
        ([3], 1, (3,), (3,)),
        ([0, 1], 1, (0,), (1,)),
        ([0, 1, 2], 1, (0,), (1, 2)),
        (range(8), 1, (0, 1, 2, 3), (4, 5, 6, 7)),
        ([3], 2, (3,), (3,)),
        ([0, 1], 2, (0, 1), (0, 1)),
        ([0, 1, 2], 2, (0, 1), (2,)),
        (range(8), 2, (0, 1, 2, 3), (4, 5, 6, 7)),
    ],
)
def test_prefill_has_cpus_of_its_own(cpus, ranks, scheduler, others):
    plan = machine.plan_cpus(cpus, ranks)
    assert (plan.scheduler, plan.others) == (scheduler, others)


def test_tensor_parallel_ranks_share_the_schedulers_cpus():
    assert machine.shares(machine.plan_cpus(range(8), 2).scheduler, 2) == [(0, 1), (2, 3)]
    assert machine.shares(machine.plan_cpus([0, 1], 2).scheduler, 2) == [(0,), (1,)]
    assert machine.shares(machine.plan_cpus([3], 2).scheduler, 2) == [(3,), (3,)]


@pytest.mark.parametrize("options", [["--tp", "2"], ["--tp-size=2"], ["--tensor-parallel-size", "2"]])
def test_tensor_parallel_servers_get_cpus_by_rank_and_gpus_one_after_the_other(options, monkeypatch):
    layout = preflight.prepare(cli.parse(["--flowprefill", "--ports", "0", *options]))
    assert layout.server_env("prefill")["FLOWPREFILL_SCHEDULER_CPUS"].count("|") == 1
    monkeypatch.setattr(machine, "gpu_count", lambda: 4)
    layout = preflight.prepare(cli.parse(["--flowprefill", "--ports", "0", "--device", "cuda", *options]))
    command = layout.server_options("decode")
    assert command[command.index("--base-gpu-id") + 1] == "2"


@pytest.fixture
def config_file(tmp_path):
    def write(text, name="sglang.yaml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def on_gpus(*options):
    return preflight.prepare(cli.parse(["--ports", "0", "--device", "cuda", *options]))


def gpus_of(layout):
    return [last_value(layout.server_options(*server), "--base-gpu-id") for server in layout.servers]


@pytest.mark.parametrize("name", ["tensor-parallel-size", "tp-size", "tp", "pipeline-parallel-size"])
@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_servers_whose_config_file_asks_for_several_gpus_share_none(monkeypatch, config_file, name, form):
    monkeypatch.setattr(machine, "gpu_count", lambda: 4)
    config = form.format(config_file(f"{name}: 2"))
    assert gpus_of(on_gpus(*config.split())) == ["0", "2"]
    layout = on_gpus("--prefill-args", config)
    assert gpus_of(layout) == ["0", "2"]
    assert layout.gpus_needed() == 3
    with pytest.raises(StartError, match="decode-1 need 8 GPUs and there are 4"):
        on_gpus("--decode", "2", "--prefill", "2", *config.split())


@pytest.mark.parametrize(
    ("options", "gpus"),
    [
        (["--tensor-parallel", "2"], ["0", "2"]),
        (["--tp-s=2"], ["0", "2"]),
        (["--prefill-args", "--pipeline-par 2 --tensor-par 2"], ["0", "4"]),
        (["--tp", "4", "--prefill-args", "--tensor-par 1"], ["0", "1"]),
        (["--dp-size", "2"], ["0", "2"]),
        (["--data-par", "2", "--tp", "2"], ["0", "4"]),
        (["--tp", "2", "--dp-size", "2", "--enable-dp-attention"], ["0", "2"]),
    ],
)
def test_gpus_are_dealt_by_what_sglang_makes_of_the_options(monkeypatch, options, gpus):
    monkeypatch.setattr(machine, "gpu_count", lambda: 8)
    assert gpus_of(on_gpus(*options)) == gpus


def test_cpus_are_dealt_by_what_sglang_makes_of_the_options():
    layout = preflight.prepare(cli.parse(["--flowprefill", "--ports", "0", "--tensor-par", "2"]))
    assert layout.ranks("prefill") == 2
    assert layout.server_env("prefill")["FLOWPREFILL_SCHEDULER_CPUS"].count("|") == 1


def test_options_of_one_server_count_together_when_they_are_given_several_times():
    for name in ("prefill", "decode", "gateway"):
        config = cli.parse(["--ports", "0", f"--{name}-args", "--one 'a b'", f"--{name}-args=--two"])
        assert getattr(config, f"{name}_args") == ["--one", "a b", "--two"]


@pytest.mark.parametrize(
    ("listed", "options", "expected"),
    [
        ("one, two", ["--flowprefill"], {"one", "two", "flowprefill"}),
        ("flowprefill", ["--flowprefill"], {"flowprefill"}),
        ("", ["--flowprefill"], set()),  # SGLang loads all
        ("one", [], {"one"}),
    ],
)
def test_flowprefill_is_among_the_plugins_that_sglang_is_told_to_load(monkeypatch, listed, options, expected):
    monkeypatch.setenv("SGLANG_PLUGINS", listed)
    layout = preflight.prepare(cli.parse([*options, "--ports", "0"]))
    for role in ("prefill", "decode"):
        names = layout.server_env(role)["SGLANG_PLUGINS"].split(",")
        assert {name.strip() for name in names if name.strip()} == expected


@pytest.mark.parametrize(
    "refusing", [["--flowprefill-overload", "shed"], ["--flowprefill-max-queued-tokens", "default:1000"], []]
)
@pytest.mark.parametrize(
    ("servers", "may_refuse"),
    [
        (["--unified", "2", "--flowprefill"], True),
        (["--unified", "2"], False),  # SGLang's scheduler has no use for the options
        (["--role", "gateway", "--unified", "--flowprefill"], True),
        (["--role", "gateway", "--unified"], True),  # it says nothing of the servers that will join
        (["--prefill", "2"], False),
    ],
)
def test_a_gateway_tries_again_unless_servers_refuse_requests(servers, may_refuse, refusing):
    layout = preflight.prepare(cli.parse([*servers, "--ports", "0", *refusing]))
    command = layout.gateway_command(29999)
    assert ("--disable-retries" in command) == (may_refuse and bool(refusing))
    assert ("--retry-max-retries" in command) != ("--disable-retries" in command)


@pytest.mark.parametrize(("options", "grace_s"), [([], "120"), (["--drain-timeout-s", "1.5"], "2")])
def test_a_gateway_has_as_long_for_its_requests_as_the_launcher_waits(options, grace_s):
    command = preflight.prepare(cli.parse(["--ports", "0", *options])).gateway_command(29999)
    assert last_value(command, "--shutdown-grace-period-secs") == grace_s


def test_a_config_file_says_where_a_server_computes(monkeypatch, config_file):
    monkeypatch.setattr(machine, "gpu_count", lambda: 1)
    layout = preflight.prepare(cli.parse(["--ports", "0", "--config", config_file("device: cpu\ndtype: bfloat16")]))
    assert layout.device() == "the CPU in bfloat16"
    shared = config_file("base-gpu-id: 0\nmem-fraction-static: 0.4")
    layout = on_gpus("--decode-args", f"--config {shared}")
    assert gpus_of(layout) == ["0", "0"]


def test_options_of_the_command_line_win_over_those_of_a_config_file(monkeypatch, config_file):
    monkeypatch.setattr(machine, "gpu_count", lambda: 8)
    file = config_file("tp: 4")
    for options in (["--tp", "2", "--config", file], ["--config", file, "--tp-size=2"]):
        assert gpus_of(on_gpus(*options)) == ["0", "2"]
    options = ["--config", file, "--prefill-args", "--tp 1"]
    assert gpus_of(on_gpus(*options)) == ["0", "1"]


def test_what_else_a_config_file_has_is_in_no_command_line(config_file):
    file = config_file("admin-api-key: secret\ntp: 2")
    layout = preflight.prepare(cli.parse(["--ports", "0", "--config", file]))
    command = layout.server_command("prefill")
    assert command[command.index("--config") + 1] == file
    assert "secret" not in repr(command)
    options = preflight.read_options(layout.server_options("prefill"))
    assert (options.admin_api_key, options.tp_size) == ("secret", 2)


def test_the_launcher_says_what_its_servers_start_with_though_it_has_not_been_compared(capsys):
    together = ["--enable-lora", "--tp", "2"]
    preflight.prepare(
        cli.parse(["--flowprefill", "--unified", "--flowprefill-uncompared", "true", "--ports", "0", *together])
    )
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("launch.py: ")]
    assert line.startswith("launch.py: --enable-lora with --tp-size 2 has not been compared")
