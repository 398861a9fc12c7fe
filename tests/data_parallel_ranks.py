"""Real scheduler processes of a prefill server with data-parallel attention: see ``tests.ranks``."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import zmq

from sgl_flowprefill.cluster.free_ports import free_port
from sgl_flowprefill.model import EmbeddedModel, embedded_model_path
from tests.rank_notes import noting
from tests.ranks import Ranks, run_rank


def qwen3(model: EmbeddedModel) -> Path:
    """The embedded model as a Qwen3, whose attention SGLang can keep whole at each rank, as it cannot a Llama's. It is
    kept in the cache, as that is: what ranks measure of it at their first start, they find at the next.
    """
    llama = embedded_model_path(model)
    path = llama.with_name(f"{llama.name}-qwen3")
    if not path.is_dir():
        with tempfile.TemporaryDirectory(dir=path.parent) as partial:
            written = _write_qwen3(model, llama, Path(partial) / path.name)
            try:
                written.rename(path)
            except OSError:
                if not path.is_dir():  # else another process made it first
                    raise
    return path


def _write_qwen3(model: EmbeddedModel, llama: Path, path: Path) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(llama, path)
    weights = load_file(path / "model.safetensors")
    for layer in range(model.layers):
        for name in ("q_norm", "k_norm"):
            weights[f"model.layers.{layer}.self_attn.{name}.weight"] = torch.ones(model.head_dim)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    (path / "config.json").write_text(json.dumps(config))
    return path


class DataParallelRanks(Ranks):
    """Ranks with requests of their own, and all their attention."""

    def __init__(self, model_path: str, tp: int, *arguments: Any, **options: Any) -> None:
        super().__init__(model_path, tp, *arguments, **options)
        self.settings = {
            **type(self).settings,
            "dp_size": tp,
            "enable_dp_attention": True,
            "port": free_port("127.0.0.1", is_joint=True),
        }
        self._rank_of: dict[str, int] = {}

    def bind_inputs(self, args: Any, ports: Any, tp: int) -> list[Any]:
        """As SGLang's data-parallel controller does."""
        from sglang.srt.server_args import PortArgs

        numbers = [free_port("127.0.0.1") for _ in range(tp)]
        self._inputs = [self._bind(zmq.PUSH, f"tcp://127.0.0.1:{number}") for number in numbers]
        of_ranks = [PortArgs.init_new(args, rank, numbers) for rank in range(tp)]
        for own in of_ranks:
            own.nccl_port, own.instance_id = ports.nccl_port, ports.instance_id
        return of_ranks

    @staticmethod
    def run_rank(*work: Any) -> None:
        os.environ["FLOWPREFILL_MAX_BATCH_TOKENS"] = "1"  # a task for each request, and what takes no longer beside it
        rank = work[2]
        run_rank(*work, rank)

    def submit(
        self,
        rid: str,
        prompt: Sequence[int],
        ttft_slo_s: float | None = None,
        rank: int = 0,
        pattern: str | None = None,
    ) -> None:
        self._rank_of[rid] = rank
        super().submit(rid, prompt, ttft_slo_s, rank, pattern)

    def ranks_of(self, rid: str) -> Iterable[int]:
        return [self._rank_of[rid]]

    def assert_nothing_is_held(self, timeout_s: float) -> None:
        """Wait until all ranks have done their housekeeping twice more, with nothing to do: when they are woken they do
        it again, and would do it by themselves seconds later.
        """
        ranks, deadline_s = range(len(self.processes)), time.monotonic() + timeout_s
        before = [len(self.notes("rests", rank)) for rank in ranks]
        while any(len(self.notes("rests", rank)) < before[rank] + 2 for rank in ranks):
            assert time.monotonic() < deadline_s, "a rank has something to do though all is answered"
            self.abort("nobody")
            time.sleep(0.2)
        for rank in ranks:
            assert self.notes("rests", rank)[-1] == {"held": 0, "locked": 0, "rows": 0}


def note_rests(scheduler: Any, rank: int) -> None:
    """Write a line each time that SGLang does its housekeeping with nothing under way: the KV cache and request rows
    that somebody holds, and how many nodes of the radix tree are locked.
    """
    notes = noting("rests", rank)
    on_idle = scheduler.on_idle

    def noted_on_idle() -> None:
        on_idle()
        if scheduler.is_fully_idle():
            tree, allocator, rows = (
                scheduler.tree_cache,
                scheduler.token_to_kv_pool_allocator,
                scheduler.req_to_token_pool,
            )
            held = scheduler.max_total_num_tokens - allocator.available_size() - tree.evictable_size()
            line = {"held": held, "locked": tree.protected_size(), "rows": rows.size - rows.available_size()}
            notes.write(json.dumps(line) + "\n")

    scheduler.on_idle = noted_on_idle


def note_passes(scheduler: Any, rank: int) -> None:
    """Write a line for each joint pass that is done: its id, the requests of this rank and of all, and whether other
    ranks had tokens of theirs in it.
    """
    notes = noting("passes", rank)
    role = scheduler.role
    finish = role.finish

    def noted_finish(task: Any) -> None:
        line = {
            "task": task.id,
            "own": [req.rid for req in task.batch.reqs],
            "all": task.rids,
            "checkpoints": task.operators_passed,
            "points": task.points_passed,
        }
        notes.write(json.dumps(line) + "\n")
        finish(task)

    role.finish = noted_finish


def lack_kv_cache_now_and_then(scheduler: Any, rank: int) -> None:
    """Let SGLang's admission find no KV cache by chance, at each rank by itself."""
    rng = random.Random(rank)
    admit = scheduler.get_new_batch_prefill

    def admit_by_chance(running_batch: Any) -> Any:
        if rng.random() < 0.1:
            return SimpleNamespace(batch_to_run=None, running_batch=running_batch)
        return admit(running_batch)

    scheduler.get_new_batch_prefill = admit_by_chance
