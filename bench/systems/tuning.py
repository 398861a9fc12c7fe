"""Which setting of SGLang on one server is FlowPrefill's rival: the best one of the tuning that is recorded.

``goodput --unified --race`` over ``catalog.TUNING`` is such a tuning; its ``goodput.json`` becomes the record.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sgl_flowprefill.provenance import read_result

RECORD: Final = Path(__file__).parents[1] / "results" / "tuning-unified.json"
UNTUNED: Final = "unified-stock-spf-512-interval-1"
"""The rival while no tuning is recorded: what kept most of four settings at one rate (docs/benchmarks.md)."""


def rival(record: Path = RECORD) -> str:
    """The stock system with the highest rate at the lowest attainment of ``record``; UNTUNED without such a file.

    Raises ValueError for a file that names none.
    """
    if not record.exists():
        return UNTUNED
    best = read_result(record).figures.get("best_stock") or {}
    found = [best[share] for share in sorted(best, key=float) if best[share]]
    if not found:
        raise ValueError(
            f"{record} names no best stock system: put the goodput.json of `goodput --unified --race` there, or delete "
            "the file"
        )
    return str(found[0])
