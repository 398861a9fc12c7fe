"""Models whose modules keep something of a forward pass: these are refused, and SGLang has no others."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

pytest.importorskip("sglang")

import sglang

from sgl_flowprefill.config import FlowPrefillConfig, Granularity
from sgl_flowprefill.runtime.module_state import KEPT, check_modules
from sgl_flowprefill.runtime.setup import check_settings

MODELS = Path(sglang.__file__).parent / "srt" / "models"
BEFORE_PASSES = ("__init__", "load", "set_", "init_", "_init", "reset", "post_load")
"""Beginnings of names of methods that no forward pass calls, but once."""
DECIDED_ONCE = "derived from weights and kept"
NO_OPERATOR_BETWEEN = "no operator lies between its assignment and its use"
NOT_SERVED = "of a draft model, an encoder or a platform on which FlowPrefill suspends nothing there"
HARMLESS = {
    ("HYV3Attention", "use_hpc_ops_fp8_attn"): DECIDED_ONCE,
    ("DeepseekV4DecoderLayerBase", "_hc_attn_bf16_parts"): DECIDED_ONCE,
    ("DeepseekV4DecoderLayerBase", "_hc_attn_tf32_parts"): DECIDED_ONCE,
    ("DeepseekV4DecoderLayerBase", "_hc_ffn_bf16_parts"): DECIDED_ONCE,
    ("DeepseekV4DecoderLayerBase", "_hc_ffn_tf32_parts"): DECIDED_ONCE,
    ("Ernie4_5_VLMoeForConditionalGeneration", "visual_token_mask"): NO_OPERATOR_BETWEEN,
    ("KimiK3VisionTower", "cuda_graph_runner"): NOT_SERVED,
    ("CLIPVisionEmbeddings", "patch_embedding"): NOT_SERVED,
    ("MultiHeadedAttention", "attn"): NOT_SERVED,
    ("MiniCPMO", "audio_past_key_values"): NOT_SERVED,
    ("NonCudaDecoderMixin", "_next_layer"): NOT_SERVED,
    ("DSparkDraftMixin", "_stacked_ctx_kv_cache"): NOT_SERVED,
    ("DSparkMiniMaxDraftModel", "_mxfp8_ctx_kv_cache"): NOT_SERVED,
}
REFUSED = {
    ("GigaChat35AttentionMLA", "_gate_input"): "GigaChat35AttentionMLA",
    ("KimiK3MLAAttention", "_gate_hidden_states"): "KimiK3MLAAttention",
    ("KimiK3MLAAttention", "_gate_pending_stream"): "KimiK3MLAAttention",
    ("Qwen4ExpPLELayer", "_prefetch_state"): "Qwen4ExpPLELayer",
    ("Qwen4ExpLayerExtensionMixin", "_ple_batch"): "Qwen4ExpPLELayer",
    ("Qwen4ExpLayerExtensionMixin", "_ple_forward_batch"): "Qwen4ExpPLELayer",
    ("Qwen4ExpLayerExtensionMixin", "_hc_norms"): "Qwen4ExpPLELayer",
    ("Qwen4ExpVLModel", "last_hc_hidden_states"): "Qwen4ExpPLELayer",
}
"""Class and attribute: the class by which the model is refused."""


def kept(text: str) -> set[tuple[str, str]]:
    """Classes and their attributes that a forward pass may keep something in: one that ``forward`` assigns, or that is
    assigned and taken back."""
    found = set()
    for owner in ast.parse(text).body:
        if not isinstance(owner, ast.ClassDef):
            continue
        assigned: set[str] = set()
        taken_back: set[str] = set()
        for method in owner.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith(BEFORE_PASSES):
                for name, value in assignments(method):
                    if isinstance(value, ast.Constant):
                        taken_back |= {name} if value.value is None else set()
                        continue
                    assigned.add(name)
                    taken_back |= {name} if method.name == "forward" else set()
        found |= {(owner.name, name) for name in assigned & taken_back}
    return found


def assignments(method: ast.FunctionDef) -> Iterator[tuple[str, ast.expr]]:
    """Attributes of ``self`` that are assigned in a method, and what they get."""
    for node in ast.walk(method):
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        for target in targets:
            for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "self":
                    yield part.attr, value


def test_all_that_models_keep_of_a_forward_pass_is_known() -> None:
    found = {place for file in sorted(MODELS.glob("*.py")) for place in kept(file.read_text())}
    assert found == set(HARMLESS) | set(REFUSED)
    assert set(REFUSED.values()) == set(KEPT)


def test_what_is_handed_on_from_one_method_to_another_is_found() -> None:
    text = """
class Attention:
    def __init__(self):
        self.gate = self.norm = None

    def forward(self, x):
        self.gate = x

class Layer:
    def prepare(self, x):
        self.kept, other = x, 1
        self.count: int = 3

    def use(self):
        self.kept = self.count = None

    def fold(self):
        self.norm = self.weight + 1
"""
    assert kept(text) == {("Attention", "gate"), ("Layer", "kept")}


def model(name: str, **attributes: bool) -> nn.Module:
    """A model with a module of the class ``name``."""
    module = type(name, (nn.Module,), attributes)()
    return nn.Sequential(nn.Linear(1, 1), module)


@pytest.mark.parametrize("name", KEPT)
def test_such_a_model_is_refused_unless_its_prefills_run_whole(name: str) -> None:
    switch = KEPT[name].switch
    keeps = model(name, **({switch: True} if switch else {}))
    granularities: tuple[Granularity, ...] = ("operator", "layer")
    for granularity in granularities:
        with pytest.raises(SystemExit, match=r"Sequential cannot be suspended .* --flowprefill-granularity chunk"):
            check_modules(keeps, granularity)
    check_modules(keeps, "chunk")
    if switch:
        check_modules(model(name, **{switch: False}), "operator")


def test_a_model_that_keeps_which_backend_runs_is_refused_where_steps_have_another_than_prefills() -> None:
    keeps = model("DeepseekV2AttentionMLA", current_attention_backend=True)
    with pytest.raises(SystemExit, match=r"that differ \(fa3, flashmla\).* --attention-backend"):
        check_modules(keeps, "operator", ["fa3", "flashmla"])
    check_modules(keeps, "chunk", ["fa3", "flashmla"])
    check_modules(keeps, "operator", ["fa3", "fa3"])
    check_modules(keeps, "operator", ["fa3"])
    check_modules(model("LlamaAttention"), "operator", ["fa3", "flashmla"])


def test_these_models_keep_it() -> None:
    sources = {str(file.relative_to(MODELS)): file.read_text() for file in MODELS.rglob("*.py")}
    keeping = {name for name, text in sources.items() if "self.current_attention_backend = " in text}
    assert keeping == {"deepseek_v2.py", "dots3_common/modeling.py", "sarvam_moe.py"}


def test_others_are_not_refused() -> None:
    check_modules(model("LlamaAttention", gated_attention=True), "operator")


def test_steps_that_have_to_know_how_long_prompts_were_are_refused_with_the_backend_that_notes_it() -> None:
    """Of UnlimitedOCR with FlashAttention 3, each of whose backends keeps lengths of its own."""
    scheduler = SimpleNamespace(attn_dp_enabled=False, enable_priority_scheduling=False)

    def check(backend: str, is_aware: bool, decodes: bool) -> None:
        runner = SimpleNamespace(prefill_attention_backend_str=backend, prefill_aware_swa=is_aware)
        check_settings(scheduler, FlowPrefillConfig(), decodes, [runner])

    with pytest.raises(SystemExit, match=r"--attention-backend fa3 cannot work with this model on a server that"):
        check("fa3", True, True)
    check("fa3", False, True)
    check("flashinfer", True, True)
    check("fa3", True, False)


def test_each_backend_notes_for_itself_how_long_prompts_were() -> None:
    source = (MODELS.parent / "layers" / "attention" / "flashattention_backend.py").read_text()
    assert "self._pa_swa_prefill_lens = torch.zeros(" in source
    assert "self._pa_swa_max_prefill_len = max_pf" in source
