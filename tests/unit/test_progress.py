"""Progress is visible on a terminal and without one."""

from io import StringIO

import pytest
from rich.console import Console

from sgl_flowprefill.bench.loadgen import progress
from sgl_flowprefill.bench.loadgen.progress import ReplayProgress


def test_without_a_terminal_a_line_comes_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    output = StringIO()
    with ReplayProgress("FlowPrefill", 40, 1000.0, Console(file=output, width=80)) as shown:
        shown.update(done=12, failed=1, in_flight=3)
    assert "FlowPrefill: 12 of 40 requests done, 3 under way, 1 failed, 1000 s left" in output.getvalue()


def test_lines_are_not_more_frequent_than_that() -> None:
    output = StringIO()
    with ReplayProgress("FlowPrefill", 40, 1000.0, Console(file=output)) as shown:
        for done in range(40):
            shown.update(done, failed=0, in_flight=0)
    assert output.getvalue() == ""


def test_a_terminal_shows_a_bar_and_what_is_left() -> None:
    output = StringIO()
    with ReplayProgress("FlowPrefill", 40, 0.0, Console(file=output, force_terminal=True, width=120)) as shown:
        shown.update(done=12, failed=0, in_flight=3)
    assert "12/40" in output.getvalue()
    assert "waiting for the last answers" in output.getvalue()
