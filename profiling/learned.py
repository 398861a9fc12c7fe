"""The file of what a server has learned: the model in use, the rows that it can be fitted to again, and its history.

A numpy archive beside the profile of the same setting, with the arrays of ``ttft`` and, as JSON in ``meta``, the
setting, the history and FORMAT. It is replaced as a whole, so a reader sees the old one or the new one.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from sgl_flowprefill.profiling.file import Profile, ProfileError, Setting, replacing
from sgl_flowprefill.profiling.fitted import shapes
from sgl_flowprefill.ttft.boosted import BoostedTTFT, Fitted
from sgl_flowprefill.ttft.kinds import KINDS
from sgl_flowprefill.ttft.physics import Physics
from sgl_flowprefill.ttft.reservoir import COLUMNS, NUMBER, SECONDS, SLOWNESS, rows_of_profile
from sgl_flowprefill.ttft.trees import Trees

FORMAT: Final = 2


class History(BaseModel):
    """What has become of a server's learning so far."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    tasks: int = 0
    """Completed tasks, and shapes that were explored, over all starts."""
    refused: int = 0
    """Measurements that were not believed."""
    refits: int = 0
    adopted: int = 0
    trained_through: int = 0
    """Number of the last task that the model in use was fitted to."""
    refit_at: int = 0
    """Task after which the last refit was asked for."""
    judged: int = 0
    """Tasks that judged it."""
    champion_error: float = 0.0
    challenger_error: float = 0.0
    """Mean absolute errors of the model in use and of the refitted one on these."""
    was_adopted: bool = False
    """Whether the refitted one took over."""
    slowness: float = Field(default=1.0, gt=0)
    """How many times slower than in the profile the machine was then."""


class Learned(BaseModel):
    """The content of the file."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    setting: Setting
    profile: str
    """Digest of the times of shapes as the profile told them when this began. If it tells others, all begins anew."""
    history: History
    fitted: Fitted
    """The model in use."""
    rows: Any
    """[rows, COLUMNS] as ``ttft.reservoir`` has them."""

    def began_as(self, begun: Learned) -> bool:
        """Whether who learned this knew ``begun`` first: the same profile of the same setting."""
        return self.setting == begun.setting and self.profile == begun.profile


def begin(profile: Profile, fitted: Fitted) -> Learned:
    """What a server knows that has run no task: its profile, and the model ``fitted`` to it."""
    matrix, seconds = shapes(*profile.timings())
    rows = rows_of_profile(matrix, seconds)
    digest = hashlib.sha256(rows.tobytes()).hexdigest()[:16]
    return Learned(setting=profile.setting, profile=digest, history=History(), fitted=fitted, rows=rows)


def learned_path(profile: Path) -> Path:
    """Where what has been learned is, beside the ``profile`` that it began with."""
    return profile.with_suffix(".learned.npz")


def write_learned(path: Path, learned: Learned) -> None:
    """Replace ``path``. Raises OSError."""
    model = learned.fitted.model
    meta = _Meta(format=FORMAT, setting=learned.setting, profile=learned.profile, history=learned.history)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(
            file,
            meta=np.array(meta.model_dump_json()),
            rows=learned.rows,
            weights=model.physics.weights,
            low=model.low,
            high=model.high,
            feature=model.trees.feature,
            threshold=model.trees.threshold,
            leaf=model.trees.leaf,
            residuals=learned.fitted.residuals,
            kinds=np.array(learned.fitted.kinds, dtype=np.int64),
            trust=np.array(learned.fitted.trust),
        )


def read_learned(path: Path) -> Learned:
    """Read what was learned. Raises ProfileError for a file that is damaged or of another version."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # numpy would read what it contains before its checksum
                raise zipfile.BadZipFile(damaged)
        with np.load(path, allow_pickle=False) as arrays:
            meta = _Meta.model_validate_json(str(arrays["meta"]))
            if meta.format != FORMAT:
                raise ProfileError(f"{path}: of format {meta.format}, this version reads {FORMAT}")
            trees = Trees(
                (arrays["leaf"].shape[1]).bit_length() - 1, arrays["feature"], arrays["threshold"], arrays["leaf"]
            )
            model = BoostedTTFT(Physics(arrays["weights"]), trees, arrays["low"], arrays["high"])
            kinds, residuals, rows = arrays["kinds"], arrays["residuals"], arrays["rows"]
            fitted = Fitted(model, residuals, kinds.tolist(), float(arrays["trust"]))
    except ProfileError:
        raise
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror or error}") from None
    except (ValueError, KeyError, IndexError, RuntimeError, zipfile.BadZipFile, EOFError, zlib.error):
        raise ProfileError(f"{path}: not what a server has learned") from None
    is_sound = (
        model.is_sound()
        and np.isfinite(residuals).all()
        and len(kinds) == len(residuals)
        and ((kinds >= 0) & (kinds < KINDS)).all()
        and rows.ndim == 2
        and rows.shape[1] == COLUMNS
        and np.isfinite(rows).all()
        and (rows[:, [SECONDS, SLOWNESS]] > 0).all()
        and (rows[:, NUMBER] <= meta.history.tasks).all()
    )
    if not is_sound:
        raise ProfileError(f"{path}: not what a server has learned")
    return Learned(setting=meta.setting, profile=meta.profile, history=meta.history, fitted=fitted, rows=rows)


class _Meta(BaseModel):
    """``meta`` in the file."""

    format: int
    setting: Setting
    profile: str
    history: History
