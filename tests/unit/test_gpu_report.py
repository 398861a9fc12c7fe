"""``launch.py gpu-report`` without its engine: phases in turns, what is chosen from their figures, report."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import psutil
import pytest
import torch
from torch import nn

pytest.importorskip("sglang")

from sgl_flowprefill import provenance
from sgl_flowprefill.cluster import machine
from sgl_flowprefill.cluster.cli import main as launch
from sgl_flowprefill.gpu_report import command
from sgl_flowprefill.gpu_report.document import Document
from sgl_flowprefill.gpu_report.page import render_page
from sgl_flowprefill.gpu_report.phases import Phase, plan, to_check
from sgl_flowprefill.gpu_report.phases.base import Budget, Request
from sgl_flowprefill.gpu_report.phases.goodput import COMPARED_UNIFIED, PrefillOnlyApi, systems_that_fit
from sgl_flowprefill.gpu_report.shapes import SHAPES, shape_path
from sgl_flowprefill.gpu_report.tuning import choose
from sgl_flowprefill.patches import lone_prefill, made_weights
from tests.processes import still_alive

# ---- what is chosen --------------------------------------------------------------------------------------------------


def chosen(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {choice.option: choice.value for choice in choose(lambda phase: figures.get(phase, {}))}


def idle(**shares: tuple[float, ...]) -> dict[str, Any]:
    """Idle shares by look-ahead, of one prompt length after the other."""
    lengths = range(len(next(iter(shares.values()))))
    return {"rows": [{"idle": {ahead[1:]: values[length] for ahead, values in shares.items()}} for length in lengths]}


def test_the_shortest_look_ahead_that_keeps_the_device_busy_at_all_lengths_is_chosen() -> None:
    figures = idle(_0=(0.2, 0.05), _1=(0.03, 0.004), _2=(0.009, 0.001), _4=(0.002, 0.0))
    assert chosen({"lookahead": figures}) == {"lookahead": 2}


def test_where_none_keeps_it_busy_the_best_is_chosen_and_the_reason_says_so() -> None:
    figures = {"lookahead": idle(_0=(0.2,), _4=(0.02,))}
    [choice] = choose(lambda phase: figures.get(phase, {}))
    assert choice.value == 4
    assert "none idles less" in choice.why
    assert "2.00% with 4" in choice.why
    assert choice.flag == "--flowprefill-lookahead 4"


def test_the_shortest_tiles_that_cost_little_are_chosen() -> None:
    rows = [{"length_ms": 2.0, "cost": 0.05}, {"length_ms": 5.0, "cost": 0.015}, {"length_ms": 10.0, "cost": 0.01}]
    assert chosen({"tiles": {"rows": rows}}) == {"max_blocking_ms": 5.0}


def test_nothing_is_chosen_from_what_was_not_measured() -> None:
    assert chosen({}) == {}
    assert chosen({"operators": {"batch_tokens": 512}}) == {"max_batch_tokens": 512}


# ---- phases in turns -------------------------------------------------------------------------------------------------


def test_a_budget_is_shared_out_of_what_is_left() -> None:
    now_s = 0.0
    budget = Budget(100.0, lambda: now_s)
    now_s = 40.0
    part = budget.part(0.5)
    assert part.left_s == 30.0
    now_s = 90.0
    assert (part.left_s, budget.left_s) == (0.0, 10.0)


def test_what_a_card_alone_can_show_is_named_on_the_cpu_engine() -> None:
    assert [phase.name for phase in plan((None,)) if phase.needs_card] == ["lookahead", "memory"]
    assert [phase.name for phase in plan(("flashinfer", "triton"))][:3] == [
        "machine", "checks:flashinfer", "checks:triton",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "hopper", "backends", "optional"),
    [
        (None, False, ("flashinfer", "triton", "fa3"), ["fa3"]),
        (None, True, ("fa3", "flashinfer", "triton"), ["fa3"]),
        ("triton", True, ("triton", "fa3", "flashinfer"), ["fa3"]),
        ("fa3", False, ("fa3", "flashinfer", "triton"), []),
    ],
)
def test_what_was_asked_for_is_preferred_and_then_what_sglang_chooses_and_it_may_be_missing_unless_asked_for(
    asked: str | None, hopper: bool, backends: tuple[str, ...], optional: list[str]
) -> None:
    assert to_check(asked, hopper) == backends
    assert [phase.backend for phase in plan(backends, asked=asked) if phase.is_optional] == optional


@pytest.mark.parametrize(("major", "hopper"), [(9, True), (8, False), (10, False)])
def test_a_hopper_is_known_by_its_compute_capability(major: int, hopper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    library = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=asked.append,
        nvmlDeviceGetHandleByUUID=asked.append,
        nvmlDeviceGetCudaComputeCapability=lambda handle: (major, 0),
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    for visible in ("2,3", "GPU-8f"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert machine.is_hopper() is hopper
    assert asked == [2, "GPU-8f"]


def test_where_nobody_can_be_asked_there_is_no_hopper() -> None:
    assert not machine.is_hopper()


@pytest.mark.parametrize(
    ("options", "platform", "device"),
    [([], "", "GPU"), (["--device", "cpu"], "", "CPU"), ([], "flowprefill_cpu", "CPU")],
)
def test_attention_backends_of_a_card_are_checked_unless_servers_run_on_the_cpu(
    options: list[str], platform: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "gpu_count", lambda: 1)
    monkeypatch.setenv("SGLANG_PLATFORM", platform)
    report = command.Report(command.make_parser().parse_args(["--out", str(tmp_path / "report")]), options)
    assert device in report.layout(None).device()
    backends = {phase.backend for phase in report.phases if phase.module == "checks"}
    assert backends == ({"flashinfer", "triton", "fa3"} if device == "GPU" else {None})


@pytest.mark.parametrize("asked", [[], ["--unified"]])
def test_decode_steps_are_measured_on_the_engine_of_a_unified_server(asked: list[str], tmp_path: Path) -> None:
    report = command.Report(command.make_parser().parse_args(["--out", str(tmp_path / "report"), *asked]), [])
    phases = {phase.name: phase for phase in report.phases}
    assert [phase.name for phase in report.phases if phase.role == "unified"] == ["steps"]
    assert list(phases)[-1] == ("goodput:unified" if asked else "goodput")
    steps, tokens = report.layout(phases["steps"]), report.layout(phases["tokens"])
    assert (steps.servers, tokens.servers) == ([("unified", 0)], [("prefill", 0)])
    assert "--disaggregation-mode" not in steps.server_options("unified")
    assert "--disaggregation-mode" in tokens.server_options("prefill")
    assert steps.server_env("unified")["FLOWPREFILL"] == "1"
    assert steps.gpus_needed() == tokens.gpus_needed() == 1


@pytest.mark.parametrize("limits_s", [(0.2,), (60.0, 0.2)])
def test_a_phase_that_hangs_is_ended_with_all_that_it_has_started(limits_s: tuple[float, ...]) -> None:
    hangs = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '60'])"]
    begin_s = time.monotonic()
    with (
        subprocess.Popen(hangs, start_new_session=True) as process,
        command.killed_after(process) as limit,
    ):
        while not psutil.Process(process.pid).children():
            time.sleep(0.05)
        children = psutil.Process(process.pid).children()
        for limit_s in limits_s:
            limit(limit_s)
        process.wait(30)
    assert process.returncode == -signal.SIGKILL
    assert still_alive(children) == []
    assert time.monotonic() - begin_s < 30


def test_a_phase_that_gets_on_is_given_another_limit() -> None:
    with (
        subprocess.Popen(["sleep", "1"], start_new_session=True) as process,
        command.killed_after(process) as limit,
    ):
        limit(0.5)
        limit(60.0)
        process.wait(30)
    assert process.returncode == 0


def test_a_phase_reads_what_another_has_found(tmp_path: Path) -> None:
    request = Request("goodput", tmp_path, Budget(1.0), ())
    document = Document(tmp_path, (), "", "", 1.0)
    first, second, *_ = plan((None,))
    document.note(first, {"state": "measured", "line": "", "figures": {"free_bytes": 7}}, 0.0)
    document.note(second, {"state": "not here", "line": ""}, 0.0)
    assert request.earlier(first.name) == {"free_bytes": 7}
    assert request.earlier(second.name) == request.earlier("never begun") == {}


def broken(name: str = "lookahead", is_optional: bool = False) -> Phase:
    """A phase that fails: it is not given the engine that it needs. Its module imports little."""
    return Phase(name, "Broken", 1.0, has_engine=False, is_optional=is_optional)


def test_a_phase_that_fails_says_so_and_the_next_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases = [broken(), broken("lookahead:again", is_optional=True), plan((None,))[0]]
    monkeypatch.setattr(command, "plan", lambda *_: phases)
    out = tmp_path / "report"
    assert launch(["gpu-report", "--out", str(out), "--budget-s", "1000"]) == command.EXIT_FAILED
    document = json.loads((out / "report.json").read_text())
    found = document["phases"]
    assert [found[phase.name]["state"] for phase in phases] == ["FAILED", "not here", "measured"]
    assert "TypeError" in found["lookahead"]["line"]
    assert "Traceback" in found["lookahead"]["log"]
    assert found["machine"]["figures"]["product_flop_per_s"] > 1e9
    assert json.loads((out / "phases" / "machine.json").read_text()) == found["machine"]
    assert document["ended"] == "finished"
    assert "TypeError" in (out / "report.html").read_text()


def test_what_does_not_fit_into_the_budget_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "plan", lambda *_: [plan((None,))[0], broken(), broken("lookahead:2")])
    assert launch(["gpu-report", "--out", str(tmp_path / "report"), "--budget-s", "0.1"]) == 0
    found = json.loads((tmp_path / "report" / "report.json").read_text())["phases"]
    assert [one["state"] for one in found.values()] == ["measured", "left out", "left out"]


def test_a_phase_waits_for_the_device_and_gets_a_share_of_what_is_left_then(tmp_path: Path) -> None:
    lock, until_s = tmp_path / "lock", time.monotonic() + 1000
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        worker = [sys.executable, "-m", "sgl_flowprefill.gpu_report.worker", "--phase", "machine", "--share", "0.5"]
        worker += ["--out", str(tmp_path), "--lock", str(lock), "--until-s", str(until_s)]
        with subprocess.Popen(worker, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            while not has_open(process, lock):
                time.sleep(0.05)
            assert not select.select([process.stdout], [], [], 1.0)[0], "it has not waited"
            left_s = until_s - time.monotonic()
            fcntl.flock(held, fcntl.LOCK_UN)
            first, second = map(json.loads, process.stdout)
    assert 0.4 * left_s < first["starts_for_s"] <= 0.5 * left_s
    assert second["outcome"]["state"] == "measured"


def has_open(process: subprocess.Popen[str], file: Path) -> bool:
    """Whether ``process``, which has not ended, has come so far that it opened ``file``."""
    assert process.poll() is None
    return str(file) in (one.path for one in psutil.Process(process.pid).open_files())


def test_time_is_kept_for_the_starts_of_the_engines_to_come(tmp_path: Path) -> None:
    """Otherwise slow starts would use up the budget before the last phase, which is left out then."""
    report = command.Report(
        command.make_parser().parse_args(["--out", str(tmp_path / "report"), "--budget-s", "300"]), []
    )
    commands: list[list[str]] = []
    guard: Any = SimpleNamespace(
        directory=tmp_path,
        follow=lambda command, env, log: commands.append(command),
        wait=subprocess.Popen.wait,
    )
    said = [{"starts_for_s": 9.0}, {"measures_for_s": 9.0}, {"outcome": {"state": "measured", "line": ""}}]
    starts = "; ".join(
        f"print({json.dumps(one)!r}, flush=True); time.sleep({0.5 * (at == 0)})" for at, one in enumerate(said)
    )
    phases = report.phases

    def ends_s() -> float:
        """When the first phase has to end, by the report's clock."""
        os.close(report.start(guard, phases[0], phases).lock)
        return float(commands[-1][commands[-1].index("--until-s") + 1]) - report.started_s

    assert ends_s() == pytest.approx(300.0)
    with subprocess.Popen(
        [sys.executable, "-c", f"import time; {starts}"], stdout=subprocess.PIPE, text=True
    ) as process:
        report.follow(command.Running(phases[1], process, os.open(os.devnull, os.O_RDONLY)), guard, [])
    assert 300.0 - 2.0 * (len(phases) - 1) < ends_s() <= 300.0 - 0.4 * (len(phases) - 1)


def holders(file: str) -> list[int]:
    """Processes that have ``file`` locked."""
    node = f":{Path(file).stat().st_ino}"
    locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return [int(lock[4]) for lock in locks if lock[1] == "FLOCK" and lock[5].endswith(node)]


def test_a_phase_begins_when_what_the_one_before_it_has_found_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine keeps it late, when the next phase's process has long been there."""
    machines = plan((None,))[0]
    monkeypatch.setattr(command, "plan", lambda *_: [machines, replace(machines, name="machine:again")])
    started: list[subprocess.Popen[str]] = []
    start, note = command.Report.start, Document.note
    ahead: list[list[int]] = []

    def start_noted(*arguments: Any) -> command.Running:
        running = start(*arguments)
        started.append(running.process)
        return running

    def note_late(document: Document, phase: Phase, found: Mapping[str, Any], elapsed_s: float) -> None:
        if phase is machines:
            first, second = started
            os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
            words = psutil.Process(second.pid).cmdline()
            ahead.append(holders(words[words.index("--lock") + 1]))
        note(document, phase, found, elapsed_s)

    monkeypatch.setattr(command.Report, "start", start_noted)
    monkeypatch.setattr(Document, "note", note_late)
    assert launch(["gpu-report", "--out", str(tmp_path / "report"), "--budget-s", "1000"]) == 0
    assert ahead == [[os.getpid()]]


def test_a_directory_that_is_no_reports_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").touch()
    assert launch(["gpu-report", "--out", str(tmp_path)]) == command.EXIT_CANNOT_START
    assert "there is something else" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


# ---- report ----------------------------------------------------------------------------------------------------------


def test_the_page_shows_what_was_found_and_what_failed(tmp_path: Path) -> None:
    document = Document(tmp_path, ["launch.py", "gpu-report"], "a model", "a card", 300.0, ended="interrupted")
    first, second, *_ = plan((None,))
    rows = [["attention slots", "pass", "0.1 <MiB>"]]
    document.note(first, {"state": "FAILED", "line": "RuntimeError: out & about", "log": "the end of the log"}, 1.0)
    document.note(second, {"state": "passed", "line": "all", "columns": ["check", "", ""], "rows": rows}, 2.0)
    page = render_page(json.loads(document.path.read_text()))
    for text in ("out &amp; about", "the end of the log", "0.1 &lt;MiB&gt;", "was interrupted"):
        assert text in page
    assert provenance.read_result(document.path).kind == "gpu-report"
    origin = json.loads(document.path.read_text())
    assert origin.keys() >= set(provenance.PROVENANCE)
    assert origin["command"] == "launch.py gpu-report"
    assert origin["commit"] == provenance.commit()
    assert f"<dd>{origin['commit']['hash'] or 'not known'}" in page
    assert origin["versions"]["sglang"] == "0.5.23"
    assert origin["versions"].keys() >= {"torch", "triton", "flashinfer-python", "sglang-kernel", "transformers"}


# ---- a model of which only the shape is known ------------------------------------------------------------------------


def test_the_large_shape_is_that_of_llama_3_1_8b() -> None:
    published = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    path = shape_path("llama-8b")
    config = json.loads((path / "config.json").read_text())
    assert {name: config[name] for name in published} == published
    assert config["torch_dtype"] == "bfloat16"
    assert not list(path.glob("*.safetensors"))
    assert len({shape.name for shape in SHAPES.values()}) == len(SHAPES)


def test_shapes_are_decoded_by_a_module_that_is_compiled_ahead() -> None:
    """FlashInfer's paged prefill, which SGLang takes for decoding where enough heads share a KV head."""
    from sglang.srt.layers.attention.flashinfer_backend import should_use_tensor_core

    for shape in SHAPES.values():
        assert should_use_tensor_core(torch.bfloat16, shape.heads, shape.kv_heads), shape.label


class Layer(nn.Module):
    """The weights that a Llama has, by name, in small."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(256, 512, bias=False)
        self.gate_up_proj = nn.Linear(256, 512, bias=False)
        self.norm = nn.LayerNorm(256, bias=False)
        self.embed_tokens = nn.Embedding(512, 256)
        self.lm_head = nn.Linear(256, 2 * made_weights.WORDS, bias=False)
        self.register_buffer("cos_sin_cache", torch.full((4, 4), 7.0))


def test_made_weights_keep_the_scale_of_what_they_multiply_and_are_the_same_each_time() -> None:
    first, second = Layer(), Layer()
    made_weights.make_weights(first)
    made_weights.make_weights(second)
    for mine, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(mine, other)
    assert float(first.qkv_proj.weight.std()) == pytest.approx(1.5 / 16, rel=0.05)
    assert float(first.gate_up_proj.weight.std()) == pytest.approx(1 / 16, rel=0.05)
    assert float(first.embed_tokens.weight.std()) == pytest.approx(1.0, rel=0.05)
    assert (first.norm.weight == 1).all()
    assert (first.cos_sin_cache == 7).all()
    logits = torch.randn(64, 256) @ first.lm_head.weight.T
    assert (logits.argmax(dim=1) < made_weights.WORDS).all()


# ---- servers without a decode server ---------------------------------------------------------------------------------


def test_requests_name_sglangs_fake_host_and_a_room_of_their_own() -> None:
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

    api = PrefillOnlyApi()
    bodies = [orjson.loads(api.body([1, 2, 3], 100, 0.5)) for _ in range(3)]
    assert {body["bootstrap_host"] for body in bodies} == {FAKE_BOOTSTRAP_HOST} == {lone_prefill.FAKE_BOOTSTRAP_HOST}
    assert len({body["bootstrap_room"] for body in bodies}) == 3
    assert all(body["sampling_params"]["max_new_tokens"] == 1 for body in bodies)
    assert all(body["sampling_params"]["custom_params"] == {"ttft_slo": 0.5} for body in bodies)


def test_as_many_servers_are_compared_as_fit_on_the_card() -> None:
    model = {"weights_bytes": 16e9, "kv_bytes_per_token": 131_072}
    large, kv_tokens = systems_that_fit(model | {"free_bytes": 140e9})
    assert [system.name for system in large] == ["flowprefill", "stock-spf-2048", "sglang"]
    assert kv_tokens is not None
    assert 100_000 < kv_tokens <= 200_000
    assert len(systems_that_fit(model | {"free_bytes": 80e9})[0]) == 2
    with pytest.raises(ValueError, match="no two servers"):
        systems_that_fit(model | {"free_bytes": 24e9})
    assert systems_that_fit(model) == (large, None)
    unified, _ = systems_that_fit(model | {"free_bytes": 80e9}, COMPARED_UNIFIED)
    assert [system.name for system in unified] == ["unified", "unified-stock-spf-512-interval-1"]
