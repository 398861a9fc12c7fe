"""One run in which requests miss their objectives: metrics, page, timeline and event log say the same of it."""

from __future__ import annotations

import math
import time
import zlib
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from sgl_flowprefill.cluster import Cluster
from sgl_flowprefill.cluster.top_command import documents
from sgl_flowprefill.events import Complete, read_events
from sgl_flowprefill.live import TIMELINE
from sgl_flowprefill.metrics.table import ABORTED, INVALID, TTFT_MET, TTFT_MISSED
from sgl_flowprefill.outcomes import Outcomes
from tests.faults import PARAMETER
from tests.prompts import prompt
from tests.servers.conftest import OneCluster
from tests.trace_processor import trace_processor

LONG_TOKENS: Final = 6000
SHORT_TOKENS: Final = 900
HOPELESS_S: Final = 0.001
AMPLE_S: Final = 120.0
TIMEOUT_S: Final = 120.0
NO_GRAMMAR: Final = "("
"""A regular expression that does not compile."""
CLASSES: Final = ("default", "interactive", "batch")
MET: Final = "met"
ABORTED_BEFORE: Final = "aborted"
"""Of a request that was aborted before it was due, which is no miss."""
NOT_VALID: Final = "invalid"
"""Of a request that was refused for its client's mistake, which is no miss either."""
NO_MISSES: Final = (MET, ABORTED_BEFORE, NOT_VALID)
LABELS: Final = {
    "aborted": ABORTED_BEFORE,
    "failed": "failed",
    "invalid": NOT_VALID,
    "objective shorter than its prefill": "objective",
    "late on arrival": "late_on_arrival",
    "not ready": "not_ready",
    "transfer": "transfer",
    "misprediction": "misprediction",
    "overload": "overload",
}
"""What metrics call a cause."""
CAUSED: Final = {MET, ABORTED_BEFORE, NOT_VALID, "failed", "objective", "overload"}
"""What becomes of requests of the run on any machine."""
UNCAUSED: Final = {TTFT_MET.series: MET, ABORTED.series: ABORTED_BEFORE, INVALID.series: NOT_VALID}
"""Metrics that are of one thing that can become of a request."""
LEAST_COMPARED: Final = 100


class Told(NamedTuple):
    """What one of the four says of the run."""

    counts: Counter[tuple[str, str]]
    """Requests, by class and what became of them: MET or a cause, as metrics call it."""
    misses: dict[str, str]
    """By rid the cause. Empty for metrics, which know of no rids."""

    def of_class(self, slo_class: str) -> tuple[int, int]:
        """Requests that met their objective, and those that missed it."""
        judged = {became: count for (of, became), count in self.counts.items() if of == slo_class}
        return judged.get(MET, 0), sum(count for became, count in judged.items() if became not in NO_MISSES)


class Run(NamedTuple):
    """A server, and when it began to be started."""

    server: Cluster
    since_s: float


@pytest.fixture
def run(fresh_unified_server: Cluster, one_cluster: OneCluster) -> Run:
    return Run(fresh_unified_server, one_cluster.since_s)


def ask(url: str, rid: str, tokens: int, slo_s: float, slo_class: str = "default", **sampling: Any) -> Any:
    """The answer to a request, which may be a refusal."""
    asked = {"slo_class": slo_class, "ttft_slo": slo_s}
    body = {
        "rid": rid,
        "input_ids": prompt(zlib.crc32(rid.encode()), tokens),
        "sampling_params": {"max_new_tokens": 3, "temperature": 0, "custom_params": asked} | sampling,
    }
    return requests.post(f"{url}/generate", json=body, timeout=TIMEOUT_S).json()


def miss_objectives(url: str) -> set[str]:
    """Have requests of three classes served, of which some miss their objectives for known causes. Their rids."""
    alone = ask(url, "alone", SHORT_TOKENS, AMPLE_S)["meta_info"]["flowprefill"]["predicted_s"]
    crowded_s = max(0.2, 2.5 * alone)  # less, nobody may ask for in the class interactive
    answers: dict[str, Future[Any]] = {}
    with ThreadPoolExecutor(30) as clients:

        def submit(rid: str, *request: Any, **sampling: Any) -> None:
            answers[rid] = clients.submit(ask, url, rid, *request, **sampling)

        submit("long", LONG_TOKENS, AMPLE_S, "batch")
        for i in range(6):
            for slo_class in ("interactive", "batch"):
                submit(f"crowd-{slo_class}-{i}", SHORT_TOKENS, crowded_s, slo_class)
        for i in range(3):
            submit(f"hopeless-{i}", SHORT_TOKENS, HOPELESS_S)
            submit(f"ample-{i}", SHORT_TOKENS, AMPLE_S, "interactive")
        submit("refused", SHORT_TOKENS, AMPLE_S, "batch", regex=NO_GRAMMAR)
        broken = {"slo_class": "default", "ttft_slo": AMPLE_S, PARAMETER: "error"}
        submit("broken", LONG_TOKENS, AMPLE_S, custom_params=broken)
        submit("given-up", 2 * LONG_TOKENS, AMPLE_S, "batch")
        while not answers["given-up"].done():
            requests.post(f"{url}/abort_request", json={"rid": "given-up"}, timeout=TIMEOUT_S)
            time.sleep(0.1)
    return {"alone", *answers}


def by_metrics(run: Run) -> Told:
    counts: Counter[tuple[str, str]] = Counter()
    text = requests.get(f"{run.server.url}/metrics", timeout=TIMEOUT_S).text
    for sample in (sample for family in text_string_to_metric_families(text) for sample in family.samples):
        if sample.name in (TTFT_MISSED.series, *UNCAUSED):
            became = UNCAUSED.get(sample.name) or sample.labels["cause"]
            counts[sample.labels["slo_class"], became] += int(sample.value)
    return Told(+counts, {})


def by_page(run: Run) -> Told:
    """It has requests that met their objectives or missed them, and no others."""
    [server] = next(documents(run.server.url, None)).servers
    counts = Counter((miss.slo_class, LABELS[miss.cause]) for miss in server.misses)
    for of_class in server.attainment:
        assert of_class.missed == sum(miss.slo_class == of_class.slo_class for miss in server.misses)
        counts[of_class.slo_class, MET] = of_class.met
    return Told(+counts, {miss.rid: LABELS[miss.cause] for miss in server.misses})


def by_timeline(run: Run) -> Told:
    response = requests.get(f"{run.server.url}{TIMELINE}?seconds=3000", timeout=TIMEOUT_S)
    with trace_processor(response.content) as trace:
        rows = trace.query(
            "select extract_arg(arg_set_id, 'debug.rid'), extract_arg(arg_set_id, 'debug.slo_class'), "
            "extract_arg(arg_set_id, 'debug.met'), extract_arg(arg_set_id, 'debug.cause') from slice "
            "where extract_arg(arg_set_id, 'debug.ttft_slo_s') is not null"
        )
    counts = Counter((slo_class, MET if met else LABELS[cause]) for _, slo_class, met, cause in rows)
    return Told(counts, {rid: LABELS[cause] for rid, _, met, cause in rows if met == 0})


def by_event_log(run: Run, rids: set[str]) -> Told:
    """As soon as it has what became of ``rids``: the log reaches the file when the scheduler turns idle."""
    log = run.server.config.options.event_log
    assert log is not None
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        outcomes = Outcomes(decodes=True)
        events = [event for event in read_events(log) if event.t_s >= run.since_s]  # none of an earlier server
        ended = [outcome for event in events for outcome in outcomes.read(event)]
        if rids <= {outcome.rid for outcome in ended}:
            break
        assert time.monotonic() < deadline_s, rids - {outcome.rid for outcome in ended}
        time.sleep(0.2)
    computed_s = {rid: event.t_s for event in events if isinstance(event, Complete) for rid in event.rids}
    for outcome in ended:
        assert (computed_s.get(outcome.rid, math.inf) <= outcome.arrival.deadline_s) == (outcome.met is True)
    told = [(outcome, MET if outcome.cause is None else LABELS[outcome.cause]) for outcome in ended]
    counts = Counter((outcome.arrival.slo_class, became) for outcome, became in told)
    return Told(counts, {outcome.rid: became for outcome, became in told if outcome.met is False})


def test_metrics_page_timeline_and_event_log_say_the_same_of_one_run(run: Run) -> None:
    rids = miss_objectives(run.server.url)
    log = by_event_log(run, rids)
    assert {became for _, became in log.counts} >= CAUSED
    views = {"metrics": by_metrics(run), "page": by_page(run), "timeline": by_timeline(run)}

    compared = 0
    for name, view in views.items():
        for slo_class in CLASSES:
            for became in (MET, *LABELS.values()):
                if name != "page" or became not in (ABORTED_BEFORE, NOT_VALID):
                    cell = slo_class, became
                    assert view.counts[cell] == log.counts[cell], (name, *cell)
                    compared += 1
            assert view.of_class(slo_class) == log.of_class(slo_class), (name, slo_class)
            compared += 1
        assert {slo_class for slo_class, _ in view.counts} <= set(CLASSES)
        if name != "metrics":
            assert view.misses == log.misses, name
            compared += len(log.misses)
    print(f"{compared} comparisons of {log.counts.total()} requests: {dict(log.counts)}")
    assert compared >= LEAST_COMPARED
