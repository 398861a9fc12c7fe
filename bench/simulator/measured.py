"""The simulator set up as the engine on this machine: its TTFT profile, and what a request spends outside forwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sgl_flowprefill import paths
from sgl_flowprefill.bench.simulator.cost import CostModel, from_profile
from sgl_flowprefill.bench.simulator.instance import Machine
from sgl_flowprefill.bench.simulator.step_cost import measured_steps
from sgl_flowprefill.bench.simulator.systems import Setup
from sgl_flowprefill.bench.workloads.trace import Trace
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.policy import Limits
from sgl_flowprefill.profiling import ProfileError, read_profile
from sgl_flowprefill.profiling.fitted import fit
from sgl_flowprefill.profiling.steps import Step
from sgl_flowprefill.ttft import PrefillShape
from sgl_flowprefill.ttft.budget import throughput_budget_tokens
from sgl_flowprefill.ttft.physics import non_negative


def best_profile(model: str) -> Path:
    """The profile in the cache of the model whose directory is called ``model``: the newest of those with most shapes.

    Raises ValueError.
    """
    found = []
    for path in (paths.cache_dir() / "profiles").glob("*.parquet"):
        try:
            profile = read_profile(path)
        except ProfileError:
            continue
        if profile.complete and profile.setting.model.startswith(model):
            found.append((len(set(profile.timings()[0])), path.stat().st_mtime, path))
    if not found:
        raise ValueError(
            f"no TTFT profile of {model} is in {paths.cache_dir() / 'profiles'}: run `python launch.py profile` or "
            "measure a FlowPrefill system first"
        )
    return max(found)[-1]


@dataclass(frozen=True)
class Engine:
    """What the simulator needs to know of an engine."""

    profile: str
    """File of its TTFT profile."""
    layers: int
    kv_tokens: int | None
    between_forwards_s: float
    """From the end of a forward to the start of the next while requests wait: what a profile does not see."""


def measured_setup(
    engine: Engine, solo_ttft_s: Mapping[int, float], options: FlowPrefillConfig, steps: Sequence[Step] = ()
) -> Setup:
    """The simulator as ``engine``, FlowPrefill run with ``options``.

    Isolated requests say how much slower than in its profile the engine is by now, and what a request takes beside its
    forward, which is charged before its start: two figures for all lengths, by least squares of relative errors.
    ``steps`` are decode steps, measured on a server that decodes as well.
    """
    cost = from_profile(Path(engine.profile), engine.layers)
    forward_s = np.array([cost.predict_s([PrefillShape(tokens)]) for tokens in solo_ttft_s])
    ttft_s = np.array(list(solo_ttft_s.values()))
    columns = np.column_stack([np.ones_like(ttft_s), forward_s])
    serving_s, slowness = non_negative(columns / ttft_s[:, None], 1 - engine.between_forwards_s / ttft_s)
    cost = cost.slower(float(slowness))
    cost = dataclasses.replace(cost, fixed_s=cost.fixed_s + engine.between_forwards_s, serving_s=float(serving_s))
    budget_tokens = options.max_batch_tokens
    if budget_tokens is None:
        model = fit(read_profile(Path(engine.profile))).model
        budget_tokens = throughput_budget_tokens(model)
    return Setup(
        Machine(cost, engine.kv_tokens or cost.kv_tokens),
        limits=Limits(max_suspended=options.max_suspended, max_batch_tokens=budget_tokens),
        max_starvation_s=options.max_starvation_s,
        max_operator_s=options.max_blocking_ms / 1e3,
        step_cost=measured_steps(steps) if steps else None,
    )


def saturation_rps(trace: Trace, cost: CostModel) -> float:
    """Rate at which the forwards of ``trace``, each request alone and with its cached prefix, fill one machine."""
    shapes = [PrefillShape(max(1, request.new_tokens), request.shared_tokens) for request in trace.requests]
    return len(shapes) / sum(cost.predict_s([shape]) for shape in shapes)
