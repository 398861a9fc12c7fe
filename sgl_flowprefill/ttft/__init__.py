"""TTFT models: how long a prefill will execute. No torch, no SGLang."""

from sgl_flowprefill.ttft.base import YARDSTICK, PrefillShape, TTFTModel
from sgl_flowprefill.ttft.boosted import BoostedTTFT
from sgl_flowprefill.ttft.online import AdaptiveTTFT, Prediction
from sgl_flowprefill.ttft.operators import OperatorTimes

__all__ = [
    "YARDSTICK",
    "AdaptiveTTFT",
    "BoostedTTFT",
    "OperatorTimes",
    "Prediction",
    "PrefillShape",
    "TTFTModel",
]
