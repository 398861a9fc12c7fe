"""What is expected of SGLang is so in the installed one, and what is not so elsewhere is refused by name."""

from __future__ import annotations

import ast
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("sglang")

import sglang

from sgl_flowprefill import contract
from sgl_flowprefill.cluster import cli, doctor_command
from sgl_flowprefill.contract import PARTS, Row, Tree, installed, supported
from sgl_flowprefill.contract.row import check, other_parameters
from sgl_flowprefill.contract.sources import Found, Module, Parameters
from sgl_flowprefill.plugin import SCHEDULER_PARTS
from tests import warm

ROWS = [row for part in PARTS for row in part.rows]
SGLANG = Path(sglang.__file__).parent
MOST_S = 1.0
"""CPU time of a check of all parts at once: measured 0.1 s, and 0.5 s on a slow core; a process checks a part of
them."""


class Changed(Tree):
    """SGLang with other text in the module that a target is in."""

    def __init__(self, change: Callable[[str], str]) -> None:
        super().__init__(SGLANG.parent)
        self._change = change

    def module(self, name: str) -> Module | None:
        is_new = name not in self._modules
        module = super().module(name)
        if is_new and module is not None:
            module.text = self._change(module.text)
        return module


def in_sglang(row: Row) -> bool:
    return row.target.startswith("sglang.")


def test_all_is_as_expected_in_the_installed_sglang() -> None:
    verdicts = [verdict for _, verdict in contract.verdicts(Tree())]
    assert len(verdicts) == len(ROWS) > 400
    assert [verdict for verdict in verdicts if verdict.state != "ok"] == []


def test_what_is_read_of_sources_is_what_is_imported() -> None:
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.scheduler  # noqa: F401 - now functions are looked at as they are in this process

    sources, process, compared = Tree(SGLANG.parent), Tree(), 0
    for row in ROWS:
        live = process.find(row.target) if in_sglang(row) and not row.is_attribute else None
        if live is not None and live.live is not None:
            found = sources.find(row.target)
            assert found is not None
            assert found.text.strip() == live.text.strip(), row.target
            assert found.parameters.names == live.parameters.names, row.target
            compared += 1
    print(f"{compared} functions")
    assert compared > 60


def test_definitions_are_those_that_the_parser_finds() -> None:
    """A definition is found by its lines; here all of the table's are compared with Python's own parser."""
    tree, parsed, compared = Tree(SGLANG.parent), {}, 0
    for row in filter(in_sglang, ROWS):
        found: Found | None = None if row.is_attribute else tree.find(row.target)
        if found is None or found.kind not in ("class", "function"):
            continue
        assert found.module is not None
        if found.module.name not in parsed:
            parsed[found.module.name] = {
                node.lineno: node.end_lineno
                for node in ast.walk(ast.parse(found.module.text))
                if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            }
        line = found.module.text.count("\n", 0, found.start) + 1
        lines = found.module.text.split("\n")[line - 1 : parsed[found.module.name][line]]
        assert _without_last_comments(found.text) == _without_last_comments("\n".join(lines)), row.target
        compared += 1
    print(f"{compared} definitions in {len(parsed)} files")
    assert compared > 120


def _without_last_comments(text: str) -> str:
    """A comment behind a definition is part of it for one, and not for the other."""
    lines = text.strip().split("\n")
    while not lines[-1].partition("#")[0].strip():
        lines.pop()
    return "\n".join([*lines[:-1], lines[-1].partition("  #")[0]]).strip()


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_what_has_another_name_is_refused(part: contract.Part) -> None:
    """Each symbol of the table in turn, in sources in which it is called otherwise."""
    for row in filter(in_sglang, part.rows):
        name = row.target.rpartition(":")[2].rpartition(".")[2]
        if not name:  # a module, which is about what it holds
            continue
        word = re.compile(rf"\b{name}\b")
        verdict = check(row, Changed(lambda text, word=word, name=name: word.sub(f"{name}_of_old", text)))
        if row.otherwise is None:
            assert verdict.state in ("gone", "differs"), row.target
            assert verdict.reason
        else:
            assert verdict.state == "ok"


def holding() -> list[tuple[Row, str]]:
    return [(row, fragment) for row in filter(in_sglang, ROWS) for fragment in row.holds]


@pytest.mark.parametrize(("row", "fragment"), holding(), ids=lambda value: getattr(value, "target", None))
def test_what_no_longer_holds_what_it_must_is_refused(row: Row, fragment: str) -> None:
    verdict = check(row, Changed(lambda text: text.replace(fragment, "pass  # " + "".join(reversed(fragment)))))
    assert verdict.state in ("gone", "differs")
    if verdict.state == "differs":
        assert verdict.reason == f"its source no longer holds {fragment!r}"


def lacking() -> list[tuple[Row, str]]:
    return [(row, fragment) for row in filter(in_sglang, ROWS) for fragment in row.lacks]


@pytest.mark.parametrize(("row", "fragment"), lacking(), ids=lambda value: getattr(value, "target", None))
def test_what_holds_what_it_must_not_is_refused(row: Row, fragment: str) -> None:
    verdict = check(row, Changed(lambda text: text.replace(row.holds[0], f"{row.holds[0]}; {fragment}")))
    assert (verdict.state, verdict.reason) == ("differs", f"its source now holds {fragment!r}")


def test_a_row_of_cached_tokens_of_which_sglang_uses_more_is_no_place_for_reports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    last = "self.cached_tokens[req.metadata_buffer_index][6] = video_t"
    more = Changed(lambda text: text.replace(last, f"{last}\n        {last.replace('[6]', '[7]')}"))
    monkeypatch.setattr("sgl_flowprefill.contract.check.installed_sources", lambda: more)
    with pytest.raises(contract.SeamError, match="--flowprefill-answer-report false"):
        contract.expect("carried_report")


def signed() -> list[Row]:
    return [row for row in ROWS if row.signature is not None]


@pytest.mark.parametrize("row", signed(), ids=lambda row: row.target)
def test_another_signature_is_refused(row: Row) -> None:
    names, has_others = row.parameters
    needed = frozenset(name for name in names if not name.startswith("*"))
    assert other_parameters(row, Parameters(names, needed)) is None
    passes_on = row.use == "hooks" and has_others
    assert (other_parameters(row, Parameters((*names, "more"), needed | {"more"})) is None) == passes_on
    assert (other_parameters(row, Parameters((*names, "more"), needed)) is None) == has_others
    if len(names) > 1:
        assert other_parameters(row, Parameters(names[::-1], needed)) is not None
        assert other_parameters(row, Parameters(names[:-1], needed)) is not None


def test_a_method_of_a_base_class_and_an_imported_name_are_found(tmp_path: Path) -> None:
    write(
        tmp_path,
        "a",
        "from sglang.b import Base as Other, helper\n\nclass Sub(Other, metaclass=M):\n    kind: int = 1\n",
    )
    write(
        tmp_path,
        "b",
        "class Root:\n    def __init__(self):\n"
        "        (\n            self.one,\n            self.two,\n        ) = f()\n"
        "        g(self.three, self.four == 1)\n\n"
        "class Base(Root):\n    async def run(\n        self,\n        batch,\n        *,\n        late=None,\n    ):\n"
        '        """Text\n        (more."""\n        return batch\n\n    last = 1\n\n'
        "if True:\n    def helper(x): ...\nelse:\n    helper = None\n",
    )
    tree = Tree(tmp_path)
    found = tree.find("sglang.a:Sub.run")
    assert found is not None
    assert found.parameters == Parameters(("self", "batch", "late"), frozenset({"self", "batch"}))
    assert found.text.strip().endswith("return batch")
    assert tree.find("sglang.a:helper") is not None
    assert [tree.attribute("sglang.a:Sub", name) for name in ("kind", "one", "two", "last")] == [True] * 4
    assert [tree.attribute("sglang.a:Sub", name) for name in ("three", "four", "batch", "on")] == [False] * 4
    assert tree.find("sglang.a:Sub.halt") is None
    assert tree.find("sglang.c:Sub") is None


def write(folder: Path, module: str, text: str) -> None:
    (folder / "sglang").mkdir(exist_ok=True)
    (folder / "sglang" / "__init__.py").touch()
    (folder / "sglang" / f"{module}.py").write_text(text)


def unpacked(folder: Path) -> Path:
    """Links to the sources of the installed SGLang, as an unpacked wheel would lie there."""
    others = ("__pycache__", "*.so", "*.json", "multimodal_gen")
    shutil.copytree(SGLANG, folder / "sglang", ignore=shutil.ignore_patterns(*others), copy_function=os.symlink)
    (folder / "sglang-9.8.7.dist-info").mkdir()
    return folder


def test_the_doctor_says_what_an_unpacked_wheel_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--contract", "--sources", str(unpacked(tmp_path))]
    assert doctor_command.main(options, cli.parse) == 0
    out = capsys.readouterr().out
    assert "SGLang 9.8.7: " in out
    assert "0 differs, 0 gone" in out
    assert f"supports sglang{supported()}, and 9.8.7 is not one of these" in out

    prefill = tmp_path / "sglang/srt/disaggregation/prefill.py"
    text = prefill.read_text().replace("def send_kv_chunk(", "def send_kv_pages(")
    prefill.unlink()
    prefill.write_text(text)
    network = tmp_path / "sglang/srt/utils/network.py"
    text = network.read_text().replace("def get_local_ip_auto(fallback", "def get_local_ip_auto(family, fallback")
    network.unlink()
    network.write_text(text)
    assert doctor_command.main(options, cli.parse) == 1
    out = capsys.readouterr().out
    assert "1 differs, 1 gone" in out
    lines = [line for line in out.splitlines() if re.match(r".\s(gone|differs)", line)]
    assert "Scheduler.send_kv_chunk" in lines[0]
    assert "network.get_local_ip_auto" in lines[1]
    assert "sending waits for what the device computes next" in re.sub(r"[│\s]+", " ", out)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--contract", "--sources", "/proc"], "--sources /proc: there is no sglang/__init__.py in it"),
        (["--contract", "--tp", "2"], "--contract takes no options of SGLang: --tp 2"),
        (["--sources", "."], "--sources is where --contract looks"),
    ],
)
def test_what_the_doctor_cannot_check(options: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor_command.main(options, cli.parse) == 2
    assert text in capsys.readouterr().err


def test_a_refusal_names_symbol_version_range_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang.srt.managers.scheduler.Scheduler.run_batch", lambda self, batches: None)
    with pytest.raises(contract.SeamError) as refusal:
        contract.expect("hooks", "scheduler")
    text = str(refusal.value)
    assert text.startswith(
        f"scheduler: sglang.srt.managers.scheduler.Scheduler.run_batch of SGLang {installed()} is not "
    )
    assert "parameters are (self, batches), expected (self, batch, …)" in text
    assert "without it: no prefill can run" in text
    assert f"Install sglang{supported()}" in text
    assert "doctor --contract" in text


def test_an_override_whose_base_method_is_gone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Changed(lambda text: text.replace("def pause_generation(", "def hold_generation("))
    monkeypatch.setattr("sgl_flowprefill.contract.check.installed_sources", lambda: gone)
    with pytest.raises(contract.SeamError, match=r"Scheduler\.pause_generation .*: it is not there"):
        contract.expect("loop")


def checks_s() -> tuple[float, float]:
    """CPU time of the checks of a prefill scheduler, and then of all, in a process that has imported SGLang."""
    begin_s = time.process_time()
    contract.expect(*SCHEDULER_PARTS)
    scheduler_s = time.process_time()
    contract.expect(*(part.name for part in PARTS))
    return scheduler_s - begin_s, time.process_time() - scheduler_s


def test_the_check_at_start_takes_less_than_a_second() -> None:
    scheduler_s, all_s = warm.call(checks_s)
    print(f"{len(ROWS)} rows: a prefill scheduler's parts {scheduler_s:.3f} s of CPU time, then all {all_s:.3f} s")
    assert scheduler_s < MOST_S
    assert all_s < MOST_S


def test_the_range_is_the_one_in_pyproject() -> None:
    """The installed metadata are what messages say: `pip install -e .` again after a change of pyproject.toml."""
    import tomllib

    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    [required] = [line for line in pyproject["project"]["dependencies"] if re.match(r"sglang\b", line)]
    assert required == f"sglang{supported()}" or set(required[6:].split(",")) == set(str(supported()).split(","))
    assert contract.is_supported(installed())
    assert not contract.is_supported("0.4.0")
