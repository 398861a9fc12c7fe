"""Options of SGLang that cannot work with FlowPrefill are named in one sentence."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from sgl_flowprefill.compat import (
    MODE,
    REFUSED_ENVIRONMENT,
    ROWS,
    UNSET_ENVIRONMENT,
    compatibility_page,
    explain,
    flag,
    incompatible_option,
    refusals,
    take_over,
)
from sgl_flowprefill.compat.row import GIVEN

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
    lines = list(map(str, take_over(stock)))
    assert lines[0] == "--disable-overlap-schedule is True (was False): it decides at every event, not one batch ahead"
    assert lines[1].startswith("--chunked-prefill-size is -1 (was not set): ")
    assert len(lines) == 2
    assert incompatible_option(stock) is None
    assert take_over(stock) == []


UNIFIED = {"disaggregation_mode": "null", "disaggregation_transfer_backend": "mooncake"}
SERVER = {"prefill": {"disaggregation_mode": "prefill"}, "unified": UNIFIED}


def cases(*treatments):
    """Mode, row and option of each row with one of ``treatments``."""
    return [
        (server, row, option)
        for row in ROWS
        if row.treatment in treatments
        for server in row.servers
        for option in row.options
    ]


def a_refused_value(row):
    """One that the row refuses."""
    words = row.values.words.replace("`", "").split(", ")[0]
    return next(value for value in (True, 2, words, "something") if row.values.holds(value))


@pytest.mark.parametrize(("server", "row", "option"), cases("refused"))
def test_what_is_refused_is_named_with_its_reason(server, row, option):
    value = a_refused_value(row)
    text = problem(**SERVER[server], **{option: value})
    given = flag(option) if value is True else f"{flag(option)} {value}"
    assert text == f"{given} cannot work with FlowPrefill: {row.why}"
    for nothing in (None, False, 0, "none", "null", "off", "") if row.values is GIVEN else (None,):
        assert problem(**SERVER[server], **{option: nothing}) is None


SET = [(server, row, option) for server, row, option in cases("set") if option != "cuda_graph_config"]


OTHERS = {
    "-1": 4096,
    "True": False,
    "False": True,
    "None": 2,
    "0": 3,
    "1": 4,
    "'fcfs'": "lpm",
    "'disabled'": "full",
}
"""What an option is set to: something else."""


@pytest.mark.parametrize(("server", "row", "option"), SET)
def test_what_is_set_is_told_and_works_then(server, row, option):
    """As a warning where the user has asked for it, and refused by name where it comes past the seam."""
    other = OTHERS[repr(row.to)]
    asked_with = {row.only_with: True} if row.only_with else {}
    server_args = SimpleNamespace(**(WORKS | SERVER[server] | asked_with | {option: other}))
    assert flag(option) in incompatible_option(server_args) or option == "prefill_decode_interval"
    [change] = take_over(server_args, {})
    assert getattr(server_args, option) == row.to
    assert (change.name, change.was, change.why) == (flag(option), str(other), row.why)
    assert change.asked == (other != row.default)
    assert incompatible_option(server_args) is None


def test_an_option_without_the_one_that_it_goes_with_is_left_alone():
    server_args = SimpleNamespace(**WORKS, disable_priority_preemption=False)
    assert take_over(server_args, {}) == []


def test_a_default_is_no_request_of_the_user():
    stock = SimpleNamespace(**(WORKS | {"disable_overlap_schedule": False, "chunked_prefill_size": None}))
    assert [change.asked for change in take_over(stock, {})] == [False, False]
    asked = SimpleNamespace(**(WORKS | {"chunked_prefill_size": 8192}))
    assert [change.asked for change in take_over(asked, {})] == [True]


@pytest.mark.parametrize("name", UNSET_ENVIRONMENT)
def test_a_variable_that_would_undo_what_is_set_is_taken_out(name):
    env = {name: "1", "OTHER": "1"}
    [change] = take_over(SimpleNamespace(**WORKS), env)
    assert env == {"OTHER": "1"}
    assert str(change).startswith(f"{name} is not set (was 1): ")


def test_an_explanation_has_what_is_refused_what_is_set_and_what_was_given():
    defaults = SimpleNamespace(
        **(WORKS | {"chunked_prefill_size": None, "is_embedding": False, "page_size": None, "served_model_name": None})
    )
    given = {"is_embedding": True, "page_size": 16, "served_model_name": "m", "chunked_prefill_size": 2048}
    options = SimpleNamespace(**(vars(defaults) | given))
    found = explain(options, defaults, {})
    assert [(one.given, one.treatment, one.now) for one in found] == [
        ("--is-embedding", "refused", ""),
        ("--chunked-prefill-size (was 2048)", "set", "is -1"),
        ("--page-size 16", "left", ""),
        ("--served-model-name m", "left", ""),
    ]
    assert all(one.why for one in found[:2])


def test_all_that_is_refused_is_found_at_once():
    several = {"is_embedding": True, "pp_size": 2, "speculative_algorithm": "NGRAM"}
    assert {one.name for one in refusals(SimpleNamespace(**(WORKS | several)), {})} == set(several)


@pytest.mark.parametrize("joint", [{"attn_dp_size": 2}, {"dp_size": 2, "enable_dp_attention": True}])
def test_features_that_have_not_been_compared_together_are_explained_as_one(joint):
    given = {"lora_paths": ["a=b"], "tp_size": 2, **joint}
    options = SimpleNamespace(**(WORKS | given))
    defaults = SimpleNamespace(**(WORKS | dict.fromkeys(("lora_paths", *joint))))
    name, ranks = next(iter(joint.items()))
    pair = f"--enable-lora with {flag(name)} {ranks}"
    [refused] = explain(options, defaults, {})
    assert (refused.given, refused.treatment) == (pair, "refused")
    risk, *others = explain(options, defaults, {"FLOWPREFILL_UNCOMPARED": "1"})
    assert (risk.given, risk.treatment) == (pair, "risk")
    assert risk.why == "has not been compared, and what this server answers may be wrong"
    assert {one.treatment for one in others} == {"left"}
    assert len(others) == len(given)


def test_each_reason_against_an_option_is_explained():
    several = {"attn_dp_size": 4, "tp_size": 8, "nnodes": 2}
    found = explain(SimpleNamespace(**(WORKS | several)), SimpleNamespace(**WORKS), {})
    refused = [(one.given, one.why.partition(",")[0]) for one in found if one.treatment == "refused"]
    assert refused == [("--attn-dp-size 4", "beside --tp-size 8"), ("--attn-dp-size 4", "beside --nnodes 2")]


def test_each_kind_of_server_has_its_mode():
    assert MODE == {"prefill": "prefill", "unified": "null"}


PARALLEL = ("pp_size", "dp_size", "attn_dp_size", "attn_cp_size", "tokenizer_worker_num")


@pytest.mark.parametrize("field", PARALLEL)
def test_parallelism(field):
    assert "--" + field.replace("_", "-") + " 2 cannot work" in problem(**{field: 2})
    assert "--" + field.replace("_", "-") + " 2 cannot work" in problem(**UNIFIED, **{field: 2})


JOINT = {"dp_size": 4, "enable_dp_attention": True, "tp_size": 4}
RESOLVED = {"dp_size": 1, "attn_dp_size": 4, "tp_size": 4}
"""The same, as SGLang resolves it."""


@pytest.mark.parametrize(("joint", "option"), [(JOINT, "--dp-size"), (RESOLVED, "--attn-dp-size")])
@pytest.mark.parametrize("server", [{}, UNIFIED])
def test_attention_of_each_rank_for_itself_works_on_one_node(joint, option, server):
    assert problem(**server, **joint) is None
    for beside in ({"tp_size": 8}, {"nnodes": 2}):
        [given] = (f"--{name.replace('_', '-')}" for name in beside)
        text = problem(**server | joint | beside)
        assert text.startswith(f"{option} 4 cannot work with FlowPrefill: beside {given}")


def test_a_server_that_prefills_and_decodes_works_with_what_flowprefill_sets():
    assert problem(**UNIFIED) is None
    stock = SimpleNamespace(**(WORKS | UNIFIED | {"disable_overlap_schedule": False, "prefill_decode_interval": 4}))
    lines = list(map(str, take_over(stock)))
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
        ({"expert_distribution_recorder_mode": "per_token"}, "--expert-distribution-recorder-mode per_token cannot"),
        ({"speculative_algorithm": "NGRAM"}, "--speculative-algorithm NGRAM cannot work"),
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


@pytest.mark.parametrize("mode", ["stat", "stat_approx", "per_pass"])
@pytest.mark.parametrize("server", [{}, UNIFIED])
def test_experts_of_each_forward_pass_can_be_counted(mode, server):
    assert problem(**server, expert_distribution_recorder_mode=mode, expert_balancedness_report_mode="both") is None


def test_experts_move_but_not_when_a_rank_fails_or_beside_streams():
    assert problem(enable_eplb=True, ep_size=2, tp_size=2) is None
    text = problem(enable_eplb=True, elastic_ep_backend="nixl")
    assert text.startswith("--enable-eplb with --elastic-ep-backend nixl cannot work with FlowPrefill: ")
    assert "decode steps" in problem(**UNIFIED, enable_eplb=True, ep_size=2, tp_size=2)


@pytest.mark.parametrize("switch", ["disable_cuda_graph", "disable_prefill_cuda_graph"])
def test_sglangs_older_switches_disable_graphs_too(switch):
    assert problem(cuda_graph_backend_prefill=None, **{switch: True}) is None


def test_the_page_of_the_docs_is_what_the_table_says():
    page = Path(__file__).parents[2] / "docs" / "compatibility.md"
    assert page.read_text() == compatibility_page(), "python -m sgl_flowprefill.compat > docs/compatibility.md"
