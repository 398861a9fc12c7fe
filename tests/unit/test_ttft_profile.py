"""Profiling runs on an engine that is made up: budget, order, interruption and resumption, the file, the report."""

from __future__ import annotations

import json
import os
import queue
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sgl_flowprefill.cluster import profile_command
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.profiling import Profile, ProfileError, Row, Setting, make_design, read_profile, write_profile
from sgl_flowprefill.profiling.design import Shape, references
from sgl_flowprefill.profiling.fitted import fit
from sgl_flowprefill.profiling.learned import History, begin, learned_path, write_learned
from sgl_flowprefill.profiling.ranks import Done, Leader, follow
from sgl_flowprefill.profiling.report import Report
from sgl_flowprefill.profiling.run import LOOKS, QUICK_ROUNDS, Progress, Timing, partial_path, run_profile
from sgl_flowprefill.provenance import PROVENANCE
from sgl_flowprefill.ttft import PrefillShape

ROOT = Path(__file__).parents[2]
SETTING = Setting(model="m-1", device="made up", dtype="float32", attention_backend="none", threads=1, sglang="0")


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a prediction costs is no figure that is looked at here."""
    monkeypatch.setattr("sgl_flowprefill.profiling.report.COST_REPEATS", 2)


class MadeUpEngine:
    """Takes the time that a formula says, on a clock of its own; interrupts itself on request."""

    is_gpu = False

    def __init__(
        self,
        limit_tokens: int = 20_000,
        interrupt_after: int | None = None,
        seed: int = 0,
        slowness: Callable[[float], float] = lambda now_s: 1.0,
    ) -> None:
        self.limit_tokens = limit_tokens
        self._slowness = slowness
        self.now_s = 0.0
        self.cached_tokens = 0
        self.seen: list[Shape] = []
        self._interrupt_after = interrupt_after
        self._rng = random.Random(seed)

    def clock(self) -> float:
        return self.now_s

    def cache_prefix(self, tokens: int) -> None:
        self.cached_tokens = tokens
        self.seen.clear()

    def time(self, shape: Shape) -> Timing:
        assert all(new + cached <= self.limit_tokens for new, cached in shape)
        assert not self.cached_tokens or max(cached for _, cached in shape) <= self.cached_tokens
        new = sum(request.new_tokens for request in shape)
        pairs = sum(new * (cached + new / 2) for new, cached in shape)
        time_s = (0.004 + 8e-5 * new + 1.5e-8 * pairs) * self._rng.lognormvariate(0, 0.02)
        time_s *= self._slowness(self.now_s + time_s / 2)
        waited_s = time_s if self._rng.random() < 0.2 else 0.0
        self.now_s += time_s + waited_s
        self.seen.append(shape)
        if self.cached_tokens and len(self.seen) == self._interrupt_after:
            raise KeyboardInterrupt
        return Timing(shape, time_s + waited_s, waited_s)

    def time_operators(self, shape: Shape) -> tuple[Timing, float, float]:
        timing = self.time(shape)
        return timing, 0.3 * timing.time_s, 0.6 * timing.time_s


def profiled(path: Path, engine: MadeUpEngine, budget_s: float = 180.0, resumed: Profile | None = None) -> Profile:
    return run_profile(engine, SETTING, path, budget_s, resumed, clock=engine.clock)


def test_the_design_covers_what_serving_meets() -> None:
    design = make_design(8192)
    assert len(set(design)) == len(design)
    assert {len(shape) for shape in design} >= {1, 2, 4, 8, 16}
    assert min(shape[0].new_tokens for shape in design if len(shape) == 1 and not shape[0].cached_tokens) == 16
    assert max(request.new_tokens + request.cached_tokens for shape in design for request in shape) == 8192
    shares = [request.cached_tokens / (request.new_tokens + request.cached_tokens) for s in design for request in s]
    assert max(shares) == pytest.approx(0.95, abs=0.01)
    assert any(len({request.new_tokens for request in shape}) > 1 for shape in design)


def test_a_run_stays_within_its_budget_and_measures_everything_several_times(tmp_path: Path) -> None:
    engine = MadeUpEngine()
    profile = profiled(tmp_path / "p.parquet", engine)
    assert engine.now_s < 180 * 1.05
    assert profile.complete
    repeats = dict.fromkeys(make_design(profile.longest_tokens), 0)
    for row in profile.rows:
        repeats[row.shape] += row.attention_s is None
    assert min(repeats.values()) >= 2
    assert read_profile(tmp_path / "p.parquet") == profile


@pytest.mark.parametrize("budget_s", [20.0, 180.0])
def test_quick_shapes_are_measured_again_and_again_while_the_others_are_once(tmp_path: Path, budget_s: float) -> None:
    profile = profiled(tmp_path / "p.parquet", MadeUpEngine(), budget_s)
    first_round_s = [row.at_s for row in profile.rows if row.round == 1]
    begin_s, end_s = min(first_round_s), max(first_round_s)
    assert {row.shape for row in profile.rows if row.round == 1} == set(make_design(profile.longest_tokens))
    quick = {row.shape for row in profile.rows if row.round == 2 and row.at_s < end_s}
    assert len(quick) > 20
    assert {row.shape for row in profile.rows if row.round == 1 and row.time_s < 4e-4 * budget_s} <= quick
    for shape in quick:
        at_s = [row.at_s for row in profile.rows if row.shape == shape and row.round > 0 and row.at_s <= end_s]
        assert len(at_s) >= QUICK_ROUNDS - 1, "the last of them may come when the others are done"
        assert max(at_s) - min(at_s) > 0.4 * (end_s - begin_s)
    took_s = sum(row.time_s for row in profile.rows if row.shape in quick and 1 < row.round <= QUICK_ROUNDS)
    assert took_s < 0.25 * budget_s


@pytest.mark.parametrize("budget_s", [20.0, 2000.0])
def test_the_budget_decides_the_longest_prompt(tmp_path: Path, budget_s: float) -> None:
    profile = profiled(tmp_path / "p.parquet", MadeUpEngine(), budget_s)
    assert (profile.longest_tokens < 8192) == (budget_s < 100)
    assert profile.longest_tokens <= 20_000


def test_no_longer_prompts_than_the_engine_has_room_for(tmp_path: Path) -> None:
    assert profiled(tmp_path / "p.parquet", MadeUpEngine(limit_tokens=700)).longest_tokens == 700


def test_an_interrupted_run_keeps_what_it_has_and_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    with pytest.raises(KeyboardInterrupt):
        profiled(path, MadeUpEngine(interrupt_after=150))
    assert not path.exists()
    kept = read_profile(partial_path(path))
    assert len(kept.rows) == 149
    assert not kept.complete
    resumed = profiled(path, MadeUpEngine(seed=1), resumed=kept)
    assert resumed.rows[:149] == kept.rows
    assert resumed.longest_tokens == kept.longest_tokens
    assert resumed.complete
    assert path.exists()
    assert not partial_path(path).exists()


def test_an_interrupted_run_leaves_an_earlier_profile_alone(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    first = profiled(path, MadeUpEngine())
    with pytest.raises(KeyboardInterrupt):
        profiled(path, MadeUpEngine(interrupt_after=50))
    assert read_profile(path) == first


def test_a_resumed_run_goes_on_with_what_was_not_measured_in_that_round(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        profiled(tmp_path / "p.parquet", MadeUpEngine(interrupt_after=80))
    kept = read_profile(partial_path(tmp_path / "p.parquet"))
    resumed = profiled(tmp_path / "p.parquet", MadeUpEngine(), resumed=kept)
    measured = Counter((row.round, row.shape) for row in resumed.rows)
    assert all(count == (1 if index else LOOKS) for (index, _), count in measured.items())


@pytest.mark.parametrize(
    ("limit_tokens", "budget_s", "lengths"),
    [
        (20_000, 30.0, [*3 * [512, 1024, 2048, 4096], 20_000]),
        (20_000, 5.0, [*3 * [512, 1024], 4096]),
        (700, 5.0, 3 * [23, 45, 91, 181, 362, 700]),
    ],
)
def test_on_a_gpu_prompts_are_looked_into_that_tell_of_rows_and_as_long_a_one_as_the_budget_allows(
    limit_tokens: int, budget_s: float, lengths: list[int], tmp_path: Path
) -> None:
    engine = MadeUpEngine(limit_tokens)
    engine.is_gpu = True
    rows = profiled(tmp_path / "p.parquet", engine, budget_s).rows
    looks = [row.shape[0].new_tokens for row in rows if row.attention_s is not None and row.round == 0]
    assert sorted(looks) == sorted(lengths)


def test_each_round_has_an_order_of_its_own(tmp_path: Path) -> None:
    rows = profiled(tmp_path / "p.parquet", MadeUpEngine()).rows
    orders = [[row.shape for row in rows if row.round == index] for index in (1, 2)]
    assert orders[0] != orders[1]
    assert set(orders[0]) == set(orders[1])


def test_progress_is_told(tmp_path: Path) -> None:
    engine, told = MadeUpEngine(), list[Progress]()
    profile = run_profile(engine, SETTING, tmp_path / "p.parquet", 60.0, None, told.append, engine.clock)
    assert [now.measured for now in told] == list(range(1, len(profile.rows) + 1))
    assert told[-1].elapsed_s <= 60.0 * 1.05


@pytest.mark.parametrize("longest_tokens", [64, 300, 1024, 8192])
def test_any_beginning_of_the_design_has_all_kinds_of_all_sizes(longest_tokens: int) -> None:
    design = make_design(longest_tokens)
    for part in (design[: max(9, len(design) // 4)], design):
        kinds = [(len(shape) > 1, any(cached for _, cached in shape)) for shape in part]
        assert {(False, False), (False, True), (True, False)} <= set(kinds)
        alone = [shape[0].new_tokens for shape in part if len(shape) == 1 and not shape[0].cached_tokens]
        assert min(alone) <= 32
        assert max(alone) >= 0.35 * longest_tokens
        assert longest_tokens < 1000 or any(64 <= tokens <= longest_tokens / 3 for tokens in alone)


def test_references_are_measured_all_the_time_and_take_little_of_it(tmp_path: Path) -> None:
    engine = MadeUpEngine()
    profile = profiled(tmp_path / "p.parquet", engine)
    rows = [row for row in profile.rows if row.round < 0]
    assert {row.shape for row in rows} == set(references(profile.longest_tokens))
    assert 0.03 < sum(row.time_s for row in rows) / engine.now_s < 0.11
    at_s = [row.at_s for row in rows]
    longest_s = max(row.time_s for row in profile.rows)
    assert max(late - early for early, late in pairwise(at_s)) < 3.0 + 2 * longest_s


def other_load(now_s: float) -> float:
    """Something else runs on the machine for 20 s, and pauses for 20 s."""
    return 1.6 if int(now_s // 20) % 2 else 1.0


@pytest.mark.parametrize("budget_s", [20.0, 180.0])
def test_a_machine_whose_speed_drifts_is_profiled_as_it_usually_is(tmp_path: Path, budget_s: float) -> None:
    report = Report(profiled(tmp_path / "p.parquet", MadeUpEngine(slowness=lambda s: other_load(s + 10)), budget_s))
    figures = report.to_json()
    assert figures["median_ape"] <= 0.03
    assert figures["p90_ape"] <= 0.08
    assert figures["speed_range"] == pytest.approx(0.6, abs=0.1)
    if budget_s > 100:
        assert figures["repeat_spread"] < 0.03
        assert figures["repeat_spread_untreated"] > figures["repeat_spread"]
    for kind in ("batched", "prefix_cached"):
        assert figures["strata"][kind]["p90_ape"] <= figures["strata"][kind]["cubic"]["p90_ape"] / 2


def test_runs_that_go_on_with_each_other_do_not_share_the_machines_speed(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    with pytest.raises(KeyboardInterrupt):
        profiled(path, MadeUpEngine(interrupt_after=150, slowness=lambda now_s: 2.0))
    resumed = profiled(path, MadeUpEngine(seed=1), resumed=read_profile(partial_path(path)))
    times_s: dict[Shape, list[float]] = {}
    for shape, time_s in zip(*resumed.timings(), strict=True):
        times_s.setdefault(shape, []).append(time_s)
    assert max(max(of) / min(of) for of in times_s.values()) < 1.5


def test_a_server_with_little_time_has_a_model_of_batches_and_prefixes(tmp_path: Path) -> None:
    engine = MadeUpEngine()
    profile = run_profile(engine, SETTING, None, 20.0, clock=engine.clock, most_rounds=3)
    assert engine.now_s < 20 * 1.05
    assert not list(tmp_path.iterdir())
    figures = Report(profile).to_json()
    assert figures["median_ape"] <= 0.03
    assert figures["p90_ape"] <= 0.08
    assert figures["extrapolation"]["4x"]["p90_ape"] <= 0.10


def test_some_shapes_are_measured_whatever_the_budget(tmp_path: Path) -> None:
    profile = profiled(tmp_path / "p.parquet", MadeUpEngine(), budget_s=0.1)
    assert profile.complete
    shapes = [row.shape for row in profile.rows if row.round > 0]
    assert len(set(shapes)) == 12
    assert any(len(shape) > 1 for shape in shapes)


def test_ranks_measure_the_same_shapes_and_get_the_first_ones_profile() -> None:
    engines = [MadeUpEngine(seed=seed) for seed in range(2)]
    sent: queue.Queue[Any] = queue.Queue()

    def say(value: Any) -> Any:
        sent.put(value)
        return value

    with ThreadPoolExecutor() as pool:
        follower = pool.submit(follow, engines[1], lambda value: sent.get(timeout=10))
        profile = run_profile(Leader(engines[0], say), SETTING, None, 5.0, clock=engines[0].clock)
        say(Done(profile))
        assert follower.result() is profile
    assert engines[0].seen == engines[1].seen
    assert engines[0].cached_tokens == engines[1].cached_tokens == profile.longest_tokens


@pytest.mark.parametrize(
    "row",
    [
        Row((PrefillShape(64),), float("nan"), 0.0, 1, 0.0),
        Row((PrefillShape(64),), -1.0, 0.0, 1, 0.0),
        Row((PrefillShape(-64),), 1.0, 0.0, 1, 0.0),
        Row((), 1.0, 0.0, 1, 0.0),
    ],
)
def test_a_profile_that_nobody_can_have_measured_is_refused(tmp_path: Path, row: Row) -> None:
    write_profile(tmp_path / "p.parquet", Profile(SETTING, 64, [row]))
    with pytest.raises(ProfileError, match="not a profile"):
        read_profile(tmp_path / "p.parquet")


def test_a_model_is_fitted_to_undisturbed_forward_passes() -> None:
    one = (PrefillShape(100),)
    rows = [Row(one, 2.0, 0.5, 1, 0.0), Row(one, 9.0, 0.0, 0, 0.0, attention_s=1.0, mlp_s=1.0)]
    assert Profile(SETTING, 100, rows).timings() == ([one], [1.5])


def test_what_is_no_profile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no parquet")
    with pytest.raises(ProfileError, match="not a profile"):
        read_profile(tmp_path / "text")
    with pytest.raises(ProfileError, match="no such file"):
        read_profile(tmp_path / "absent")


def test_a_difference_between_settings_is_named() -> None:
    other = SETTING.model_copy(update={"threads": 4, "device": "another"})
    assert SETTING.difference(other) == "device made up, not another, threads 1, not 4"


def test_a_cache_that_cannot_be_entered_costs_a_start_a_measurement_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sgl_flowprefill.runtime import profile

    cache, stat = tmp_path / "no directory" / "cache", os.stat
    cache.parent.touch()

    def forbidding(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(str(cache)):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **options)

    engine = MadeUpEngine()
    ranks = SimpleNamespace(rank_in_group=0, world_size=1, broadcast_object=lambda value: value)
    role: Any = SimpleNamespace(scheduler=SimpleNamespace(tp_group=ranks, device="cpu"))
    monkeypatch.setenv("FLOWPREFILL_CACHE_DIR", str(cache))
    monkeypatch.setattr(profile, "current_setting", lambda scheduler: SETTING)
    monkeypatch.setattr(profile, "SchedulerEngine", lambda role, most_tokens: engine)
    monkeypatch.setattr(profile, "run_profile", partial(run_profile, clock=engine.clock))
    monkeypatch.setattr(os, "stat", forbidding)
    ttft, _ = profile.load_or_measure(role, FlowPrefillConfig())
    assert ttft.model.predict_s([PrefillShape(64)]) > 0
    assert [record.message for record in caplog.records if "cannot keep the profile" in record.message]


class CompilingEngine(MadeUpEngine):
    """Compiles kernels for a minute before the first prompt, and others before the first cached prefix."""

    compiled: frozenset[bool] = frozenset()

    def time(self, shape: Shape) -> Timing:
        kinds = {cached > 0 for _, cached in shape}
        self.now_s += 60.0 * len(kinds - self.compiled)
        self.compiled |= kinds
        return super().time(shape)


def test_kernels_that_a_first_start_compiles_leave_time_for_looks_into_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sgl_flowprefill.runtime import profile

    engine = CompilingEngine()
    engine.is_gpu = True
    ranks = SimpleNamespace(rank_in_group=0, world_size=1, broadcast_object=lambda value: value)
    role: Any = SimpleNamespace(scheduler=SimpleNamespace(tp_group=ranks, device="cuda"))
    monkeypatch.setenv("FLOWPREFILL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(profile, "current_setting", lambda scheduler: SETTING)
    monkeypatch.setattr(profile, "most_whole_tokens", lambda scheduler: engine.limit_tokens)
    monkeypatch.setattr(profile, "SchedulerEngine", lambda role, most_tokens: engine)
    monkeypatch.setattr(profile, "run_profile", partial(run_profile, clock=engine.clock))
    _, operators = profile.load_or_measure(role, FlowPrefillConfig())
    assert engine.compiled == {False, True}
    assert operators is not None, "tiles are planned by them"


def test_the_report_has_the_figures(tmp_path: Path) -> None:
    report = Report(profiled(tmp_path / "p.parquet", MadeUpEngine()))
    figures = report.to_json()
    assert figures["median_ape"] <= 0.03
    assert figures["p90_ape"] <= 0.10
    assert figures["worst_shape"]["ape"] >= figures["p90_ape"]
    assert set(figures["strata"]) == {"single", "batched", "prefix_cached"}
    for kind in ("batched", "prefix_cached"):
        assert figures["strata"][kind]["p90_ape"] <= figures["strata"][kind]["cubic"]["p90_ape"] / 2
    assert figures["extrapolation"]["4x"]["p90_ape"] < 0.15
    assert figures["predict_one_us"] > 0
    report.write_plot(tmp_path / "plot.html")
    assert (tmp_path / "plot.html").stat().st_size > 10_000


def test_the_command_reports_on_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.parquet"
    profiled(path, MadeUpEngine(), budget_s=20.0)
    assert profile_command.main(["--report", "-o", str(path)]) == 0
    out = capsys.readouterr().out
    assert "cubic" in out
    assert out.startswith(f"{path}: model m-1, device made up, dtype float32, ")


def test_the_report_as_json_says_where_its_figures_come_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.parquet"
    profiled(path, MadeUpEngine(), budget_s=20.0)
    assert profile_command.main(["--report", "--json", "-o", str(path)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document.keys() >= set(PROVENANCE)
    assert document["kind"] == "profile"
    assert document["command"] == f"launch.py profile --report --json -o {path}"
    assert document["profile"] == str(path)
    assert document["setting"]["model"] == "m-1"


def test_the_report_has_what_was_learned_with_its_profile_and_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.parquet"
    profile = profiled(path, MadeUpEngine(), budget_s=20.0)
    learned = begin(profile, fit(profile)).model_copy(update={"history": History(tasks=7, refits=2)})
    other_setting = learned.model_copy(update={"setting": SETTING.model_copy(update={"threads": 2})})

    def reported() -> Any:
        assert profile_command.main(["--report", "--json", "-o", str(path)]) == 0
        return json.loads(capsys.readouterr().out)["learned"]

    assert reported() is None
    write_learned(learned_path(path), other_setting)
    assert reported() is None
    write_learned(learned_path(path), learned)
    found = reported()
    assert (found["tasks"], found["refits"], found["rows"]) == (7, 2, len(learned.rows))
    profiled(path, MadeUpEngine(seed=1), budget_s=20.0)
    assert reported() is None, "it was profiled again since"


def test_a_damaged_file_of_what_was_learned_costs_the_report_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.parquet"
    profiled(path, MadeUpEngine(), budget_s=20.0)
    learned_path(path).write_bytes(b"damaged")
    assert profile_command.main(["--report", "-o", str(path)]) == 0
    said = capsys.readouterr()
    assert "worst shape" in said.out
    assert "learned while serving" not in said.out
    assert said.err.count(f"{learned_path(path)}: not what a server has learned\n") == 1


def test_the_command_reports_on_the_model_that_it_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWPREFILL_CACHE_DIR", str(tmp_path))
    for age_s, model in enumerate(("newest-1", "some-model-1", "some-model-2")):
        path = tmp_path / "profiles" / f"{model}.parquet"
        write_profile(path, Profile(SETTING.model_copy(update={"model": model}), 100, complete=True))
        os.utime(path, (1000 - age_s, 1000 - age_s))
    (tmp_path / "profiles" / "broken.parquet").touch()
    assert profile_command.newest_profile("somebody/some-model").name == "some-model-1.parquet"
    assert profile_command.newest_profile("./newest/").name == "newest-1.parquet"
    assert profile_command.main(["--report", "--model-path", "somebody/model"]) == 2
    assert "with --model-path somebody/model; run `python launch.py profile --model-path" in capsys.readouterr().err


COMMAND = """
import os, sys
from types import SimpleNamespace
from sgl_flowprefill.cluster import cli, preflight
layout = SimpleNamespace(
    ranks=lambda role: 1,
    server_options=lambda role: [],
    server_env=lambda role: os.environ | {{"PYTHONPATH": {folder!r}}},
)
preflight.prepare = lambda config: layout
sys.exit(cli.main(["profile", "-o", {path!r}, "--log-dir", {folder!r}]))
"""
MEASURING = """
import json, os, signal, time
from pathlib import Path

def interrupted(number, frame):
    print(json.dumps({{"path": {path!r}, "complete": False, "measured": 7}}), flush=True)
    os._exit(0)

signal.signal(signal.SIGINT, interrupted)
for measured in range(4000):  # more than a pipe holds: the command has read some of it
    print(json.dumps({{"elapsed_s": 1.0, "measured": measured, "what": "made up"}}), flush=True)
Path({path!r}).touch()
time.sleep(60)
"""
"""In place of the process that measures, before Python looks at which module it is to run."""


def test_a_command_that_is_interrupted_lets_its_process_save_what_it_has_and_says_that_it_goes_on(
    tmp_path: Path,
) -> None:
    partial = tmp_path / "p.partial.parquet"
    (tmp_path / "sitecustomize.py").write_text(MEASURING.format(path=str(partial)))
    script = COMMAND.format(folder=str(tmp_path), path=str(tmp_path / "p.parquet"))
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as command:
        try:
            while not partial.exists():
                assert command.poll() is None
                time.sleep(0.05)
            time.sleep(0.5)  # it reads the rest
            command.send_signal(signal.SIGINT)
            out, _ = command.communicate(timeout=60)
        finally:
            command.kill()
    assert command.returncode == 1
    assert f"7 forward passes in {partial}" in out
    assert "The same command goes on where this run stopped." in out


def test_the_command_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWPREFILL_CACHE_DIR", str(tmp_path))
    assert profile_command.main(["--report"]) == 2
    assert "nothing has been profiled yet" in capsys.readouterr().err
    write_profile(tmp_path / "p.parquet", Profile(SETTING, 64, [Row((PrefillShape(64),), 0.1, 0.0, 1, 0.0)]))
    assert profile_command.main(["--report", "-o", str(tmp_path / "p.parquet")]) == 2
    assert "at least" in capsys.readouterr().err
    assert profile_command.main(["--budget-s", "-3"]) == 2
    assert "--budget-s" in capsys.readouterr().err
