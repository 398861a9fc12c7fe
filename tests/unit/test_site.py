"""The documentation as a site: mkdocs builds it strictly, and nothing is loaded from elsewhere when it is read."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
AT_THE_ROOT = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
LOADING = {"img": "src", "script": "src", "iframe": "src", "link": "href", "source": "src", "use": "href"}
NOT_LOADED = {"canonical", "prev", "next", "edit", "alternate"}
MISSING = [name for name in ("material", "mkdocs", "mkdocstrings_handlers") if find_spec(name) is None]

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"the site's tools are not installed ({', '.join(MISSING)}): pip install -e '.[docs]'"
)


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """What ``make docs`` does, into another folder."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)],
        cwd=source,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    result = build(ROOT, folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


class Loaded(HTMLParser):
    """What a browser fetches to show a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in LOADING and not NOT_LOADED & set((given.get("rel") or "").split()):
            self.addresses.append(given.get(LOADING[tag]) or "")
        self.addresses += re.findall(r"url\(([^)]+)\)", given.get("style") or "")


def is_elsewhere(address: str) -> bool:
    return re.match(r"(\w+:)?//", address.strip("'\" ")) is not None


def test_every_page_is_there_and_every_link_leads_somewhere(site: Path) -> None:
    """mkdocs.yml is strict: a link without a target, or a page that the navigation does not have, fails the build."""
    pages = {page.stem for page in DOCS.glob("*.md")} | {name.lower().removesuffix(".md") for name in AT_THE_ROOT}
    assert pages <= {page.stem for page in site.glob("*.html")}
    assert not list(site.rglob("*.py"))


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    found = {address for page in pages for address in Loaded(page.read_text()).addresses}
    of_a_sheet = re.compile(r"(?:url\(|@import\s+)([^);]+)")
    found |= {address for sheet in site.rglob("*.css") for address in of_a_sheet.findall(sheet.read_text())}
    assert len(found) > 10
    assert sorted(filter(is_elsewhere, found)) == []
    pictures = list(site.rglob("*.svg"))
    assert len(pictures) > 5
    loads = re.compile(r'(href|src)="(?!#)|@import|<script|<foreignObject')
    assert [picture for picture in pictures if loads.search(picture.read_text())] == []


def test_the_page_of_the_reference_has_the_docstrings(site: Path) -> None:
    page = (site / "reference.html").read_text()
    for name in ("frontend", "policy.base.Policy.pick", "events.Arrival"):
        assert f'id="sgl_flowprefill.{name}"' in page


def test_mistakes_fail_the_build(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(DOCS, tree / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", *AT_THE_ROOT):
        shutil.copy(ROOT / name, tree)
    (tree / "docs" / "reference.md").write_text("# Reference\n")  # takes most of the time, and has no part in this
    (tree / "docs" / "forgotten.md").write_text("# Forgotten\n")
    with (tree / "docs" / "faq.md").open("a") as page:
        page.write("\n[nowhere](no-such-page.md) [nowhere](serving.md#no-such-heading)\n")
    with (tree / "CHANGELOG.md").open("a") as page:
        page.write("\n[nowhere](docs/no-such-page-either.md)\n")
    result = build(tree, tmp_path / "site")
    assert result.returncode != 0
    complaints = [line for line in (result.stdout + result.stderr).splitlines() if "WARNING" in line]
    complaints += re.findall(r"^  - .*", result.stdout + result.stderr, flags=re.MULTILINE)
    for mistake in ("forgotten.md", "'no-such-page.md'", "#no-such-heading", "'no-such-page-either.md'"):
        assert any(mistake in complaint for complaint in complaints), mistake
