"""Models of which only the shape is given: configuration and tokenizer, no weights (``patches.made_weights``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sgl_flowprefill.cluster.preflight import made_model
from sgl_flowprefill.model.embedded import VOCAB_SIZE, EmbeddedModel


@dataclass(frozen=True)
class Shape(EmbeddedModel):
    """A Llama in bfloat16. Its tokenizer is the embedded model's, whatever the size of its vocabulary."""

    label: str = ""
    vocab_size: int = VOCAB_SIZE

    @property
    def name(self) -> str:
        return f"{self.label}-{super().name.rpartition('-')[2]}"

    def write(self, directory: Path) -> None:
        """Write all but the weights."""
        self.write_description(directory)

    def _config(self) -> dict[str, Any]:
        return super()._config() | {"vocab_size": self.vocab_size, "torch_dtype": "bfloat16"}


SHAPES: Final = {
    shape.label: shape
    for shape in (
        Shape(
            label="llama-8b", layers=32, hidden_size=4096, intermediate_size=14336, heads=32, kv_heads=8, head_dim=128,
            context_tokens=131_072, vocab_size=128_256,
        ),
        Shape(
            label="llama-small", layers=4, hidden_size=512, intermediate_size=2048, heads=4, kv_heads=1, head_dim=128,
        ),
    )
}  # fmt: skip
"""By name: Llama-3.1-8B's, and one that a CPU computes in seconds, too. Both have four heads for each KV head: SGLang
then decodes by FlashInfer's paged prefill, and with fewer by another module, which would have to be compiled first.
"""


def shape_path(name: str) -> Path:
    """Directory of the shape; made on first use, and kept in the cache. Raises StartError."""
    return Path(made_model(SHAPES[name]))
