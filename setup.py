"""A source distribution like the tree: bench, patches and profiling once, at the top, and links in the package.

Everything else is in pyproject.toml. setuptools follows links to folders when it collects files, and packs none.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

PACKAGE = Path("sgl_flowprefill")


class LinkedSdist(sdist):
    """MANIFEST.in leaves out what is behind the links; this puts the links in."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        for link in PACKAGE.iterdir():
            if link.is_symlink():
                (base_dir / link).symlink_to(link.readlink())


setup(cmdclass={"sdist": LinkedSdist})
