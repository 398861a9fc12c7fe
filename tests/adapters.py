"""Adapters (LoRA) made from seeds, engines that serve more of them than fit on the device, and what is to come of it.

The reference is transformers with one adapter merged into the model's weights, W + scaling B A, for each adapter.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from sgl_flowprefill.model import embedded_model_path
from sgl_flowprefill.model.embedded import EmbeddedModel
from tests.chaos import Rounds
from tests.engine import FIRST_START_S, Engine, PrefillEngine, generate_request
from tests.reference import TOKENS, Comparison, Reference
from tests.unified_asks import Answer, Ask
from tests.unified_engine import UnifiedEngine

MODEL: Final = EmbeddedModel(
    seed=7, layers=3, hidden_size=128, intermediate_size=256, heads=4, kv_heads=2, context_tokens=4096
)
SLOTS: Final = 3
"""Adapters that the device holds at once, the base model among them."""
ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL: Final = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Adapter:
    """An adapter in the format of peft."""

    name: str
    seed: int
    rank: int
    alpha: int
    targets: tuple[str, ...] = ALL

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def weights(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Module, A and B of each layer. Their product is about as large as the weights that it is added to."""
        generator = torch.Generator().manual_seed(self.seed)
        attention, kv = MODEL.heads * MODEL.head_dim, MODEL.kv_heads * MODEL.head_dim
        hidden, middle = MODEL.hidden_size, MODEL.intermediate_size
        shapes = {
            "self_attn.q_proj": (attention, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, attention),
            "mlp.gate_proj": (middle, hidden),
            "mlp.up_proj": (middle, hidden),
            "mlp.down_proj": (hidden, middle),
        }
        for layer in range(MODEL.layers):
            for module, (rows, columns) in shapes.items():
                if module.rpartition(".")[2] in self.targets:
                    a = torch.randn(self.rank, columns, generator=generator) / columns**0.5
                    b = torch.randn(rows, self.rank, generator=generator) / self.rank**0.5 / self.scaling
                    yield f"model.layers.{layer}.{module}", a, b

    def write(self, folder: Path) -> Path:
        from safetensors.torch import save_file

        path = folder / self.name
        path.mkdir(parents=True)
        tensors = {}
        for module, a, b in self.weights():
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
        save_file(tensors, path / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": list(self.targets),
            "bias": "none",
        }
        (path / "adapter_config.json").write_text(json.dumps(config))
        return path

    @torch.no_grad()
    def merge(self, model: Any) -> None:
        for module, a, b in self.weights():
            model.get_submodule(module).weight += self.scaling * (b @ a)


ADAPTERS: Final = (
    Adapter("a", 1, rank=8, alpha=16),
    Adapter("b", 2, rank=4, alpha=4),
    Adapter("c", 3, rank=8, alpha=4, targets=("q_proj", "v_proj")),
    Adapter("d", 4, rank=2, alpha=8, targets=ALL),
    Adapter("e", 5, rank=8, alpha=8, targets=ATTENTION),
)
NAMES: Final = (None, *(adapter.name for adapter in ADAPTERS))
"""None: the base model."""


def model_path() -> Path:
    return embedded_model_path(MODEL)


def write_adapters(folder: Path) -> list[str]:
    """Write all; as ``--lora-paths`` names them."""
    return [f"{adapter.name}={adapter.write(folder)}" for adapter in ADAPTERS]


def options(paths: Sequence[str]) -> dict[str, Any]:
    """Of a server. Its MLPs would run in short tiles."""
    from sglang.srt.lora.lora_registry import LoRARef

    os.environ["FLOWPREFILL_MAX_BLOCKING_MS"] = "0.3"
    named = [tuple(path.split("=", 1)) for path in paths]
    return {
        "enable_lora": True,
        "lora_paths": [LoRARef(LoRARef.deterministic_id(*pair), *pair, pinned=False) for pair in named],
        "max_loras_per_batch": SLOTS,
        "lora_backend": "torch_native",
        "max_total_tokens": 30_000,
    }


@dataclass
class Seen:
    """What an engine did with the slots."""

    counts: Counter[str] = field(default_factory=Counter)

    def watch(self, engine: Engine) -> None:
        hub = engine.hub
        manager, work = engine.scheduler.tp_worker.model_runner.lora_manager, hub.work
        fetch, fitting = manager.fetch_new_loras, work.fitting

        def noted_fetch(new_loras: Any, running_loras: Any = ()) -> None:
            slots = dict(manager.memory_pool.uid_to_buffer_id)
            fetch(new_loras, running_loras)
            loaded = new_loras - slots.keys()
            suspended = {req.lora_id for task in hub.work.tasks.live if task.points_passed for req in task.batch.reqs}
            self.counts["adapters loaded"] += len(loaded)
            self.counts["adapters loaded beside suspended prefills"] += len(loaded) if suspended else 0
            self.counts["adapters evicted"] += len(slots.keys() - manager.memory_pool.uid_to_buffer_id.keys())

        def noted_fitting(reqs: Any) -> Any:
            found = fitting(reqs)
            self.counts["times that requests waited for a slot"] += len(reqs) - len(found)
            return found

        manager.fetch_new_loras, work.fitting = noted_fetch, noted_fitting


class AdaptedPrefill(PrefillEngine):
    """A prefill server with adapters."""

    def __init__(self, paths: Sequence[str], **server_args: Any) -> None:
        super().__init__(str(model_path()), first_start_s=FIRST_START_S, **(options(paths) | server_args))
        self.asked: dict[str, str | None] = {}
        """The adapter that each request asks for."""
        self.lora_ids = ids_of(self)
        self.slots = Seen()
        self.slots.watch(self)

    def submit(
        self,
        rid: str,
        prompt: Sequence[int],
        ttft_slo_s: float | None = None,
        logprobs: bool = False,
        inputs_from: int | None = None,
    ) -> None:
        lora_id = self.lora_ids[self.asked.get(rid)]
        room = len(self.answers)
        self.receive(generate_request(rid, prompt, room, ttft_slo_s, logprobs, inputs_from, lora_id=lora_id))

    def assert_clean(self) -> None:
        super().assert_clean()
        assert_slots_are_free(self)


class AdaptedUnified(UnifiedEngine):
    """A server with adapters that decodes, too."""

    def __init__(self, paths: Sequence[str], **server_args: Any) -> None:
        super().__init__(str(model_path()), first_start_s=FIRST_START_S, **(options(paths) | server_args))
        self.slots = Seen()
        self.slots.watch(self)

    def assert_clean(self) -> None:
        super().assert_clean()
        assert not self.hub.role.kept_out
        assert_slots_are_free(self)


def ids_of(engine: Engine) -> dict[str | None, str | None]:
    """SGLang's id of each adapter, by name."""
    refs = engine.scheduler.tp_worker.model_runner.lora_manager.lora_refs
    return {None: None} | {ref.lora_name: ref.lora_id for ref in refs.values()}


def assert_slots_are_free(engine: Engine) -> None:
    """Nobody computes with an adapter, and each slot has the one that the pool says it has."""
    role = engine.hub.role
    pool = engine.scheduler.tp_worker.model_runner.lora_manager.memory_pool
    assert not list(role.computed())
    held = {uid: slot for slot, uid in enumerate(pool.buffer_id_to_uid) if uid is None or isinstance(uid, str)}
    assert held == pool.uid_to_buffer_id


def references() -> dict[str | None, Comparison]:
    """A comparison for each adapter, and for the base model."""
    from transformers import AutoModelForCausalLM

    found: dict[str | None, Comparison] = {None: Comparison(Reference(model_path()))}
    for adapter in ADAPTERS:
        model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
        adapter.merge(model)
        found[adapter.name] = Comparison(Reference(model))
    return found


def total(comparisons: Mapping[str | None, Comparison]) -> Counter[str]:
    """What was compared, of all adapters."""
    return sum((one.counts for one in comparisons.values()), Counter())


def assert_all_same(comparisons: Mapping[str | None, Comparison]) -> None:
    """Of all together something was compared; an adapter that chance never drew has nothing."""
    for name, comparison in comparisons.items():
        try:
            comparison.assert_nothing_differs()
        except AssertionError as error:
            raise AssertionError(f"adapter {name}: {error}") from error
    assert total(comparisons), "nothing was compared"


@dataclass
class AdaptedRounds(Rounds):
    """Rounds in which each request asks for an adapter by chance."""

    comparisons: dict[str | None, Comparison] = field(default_factory=references)

    def ask(self, rng: Any, asked: dict[str, Sequence[int]], **how: Any) -> None:
        assert isinstance(self.engine, AdaptedPrefill)
        self.engine.asked = {rid: rng.choice(NAMES) for rid in asked}
        super().ask(rng, asked, **how)

    def compare(self, rid: str, tokens: Sequence[int], left: Collection[str] = (), pattern: str | None = None) -> None:
        assert isinstance(self.engine, AdaptedPrefill)
        name = self.engine.asked[rid]
        self.seen[f"of adapter {name}"] += 1
        self.comparison = self.comparisons[name]
        super().compare(rid, tokens, left, pattern)


@dataclass
class MergedComparison:
    """Compares whole answers with those of transformers: their first tokens, and all of an answer that is shorter."""

    lora_ids: Mapping[str | None, str | None]
    comparisons: dict[str | None, Comparison] = field(default_factory=references)
    left: int = 0

    def compare(self, asked: Mapping[str, Ask], answers: Mapping[str, Answer], left: Collection[str] = ()) -> None:
        names = {lora_id: name for name, lora_id in self.lora_ids.items()}
        for rid, ask in asked.items():
            answer, comparison = answers.get(rid), self.comparisons[names[ask.lora_id]]
            if rid in left and (answer is None or answer.reason == "abort"):
                self.left += 1
                continue
            tokens = [] if answer is None else list(answer.tokens)
            logprobs = None if answer is None else list(answer.logprobs[:TOKENS])
            comparison.answer(rid, ask.prompt, tokens, logprobs, new_tokens=ask.max_new_tokens)

    @property
    def counts(self) -> Counter[str]:
        return total(self.comparisons)

    def assert_same(self) -> None:
        assert_all_same(self.comparisons)

    def __str__(self) -> str:
        compared = ", ".join(f"{count:,} {what}" for what, count in self.counts.items())
        return f"compared with transformers and merged weights: {compared}; {self.left} had left"
