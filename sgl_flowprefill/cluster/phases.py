"""What a server does while it starts, by the lines that SGLang, FlowPrefill and this launcher write to its log."""

from __future__ import annotations

from pathlib import Path
from typing import Final

IMPORTING: Final = "launch.py: importing "
PHASES: Final = (
    (IMPORTING, "importing SGLang"),
    ("server_args=", "starting its processes"),
    ("Init parallel begin", "initialising the device"),
    ("Load weight begin", "loading weights"),
    ("Load weight end", "allocating the KV cache"),
    ("Memory pool end", "setting up the scheduler"),
    ("CUDA graph begin", "capturing CUDA graphs"),
    ("FlowPrefill measures prefill times", "measuring prefill times"),
    ("FlowPrefill measured", "setting up the scheduler"),
    ("Uvicorn running on", "warming up"),
    ("The server is fired up", "ready"),
)
"""Marker in the log, and what the server does from that line on."""
NO_PORT: Final = "cannot listen"
NO_PORT_MARKER: Final = "error while attempting to bind on address"
"""What uvicorn writes when it cannot listen. SGLang's processes stay."""


def importing(module: str) -> str:
    """First line of a server's log."""
    return f"{IMPORTING}{module}"


def phase(log: Path, start: int) -> str | None:
    """What the server does that writes to ``log``, by the lines from byte ``start`` on: one of PHASES, or NO_PORT; None
    when no line says.
    """
    try:
        with open(log, "rb") as file:
            file.seek(start)
            text = file.read().decode(errors="replace")
    except OSError:
        return None
    at, name = max((text.rfind(marker), name) for marker, name in (*PHASES, (NO_PORT_MARKER, NO_PORT)))
    return name if at >= 0 else None
