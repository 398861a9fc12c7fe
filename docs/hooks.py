"""What the site does beyond its pages in docs/: it has the three files of the project's root that readers ask for, and
links to other files of the repository, which no page of the site is, are shown as names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

AT_THE_ROOT = {f"{name}.md": f"{name.lower()}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")}
LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./|docs/)?)([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in AT_THE_ROOT.items():
        files.append(File.generated(config, page, abs_src_path=str(Path(config.config_file_path).with_name(name))))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    from_root = page.file.src_uri in AT_THE_ROOT.values()

    def link(found: re.Match[str]) -> str:
        text, folder, target = found.groups()
        if target in AT_THE_ROOT:
            return f"[{text}]({AT_THE_ROOT[target]})"
        if folder == ("docs/" if from_root else ""):
            return f"[{text}]({target})"
        return found[0] if target.startswith("http") else f"`{target}`"

    return LINK.sub(link, markdown)
