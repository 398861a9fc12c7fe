"""What runs on a GPU can be imported, with the installed versions of everything, and a GPU that is only pretended."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

pytest.importorskip("sglang")

ROOT = Path(__file__).parents[2]
STAND_INS = ROOT / "deploy" / "bare_machine" / "overlay"
DRIVER = "int cuPointerGetAttribute(void) { return 1; }\n"
"""All that is looked for in NVIDIA's driver library when sglang-kernel's are loaded."""
PLAIN_MODULES = ("sgl_kernel/scalar_type.py", "sgl_kernel/utils.py")
"""What the bundle takes of sglang-kernel itself."""
ATTENTION = "sglang.srt.layers.attention"
MODULES = (
    "sglang.srt.managers.scheduler",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.models.llama",
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner",
    f"{ATTENTION}.flashinfer_backend",
    f"{ATTENTION}.triton_backend",
    f"{ATTENTION}.flashattention_backend",
    "sgl_flowprefill.runtime.scheduler",
    "sgl_flowprefill.runtime.unified_scheduler",
    "sgl_flowprefill.runtime.cuda_device",
    "sgl_flowprefill.runtime.kv_share",
    "sgl_flowprefill.runtime.flashinfer_tiles",
    "sgl_flowprefill.runtime.fa3_tiles",
    "sgl_flowprefill.runtime.selfcheck",
    "sgl_flowprefill.gpu_report.engine",
    "sgl_flowprefill.gpu_report.phases.goodput",
    "sgl_flowprefill.gpu_report.phases.steps",
)


@pytest.mark.parametrize("kernels", ["sglang-kernel", pytest.param("its stand-in", marks=pytest.mark.stress)])
def test_the_cuda_path_imports(kernels: str, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "SGLANG_PLATFORM"}
    env["PYTHONPATH"] = str(ROOT)
    if kernels == "sglang-kernel":
        if shutil.which("gcc") is None:
            pytest.skip("sglang-kernel wants a driver library, and there is no gcc to make an empty one")
        library = tmp_path / "libcuda.so.1"
        command = ["gcc", "-shared", f"-Wl,-soname,{library.name}", "-o", str(library), "-x", "c", "-"]
        subprocess.run(command, input=DRIVER, text=True, check=True)
        env["LD_LIBRARY_PATH"] = str(tmp_path)
    else:
        shutil.copytree(STAND_INS / "sgl_kernel", tmp_path / "sgl_kernel")
        for module in PLAIN_MODULES:
            shutil.copy(str(distribution("sglang-kernel").locate_file(module)), tmp_path / module)
        env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, "-m", "tests.fake_cuda", *MODULES]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line in MODULES] == list(MODULES)
