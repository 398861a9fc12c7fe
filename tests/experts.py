"""To which experts tokens go: as SGLang's recorder counts them, and as transformers routes them.

A mixture of experts with random weights is served by engines that count. What each forward pass computed is noted where
it is run; transformers computes each sequence alone, and says to which experts its tokens go.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from tests.engine import FIRST_START_S, Engine, PrefillEngine
from tests.families import FAMILIES, write_checkpoint
from tests.reference import Comparison, Reference
from tests.unified_engine import StockEngine, UnifiedEngine

FAMILY: Final = FAMILIES["Qwen3-MoE"]
RECORDS: Final = "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"
TIE: Final = 1e-4
"""Two experts whose logits are so close may be chosen by rounding. Logits are about 1."""


# ---- what was computed ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What a forward pass computed of a request: its last tokens."""

    rid: str
    tokens: tuple[int, ...]
    """Of the prompt, and of the answer so far."""
    begin: int
    """The first one that was computed."""


@dataclass(frozen=True)
class Pass:
    """A forward pass that has run to its end."""

    parts: tuple[Part, ...]
    reported: int | None
    """Tokens, once for each expert that they went to, of which SGLang's report of balance speaks, if there is one."""

    @property
    def computed_tokens(self) -> int:
        return sum(len(part.tokens) - part.begin for part in self.parts)


def watch(scheduler: Any, keep: Callable[[Pass], object]) -> None:
    """Call ``keep`` with each forward pass that ``scheduler`` runs from now on, when it has ended."""
    run_batch = scheduler.run_batch

    def noted(batch: Any, *arguments: Any, **options: Any) -> Any:
        parts = parts_of(batch)
        result = run_batch(batch, *arguments, **options)
        metrics = result.expert_distribution_metrics
        keep(Pass(parts, None if metrics is None else int(metrics.gpu_physical_count_sum)))
        return result

    scheduler.run_batch = noted


def parts_of(batch: Any) -> tuple[Part, ...]:
    sequences = [(req.rid, (*req.origin_input_ids, *req.output_ids)) for req in batch.reqs]
    if batch.forward_mode.is_decode():
        return tuple(Part(rid, tokens, len(tokens) - 1) for rid, tokens in sequences)
    found = []
    for (rid, tokens), cached, new in zip(sequences, batch.prefix_lens, batch.extend_lens, strict=True):
        assert cached + new == len(tokens), f"{rid}: {cached} cached and {new} new tokens of {len(tokens)}"
        found.append(Part(rid, tokens, cached))
    return tuple(found)


# ---- engines that count ---------------------------------------------------------------------------------------------


def checkpoint(folder: Path) -> str:
    """Random weights, made at the first call."""
    path = folder / "experts"
    if not path.exists():
        write_checkpoint(FAMILY, path)
    return str(path)


def environment(folder: Path) -> dict[str, str]:
    """Of a process that leaves its records in ``folder``. To compile an operator takes longer than all the rest."""
    return {RECORDS: str(folder / f"records-{os.getpid()}"), "TORCHDYNAMO_DISABLE": "1"}


def options(mode: str) -> dict[str, Any]:
    """Of a server that counts in ``mode``, and keeps all."""
    return {
        "skip_tokenizer_init": True,
        "expert_distribution_recorder_mode": mode,
        "expert_distribution_recorder_buffer_size": -1,
        "expert_balancedness_report_mode": "server_log",
    }


class Counting(Engine):
    """What counts; an engine of a kind has it as its first base."""

    def __init__(self, folder: Path, mode: str) -> None:
        os.environ.update(environment(folder))
        super().__init__(checkpoint(folder), first_start_s=FIRST_START_S, **options(mode))
        self.passes: list[Pass] = []
        watch(self.scheduler, self.passes.append)
        self.judge = Judge(checkpoint(folder))


class CountingPrefill(Counting, PrefillEngine):
    """A prefill server that counts. It has measured prefills just now."""

    def __init__(self, folder: Path, mode: str) -> None:
        os.environ["FLOWPREFILL_CACHE_DIR"] = str(folder / "cache")
        super().__init__(folder, mode)


class CountingUnified(Counting, UnifiedEngine):
    """A server that counts, and decodes."""


class CountingStock(Counting, StockEngine):
    """SGLang's own scheduler, which counts."""


def tell(engine: Counting, action: str) -> None:
    """What the HTTP server sends when it is called to begin, end or write a record."""
    from sglang.srt.managers.io_struct import ExpertDistributionReq, ExpertDistributionReqType

    engine.receive(ExpertDistributionReq(action=ExpertDistributionReqType[f"{action}_RECORD"]))


def dump(engine: Counting) -> torch.Tensor:
    """What has been counted since the last dump, [passes, layers, experts]."""
    tell(engine, "DUMP")
    [file] = Path(os.environ[RECORDS]).glob("*.pt")
    counts = read(file)
    file.unlink()
    return counts


def read(file: Path) -> torch.Tensor:
    """The counts in a record, [passes, layers, experts]."""
    record = torch.load(file, weights_only=False)
    if "logical_count" in record:
        return torch.as_tensor(record["logical_count"])
    counts = [one["global_physical_count"] for one in record["records"]]  # each expert is in its own place
    return torch.stack(counts) if counts else torch.zeros(0)


# ---- what transformers says -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Routes:
    """Where the tokens of a sequence go."""

    experts: torch.Tensor
    """[layers, tokens, experts of a token]."""
    ties: torch.Tensor
    """Whether rounding may decide, [layers, tokens]."""


class Judge:
    """A checkpoint in transformers, which says what is to be counted and answered."""

    def __init__(self, path: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        config = self.model.config
        self.layers, self.experts = int(config.num_hidden_layers), int(config.num_experts)
        self.chosen = int(config.num_experts_per_tok)
        self.comparison = Comparison(Reference(self.model))
        self.counts: Counter[str] = Counter()
        """What was compared."""
        self._logits: list[torch.Tensor] = []
        gates = [module for name, module in self.model.named_modules() if name.endswith("mlp.gate")]
        assert len(gates) == self.layers
        for gate in gates:
            gate.register_forward_pre_hook(self._note)

    def _note(self, gate: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._logits.append(torch.nn.functional.linear(inputs[0].flatten(0, -2), gate.weight))

    @torch.no_grad()
    def routes(self, tokens: Sequence[int]) -> Routes:
        self._logits.clear()
        self.model(torch.tensor([list(tokens)]), logits_to_keep=1)
        best = torch.stack(self._logits).topk(self.chosen + 1)
        gaps = best.values[..., self.chosen - 1] - best.values[..., self.chosen]
        return Routes(best.indices[..., : self.chosen], gaps < TIE)

    def _all_routes(self, sequences: Collection[tuple[int, ...]]) -> dict[tuple[int, ...], Routes]:
        """Those of all ``sequences``, of which many continue others: one that does says where the tokens of both go."""
        found: dict[tuple[int, ...], Routes] = {}
        for tokens in sorted(sequences, reverse=True):  # behind each comes what it continues
            last = next(reversed(found), ())
            found[tokens] = found[last] if last[: len(tokens)] == tokens else self.routes(tokens)
        return found

    def compare(self, found: torch.Tensor, passes: Sequence[Pass], ranks: int = 1) -> None:
        """Raise AssertionError unless ``found`` is what each of the ``passes`` computed, at so many ``ranks``."""
        assert len(found) == len(passes), f"{len(found)} passes are counted, and {len(passes)} have run to their ends"
        routes = self._all_routes({part.tokens for one in passes for part in one.parts})
        for number, (counts, one) in enumerate(zip(found, passes, strict=True)):
            expected = torch.zeros(self.layers, self.experts, dtype=torch.long)
            ties = 0
            for part in one.parts:
                computed = slice(part.begin, len(part.tokens))
                chosen = routes[part.tokens].experts[:, computed].flatten(1)
                expected.scatter_add_(1, chosen, torch.ones_like(chosen))
                ties += int(routes[part.tokens].ties[:, computed].sum())
            off = int((counts.long() - ranks * expected).abs().sum())
            name = f"pass {number} ({', '.join(part.rid for part in one.parts)})"
            assert off <= 2 * ranks * ties, f"{name} is not as transformers routes it: off by {off}, {ties} ties"
            routed = ranks * self.layers * one.computed_tokens * self.chosen
            assert one.reported in (None, routed), f"{one.reported} of {routed} are reported of {name}"
            self.counts["passes"] += 1
            self.counts["tokens"] += one.computed_tokens
            self.counts["ties"] += ties
            self.counts["decided by rounding"] += off > 0
            self.counts["reported"] += one.reported is not None

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {what}" for what, count in self.counts.items())
