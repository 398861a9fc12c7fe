"""Weights made on the device, at a scale at which attention matters: for a shape of which no model files are at hand.

SGLang's ``--load-format dummy`` draws all weights within 0.001 of zero. Every layer then adds next to nothing to the
residual stream, so that wrong attention would change no token.

Target: ``initialize_dummy_weights`` as ``sglang.srt.model_loader.loader`` calls it (SGLang 0.5.23).
"""

from __future__ import annotations

import os
import zlib
from typing import Any, Final

from sgl_flowprefill.patches.base import expect

SEAM: Final = "made_weights"
ENV_SWITCH: Final = "FLOWPREFILL_MADE_WEIGHTS"
TARGET: Final = "sglang.srt.model_loader.loader.initialize_dummy_weights"
GAINS: Final = {"qkv_proj": 1.5, "o_proj": 1.5, "down_proj": 1.5, "lm_head": 4.0}
"""Gain of a matrix, over what keeps the scale of its input: as in the embedded model (``model.embedded``)."""
WORDS: Final = 4096
"""Tokens that can be the largest: fewer of them lie further apart than bfloat16 rounds."""
SMALL: Final = 0.01


def is_enabled() -> bool:
    """Whether the environment asks for such weights."""
    return os.environ.get(ENV_SWITCH, "0") == "1"


def apply() -> None:
    """Register the seam in a process that may load a model. Raises SeamError."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect(SEAM)
    HookRegistry.register(TARGET, make_weights, HookType.REPLACE)


def make_weights(model: Any) -> None:
    """Fill the weights of ``model`` where they are, the same ones in every process."""
    import torch

    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if not torch.is_floating_point(weight) or "cos_sin" in name:
                continue
            if weight.dim() < 2:
                weight.fill_(1.0)
                continue
            generator = torch.Generator(device=weight.device).manual_seed(zlib.crc32(name.encode()))
            if "embed_tokens" in name:
                weight.normal_(0.0, 1.0, generator=generator)
                continue
            gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
            weight.normal_(0.0, gain / weight.shape[-1] ** 0.5, generator=generator)
            if "lm_head" in name:
                weight[WORDS:] *= SMALL
