"""The documentation names what is there: every module in the table of modules, every link with its heading."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sgl_flowprefill"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def table_of_modules():
    """Files and folders of the table's first column, by their names there. ``policy/base.py`` is the package's; a name
    without a folder lies beside the one before it."""
    section = (ROOT / "docs" / "architecture.md").read_text().split("\n## Modules\n")[1].split("\n## ")[0]
    found = {}
    for line in section.splitlines():
        folder = ROOT
        for name in re.findall(r"`([^`]+)`", line.split("|")[1]) if line.startswith("|") else ():
            places = [base / name for base in (ROOT, PACKAGE, folder)]
            path = next((place for place in places if place.exists()), ROOT / name)
            folder = path.parent
            found[name] = Path(os.path.realpath(path))
    return found


def test_the_table_of_modules_names_only_what_is_there():
    assert [name for name, path in table_of_modules().items() if not path.exists()] == []


def test_every_module_is_in_the_table_or_in_a_folder_of_it():
    named = set(table_of_modules().values())
    modules = [
        Path(os.path.realpath(os.path.join(directory, file)))
        for directory, _, files in os.walk(PACKAGE, followlinks=True)
        for file in files
        if file.endswith(".py") and file != "__init__.py"
    ]
    assert len(modules) > 100
    missing = [path for path in modules if named.isdisjoint((path, *path.parents))]
    assert sorted(str(path.relative_to(ROOT)) for path in missing) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_file_and_a_heading(page):
    broken = []
    for target in LINK.findall(page.read_text()):
        name, _, heading = target.partition("#")
        if name.startswith(("http:", "https:")):
            continue
        file = page.parent / name if name else page
        if not file.exists() or (heading and heading not in headings(file)):
            broken.append(target)
    assert broken == []


def headings(page):
    """The anchors that the headings of a page have, as GitHub makes them."""
    lines = [line.lstrip("#").strip() for line in page.read_text().splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}
