"""Small configurations of the architectures in SGLang's registry.

A configuration class of SGLang or transformers gives most; what only a checkpoint's own config.json would say stands
here: ``CONFIGS`` by architecture, ``FIELDS`` for fields that constructors ask for under the same name everywhere.
"""

from __future__ import annotations

import copy
import re
import tempfile
from functools import reduce
from typing import Any, Final

LAYERS: Final = 4
KEEP: Final = object()
"""Value of a field that is not cut to few layers."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

FIELDS: Final[dict[str, Any]] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "layer_norm_eps": 1e-6,
    "norm_eps": 1e-6,
    "layer_norm_epsilon": 1e-6,
    "hidden_act": "silu",
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "full_attention_interval": 4,
    "encoder_only": False,
    "moe_layer_freq": 1,
    "rms_norm": True,
    "o_groups": 1,
    "embed_dim": 64,
    "embedding_dropout": 0.0,
    "norm_head": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "rope_parameters": _ROPE,
    "partial_rotary_factor": 1.0,
    "hybrid_override_pattern": "M-*E",
    "n_groups": 1,
    "in_chans": 3,
    "context_len": 4096,
    "embedding_multiplier_scale": 1.0,
    "output_multiplier_scale": 1.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "moe_top_k": 2,
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "route_norm": True,
    "is_moe_layer": [False, True, True, True],
    "bskcn_1": [],
    "bskcn_2": [],
    "bskcn_3": [],
    "bskcn_4": [],
    "bskcn_tv": [1.0, 0.0],
    "position_embedding_type": "absolute",
    "sliding_window": None,
    "mup_scale_factor": 1.0,
    "input_mult": 1.0,
    "output_mult": 1.0,
    "seq_length": 4096,
    "kv_channels": 64,
    "layer_types": ["full_attention"] * LAYERS,
    "language_only": False,
}
"""Value of a field that a constructor asks for and the configuration has not, whichever the architecture."""

_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 1.0, "original_max_position_embeddings": 4096}
_MLA = {"kv_lora_rank": 64, "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
_KDA = {
    "kda_layers": [1, 2, 3],
    "full_attn_layers": [4],
    "num_heads": 4,
    "head_dim": 64,
    "short_conv_kernel_size": 4,
}

CONFIGS: Final[dict[str, tuple[str | None, dict[str, Any]]]] = {
    "BaichuanForCausalLM": (None, {"vocab_size": 64000, "hidden_size": 4096, "num_attention_heads": 32}),
    "BailingMoEForCausalLM": (None, {"hidden_act": "silu"}),
    "BailingMoeForCausalLM": (None, {"hidden_act": "silu"}),
    "BailingMoeV2ForCausalLM": (None, {"hidden_act": "silu"}),
    "BailingMoeV2_5ForCausalLM": ("bailing_hybrid", {}),
    "BailingMoeV3ForCausalLM": ("bailing_hybrid", {}),
    "DeepseekForCausalLM": (None, {"moe_layer_freq": 1}),
    "DeepseekV3ForCausalLM": ("deepseek_v3", {"rope_parameters": _YARN}),
    "DeepseekV32ForCausalLM": ("deepseek_v32", {"rope_parameters": _YARN}),
    "Dots3NoteForCausalLM": ("dots3_note", {}),
    "Ernie4_5_ForCausalLM": ("ernie4_5", {}),
    "Exaone4ForCausalLM": ("exaone4", {"sliding_window_pattern": "LLLG"}),
    "ExaoneMoEForCausalLM": ("exaone_moe", {}),
    "Gemma2ForCausalLM": ("gemma2", {"hidden_act": "gelu_pytorch_tanh"}),
    "GigaChat35ForCausalLM": ("gigachat3_5", {"rope_parameters": _YARN}),
    "GlmMoeDsaForCausalLM": ("glm_moe_dsa", {"rope_parameters": _YARN}),
    "HunYuanDenseV1ForCausalLM": ("hunyuan_v1_dense", {"head_dim": 64}),
    "HunYuanMoEV1ForCausalLM": ("hunyuan_v1_moe", {"head_dim": 64}),
    "IQuestCoderForCausalLM": ("llama", {}),
    "IQuestLoopCoderForCausalLM": ("llama", {}),
    "InternLM3ForCausalLM": ("llama", {}),
    "Lfm2ForCausalLM": ("lfm2", {"layer_types": ["conv", "conv", "full_attention", "conv"]}),
    "Lfm2MoeForCausalLM": ("lfm2_moe", {"layer_types": ["conv", "conv", "full_attention", "conv"]}),
    "Llama4ForCausalLM": ("llama4_text", {}),
    "Mamba2ForCausalLM": ("mamba2", {}),
    "MiMoForCausalLM": ("qwen2", {}),
    "MiniCPMForCausalLM": (None, {"scale_emb": 1, "scale_depth": 1, "dim_model_base": 256}),
    "MistralLarge3ForCausalLM": ("deepseek_v3", {"rope_parameters": _YARN}),
    "NemotronHForCausalLM": ("nemotron_h", {"hybrid_override_pattern": "M-*E", "num_hidden_layers": LAYERS}),
    "PhiMoEForCausalLM": ("phimoe", {}),
    "QuantMixtralForCausalLM": ("mixtral", {}),
    "Qwen3NextForCausalLM": ("qwen3_next", {"layer_types": None}),
    "TorchNativeLlamaForCausalLM": ("llama", {}),
    "TorchNativePhi3ForCausalLM": ("phi3", {}),
    "TransformersForCausalLM": ("llama", {}),
    "TransformersMoEForCausalLM": ("qwen3_moe", {}),
    "TransformersMultiModalForCausalLM": ("qwen2_5_vl", {}),
    "TransformersMultiModalMoEForCausalLM": ("qwen3_vl_moe", {}),
    "XverseMoeForCausalLM": (None, {"num_experts": 8}),
    "Gemma3nForCausalLM": (
        "gemma3n_text",
        {"intermediate_size": [512] * LAYERS, "activation_sparsity_pattern": [0.0] * LAYERS, "num_kv_shared_layers": 0},
    ),
    "Gemma3nForConditionalGeneration": (
        "gemma3n",
        {
            "text_config.intermediate_size": [512] * LAYERS,
            "text_config.activation_sparsity_pattern": [0.0] * LAYERS,
            "text_config.num_kv_shared_layers": 0,
        },
    ),
    "Qwen3_5ForCausalLM": ("qwen3_5_text", {"rope_parameters": _ROPE}),
    "Qwen3_5MoeForCausalLM": ("qwen3_5_moe_text", {"rope_parameters": _ROPE}),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5", {"text_config.rope_parameters": _ROPE}),
    "Qwen3_5MoeForConditionalGeneration": ("qwen3_5_moe", {"text_config.rope_parameters": _ROPE}),
    "InternS2MobiusForConditionalGeneration": ("interns2_mobius", {"text_config.rope_parameters": _ROPE}),
    "InternS2PreviewForConditionalGeneration": ("intern_s2_preview", {"text_config.rope_parameters": _ROPE}),
    "MiniCPMV4_6ForConditionalGeneration": ("minicpmv4_6", {"text_config.rope_parameters": _ROPE}),
    "MiniCPMV4_7ForConditionalGeneration": ("minicpmv4_7", {"text_config.rope_parameters": _ROPE}),
    "DotsVLMForCausalLM": ("dots_vlm", {"language_config.rope_parameters": _YARN}),
    "KimiVLForConditionalGeneration": ("kimi_vl", {"text_config.rope_parameters": _YARN}),
    "DbrxForCausalLM": ("dbrx", {}),
    "LagunaForCausalLM": ("laguna", {"num_attention_heads_per_layer": None}),
    "MiniMaxM3SparseForCausalLM": (
        None,
        {
            "num_mtp_modules": 0,
            "dense_intermediate_size": 512,
            "swiglu_alpha": 1.0,
            "swiglu_limit": 7.0,
            "sparse_attention_config": None,
        },
    ),
    "SarvamMLAForCausalLM": (
        None,
        {**_MLA, "rope_parameters": {**_YARN, "type": "deepseek_yarn", "rope_type": "deepseek_yarn"}},
    ),
    "SolarForCausalLM": (None, {"bskcn_1": [], "bskcn_2": [], "bskcn_3": [], "bskcn_4": [], "bskcn_tv": [1.0, 0.0]}),
    "GlmImageForConditionalGeneration": ("glm_image", {"text_config.rope_parameters": _ROPE}),
    "LongcatFlashForCausalLM": ("longcat_flash", {"rope_parameters": _ROPE}),
    "FalconH1ForCausalLM": ("falcon_h1", {}),
    "AfmoeForCausalLM": ("afmoe", {"num_experts": 8, "num_shared_experts": 1, "num_experts_per_tok": 2}),
    "DeepseekV2ForCausalLM": (
        "deepseek_v2",
        {
            "rope_parameters": _YARN,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "first_k_dense_replace": 1,
        },
    ),
    "DeepseekVL2ForCausalLM": ("deepseek_vl_v2", {"tile_tag": "2D", "language_config.rope_parameters": _YARN}),
    "DeepseekOCRForCausalLM": ("deepseek-ocr", {"tile_tag": "2D"}),
    "Gemma4ForCausalLM": ("gemma4_text", {"num_hidden_layers": KEEP, "layer_types": KEEP}),
    "Gemma4ForConditionalGeneration": (
        "gemma4",
        {"text_config.num_hidden_layers": KEEP, "text_config.layer_types": KEEP},
    ),
    "Gemma4UnifiedForConditionalGeneration": (
        "gemma4_unified",
        {"text_config.num_hidden_layers": KEEP, "text_config.layer_types": KEEP},
    ),
    "EmbeddingGemma2Model": (
        "embedding_gemma2",
        {"text_config.num_hidden_layers": KEEP, "text_config.layer_types": KEEP},
    ),
    "IQuestQ1ForCausalLM": ("iquest_q1", {"num_hidden_layers": KEEP, "layer_types": KEEP}),
    "JetNemotronForCausalLM": ("jet_nemotron", {"num_hidden_layers": KEEP, "layer_types": KEEP}),
    "HYV4ForCausalLM": (
        "hy_v4",
        {"rope_parameters": _YARN, "num_hidden_layers": KEEP, "layer_types": KEEP, "mlp_layer_types": KEEP},
    ),
    "GraniteMoeHybridForCausalLM": ("granitemoehybrid", {"num_hidden_layers": KEEP, "layer_types": KEEP}),
    "Grok1ForCausalLM": (None, {"hidden_size": 256, "intermediate_size": 512}),
    "Grok1ModelForCausalLM": (None, {"hidden_size": 256, "intermediate_size": 512}),
    "KimiLinearForCausalLM": (
        "kimi_linear",
        {
            "moe_intermediate_size": 128,
            "num_experts": 8,
            "num_experts_per_token": 2,
            **_MLA,
            "linear_attn_config": _KDA,
        },
    ),
    "KimiK3LinearForCausalLM": (
        "kimi_linear",
        {
            "moe_intermediate_size": 128,
            "num_experts": 8,
            "num_experts_per_token": 2,
            **_MLA,
            "linear_attn_config": _KDA,
        },
    ),
    "MiMoV2ForCausalLM": (
        "mimo_v2_flash",
        {"hybrid_layer_pattern": [0, 1, 1, 1], "moe_layer_freq": [0, 1, 1, 1], "rope_parameters": _ROPE},
    ),
    "MiMoV2FlashForCausalLM": (
        "mimo_v2_flash",
        {"hybrid_layer_pattern": [0, 1, 1, 1], "moe_layer_freq": [0, 1, 1, 1], "rope_parameters": _ROPE},
    ),
    "MiniCPMSALAForCausalLM": (
        "minicpm_sala",
        {
            "mixer_types": ["lightning", "lightning", "lightning", "minicpm4"],
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
    ),
    "Step3p5ForCausalLM": (
        "step3p5",
        {"layer_types": ["full_attention"] * LAYERS, "yarn_only_types": [], "moe_layers_enum": "1,2,3"},
    ),
    "Step3VLForConditionalGeneration": ("step3_vl", {"text_config.moe_layers_enum": "1,2,3"}),
    "Contriever": ("bert", {}),
    "EmbeddingGemmaModel": ("gemma3_text", {}),
    "Gemma2ForSequenceClassification": ("gemma2", {"hidden_act": "gelu_pytorch_tanh", "num_labels": 2}),
    "Lfm2BidirectionalModel": ("lfm2", {"layer_types": ["conv", "conv", "full_attention", "conv"]}),
    "LlamaForClassification": ("llama", {"classification_out_size": 2}),
    "NanbeigeForSequenceClassification": ("nanbeige", {}),
    "TransformersEmbeddingModel": ("llama", {}),
    "TransformersMoEEmbeddingModel": ("qwen3_moe", {}),
    "TransformersMultiModalEmbeddingModel": ("qwen2_5_vl", {}),
    "TransformersMultiModalMoEEmbeddingModel": ("qwen3_vl_moe", {}),
    "TransformersForSequenceClassification": ("llama", {}),
    "TransformersMoEForSequenceClassification": ("qwen3_moe", {}),
    "TransformersMultiModalForSequenceClassification": ("qwen2_5_vl", {}),
    "TransformersMultiModalMoEForSequenceClassification": ("qwen3_vl_moe", {}),
    "InternVLChatModel": ("internvl_chat", {}),
    "PixtralForConditionalGeneration": ("mistral3", {}),
    "Phi3SmallForCausalLM": (
        None,
        {
            "mup_embedding_multiplier": 1.0,
            "mup_attn_multiplier": 1.0,
            "mup_use_scaling": True,
            "mup_width_multiplier": 1.0,
            "gegelu_limit": 20.0,
            "dense_attention_every_n_layers": 1,
            "rope_embedding_base": 10000,
            "rope_position_scale": 1.0,
            "hidden_act": "gegelu",
            "dummy_token_indices": [],
            "blocksparse_block_size": 64,
            "blocksparse_num_local_blocks": 1,
            "blocksparse_vert_stride": 1,
            "blocksparse_homo_head_pattern": False,
            "blocksparse_triton_kernel_block_size": 64,
        },
    ),
    "ZayaForCausalLM": ("zaya", {}),
}
"""Architecture: the model type whose configuration class it takes (None: a plain one), and fields by dotted name."""

NO_FORWARD: Final[dict[str, str]] = {}
"""Architecture: why its forward pass is not run on the meta device."""

_SUFFIX = re.compile(r"(ForCausalLM|ForConditionalGeneration|ChatModel|Model|LMHeadModel)+$")


def configuration(architecture: str) -> Any:
    """A configuration of ``architecture`` with few layers, as SGLang would load it from a checkpoint."""
    model_type, fields = CONFIGS.get(architecture, ("", {}))
    config = _base(architecture, model_type)
    _set(config, fields)
    _shrink(config, set(fields))
    config.architectures = [architecture]
    if config.model_type:
        config = _as_loaded(config)
        _set(config, fields)
    return config


def _set(config: Any, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        *path, last = name.split(".")
        if value is not KEEP:
            setattr(reduce(getattr, path, config), last, copy.deepcopy(value))


def _as_loaded(config: Any) -> Any:
    """The configuration as SGLang would load it from a checkpoint, where it adds and renames fields."""
    from sglang.srt.utils.hf_transformers import get_config

    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        return get_config(directory, trust_remote_code=False)


def _base(architecture: str, model_type: str | None) -> Any:
    import sglang.srt.configs
    from sglang.srt.utils.hf_transformers.common import _CONFIG_REGISTRY
    from transformers import PretrainedConfig
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type is None:
        return PretrainedConfig()
    if not model_type:
        for mapping in (vars(modeling_auto)[name] for name in dir(modeling_auto) if name.endswith("_MAPPING_NAMES")):
            for candidate, names in mapping.items():
                if architecture == names or (isinstance(names, (list, tuple)) and architecture in names):
                    model_type = model_type or candidate
    if model_type:
        return (_CONFIG_REGISTRY.get(model_type) or CONFIG_MAPPING[model_type])()
    wanted = _SUFFIX.sub("", architecture).lower() + "config"
    for name, value in vars(sglang.srt.configs).items():
        if name.lower() == wanted:
            return value()
    return PretrainedConfig()


def _shrink(config: Any, given: set[str], prefix: str = "") -> None:
    """Cut layers, in the configuration and those inside it, except where ``given`` says how many."""
    for name, value in list(vars(config).items()):
        if prefix + name in given:
            continue
        if name in _LAYER_COUNTS and isinstance(value, int):
            setattr(config, name, min(value, LAYERS))
        elif name in _LAYER_LISTS and isinstance(value, list):
            setattr(config, name, value[:LAYERS])
        elif "Config" in type(value).__name__:
            _shrink(value, given, f"{prefix}{name}.")


_LAYER_COUNTS = {
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "depth",
    "encoder_layers",
    "decoder_layers",
}
_LAYER_LISTS = {"layer_types", "layers_block_type", "mlp_layer_types"}
