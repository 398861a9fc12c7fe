"""What is packed for a machine without a network: the project, its packages, and attention that is compiled for it."""

from __future__ import annotations

import importlib.util
import random
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest

from sgl_flowprefill import provenance

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bundle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bundle", ROOT / "deploy" / "bare_machine" / "bundle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pieces_are_small_enough_and_each_is_unpacked_by_itself(bundle: ModuleType, tmp_path: Path) -> None:
    files = {f"package/{number}.bin": random.Random(number).randbytes(4000) for number in range(20)}
    pieces = bundle.Pieces(tmp_path, 16_000)
    for name, content in files.items():
        pieces.add(name, content)
    pieces.close()
    paths = sorted(tmp_path.glob("bundle-*.zip"))
    assert len(paths) >= 5
    assert all(path.stat().st_size <= 16_000 for path in paths)
    found = {}
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            found |= {name: archive.read(name) for name in archive.namelist()}
    assert found == files


def test_a_file_from_two_places_or_too_large_for_any_piece_is_refused(bundle: ModuleType, tmp_path: Path) -> None:
    pieces = bundle.Pieces(tmp_path, 1000)
    pieces.add("module.py", b"1")
    with pytest.raises(ValueError, match=r"module\.py comes from two places"):
        pieces.add("module.py", b"2")
    with pytest.raises(ValueError, match="raise --piece-mib"):
        pieces.add("library.so", bytes(2000))
    pieces.close()


def test_this_project_is_packed_whole_with_its_entry_points_and_commit(
    bundle: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = dict(bundle.project_files())
    for name in (
        "launch.py", "sgl_flowprefill/plugin.py", "sgl_flowprefill/patches/lone_prefill.py",
        "sgl_flowprefill/bench/reports/gpu_report.html.j2", "sgl_flowprefill/profiling/run.py",
    ):  # fmt: skip
        assert packed[name]
    [metadata] = [content for name, content in packed.items() if name.endswith("METADATA")]
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    [required] = [line for line in pyproject["project"]["dependencies"] if re.match(r"sglang\b", line)]
    assert f"Requires-Dist: {required}\n".encode() in metadata
    [entry_points] = [content for name, content in packed.items() if name.endswith("entry_points.txt")]
    assert b"[sglang.srt.plugins]\nflowprefill = sgl_flowprefill.plugin:load\n" in entry_points
    commit_file = tmp_path / "COMMIT"
    commit_file.write_bytes(packed["sgl_flowprefill/COMMIT"])
    in_the_tree = provenance.commit()
    monkeypatch.setattr(provenance, "COMMIT_FILE", commit_file)
    assert provenance.commit()["hash"] == in_the_tree["hash"]


BUILD = ROOT / "deploy" / "bare_machine" / "build_flashinfer.py"
HOPPERS = "batch_prefill_of_some_types_sm90.so"


def checked(folder: Path, name: str, functions: Iterable[str], instructions: str) -> subprocess.CompletedProcess[str]:
    """What the build says of a library that has these functions, and this machine code."""
    source = "".join(f"int __tvm_ffi_{function}(void) {{ return 0; }}\n" for function in functions)
    command = ["gcc", "-shared", "-fPIC", "-o", str(folder / name), "-x", "c", "-"]
    subprocess.run(command, input=source, text=True, check=True)
    cuobjdump = folder / "cuobjdump"
    cuobjdump.write_text(f"#!/bin/sh\necho '{instructions}'\n")
    cuobjdump.chmod(0o755)
    command = [sys.executable, str(BUILD), str(folder), "--check", "--cuobjdump", str(cuobjdump)]
    return subprocess.run(command, capture_output=True, text=True)


needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to make a library with")


@needs_gcc
def test_a_compiled_library_that_loads_and_has_hoppers_instructions_is_kept(tmp_path: Path) -> None:
    done = checked(tmp_path, HOPPERS, ("plan", "ragged_run", "paged_run"), "HGMMA.64x128x16.F32.BF16 R24")
    assert done.returncode == 0, done.stdout
    assert "loads, 1 HGMMA" in done.stdout


@needs_gcc
@pytest.mark.parametrize(
    ("functions", "instructions", "wrong"),
    [
        (("plan", "ragged_run"), "HGMMA.64x128x16.F32.BF16 R24", "lacks paged_run"),
        (("plan", "ragged_run", "paged_run"), "HMMA.16816.F32.BF16 R24", "WRONG: no HGMMA"),
    ],
)
def test_a_library_without_a_function_or_without_hoppers_instructions_is_wrong(
    functions: tuple[str, ...], instructions: str, wrong: str, tmp_path: Path
) -> None:
    done = checked(tmp_path, HOPPERS, functions, instructions)
    assert done.returncode == 1
    assert wrong in done.stdout


def test_what_attention_does_not_need_is_left_out(bundle: ModuleType) -> None:
    kept = ("sglang/srt/server_args.py", "flashinfer/data/csrc/batch_prefill.cu", "xgrammar-0.2.7.dist-info/RECORD",
            "flashinfer/data/include/flashinfer/attention/prefill.cuh", "zmq/backend/cython/_zmq.abi3.so")  # fmt: skip
    dropped = ("sglang/test/runners.py", "sglang/srt/layers/moe/configs/E=8.json", "sglang/srt/native.so",
               "flashinfer/data/csrc/fused_moe/moe.cu", "flashinfer/data/cutlass/test/unit.cu")  # fmt: skip
    assert [name for name in (*kept, *dropped) if bundle.is_kept(name)] == list(kept)
