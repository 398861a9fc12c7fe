"""The embedded model: a small Llama made from a seed, so that everything runs without a download.

It says nothing sensible; what matters is its cost and its tokens. One core prefills it in about twice the time that
Llama-3.1-8B takes on an A800, at 512 to 8,192 tokens alike, because one narrow attention head keeps the quadratic
share as small as it is there. Greedy decoding never meets an end-of-sequence token or a near tie, so two correct
implementations answer with the same tokens.

Text is made of invented two-syllable words, one token each with its leading space (" bake lomi tura" is three
tokens); any other text falls back to syllables and bytes and round-trips too. Ids from ``FIRST_WORD_ID`` up to
``VOCAB_SIZE`` are the words: ``n`` such ids are a prompt of exactly ``n`` tokens, as ids or as decoded text.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sgl_flowprefill.paths import cache_dir

VOCAB_SIZE: Final = 4096
SPECIAL_TOKENS: Final = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
SYLLABLES: Final = tuple(consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou")
FIRST_WORD_ID: Final = len(SPECIAL_TOKENS) + 256 + 2 * len(SYLLABLES)
SPACE: Final = "Ġ"  # how byte-level BPE writes a space

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class EmbeddedModel:
    """Shape and seed of the model; another shape is another directory in the cache."""

    seed: int = 20260216
    layers: int = 8
    hidden_size: int = 256
    intermediate_size: int = 512
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 16
    context_tokens: int = 65536
    format: int = 1  # raise it when what `write` produces changes

    @property
    def name(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"embedded-llama-{digest[:12]}"

    def write(self, directory: Path) -> None:
        """Write config, weights (float32) and tokenizer as a Hugging Face model directory."""
        from safetensors.numpy import save_file

        save_file(dict(self._weights()), directory / "model.safetensors", metadata={"format": "pt"})
        self.write_description(directory)

    def write_description(self, directory: Path) -> None:
        """Write config and tokenizer."""
        _write_json(directory / "config.json", self._config())
        _write_json(directory / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
        _write_tokenizer(directory)

    def _config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context_tokens,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "float32",
        }

    def _weights(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Gaussian weights scaled by fan-in, so that every layer changes the residual stream by about its own size.

        Queries and keys are wider, which makes attention pick tokens instead of averaging thousands of them away, and
        so are the logits of words, which keeps greedy choices apart; no other token is ever the largest.
        """
        random = np.random.default_rng(self.seed)

        def linear(rows: int, columns: int, gain: float = 1.0) -> NDArray[np.float32]:
            scale = np.float32(gain / columns**0.5)
            return random.standard_normal((rows, columns), dtype=np.float32) * scale

        hidden, attention, kv = self.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", random.standard_normal((VOCAB_SIZE, hidden), dtype=np.float32)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", np.ones(hidden, np.float32)
            yield prefix + "self_attn.q_proj.weight", linear(attention, hidden, 1.5)
            yield prefix + "self_attn.k_proj.weight", linear(kv, hidden, 1.5)
            yield prefix + "self_attn.v_proj.weight", linear(kv, hidden)
            yield prefix + "self_attn.o_proj.weight", linear(hidden, attention, 1.5)
            yield prefix + "post_attention_layernorm.weight", np.ones(hidden, np.float32)
            yield prefix + "mlp.gate_proj.weight", linear(self.intermediate_size, hidden)
            yield prefix + "mlp.up_proj.weight", linear(self.intermediate_size, hidden)
            yield prefix + "mlp.down_proj.weight", linear(hidden, self.intermediate_size, 1.5)
        yield "model.norm.weight", np.ones(hidden, np.float32)
        head = linear(VOCAB_SIZE, hidden, 4.0)
        head[:FIRST_WORD_ID] *= 0.01
        yield "lm_head.weight", head


def embedded_model_path(model: EmbeddedModel | None = None) -> Path:
    """Directory of the embedded model; made on first use, in about a second, and kept in the cache.

    Raises OSError when the cache directory cannot be written.
    """
    model = model or EmbeddedModel()
    path = cache_dir() / model.name
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{model.name}-", dir=path.parent))
    try:
        model.write(partial)
        partial.chmod(0o755)
        partial.rename(path)
    except OSError:
        if not path.is_dir():  # else another process made it first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _write_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer whose merges build syllables, then words, so that a word is one token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = np.random.default_rng(0).permutation(len(SYLLABLES) ** 2)[: VOCAB_SIZE - FIRST_WORD_ID]
    merges = [(syllable[0], syllable[1]) for syllable in SYLLABLES]
    merges += [(SPACE, syllable) for syllable in SYLLABLES]
    for word in words:
        first, second = divmod(int(word), len(SYLLABLES))
        merges.append((SPACE + SYLLABLES[first], SYLLABLES[second]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL_TOKENS, *alphabet, *("".join(pair) for pair in merges)]

    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL_TOKENS[0],
            "eos_token": SPECIAL_TOKENS[1],
            "model_max_length": 65536,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
