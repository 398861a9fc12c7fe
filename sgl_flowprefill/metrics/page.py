"""docs/metrics.md, written from the table."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.metrics import alerts, dashboard
from sgl_flowprefill.metrics.table import TABLE, Label, Metric

INTRODUCTION: Final = """\
# Metrics

With SGLang's `--enable-metrics`, `/metrics` of a server that prefills has, beside SGLang's own metrics, those below.
This page comes from the table in `sgl_flowprefill/metrics/table.py`, by `python -m sgl_flowprefill.metrics >
docs/metrics.md`; exporter, dashboard and alert rules are made from it, too.

Every metric has the labels of SGLang's scheduler metrics (`model_name`, `engine_type`, ranks). With tensor parallelism,
the first rank tells. A request counts when it is known what became of it: its first token is where the client is
answered from, or it has ended without. So `flowprefill:time_to_first_token_seconds` ends when the KV cache has reached
the decode server, and on a server that decodes when the prefill is over; the way back to the client comes on top.
Attainment, in PromQL:

    sum(rate(flowprefill:ttft_slo_met_total[5m]))
      / (sum(rate(flowprefill:ttft_slo_met_total[5m])) + sum(rate(flowprefill:ttft_slo_missed_total[5m])))

The causes of misses are those of the [timeline](operations.md#timeline) (`sgl_flowprefill/misses.py`). All of them
are written twice a second while something runs, a few at each event, and at once when there is nothing to do; gauges
then every 5 s.

What it costs, by `python -m tests.observing_cost` on one of two quiet cores of an AMD EPYC, in the median: 3 µs of
CPU time for a request that arrives and preempts a prefill, 7 µs for a prefill that ends and another that goes on;
where reports in answers are off, which read the same outcomes of requests, 5 and 10 µs. Metrics, reports, events in
memory, event log and interruption points together: 22 and 26 µs.
"""

BEHIND: Final = """
## Dashboard, Prometheus, alerts

[deploy/monitoring](../deploy/monitoring) is like SGLang's `examples/monitoring`: Prometheus and Grafana in containers,
with the host's network.

    python launch.py --flowprefill --ports 30000,30001 --enable-metrics
    docker compose -f deploy/monitoring/docker-compose.yaml up

`prometheus.yaml` there reads the prefill server on port 30001; put in the addresses of yours. Grafana, on port 3000,
has the dashboard *FlowPrefill* then:

| section | panels |
| --- | --- |
{panels}

Where Prometheus and Grafana run already:

    python -m sgl_flowprefill.metrics.dashboard > flowprefill-dashboard.json     # to import in Grafana
    python -m sgl_flowprefill.metrics.alerts --target 0.95 > alerts.yaml         # rule_files of Prometheus

Prometheus 2.42 sees the names with underscores in place of colons, SGLang's too: prometheus_client 0.26, with which
SGLang answers, writes them so for clients that do not ask for names as they are. `metric_relabel_configs` in
`prometheus.yaml` puts the colons back.

The alerts watch how fast the misses that a target leaves are used up, by class, model and scrape job, each over a long
and a short window together (the SRE Workbook's multi-window burn rates): the long one has seen enough misses to matter,
and the short one sees that they go on. With the default target of {target:.0%}:

| alert | long | short | share of misses | severity |
| --- | --- | --- | --- | --- |
{burns}

`FlowPrefillTBT…Burn` are the same for the tokens behind the first, on servers that prefill and decode. No alert speaks
of fewer than {least} requests, or tokens, in its long window. `FlowPrefillSlowerThanProfiled` says that a server's
prefills, of which some have run meanwhile, have taken {corrected:g} times as long as in its profile for half an hour.

Tests evaluate every query of dashboard and alerts in a real Prometheus, on what running servers export, and the alerts
on series made up for it (`tests/unit/test_metrics_prometheus.py`, `tests/servers/`). They are skipped where
`prometheus` and `promtool` (Debian's package `prometheus`) are not installed. Grafana itself runs in no test: how the
dashboard looks in it was not checked, and there is no picture of it here.
"""


def metrics_page() -> str:
    """The whole page."""
    both = [metric for metric in TABLE if not metric.unified]
    unified = [metric for metric in TABLE if metric.unified]
    labels = list(dict.fromkeys(label for metric in TABLE for label in metric.labels))
    return "\n".join(
        [
            INTRODUCTION,
            _table(both),
            "\nServers that [prefill and decode](unified.md) have besides:\n",
            _table(unified),
            "\nLabels:\n",
            "| label | values | |\n| --- | --- | --- |",
            *map(_label, labels),
            BEHIND.format(
                panels="\n".join(
                    f"| {title} | {'; '.join(panel.title for panel in panels)} |"
                    for title, panels in dashboard.SECTIONS.items()
                ),
                burns="\n".join(
                    f"| `FlowPrefillTTFT{burn.name}Burn` | {burn.long} | {burn.short} | "
                    f"{alerts.limit(burn, alerts.TARGET):.3g} | {burn.severity} |"
                    for burn in alerts.BURNS
                ),
                target=alerts.TARGET,
                least=alerts.LEAST_JUDGED,
                corrected=alerts.CORRECTED,
            ).rstrip("\n"),
            "",
        ]
    )


def _table(metrics: list[Metric]) -> str:
    rows = ["| metric | type | labels | unit | | fed from |", "| --- | --- | --- | --- | --- | --- |"]
    for metric in metrics:
        labels = ", ".join(f"`{label.name}`" for label in metric.labels)
        buckets = f" Buckets up to {_numbers(metric.buckets)}." if metric.buckets else ""
        rows.append(
            f"| `{metric.series}` | {metric.kind} | {labels} | {metric.unit} | {metric.help}{buckets} | "
            f"{metric.fed_from} |"
        )
    return "\n".join(rows)


def _numbers(bounds: tuple[float, ...]) -> str:
    return ", ".join(f"{bound:g}" for bound in bounds)


def _label(label: Label) -> str:
    values = "" if label.values is None else ", ".join(f"`{value}`" for value in label.values)
    return f"| `{label.name}` | {values} | {label.help} |"
