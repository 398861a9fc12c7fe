"""FlashInfer's kernels for a bf16 Llama on Hopper, compiled ahead on a machine without a GPU.

    python deploy/bare_machine/build_flashinfer.py OUT [--jobs 1] [--nvcc /usr/local/cuda] [--cuobjdump FILE]

FlashInfer compiles a module when it is first used, which takes minutes of a machine that may be lent for minutes.
OUT gets one shared library a module, which ``bundle.py`` puts where FlashInfer looks before it compiles. Each is loaded
once, and with cuobjdump (of CUDA, or the package nvidia-cuda-cuobjdump), its matrix instructions are counted: HGMMA are
Hopper's. It needs nvcc 13.0, gcc and ninja, and 3.5 GB of memory a job.
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
from pathlib import Path

ARCHITECTURE = "9.0a"
HEAD_DIM = 128
FUNCTIONS = {"cascade": ("merge_state",), "batch_prefill": ("plan", "ragged_run", "paged_run")}
"""What FlashInfer calls in a library, by how its name begins."""
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
    parser.add_argument("--cuobjdump", metavar="FILE", help="the program, to look at the machine code")
    arguments = parser.parse_args()
    if not (arguments.nvcc / "bin" / "nvcc").exists():
        print(f"build_flashinfer.py: no {arguments.nvcc}/bin/nvcc; name CUDA's folder with --nvcc", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="flashinfer-") as folder:
        _prepare(Path(folder), arguments.nvcc.resolve(), arguments.jobs)
        for spec in _specs():
            begin_s = time.monotonic()
            print(f"{spec.name} …", flush=True)
            spec.build(verbose=False)
            library = spec.get_library_path()
            shutil.copy(library, arguments.out / library.name)
            megabytes = library.stat().st_size / 1e6
            _load(library, Path(folder))
            looked = "" if arguments.cuobjdump is None else f", {_matrix_instructions(arguments.cuobjdump, library)}"
            print(f"{library.name}: {megabytes:.1f} MB, {time.monotonic() - begin_s:.0f} s, loads{looked}", flush=True)
    return 0


def _prepare(folder: Path, cuda: Path, jobs: int) -> None:
    """The environment in which FlashInfer's build finds what a machine without a GPU lacks."""
    headers, libraries = folder / "include", folder / "lib"
    headers.mkdir()
    libraries.mkdir()
    packages = Path(sysconfig.get_paths()["purelib"])
    for header in (packages / "nvidia" / "cu13" / "include").glob("curand*.h"):
        shutil.copy(header, headers)
    # What links against the driver's library finds an empty one of its name.
    command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(libraries / "libcuda.so"), "-x", "c", os.devnull]
    subprocess.run(command, check=True)
    (libraries / "libcuda.so.1").symlink_to("libcuda.so")
    os.environ |= {
        "CUDA_HOME": str(cuda),
        "FLASHINFER_CUDA_ARCH_LIST": ARCHITECTURE,
        "FLASHINFER_WORKSPACE_BASE": str(folder),
        "FLASHINFER_EXTRA_CUDAFLAGS": f"-isystem {headers}",
        "FLASHINFER_EXTRA_LDFLAGS": f"-L{libraries}",
        "MAX_JOBS": str(jobs),
    }


def _load(library: Path, folder: Path) -> None:
    """Load a library in a process that has no driver either. Raises CalledProcessError."""
    functions = next(names for begins, names in FUNCTIONS.items() if library.name.startswith(begins))
    env = os.environ | {"LD_LIBRARY_PATH": str(folder / "lib")}
    subprocess.run([sys.executable, "-c", LOAD, str(library), *functions], env=env, check=True)


def _matrix_instructions(cuobjdump: str, library: Path) -> str:
    """How many of which kind a library has, in words."""
    env = os.environ | {"PATH": os.pathsep.join([os.path.dirname(cuobjdump), os.environ["PATH"]])}
    done = subprocess.run([cuobjdump, "-sass", str(library)], env=env, check=True, stdout=subprocess.PIPE)
    counts = Counter(kind.decode() for kind in MATRIX.findall(done.stdout))
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items()) or "no matrix instructions"


def _specs() -> list:
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
