"""The commands that the documentation shows: the parser that a command would meet takes it, and each has a row below,
which says what test runs it, or why none does."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

import pytest

pytest.importorskip("sglang")

from sglang.srt.server_args import ServerArgs

from sgl_flowprefill.bench.cli.options import COMMANDS
from sgl_flowprefill.bench.cli.options import parse as parse_bench
from sgl_flowprefill.cluster import cli, preflight
from sgl_flowprefill.cluster.base import StartError
from sgl_flowprefill.cluster.explain_command import read
from sgl_flowprefill.cluster.parsing import Parser

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = re.compile(
    r"(?:\w+=\S+ )*(?:\.venv/bin/)?"
    r"(?:python3?|make|pip|pytest|sglang|sgl-flowprefill|docker|kubectl|openssl|curl|for|\.) "
)
"""How a line of a block without a language begins if it is a command; in a block of bash every line is one."""
BENCH: Final = "sgl_flowprefill.bench"
LAUNCHERS: Final = ("launch.py", "sgl-flowprefill")
GPU: Final = "needs a GPU"
LONG: Final = "takes more than a test may"
FOREIGN: Final = "is another project's"
TABLE: Final = r"""
.* --model-path (meta-llama/\S+|…)( .*)?
    needs a GPU
make demo|\S+ -m sgl_flowprefill.bench demo --unified
    takes more than a test may
make (test|lint|stress)
    takes more than a test may
\S+ -m tests.pictures
    takes more than a test may
make docs
    tests/unit/test_site.py::test_every_page_is_there_and_every_link_leads_somewhere
\S+ launch.py --flowprefill
    tests/servers/test_cluster.py::TestFlowPrefill
\S+ launch.py --flowprefill …|\S+ launch.py top\b.*
    tests/servers/test_live.py::test_the_page_of_a_cluster_shows_the_servers_behind_the_gateway
\S+ launch.py --flowprefill --ports 30000,30001 --enable-metrics
    tests/servers/test_cluster.py::TestFlowPrefill
\S+ -m sgl_flowprefill.metrics.(dashboard|alerts) .*
    tests/unit/test_metrics_table.py::test_docs_dashboard_and_alerts_are_those_that_a_command_makes_of_the_table
FLOWPREFILL=1 FLOWPREFILL_SLO_POLICY=examples/slo-policy.yaml sglang serve …
    tests/unit/test_slo_policy.py
curl .*/v1/completions .*
    tests/servers/test_clients.py::test_curl
curl \{URL\}/.*
    tests/servers/test_unified_server.py
\S+ -m sglang.bench_serving .*
    tests/servers/test_clients.py::test_sglangs_benchmark_counts_goodput
python examples/\w+.py http://127.0.0.1:30000
    tests/servers/test_examples.py
python -m venv aiperf .*
    tests/servers/test_clients.py::test_aiperf_counts_goodput
\S+ launch.py --flowprefill --prefill 2 --decode 1
    tests/servers/test_fleet.py::test_a_server_that_dies_under_load_costs_only_its_own_requests_and_comes_back
\S+ launch.py --flowprefill --unified
    tests/servers/test_cluster.py::TestFlowPrefillOnOneServer
\S+ launch.py --flowprefill --unified --enable-trace .*
    tests/servers/test_traces.py
pip install \.( "sglang==.*")?
    is another project's
\S*pip install 'sglang\[tracing\]'
    is another project's
\S+ launch.py --flowprefill --unified --model-path MODEL
    tests/servers/test_unified_serving.py::test_its_launcher_prints_a_curl_line_that_works_and_nobody_sees_the_key
\S+ launch.py --flowprefill --unified 2( --model-path MODEL)?
    tests/servers/test_fleet.py::test_a_server_that_dies_under_load_costs_only_its_own_requests_and_comes_back
\S+ launch.py --flowprefill --api-key-file key
    tests/servers/test_cluster.py::test_launch_prints_a_curl_line_that_works_keeps_its_key_and_ends_when_a_server_dies
\S+ launch.py --role gateway (--unified )?--host 0.0.0.0
    tests/servers/test_fleet.py::test_a_gateway_alone_is_ready_when_servers_have_joined_and_ends_cleanly
\S+ launch.py doctor --contract
    tests/unit/test_contract.py::test_all_is_as_expected_in_the_installed_sglang
\S+ launch.py doctor --explain .*
    tests/unit/test_command_lines.py::test_what_the_docs_say_of_a_command_line_is_what_is_explained
\S+ launch.py doctor --gpu( --model-path MODEL)?
    needs a GPU
\S+ launch.py doctor
    tests/integration/test_doctor.py::test_the_cpu_engine_keeps_its_tokens_and_its_attention_state_apart
\S+ launch.py timeline .*
    tests/unit/test_timeline.py::test_the_command_says_what_became_of_the_requests_and_where_to_look
\S+ launch.py profile .*
    tests/integration/test_profile.py::test_it_is_reported_on
\S+ (site/)?launch.py gpu-report.*
    tests/stress/test_gpu_report.py::test_it_runs_whole_on_the_cpu_engine_and_its_figures_are_plausible
\S+ -m sgl_flowprefill.bench goodput --list-systems
    tests/unit/test_systems.py::test_the_table_is_printed
\S+ -m sgl_flowprefill.bench (goodput|validate).*--unified.*
    takes more than a test may
\S+ -m sgl_flowprefill.bench (goodput|demo) .*--endpoint .*
    tests/servers/test_goodput.py::test_servers_behind_an_openai_api_take_part_as_an_endpoint_of_another_engine
\S+ -m sgl_flowprefill.bench goodput.*
    tests/servers/test_goodput.py::test_a_search_with_real_servers
\S+ -m sgl_flowprefill.bench (validate|breakdown)
    takes more than a test may
\S+ -m sgl_flowprefill.bench events .*
    tests/unit/test_events.py::test_the_command_prints_figures_and_refuses_other_files
\S+ -m sgl_flowprefill.bench fetch-trace qwen-a
    tests/unit/test_fetch_trace.py::test_the_first_download_records_its_checksum_and_later_ones_have_to_agree
\S+ -m sgl_flowprefill.bench simulate --oracle .*
    tests/unit/test_simulator_oracle.py::test_the_command_compares_what_both_predictions_lead_to
\S+ -m sgl_flowprefill.bench simulate --unified --slower .*
    tests/unit/test_simulator_slower.py::test_the_command_says_what_is_lost_beyond_what_the_limit_loses
\S+ -m sgl_flowprefill.bench simulate --unified --goodput.*
    tests/unit/test_simulator_unified.py::test_the_command_searches_the_highest_rates_and_names_the_best_stock_setting
\S+ -m sgl_flowprefill.bench simulate --unified.*
    tests/unit/test_simulator_unified.py::test_the_command_writes_what_a_comparison_shows
\S+ -m sgl_flowprefill.bench simulate.*
    tests/unit/test_simulator.py::test_the_command_writes_its_figures
FLOWPREFILL=1 sglang serve --model-path MODEL --enable-hierarchical-cache .*
    tests/servers/test_unified_serving.py::test_the_command_line_of_agents_serves_turns_whose_prefixes_come_back_from_host_memory
FLOWPREFILL=1 (sglang serve|python -m sglang.launch_server) --model-path MODEL
    tests/servers/test_unified_serving.py::test_the_command_line_as_it_comes_serves_with_flowprefill
FLOWPREFILL=1 (sglang serve|python -m sglang.launch_server) --model-path MODEL .*
    tests/unit/test_command_lines.py::test_what_the_docs_say_of_a_command_line_is_what_is_explained
docker .*|kubectl .*|openssl .*
    is another project's
\S+ deploy/bare_machine/build_flashinfer.py kernels --check
    tests/unit/test_bundle.py::test_a_compiled_library_that_loads_and_has_hoppers_instructions_is_kept
\S+ deploy/bare_machine/build_flashinfer.py kernels --nvcc .*
    takes more than a test may
\S+ deploy/bare_machine/bundle.py bundle --kernels kernels
    tests/unit/test_bundle.py::test_this_project_is_packed_whole_with_its_entry_points_and_commit
for piece in .*
    tests/unit/test_bundle.py::test_pieces_are_small_enough_and_each_is_unpacked_by_itself
\. site/env.sh
    needs a GPU
"""
"""Patterns of whole commands, the first that matches counts. Under each: the test that runs such a command, or why none
does."""
ROWS: Final = list(zip(TABLE.splitlines()[1::2], map(str.strip, TABLE.splitlines()[2::2]), strict=True))


class Shown(NamedTuple):
    """A command as a page shows it, without the comment behind it."""

    page: str
    command: str

    def __str__(self) -> str:
        return f"{self.page}: {self.command}"


def commands(page: Path) -> Iterator[str]:
    """The commands in the blocks of ``page``: every line of one of bash, and what begins like a command in others."""
    language: str | None = None
    text = page.read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith("```"):
            language = None if language is not None else line.strip("` ")
        elif language == "bash" or ((line.startswith("    ") or language is not None) and PROGRAMS.match(line.strip())):
            yield from filter(None, [without_comment(line.strip())])


def without_comment(line: str) -> str:
    return re.sub(r"(^|\s+)# .*", "", line).strip()


def in_sentences(page: Path) -> Iterator[str]:
    """Command lines of this project between backquotes, those of benchmarks also by their names alone. A command
    with a letter in place of a number is left out.
    """
    for quoted in re.findall(r"`([^`]+)`", re.sub(r"(?m)^```.*?^```", "", page.read_text(), flags=re.DOTALL)):
        command = " ".join(quoted.split())
        if re.match(rf"(bench )?({'|'.join(kind.name for kind in COMMANDS)}) -\S+ .", command):
            command = f"python -m {BENCH} {command.removeprefix('bench ')}"
        is_one = re.match(rf"pytest |(\S+ )?launch\.py (-|[\w-]+ )|(\S+ )?-m {BENCH} [\w-]+ ", command)
        if is_one and not re.search(r"\b\d*[A-Z]\b|…", command):
            yield command


SHOWN = [Shown(page.name, command) for page in PAGES for command in commands(page)]
IN_SENTENCES = [Shown(page.name, command) for page in PAGES for command in sorted(set(in_sentences(page)))]


def test_there_are_commands() -> None:
    pages = {shown.page for shown in SHOWN}
    assert {"README.md", "start.md", "serving.md", "deploy.md", "kubernetes.md", "gpu.md", "simulator.md"} < pages
    assert len(SHOWN) > 60


@pytest.mark.parametrize(
    ("block", "found"),
    [
        ("```bash\nmake demo  # seven minutes\n```", ["make demo"]),
        ("```bash\nls\\\n  -l\n# no command\n```", ["ls   -l"]),
        ("    python launch.py --flowprefill    # it's one\n    {not: one}", ["python launch.py --flowprefill"]),
        ("```\nFLOWPREFILL=1 sglang serve\n```", ["FLOWPREFILL=1 sglang serve"]),
        ("python launch.py in a sentence", []),
    ],
)
def test_what_is_a_command(block: str, found: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(block)
    assert list(commands(page)) == found


@pytest.mark.parametrize("shown", SHOWN, ids=str)
def test_a_command_has_a_row_that_says_what_runs_it(shown: Shown) -> None:
    assert row_of(shown.command), "add a row to ROWS"


def test_every_row_is_of_a_command_and_names_a_test_that_is_there() -> None:
    first = {next(iter(row_of(shown.command)), None) for shown in SHOWN}
    assert [row for row in ROWS if row not in first] == []
    tests = {runs for _, runs in ROWS} - {GPU, LONG, FOREIGN}
    assert sorted(runs for runs in tests if not is_there(*runs.partition("::")[::2])) == []


def row_of(command: str) -> list[tuple[str, str]]:
    """The rows whose patterns match, the one that counts first."""
    return [row for row in ROWS if re.fullmatch(row[0], command)]


def is_there(file: str, name: str) -> bool:
    return (ROOT / file).is_file() and re.search(rf"\b(def|class) {name}\b", (ROOT / file).read_text()) is not None


# ---- the parsers ----------------------------------------------------------------------------------------------------


def read_command(command: str) -> None:
    """Read ``command`` as the program that it names would, and start nothing. Raises what that would end with."""
    words = shlex.split(re.sub(r"\[([^\]]*?)(?: \.\.\.)?\]", r"\1", command))
    while words and re.match(r"\w+=", words[0]):
        words.pop(0)
    words = [word for before, word in pairwise(["", *words]) if word != "…" or before.startswith("--model")]
    names = [Path(word).name for word in words]
    if BENCH in words:
        parse_bench(words[words.index(BENCH) + 1 :])
    elif any(name in LAUNCHERS for name in names):
        read_launcher(words[next(place for place, name in enumerate(names) if name in LAUNCHERS) + 1 :])
    elif words[0] == "sglang" or "sglang.launch_server" in words:
        asked = read(command, cli.parse)
        assert asked is not None
        parser_of_sglang().parse_args(asked.options)


@cache
def parser_of_sglang() -> argparse.ArgumentParser:
    parser = preflight.SGLangParser(prog="SGLang", add_help=False)
    ServerArgs.add_cli_args(parser)
    return parser


def read_launcher(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        config = cli.parse(arguments)
        of_sglang = [*config.server_args, *config.prefill_args, *config.decode_args]
    else:
        options, of_sglang = read_options(arguments)
        if explained := getattr(options, "explain", None):
            read_command(explained)
    parser_of_sglang().parse_args(["--model-path", "MODEL", *of_sglang])


class Read(BaseException):
    """A command of launch.py has read its options. No ``except`` of its own catches this, so it goes no further."""


def read_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of a command of launch.py, and SGLang's beside them. Raises StartError."""

    def end(parser: Parser, arguments: Sequence[str], namespace: None = None) -> NoReturn:
        raise Read(*argparse.ArgumentParser.parse_known_args(parser, arguments, namespace))

    def end_if_known(parser: Parser, arguments: Sequence[str], namespace: None = None) -> NoReturn:
        options, unknown = argparse.ArgumentParser.parse_known_args(parser, arguments, namespace)
        if unknown:
            parser.error(f"unrecognized arguments: {unknown}")
        raise Read(options, [])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_known_args", end)
        patch.setattr(Parser, "parse_args", end_if_known)
        try:
            code = cli.main(arguments)
        except Read as read:
            options, of_sglang = read.args
            return options, of_sglang
    raise StartError(f"launch.py {shlex.join(arguments)} ends with {code}")


@pytest.fixture
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A directory with the files that commands name, on a machine that knows the hosts that they name."""
    (tmp_path / "key").write_text("0123456789abcdef0123456789abcdef\n")
    (tmp_path / "key").chmod(0o600)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "own_address", lambda url: "127.0.0.1")
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = dict(os.environ)
    yield
    for number, handler in signals.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("somewhere")
@pytest.mark.parametrize("command", sorted({shown.command for shown in SHOWN}))
def test_the_parser_takes_it(command: str) -> None:
    read_command(command)


@pytest.mark.usefixtures("somewhere")
@pytest.mark.parametrize("shown", IN_SENTENCES, ids=str)
def test_a_command_in_a_sentence_names_a_test_that_is_there_or_is_taken_by_its_parser(shown: Shown) -> None:
    if not shown.command.startswith("pytest"):
        read_command(shown.command)
    for file in re.findall(r"\btests/[\w/]+\.py", shown.command):
        assert (ROOT / file).is_file()


@pytest.mark.usefixtures("somewhere")
@pytest.mark.parametrize(
    "command",
    [
        "python launch.py --flowprefill --no-such-option",
        "python launch.py --flowprefill --prefill two",
        "python launch.py doctor --no-such-option",
        'python launch.py doctor --explain "sglang serve --model-path MODEL --no-such-option"',
        "python launch.py timeline",
        "python launch.py timeline EVENTS --no-such-option",
        "python launch.py no-such-command",
        "python launch.py gpu-report --budget-s soon",
        "python -m sgl_flowprefill.bench simulate --no-such-option",
        "python -m sgl_flowprefill.bench no-such-command",
        "FLOWPREFILL=1 sglang serve --model-path MODEL --no-such-option",
    ],
)
def test_a_wrong_option_in_the_documentation_is_noticed(command: str) -> None:
    with pytest.raises((StartError, SystemExit)):
        read_command(command)
