"""A run in which requests miss their objectives: metrics, page, timeline and event log say the same of it."""

from __future__ import annotations

import math
import time
import zlib
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import pytest
import requests
from msgspec import UNSET
from prometheus_client.parser import text_string_to_metric_families

from sgl_flowprefill.cluster import Cluster
from sgl_flowprefill.cluster.base import LOOPBACK
from sgl_flowprefill.cluster.top_command import documents
from sgl_flowprefill.events import AnyEvent, Arrival, Complete, Leave, Ready, Start, decode_events, read_events
from sgl_flowprefill.live import EVENTS, TIMELINE
from sgl_flowprefill.metrics.table import ABORTED, INVALID, TTFT_MET, TTFT_MISSED
from sgl_flowprefill.outcomes import Outcome, Outcomes
from tests.faults import PARAMETER
from tests.prompts import prompt
from tests.servers.conftest import OneCluster
from tests.trace_processor import trace_processor
from tests.waiting import until

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
CAUSED_BY_PAIR: Final = {MET, "failed", "objective", "not_ready"}
LEAST_COMPARED: Final = 100
PLACELESS_S: Final = 30.0
"""Objective of a request that is at its scheduler before that, and gets no place at a decode server."""


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


@dataclass
class Clients:
    """Ask a server, or the gateway in front of some, for much at once."""

    url: str
    answers: dict[str, Future[requests.Response]] = field(default_factory=dict)
    """By the rids of what was asked for."""
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(30))

    def ask(
        self,
        rid: str,
        tokens: int,
        slo_s: float,
        slo_class: str = "default",
        placeless_at: str | None = None,
        **sampling: Any,
    ) -> Future[requests.Response]:
        """The answer to a request, which may be a refusal. ``placeless_at``: a prefill server that is asked for it, and
        no decode server.
        """
        asked, seed = {"slo_class": slo_class, "ttft_slo": slo_s}, zlib.crc32(rid.encode())
        body = {
            "rid": rid,
            "input_ids": prompt(seed, tokens),
            "sampling_params": {"max_new_tokens": 3, "temperature": 0, "custom_params": asked} | sampling,
        }
        if placeless_at is not None:
            body |= {"bootstrap_host": LOOPBACK, "bootstrap_room": seed}
        url = f"{placeless_at or self.url}/generate"
        self.answers[rid] = self.threads.submit(requests.post, url, json=body, timeout=TIMEOUT_S)
        return self.answers[rid]

    def miss_objectives(self, alone_s: float) -> None:
        """Have requests of three classes served, of which some miss their objectives for known causes. A short one is
        predicted to take ``alone_s``."""
        crowded_s = max(0.2, 2.5 * alone_s)  # less, nobody may ask for in the class interactive
        self.ask("long", LONG_TOKENS, AMPLE_S, "batch")
        for i in range(6):
            for slo_class in ("interactive", "batch"):
                self.ask(f"crowd-{slo_class}-{i}", SHORT_TOKENS, crowded_s, slo_class)
        for i in range(3):
            self.ask(f"hopeless-{i}", SHORT_TOKENS, HOPELESS_S)
            self.ask(f"ample-{i}", SHORT_TOKENS, AMPLE_S, "interactive")
        broken = {"slo_class": "default", "ttft_slo": AMPLE_S, PARAMETER: "error"}
        self.ask("broken", LONG_TOKENS, AMPLE_S, custom_params=broken)

    def give_up(self, rid: str, url: str) -> None:
        """Have the server at ``url`` abort a request."""
        while not self.answers[rid].done():
            requests.post(f"{url}/abort_request", json={"rid": rid}, timeout=TIMEOUT_S)
            time.sleep(0.1)

    def wait(self) -> set[str]:
        """The rids of all requests, when all have their answers."""
        self.threads.shutdown()
        return set(self.answers)


def by_metrics(url: str) -> Told:
    counts: Counter[tuple[str, str]] = Counter()
    text = requests.get(f"{url}/metrics", timeout=TIMEOUT_S).text
    for sample in (sample for family in text_string_to_metric_families(text) for sample in family.samples):
        if sample.name in (TTFT_MISSED.series, *UNCAUSED):
            became = UNCAUSED.get(sample.name) or sample.labels["cause"]
            counts[sample.labels["slo_class"], became] += int(sample.value)
    return Told(+counts, {})


def by_page(url: str) -> Told:
    """It has requests that met their objectives or missed them, and no others."""
    [server] = next(documents(url, None)).servers
    counts = Counter((miss.slo_class, LABELS[miss.cause]) for miss in server.misses)
    for of_class in server.attainment:
        assert of_class.missed == sum(miss.slo_class == of_class.slo_class for miss in server.misses)
        counts[of_class.slo_class, MET] = of_class.met
    return Told(+counts, {miss.rid: LABELS[miss.cause] for miss in server.misses})


def by_timeline(url: str, rids: set[str] | None = None) -> Told:
    """It has all requests that the server keeps in memory, of which ``rids`` are looked at."""
    response = requests.get(f"{url}{TIMELINE}?seconds=3000", timeout=TIMEOUT_S)
    with trace_processor(response.content) as trace:
        rows = trace.query(
            "select extract_arg(arg_set_id, 'debug.rid'), extract_arg(arg_set_id, 'debug.slo_class'), "
            "extract_arg(arg_set_id, 'debug.met'), extract_arg(arg_set_id, 'debug.cause') from slice "
            "where extract_arg(arg_set_id, 'debug.ttft_slo_s') is not null"
        )
    of_run = [row for row in rows if rids is None or row[0] in rids]
    counts = Counter((slo_class, MET if met else LABELS[cause]) for _, slo_class, met, cause in of_run)
    return Told(counts, {rid: LABELS[cause] for rid, _, met, cause in of_run if met == 0})


def by_event_log(server: Cluster, since_s: float, rids: set[str]) -> Told:
    """As soon as it has what became of ``rids``: the log reaches the file when the scheduler turns idle. What it has of
    the time before ``since_s`` is of an earlier server, or of other tests."""
    log, decodes = server.config.options.event_log, bool(server.config.unified)
    assert log is not None
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        outcomes = Outcomes(decodes)
        events = [event for event in read_events(log) if event.t_s >= since_s]
        ended = [outcome for event in events for outcome in outcomes.read(event)]
        if rids <= {outcome.rid for outcome in ended}:
            break
        assert time.monotonic() < deadline_s, rids - {outcome.rid for outcome in ended}
        time.sleep(0.2)
    if decodes:
        first_s = {rid: event.t_s for event in events if isinstance(event, Complete) for rid in event.rids}
    else:
        first_s = {event.rid: event.t_s for event in events if isinstance(event, Leave) and event.reason is UNSET}
    for outcome in ended:
        assert (first_s.get(outcome.rid, math.inf) <= outcome.arrival.deadline_s) == (outcome.met is True)
    told = [(outcome, MET if outcome.cause is None else LABELS[outcome.cause]) for outcome in ended]
    counts = Counter((outcome.arrival.slo_class, became) for outcome, became in told)
    return Told(counts, {outcome.rid: became for outcome, became in told if outcome.met is False})


def recent_events(url: str) -> list[AnyEvent]:
    """What a server keeps in memory of the last five minutes."""
    return decode_events(requests.get(f"{url}{EVENTS}?seconds=300", timeout=TIMEOUT_S).content)


def test_metrics_page_timeline_and_event_log_say_the_same_of_one_run(
    fresh_unified_server: Cluster, one_cluster: OneCluster
) -> None:
    url = fresh_unified_server.url
    clients = Clients(url)
    alone = clients.ask("alone", SHORT_TOKENS, AMPLE_S).result().json()
    clients.miss_objectives(alone["meta_info"]["flowprefill"]["predicted_s"])
    clients.ask("refused", SHORT_TOKENS, AMPLE_S, "batch", regex=NO_GRAMMAR)
    clients.ask("given-up", 2 * LONG_TOKENS, AMPLE_S, "batch")
    clients.give_up("given-up", url)
    rids = clients.wait()
    log = by_event_log(fresh_unified_server, one_cluster.since_s, rids)
    assert {became for _, became in log.counts} >= CAUSED
    views = {"metrics": by_metrics(url), "page": by_page(url), "timeline": by_timeline(url)}

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


def test_they_say_the_same_of_a_run_of_a_pair_which_others_have_asked_before(flowprefill_cluster: Cluster) -> None:
    pair, url = flowprefill_cluster, flowprefill_cluster.prefill_url

    def of_placeless() -> Arrival | None:
        arrivals = (event for event in recent_events(url) if isinstance(event, Arrival))
        return next((event for event in arrivals if event.rid == "placeless"), None)

    until(lambda: requests.post(f"{url}/flush_cache", timeout=TIMEOUT_S).ok, TIMEOUT_S, every_s=0.2)  # nothing is left
    before, since_s = by_metrics(url).counts, time.monotonic()
    clients = Clients(pair.url)
    assert clients.ask("alone", SHORT_TOKENS, AMPLE_S).result().ok
    [alone] = [event for event in recent_events(url) if isinstance(event, Ready) and event.rid == "alone"]
    clients.miss_objectives(alone.predicted_s)
    clients.ask("placeless", SHORT_TOKENS, PLACELESS_S, placeless_at=url)
    until(lambda: of_placeless() is not None, TIMEOUT_S, every_s=0.5)
    placeless = of_placeless()
    assert placeless is not None
    until(lambda: time.monotonic() > placeless.deadline_s, TIMEOUT_S)
    clients.give_up("placeless", url)
    rids = clients.wait()

    log = by_event_log(pair, since_s, rids)
    assert log.counts.total() == len(rids)
    assert {became for _, became in log.counts} >= CAUSED_BY_PAIR
    assert log.misses["placeless"] == "not_ready"
    assert by_metrics(url).counts - before == log.counts
    timeline = by_timeline(url, rids)
    assert (timeline.counts, timeline.misses) == (log.counts, log.misses)
    [server] = next(documents(url, None)).servers
    assert {miss.rid: LABELS[miss.cause] for miss in server.misses if miss.rid in rids} == log.misses
    print(f"{len(rids)} requests: {dict(log.counts)}")


def test_answers_of_a_pair_say_what_its_prefill_server_knows(flowprefill_cluster: Cluster) -> None:
    url = flowprefill_cluster.prefill_url
    outcomes: dict[str, Outcome] = {}

    def begun(rid: str) -> bool:
        return any(isinstance(event, Start) and rid in event.rids for event in recent_events(url))

    def all_left(rids: set[str]) -> bool:
        reader = Outcomes(decodes=False)
        outcomes.update({one.rid: one for event in recent_events(url) for one in reader.read(event)})
        return rids <= outcomes.keys()

    clients = Clients(flowprefill_cluster.url)
    clients.ask("told-long", 2 * LONG_TOKENS, AMPLE_S)
    until(lambda: begun("told-long"), TIMEOUT_S)
    for i in range(3):
        clients.ask(f"told-urgent-{i}", SHORT_TOKENS, AMPLE_S / 4)
    clients.ask("told-hopeless", SHORT_TOKENS, HOPELESS_S)
    rids = clients.wait()
    until(lambda: all_left(rids), TIMEOUT_S)

    told = {rid: answer.result().json()["meta_info"]["flowprefill"] for rid, answer in clients.answers.items()}
    for rid, report in told.items():
        outcome = outcomes[rid]
        assert report["suspensions"] == outcome.suspensions, rid
        for name in ("predicted_s", "slack_at_admission_s", "waited_s", "suspended_s", "blocked_s"):
            assert report[name] == pytest.approx(getattr(outcome, name), rel=1e-6, abs=2e-6), (rid, name)
    assert {rid: report["met"] for rid, report in told.items()} == {rid: rid != "told-hopeless" for rid in rids}
    assert told.pop("told-hopeless")["cause"] == outcomes["told-hopeless"].cause == "objective shorter than its prefill"
    assert {report["cause"] for report in told.values()} == {None}
    assert told["told-long"]["suspensions"] >= 1
    assert told["told-long"]["suspended_s"] > 0
