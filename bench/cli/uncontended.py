"""What FlowPrefill costs when nobody waits: isolated prompts, alternately on FlowPrefill and on stock SGLang unchunked.

Both systems are up at once and take turns on the same CPUs (``serving.SideBySide``), in pairs, so that the machine's
drift cancels. A turn is a few prompts of one length, each sent when the one before is answered. The first meets servers
that had nothing to do: its TTFT is what an only user waits. The further ones show throughput without contention.

Servers that prefill and decode are asked two things more: how many tokens a second come while answers stream and
nothing is prefilled, and how long they take for requests of a workload that arrive at once.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table

from sgl_flowprefill.bench.cli.options import Uncontended
from sgl_flowprefill.bench.loadgen.decode_rate import STREAMS
from sgl_flowprefill.bench.systems.catalog import UNCHUNKED_FCFS, UNIFIED, find
from sgl_flowprefill.bench.systems.endpoint import Reached
from sgl_flowprefill.bench.systems.serving import Servers, serving
from sgl_flowprefill.bench.systems.system import System
from sgl_flowprefill.bench.workloads.answers import Answers
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.bench.workloads.synthetic import workload
from sgl_flowprefill.bench.workloads.trace import Trace
from sgl_flowprefill.cluster import ClusterError
from sgl_flowprefill.provenance import result, write_result

T = TypeVar("T")

PAIR: Final = ("flowprefill", UNCHUNKED_FCFS)
UNIFIED_PAIR: Final = (UNIFIED, f"{UNIFIED}-{UNCHUNKED_FCFS}")
BURST_REQUESTS: Final = 48
"""Requests that arrive at once where it is measured how long a server takes for all of them."""
BURST_RPS: Final = 1.0
"""Answers are as long as decode steps carry at this rate ..."""
BURST_SHARE: Final = 0.25
"""... in this share of the time."""


def run(options: Uncontended, console: Console) -> int:
    """Measure and print; writes ``uncontended.json``. Raises ClusterError and CalibrationError."""
    compared = UNIFIED_PAIR if options.unified else PAIR
    prompts = PromptBuilder(options.seed)
    servers = Servers(options.model_path)
    rows: list[dict[str, Any]] = []
    turns: dict[str, Turns] = {name: {} for name in compared}
    streams: dict[str, Any] = {}
    with serving(servers, options.out, console.print, side_by_side=True) as serve:
        pairs = Pairs(serve, compared, options.pairs)
        indices = count()
        for tokens in options.tokens:
            taken = pairs.measure(partial(_prompts, prompts, tokens, options.per_turn, indices))
            for name in compared:
                turns[name][tokens] = taken[name]
            rows.append(_row(tokens, *taken.values()))
            console.print(f"{tokens} tokens: {options.pairs} pairs done")
        if options.unified:
            speeds = pairs.measure(lambda served: served.decode_tokens_per_s(prompts))
            streams["decode_tokens_per_s"] = _compared(*speeds.values()) | {"turns": speeds}
            console.print(f"{STREAMS} streams: {options.pairs} pairs done")
            burst = _burst(options, float(np.median([*chain(*speeds.values())])))
            took_s = pairs.measure(lambda served: _makespan_s(served, burst, prompts))
            streams["makespan_s"] = _compared(*took_s.values()) | {"turns": took_s}
            console.print(f"{BURST_REQUESTS} requests at once: {options.pairs} pairs done")
    write_figures(options.out / "uncontended.json", rows, turns, servers.model, streams)
    table = Table("", "", "FlowPrefill", "SGLang unchunked", "ratio (median of pairs)", "quartiles")
    for row in rows:
        asked = f"{row['tokens']:,} prompt tokens"
        _add(table, asked, "TTFT after a pause (s)", row["ttft_s"], 4)
        _add(table, asked, "tokens per second", row["tokens_per_s"], 0)
    if streams:
        _add(table, f"{STREAMS} streams", "tokens per second", streams["decode_tokens_per_s"], 0)
        _add(table, f"{BURST_REQUESTS} requests at once", "until all are answered (s)", streams["makespan_s"], 1)
    console.print(table)
    return 0


@dataclass(frozen=True)
class Isolated:
    """One prompt that met no other."""

    ttft_s: float
    took_s: float
    """Until its answer of two tokens was complete."""


Turns = dict[int, list[list[Isolated]]]
"""Turns of a system by the length of their prompts in tokens."""


@dataclass(frozen=True)
class Pairs:
    """Two systems that take turns, and who begins alternates."""

    serve: Callable[[System], AbstractContextManager[Reached]]
    compared: tuple[str, str]
    pairs: int

    def measure(self, turn: Callable[[Reached], T]) -> dict[str, list[T]]:
        """What ``turn`` found of each system, pair after pair; one more at first warms up."""
        found: dict[str, list[T]] = {name: [] for name in self.compared}
        for pair in range(self.pairs + 1):
            for name in self.compared if pair % 2 else reversed(self.compared):
                with self.serve(find(name)) as served:
                    one = turn(served)
                if pair:
                    found[name].append(one)
        return found


def write_figures(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    turns: Mapping[str, Turns],
    model: str,
    streams: Mapping[str, Any] | None = None,
) -> None:
    """Write the figures of both systems, with every turn of isolated prompts that they were computed from."""
    by_text = {name: {str(tokens): taken for tokens, taken in found.items()} for name, found in turns.items()}
    figures = {"rows": rows, "turns": by_text, "model": model} | ({"streams": streams} if streams else {})
    write_result(path, result("uncontended", figures))


def _add(table: Table, asked: str, label: str, quantity: Mapping[str, Any], digits: int) -> None:
    ours, stock, ratio = quantity["flowprefill"], quantity["sglang"], quantity["ratio"]
    quartiles = f"{ratio['p25']:.3f} to {ratio['p75']:.3f}"
    table.add_row(asked, label, f"{ours:,.{digits}f}", f"{stock:,.{digits}f}", f"{ratio['p50']:.3f}", quartiles)


def _row(tokens: int, ours: list[list[Isolated]], stock: list[list[Isolated]]) -> dict[str, Any]:
    first_s = [[turn[0].ttft_s for turn in turns] for turns in (ours, stock)]
    speed = [[tokens / float(np.mean([one.took_s for one in turn[1:]])) for turn in turns] for turns in (ours, stock)]
    return {"tokens": tokens, "ttft_s": _compared(*first_s), "tokens_per_s": _compared(*speed)}


def _compared(ours: Sequence[float], stock: Sequence[float]) -> dict[str, Any]:
    """Medians of both, and quartiles of the ratios of pairs."""
    low, middle, high = (float(value) for value in np.percentile(np.divide(ours, stock), [25, 50, 75]))
    ratio = {"p25": low, "p50": middle, "p75": high}
    return {"flowprefill": float(np.median(ours)), "sglang": float(np.median(stock)), "ratio": ratio}


def _burst(options: Uncontended, decode_tokens_per_s: float) -> Trace:
    """Requests of the qwen-like workload that arrive at once, with answers that such decode steps carry, and prompts no
    longer than the longest of ``options``, which the model has served by then.
    """
    trace = workload("qwen-like").draw(BURST_REQUESTS, options.seed).limited(max_prompt_tokens=max(options.tokens))
    trace = Answers.carried(trace, BURST_RPS, decode_tokens_per_s, BURST_SHARE).of(trace)
    return dataclasses.replace(
        trace, requests=[dataclasses.replace(request, arrival_s=0.0) for request in trace.requests]
    )


def _makespan_s(served: Reached, burst: Trace, prompts: PromptBuilder) -> float:
    """How long ``served`` takes for all of ``burst``, with nothing cached. Raises ClusterError if a request fails."""
    served.come_to_rest()
    run = served.replay(burst, prompts)
    failed = [one.error for one in run.results if one.error]
    if failed:
        raise ClusterError(f"{len(failed)} of {len(run.results)} requests to {served.client.url} failed: {failed[0]}")
    return max(one.e2e_s for one in run.results)


def _prompts(
    prompts: PromptBuilder, tokens: int, per_turn: int, indices: Iterator[int], served: Reached
) -> list[Isolated]:
    """A turn of isolated prompts, each sent when the one before is answered."""
    return [asyncio.run(ask(served, prompts, tokens, next(indices))) for _ in range(per_turn)]


async def ask(served: Reached, prompts: PromptBuilder, tokens: int, index: int) -> Isolated:
    """A prompt of so many tokens, the only one under way, and its answer of two. Raises ClusterError if it fails."""
    client = served.client
    async with client.session() as session:
        outcome = await client.stream(session, client.api.body(prompts.unique(tokens, index), 2, None))
    if outcome.error or outcome.first_token_s is None:
        raise ClusterError(f"an isolated request of {tokens} tokens to {client.url} failed: {outcome.error}")
    return Isolated(outcome.first_token_s - outcome.sent_s, outcome.end_s - outcome.sent_s)
