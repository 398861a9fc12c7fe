"""The TTFT model of the running engine: from a profile that was measured for it, or from a short one measured now."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import random
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch

from sgl_flowprefill import paths
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.profiling import Profile, ProfileError, Row, Setting, read_profile, write_profile
from sgl_flowprefill.profiling.fitted import fit
from sgl_flowprefill.profiling.measure import SchedulerEngine
from sgl_flowprefill.runtime.scheduler_role import SchedulerRole
from sgl_flowprefill.ttft import AdaptiveTTFT, OperatorTimes, PrefillShape

logger = logging.getLogger(__name__)

SHORT_LENGTHS_TOKENS: Final = (16, 64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
SHORT_REPEATS: Final = 3
INSIDE_LENGTHS_TOKENS: Final = (512, 2048, 8192)
"""Lengths at which the short profile looks inside a forward pass, for the times of operators: as many as it takes to
tell what attention costs a pair of tokens from what it costs a token."""
SEED: Final = 20260216


def load_or_measure(role: SchedulerRole, config: FlowPrefillConfig) -> tuple[AdaptiveTTFT, OperatorTimes | None]:
    """TTFT model of the engine behind ``role``, with online correction and the margin of ``config``, and the times
    of its operators where the profile has them.

    It comes from ``--flowprefill-profile``; else from what ``launch.py profile`` left in the cache; else from a short
    profile of single prompts, which is measured at the first start and cached. Raises SystemExit with one line when
    the named profile cannot be used.
    """
    setting = current_setting(role.scheduler)
    profile: Profile | None
    if config.profile is not None:
        try:
            profile = _matching(Path(config.profile), setting)
        except ProfileError as error:
            raise SystemExit(f"--flowprefill-profile {error}") from None
    else:
        profile = _cached(profile_path(setting), setting) or _cached(_short_path(setting), setting)
    # Tile sizes depend on it, so it has to be the same on all tensor-parallel ranks.
    ranks = role.scheduler.tp_group
    profile = ranks.broadcast_object(profile)
    if profile is None:
        profile = ranks.broadcast_object(_measure_short(role, setting, inside=config.granularity != "chunk"))
        if ranks.rank_in_group == 0:
            write_profile(_short_path(setting), profile)
    model, residuals = fit(profile)
    return AdaptiveTTFT(model, config.slack_quantile, residuals), OperatorTimes.fit(profile.operators())


def profile_path(setting: Setting) -> Path:
    """Where ``launch.py profile`` leaves the profile of ``setting``, and a server finds it."""
    digest = hashlib.sha256(setting.model_dump_json(exclude_defaults=True).encode()).hexdigest()[:16]
    return paths.cache_dir() / "profiles" / f"{digest}.parquet"


def current_setting(scheduler: Any) -> Setting:
    """Setting of the engine inside ``scheduler``."""
    runner = scheduler.tp_worker.model_runner
    device = torch.cuda.get_device_name() if runner.device == "cuda" else _cpu_name()
    config = json.dumps(runner.model_config.hf_config.to_dict(), sort_keys=True, default=str)
    return Setting(
        model=f"{Path(runner.model_config.model_path).name}-{hashlib.sha256(config.encode()).hexdigest()[:8]}",
        device=device,
        dtype=str(runner.dtype),
        attention_backend=str(runner.prefill_attention_backend_str),
        threads=torch.get_num_threads(),
        sglang=version("sglang"),
        tp_size=scheduler.tp_size,
    )


def _matching(path: Path, setting: Setting) -> Profile:
    """The profile at ``path``. Raises ProfileError when it is another setting's, or not complete."""
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
    return profile


def _cached(path: Path, setting: Setting) -> Profile | None:
    try:
        return _matching(path, setting) if path.exists() else None
    except ProfileError as error:
        logger.warning("FlowPrefill does not use %s", error)
        return None


def _short_path(setting: Setting) -> Path:
    path = profile_path(setting)
    return path.with_name(f"{path.stem}-short.parquet")


def _measure_short(role: SchedulerRole, setting: Setting, inside: bool) -> Profile:
    engine = SchedulerEngine(role)
    scheduler = role.scheduler
    limit = min(scheduler.model_config.context_len - 1, scheduler.max_total_num_tokens - 1, SHORT_LENGTHS_TOKENS[-1])
    lengths = sorted({min(length, limit) for length in SHORT_LENGTHS_TOKENS})
    logger.info("FlowPrefill measures prefill times of %d to %d tokens", lengths[0], lengths[-1])
    started_s = time.monotonic()
    order = [length for length in lengths for _ in range(SHORT_REPEATS)]
    random.Random(SEED).shuffle(order)
    engine.time((PrefillShape(lengths[len(lengths) // 2]),))  # warm up
    profile = Profile(setting, lengths[-1], complete=True)
    for length in order:
        at_s = time.monotonic() - started_s
        timing = engine.time((PrefillShape(length),))
        profile.rows.append(Row(timing.shape, timing.time_s, timing.waited_s, 1, at_s))
    for length in sorted({min(length, limit) for length in INSIDE_LENGTHS_TOKENS if inside}):
        at_s = time.monotonic() - started_s
        timing, attention_s, mlp_s = engine.time_operators((PrefillShape(length),))
        profile.rows.append(Row(timing.shape, timing.time_s, timing.waited_s, 0, at_s, attention_s, mlp_s))
    logger.info("FlowPrefill measured %d prefills in %.1f s", len(order), time.monotonic() - started_s)
    return profile


def _cpu_name() -> str:
    try:
        lines: Sequence[str] = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
