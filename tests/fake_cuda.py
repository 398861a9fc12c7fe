"""Let libraries believe that there is an NVIDIA GPU, so that they import what they would use on one.

``python -m tests.fake_cuda MODULE…`` imports modules so, in a process of its own. Nothing can be computed in it.
"""

from __future__ import annotations

import gc
import importlib
import sys
from types import SimpleNamespace
from typing import Any

HOPPER = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=132,
    warp_size=32,
    shared_memory_per_block_optin=232_448,
    L2_cache_size=50 << 20,
    uuid="GPU-0",
    is_integrated=0,
)


def install() -> None:
    """Take the place of what is asked of ``torch.cuda`` at import."""
    import torch

    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": False,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "get_device_capability": (HOPPER.major, HOPPER.minor),
        "get_device_name": HOPPER.name,
        "get_device_properties": HOPPER,
        "mem_get_info": (79 << 30, 80 << 30),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, _answer=answer, **named: _answer)


def main() -> None:
    gc.disable()  # what is imported is no garbage
    install()
    from sglang.srt.utils import is_cuda, is_flashinfer_available

    assert is_cuda()
    assert is_flashinfer_available()
    for name in sys.argv[1:]:
        importlib.import_module(name)
        print(name, flush=True)


if __name__ == "__main__":
    main()
