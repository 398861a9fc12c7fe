"""What a server with FlowPrefill tells Prometheus: one table, and what is made of it.

``table.py`` has every metric. The exporter (``runtime/metrics.py``), docs/metrics.md (``python -m
sgl_flowprefill.metrics``), the Grafana dashboard (``python -m sgl_flowprefill.metrics.dashboard``) and the alert rules
(``python -m sgl_flowprefill.metrics.alerts``) take names, labels and buckets from there.
"""
