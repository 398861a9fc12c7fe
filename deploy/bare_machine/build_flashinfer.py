"""FlashInfer's kernels for a bf16 Llama on Hopper, compiled ahead on a machine without a GPU.

    python deploy/bare_machine/build_flashinfer.py OUT [--jobs 1] [--nvcc /usr/local/cuda]

FlashInfer compiles a module when it is first used, which takes minutes of a machine that may be lent for minutes.
OUT gets one shared library a module, which ``bundle.py`` puts where FlashInfer looks before it compiles. It needs nvcc
13.0, gcc and ninja, about 2 GB of memory a job, and half an hour to two hours on one core.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ARCHITECTURE = "9.0a"
HEAD_DIM = 128


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time (default %(default)s)")
    parser.add_argument("--nvcc", type=Path, default=Path("/usr/local/cuda"), metavar="DIR", help="the folder above "
                        "nvcc's bin (default %(default)s)")  # fmt: skip
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
            print(f"{library.name}: {megabytes:.1f} MB, {time.monotonic() - begin_s:.0f} s", flush=True)
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
    os.environ |= {
        "CUDA_HOME": str(cuda),
        "FLASHINFER_CUDA_ARCH_LIST": ARCHITECTURE,
        "FLASHINFER_WORKSPACE_BASE": str(folder),
        "FLASHINFER_EXTRA_CUDAFLAGS": f"-isystem {headers}",
        "FLASHINFER_EXTRA_LDFLAGS": f"-L{libraries}",
        "MAX_JOBS": str(jobs),
    }


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
