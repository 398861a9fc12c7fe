"""What a prefill costs on a machine: a forward pass as a fixed part, a part per token and a part per pair of tokens.

    forward(batch) = max(floor, fixed + per_token * new tokens) + sum of per_pair * new * (new + 2 * cached)

``new * (new + 2 * cached)`` makes chunks add up: the attention of a prompt costs the same in one forward or in ten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np

from sgl_flowprefill.profiling.file import read_profile
from sgl_flowprefill.ttft import PrefillShape
from sgl_flowprefill.ttft.physics import non_negative


@dataclass(frozen=True)
class CostModel:
    """Execution times of forward passes on one prefill instance; a ``TTFTModel`` that is exact."""

    name: str
    layers: int
    fixed_s: float
    """What every forward pass takes, however short: launches, preparation, sampling."""
    per_token_s: float
    per_pair_s: float
    """Attention: seconds for a pair of new tokens (both orders counted once, by causality)."""
    floor_s: float = 0.0
    """A forward pass takes no less, before attention: kernels are launched, weights are read."""
    projection_share: float = 0.2
    """Share of the work per token that belongs to the attention module (its projections), not to the MLP."""
    serving_s: float = 0.0
    """What a request spends outside of the forward passes: HTTP, tokenizer, handshake."""
    kv_bytes_per_token: int = 0
    kv_tokens: int = 1 << 62
    """KV cache of the instance."""
    source: str = ""

    def predict_s(self, batch: Sequence[PrefillShape]) -> float:
        """Seconds of one forward pass over ``batch``, undisturbed."""
        tokens, pairs = _work(batch)
        return max(self.floor_s, self.fixed_s + self.per_token_s * tokens) + self.per_pair_s * pairs

    def mixed_s(self, batch: Sequence[PrefillShape], streams: int, per_stream_s: float) -> float:
        """Seconds of a forward pass over ``batch`` and one token of each of ``streams``, without their contexts. A
        stream is one more token, or takes the ``per_stream_s`` of a decode step where that is more.
        """
        tokens, pairs = _work(batch)
        streams_s = max(self.per_token_s, per_stream_s) * streams
        return max(self.floor_s, self.fixed_s + self.per_token_s * tokens + streams_s) + self.per_pair_s * pairs

    def slower(self, factor: float) -> CostModel:
        """The cost model of a machine whose forward passes take ``factor`` times as long."""
        names = ("fixed_s", "per_token_s", "per_pair_s", "floor_s")
        return dataclasses.replace(self, **{name: factor * getattr(self, name) for name in names})

    def forward(self, batch: Sequence[PrefillShape]) -> tuple[float, float]:
        """Seconds of one forward pass over ``batch``, and the share of a layer's time that passes before the preemption
        checkpoint after its attention module.
        """
        tokens, pairs = _work(batch)
        attention_s = self.per_pair_s * pairs
        whole_s = max(self.floor_s, self.fixed_s + self.per_token_s * tokens) + attention_s
        return whole_s, (attention_s + self.projection_share * (whole_s - attention_s)) / whole_s

    def least_s(self, shape: PrefillShape, max_batch_tokens: int) -> float:
        """A lower bound of the machine time that a request takes, in whatever forwards and company it is computed.

        Forwards have at most ``max_batch_tokens`` new tokens, or one request alone. ``docs/simulator.md`` has the
        proof that the forwards of a schedule never take less than the sum over their requests.
        """
        company = max(shape.new_tokens, max_batch_tokens)
        together_s = max(self.floor_s, self.fixed_s + self.per_token_s * company)
        return together_s * shape.new_tokens / company + self.per_pair_s * _work([shape])[1]


def fit(batches: Sequence[Sequence[PrefillShape]], times_s: Sequence[float]) -> tuple[float, float, float]:
    """(fixed, per token, per pair) in seconds, none negative, by least squares of relative residuals.

    A shape that was measured several times counts once, by its median. Raises ValueError with fewer than three shapes.
    """
    repeats: dict[tuple[PrefillShape, ...], list[float]] = {}
    for batch, time_s in zip(batches, times_s, strict=True):
        repeats.setdefault(tuple(batch), []).append(time_s)
    if len(repeats) < 3:
        raise ValueError(f"a cost model needs at least 3 shapes of batches, got {sorted(repeats)}")
    work = np.array([_work(batch) for batch in repeats], dtype=float)
    times = np.array([median(repeated_s) for repeated_s in repeats.values()])
    columns = np.column_stack([np.ones_like(times), work]) / times[:, None]
    scale = np.linalg.norm(columns, axis=0)
    fixed_s, per_token_s, per_pair_s = non_negative(columns / scale, np.ones_like(times)) / scale
    return float(fixed_s), float(per_token_s), float(per_pair_s)


def _work(batch: Sequence[PrefillShape]) -> tuple[int, int]:
    """New tokens of a forward pass, and pairs."""
    tokens = pairs = 0
    for new, cached in batch:
        tokens += new
        pairs += new * (new + 2 * cached)
    return tokens, pairs


def lower_envelope(tokens: Sequence[int], times_s: Sequence[float], bins: int = 24) -> list[tuple[int, float]]:
    """The fastest request of each of ``bins`` length classes (log-spaced): those that hardly queued."""
    log_lengths = np.log(np.asarray(tokens, dtype=float))
    edges = np.linspace(log_lengths.min(), log_lengths.max(), bins + 1)[1:-1]
    fastest: dict[int, tuple[int, float]] = {}
    for place, length, time_s in zip(np.digitize(log_lengths, edges), tokens, times_s, strict=True):
        if int(place) not in fastest or time_s / length < fastest[int(place)][1] / fastest[int(place)][0]:
            fastest[int(place)] = (int(length), float(time_s))
    return [fastest[place] for place in sorted(fastest)]


def fit_published(tokens: Sequence[int], ttft_s: Sequence[float]) -> tuple[float, float, float, float]:
    """(fixed, per token, per pair, floor) in seconds, from the TTFTs of a loaded server.

    Only the fastest requests of each length count. Requests of 256 to 8,192 tokens, one forward each, give the curve;
    shorter ones, which take the same time whatever their length, the floor.
    """
    envelope = lower_envelope(tokens, ttft_s)
    curve = [point for point in envelope if 256 <= point[0] <= 8192]
    prompts = [[PrefillShape(length)] for length, _ in curve]
    fixed_s, per_token_s, per_pair_s = fit(prompts, [time_s for _, time_s in curve])
    return fixed_s, per_token_s, per_pair_s, median(time_s for length, time_s in envelope if length < 256)


def from_profile(path: Path, layers: int) -> CostModel:
    """The engine behind a TTFT profile: what ``launch.py profile`` writes and a prefill server caches.

    Raises ProfileError with a sentence for a file that is none.
    """
    profile = read_profile(path)
    fixed_s, per_token_s, per_pair_s = fit(*profile.timings())
    return CostModel(profile.setting.model, layers, fixed_s, per_token_s, per_pair_s, source=f"profile {path}")


# NVIDIA A800 SXM 80 GB, from its data sheet: dense bf16, HBM2e, NVLink (one direction).
A800_FLOPS: Final = 312e12
A800_BYTES_PER_S: Final = 2.0e12
A800_LINK_BYTES_PER_S: Final = 200e9
A800_KV_BYTES: Final = 0.88 * 80e9
"""What SGLang would leave for weights and KV cache together."""
GEMM_EFFICIENCY: Final = 0.80
ATTENTION_EFFICIENCY: Final = 0.36
MOE_EFFICIENCY: Final = 0.40
"""Shares of A800_FLOPS that are reached. The first two are what the Llama-3.1-8B fit below amounts to; the third (small
expert GEMMs) is an assumption."""
FORWARD_S: Final = 0.010
"""What one more forward pass costs besides its tokens, by the prediction in the FlowPrefill code (10 ms a chunk)."""


LLAMA_8B: Final = CostModel(
    name="llama-3.1-8b-a800",
    layers=32,
    fixed_s=FORWARD_S,
    per_token_s=5.613e-5,
    per_pair_s=2.303e-9,
    floor_s=0.0185,
    projection_share=0.19,
    serving_s=0.0084,
    kv_bytes_per_token=2 * 32 * 8 * 128 * 2,
    kv_tokens=int((A800_KV_BYTES - 16.06e9) / (2 * 32 * 8 * 128 * 2)),
    source="fit to the TTFTs that the FlowPrefill repository's offline notebook prints (one A800, tp 1)",
)
"""``fit_published`` of the 323 requests in that notebook: 18.4 ms, 56.13 us, 2.303 ns, floor 26.9 ms. Of the fixed part
FORWARD_S is taken for the forward pass and the rest, 8.4 ms of every TTFT, for proxy, HTTP and tokenizer."""


def roofline(
    name: str,
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    active_parameters: float,
    parameters: float,
    gpus: int,
    gemm_efficiency: float = GEMM_EFFICIENCY,
) -> CostModel:
    """A model on ``gpus`` A800 with tensor parallelism, bf16: the slower of arithmetic and reading the weights.

    ``active_parameters`` are those of the layers that a token passes (no embedding). Each layer has two all-reduces of
    the hidden state, not overlapped with compute. Reading the weights reads all experts, as from about 64 tokens on;
    launching a layer's kernels takes as long as in Llama-3.1-8B.
    """
    compute_s = 2 * active_parameters / (A800_FLOPS * gemm_efficiency * gpus)
    ring_bytes = 2 * layers * hidden * 2 * 2 * (gpus - 1) / gpus
    kv_bytes = 2 * layers * kv_heads * head_dim * 2
    projections = layers * hidden * head_dim * (2 * heads + 2 * kv_heads)
    return CostModel(
        name=name,
        layers=layers,
        fixed_s=FORWARD_S,
        per_token_s=compute_s + ring_bytes / A800_LINK_BYTES_PER_S,
        per_pair_s=2 * layers * heads * head_dim / (A800_FLOPS * ATTENTION_EFFICIENCY * gpus),
        floor_s=max(2 * parameters / (A800_BYTES_PER_S * gpus), LLAMA_8B.floor_s * layers / LLAMA_8B.layers),
        projection_share=projections / active_parameters,
        serving_s=LLAMA_8B.serving_s,
        kv_bytes_per_token=kv_bytes,
        kv_tokens=int((A800_KV_BYTES * gpus - 2 * parameters) / kv_bytes),
        source="roofline: data-sheet A800, efficiencies of the Llama-3.1-8B fit",
    )


MODELS: Final[Mapping[str, CostModel]] = {
    model.name: model
    for model in (
        LLAMA_8B,
        roofline(
            "qwen2.5-14b-a800-tp2",
            layers=48,
            hidden=5120,
            heads=40,
            kv_heads=8,
            head_dim=128,
            active_parameters=13.2e9,
            parameters=14.8e9,
            gpus=2,
        ),
        roofline(
            "qwen3-30b-a3b-a800",
            layers=48,
            hidden=2048,
            heads=32,
            kv_heads=4,
            head_dim=128,
            active_parameters=2.7e9,
            parameters=30.5e9,
            gpus=1,
            gemm_efficiency=MOE_EFFICIENCY,
        ),
    )
}


def cost_model(name: str, layers: int) -> CostModel:
    """A model of MODELS by name, or the profile at a path (which does not say how many ``layers`` there are)."""
    if name in MODELS:
        return MODELS[name]
    if Path(name).is_file():
        return from_profile(Path(name), layers)
    raise ValueError(f"cost model {name!r} is no profile file and none of {', '.join(MODELS)}")
