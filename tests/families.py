"""Model families under preemption: a tiny random checkpoint of each, served by a scheduler in a process of its own.

``python -m tests.families NAME`` makes the checkpoint, and serves a mix that is suspended all the time. A prompt ends
with the first seven tokens of transformers' answer: their log probabilities and the token that follows are those of the
first eight tokens of the answer. It prints what happened as a line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sgl_flowprefill.policy import Limits
from tests.chaos import chaos
from tests.engine import FIRST_START_S, Answer, PrefillEngine
from tests.prompts import prompt
from tests.reference import TOKENS, Comparison, Reference

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
"""Shape of the checkpoints; a family adds what it has beside it."""

EXPERTS = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 128, "tie_word_embeddings": True}
LENGTHS = (40, 500, 900, 350, 1300, 310, 7, 700)
"""Tokens of the prompts of the mix; every second one shares a prefix that is cached."""


@dataclass(frozen=True)
class Family:
    """One architecture: its configuration in transformers."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    missing: str = ""
    """Part of the error with which SGLang ends, where the CPU cannot serve the family; docs/models.md says why."""


FAMILIES: dict[str, Family] = {
    "Llama": Family("llama"),
    "Qwen2": Family("qwen2"),
    "Qwen3": Family("qwen3"),
    "Qwen3-MoE": Family("qwen3_moe", EXPERTS),
    "Mistral": Family("mistral"),
    "Mixtral": Family("mixtral", EXPERTS),
    "Gemma-2": Family("gemma2", {**GEMMA, "hidden_act": "gelu_pytorch_tanh", "final_logit_softcapping": None}),
    "Gemma-3": Family("gemma3_text", GEMMA),
    "Phi-3": Family("phi3"),
    "Granite-MoE-SWA": Family("granitemoe_swa", {**EXPERTS, "sliding_window": 128}),
    "GPT-OSS": Family("gpt_oss", {**EXPERTS, "sliding_window": 128}, "GptOssForCausalLM requires one of"),
    "DeepSeek-V2-Lite": Family(
        "deepseek_v2",
        {
            "q_lora_rank": None,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "moe_layer_freq": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
            },
        },
    ),
    "LFM2": Family("lfm2", {"layer_types": ["conv", "conv", "full_attention", "conv"]}, "0 active drivers"),
}


@dataclass
class Outcome:
    """What preemption did to one family."""

    suspensions: int
    deepest: int
    """Most tasks that were started at a time."""
    checkpoints: int
    """In one forward pass."""
    compared: dict[str, int]
    """What was compared with transformers (``Comparison.counts``)."""
    largest: dict[str, float]
    """Largest differences."""
    differences: dict[str, list[str]]
    """What is not what transformers answers."""

    def check(self) -> None:
        """Assert that nothing but the order has changed."""
        assert self.suspensions >= 40
        assert self.deepest >= 3  # chance goes less deep where the machine is slow, and its tiles many
        assert not self.differences
        assert self.compared["answers"] == len(LENGTHS)
        assert self.compared["log probabilities of prompts"] == (TOKENS - 1) * len(LENGTHS)


def write_checkpoint(family: Family, directory: Path) -> Any:
    """Random weights of the family's shape, from a seed, as Hugging Face's model files; the model of transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family.model_type, **{**SIZES, **family.config})
    # Eager: transformers' fused attention leaves logit caps out.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name:  # SGLang keeps them in bfloat16 (models/granite.py, build_attention_sinks)
            parameter.data = parameter.data.bfloat16().float()
    model.save_pretrained(directory)
    return model


def preempt(name: str) -> Outcome:
    """Serve the family in this process, which must not have held a scheduler before."""
    family = FAMILIES[name]
    with tempfile.TemporaryDirectory() as directory:
        reference = Reference(write_checkpoint(family, Path(directory)), keep_kv=False)
        engine = PrefillEngine(directory, first_start_s=FIRST_START_S, skip_tokenizer_init=True)
    shared = prompt(99, 300)
    prompts = {f"r{i}": prompt(i, n, shared if i % 2 else None) for i, n in enumerate(LENGTHS)}
    _ask(engine, {"first": shared + prompt(5, 20)})
    scheduler = engine.scheduler
    scheduler.hub.work.policy.limits = Limits(max_suspended=100, max_batch_tokens=1)
    seen = chaos(engine, seed=1, switch_probability=0.9)
    ends = {rid: tokens + reference.expect(tokens).choices.tokens[: TOKENS - 1] for rid, tokens in prompts.items()}
    answers = _ask(engine, ends)
    engine.assert_clean()

    comparison = Comparison(reference)
    for rid, tokens in ends.items():
        answer = answers[rid]
        assert answer.token is not None
        assert answer.logprob is not None
        assert answer.input_logprobs is not None
        comparison.answer(rid, tokens, [answer.token], [answer.logprob])
        comparison.inputs(rid, tokens, answer.input_logprobs[1:])
    return Outcome(
        suspensions=seen["suspensions"],
        deepest=seen["deepest"],
        checkpoints=scheduler.hub.work.progress.checkpoints,
        compared=dict(comparison.counts),
        largest=dict(comparison.largest),
        differences=dict(comparison.differences),
    )


def preempt_in_subprocess(name: str, timeout_s: float = 300) -> Outcome:
    """``preempt`` in a process of its own. Raises AssertionError with its last lines if it fails."""
    command = [sys.executable, "-m", "tests.families", name]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}  # compiling a norm takes longer than all the rest
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment)
    assert done.returncode == 0, "\n".join([name, *done.stderr.splitlines()[-30:]])
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


def _ask(engine: PrefillEngine, prompts: dict[str, list[int]]) -> dict[str, Answer]:
    engine.answers.clear()
    for rid, tokens in prompts.items():
        engine.submit(rid, tokens, logprobs=True, inputs_from=len(tokens) - TOKENS)
    engine.run()
    return dict(engine.answers)


if __name__ == "__main__":
    print(json.dumps(asdict(preempt(sys.argv[1]))))
