"""``python -m sgl_flowprefill.metrics``: the text of ``docs/metrics.md``."""

from sgl_flowprefill.metrics.page import metrics_page

print(metrics_page(), end="")
