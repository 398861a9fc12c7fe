"""Command lines of stock SGLang, with SGLang's own parser and its resolution: each option has a row in the table, and a
server gets the options that it would have got with the right ones given by hand."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt import platforms
from sglang.srt.arg_groups import memory_hook, model_override_base, overrides
from sglang.srt.arg_groups.arg_utils import namespace_of
from sglang.srt.model_executor import cuda_graph_config
from sglang.srt.runtime_context import override_platform
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils import common

from sgl_flowprefill.cluster import cli
from sgl_flowprefill.cluster.explain_command import read
from sgl_flowprefill.compat import EXAMPLES, MODE, ROWS, SERVERS, TABLE, explain, flag, incompatible_option, refusals
from sgl_flowprefill.model import embedded_model_path
from sgl_flowprefill.patches import attention_choice, options, static_memory

OF_ONE_VERSION = {
    "enable_amd_monokernel",
    "enable_megamoe_for_layernorm_sp",
    "enable_nvidia_megakernel",
    "enable_paged_experts",
    "paged_experts_num_resident",
    "prefill_decode_interval_min_bs",
    "speculative_skip_dp_mlp_sync",
    "unified_cache_external_linker_config",
}
"""Options that only one of SGLang 0.5.22 and 0.5.23 has."""


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """SGLang's resolution writes into it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()  # it takes abbreviations, as SGLang's own does
    ServerArgs.add_cli_args(parser)
    return parser


@pytest.fixture(scope="module")
def actions(parser: argparse.ArgumentParser) -> dict[str, list[argparse.Action]]:
    """What the parser knows of each option, by its field."""
    found: dict[str, list[argparse.Action]] = {}
    for action in parser._actions:
        found.setdefault(action.dest, []).append(action)
    return found


# ---- the table -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [group for group in TABLE if group.namespaces], ids=lambda group: group.title)
def test_every_option_of_a_group_has_a_row(group: Any, actions: dict[str, list[argparse.Action]]) -> None:
    namespaces = namespace_of(ServerArgs)
    offered = {name for name, namespace in namespaces.items() if namespace in group.namespaces and name in actions}
    has_row = {option for row in group.rows for option in row.options}
    assert offered - has_row == set(), "options of SGLang without a row in compat/table.py"
    assert has_row - offered - OF_ONE_VERSION == set(), "rows in compat/table.py without an option of SGLang"


def test_an_option_has_one_row_for_each_kind_of_server() -> None:
    by_option: dict[str, list[str]] = {}
    for row in ROWS:
        for option in row.options:
            by_option.setdefault(option, []).extend(row.servers)
    assert {option: servers for option, servers in by_option.items() if sorted(servers) != sorted(SERVERS)} == {}


def test_rows_have_the_names_and_the_defaults_of_sglang(actions: dict[str, list[argparse.Action]]) -> None:
    for row in ROWS:
        for option in set(row.options) & set(actions):
            assert flag(option) in {name for action in actions[option] for name in action.option_strings}
            if row.treatment == "set":
                assert [action.default for action in actions[option]] == [row.default]


def test_what_is_refused_is_not_refused_by_default(parser: argparse.ArgumentParser) -> None:
    for mode in MODE.values():
        given = parser.parse_args(["--model-path", "m", "--disaggregation-mode", mode])
        assert [one.sentence for one in refusals(given, {})] == []


# ---- what a server gets --------------------------------------------------------------------------------------------


ALWAYS = (
    "--disable-overlap-schedule --chunked-prefill-size -1 --schedule-policy fcfs --cuda-graph-backend-prefill disabled"
)
BY_HAND = {
    "prefill": f"{ALWAYS} --disaggregation-mode prefill --disaggregation-transfer-backend nixl",
    "unified": f"{ALWAYS} --prefill-decode-interval 0",
}
"""What users of FlowPrefill would have to give."""
STOCK = {"prefill": "--disaggregation-mode prefill --disaggregation-transfer-backend nixl", "unified": ""}
CASES = [
    ("", ""),
    ("--tp-size 2 --max-running-requests 64 --cuda-graph-max-bs-decode 32", ""),
    ("--mem-fraction-static 0.5 --page-size 16", "--enable-mixed-chunk --chunked-prefill-size 2048"),
    ("--max-prefill-tokens 8192 --context-length 4096", "--chunked-prefill-size 512 --schedule-policy lpm"),
    ("", """--cuda-graph-config '{"prefill": {"backend": "breakable"}, "decode": {"max_bs": 8}}'"""),
    ("--max-total-tokens 20000", "--enable-prefill-delayer --enable-two-batch-overlap --enable-single-batch-overlap"),
    ("", "--enable-torch-compile --scheduler-recv-interval 4 --tokenizer-worker-num 2 --enable-dynamic-chunking"),
    ("--enable-priority-scheduling --default-priority-value 3 --retraction-policy priority", "--schedule-policy lof"),
]
"""Options that stay, and options in whose place come others."""
KEPT = {4: """--cuda-graph-config '{"decode": {"max_bs": 8}}'""", 7: "--disable-priority-preemption"}
"""What a user would give by hand besides, in a case."""


def asked(parser: argparse.ArgumentParser, words: str) -> ServerArgs:
    given = ["--model-path", str(embedded_model_path()), "--random-seed", "1", *shlex.split(words)]
    return ServerArgs.from_cli_args(parser.parse_args(given))


class SomeGpu:
    """SGLang's platform of this machine, as if it were a GPU that is no plugin's."""

    device_name = "cuda"

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def is_out_of_tree(self) -> bool:
        return False

    def apply_server_args_defaults(self, server_args: Any) -> None: ...


@contextmanager
def a_gpu(**facts: bool) -> Iterator[None]:
    """This machine has one of 80 GiB, as far as SGLang's resolution sees: sizes follow from the options there."""
    with pytest.MonkeyPatch.context() as patch:
        gpu = SomeGpu(platforms.current_platform)
        patch.setattr(platforms, "_current_platform", gpu)
        patch.setattr(model_override_base, "current_platform", gpu)
        patch.setattr(memory_hook, "get_device_memory_capacity", lambda device=None: 80 * 1024)
        patch.setattr(cuda_graph_config, "default_prefill_backend", lambda: "breakable")
        with override_platform(is_cuda=True, **facts):
            yield


@pytest.fixture(params=["cpu", "gpu"])
def machine(request: pytest.FixtureRequest, parser: argparse.ArgumentParser) -> Iterator[str]:
    """This one, or one with an H100."""
    asked(parser, "").resolve_once()  # imports modules that would look for the GPU
    with a_gpu(is_sm90=True, is_hopper_with_cuda_12_3=True) if request.param == "gpu" else nullcontext():
        yield request.param


@pytest.fixture
def blackwell(parser: argparse.ArgumentParser) -> Iterator[None]:
    """A machine with a B200."""
    asked(parser, "").resolve_once()
    with a_gpu(is_sm100=True, is_blackwell=True):
        yield


def on(machine: str) -> str:
    return "--device cuda" if machine == "gpu" else ""


def resolved(server_args: ServerArgs) -> dict[str, Any]:
    server_args.resolve_once()
    return server_args.resolved_dict()


@pytest.mark.parametrize("server", SERVERS)
def test_a_server_gets_what_it_would_have_got_with_the_right_options(
    server: str, machine: str, parser: argparse.ArgumentParser
) -> None:
    for number, (stay, go) in enumerate(CASES):
        stock = asked(parser, f"{stay} {go} {STOCK[server]} {on(machine)}")
        options.resolve(ServerArgs.resolve_once, stock)
        by_hand = asked(parser, f"{stay} {KEPT.get(number, '')} {BY_HAND[server]} {on(machine)}")
        assert stock.resolved_dict() == resolved(by_hand), f"{stay} {go}"


@pytest.mark.parametrize("machine", ["gpu"], indirect=True)
def test_set_later_the_server_would_be_another(machine: str, parser: argparse.ArgumentParser) -> None:
    """SGLang has derived sizes by then."""
    late = resolved(asked(parser, on(machine)))
    right = resolved(asked(parser, f"{BY_HAND['unified']} {on(machine)}"))
    for name in ("disable_overlap_schedule", "chunked_prefill_size", "schedule_policy", "cuda_graph_backend_prefill"):
        late[name] = right[name]
    assert late["cuda_graph_config"]["prefill"]["bs"] != right["cuda_graph_config"]["prefill"]["bs"]
    assert late["mem_fraction_static"] != right["mem_fraction_static"]


def share_of(card_gib: int, words: str, parser: argparse.ArgumentParser, is_hooked: bool = True) -> float:
    """``--mem-fraction-static`` of a server on a card with so much memory."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (memory_hook, common):
            patch.setattr(module, "get_device_memory_capacity", lambda device=None: card_gib * 1024)
        if is_hooked:
            original = memory_hook.handle_gpu_memory_settings
            hook = functools.partial(static_memory.without_activations, original)
            patch.setattr(memory_hook, "handle_gpu_memory_settings", functools.update_wrapper(hook, original))
        given = asked(parser, f"{words} --device cuda")
        options.resolve(ServerArgs.resolve_once, given)
        return float(given.resolved_dict()["mem_fraction_static"])


@pytest.mark.parametrize("machine", ["gpu"], indirect=True)
@pytest.mark.parametrize("card_gib", [16, 24, 40, 48, 80, 141])
def test_weights_and_kv_cache_get_all_of_a_gpu_that_no_server_needs_for_something_else(
    card_gib: int, machine: str, parser: argparse.ArgumentParser
) -> None:
    """What prompts need is taken off when the size of the KV cache is known (tests/unit/test_kv_share.py)."""
    for server, most_gib in (("prefill", 2.3), ("unified", 2.8)):
        share = share_of(card_gib, STOCK[server], parser)
        assert 2 < card_gib * (1 - share) < most_gib, "workspaces, and CUDA graphs of decode steps"
        assert card_gib * (1 - share_of(card_gib, STOCK[server], parser, is_hooked=False)) > 24


@pytest.mark.parametrize("machine", ["gpu"], indirect=True)
def test_the_share_of_memory_that_the_user_has_given_stays_and_that_of_a_decode_server(
    machine: str, parser: argparse.ArgumentParser
) -> None:
    assert share_of(24, "--mem-fraction-static 0.5", parser) == 0.5
    decodes = "--disaggregation-mode decode --disaggregation-transfer-backend nixl"
    assert share_of(24, decodes, parser) == share_of(24, decodes, parser, is_hooked=False)


def with_attention(words: str, parser: argparse.ArgumentParser, is_hooked: bool = True) -> Any:
    """The resolved options of a server for which SGLang chooses an attention backend."""
    with pytest.MonkeyPatch.context() as patch:
        if is_hooked:
            original = overrides.get_default_attn_backend
            patch.setattr(
                overrides,
                "get_default_attn_backend",
                lambda *args: attention_choice.choose(original(*args), *args),
            )
        given = asked(parser, f"{words} --device cuda")
        options.resolve(ServerArgs.resolve_once, given)
    return given


@pytest.mark.usefixtures("blackwell")
@pytest.mark.parametrize("server", SERVERS)
def test_on_blackwell_a_server_without_an_attention_backend_gets_one_that_is_checked(
    server: str, parser: argparse.ArgumentParser, caplog: pytest.LogCaptureFixture
) -> None:
    stock = overrides.resolving_view(with_attention(STOCK[server], parser, is_hooked=False))
    assert stock.attention_backend == "trtllm_mha"
    assert "--attention-backend trtllm_mha cannot work" in str(incompatible_option(stock))
    with caplog.at_level(logging.INFO, "sgl_flowprefill.patches.attention_choice"):
        ours = with_attention(STOCK[server], parser)
    assert incompatible_option(overrides.resolving_view(ours)) is None
    assert ours.resolved_dict()["attention_backend"] == "flashinfer"
    line = "FlowPrefill: --attention-backend is flashinfer (was trtllm_mha): SGLang's choice has not been checked"
    assert line in caplog.messages
    by_hand = with_attention(f"{STOCK[server]} --attention-backend flashinfer", parser, is_hooked=False)
    assert ours.resolved_dict() == by_hand.resolved_dict()


@pytest.mark.usefixtures("blackwell")
def test_on_blackwell_the_attention_backend_of_the_user_stays_and_that_of_a_decode_server(
    parser: argparse.ArgumentParser,
) -> None:
    given = with_attention("--attention-backend trtllm_mha", parser)
    assert "--attention-backend trtllm_mha cannot work" in str(incompatible_option(overrides.resolving_view(given)))
    decodes = with_attention("--disaggregation-mode decode --disaggregation-transfer-backend nixl", parser)
    assert decodes.resolved_dict()["attention_backend"] == "trtllm_mha"


def test_an_attention_backend_that_a_model_chooses_becomes_one_that_serves_it_if_there_is_one() -> None:
    server, only_decodes = (SimpleNamespace(disaggregation_mode=mode) for mode in ("null", "decode"))
    declared: list[tuple[str, dict[str, Any]]] = [
        ("attention sinks", {"attention_backend": "trtllm_mha", "dtype": "bfloat16"}),
        ("latent attention", {"attention_backend": "trtllm_mla"}),
        ("sparse attention", {"attention_backend": "trtllm_mha", "page_size": 128}),
        ("sparse latent attention", {"attention_backend": "dsa"}),
        ("checked", {"attention_backend": "fa3"}),
        ("no choice", {"dtype": "bfloat16"}),
    ]
    found = attention_choice.declare(declared, "SomeForCausalLM", server, None)
    chosen = [one.get("attention_backend") for _, one in found]
    assert chosen == ["triton", "flashinfer", "trtllm_mha", "dsa", "fa3", None]
    assert [source for source, _ in found] == [source for source, _ in declared]
    assert found[0][1]["dtype"] == "bfloat16"
    assert attention_choice.declare(declared, "SomeForCausalLM", only_decodes, None) == declared
    sinks, none = (SimpleNamespace(has_attention_sinks=has_sinks) for has_sinks in (True, False))
    assert attention_choice.choose("trtllm_mha", server, False, sinks) == "triton"
    assert attention_choice.choose("fa4", server, False, none) == "fa4", "keys and values of different widths"


def test_what_the_user_has_asked_for_is_a_warning_and_a_default_a_line_of_information(
    parser: argparse.ArgumentParser, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "sgl_flowprefill.patches.options"):
        options.resolve(ServerArgs.resolve_once, asked(parser, "--enable-mixed-chunk --chunked-prefill-size 512"))
    told = {record.getMessage().split()[1]: record for record in caplog.records if "FlowPrefill: " in record.msg}
    warnings = {name for name, record in told.items() if record.levelno == logging.WARNING}
    assert warnings == {"--enable-mixed-chunk", "--chunked-prefill-size"}
    assert told["--disable-overlap-schedule"].levelno == logging.INFO
    assert told["--chunked-prefill-size"].getMessage() == (
        "FlowPrefill: --chunked-prefill-size is -1 (was 512): "
        "a prompt is prefilled whole and suspended when it has to wait"
    )


def test_the_delayer_stays_off_whatever_the_environment_asks_for(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_SCHEDULER_DECREASE_PREFILL_IDLE", "1")
    given = asked(parser, "")
    options.resolve(ServerArgs.resolve_once, given)
    assert given.resolved_dict()["enable_prefill_delayer"] is False


def test_where_sglang_refuses_what_flowprefill_has_set_the_reason_is_the_option_that_cannot_work(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        options.resolve(ServerArgs.resolve_once, asked(parser, "--enable-kv-cache-sharding --page-size 64"))
    assert end.value.code == 2
    [line] = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("sgl-flowprefill: --enable-kv-cache-sharding cannot work with FlowPrefill: its buffers hold")


def test_what_sglang_itself_refuses_stays_its_own(parser: argparse.ArgumentParser) -> None:
    with pytest.raises(ValueError, match="prefill-decode-interval"):
        options.resolve(ServerArgs.resolve_once, asked(parser, f"{STOCK['prefill']} --prefill-decode-interval -1"))


# ---- doctor --explain ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_what_the_docs_say_of_a_command_line_is_what_is_explained(
    example: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command = shlex.join(["FLOWPREFILL=1", "sglang", "serve", "--model-path", "m", *example.options])
    assert cli.main(["doctor", "--explain", command]) == 0
    printed = capsys.readouterr().out
    assert "--disable-overlap-schedule (was False)" in printed


@pytest.mark.parametrize(
    ("command", "server"),
    [
        ("sglang serve org/model --tp 2", "unified"),
        ("A=1 python3 -m sglang.launch_server --model m --disaggregation-mode prefill", "prefill"),
        ("/usr/bin/sglang serve --disaggregation-mode=prefill", "prefill"),
        ("sglang serve --model-type llm org/model --tp 2", "unified"),
        ("sglang serve org/model --model-type=auto --tp 2", "unified"),
        ("python launch.py --flowprefill --unified --tp 2", "unified"),
        ("launch.py --flowprefill --prefill-args '--tp 2'", "prefill"),
        ("--tp 2", "unified"),
    ],
)
def test_a_command_is_read_however_the_server_is_started(
    command: str, server: str, parser: argparse.ArgumentParser
) -> None:
    found = read(command, cli.parse)
    assert found is not None
    given = parser.parse_args(found.options)
    assert given.disaggregation_mode == MODE[server]  # type: ignore[index]
    assert given.tp_size == (2 if "tp" in command else 1)
    assert [one.treatment for one in explain(given, given, found.env)].count("refused") == 0
    assert found.env.get("A") == ("1" if command.startswith("A=1") else os.environ.get("A"))


def test_a_command_without_flowprefill_and_a_decode_server_stay_as_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for command in ("launch.py --unified", "sglang serve m --disaggregation-mode decode --enable-lora"):
        assert cli.main(["doctor", "--explain", command]) == 0
        assert "SGLang's scheduler and all of its options stay as they are." in capsys.readouterr().out
    workers = "sglang serve m --disaggregation-mode decode --tokenizer-worker-num 4"
    assert cli.main(["doctor", "--explain", workers]) == 0
    told = capsys.readouterr().out
    assert "SGLang's scheduler and all of its options but one stay as they are." in told
    assert "--tokenizer-worker-num is 1 (was 4): workers load no plugins" in told


def test_what_has_not_been_compared_together_starts_with_the_switch_however_that_is_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    together = "--enable-lora --tp 2"
    for command, code in (
        (f"sglang serve m {together}", 1),
        (f"FLOWPREFILL_UNCOMPARED=true sglang serve m {together}", 0),
        (f"launch.py --flowprefill --unified {together}", 1),
        (f"launch.py --flowprefill --unified --flowprefill-uncompared true {together}", 0),
    ):
        assert cli.main(["doctor", "--explain", command]) == code, command
        assert ("0 refused, 1 not compared, " in capsys.readouterr().out) == (code == 0), command


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
@pytest.mark.parametrize("start", ["launch.py --flowprefill --unified", "sglang serve m"])
def test_what_a_config_file_asks_for_is_explained(
    form: str, start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "server.yaml").write_text("pp-size: 2")
    assert cli.main(["doctor", "--explain", f"{start} {form.format(tmp_path / 'server.yaml')}"]) == 1
    assert "--pp-size 2" in capsys.readouterr().out


def test_a_command_that_sglang_does_not_take_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--explain", "sglang serve m --no-such-option"]) == 2
    assert "--no-such-option" in capsys.readouterr().err
    assert cli.main(["doctor", "--explain", "sglang serve 'm"]) == 2
    assert "--explain sglang serve 'm" in capsys.readouterr().err
    assert cli.main(["doctor", "--explain", "sglang serve m --model-type diffusion"]) == 2
    assert "--model-type" in capsys.readouterr().err
