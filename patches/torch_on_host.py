"""What modules of SGLang find under the name ``torch`` on the portable CPU platform: PyTorch, but for what needs an
accelerator.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, Final

import torch

from sgl_flowprefill.patches.base import resolve


class TorchOnHost(ModuleType):
    """PyTorch, with some of its functions replaced."""

    def __init__(self, instead: Mapping[str, Any]) -> None:
        super().__init__(torch.__name__)
        vars(self).update(instead)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def replace_in_modules(seam: str, targets: Iterable[str], instead: Mapping[str, Any]) -> None:
    """Let the modules that define ``targets`` find functions of PyTorch replaced. Raises SeamError."""
    own = TorchOnHost(instead)
    for target in targets:
        vars(sys.modules[resolve(seam, target).__module__])["torch"] = own


def _unpinned(make: Any) -> Any:
    @functools.wraps(make)
    def made(*args: Any, **options: Any) -> Any:
        return make(*args, **options | {"pin_memory": False})

    return made


UNPINNED: Final = {"tensor": _unpinned(torch.tensor), "zeros": _unpinned(torch.zeros)}
"""Functions that are asked for pinned tensors, which PyTorch makes by an accelerator's driver."""
