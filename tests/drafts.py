"""Draft models made from a seed, engines that serve a model with one, and what is to come of it.

The reference computes each prompt alone with transformers' Llama: the model, and a draft of one layer that is given the
model's hidden states and the prompt without its first token, but with the first token of the answer behind it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from sgl_flowprefill.model import embedded_model_path
from sgl_flowprefill.model.embedded import VOCAB_SIZE, EmbeddedModel
from tests.chaos import Rounds
from tests.engine import FIRST_START_S, Engine, PrefillEngine, generate_request
from tests.kv import kv_at, watch_sends
from tests.reference import KV_TOLERANCE, LOGPROB_TOLERANCE, Comparison, Kv, Reference

MODEL: Final = EmbeddedModel(
    seed=7, layers=4, hidden_size=128, intermediate_size=256, heads=4, kv_heads=2, context_tokens=4096
)
CAPTURED: Final = (0, 1, 2)
"""Layers whose outputs an EAGLE3 draft is given."""
HEAD_GAIN: Final = 4.0
STATE_TOLERANCE: Final = 2e-4
"""Hidden states are about 1."""


@dataclass(frozen=True)
class Draft:
    """A draft of ``model``, in the format of EAGLE's authors."""

    algorithm: str
    """EAGLE, EAGLE3, or NEXTN: one of EAGLE's that says of itself what a layer of the model's own checkpoint does."""
    model: EmbeddedModel = MODEL
    seed: int = 3

    @property
    def model_path(self) -> str:
        return str(embedded_model_path(self.model))

    @property
    def is_eagle3(self) -> bool:
        return self.algorithm == "EAGLE3"

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((Path(self.model_path) / "config.json").read_text())
        config |= {"architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1}
        if self.algorithm == "NEXTN":
            config["num_nextn_predict_layers"] = 1
        if self.is_eagle3:
            layers = {"eagle_aux_hidden_state_layer_ids": list(CAPTURED)}
            config |= {
                "architectures": ["LlamaForCausalLMEagle3"],
                "draft_vocab_size": VOCAB_SIZE,
                "eagle_config": layers,
            }
        return config

    def weights(self) -> dict[str, torch.Tensor]:
        model, hidden = self.model, self.model.hidden_size
        generator = torch.Generator().manual_seed(self.seed)

        def linear(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator) * gain / columns**0.5

        def scales() -> torch.Tensor:
            return 1 + 0.2 * torch.randn(hidden, generator=generator)

        attention, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
        layer, inputs = ("midlayer", 2 * hidden) if self.is_eagle3 else ("layers.0", hidden)
        weights = {
            f"{layer}.self_attn.q_proj.weight": linear(attention, inputs, 1.5),
            f"{layer}.self_attn.k_proj.weight": linear(kv, inputs, 1.5),
            f"{layer}.self_attn.v_proj.weight": linear(kv, inputs),
            f"{layer}.self_attn.o_proj.weight": linear(hidden, attention, 1.5),
            f"{layer}.post_attention_layernorm.weight": scales(),
            f"{layer}.mlp.gate_proj.weight": linear(model.intermediate_size, hidden),
            f"{layer}.mlp.up_proj.weight": linear(model.intermediate_size, hidden),
            f"{layer}.mlp.down_proj.weight": linear(hidden, model.intermediate_size, 1.5),
        }
        if self.is_eagle3:
            weights |= {
                "fc.weight": linear(hidden, len(CAPTURED) * hidden),
                f"{layer}.hidden_norm.weight": scales(),
                f"{layer}.input_layernorm.weight": scales(),
                "norm.weight": scales(),
                "lm_head.weight": linear(VOCAB_SIZE, hidden, HEAD_GAIN),
            }
        else:
            weights |= {"fc.weight": linear(hidden, 2 * hidden), "fc.bias": scales() - 1}
        return weights

    def write(self, folder: Path) -> Path:
        from safetensors.torch import save_file

        path = folder / self.algorithm
        path.mkdir(parents=True)
        save_file(self.weights(), path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(self.config))
        return path


@dataclass(frozen=True)
class Drafted:
    """What a draft's prefill leaves of a prompt for the decode server."""

    kv: Kv
    hidden_states: torch.Tensor
    """[hidden] of the last token."""
    token: int
    probability: float
    """The likeliest token behind the first of the answer, and how likely it is."""
    runner_up: int = -1
    gap: float = 1.0
    """By how much the log probability of the token exceeds that of its runner-up."""


class DraftReference:
    """A draft of a model in transformers, float32."""

    def __init__(self, draft: Draft, model: Any) -> None:
        from transformers import DynamicCache, LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

        self._model, self._draft, self._cache = model.eval(), draft, DynamicCache
        config = LlamaConfig.from_pretrained(draft.model_path, num_hidden_layers=1)
        self._layer = LlamaDecoderLayer(config, layer_idx=0).eval()
        attention, hidden = self._layer.self_attn, draft.model.hidden_size
        weights = draft.weights()
        if draft.is_eagle3:
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(attention, name, nn.Linear(2 * hidden, getattr(attention, name).out_features, bias=False))
        else:
            self._layer.input_layernorm = nn.Identity()
        own = {name.split(".", 2 if "layers.0" in name else 1)[-1]: value for name, value in weights.items()}
        self._layer.load_state_dict({name: own[name] for name in self._layer.state_dict()})
        self._fc = lambda states: nn.functional.linear(states, weights["fc.weight"], weights.get("fc.bias"))
        self._norms: dict[str, Any] = {}
        for name in ("midlayer.hidden_norm", "norm") if draft.is_eagle3 else ():
            self._norms[name] = LlamaRMSNorm(hidden, eps=config.rms_norm_eps)
            self._norms[name].load_state_dict({"weight": weights[f"{name}.weight"]})
        self._head = weights.get("lm_head.weight", model.lm_head.weight)
        self._kept: dict[tuple[int, ...], Drafted] = {}

    @torch.no_grad()
    def expect(self, prompt: Sequence[int]) -> Drafted:
        key = tuple(prompt)
        if key not in self._kept:
            self._kept[key] = self._compute(list(prompt))
        return self._kept[key]

    def _compute(self, prompt: list[int]) -> Drafted:
        model = self._model
        computed = model.model(torch.tensor([prompt]), output_hidden_states=True)
        states, last = computed.hidden_states, computed.last_hidden_state
        first = int(model.lm_head(last[0, -1]).argmax())
        embedded = model.model.embed_tokens(torch.tensor([[*prompt[1:], first]]))
        positions = torch.arange(len(prompt))[None]
        cache = self._cache()
        causal = torch.full((len(prompt), len(prompt)), float("-inf")).triu(1)[None, None]
        rotary = model.model.rotary_emb(embedded, positions)
        if self._draft.is_eagle3:
            residual = self._fc(torch.cat([states[layer + 1] for layer in CAPTURED], dim=-1))
            normed = self._norms["midlayer.hidden_norm"](residual)
            inputs = torch.cat([self._layer.input_layernorm(embedded), normed], dim=-1)
            attended, _ = self._layer.self_attn(
                hidden_states=inputs, position_embeddings=rotary, attention_mask=causal, past_key_values=cache
            )
            residual = residual + attended
            output = residual + self._layer.mlp(self._layer.post_attention_layernorm(residual))
            read = self._norms["norm"](output)
        else:
            inputs = self._fc(torch.cat([embedded, last], dim=-1))
            output = read = self._layer(
                inputs, attention_mask=causal, position_ids=positions, past_key_values=cache, position_embeddings=rotary
            )
        best = torch.log_softmax((read[0, -1] @ self._head.T).double(), dim=-1).topk(2)
        [layer] = cache.layers
        return Drafted(
            Kv(*(part[0].transpose(0, 1)[None] for part in (layer.keys, layer.values))),
            output[0, -1],
            int(best.indices[0]),
            float(best.values[0].exp()),
            int(best.indices[1]),
            float(best.values[0] - best.values[1]),
        )


class DraftComparison(Comparison):
    """Compares what is handed over for a draft, too."""

    def __init__(self, draft: Draft) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(draft.model_path, dtype=torch.float32)
        super().__init__(Reference(model))
        self.drafts = DraftReference(draft, model)

    def drafted(self, name: str, prompt: Sequence[int], got: Drafted) -> None:
        expected = self.drafts.expect(prompt)
        self.counts["drafts"] += 1
        where = f"{name} ({len(prompt)} tokens)"
        for part in ("keys", "values"):
            ours, theirs = getattr(got.kv, part), getattr(expected.kv, part)
            if ours.shape != theirs.shape:
                self.differences["draft KV"].append(f"{where}: {list(ours.shape)} instead of {list(theirs.shape)}")
                return
            self.counts["draft KV tensors"] += 1
            off = (ours.float() - theirs).abs().amax(dim=(0, 2, 3)).nan_to_num(nan=float("inf"))
            if self._differs("draft KV", float(off.max()), KV_TOLERANCE):
                first = int((off > KV_TOLERANCE).nonzero()[0])
                self.differences["draft KV"].append(f"{where}: {part} off by {float(off.max()):.3g} from token {first}")
        off_by = float((got.hidden_states - expected.hidden_states).abs().max())
        if self._differs("draft hidden states", off_by, STATE_TOLERANCE):
            self.differences["draft hidden states"].append(f"{where}: off by {off_by:.3g}")
        if got.token != expected.token and not (expected.gap < LOGPROB_TOLERANCE and got.token == expected.runner_up):
            self.differences["draft token"].append(f"{where}: {got.token} instead of {expected.token}")
        elif self._differs("draft probability", got.probability - expected.probability, LOGPROB_TOLERANCE):
            text = f"{where}: {got.probability:.5f} instead of {expected.probability:.5f}"
            self.differences["draft probability"].append(text)


# ---- engines ---------------------------------------------------------------------------------------------------------


def options(draft: Draft, path: str) -> dict[str, Any]:
    """Of a server. Operators run in short tiles, so that there are interruption points before a draft's attention."""
    os.environ["FLOWPREFILL_MAX_BLOCKING_MS"] = "0.03"
    return {
        "speculative_algorithm": draft.algorithm,
        "speculative_draft_model_path": path,
        "speculative_num_steps": 3,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 4,
    }


@dataclass
class Handed:
    """What a scheduler hands over for the draft of each request: its KV cache in parts, and the rest with the last."""

    scheduler: Any
    kv: dict[str, Kv] = field(default_factory=dict)
    draft_kv: dict[str, Kv] = field(default_factory=dict)
    rest: dict[str, tuple[torch.Tensor, int, float]] = field(default_factory=dict)

    def watch(self) -> None:
        watch_sends(self.scheduler, self._sent)

    def forget(self) -> None:
        for kept in (self.kv, self.draft_kv, self.rest):
            kept.clear()

    def drafted(self, rid: str) -> Drafted:
        return Drafted(self.draft_kv[rid], *self.rest[rid])

    def _sent(self, req: Any, slots: torch.Tensor) -> None:
        queue = self.scheduler.disagg_prefill_bootstrap_queue
        for kept, pool in ((self.kv, queue.token_to_kv_pool), (self.draft_kv, queue.draft_token_to_kv_pool)):
            part = kv_at(pool, slots)
            kept[req.rid] = kept[req.rid] + part if req.rid in kept else part
        buffers, row = queue.metadata_buffers, req.metadata_buffer_index
        self.rest[req.rid] = (
            buffers.output_hidden_states[row].clone(),
            int(buffers.output_topk_index[row, 0]),
            float(buffers.output_topk_p[row, 0]),
        )


class DraftedPrefill(PrefillEngine):
    """A prefill server with a draft model."""

    def __init__(self, draft: Draft, path: str, **server_args: Any) -> None:
        asked = {"max_total_tokens": 30_000, **options(draft, path), **server_args}
        super().__init__(draft.model_path, first_start_s=FIRST_START_S, **asked)
        self.comparison = DraftComparison(draft)
        self.seen: Counter[str] = Counter()
        self._watch_flags()
        self._watch_switches()

    @property
    def draft_runner(self) -> Any:
        return self.scheduler.draft_worker.draft_worker.draft_runner

    def _watch_flags(self) -> None:
        """Count operators that see the flags of the other model."""
        from sglang.srt.runtime_context import get_flags

        for model, in_draft in ((self.scheduler.tp_worker.model_runner.model, False), (self.draft_runner.model, True)):

            def check(*_: Any, in_draft: bool = in_draft) -> None:
                self.seen["flags that were looked at"] += 1
                self.seen["flags of the other model"] += get_flags().moe.speculative_context is not in_draft

            for name, module in model.named_modules():
                if name.endswith((".mlp", ".self_attn")):
                    module.register_forward_pre_hook(check)
                    module.register_forward_hook(check)

    def _watch_switches(self) -> None:
        """Count prefills that run while others are suspended in their drafts, at or behind the last target operator."""
        role, work = self.hub.role, self.hub.work
        switch_to = role.switch_to
        first = self.hub.work.progress.checkpoints - 2  # the draft has one layer

        def switched(task: Any) -> None:
            in_draft = [other for other in work.tasks.live if other is not task and other.operators_passed >= first]
            self.seen["runs beside prefills that are suspended at their drafts"] += bool(in_draft)
            switch_to(task)

        role.switch_to = switched


@dataclass
class DraftedRounds(Rounds):
    """Rounds of which the drafts are compared, too."""

    handed: Handed = field(init=False)

    def __post_init__(self) -> None:
        self.handed = Handed(self.engine.scheduler)
        self.handed.watch()

    def ask(self, rng: Any, asked: dict[str, Sequence[int]], **how: Any) -> None:
        self.handed.forget()
        super().ask(rng, asked, **how)

    def compare_kv(self, rid: str, tokens: Sequence[int]) -> None:
        comparison = self.comparison
        assert isinstance(comparison, DraftComparison)
        if rid not in self.handed.kv:
            comparison.differences["KV"].append(f"{rid}: none was handed over")
            return
        comparison.kv(rid, tokens, self.handed.kv[rid])
        comparison.drafted(rid, tokens, self.handed.drafted(rid))


class StockPrefill(Engine):
    """SGLang's own prefill scheduler with a draft model, batch by batch."""

    def __init__(self, draft: Draft, path: str) -> None:
        super().__init__(
            "tests.unified_engine:stock_scheduler",
            draft.model_path,
            disaggregation_mode="prefill",
            disaggregation_transfer_backend="nixl",
            **options(draft, path),
            max_total_tokens=30_000,
        )
        self.comparison = DraftComparison(draft)
        self.handed = Handed(self.scheduler)
        self.handed.watch()
        self.tokens: dict[str, int] = {}

    def record_outputs(self, reqs: Sequence[Any]) -> None:
        self.tokens |= {req.rid: req.output_ids[0] for req in reqs}

    @torch.no_grad()
    def turn(self) -> bool:
        scheduler = self.scheduler
        scheduler.waiting_queue.extend(scheduler.disagg_prefill_bootstrap_queue.pop_bootstrapped())
        plan = scheduler.get_next_disagg_prefill_batch_to_run(
            running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
        )
        scheduler.running_batch, batch = plan.running_batch, plan.batch_to_run
        if batch:
            scheduler.process_batch_result(batch, scheduler.run_batch(batch))
        scheduler.process_disagg_prefill_inflight_queue()
        scheduler.last_batch = batch
        return bool(batch)

    def submit(self, rid: str, prompt: Sequence[int], room: int) -> None:
        self.receive(generate_request(rid, prompt, room))
