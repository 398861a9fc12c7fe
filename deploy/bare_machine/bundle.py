"""All that a machine with a GPU, PyTorch and no network needs to run ``launch.py gpu-report``, in a few files.

    python deploy/bare_machine/bundle.py OUT [--kernels DIR] [--python 3.12] [--piece-mib 60]

Run it where this project is installed; it downloads wheels for the other machine's Python (``packages.txt``) and packs
them, without what no report needs, with this project and the kernels that ``build_flashinfer.py`` has compiled. On the
other machine:

    for piece in bundle-*.zip; do python3 -m zipfile -e $piece SITE; done
    . SITE/env.sh && python3 SITE/launch.py gpu-report --out report
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import distribution, version
from pathlib import Path

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent
GLIBC_MINORS = (39, 35, 34, 31, 28, 27, 24, 17)
"""Minor versions of glibc in the manylinux tags that wheels are looked for by: pip takes none that it is not given."""
OLDER_TAGS = ("manylinux2014_x86_64", "manylinux1_x86_64")
DROPPED = (
    "sglang/benchmark/",
    "sglang/multimodal_gen/",
    "sglang/test/",
    "flashinfer/attention/prims_ts/",
    "flashinfer/experimental/b12x/",
    "flashinfer/experimental/cake_vsa_sm90_cute/",
    "flashinfer/fused_moe/backends/cudnn_frost/artifacts",
    "flashinfer/moe_ep/kernel_src/",
)
KEPT_HEADERS = tuple(
    f"flashinfer/data/{part}/"
    for part in ("include", "cutlass/include", "cccl/libcudacxx/include", "cccl/cub", "cccl/thrust", "spdlog/include")
)
SOURCES = "flashinfer/data/csrc/"
"""Folder of FlashInfer's kernels: the files directly in it are enough for attention."""
EMPTY: Mapping[str, Mapping[str, str]] = {}
PLAIN_KERNEL_MODULES = ("scalar_type.py", "utils.py")
"""Files of sglang-kernel that are Python, and imported beside the stand-in."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for wheels and bundle-*.zip")
    parser.add_argument("--kernels", type=Path, metavar="DIR", help="what build_flashinfer.py wrote")
    parser.add_argument("--python", default="3.12", help="the other machine's Python (default %(default)s)")
    parser.add_argument("--piece-mib", type=int, default=60, help="largest size of a file (default %(default)s)")
    arguments = parser.parse_args()
    wheels = arguments.out / "wheels"
    _download(wheels, arguments.python)
    for old in arguments.out.glob("bundle-*.zip"):
        old.unlink()
    pieces = Pieces(arguments.out, arguments.piece_mib << 20)
    for name, content in _files(wheels, arguments.kernels):
        pieces.add(name, content)
    pieces.close()
    for path in sorted(arguments.out.glob("bundle-*.zip")):
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    return 0


def _download(wheels: Path, python: str) -> None:
    """The packages' wheels, each at the version that is installed here."""
    shutil.rmtree(wheels, ignore_errors=True)
    lines = (line.strip() for line in (HERE / "packages.txt").read_text().splitlines())
    names = [line for line in lines if line and not line.startswith("#")]
    platforms = [*(f"manylinux_2_{minor}_x86_64" for minor in GLIBC_MINORS), *OLDER_TAGS]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(wheels)]
    command += [option for platform in platforms for option in ("--platform", platform)]
    subprocess.run([*command, *(f"{name}=={version(name)}" for name in names)], check=True)


def _files(wheels: Path, kernels: Path | None) -> Iterator[tuple[str, bytes]]:
    """Everything in the bundle, by its path below SITE."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                if not entry.is_dir() and is_kept(entry.filename):
                    yield entry.filename, archive.read(entry)
    for name in PLAIN_KERNEL_MODULES:
        installed = distribution("sglang-kernel").locate_file(f"sgl_kernel/{name}")
        yield f"sgl_kernel/{name}", Path(str(installed)).read_bytes()
    yield from _below(HERE / "overlay", "")
    yield from _distribution("sglang-kernel", version("sglang-kernel"))
    yield from project_files()
    for library in sorted(kernels.glob("*.so")) if kernels else ():
        yield f"flashinfer/data/aot/{library.stem}/{library.name}", library.read_bytes()
    yield "env.sh", (HERE / "env.sh").read_bytes()


def project_files() -> Iterator[tuple[str, bytes]]:
    """This project: its package with what is linked into it, entry points, and the commit it is at."""
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    yield from _below(PROJECT / "sgl_flowprefill", "sgl_flowprefill/")
    yield "launch.py", (PROJECT / "launch.py").read_bytes()
    name = settings["name"]
    yield from _distribution(name, version(name), settings["dependencies"], settings["entry-points"])
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    yield "sgl_flowprefill/COMMIT", subprocess.run(command, capture_output=True, check=True).stdout


def _below(folder: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    """Files of a folder, also of what is linked into it."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in ("__pycache__", "results"):
            yield from _below(path, f"{prefix}{path.name}/")
        elif path.is_file() and path.suffix != ".pyc":
            yield prefix + path.name, path.read_bytes()


def _distribution(
    name: str, release: str, requires: Sequence[str] = (), entry_points: Mapping[str, Mapping[str, str]] = EMPTY
) -> Iterator[tuple[str, bytes]]:
    """What Python's metadata has of an installed package. This one asks its own which SGLang it is made for."""
    folder = f"{name.replace('-', '_')}-{release}.dist-info"
    fields = [f"Name: {name}", f"Version: {release}", *(f"Requires-Dist: {requirement}" for requirement in requires)]
    yield f"{folder}/METADATA", "\n".join(["Metadata-Version: 2.1", *fields, ""]).encode()
    lines = [f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
             for group, points in entry_points.items()]  # fmt: skip
    yield f"{folder}/entry_points.txt", "".join(lines).encode()


def is_kept(name: str) -> bool:
    """Whether attention, or what SGLang imports for it, needs a file of a wheel."""
    if name.startswith(DROPPED):
        return False
    if name.startswith("sglang/"):  # its own binaries need sglang-kernel's torch; tables are for mixtures of experts
        return not name.endswith(".so") and not ("/configs/" in name and name.endswith(".json"))
    if name.startswith(SOURCES):
        return name.count("/") == SOURCES.count("/")
    if name.startswith("flashinfer/data/"):
        return name.startswith(KEPT_HEADERS)
    return True


class Pieces:
    """Zip files of at most so many bytes, each of which can be unpacked by itself."""

    def __init__(self, out: Path, most_bytes: int) -> None:
        self._out = out
        self._most_bytes = most_bytes
        self._number = 0
        self._open: zipfile.ZipFile | None = None
        self._written_bytes = 0
        self._names: set[str] = set()

    def add(self, name: str, content: bytes) -> None:
        """Raises ValueError for a file that fits into none, and for one that is there already."""
        if name in self._names:
            raise ValueError(f"{name} comes from two places")
        self._names.add(name)
        if len(content) > self._most_bytes:
            raise ValueError(f"{name} has {len(content) >> 20} MiB: raise --piece-mib")
        if self._open is None or self._written_bytes + len(content) > self._most_bytes:
            self.close()
            self._open = zipfile.ZipFile(
                self._out / f"bundle-{self._number:02}.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=6
            )
            self._number += 1
            self._written_bytes = 0
        self._open.writestr(name, content)
        self._written_bytes += self._open.getinfo(name).compress_size + 2 * len(name) + 128

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


if __name__ == "__main__":
    sys.exit(main())
