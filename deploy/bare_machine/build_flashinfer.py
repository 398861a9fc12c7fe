"""FlashInfer's kernels for a bf16 Llama on Hopper, compiled ahead on a machine without a GPU.

    python deploy/bare_machine/build_flashinfer.py OUT [--jobs 1] [--nvcc /usr/local/cuda] [--cuobjdump FILE]
    python deploy/bare_machine/build_flashinfer.py OUT --check      # looks again at what is in OUT, compiles nothing

FlashInfer compiles a module when it is first used, which takes minutes of a machine that may be lent for minutes.
OUT gets one shared library a module, which ``bundle.py`` puts where FlashInfer looks before it compiles. Each has to
load and to have the functions that FlashInfer calls, and with cuobjdump (CUDA's, or the packages nvidia-cuda-cuobjdump
and nvidia-cuda-nvdisasm) its matrix instructions are counted: a module for Hopper has to have HGMMA. All of it needs
nvcc 13.0, gcc and ninja, and 3.5 GB of memory a job.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ARCHITECTURE = "9.0a"
HEAD_DIM = 128
FUNCTIONS = {"cascade": ("merge_state",), "batch_prefill": ("plan", "ragged_run", "paged_run")}
"""What FlashInfer calls in a library, by how its name begins."""
INSTRUCTIONS = {"sm90": b"HGMMA", "kv_stride_equal": b"HMMA"}
"""What a library has to compute matrices with, by how its name ends: warp groups' on Hopper, or any card's."""
LOAD = """
import sys, tvm_ffi
module = tvm_ffi.load_module(sys.argv[1])
lost = [name for name in sys.argv[2:] if not hasattr(module, name)]
sys.exit(f"{sys.argv[1]} lacks {', '.join(lost)}" if lost else 0)
"""
MATRIX = re.compile(rb"\b(HGMMA|HMMA)\b")
"""Matrix instructions of Hopper's warp groups, and those that every card since Volta has."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time (default %(default)s)")
    parser.add_argument("--nvcc", type=Path, default=Path("/usr/local/cuda"), metavar="DIR", help="the folder above "
                        "nvcc's bin (default %(default)s)")  # fmt: skip
    parser.add_argument("--cuobjdump", metavar="FILE", help="the program, to look at the machine code (default: the "
                        "one beside nvcc, or in PATH)")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="compile nothing: look at the libraries in OUT")
    arguments = parser.parse_args()
    if not arguments.check and not (arguments.nvcc / "bin" / "nvcc").exists():
        print(f"build_flashinfer.py: no {arguments.nvcc}/bin/nvcc; name CUDA's folder with --nvcc", file=sys.stderr)
        return 2
    cuobjdump = arguments.cuobjdump or shutil.which(arguments.nvcc / "bin" / "cuobjdump") or shutil.which("cuobjdump")
    with tempfile.TemporaryDirectory(prefix="flashinfer-") as folder:
        driver = _empty_driver(Path(folder))
        if not arguments.check:
            arguments.out.mkdir(parents=True, exist_ok=True)
            _prepare(Path(folder), driver, arguments.nvcc.resolve(), arguments.jobs)
        libraries = sorted(arguments.out.glob("*.so")) if arguments.check else _built(arguments.out)
        found = {library: _found(library, driver, cuobjdump) for library in libraries}
    if not found:
        print(f"build_flashinfer.py: no library in {arguments.out}; build without --check", file=sys.stderr)
    return int(not found or not all(found.values()))


def _built(out: Path) -> Iterator[Path]:
    """Libraries in ``out``, each as soon as it is compiled."""
    for spec in _specs():
        begin_s = time.monotonic()
        print(f"{spec.name} …", flush=True)
        spec.build(verbose=False)
        library = spec.get_library_path()
        yield Path(shutil.copy(library, out / library.name))
        print(f"  {time.monotonic() - begin_s:.0f} s", flush=True)


def _found(library: Path, driver: Path, cuobjdump: str | None) -> bool:
    """Say what a library is like; whether that is as it has to be."""
    load = _load(library, driver)
    counts = None if cuobjdump is None else _matrix_instructions(cuobjdump, library)
    needed = next((kind for ends, kind in INSTRUCTIONS.items() if library.stem.endswith(ends)), None)
    lacks = counts is not None and needed is not None and not counts[needed]
    if counts is None:
        machine_code = "machine code not looked at, as there is no cuobjdump (name it with --cuobjdump)"
    else:
        machine_code = ", ".join(f"{count:,} {kind.decode()}" for kind, count in counts.items()) or "no matrices"
    wrong = f" WRONG: no {needed.decode()}, so it was not compiled for {ARCHITECTURE}" if lacks and needed else ""
    print(
        f"{library.name}: {library.stat().st_size / 1e6:.1f} MB, {load or 'loads'}, {machine_code}{wrong}", flush=True
    )
    return not load and not lacks


def _empty_driver(folder: Path) -> Path:
    """A folder with an empty library of the name of NVIDIA's driver library, which compiled modules are linked to."""
    libraries = folder / "lib"
    libraries.mkdir()
    command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(libraries / "libcuda.so"), "-x", "c", os.devnull]
    subprocess.run(command, check=True)
    (libraries / "libcuda.so.1").symlink_to("libcuda.so")
    return libraries


def _prepare(folder: Path, driver: Path, cuda: Path, jobs: int) -> None:
    """The environment in which FlashInfer's build finds what a machine without a GPU lacks."""
    headers = folder / "include"
    headers.mkdir()
    packages = Path(sysconfig.get_paths()["purelib"])
    for header in (packages / "nvidia" / "cu13" / "include").glob("curand*.h"):
        shutil.copy(header, headers)
    os.environ |= {
        "CUDA_HOME": str(cuda),
        "FLASHINFER_CUDA_ARCH_LIST": ARCHITECTURE,
        "FLASHINFER_WORKSPACE_BASE": str(folder),
        "FLASHINFER_EXTRA_CUDAFLAGS": f"-isystem {headers}",
        "FLASHINFER_EXTRA_LDFLAGS": f"-L{driver}",
        "MAX_JOBS": str(jobs),
    }


def _load(library: Path, driver: Path) -> str:
    """Load a library in a process that has no driver either: what is wrong, or nothing."""
    functions = next((names for begins, names in FUNCTIONS.items() if library.name.startswith(begins)), ())
    env = os.environ | {"LD_LIBRARY_PATH": str(driver)}
    command = [sys.executable, "-c", LOAD, str(library.absolute()), *functions]
    done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True)
    return f"WRONG: does not load: {done.stderr.strip()[-500:]}" if done.returncode else ""


def _matrix_instructions(cuobjdump: str, library: Path) -> Counter[bytes]:
    """How many of which kind a library has."""
    env = os.environ | {"PATH": os.pathsep.join([os.path.dirname(cuobjdump), os.environ["PATH"]])}
    done = subprocess.run([cuobjdump, "-sass", str(library)], env=env, check=True, stdout=subprocess.PIPE)
    return Counter(MATRIX.findall(done.stdout))


def _specs() -> list[Any]:
    """What SGLang's backend asks for: merging of attention states, paged prefill (fa2) and ragged prefill (fa3)."""
    import torch
    from flashinfer.jit.attention import modules
    from flashinfer.jit.cascade import gen_cascade_module

    bf16 = torch.bfloat16
    shape = (bf16, bf16, bf16, torch.int32, HEAD_DIM, HEAD_DIM, 0, False, False, False)
    return [
        gen_cascade_module(),
        modules._gen_batch_prefill_primary_module("fa2", *shape),
        modules.gen_batch_prefill_module("fa3", *shape),
    ]


if __name__ == "__main__":
    sys.exit(main())
