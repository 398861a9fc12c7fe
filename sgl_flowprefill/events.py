"""The event log: every scheduling event as a JSON line, for figures that are computed and not asserted.

Times are seconds of ``time.monotonic()``, which all processes of one machine share and which goes on whatever the wall
clock is set to; ``received_s`` is what the HTTP server's process read there. Kinds of events and their fields:

=========  ==========================================================================================================
arrival    rid, prompt_tokens, ttft_slo_s, deadline_s, received_s (when the HTTP server had the request)
start      task, rids, new_tokens, cached_tokens, predicted_s
suspend    task, rids, checkpoint, for_rids, readable_s, stopped_s, blocking_s
resume     task, rids, checkpoint
complete   task, rids, checkpoint, forward_s (time it executed, without the time it was suspended), predicted_s (with
           margin, at its start), expected_s (without), profiled_s (without online correction either)
abort      rids, task (absent when no task was running them), checkpoint: somebody asked for it (a client that has
           gone, ``/abort_request``, a timeout)
fail       rids, task and checkpoint (absent when no task was running them), http_status, reason: refused at the door (a
           prompt that is too long), lost on the way (a bootstrap that failed, a decode server that has gone, a grammar
           that does not compile), or in a forward pass that raised
=========  ==========================================================================================================

Every arrival has one end: its rid is in one ``complete`` (its prefill has run), ``abort`` or ``fail``. What becomes of
a request after ``complete``, while its KV is sent, is not logged. SGLang's health checks have no arrival.

``blocking_s`` runs from ``readable_s``, when the scheduler process could first have read that the winning request is
there to be run, to the start or resumption of the winner (paper, section 5.3). Until ``stopped_s`` the task that is
suspended ran on; after it the hub read what had arrived, picked, and admitted the winner. Both are null for a switch
that no news led to: nobody was blocked.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)


class EventLog:
    """Appends events to a file, or drops them when there is none. Lines reach the file at ``flush`` at the latest. A
    file that cannot be written any more, such as on a full disk, is given up: serving goes on.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._file: IO[str] | None = None
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", buffering=1 << 16)  # noqa: SIM115 - lives as long as the process

    @property
    def is_written(self) -> bool:
        """Whether events go anywhere."""
        return self._file is not None

    def write(self, kind: str, t_s: float, **fields: Any) -> None:
        if self._file is not None:
            try:
                self._file.write(json.dumps({"event": kind, "t_s": round(t_s, 6), **fields}) + "\n")
            except OSError as error:
                self._give_up(self._file, error)

    def flush(self) -> None:
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                self._give_up(self._file, error)

    def _give_up(self, file: IO[str], error: OSError) -> None:
        self._file = None
        logger.error("No more events are written to %s: %s", file.name, error)
        with suppress(OSError):
            file.close()


def read_events(path: str | Path) -> Iterator[dict[str, Any]]:
    """Events of a log, in order. A last line that was cut off by a killed process is left out."""
    with open(path) as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)
