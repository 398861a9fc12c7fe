"""What ``import bench``, ``import patches`` and ``import profiling`` mean while the repository's root is on sys.path.

These folders lie at the root, and Python would import them under their bare names from there, a second time beside
``sgl_flowprefill.bench``. ``profiling`` is a module of Python's own since 3.15, which ``cProfile`` imports.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec


def stand_aside(name: str, file: str) -> None:
    """Put the module in its place that ``name`` means further down ``sys.path``; ImportError where there is none.

    The package at ``file`` calls this while it is imported under a bare name. The import system returns what is in
    ``sys.modules`` when the import is done.
    """
    is_behind = False
    for entry in sys.path:
        spec = PathFinder.find_spec(name, [entry])
        if spec is None or spec.loader is None or spec.origin is None:
            continue
        if os.path.samefile(spec.origin, file):
            is_behind = True
        elif is_behind:  # only there: another checkout would hand over to this one
            module = sys.modules[name] = module_from_spec(spec)
            spec.loader.exec_module(module)
            return
    raise ImportError(f"{name} is a folder of sgl-flowprefill: import sgl_flowprefill.{name} instead.", name=name)
