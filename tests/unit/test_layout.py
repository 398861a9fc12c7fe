"""The folders at the top are linked into the package: what is installed, and what their bare names mean."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from email import message_from_bytes
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGE = "sgl_flowprefill"
FOLDERS = ("bench", "patches", "profiling")
NO_SOURCE = shutil.ignore_patterns(".*", "out", "build", "dist", "*.egg-info", "__pycache__")
KEY = "deploy/kubernetes/common/api-key.txt"
HIDDEN = (".gitignore", ".dockerignore")
"""Files that a source distribution has and ``NO_SOURCE`` leaves out: a test reads them."""
BUILD_SDIST = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
BUILD_WHEEL = BUILD_SDIST.replace("build_sdist", "build_wheel")
BUILD_EDITABLE = BUILD_SDIST.replace("build_sdist", "build_editable")
FIND = """
import importlib.util, json, pkgutil, site, sys
site.addsitedir(sys.argv[1])
package = importlib.util.find_spec("sgl_flowprefill")
found = {package.name: package.origin}

def find(name, folders):  # without importing any
    for module in pkgutil.iter_modules(folders):
        spec = module.module_finder.find_spec(module.name)
        found[f"{name}.{module.name}"] = spec.origin
        if module.ispkg:
            find(f"{name}.{module.name}", spec.submodule_search_locations)

find(package.name, list(package.submodule_search_locations))
print(json.dumps(found))
"""


def run(*command, cwd, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


def build(code, source, directory, pattern):
    """The file that ``code`` builds in ``directory`` from the tree ``source``, as build programs call setuptools."""
    result = run(sys.executable, "-c", code, str(directory), cwd=source)
    assert result.returncode == 0, result.stderr
    [file] = directory.glob(pattern)
    return file


def pip_wheel(source, directory):
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(directory))
    result = run(sys.executable, "-m", "pip", "wheel", *options, str(source), cwd=directory.parent)
    assert result.returncode == 0, result.stderr
    [wheel] = directory.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The tree as a clone would have it, where builds may leave files, and a key that somebody deploys with."""
    tree = shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "tree", symlinks=True, ignore=NO_SOURCE)
    for name in HIDDEN:
        shutil.copy(ROOT / name, tree)
    (tree / KEY).write_text("secret")
    return tree


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    return build(BUILD_WHEEL, checkout, tmp_path_factory.mktemp("wheel"), "*.whl")


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    return build(BUILD_SDIST, checkout, tmp_path_factory.mktemp("sdist"), "*.tar.gz")


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
        if file.endswith((".py", ".j2", ".html")) or file in ("py.typed", "tuning-unified.json")
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
    assert str(Path(KEY).with_name("kustomization.yaml")) in members
    assert set(HIDDEN) < members.keys()
    assert {"mkdocs.yml", "docs/index.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"} < members.keys()
    rebuilt = pip_wheel(sdist, tmp_path / "wheel")
    assert modules_and_data(rebuilt) == modules_and_data(wheel)


@pytest.mark.stress
def test_an_installation_from_a_repository_has_the_same_files(checkout, wheel, tmp_path):
    """``pip install git+URL``: pip clones the repository and builds a wheel of the clone."""
    repository = shutil.copytree(checkout, tmp_path / "repository", symlinks=True, ignore=NO_SOURCE)
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    for command in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "all")):
        result = run("git", *identity, *command, cwd=repository)
        assert result.returncode == 0, result.stderr
    cloned = pip_wheel(f"git+file://{repository}", tmp_path / "wheel")
    assert modules_and_data(cloned) == modules_and_data(wheel)


# ---- what is published ----------------------------------------------------------------------------------------------

PURE = ("hub", "pace", "paths", "platforms", "slo", "top_level")
"""Modules of the package that import nothing beyond Python itself."""
WITHOUT_TORCH = (
    ("sgl-flowprefill", "--help"),
    ("sgl-flowprefill", "profile", "--help"),
    ("sgl-flowprefill", "doctor", "--help"),
    ("sgl-flowprefill", "timeline", "--help"),
    ("python", "-m", "sgl_flowprefill.bench", "--help"),
)
"""Commands that answer where the dependencies are, but neither torch nor SGLang. ``gpu-report`` measures with both."""
NO_TORCH = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "sglang"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The programs of an empty environment into which the wheel alone was installed."""
    directory = tmp_path_factory.mktemp("installed")
    result = run(sys.executable, "-m", "venv", "--without-pip", str(directory / "venv"), cwd=directory)
    assert result.returncode == 0, result.stderr
    options = ("--python", str(directory / "venv"), "install", "--no-deps", "--no-index", "--no-compile", str(wheel))
    result = run(sys.executable, "-m", "pip", *options, cwd=directory)
    assert result.returncode == 0, result.stderr
    return directory / "venv" / "bin"


def test_the_distributions_are_fit_to_be_published(wheel, sdist):
    result = run(sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist), cwd=wheel.parent)
    assert (result.returncode, result.stdout.count("PASSED")) == (0, 2), result.stdout + result.stderr


def metadata_of(wheel):
    [name] = [name for name in ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA")]
    return message_from_bytes(ZipFile(wheel).read(name))


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_metadata_says_what_the_package_is(wheel):
    metadata = metadata_of(wheel)
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert f"{PACKAGE}/py.typed" in ZipFile(wheel).namelist()
    oldest = project()["requires-python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {oldest}" in metadata.get_all("Classifier")
    assert f"## {metadata['Version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_wheel_requires_what_the_project_names_in_versions_with_which_the_tests_run(wheel):
    """No other test reads it: they install the wheel without its dependencies."""
    named = set(map(Requirement, project()["dependencies"]))
    for extra, requirements in project()["optional-dependencies"].items():
        named |= {Requirement(f'{requirement}; extra == "{extra}"') for requirement in requirements}
    required = list(map(Requirement, metadata_of(wheel).get_all("Requires-Dist")))
    assert set(required) == named
    installed = {one.name: version(one.name) for one in required}
    assert {one.name: installed[one.name] for one in required if installed[one.name] not in one.specifier} == {}


def test_the_wheel_alone_can_be_imported_as_far_as_it_is_plain_python(installed):
    modules = ", ".join((PACKAGE, *(f"{PACKAGE}.{name}" for name in PURE)))
    code = f"import {modules}; print({PACKAGE}.__file__)"
    result = run(str(installed / "python"), "-c", code, cwd=installed)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(installed.parent)


def test_without_its_dependencies_the_program_names_what_is_missing(installed):
    """Options are pydantic's, so even ``--help`` needs it."""
    result = run(str(installed / "sgl-flowprefill"), "--help", cwd=installed)
    assert result.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'pydantic'"


@pytest.mark.parametrize("command", WITHOUT_TORCH, ids=" ".join)
def test_programs_explain_themselves_without_torch_and_sglang(installed, tmp_path, command):
    (tmp_path / "sitecustomize.py").write_text(NO_TORCH)
    dependencies = os.pathsep.join([str(tmp_path), *site.getsitepackages()])
    result = run(str(installed / command[0]), *command[1:], cwd=tmp_path, PYTHONPATH=dependencies)
    assert result.returncode == 0, result.stderr
    assert result.stdout.lstrip().lower().startswith("usage: ")


def test_an_editable_installation_finds_the_same_modules_in_the_tree(checkout, wheel, tmp_path):
    """What ``pip install -e`` puts into site-packages leads to every module and file of the tree."""
    editable = build(BUILD_EDITABLE, checkout, tmp_path, "*.whl")
    ZipFile(editable).extractall(tmp_path / "site")
    result = run(sys.executable, "-S", "-c", FIND, str(tmp_path / "site"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = {name: Path(file) for name, file in json.loads(result.stdout).items()}
    files = [Path(name) for name in modules_and_data(wheel)]
    modules = {".".join(file.with_suffix("").parts).removesuffix(".__init__"): file for file in files
               if file.suffix == ".py"}  # fmt: skip
    assert found == {name: checkout / file for name, file in modules.items()}
    assert all((found[PACKAGE].parents[1] / file).is_file() for file in files)
    assert entry_points(editable) == entry_points(wheel) != ""


def entry_points(wheel):
    [text] = [ZipFile(wheel).read(name) for name in ZipFile(wheel).namelist() if name.endswith("/entry_points.txt")]
    return text.decode()


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


# ---- underscore names -----------------------------------------------------------------------------------------------

PRIVATE = re.compile(r"_[A-Za-z]\w*")
FOREIGN = {"torch.cuda._sleep", "wrapper._backend", "self._wrapper._backend"}
"""Names of PyTorch and FlashInfer that are also names of ours; SGLang's are those of the contract."""


def sources(*folders: str) -> dict[str, ast.Module]:
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in files}


def private_names(tree: ast.AST) -> set[str]:
    """Underscore names that ``tree`` defines: functions, classes, variables and attributes of ``self``."""
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case (
                ast.Name(id=name, ctx=ast.Store())
                | ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store())
            ):
                names.add(name)
    return set(filter(PRIVATE.fullmatch, names))


WITHOUT_PARTS = (ast.Name, ast.Constant, ast.expr_context, ast.operator, ast.alias)
"""Nodes in which nothing reaches into anything by itself."""


def reached_into(tree: ast.AST, ours: set[str]) -> Iterator[tuple[int, str]]:
    """Line and text of each use of a name in ``ours`` outside of what defines it. Methods of a class may ask other
    instances for the names of the class."""
    left: list[tuple[ast.AST, frozenset[str]]] = [(tree, frozenset())]
    while left:
        node, of_class = left.pop()
        match node:
            case ast.ClassDef():
                of_class = of_class | private_names(node)
            case ast.Attribute(value=ast.Name(id="self" | "cls") | ast.Call(func=ast.Name(id="super"))):
                pass
            case ast.Attribute(attr=name) if name in ours and name not in of_class and ast.unparse(node) not in FOREIGN:
                yield node.lineno, ast.unparse(node)
            case ast.ImportFrom(names=names):
                yield from ((node.lineno, f"import {alias.name}") for alias in names if alias.name in ours)
            case ast.Call(args=arguments):
                for argument in arguments:  # of monkeypatch.setattr, patch.object, getattr …
                    match argument:
                        case ast.Constant(value=str(text)) if text.rpartition(".")[2] in ours:
                            yield node.lineno, f'"{text}"'
        left += ((part, of_class) for part in ast.iter_child_nodes(node) if not isinstance(part, WITHOUT_PARTS))


def test_nothing_reaches_into_an_underscore_name_of_another_object_of_ours() -> None:
    product = sources(PACKAGE, *FOLDERS, "deploy")
    of_sglang: set[str] = set()
    for file, tree in product.items():
        if file.startswith(f"{PACKAGE}/contract/parts/"):
            for node in ast.walk(tree):
                match node:
                    case ast.Constant(value=str(text)):
                        of_sglang |= set(PRIVATE.findall(text))
    ours = set().union(*map(private_names, product.values())) - of_sglang
    assert len(ours) > 500
    every = product | sources("tests")
    assert {file for file in every if file.startswith(f"{PACKAGE}/bench/")} == set(), "each file once"
    found = [f"{file}:{line}: {text}" for file, tree in every.items() for line, text in reached_into(tree, ours)]
    assert found == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("cluster._members", "cluster._members"),
        ("self.cluster._members.clear()", "self.cluster._members"),
        ("from sgl_flowprefill.cluster import _members", "import _members"),
        ("monkeypatch.setattr(cluster, '_members', [])", '"_members"'),
        ("patch('sgl_flowprefill.cluster._members')", '"sgl_flowprefill.cluster._members"'),
        ("class A:\n  def __eq__(self, other): return other._members", "other._members"),
        ("self._members", None),
        ("super()._members()", None),
        ("torch._members_of", None),
        ("class A:\n  def __eq__(self, other): self._members = 1; return other._members", None),
    ],
)
def test_what_reaches_into_an_underscore_name(source: str, found: str | None) -> None:
    assert [text for _, text in reached_into(ast.parse(source), {"_members"})] == ([found] if found else [])
