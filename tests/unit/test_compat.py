"""Options of SGLang that cannot work with FlowPrefill are named in one sentence."""

from types import SimpleNamespace

import pytest

from sgl_flowprefill.compat import (
    REFUSED_ABOVE_ONE,
    REFUSED_ENVIRONMENT,
    REFUSED_ON_PREFILL_SERVERS,
    REFUSED_ON_UNIFIED_SERVERS,
    REFUSED_WHEN_SET,
    incompatible_option,
    take_over,
)

WORKS = {
    "disaggregation_mode": "prefill",
    "disaggregation_transfer_backend": "nixl",
    "disable_overlap_schedule": True,
    "cuda_graph_backend_prefill": "disabled",
    "chunked_prefill_size": -1,
    "schedule_policy": "fcfs",
    "device": None,
    "tp_size": 1,
}


def problem(**changes):
    return incompatible_option(SimpleNamespace(**(WORKS | changes)))


def test_what_the_launcher_passes_works():
    assert problem() is None


def test_what_flowprefill_sets_works_and_each_change_has_a_line():
    stock = SimpleNamespace(**(WORKS | {"disable_overlap_schedule": False, "chunked_prefill_size": None}))
    assert incompatible_option(stock) is not None
    lines = take_over(stock)
    assert lines[0] == "--disable-overlap-schedule is True (was False): it decides at every event, not one batch ahead"
    assert lines[1].startswith("--chunked-prefill-size is -1 (was not set): ")
    assert len(lines) == 2
    assert incompatible_option(stock) is None
    assert take_over(stock) == []


UNIFIED = {"disaggregation_mode": "null", "disaggregation_transfer_backend": "mooncake"}
SWITCHES = [
    *((mode, field) for mode in ("prefill", "null") for field in REFUSED_WHEN_SET),
    *(("prefill", field) for field in REFUSED_ON_PREFILL_SERVERS),
    *(("null", field) for field in REFUSED_ON_UNIFIED_SERVERS),
]


@pytest.mark.parametrize(("mode", "field"), SWITCHES)
def test_switches(mode, field):
    text = problem(disaggregation_mode=mode, **{field: True})
    assert text.startswith("--" + field.replace("_", "-") + " cannot work with FlowPrefill: ")
    assert problem(disaggregation_mode=mode, **{field: False}) is None


@pytest.mark.parametrize("field", REFUSED_ABOVE_ONE)
def test_parallelism(field):
    assert "--" + field.replace("_", "-") + " 2 cannot work" in problem(**{field: 2})
    assert "--" + field.replace("_", "-") + " 2 cannot work" in problem(**UNIFIED, **{field: 2})


def test_a_server_that_prefills_and_decodes_works_with_what_flowprefill_sets():
    assert problem(**UNIFIED) is None
    stock = SimpleNamespace(**(WORKS | UNIFIED | {"disable_overlap_schedule": False, "prefill_decode_interval": 4}))
    lines = take_over(stock)
    assert lines[-1].startswith("--prefill-decode-interval is 0 (was 4): decode steps start when ")
    assert len(lines) == 2
    assert incompatible_option(stock) is None


def test_what_one_kind_of_server_refuses_another_may_take():
    assert problem(min_free_slots_delay=2) is None
    assert problem(**UNIFIED, optimistic_prefill_attempts=2) is None


@pytest.mark.parametrize("name", REFUSED_ENVIRONMENT)
def test_variables(name, monkeypatch):
    for value, refused in [("1", True), ("True", True), ("0", False), ("", False)]:
        text = incompatible_option(SimpleNamespace(**WORKS), {name: value})
        assert (text is not None) == refused, value
        assert not refused or f"{name}={value} cannot work with FlowPrefill: " in text
    monkeypatch.setenv(name, "1")
    assert problem() is not None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"disaggregation_mode": "decode"}, "--disaggregation-mode has to be prefill or null, not decode"),
        ({"disaggregation_transfer_backend": "mori"}, "--disaggregation-transfer-backend mori"),
        ({"chunked_prefill_size": 2048}, "--chunked-prefill-size -1, not 2048"),
        ({"chunked_prefill_size": None}, "FlowPrefill needs --chunked-prefill-size -1"),
        ({"disable_overlap_schedule": False}, "FlowPrefill needs --disable-overlap-schedule"),
        ({"cuda_graph_backend_prefill": None}, "FlowPrefill needs --cuda-graph-backend-prefill disabled"),
        ({"attention_backend": "trtllm_mha"}, "--attention-backend trtllm_mha cannot work with FlowPrefill"),
        ({"prefill_attention_backend": "fa4"}, "--prefill-attention-backend fa4 cannot work with FlowPrefill"),
        ({"schedule_policy": "lpm"}, "--schedule-policy lpm"),
        ({"kv_canary": "log"}, "--kv-canary log cannot work"),
        ({"expert_distribution_recorder_mode": "stat"}, "--expert-distribution-recorder-mode stat cannot work"),
        ({"speculative_algorithm": "EAGLE"}, "--speculative-algorithm EAGLE cannot work"),
    ],
)
def test_values(changes, text):
    assert text in problem(**changes)


@pytest.mark.parametrize("name", ["flashinfer", "fa3", "triton", None])
def test_checked_attention_backends(name):
    assert problem(attention_backend=name, prefill_attention_backend=name) is None


def test_a_canary_that_is_off():
    assert problem(kv_canary="none") is None


def test_the_cpu_has_no_graphs_to_disable():
    assert problem(cuda_graph_backend_prefill=None, device="cpu") is None


@pytest.mark.parametrize("switch", ["disable_cuda_graph", "disable_prefill_cuda_graph"])
def test_sglangs_older_switches_disable_graphs_too(switch):
    assert problem(cuda_graph_backend_prefill=None, **{switch: True}) is None
