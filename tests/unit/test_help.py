"""Every command explains itself: a help text with a stray per cent sign would be a traceback."""

from __future__ import annotations

import pytest

from sgl_flowprefill.bench.__main__ import main as bench
from sgl_flowprefill.cluster.cli import main as launch

BENCH = ("demo", "goodput", "uncontended", "breakdown", "replay", "validate", "simulate", "events", "fetch-trace")


@pytest.mark.parametrize("command", BENCH)
def test_a_benchmark_explains_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        bench([command, "--help"])
    assert command in capsys.readouterr().out


def test_those_are_all_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        bench(["--help"])
    listed = [line.partition("•")[2].split()[0] for line in capsys.readouterr().out.splitlines() if "•" in line]
    assert listed == list(BENCH)


@pytest.mark.parametrize("command", [[], ["profile"], ["doctor"]])
def test_the_launcher_explains_its_options(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        launch([*command, "--help"])
    assert "--flowprefill" in capsys.readouterr().out


def test_the_report_of_a_card_explains_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        launch(["gpu-report", "--help"])
    assert "--budget-s" in capsys.readouterr().out


def test_the_launcher_names_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        launch(["--help"])
    shown = capsys.readouterr().out
    assert [name for name in ("profile", "doctor", "timeline", "top", "gpu-report") if f"`{name}`" not in shown] == []
