"""How requests are judged. It is by itself, so that the command line has it without what judges."""

from __future__ import annotations

from typing import Literal

Judge = Literal["ttft", "gaps", "mean"]
"""How a request is judged: by its first token alone; also by its gaps, of which ``joint.LATE_SHARE`` may be late; or
also by the mean of its gaps."""
