"""The short profile behind predictor v0: forward times by length, measured in the scheduler process and cached."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import random
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.sampling.sampling_params import SamplingParams

from sgl_flowprefill import paths
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.ttft import CubicTTFT

logger = logging.getLogger(__name__)

LENGTHS_TOKENS: Final = (16, 64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
REPEATS: Final = 3
SEED: Final = 20260216


class Setting(BaseModel):
    """What a profile holds for: another model, device or thread count needs a profile of its own."""

    model_config = ConfigDict(frozen=True)

    model: str
    device: str
    dtype: str
    attention_backend: str
    threads: int
    sglang: str


class Profile(BaseModel):
    """Measured forward times: ``times_s[i]`` is one measurement at ``tokens[i]`` new tokens, nothing cached."""

    setting: Setting
    tokens: list[int]
    times_s: list[float]

    def fit(self) -> CubicTTFT:
        return CubicTTFT.fit(self.tokens, self.times_s)


def load_or_measure(scheduler: Any, config: FlowPrefillConfig) -> CubicTTFT:
    """TTFT model of the running engine: from ``--flowprefill-profile``, from the cache, or measured now and cached.

    Raises SystemExit with one line when the named profile belongs to another setting.
    """
    setting = current_setting(scheduler)
    if config.profile is not None:
        profile = _read(Path(config.profile))
        if profile is None or profile.setting != setting:
            found = "nothing readable" if profile is None else profile.setting.model_dump()
            raise SystemExit(
                f"--flowprefill-profile {config.profile}: it holds {found}, this server is {setting.model_dump()}. "
                "Leave the option out to measure one."
            )
        return profile.fit()
    digest = hashlib.sha256(setting.model_dump_json().encode()).hexdigest()[:16]
    path = paths.cache_dir() / "profiles" / f"{digest}.json"
    profile = _read(path)
    if profile is None or profile.setting != setting:
        profile = _measure(scheduler, setting)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(profile.model_dump_json())
        partial.replace(path)
    return profile.fit()


def current_setting(scheduler: Any) -> Setting:
    """Setting of the engine inside ``scheduler``."""
    from importlib.metadata import version

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
    )


@torch.no_grad()
def _measure(scheduler: Any, setting: Setting) -> Profile:
    longest = min(
        scheduler.model_config.context_len - 1,
        scheduler.max_total_num_tokens - 1,
        LENGTHS_TOKENS[-1],
    )
    lengths = sorted({min(length, longest) for length in LENGTHS_TOKENS})
    logger.info("FlowPrefill measures prefill times of %d to %d tokens", lengths[0], lengths[-1])
    started_s = time.monotonic()
    order = [length for length in lengths for _ in range(REPEATS)]
    random.Random(SEED).shuffle(order)
    _forward_s(scheduler, lengths[len(lengths) // 2])  # warm up
    times_s = [_forward_s(scheduler, length) for length in order]
    logger.info("FlowPrefill measured %d prefills in %.1f s", len(order), time.monotonic() - started_s)
    return Profile(setting=setting, tokens=order, times_s=times_s)


def _forward_s(scheduler: Any, tokens: int) -> float:
    """Seconds of one whole forward pass, as serving runs it: admission, preparation, forward, sampled token."""
    vocabulary = scheduler.model_config.vocab_size
    prompt = array("q", torch.randint(0, vocabulary, (tokens,)).tolist())
    sampling = SamplingParams(temperature=0, max_new_tokens=1)
    sampling.normalize(None)
    req = Req("flowprefill-profile", "", prompt, sampling, vocab_size=vocabulary)
    started_s = time.monotonic()
    scheduler.waiting_queue = [req]
    batch = scheduler.get_new_batch_prefill(scheduler.running_batch).batch_to_run
    result = scheduler.run_batch(batch)
    result.next_token_ids.tolist()
    elapsed_s = time.monotonic() - started_s
    release_kv_cache(req, scheduler.tree_cache, checkpoint=False)
    return elapsed_s


def _read(path: Path) -> Profile | None:
    try:
        return Profile.model_validate_json(path.read_text())
    except (OSError, ValidationError):
        return None


def _cpu_name() -> str:
    try:
        lines: Sequence[str] = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
