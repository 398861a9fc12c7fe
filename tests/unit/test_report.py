"""The report of a comparison: every field that scripts read, and a page that needs no network."""

import dataclasses
import json
import re
from collections import Counter
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from sgl_flowprefill.bench.loadgen.replay import ClientReport, ReplayRun, RequestResult
from sgl_flowprefill.bench.metrics.comparison import Comparison, SystemResult
from sgl_flowprefill.bench.reports import page
from sgl_flowprefill.bench.reports.comparison import (
    attainment_curve,
    blocking_histogram,
    render_html,
    tbt_cdfs,
    ttft_cdfs,
)
from sgl_flowprefill.bench.reports.publish import publish
from sgl_flowprefill.bench.reports.table import comparison_table, title
from sgl_flowprefill.bench.workloads.answers import Answers
from sgl_flowprefill.bench.workloads.synthetic import qwen_like
from sgl_flowprefill.bench.workloads.trace import Trace
from sgl_flowprefill.events import EventLog, Leave, Ready, Suspend
from sgl_flowprefill.outcomes import Outcomes
from sgl_flowprefill.provenance import PROVENANCE
from tests.told import arrival, complete, start

FIGURES = {"requests", "completed", "ttft_attainment", "goodput_rps", "ttft_p50_s", "ttft_p99_s"}
PREEMPTION = {"preemptions", "blocking_p50_s", "blocking_p99_s", "blocking_max_s"}


def run_of(trace: Trace, slowness: float, invalid_reason: str | None = None) -> ReplayRun:
    results = [
        RequestResult(
            index=index,
            request_class=request.request_class,
            prompt_tokens=request.prompt_tokens,
            output_tokens=4,
            shared_tokens=request.shared_tokens,
            ttft_slo_s=request.ttft_slo_s,
            tbt_slo_s=request.tbt_slo_s,
            scheduled_s=request.arrival_s,
            lateness_s=0.001,
            ttft_s=request.prompt_tokens * 1e-4 * slowness,
            e2e_s=request.prompt_tokens * 1e-4 * slowness + 0.1,
            tbt_s=(0.01,) * 3,
            cached_tokens=0,
            error=None,
        )
        for index, request in enumerate(trace.requests)
    ]
    return ReplayRun(results, 100.0, 60.0, ClientReport(0.001, 0.002, 0.003, 0.05, invalid_reason))


@pytest.fixture
def event_log(tmp_path: Path) -> Path:
    path = tmp_path / "events.jsonl"
    times_s = np.geomspace(0.001, 0.02, 40)
    log = EventLog(path)
    for i, time_s in enumerate(times_s):
        now_s = 101.0 + i
        log.write(Suspend, now_s, 1, ["a"], 5, ["b"], now_s - time_s, now_s - time_s / 2, time_s)
    log.flush()
    return path


@pytest.fixture
def comparison(event_log: Path) -> Comparison:
    trace = qwen_like(120, seed=1)
    return Comparison(
        kind="demo",
        systems=[
            SystemResult.of("flowprefill", "FlowPrefill", run_of(trace, 1), trace, event_log=event_log),
            SystemResult.of("sglang", "SGLang, chunked at 8192", run_of(trace, 5), trace, solo_ttft_s={512: 0.1}),
        ],
        trace=trace,
        seed=1,
        time_scale=2.0,
        model="embedded <Llama>",
        settings={"longest answer (tokens)": 4},
    )


def test_report_json_has_every_field(comparison: Comparison, tmp_path: Path) -> None:
    comparison.write_json(tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["systems"]) == {"flowprefill", "sglang"}
    for system in report["systems"].values():
        assert set(system) >= FIGURES
        assert set(system["classes"]) == {"text", "image", "search", "file"}
        assert all(set(figures) >= FIGURES for figures in system["classes"].values())
        assert all(isinstance(system[name], int | float) for name in FIGURES)
    assert set(report["systems"]["flowprefill"]) >= PREEMPTION
    assert not PREEMPTION & set(report["systems"]["sglang"])
    assert report["systems"]["flowprefill"]["preemptions"] == 40
    assert set(report) >= {"time_scale", "seed", "rate_rps", "model", *PROVENANCE}
    assert report["versions"]["sglang"]
    assert report["rate_rps"] == pytest.approx(comparison.trace.rate_rps)


def test_the_page_says_which_requests_missed_and_why_as_metrics_do_and_where_to_look(
    comparison: Comparison, tmp_path: Path
) -> None:
    events = [
        arrival(50.0, "warm-up", 50.1),
        start(50.0, 0, "warm-up"),
        complete(51.0, 0, "warm-up"),
        Leave(51.1, "warm-up"),
        arrival(110.0, "late-one", 111.0, tokens=12_345),
        Ready(110.0, "late-one", 110.0, 12_345, 0, 0.2),
        start(110.1, 1, "late-one"),
        complete(112.0, 1, "late-one", forward_s=1.9),
        Leave(112.1, "late-one"),
    ]
    log = EventLog(tmp_path / "missed.jsonl")
    log.begin(decodes=False)
    for event in events:
        log.write(lambda event=event: event)  # type: ignore[misc]
    log.flush()
    outcomes = Outcomes(decodes=False)
    causes = {outcome.rid: outcome.cause for event in events for outcome in outcomes.read(event)}
    trace = comparison.trace
    ours = SystemResult.of("ours", "Ours", run_of(trace, 1), trace, event_log=tmp_path / "missed.jsonl")
    [one] = ours.missed
    assert (one.rid, one.cause) == ("late-one", causes["late-one"]), "the other one is not of the run"
    assert (one.late_s, one.at_s) == (pytest.approx(1.1), pytest.approx(60.0))
    page = render_html(dataclasses.replace(comparison, systems=[ours]))
    for text in (f"By cause: 1 {one.cause}.", "<code>late-one</code>", "12,345", "1.10 s", "60.0 s"):
        assert text in page
    assert "why requests missed" not in render_html(comparison)


def with_gaps(comparison: Comparison, *gaps_s: float) -> Comparison:
    """The comparison, with the last of these gaps in every tenth request of the second system."""
    trace = comparison.trace
    run = run_of(trace, 1)
    results = [
        dataclasses.replace(one, tbt_s=gaps_s if one.index % 10 == 0 else gaps_s[:-1], retractions=1)
        for one in run.results
    ]
    second = SystemResult.of("sglang", "SGLang", dataclasses.replace(run, results=results), trace)
    return dataclasses.replace(comparison, systems=[comparison.systems[0], second], judge="gaps")


def test_time_between_tokens_is_in_the_report_the_table_and_the_page(comparison: Comparison) -> None:
    joint = with_gaps(comparison, 0.02, 0.03, 40.0)
    document = joint.to_dict()
    ours, second = document["systems"]["flowprefill"], document["systems"]["sglang"]
    assert document["judge"] == "gaps"
    assert ours["joint_attainment"] == ours["ttft_attainment"], "no gap of it is late"
    requests = len(joint.trace.requests)
    served = [one for one in joint.systems[1].run.results if one.meets_ttft() and one.index % 10]
    assert second["joint_attainment"] == pytest.approx(len(served) / requests)
    assert second["joint_attainment_mean_tpot"] == pytest.approx(len(served) / requests), "40 s spoil a mean, too"
    assert (second["tbt_p50_s"], second["tbt_max_s"]) == (0.03, 40.0)
    assert second["tokens_per_s"] == pytest.approx(4 * requests / 60.0)
    assert second["retractions"] == requests
    assert ours["retractions"] is None, "its server did not say"
    assert joint.systems[1].goodput_rps("gaps") == pytest.approx(len(served) / 60.0)
    console = Console(file=StringIO(), width=120)
    console.print(comparison_table(joint))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for name in (
        "TTFT met, and 99% of the gaps",
        "and the mean gap",
        "TBT p50 / p99 / longest",
        "40000 ms",
        "streams retracted",
    ):
        assert name in text
    page = render_html(joint)
    assert 'id="plot-tbt"' in page
    assert "Requests that got their tokens in time" in page
    assert "Requests that got their first token in time" in render_html(comparison)


def test_answers_of_one_token_have_no_time_between_tokens(comparison: Comparison) -> None:
    trace = comparison.trace
    run = run_of(trace, 1)
    short = dataclasses.replace(run, results=[dataclasses.replace(one, tbt_s=()) for one in run.results])
    alone = dataclasses.replace(comparison, systems=[SystemResult.of("one", "One", short, trace)])
    assert "plot-tbt" not in render_html(alone)
    console = Console(file=StringIO(), width=120)
    console.print(comparison_table(alone))
    assert "TBT" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_html_needs_no_network(comparison: Comparison) -> None:
    page = render_html(comparison)
    assert "Plotly.newPlot" in page
    markup = re.sub(r"<script\b[^>]*>.*?</script>", "<script></script>", page, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href)\s*=""", markup)
    assert "@import" not in markup
    assert not re.findall(r"<script[^>]+src", page)
    for plot in ("plot-ttft", "plot-attainment", "plot-blocking"):
        assert f'id="{plot}"' in page


def test_html_shows_figures_settings_and_escapes(comparison: Comparison) -> None:
    page = render_html(comparison)
    for text in (
        "FlowPrefill",
        "SGLang, chunked at 8192",
        "longest answer (tokens)",
        "python -m sgl_flowprefill.bench",
    ):
        assert text in page
    assert "embedded &lt;Llama&gt;" in page
    assert "not valid" not in page


def test_every_system_is_shown_also_where_there_are_more_of_them_than_colours(
    comparison: Comparison, event_log: Path
) -> None:
    trace, names = comparison.trace, [f"system-{number}" for number in range(len(page.COLOURS) + 1)]
    systems = [SystemResult.of(name, name, run_of(trace, 1), trace, event_log=event_log) for name in names]
    many = dataclasses.replace(comparison, systems=systems)
    assert render_html(many).count('class="card" style="--accent: #') == len(names)
    for figure, times in (
        (ttft_cdfs(many), len(trace.classes)),
        (tbt_cdfs(many), 1),
        (attainment_curve(many), 1),
        (blocking_histogram(many), 1),
    ):
        assert figure is not None
        assert dict(Counter(curve.name for curve in figure.data)) == dict.fromkeys(names, times)


def test_html_without_preemptions_has_no_blocking_plot(comparison: Comparison) -> None:
    stock_only = Comparison(**(vars(comparison) | {"systems": comparison.systems[1:]}))
    assert "plot-blocking" not in render_html(stock_only)


def test_table_names_every_figure(comparison: Comparison) -> None:
    console = Console(file=StringIO(), width=80)
    console.print(comparison_table(comparison))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for name in ("requests", "completed", "TTFT SLO attainment", "search", "goodput", "TTFT p50 / p99", "preemptions"):
        assert name in text
    assert "blocking time p50/p99/max" in text
    assert "until the task stopped" in text
    assert "40" in text
    assert "; answers: the workload's own, median " in title(comparison)
    shortened = dataclasses.replace(comparison, answers=Answers(scale=0.25))
    assert "; answers: 0.25 of the workload's, median " in title(shortened)


def test_an_invalid_run_is_named_and_changes_the_exit_code(comparison: Comparison, tmp_path: Path) -> None:
    console = Console(file=StringIO(), width=200)
    assert publish(comparison, tmp_path, console) == 0
    late = SystemResult.of("sglang", "SGLang", run_of(comparison.trace, 1, "the client fell behind"), comparison.trace)
    doubtful = Comparison(**(vars(comparison) | {"systems": [comparison.systems[0], late]}))
    assert publish(doubtful, tmp_path, console) == 1
    assert "SGLang: this run is not valid" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "not valid" in (tmp_path / "report.html").read_text()


def test_a_picture_is_taken_by_an_installed_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(page, "BROWSERS", ("a-browser",))
    report = tmp_path / "report.html"
    report.write_text("<p>")
    with pytest.raises(ValueError, match="needs a browser, one of a-browser"):
        page.browser()
    script = tmp_path / "a-browser"
    script.write_text('#!/bin/sh\nfor a; do case $a in --screenshot=*) echo "$*" > "${a#*=}";; esac; done\n')
    script.chmod(0o755)
    picture = page.take_picture(report)
    assert picture == tmp_path / "report.png"
    assert picture.read_text().strip().endswith(report.as_uri())
    script.write_text("#!/bin/sh\necho no display >&2\n")
    with pytest.raises(ValueError, match="no display"):
        page.take_picture(report)
    assert not picture.exists()


def test_a_machine_that_was_not_as_fast_for_both_is_named(comparison: Comparison, tmp_path: Path) -> None:
    ours, stock = comparison.systems
    for solo_ttft_s, doubts in (({512: 0.105}, 0), ({512: 0.089}, 1), ({1024: 0.2}, 0)):
        lone = dataclasses.replace(ours, solo_ttft_s=solo_ttft_s)
        steady = dataclasses.replace(comparison, systems=[lone, stock])
        assert len(steady.doubts()) == doubts
        assert publish(steady, tmp_path, Console(file=StringIO())) == 0
        assert json.loads((tmp_path / "report.json").read_text())["doubts"] == steady.doubts()
