"""The documentation names what is there: every module in the table of modules, every link with its heading."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sgl_flowprefill.cluster.base import ClusterConfig
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.metrics.table import CAUSES, PREFIX, TABLE
from sgl_flowprefill.policy import POLICIES
from tests.pictures import SHOWN, page_hash

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sgl_flowprefill"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
VERSION = re.compile(r"(?<![\d.])0\.\d+\.\d+(?!\d|\.\d)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
CAUSE = re.compile(r"\bthe cause\s+`([^`]+)`")


def table_of_modules():
    """Names in the table's first column, and what they mean. ``policy/base.py`` is the package's; a name without a
    folder lies beside the one before it."""
    section = (ROOT / "docs" / "architecture.md").read_text().split("\n## Modules\n")[1].split("\n## ")[0]
    found = []
    for line in section.splitlines():
        folder = ROOT
        for name in re.findall(r"`([^`]+)`", line.split("|")[1]) if line.startswith("|") else ():
            places = [base / name for base in (ROOT, PACKAGE, folder)]
            path = next((place for place in places if place.exists()), ROOT / name)
            folder = path.parent
            found.append((name, Path(os.path.realpath(path))))
    return found


def test_the_table_of_modules_names_only_what_is_there():
    assert [name for name, path in table_of_modules() if not path.exists()] == []


def test_what_the_table_says_of_a_folder_names_only_files_in_it():
    section = (ROOT / "docs" / "architecture.md").read_text().split("\n## Modules\n")[1].split("\n## ")[0]
    missing = []
    for row in (line.split("|") for line in section.splitlines() if line.startswith("| `")):
        first = row[1].split("`")[1]
        bases = [ROOT, PACKAGE, ROOT / first, PACKAGE / first]
        names = re.findall(r"`([\w/]+(?:\.py|/))`", row[2])
        missing += [(first, name) for name in names if not any((base / name).exists() for base in bases)]
    assert missing == []


def test_every_module_is_in_the_table_or_in_a_folder_of_it():
    named = {path for _, path in table_of_modules()}
    modules = [
        Path(os.path.realpath(os.path.join(directory, file)))
        for directory, _, files in os.walk(PACKAGE, followlinks=True)
        for file in files
        if file.endswith(".py") and file != "__init__.py"
    ]
    assert len(modules) > 100
    missing = [path for path in modules if named.isdisjoint((path, *path.parents))]
    assert sorted(str(path.relative_to(ROOT)) for path in missing) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_file_and_a_heading(page):
    broken = []
    for target in LINK.findall(page.read_text()):
        name, _, heading = target.partition("#")
        if name.startswith(("http:", "https:")):
            continue
        file = page.parent / name if name else page
        if not file.exists() or (heading and heading not in headings(file)):
            broken.append(target)
    assert broken == []


def supported_versions():
    """The oldest and the newest SGLang that pip installs this project with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [sglang] = [one for one in map(Requirement, project["dependencies"]) if one.name == "sglang"]
    bounds = {bound.operator: bound.version for bound in sglang.specifier}
    assert bounds.keys() == {">=", "<="}
    return bounds[">="], bounds["<="]


@pytest.mark.parametrize("page", ["README.md", "docs/versions.md"])
def test_the_range_of_sglang_is_named_and_no_other_version(page):
    text = re.sub(r"\(0\.\d\.\d\)", "", (ROOT / page).read_text())  # numbers of this project, in brackets
    named = VERSION.findall(text)
    assert named[:2] == list(supported_versions())
    assert set(named) == set(supported_versions())


def test_the_page_of_models_and_the_image_have_the_newest_sglang():
    _, newest = supported_versions()
    assert f"models that SGLang {newest} knows" in (ROOT / "docs" / "models.md").read_text()
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    assert f"ARG BASE=lmsysorg/sglang:v{newest}" in lines
    assert len([line for line in lines if VERSION.search(line)]) == 1


def test_the_table_of_versions_says_what_the_ends_of_the_range_were_tested_with():
    page = (ROOT / "docs" / "architecture.md").read_text()
    tested = {cells[1].strip(): cells[3].strip() for cells in (line.split("|") for line in page.splitlines())
              if len(cells) == 5 and VERSION.fullmatch(cells[1].strip())}  # fmt: skip
    oldest, newest = supported_versions()
    assert tested[newest] == "all"
    assert tested[oldest].startswith("unit tests")


def test_the_options_name_every_policy_beside_the_default():
    default = FlowPrefillConfig().policy
    others = ", ".join(f"`{name}`" for name in POLICIES if name != default)
    row = f"| `--flowprefill-policy` | {default} | or {others} ([compared](simulator.md)) |"
    assert row in (ROOT / "docs" / "serving.md").read_text().splitlines()


def test_the_options_have_a_row_each_with_their_default():
    page = (ROOT / "docs" / "serving.md").read_text()
    rows = re.findall(r"^\| `--flowprefill-([a-z-]+)` \| ([^|]*?) ?\|", page, re.MULTILINE)
    defaults = {name.replace("_", "-"): field.default for name, field in FlowPrefillConfig.model_fields.items()}
    expected = {
        name: "" if default is None else str(default).lower().removesuffix(".0") for name, default in defaults.items()
    }
    assert dict(rows) == expected | {"max-batch-tokens": "profile"}


def test_a_page_that_names_systemd_says_how_its_unit_ends():
    """All processes get SIGTERM at once otherwise, and have 90 s."""
    pages = [page.read_text() for page in PAGES if "systemd" in page.read_text()]
    assert pages
    for page in pages:
        settings = dict(re.findall(r"(?m)^(\w+)=(.+)$", page))
        assert settings["KillMode"] == "mixed"
        assert int(settings["TimeoutStopSec"]) > ClusterConfig.drain_timeout_s


def test_the_causes_that_pages_name_are_those_of_the_table():
    named = [(page.name, cause) for page in PAGES for cause in CAUSE.findall(page.read_text())]
    assert len(named) >= 3
    assert [(name, cause) for name, cause in named if cause not in CAUSES.values()] == []


def test_the_metrics_that_pages_name_are_exported():
    exported = {name for metric in TABLE for name in (metric.series, *metric.samples)}
    named = {(page.name, name) for page in PAGES for name in re.findall(rf"\b{PREFIX}[a-z]\w+", page.read_text())}
    assert len({page for page, _ in named}) > 3
    assert sorted((page, name) for page, name in named if name not in exported) == []


def headings(page):
    """The anchors that the headings of a page have, as GitHub makes them."""
    lines = [line.lstrip("#").strip() for line in page.read_text().splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_the_figures_on_the_front_page_are_those_of_the_recorded_results():
    recorded = {
        name: json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())["systems"]
        for name in ("demo", "goodput-qwen", "goodput-mixed-90")
    }
    ours, stock = recorded["demo"]["flowprefill"], recorded["demo"]["sglang"]
    over_stock = {name: systems["flowprefill"]["ratios"] for name, systems in recorded.items() if name != "demo"}
    told = [
        f"{100 * ours['ttft_attainment']:.1f}%",
        f"{over_stock['goodput-qwen']['vs_best_stock_90']:.1f} times",
        f"{over_stock['goodput-mixed-90']['vs_best_stock_90']:.2f} times",
        f"{1e3 * ours['blocking_max_s']:.0f} ms",
    ]
    page, results = ((ROOT / "docs" / name).read_text() for name in ("index.md", "results.md"))
    assert re.findall(r"(?m)^\*\*(.+)\*\*$", page) == told
    assert f"SGLang as it comes has {100 * stock['ttft_attainment']:.1f}%" in page
    assert [figure for figure in told if figure not in results] == []


def test_what_pages_say_of_the_demo_is_its_recorded_result():
    demo = json.loads((ROOT / "bench" / "results" / "demo.json").read_text())
    ours, stock = demo["systems"]["flowprefill"], demo["systems"]["sglang"]
    due_s = {name: f"{objectives['ttft']:.2g}" for name, objectives in demo["slo_s"].items()}
    files = ours["classes"]["file"], stock["classes"]["file"]

    def share(system):
        return f"{100 * system['ttft_attainment']:.1f}%".replace("100.0%", "100%")

    def times(system, *names):
        return " / ".join(f"{system[f'ttft_{name}_s']:.2g}" for name in names)

    def asked(name):
        return f"{name} ({ours['classes'][name]['requests']})"

    rows = [(asked(name), due_s[name], ours["classes"][name], stock["classes"][name]) for name in ("text", "image")]
    told = {
        "README.md": [
            f"| {ours['requests']} requests, {demo['rate_rps']:.2f} req/s |",
            f"| **{share(ours)}** | **{share(stock)}** |",
            *(f"| {name}, {due} s | {share(one)} | {share(other)} |" for name, due, one, other in rows),
            f"| {asked('search')}, {due_s['search']} s; {asked('file')}, {due_s['file']} s | 100% | 100% |",
            f"| goodput: requests in time, a second | {ours['goodput_rps']:.2f} | {stock['goodput_rps']:.2f} |",
            f"| TTFT p50 / p99 | {times(ours, 'p50', 'p99')} s | {times(stock, 'p50', 'p99')} s |",
            f"| {ours['preemptions']}; "
            + " / ".join(f"{1e3 * ours[f'blocking_{name}_s']:.2g}" for name in ("p50", "p99", "max"))
            + " ms |",
            f"stretched by {demo['time_scale']:.2f}",
        ],
        "docs/faq.md": [
            f"The {files[0]['requests']} file requests, the longest, had "
            f"a median TTFT of {times(files[0], 'p50')} s (SGLang: {times(files[1], 'p50')} s) and "
            f"a 99th percentile of {times(files[0], 'p99')} s (SGLang: {times(files[1], 'p99')} s); "
            f"the 99th percentile of all was {times(ours, 'p99')} s (SGLang: {times(stock, 'p99')} s)",
        ],
        "docs/when-not.md": [f"search and file requests have {due_s['search']} and {due_s['file']} s"],
    }
    texts = {page: " ".join((ROOT / page).read_text().split()) for page in told}
    assert [(page, figure) for page, figures in told.items() for figure in figures if figure not in texts[page]] == []
    assert {share(system["classes"][name]) for system in (ours, stock) for name in ("search", "file")} == {"100%"}
    [minutes] = re.findall(r"That took ([\d.]+ minutes) on two cores", texts["README.md"])
    assert f"then compares: {minutes} on two cores" in (ROOT / "docs" / "start.md").read_text()


def test_the_pictures_of_the_live_page_are_of_the_page_as_it_is():
    shown = SHOWN.read_text().strip() if SHOWN.exists() else None
    assert shown == page_hash(), "the page has changed since: run python -m tests.pictures"
