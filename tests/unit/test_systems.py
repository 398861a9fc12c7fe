"""The table of systems: names, selection, and settings that SGLang and FlowPrefill take."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgl_flowprefill.bench.__main__ import main
from sgl_flowprefill.bench.simulator.cost import LLAMA_8B
from sgl_flowprefill.bench.simulator.instance import Machine
from sgl_flowprefill.bench.simulator.systems import Setup, new_instance
from sgl_flowprefill.bench.systems.catalog import CHUNKS, ORDERS, SYSTEMS, UNCHUNKED_FCFS, select
from sgl_flowprefill.bench.systems.serving import Servers
from sgl_flowprefill.config import FlowPrefillConfig


def test_every_system_can_be_simulated_and_says_why_it_is_there() -> None:
    assert len([system for system in SYSTEMS.values() if system.is_stock]) == len(ORDERS) * len(CHUNKS) + 1
    for system in SYSTEMS.values():
        new_instance(system.simulated(FlowPrefillConfig()), Setup(Machine(LLAMA_8B, 10_000)))
        assert system.why


def test_what_is_simulated_is_what_the_options_ask_for() -> None:
    edf = FlowPrefillConfig(policy="edf")
    assert SYSTEMS["flowprefill"].simulated(FlowPrefillConfig()) == "feasible/operator"
    assert SYSTEMS["flowprefill"].simulated(edf) == "edf/operator"
    assert SYSTEMS["flowprefill-layer"].simulated(edf) == "edf/layer"
    assert SYSTEMS["flowprefill-s-edf"].simulated(edf) == "s-edf/operator"
    assert SYSTEMS["stock-spf-512"].simulated(edf) == "stock-spf-512"


def test_settings_are_accepted_by_those_who_read_them() -> None:
    from sglang.srt.server_args import ServerArgs  # type: ignore[import-untyped]

    from sgl_flowprefill.cluster.preflight import _Parser

    parser = _Parser(add_help=False)
    ServerArgs.add_cli_args(parser)
    for system in SYSTEMS.values():
        parsed = parser.parse_args(["--model-path", "x", *system.stock_args])
        if system.name.startswith("stock-"):
            chunk = system.name.rpartition("-")[2]
            assert parsed.chunked_prefill_size == (int(chunk) if chunk.isdigit() else -1)
        assert parsed.enable_priority_scheduling == system.wants_priority
        if system.options is not None:
            FlowPrefillConfig.parse(system.options)


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
