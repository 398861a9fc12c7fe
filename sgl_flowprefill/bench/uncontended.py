"""What FlowPrefill costs when nobody waits: lone prompts, alternately on FlowPrefill and on stock SGLang unchunked.

Both systems are up at once and take turns on the same CPUs (``serving.SideBySide``), in pairs, so that the machine's
drift cancels.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console
from rich.table import Table

from sgl_flowprefill.bench.options import positive_int, prompt_builder
from sgl_flowprefill.bench.prompts import PromptBuilder
from sgl_flowprefill.bench.serving import Served, Servers, serving
from sgl_flowprefill.bench.systems import SYSTEMS, UNCHUNKED_FCFS
from sgl_flowprefill.cluster import ClusterError

OURS: Final = "flowprefill"
PAIR: Final = (OURS, UNCHUNKED_FCFS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench uncontended``."""
    parser.add_argument("--tokens", type=positive_int, nargs="+", default=[512, 2048, 8192, 16384], metavar="N",
                        help="prompt lengths (default %(default)s)")  # fmt: skip
    parser.add_argument("--pairs", type=positive_int, default=11, help="pairs of each length (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts (default 0)")
    parser.add_argument("--model-path", metavar="M", help="model to serve instead of the embedded one")
    parser.add_argument("--out", type=Path, default=Path("out/uncontended"), help="folder of results")


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure and print; writes ``uncontended.json``. Raises ClusterError."""
    prompts = prompt_builder(args)
    times_s: dict[str, dict[int, list[float]]] = {name: {tokens: [] for tokens in args.tokens} for name in PAIR}
    servers = Servers(args.model_path)
    with serving(servers, args.out, console.print, side_by_side=True) as serve:
        index = 0
        for tokens in args.tokens:
            for pair in range(args.pairs + 1):
                for name in PAIR if pair % 2 else reversed(PAIR):
                    with serve(SYSTEMS[name]) as served:
                        took_s = asyncio.run(_ttft_s(served, prompts, tokens, index))
                    if pair:  # the first one warms up
                        times_s[name][tokens].append(took_s)
                    index += 1
            console.print(f"{tokens} tokens: {args.pairs} pairs done")
    rows = [_row(tokens, *(times_s[name][tokens] for name in PAIR)) for tokens in args.tokens]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "uncontended.json").write_text(json.dumps({"rows": rows, "times_s": times_s}, indent=1))
    table = Table("prompt tokens", "FlowPrefill (s)", "SGLang unchunked (s)", "ratio (median of pairs)", "quartiles")
    for row in rows:
        table.add_row(
            str(row["tokens"]),
            f"{row['flowprefill_s']:.4f}",
            f"{row['sglang_s']:.4f}",
            f"{row['ratio']:.3f}",
            f"{row['ratio_p25']:.3f} to {row['ratio_p75']:.3f}",
        )
    console.print(table)
    return 0


def _row(tokens: int, ours_s: list[float], stock_s: list[float]) -> dict[str, float]:
    ratios = np.array(ours_s) / np.array(stock_s)
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return {
        "tokens": tokens,
        "flowprefill_s": float(np.median(ours_s)),
        "sglang_s": float(np.median(stock_s)),
        "ratio": float(middle),
        "ratio_p25": float(low),
        "ratio_p75": float(high),
    }


async def _ttft_s(served: Served, prompts: PromptBuilder, tokens: int, index: int) -> float:
    client = served.client
    async with client.session() as session:
        outcome = await client.stream(session, client.api.body(prompts.unique(tokens, index), 2, None))
    if outcome.error or outcome.first_token_s is None:
        raise ClusterError(f"a lone request of {tokens} tokens to {client.url} failed: {outcome.error}")
    return outcome.first_token_s - outcome.sent_s
