"""Stands in for sglang-kernel 0.4.10 where its binaries do not load: they are built for one version of torch.

What a bf16 Llama calls is SGLang's own kernel of the same operator, which is compiled at first use. Every other name
can be imported, as SGLang does, and raises when it is called.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

__version__ = "0.4.10"


def rmsnorm(input: Any, weight: Any, eps: float = 1e-6, out: Any = None, enable_pdl: bool | None = None) -> Any:
    import torch
    from sglang.kernels.ops.layernorm import norm

    out = torch.empty_like(input) if out is None else out
    norm.rmsnorm(input, weight, out, eps)
    return out


def fused_add_rmsnorm(
    input: Any, residual: Any, weight: Any, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    from sglang.kernels.ops.layernorm import norm

    norm.fused_add_rmsnorm(input, residual, weight, eps)


class _Absent:
    """A kernel that is not here."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, *args: Any, **named: Any) -> Any:
        raise NotImplementedError(f"{self.__name__}: this stand-in for sglang-kernel has no such kernel")


class _Module(types.ModuleType):
    """A submodule of which every name is absent."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds submodules of this package that are not files beside this one.

    None for FlashAttention 3: that its import fails is how SGLang and FlowPrefill know that there is none.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not name.startswith(f"{__name__}.") or name.endswith((".flash_attn", ".flash_ops")):
            return None
        if importlib.machinery.PathFinder.find_spec(name, path) is not None:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Absent(f"{__name__}.{name}")


sys.meta_path.append(_Submodules())
