"""TTFT models: how long a prefill will execute. No torch, no SGLang."""

from sgl_flowprefill.ttft.base import PrefillShape, TTFTModel
from sgl_flowprefill.ttft.cubic import CubicTTFT

__all__ = ["CubicTTFT", "PrefillShape", "TTFTModel"]
