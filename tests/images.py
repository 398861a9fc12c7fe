"""A model that reads images, and images for it: a tiny Qwen2-VL with random weights, and pixels from a seed.

No processor is needed: requests carry what one would have made of their images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

VOCABULARY: Final = 4096
IMAGE_TOKEN: Final = 4090
GRID: Final = (1, 8, 8)
"""Frames, rows and columns of an image's patches."""
MERGED: Final = 2
"""Patches of a side that become one token."""
IMAGE_TOKENS: Final = GRID[1] * GRID[2] // MERGED**2
PATCH: Final = {"patch_size": 4, "temporal_patch_size": 2, "in_chans": 3}

TEXT: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}
VISION: Final[dict[str, Any]] = {
    **PATCH,
    "in_channels": PATCH["in_chans"],
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": TEXT["hidden_size"],
    "num_heads": 2,
    "mlp_ratio": 2,
    "spatial_merge_size": MERGED,
}
TOKENS: Final = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": IMAGE_TOKEN + 1,
    "vision_start_token_id": IMAGE_TOKEN + 2,
    "vision_end_token_id": IMAGE_TOKEN + 3,
}


def write_checkpoint(directory: Path) -> None:
    """Random weights from a seed, as Hugging Face's model files."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    config = Qwen2VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=False, **TOKENS)
    Qwen2VLForConditionalGeneration(config).to(torch.float32).save_pretrained(directory)


@dataclass(frozen=True)
class Image:
    """An image in the place of ``IMAGE_TOKENS`` tokens of a prompt."""

    seed: int
    begin: int
    """Where its tokens begin."""

    def inputs(self, prompt_tokens: int) -> Any:
        """What SGLang's processor makes of it."""
        from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalProcessorOutput

        patch = PATCH["patch_size"] ** 2 * PATCH["temporal_patch_size"] * PATCH["in_chans"]
        pixels = torch.randn(GRID[1] * GRID[2], patch, generator=torch.Generator().manual_seed(self.seed))
        item = MultimodalDataItem(
            modality=Modality.IMAGE,
            feature=pixels,
            offsets=[(self.begin, self.begin + IMAGE_TOKENS - 1)],
            model_specific_data={"image_grid_thw": torch.tensor([GRID])},
        )
        return MultimodalProcessorOutput(
            mm_items=[item],
            im_token_id=IMAGE_TOKEN,
            mrope_positions=torch.arange(prompt_tokens).expand(3, -1).clone(),
            mrope_position_delta=torch.zeros(1, 1, dtype=torch.int64),
        )
