"""The benchmark's command line: options keep their names, wrong values are one line, and help does not wait."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from sgl_flowprefill.bench import __main__ as bench_main
from sgl_flowprefill.bench.__main__ import main
from sgl_flowprefill.bench.cli import fetch_trace
from sgl_flowprefill.bench.cli.options import (
    COMMANDS,
    Api,
    Breakdown,
    Command,
    Demo,
    Format,
    Goodput,
    OptionError,
    PublishedTrace,
    Replay,
    Router,
    Simulate,
    Uncontended,
    UnifiedDemo,
    UnifiedGoodput,
    UnifiedValidate,
    Validate,
    parse,
)
from sgl_flowprefill.bench.cli.requested import requested_servers
from sgl_flowprefill.bench.loadgen.client import APIS
from sgl_flowprefill.bench.simulator.cost import LLAMA_8B, MODELS
from sgl_flowprefill.bench.simulator.router import ROUTERS
from sgl_flowprefill.bench.systems.catalog import RIVAL, select
from sgl_flowprefill.bench.workloads.formats import AUTO, FORMATS
from sgl_flowprefill.bench.workloads.synthetic import QWEN_RATE_RPS
from sgl_flowprefill.bench.workloads.trace import Slo
from sgl_flowprefill.config import FlowPrefillConfig

SERVERS = "--model-path --server-args --prefill-args --decode-args"
TRACE = (
    "--trace --format --new-tokens-only --slo --seed --rate-scale --time-scale --duration --requests "
    "--max-prompt-tokens --max-output-tokens"
)
SEARCH = "--systems --list-systems --workload --seeds --duration --time-scale --max-output-tokens --out"
OPTIONS = {
    "demo": f"--unified --out --endpoint --systems --list-systems --png {TRACE} {SERVERS}",
    "goodput": f"{SEARCH} {SERVERS} --endpoint --attainment --budget-s --prefilter --race --compare --side-by-side "
    "--precision --png --unified --judge",
    "uncontended": "--unified --tokens --pairs --per-turn --seed --model-path --out",
    "breakdown": f"--tokens --repeats --seed --out {SERVERS}",
    "replay": f"--url --api --model --label --timeout --event-log --out --prompt-seed {TRACE}",
    "validate": f"{SEARCH} --loads {SERVERS}",
    "simulate": "--unified --goodput --plan --speed --policy --cost --layers --trace --rate --time-scale --requests "
    "--seeds --instances --router --attainment --max-suspended --max-batch-tokens --max-starvation-s --max-blocking-ms "
    "--lookahead --hub-us --bootstrap-ms --kv-tokens --link-gbps --prediction-error --prediction-bias "
    "--step-ms --step-ms-per-stream --step-error --no-prefix-cache --no-limit --out",
    "events": "--json",
    "fetch-trace": "--out",
}
FLOWPREFILL = [f"--flowprefill-{name.replace('_', '-')}" for name in FlowPrefillConfig.model_fields]


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_main, "run", lambda options: pytest.fail(f"{options} runs"))


@pytest.mark.parametrize("command", OPTIONS)
def test_options_keep_their_names(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    words = set(capsys.readouterr().out.split())
    assert set(OPTIONS[command].split()) <= words
    assert (set(FLOWPREFILL) <= words) == ("--server-args" in OPTIONS[command])


@pytest.mark.parametrize("command", COMMANDS, ids=[command.name for command in COMMANDS])
def test_the_examples_in_a_commands_help_are_understood(command: type, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.examples  # type: ignore[attr-defined]
    for line in command.examples:  # type: ignore[attr-defined]
        assert isinstance(parse([command.name, *shlex.split(line)]), command)  # type: ignore[attr-defined]
        with pytest.raises(SystemExit):
            main([command.name, "--help"])  # type: ignore[attr-defined]
        assert line in capsys.readouterr().out


def test_help_imports_nothing_that_takes_long() -> None:
    script = (
        "import sys; from sgl_flowprefill.bench.__main__ import main\n"
        "try: main(['goodput', '--help'])\n"
        "except SystemExit: print('IMPORTED', *sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    imported = said.rpartition("IMPORTED")[2].split()
    assert "tyro" in imported
    assert not {"torch", "sglang", "scipy", "numba", "plotly", "aiohttp", "lightgbm"} & set(imported)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["simulate", "--rate", "0"], "--rate 0.0: it has to be a positive number"),
        (["simulate", "--rate", "nan"], "--rate nan: it has to be a positive number"),
        (["simulate", "--seeds", "-1"], "--seeds -1: it has to be a positive number"),
        (["goodput", "--attainment", "0.9", "--attainment", "99"], "--attainment 99.0: it has to be a share"),
        (["goodput", "--time-scale", "-2"], "--time-scale -2.0: it has to be a positive number"),
        (["demo", "--slo", "text=fast"], "--slo text=fast: it has to be CLASS=TTFT[/TBT] in seconds"),
        (["demo", "--systems", "--png"], "--systems: name at least one (default flowprefill sglang)"),
        (["demo", "--requests", "0"], "--requests 0: it has to be a positive number"),
        (["replay", "--url", "http://x", "--prompt-seed", "-1"], "--prompt-seed -1: it has to be a whole number"),
        (["demo", "--seed", "-1"], "--seed -1: it has to be at least 0"),
        (["simulate", "--lookahead", "-1"], "--lookahead -1: it has to be at least 0"),
        (["uncontended", "--per-turn", "1"], "--per-turn 1: it has to be at least 2"),
        (["uncontended", "--tokens", "512", "0"], "--tokens 0: it has to be a positive number"),
    ],
)
def test_a_wrong_value_is_one_line_with_the_value_and_the_remedy(
    arguments: list[str], line: str, nothing_runs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert error.startswith(f"error: {line}")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["simulat"], "simulat"),
        ([], "fetch-trace"),
        (["simulate", "--sede", "3"], "--sede"),
        (["simulate", "--seeds", "many"], "many"),
        (["simulate", "--router", "random"], "round-robin"),
        (["simulate", "--goodput", "--plan"], "--goodput and --plan"),
        (["replay"], "--url"),
    ],
)
def test_what_is_not_understood_is_named_and_nothing_runs(
    arguments: list[str], named: str, nothing_runs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("requests", [1, 3], ids=["one request", "all at one time"])
@pytest.mark.parametrize(
    "command",
    [
        ("demo", "--trace"),
        ("demo", "--time-scale", "2", "--trace"),
        ("goodput", "--workload"),
        ("validate", "--workload"),
        ("simulate", "--trace"),
        ("simulate", "--rate", "5", "--trace"),
    ],
    ids=" ".join,
)
def test_a_trace_without_a_rate_is_refused_in_one_line_before_servers_start(
    command: tuple[str, ...],
    requests: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in ("bench.cli.demo", "bench.capacity.prober"):
        monkeypatch.setattr(f"sgl_flowprefill.{module}.serving", lambda *_, **__: pytest.fail("servers start"))
    monkeypatch.chdir(tmp_path)
    row = {"timestamp": 1000, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]}
    Path("trace.jsonl").write_text(requests * (json.dumps(row) + "\n"))
    assert main([*command, "trace.jsonl"]) == 2
    assert capsys.readouterr().err == "error: no request of trace.jsonl arrives after the first, so it has no rate\n"


def test_values_checked_in_an_object_are_those_checked_on_the_command_line() -> None:
    with pytest.raises(OptionError, match="--seeds 0"):
        Simulate(seeds=0)
    with pytest.raises(OptionError, match="--tokens -5"):
        Breakdown(tokens=(64, -5))
    assert parse(["goodput"]) == Goodput()
    assert parse(["uncontended", "--tokens", "64", "128", "--pairs", "3"]) == Uncontended(tokens=(64, 128), pairs=3)


def test_choices_are_those_that_there_are() -> None:
    assert get_args(Api) == tuple(APIS)
    assert get_args(Router) == tuple(ROUTERS)
    assert get_args(Format) == (AUTO, *FORMATS)
    assert get_args(PublishedTrace) == tuple(fetch_trace.TRACES)
    assert Simulate().cost == LLAMA_8B.name
    for command in COMMANDS:
        select(getattr(command, "systems", ()))


def test_the_help_names_the_machines_that_can_be_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["simulate", "--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in MODELS)


def test_the_help_names_the_rate_that_rates_are_multiples_of(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    assert f" {QWEN_RATE_RPS} " in " ".join(capsys.readouterr().out.replace("│", "").split())


def test_options_of_sglang_and_of_flowprefill_reach_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWPREFILL_LOOKAHEAD", "7")
    given = ["demo", "--prefill-args", "--tp 2", "--decode-args", "--skip", "--server-args=--page-size 16"]
    parsed = parse([*given, "--flowprefill-max-suspended", "3", "--slo", "text=0.5/0.1", "--slo", "file=9"])
    assert isinstance(parsed, Demo)
    servers = requested_servers(parsed.servers)
    assert servers.prefill_args == ("--tp", "2")
    assert servers.decode_args == ("--skip",)
    assert servers.server_args == ("--page-size", "16")
    assert (servers.options.max_suspended, servers.options.lookahead) == (3, 7)
    assert dict(parsed.trace.slo) == {"text": Slo(0.5, 0.1), "file": Slo(9.0, math.inf)}


def test_the_former_name_of_the_latency_breakdown_still_works() -> None:
    assert parse(["anatomy", "--repeats", "3"]) == Breakdown(repeats=3)


def test_unified_servers_have_defaults_of_their_own_and_what_is_given_stays() -> None:
    demo, goodput = parse(["demo", "--unified"]), parse(["goodput", "--unified"])
    assert demo == UnifiedDemo(unified=True)
    assert goodput == UnifiedGoodput(unified=True)
    validate = parse(["validate", "--unified"])
    assert validate == UnifiedValidate(unified=True)
    assert isinstance(validate, Validate)
    assert validate.out != Validate().out
    assert isinstance(demo, Demo)
    assert isinstance(goodput, Goodput)
    assert demo.out != Demo().out
    assert goodput.judge == "gaps"
    for systems in (demo.systems, goodput.systems, validate.systems):
        assert RIVAL in systems
        assert all(system.layout == "unified" for system in select(systems))
    assert not any(
        system.layout == "unified" for system in select((*Demo().systems, *Goodput().systems, *Validate().systems))
    )
    given = parse(["demo", "--systems", "flowprefill", "--unified", "--out", "mine", "--rate-scale", "3"])
    assert isinstance(given, UnifiedDemo)
    assert (given.systems, given.out.name, given.trace.rate_scale) == (("flowprefill",), "mine", 3.0)
    judged = parse(["goodput", "--unified", "--judge", "mean"])
    assert isinstance(judged, UnifiedGoodput)
    assert judged.judge == "mean"


@pytest.mark.parametrize("command", [UnifiedDemo, UnifiedGoodput, UnifiedValidate], ids=["demo", "goodput", "validate"])
def test_the_help_of_unified_servers_shows_their_defaults(
    command: type[Command], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command.name, "--unified", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert RIVAL in said
    for line in command.examples:
        assert isinstance(parse([command.name, *shlex.split(line)]), command)


def test_an_endpoint_is_all_that_a_replay_needs() -> None:
    assert parse(["replay", "--url", "http://x"]) == Replay(url="http://x")
