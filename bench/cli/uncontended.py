"""What FlowPrefill costs when nobody waits: isolated prompts, alternately on FlowPrefill and on stock SGLang unchunked.

Both systems are up at once and take turns on the same CPUs (``serving.SideBySide``), in pairs, so that the machine's
drift cancels. A turn is a few prompts of one length, each sent when the one before is answered. The first meets servers
that had nothing to do: its TTFT is what an only user waits. The further ones show throughput without contention.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from sgl_flowprefill.bench.cli.options import Uncontended
from sgl_flowprefill.bench.systems.catalog import UNCHUNKED_FCFS, UNIFIED, find
from sgl_flowprefill.bench.systems.endpoint import Reached
from sgl_flowprefill.bench.systems.serving import Servers, serving
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.cluster import ClusterError
from sgl_flowprefill.provenance import result, write_result
from sgl_flowprefill.ttft.features import Array

PAIR: Final = ("flowprefill", UNCHUNKED_FCFS)
UNIFIED_PAIR: Final = (UNIFIED, f"{UNIFIED}-{UNCHUNKED_FCFS}")


def run(options: Uncontended, console: Console) -> int:
    """Measure and print; writes ``uncontended.json``. Raises ClusterError."""
    compared = UNIFIED_PAIR if options.unified else PAIR
    prompts = PromptBuilder(options.seed)
    turns: dict[str, dict[int, list[list[Isolated]]]] = {
        name: {tokens: [] for tokens in options.tokens} for name in compared
    }
    servers = Servers(options.model_path)
    with serving(servers, options.out, console.print, side_by_side=True) as serve:
        index = 0
        for tokens in options.tokens:
            for pair in range(options.pairs + 1):
                for name in compared if pair % 2 else reversed(compared):
                    with serve(find(name)) as served:
                        turn = []
                        for _ in range(options.per_turn):
                            turn.append(asyncio.run(_ask(served, prompts, tokens, index)))
                            index += 1
                    if pair:  # the first one warms up
                        turns[name][tokens].append(turn)
            console.print(f"{tokens} tokens: {options.pairs} pairs done")
    rows = [_row(tokens, *(turns[name][tokens] for name in compared)) for tokens in options.tokens]
    write_figures(options.out / "uncontended.json", rows, turns, servers.model)
    table = Table("prompt tokens", "", "FlowPrefill", "SGLang unchunked", "ratio (median of pairs)", "quartiles")
    for row in rows:
        for label, quantity, digits in (
            ("TTFT after a pause (s)", "ttft_s", 4),
            ("tokens per second", "tokens_per_s", 0),
        ):
            ratio = row[quantity]["ratio"]
            table.add_row(
                f"{row['tokens']:,}",
                label,
                f"{row[quantity]['flowprefill']:,.{digits}f}",
                f"{row[quantity]['sglang']:,.{digits}f}",
                f"{ratio['p50']:.3f}",
                f"{ratio['p25']:.3f} to {ratio['p75']:.3f}",
            )
    console.print(table)
    return 0


@dataclass(frozen=True)
class Isolated:
    """One prompt that met no other."""

    ttft_s: float
    took_s: float
    """Until its answer of two tokens was complete."""


def write_figures(path: Path, rows: Sequence[Mapping[str, Any]], turns: Mapping[str, Turns], model: str) -> None:
    """Write the figures of both systems, with every turn that they were computed from."""
    by_text = {name: {str(tokens): taken for tokens, taken in found.items()} for name, found in turns.items()}
    write_result(path, result("uncontended", {"rows": rows, "turns": by_text, "model": model}))


Turns = dict[int, list[list[Isolated]]]
"""Turns of a system by the length of their prompts in tokens."""


def _row(tokens: int, ours: list[list[Isolated]], stock: list[list[Isolated]]) -> dict[str, Any]:
    first_s = [np.array([turn[0].ttft_s for turn in turns]) for turns in (ours, stock)]
    speed = [
        np.array([tokens / np.mean([one.took_s for one in turn[1:]]) for turn in turns]) for turns in (ours, stock)
    ]
    return {"tokens": tokens, "ttft_s": _compared(*first_s), "tokens_per_s": _compared(*speed)}


def _compared(ours: Array, stock: Array) -> dict[str, Any]:
    """Medians of both, and quartiles of the ratios of pairs."""
    low, middle, high = (float(value) for value in np.percentile(ours / stock, [25, 50, 75]))
    ratio = {"p25": low, "p50": middle, "p75": high}
    return {"flowprefill": float(np.median(ours)), "sglang": float(np.median(stock)), "ratio": ratio}


async def _ask(served: Reached, prompts: PromptBuilder, tokens: int, index: int) -> Isolated:
    client = served.client
    async with client.session() as session:
        outcome = await client.stream(session, client.api.body(prompts.unique(tokens, index), 2, None))
    if outcome.error or outcome.first_token_s is None:
        raise ClusterError(f"an isolated request of {tokens} tokens to {client.url} failed: {outcome.error}")
    return Isolated(outcome.first_token_s - outcome.sent_s, outcome.end_s - outcome.sent_s)
