"""Which of SGLang's models a process imports: to serve one, it imports more than 200 modules of others, which takes it
four seconds.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Final

VARIABLE: Final = "SGLANG_DISABLED_MODEL_ARCHS"
"""SGLang's environment variable with the names of modules that it does not look into for models."""


def all_but(served: str) -> str:
    """The names of all modules of models but ``served``, as VARIABLE has them. SGLang is not imported for it."""
    spec = find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations
    modules = {path.stem for path in (Path(spec.submodule_search_locations[0]) / "srt" / "models").glob("*.py")}
    assert served in modules
    return ",".join(sorted(modules - {served}))
