"""The table of systems: names, selection, and settings that SGLang and FlowPrefill take."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgl_flowprefill.bench.__main__ import main
from sgl_flowprefill.bench.simulator.cost import LLAMA_8B
from sgl_flowprefill.bench.simulator.instance import Machine
from sgl_flowprefill.bench.simulator.stock import ORDERS as SIMULATED_ORDERS
from sgl_flowprefill.bench.simulator.systems import (
    Setup,
    SimulatedFlowPrefill,
    SimulatedStock,
    SimulatedUnified,
    SimulatedUnifiedStock,
)
from sgl_flowprefill.bench.systems.catalog import (
    BY_POLICY,
    CHUNKS,
    ORDERS,
    RIVAL,
    SYSTEMS,
    TUNING,
    UNCHUNKED_FCFS,
    UNIFIED_BY_POLICY,
    UNIFIED_STOCK,
    find,
    select,
    simulated,
    systems_page,
)
from sgl_flowprefill.bench.systems.serving import Servers, where_to_watch
from sgl_flowprefill.bench.systems.tuning import RECORD, UNTUNED, rival
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.policy import DecodeLimits
from sgl_flowprefill.provenance import result, write_result


def test_every_system_can_be_simulated_and_says_why_it_is_there() -> None:
    stock = [system.layout for system in SYSTEMS.values() if system.is_stock]
    assert stock.count("pair") == len(ORDERS) * len(CHUNKS) + 1
    assert stock.count("unified") == len(TUNING) + 1
    for system in SYSTEMS.values():
        simulated = system.simulated(FlowPrefillConfig())
        assert simulated is not None
        simulated.new_instance(Setup(Machine(LLAMA_8B, 10_000)))
        assert system.why
    assert set(ORDERS) == set(SIMULATED_ORDERS)


def test_what_is_simulated_is_what_the_options_ask_for() -> None:
    edf = FlowPrefillConfig(policy="edf")
    assert SYSTEMS["flowprefill"].simulated(FlowPrefillConfig()) == SimulatedFlowPrefill("feasible", "operator")
    assert SYSTEMS["flowprefill"].simulated(edf) == SimulatedFlowPrefill("edf", "operator")
    assert SYSTEMS["flowprefill-layer"].simulated(edf) == SimulatedFlowPrefill("edf", "layer")
    assert SYSTEMS["flowprefill-s-edf"].simulated(edf) == SimulatedFlowPrefill("s-edf", "operator")
    assert SYSTEMS["stock-spf-512"].simulated(edf) == SimulatedStock("spf", 512)
    assert SYSTEMS["sglang"].simulated(edf) == SimulatedStock("fcfs", 4096)
    assert BY_POLICY["s-edf/layer"].simulated(edf) == SimulatedFlowPrefill("s-edf", "layer")
    assert SYSTEMS["unified"].simulated(edf) == SimulatedUnified("edf", "operator")
    assert SYSTEMS["unified-chunk"].simulated(edf) == SimulatedUnified("edf", "chunk")
    assert find("unified-s-edf/layer").simulated(edf) == SimulatedUnified("s-edf", "layer")
    half = SYSTEMS["unified"].simulated(FlowPrefillConfig(max_decode_share=0.5))
    assert half == SimulatedUnified("feasible", limits=DecodeLimits(max_share=0.5))
    assert SYSTEMS["unified-sglang"].simulated(edf) == SimulatedUnifiedStock("fcfs", 4096)
    assert find("unified-stock-hrrn-640-mixed-interval-2").simulated(edf) == SimulatedUnifiedStock("hrrn", 640, True, 2)


def test_a_name_is_that_of_what_is_simulated_and_a_policy_alone_stands_for_the_finest_granularity() -> None:
    for name in ("feasible", "s-edf/layer", "edf/chunk", "stock-fcfs", "stock-hrrn-2048"):
        assert str(find(name).simulated(FlowPrefillConfig())) == find(name).name == name
    assert [system.name for system in select(["s-edf/layer", "feasible"])] == ["s-edf/layer", "feasible"]
    assert not set(BY_POLICY) & set(SYSTEMS)
    assert not set(UNIFIED_BY_POLICY) & set(SYSTEMS)
    for name in [*UNIFIED_BY_POLICY, *UNIFIED_STOCK]:
        assert name == f"unified-{simulated(name)}"
        assert find(name.removeprefix("unified-"), "unified") is find(name)


def test_settings_are_accepted_by_those_who_read_them() -> None:
    from sglang.srt.server_args import ServerArgs  # type: ignore[import-untyped]

    from sgl_flowprefill.cluster.preflight import SGLangParser

    parser = SGLangParser(add_help=False)
    ServerArgs.add_cli_args(parser)
    for system in SYSTEMS.values():
        parsed = parser.parse_args(["--model-path", "x", *system.prefill_args])
        if system.name.startswith("stock-"):
            chunk = system.name.rpartition("-")[2]
            assert parsed.chunked_prefill_size == (int(chunk) if chunk.isdigit() else -1)
        assert parsed.enable_priority_scheduling == system.wants_priority
        assert (system.config(FlowPrefillConfig()) is None) == system.is_stock
    for system in UNIFIED_STOCK.values():
        parsed = parser.parse_args(["--model-path", "x", *system.prefill_args])
        asked = system.simulation
        assert isinstance(asked, SimulatedUnifiedStock)
        assert parsed.chunked_prefill_size == (asked.chunk_tokens or -1)
        assert parsed.enable_mixed_chunk == asked.mixed
        assert (parsed.prefill_decode_interval or 0) == asked.interval
        assert not system.wants_priority or asked.order == "priority"


def test_servers_with_metrics_have_them_alike_and_that_with_flowprefill_can_be_watched() -> None:
    servers = Servers().with_metrics()
    ours, stock = (servers.cluster(SYSTEMS[name], Path("logs"), None) for name in ("flowprefill", "sglang"))
    assert ours.server_args == stock.server_args == ("--enable-metrics",)
    assert servers.with_metrics() == servers
    assert where_to_watch(ours, "http://here:1") == ["http://here:1/flowprefill", "http://here:1/metrics"]
    assert where_to_watch(stock, "http://here:1") == []
    without = Servers().cluster(SYSTEMS["flowprefill"], Path("logs"), None)
    assert where_to_watch(without, "http://here:1") == ["http://here:1/flowprefill"]


def test_only_the_prefill_scheduler_differs_between_clusters() -> None:
    servers = Servers(prefill_args=("--page-size", "1"), options=FlowPrefillConfig(max_suspended=3))
    ours = servers.cluster(SYSTEMS["flowprefill-layer"], Path("logs"), Path("events.jsonl"))
    stock = servers.cluster(SYSTEMS["stock-spf-512"], Path("logs"), None)
    assert (ours.options.granularity, ours.options.max_suspended) == ("layer", 3)
    assert ours.options.event_log
    assert ours.prefill_args == ("--page-size", "1")
    assert (ours.flowprefill, stock.flowprefill) == (True, False)
    spf = ("--schedule-policy", "shortest-prefill-first")
    assert stock.prefill_args == ("--page-size", "1", "--chunked-prefill-size", "512", *spf)


def test_a_unified_system_is_one_server_and_takes_no_options_of_others() -> None:
    servers = Servers(server_args=("--page-size", "1"), options=FlowPrefillConfig(max_suspended=3))
    ours = servers.cluster(SYSTEMS["unified"], Path("logs"), Path("events.jsonl"))
    stock = servers.cluster(find(RIVAL), Path("logs"), None)
    for config in (ours, stock):
        assert (config.prefill, config.decode, config.unified) == (0, 0, 1)
        assert config.prefill_args == config.decode_args == ()
    assert (ours.flowprefill, stock.flowprefill) == (True, False)
    assert ours.options.max_suspended == 3
    assert ours.server_args == ("--page-size", "1")
    assert stock.server_args == ("--page-size", "1", *find(RIVAL).prefill_args)
    for given in (Servers(prefill_args=("--tp", "2")), Servers(decode_args=("--tp", "2"))):
        with pytest.raises(ValueError, match=r"unified is one server and takes no --(prefill|decode)-args"):
            given.cluster(SYSTEMS["unified"], Path("logs"), None)


def test_unified_systems_that_are_not_listed_are_found_by_name_and_by_glob() -> None:
    assert select(["unified-stock-lpm-640"]) == [UNIFIED_STOCK["unified-stock-lpm-640"]]
    intervals = [system.name for system in select(["unified-stock-lpm-640-interval-*"])]
    assert intervals == [f"unified-stock-lpm-640-interval-{steps}" for steps in (1, 2, 4)]
    assert [system.name for system in select(["unified-stock-spf-512-*"])] == [
        "unified-stock-spf-512-mixed", "unified-stock-spf-512-mixed-interval-1",
        "unified-stock-spf-512-mixed-interval-2", "unified-stock-spf-512-interval-1",
        "unified-stock-spf-512-interval-2",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="can only be simulated"):
        select(["unified-feasible+ahead"])


def test_a_race_over_the_listed_settings_is_the_tuning() -> None:
    tuned = {system.name for system in select(["unified-sglang", "unified-stock-*"])}
    assert tuned == {"unified-sglang", *TUNING}
    for chunk_tokens in (256, 512, 1024, 2048):
        for interval in ("", "-interval-1", "-interval-2"):
            assert f"unified-stock-spf-{chunk_tokens}-mixed{interval}" in tuned
    assert {"unified-stock-hrrn-1024-mixed", "unified-stock-priority-1024-mixed"} < tuned


def test_the_rival_is_the_best_of_the_recorded_tuning(tmp_path: Path) -> None:
    record = tmp_path / "tuning.json"
    assert rival(record) == UNTUNED == select([UNTUNED])[0].name
    best = {"99": "unified-stock-hrrn-1024-mixed", "90": "unified-stock-spf-256-mixed"}
    write_result(record, result("goodput", {"best_stock": best}))
    assert rival(record) == "unified-stock-spf-256-mixed"
    write_result(record, result("goodput", {"best_stock": {"90": None}}))
    with pytest.raises(ValueError, match="names no best stock system"):
        rival(record)
    if RECORD.exists():
        assert select([rival()])[0].is_stock


def test_systems_are_selected_by_name_glob_and_comma_in_order() -> None:
    assert [system.name for system in select(["stock-spf-512,flowprefill"])] == ["stock-spf-512", "flowprefill"]
    unchunked = [system.name for system in select(["stock-fcfs", "stock-*-8192"])]
    assert unchunked[0] == UNCHUNKED_FCFS
    assert len(unchunked) == 1 + len(ORDERS)
    assert len(select(["all"])) == len(SYSTEMS)
    with pytest.raises(ValueError, match="no system is called 'stock-lifo'; --list-systems shows all"):
        select(["flowprefill", "stock-lifo"])


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["goodput", "--list-systems"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for name in ("flowprefill-s-edf", "stock-hrrn-2048"):
        assert name in printed


def test_the_page_of_systems_says_what_the_registry_has() -> None:
    page = Path(__file__).parents[2] / "docs" / "systems.md"
    assert page.read_text() == systems_page(), "python -m sgl_flowprefill.bench.systems > docs/systems.md"
    for name in [*SYSTEMS, *BY_POLICY, *UNIFIED_BY_POLICY]:
        assert f"`{name}`" in page.read_text()
