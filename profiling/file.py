"""The profile file: one parquet table of measured forward passes, and what they hold for.

=============  =====================================================================================================
column         meaning
=============  =====================================================================================================
new_tokens     list<int32>: tokens computed, one number per request of the batch
cached_tokens  list<int32>: cached prefix tokens of each request
time_s         float64: from the start of the forward pass to its sampled tokens
waited_s       float64: of that, how long the scheduler's thread was ready to run while another process had its CPU
attention_s    float64: of time_s, inside the attention modules; null in rows that were timed without looking inside
mlp_s          float64: of time_s, inside the MLP modules; null likewise
round          int32: the pass over the design to which the measurement belongs; references have a negative number each
at_s           float64: when it started, in seconds of profiling: a run that goes on with another's counts on from it
=============  =====================================================================================================

Rows with operator times are synchronised at each operator, so they say nothing about the time of the whole and are left
out when a model is fitted. A model is fitted to ``time_s - waited_s``, the time of the engine undisturbed, over the
machine's slowness at that moment, which the references tell (``ttft.speed``).

Rows that a server learns are measured otherwise (``PrefillTask.executed_s``), as deadlines see them: without the time
for which the prefill was suspended, but on CPUs with the waits for a CPU. Other processes slow all long prefills by
that and few short ones: the machine's factor takes what both have in common, and the model learns the rest, while it
lasts. On a GPU it is the time between CUDA events; ``time_s`` has a launch and a copy to the host besides, a
constant, which is learned likewise.

The schema's metadata has, under ``flowprefill``, a JSON object: ``format``, ``setting`` (model, device, dtype,
attention_backend, threads, sglang, tp_size, …), ``longest_tokens`` and ``complete``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict

from sgl_flowprefill.ttft.base import PrefillShape
from sgl_flowprefill.ttft.speed import MachineSpeed

FORMAT: Final = 1
METADATA_KEY: Final = b"flowprefill"


class ProfileError(ValueError):
    """A profile cannot be used; the message is one sentence with the way out."""


class Setting(BaseModel):
    """What a profile holds for: another model, device or thread count needs a profile of its own. Fields that were
    added later have defaults, which leave the names of cached profiles as they are.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    device: str
    dtype: str
    attention_backend: str
    threads: int
    sglang: str
    tp_size: int = 1
    attn_dp_size: int = 1
    """Ranks that have attention of their own: what is measured are their joint forward passes."""
    adapters: bool = False
    """Whether layers have adapters (LoRA) beside their weights, whose kernels run for the base model, too."""
    draft: str = ""
    """The draft model that a prefill runs, too."""
    quantization: str = "none"
    """How weights are stored and computed."""
    kv_cache_dtype: str = "auto"
    moe_runner_backend: str = "auto"
    """Which kernels experts have."""

    def difference(self, other: Setting) -> str:
        """The fields in which ``other`` differs, for a message: ``threads 1, not 4``."""
        pairs = zip(self.model_dump().items(), other.model_dump().values(), strict=True)
        return ", ".join(f"{name} {mine}, not {theirs}" for (name, mine), theirs in pairs if mine != theirs)


@dataclass(frozen=True)
class Row:
    """One measured forward pass."""

    shape: tuple[PrefillShape, ...]
    time_s: float
    waited_s: float
    round: int
    at_s: float
    attention_s: float | None = None
    mlp_s: float | None = None

    @property
    def undisturbed_s(self) -> float:
        """The time for which the engine had its CPU."""
        return self.time_s - self.waited_s


@dataclass
class Profile:
    """Measurements of one setting."""

    setting: Setting
    longest_tokens: int
    """Longest prompt of the design."""
    rows: list[Row] = field(default_factory=list)
    complete: bool = False
    """Whether the run came to its end; an interrupted one can be resumed."""

    def timings(self) -> tuple[list[tuple[PrefillShape, ...]], list[float]]:
        """Batches of the rows that time whole forward passes, and their undisturbed seconds at the machine's usual
        speed.
        """
        rows = self._whole()
        slowness = np.exp(self.speed().log_slowness([row.at_s + row.time_s / 2 for row in rows]))
        times_s = [row.undisturbed_s / slower for row, slower in zip(rows, slowness.tolist(), strict=True)]
        return [row.shape for row in rows], times_s

    def speed(self) -> MachineSpeed:
        """How fast the machine was while this was measured, by the references."""
        rows = [row for row in self._whole() if row.round < 0]
        return MachineSpeed.of(
            [row.shape for row in rows],
            [row.undisturbed_s for row in rows],
            [row.at_s + row.time_s / 2 for row in rows],
        )

    def untreated_timings(self) -> tuple[list[tuple[PrefillShape, ...]], list[float]]:
        """As ``timings``, with the machine's speed left in."""
        rows = self._whole()
        return [row.shape for row in rows], [row.undisturbed_s for row in rows]

    def _whole(self) -> list[Row]:
        return [row for row in self.rows if row.attention_s is None and row.time_s > row.waited_s]

    def operators(self) -> list[tuple[tuple[PrefillShape, ...], float, float, float]]:
        """Batches with their seconds in all, in attention and in MLP modules, of the rows that look inside."""
        return [
            (row.shape, row.time_s, row.attention_s, row.mlp_s)
            for row in self.rows
            if row.attention_s is not None and row.mlp_s is not None
        ]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which then takes the place of ``path``: a reader sees the old file or the new one, never a part.

    Raises OSError, and leaves nothing behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_profile(path: Path, profile: Profile) -> None:
    """Replace ``path`` with ``profile``. Raises OSError."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    meta = {
        "format": FORMAT,
        "setting": profile.setting.model_dump(),
        "longest_tokens": profile.longest_tokens,
        "complete": profile.complete,
    }
    schema = _schema().with_metadata({METADATA_KEY: json.dumps(meta).encode()})
    columns: dict[str, Sequence[Any]] = {
        "new_tokens": [[request.new_tokens for request in row.shape] for row in profile.rows],
        "cached_tokens": [[request.cached_tokens for request in row.shape] for row in profile.rows],
        **{name: [getattr(row, name) for row in profile.rows] for name in schema.names[2:]},
    }
    with replacing(path) as partial:
        pq.write_table(pa.table(columns, schema=schema), partial)


def read_profile(path: Path) -> Profile:
    """Read a profile. Raises ProfileError for a file that is not one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        meta = json.loads((table.schema.metadata or {})[METADATA_KEY])
        if meta["format"] != FORMAT:
            raise ProfileError(f"{path}: a profile of format {meta['format']}, this version reads {FORMAT}")
        setting = Setting.model_validate(meta["setting"])
        rows = [_row(values) for values in table.to_pylist()]
        if not all(map(_is_possible, rows)):
            raise ValueError("a forward pass of no shape or no time")
        return Profile(setting, int(meta["longest_tokens"]), rows, bool(meta["complete"]))
    except FileNotFoundError:
        raise ProfileError(f"{path}: no such file; `python launch.py profile` measures a profile") from None
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror or error}") from None
    except ProfileError:
        raise
    except (pa.ArrowException, KeyError, TypeError, ValueError):
        raise ProfileError(f"{path}: not a profile; `python launch.py profile` measures one") from None


def _row(values: dict[str, Any]) -> Row:
    lengths = zip(values.pop("new_tokens"), values.pop("cached_tokens"), strict=True)
    return Row(shape=tuple(PrefillShape(new, cached) for new, cached in lengths), **values)


def _is_possible(row: Row) -> bool:
    """Whether ``row`` can have been measured: a damaged file may well be one that can be read."""
    times_s = (row.time_s, row.waited_s, row.at_s, row.attention_s or 0.0, row.mlp_s or 0.0)
    shape = all(new > 0 and cached >= 0 for new, cached in row.shape)
    return bool(row.shape) and shape and row.time_s > 0 and all(0 <= value < math.inf for value in times_s)


def _schema() -> Any:
    import pyarrow as pa

    lengths = pa.list_(pa.int32())
    return pa.schema(
        [
            pa.field("new_tokens", lengths, nullable=False),
            pa.field("cached_tokens", lengths, nullable=False),
            pa.field("time_s", pa.float64(), nullable=False),
            pa.field("waited_s", pa.float64(), nullable=False),
            pa.field("attention_s", pa.float64()),
            pa.field("mlp_s", pa.float64()),
            pa.field("round", pa.int32(), nullable=False),
            pa.field("at_s", pa.float64(), nullable=False),
        ]
    )
