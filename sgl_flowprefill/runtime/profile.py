"""The TTFT model of the running engine: from a profile that was measured for it, or from one that is measured now."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from sglang.srt.runtime_context import get_exec

from sgl_flowprefill import paths
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.profiling import Profile, ProfileError, Setting, read_profile, write_profile
from sgl_flowprefill.profiling.design import LEAST_LONGEST_TOKENS, SHORTEST_TOKENS
from sgl_flowprefill.profiling.fitted import fit
from sgl_flowprefill.profiling.learned import Learned, begin, learned_path, read_learned
from sgl_flowprefill.profiling.measure import SchedulerEngine
from sgl_flowprefill.profiling.ranks import Done, Leader, follow
from sgl_flowprefill.profiling.run import Engine, run_profile
from sgl_flowprefill.provenance import cpu_name
from sgl_flowprefill.runtime.draft_model import draft_runner, kept_hidden_states
from sgl_flowprefill.runtime.learner import FollowingTTFT, Learner, LearningTTFT, other_cpus
from sgl_flowprefill.runtime.memory import IN_PIECES, Activations, free_device_bytes
from sgl_flowprefill.runtime.scheduler_role import SchedulerRole
from sgl_flowprefill.ttft import AdaptiveTTFT, OperatorTimes, PrefillShape
from sgl_flowprefill.ttft.boosted import LEAST_SHAPES

logger = logging.getLogger(__name__)

FIRST_START_S: Final = 20.0
FIRST_START_ON_GPU_S: Final = 5.0
"""How long a server that finds no profile measures, at most."""
FIRST_START_ROUNDS: Final = 3
"""How often it measures each shape, at most."""


def load_or_measure(role: SchedulerRole, config: FlowPrefillConfig) -> tuple[AdaptiveTTFT, OperatorTimes | None]:
    """TTFT model of the engine behind ``role``, with online correction and the margin of ``config``, and the times
    of its operators where the profile has them.

    It comes from ``--flowprefill-profile``; else from the cache, where ``launch.py profile`` and earlier starts leave
    theirs; else it is measured now, and cached. What servers with this profile have learned since is in the cache, too.
    Raises SystemExit with one line when the named profile cannot be used.
    """
    setting = current_setting(role.scheduler)
    # Tile sizes depend on it, so it has to be the same on all tensor-parallel ranks.
    ranks = role.scheduler.tp_group
    found = ranks.broadcast_object(_find(setting, config) if ranks.rank_in_group == 0 else None)
    if isinstance(found, SystemExit):
        raise found
    profile = _measure(role, setting) if found is None else found
    known = begin(profile, fit(profile))
    ttft: AdaptiveTTFT
    if not config.learning:
        ttft = AdaptiveTTFT(config.slack_quantile, *known.fitted.parts())
    else:
        path = learned_path(profile_path(setting))
        is_first = ranks.rank_in_group == 0
        known = ranks.broadcast_object(_learned(path, known) if is_first else None)
        if is_first:
            ttft = LearningTTFT(known, config.slack_quantile, Learner(path, other_cpus()), ranks.broadcast_object)
        else:
            ttft = FollowingTTFT(known, config.slack_quantile, ranks.broadcast_object)
    return ttft, OperatorTimes.fit(profile.operators())


def profile_path(setting: Setting) -> Path:
    """Where ``launch.py profile`` leaves the profile of ``setting``, and a server finds it."""
    digest = hashlib.sha256(setting.model_dump_json(exclude_defaults=True).encode()).hexdigest()[:16]
    return paths.cache_dir() / "profiles" / f"{digest}.parquet"


def current_setting(scheduler: Any) -> Setting:
    """Setting of the engine inside ``scheduler``."""
    runner = scheduler.tp_worker.model_runner
    device = torch.cuda.get_device_name() if runner.device == "cuda" else cpu_name()
    draft = draft_runner(scheduler)
    return Setting(
        model=_name(runner.model_config),
        device=device,
        dtype=str(runner.dtype),
        attention_backend=str(runner.prefill_attention_backend_str),
        threads=torch.get_num_threads(),
        sglang=version("sglang"),
        tp_size=scheduler.tp_size,
        attn_dp_size=scheduler.tp_size if scheduler.attn_dp_enabled else 1,
        adapters=bool(scheduler.enable_lora),
        draft="" if draft is None else _name(draft.model_config),
        quantization=runner.model_config.quantization or "none",
        kv_cache_dtype=str(runner.kv_cache_dtype_str),
        moe_runner_backend=str(get_exec().moe.moe_runner_backend),
    )


def _name(model_config: Any) -> str:
    """What tells a model from others of another shape."""
    config = json.dumps(model_config.hf_config.to_dict(), sort_keys=True, default=str)
    return f"{Path(model_config.model_path).name}-{hashlib.sha256(config.encode()).hexdigest()[:8]}"


def _find(setting: Setting, config: FlowPrefillConfig) -> Profile | SystemExit | None:
    """The profile that is named or cached, if a model can be fitted to it; why the named one cannot be used."""
    path = profile_path(setting) if config.profile is None else Path(config.profile)
    if config.profile is None and not os.path.exists(path):  # nor in a folder that cannot be entered
        return None
    try:
        profile = read_profile(path)
        if profile.setting != setting:
            raise ProfileError(
                f"{path}: measured for another server ({profile.setting.difference(setting)}). "
                "Leave the option out, or run `python launch.py profile` with this server's options."
            )
        if not profile.complete:
            raise ProfileError(
                f"{path}: its run was interrupted; `python launch.py profile` with the same options resumes it"
            )
        if len(set(profile.timings()[0])) < LEAST_SHAPES:
            raise ProfileError(f"{path}: it has too few shapes for a model; `python launch.py profile` measures more")
        return profile
    except ProfileError as error:
        if config.profile is not None:
            return SystemExit(f"--flowprefill-profile {error}")
        logger.warning("FlowPrefill does not use %s", error)
        return None


def _learned(path: Path, known: Learned) -> Learned:
    """What has been learned since ``known`` was; itself if nothing has, or if that cannot be used."""
    if not os.path.exists(path):
        return known
    try:
        learned = read_learned(path)
    except ProfileError as error:
        logger.warning("FlowPrefill begins to learn anew: %s", error)
        return known
    if not learned.began_as(known):
        logger.info("FlowPrefill begins to learn anew: %s began with other times than the profile tells now", path)
        return known
    logger.info("FlowPrefill goes on with what it learned from %d tasks", learned.history.tasks)
    return learned


def _measure(role: SchedulerRole, setting: Setting) -> Profile:
    """A profile measured now, by all ranks together, and kept for the next start."""
    ranks = role.scheduler.tp_group
    most_tokens = most_whole_tokens(role.scheduler)
    if ranks.world_size > 1:
        most_tokens = min(ranks.all_gather_object(most_tokens))
    engine = SchedulerEngine(role, most_tokens)
    if ranks.rank_in_group > 0:
        return follow(engine, ranks.broadcast_object)
    leader: Engine = engine if ranks.world_size == 1 else Leader(engine, ranks.broadcast_object)
    budget_s = FIRST_START_S
    if role.scheduler.device == "cuda":
        budget_s = FIRST_START_ON_GPU_S
        compile_kernels(leader)
    logger.info("FlowPrefill measures prefill times for up to %g s", budget_s)
    profile = run_profile(leader, setting, None, budget_s, most_rounds=FIRST_START_ROUNDS)
    logger.info("FlowPrefill measured %d prefills of up to %d tokens", len(profile.rows), profile.longest_tokens)
    if ranks.world_size > 1:
        ranks.broadcast_object(Done(profile))
    with kept_for_the_next_start("the profile"):
        write_profile(profile_path(setting), profile)
    return profile


def compile_kernels(engine: Engine) -> None:
    """Run a prompt, one with a cached prefix, and both in a batch: the first forward passes of a server on a GPU may
    have to compile their kernels, for longer than it measures.
    """
    tokens = min(LEAST_LONGEST_TOKENS, engine.limit_tokens)
    alone, with_prefix = PrefillShape(tokens), PrefillShape(tokens - tokens // 2, tokens // 2)
    engine.cache_prefix(tokens)
    for shape in ((alone,), (with_prefix,), (alone, with_prefix)):
        engine.time(shape)


def most_whole_tokens(scheduler: Any) -> int:
    """Tokens of the longest prompt for which the device has memory while operators run whole, as before the first
    profile: what is kept free for prompts is for tiles.
    """
    if scheduler.device != "cuda":
        return sys.maxsize
    runner = scheduler.tp_worker.model_runner
    gathered, shared = (scheduler.tp_size, 1) if scheduler.attn_dp_enabled else (1, scheduler.tp_size)
    kept = kept_hidden_states(scheduler)
    whole = Activations.of(runner.model_config, runner.dtype.itemsize, None, kept, gathered, shared)
    return max(SHORTEST_TOKENS, int((1 - IN_PIECES) * free_device_bytes()) // whole.running_bytes(1))


@contextmanager
def kept_for_the_next_start(what: str) -> Iterator[None]:
    """Where ``what`` cannot be written, say so and go on: the next start measures again."""
    try:
        yield
    except OSError as error:
        logger.warning("FlowPrefill cannot keep %s for the next start: %s", what, error)
