"""The folders at the top are linked into the package: what is installed, and what their bare names mean."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from fnmatch import fnmatch
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "sgl_flowprefill"
FOLDERS = ("bench", "patches", "profiling")
NO_SOURCE = shutil.ignore_patterns(".*", "out", "build", "dist", "*.egg-info", "__pycache__")
KEY = "deploy/kubernetes/api-key.txt"
BUILD_SDIST = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"


def run(*command, cwd, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


def build_wheel(source, directory):
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(directory))
    result = run(sys.executable, "-m", "pip", "wheel", *options, str(source), cwd=directory.parent)
    assert result.returncode == 0, result.stderr
    [wheel] = directory.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The tree as a clone would have it, where builds may leave files, and a key that somebody deploys with."""
    tree = shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "tree", symlinks=True, ignore=NO_SOURCE)
    (tree / KEY).write_text("secret")
    return tree


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    directory = tmp_path_factory.mktemp("sdist")
    result = run(sys.executable, "-c", BUILD_SDIST, str(directory), cwd=checkout)
    assert result.returncode == 0, result.stderr
    [archive] = directory.glob("*.tar.gz")
    return archive


def modules_and_data(wheel):
    """Checksum of every file in a wheel, besides what the wheel says of itself."""
    files = ZipFile(wheel).infolist()
    assert len({file.filename for file in files}) == len(files)
    return {file.filename: file.CRC for file in files if ".dist-info/" not in file.filename}


def test_the_wheel_has_every_module_and_template_of_the_tree_and_nothing_else(wheel):
    tree = {
        str(Path(directory, file).relative_to(ROOT))
        for directory, _, files in os.walk(ROOT / PACKAGE, followlinks=True)
        for file in files
        if file.endswith((".py", ".j2")) or file == "py.typed"
    }
    assert set(modules_and_data(wheel)) == tree
    assert {f"{PACKAGE}/{folder}/__init__.py" for folder in FOLDERS} < tree


def test_only_the_package_is_importable_from_site_packages(wheel):
    [metadata] = {name.split("/")[0] for name in ZipFile(wheel).namelist()} - {PACKAGE}
    assert ZipFile(wheel).read(f"{metadata}/top_level.txt").decode().split() == [PACKAGE]


def test_the_source_distribution_has_the_folders_once_and_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        members = {member.name.split("/", 1)[1]: member for member in archive if "/" in member.name}
    assert {f"{folder}/__init__.py" for folder in FOLDERS} < members.keys()
    assert {name: member.linkname for name, member in members.items() if member.issym()} == {
        f"{PACKAGE}/{folder}": f"../{folder}" for folder in FOLDERS
    }
    assert [name for name in members if name.startswith(tuple(f"{PACKAGE}/{folder}/" for folder in FOLDERS))] == []
    assert KEY not in members
    assert str(Path(KEY).with_name("prefill.yaml")) in members
    rebuilt = build_wheel(sdist, tmp_path / "wheel")
    assert modules_and_data(rebuilt) == modules_and_data(wheel)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_refused_under_its_bare_name(folder):
    for statement in (f"import {folder}", f"from {folder}.base import anything"):
        result = run(sys.executable, "-c", statement, cwd=ROOT)
        sentence = f"ImportError: {folder} is a folder of sgl-flowprefill: import {PACKAGE}.{folder} instead."
        assert result.stderr.splitlines()[-1] == sentence


STANDARD = """
import json, sys
sys.path.append(sys.argv[1])
import cProfile_of_315
import profiling, profiling.tracing
import sgl_flowprefill.profiling
files = [module.__file__ for module in (profiling, profiling.tracing, sgl_flowprefill.profiling)]
print(json.dumps([*files, cProfile_of_315.run]))
"""


def test_pythons_own_module_profiling_is_not_hidden(tmp_path):
    standard = tmp_path / "profiling"
    standard.mkdir()
    (standard / "__init__.py").write_text("")
    (standard / "tracing.py").write_text("run = 'as ever'")
    (tmp_path / "cProfile_of_315.py").write_text("from profiling.tracing import run")
    result = run(sys.executable, "-c", STANDARD, str(tmp_path), cwd=ROOT, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    ours = ROOT / PACKAGE / "profiling" / "__init__.py"
    files = [str(file) for file in (standard / "__init__.py", standard / "tracing.py", ours)]
    assert json.loads(result.stdout) == [*files, "as ever"]


def test_two_checkouts_on_the_path_do_not_hand_a_name_over_in_circles(checkout):
    result = run(sys.executable, "-c", "import profiling", cwd=ROOT, PYTHONPATH=f"{ROOT}{os.pathsep}{checkout}")
    assert result.stderr.splitlines()[-1].startswith("ImportError: profiling is a folder of sgl-flowprefill")


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_linter_refuses_a_bare_name_and_sees_each_file_once(folder):
    check = (sys.executable, "-m", "ruff", "check", "--no-cache")
    for name, codes in ((folder, ["TID251"]), (f"{PACKAGE}.{folder}", [])):
        source = f"import {name}\n\nprint({name})\n"
        options = ("--output-format", "json", "--stdin-filename", "tests/example.py", "-")
        found = subprocess.run((*check, *options), input=source, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert [item["code"] for item in json.loads(found.stdout)] == codes
    seen = run(*check, "--show-files", cwd=ROOT).stdout.splitlines()
    assert sum(Path(file) == ROOT / folder / "__init__.py" for file in seen) == 1
    assert not any(Path(file).is_relative_to(ROOT / PACKAGE / folder) for file in seen)


def test_the_image_gets_every_folder_that_the_package_links_to():
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    copied = {source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]}
    links = {os.path.normpath(PACKAGE / link.readlink()) for link in (ROOT / PACKAGE).iterdir() if link.is_symlink()}
    assert links == set(FOLDERS)
    assert {PACKAGE, *links} <= copied
    assert all((ROOT / source).exists() for source in copied)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert [(source, pattern) for source in copied for pattern in ignored if fnmatch(source, pattern)] == []
