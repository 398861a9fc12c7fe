"""Waits until something at a cluster that starts is up, says what is seen meanwhile, and knows when to give up."""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

import requests

from sgl_flowprefill.cluster.asked import Asked
from sgl_flowprefill.cluster.base import ClusterConfig, ClusterError

POLL_S: Final = 0.2
PROGRESS_S: Final = 10.0
SHOWN_CHARACTERS: Final = 300
"""Longest part of an answer's body that a message repeats."""
NO_CONNECTION: Final = "no connection"
STARTING: Final = (NO_CONNECTION, "HTTP 503")
"""What comes instead of an answer while a server starts."""
UNAUTHORIZED: Final = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
FATAL: Final = (400, 404, 422, *UNAUTHORIZED)
"""Answers that waiting does not change."""


class Waiting:
    """The launcher's patience with what it has started. ``check`` raises ClusterError when something has ended that
    waiting is for; ``say`` gets a line now and then."""

    def __init__(self, config: ClusterConfig, check: Callable[[], None], say: Callable[[str], None]) -> None:
        self._config, self._check, self._say = config, check, say

    def until(self, what: str, done: Callable[[], bool], doing: Callable[[], str] | None = None) -> None:
        """Wait until ``done``, which raises ``requests.RequestException`` while it cannot tell. Raises ClusterError for
        an answer that waiting does not change, the end of a server, and after ``startup_timeout_s``. ``doing`` says
        what goes on meanwhile, which tells more than that there is no connection yet."""
        begin_s = said_s = time.monotonic()
        seen: str | None = None
        asked: Asked[bool] | None = None
        while True:
            asked = asked or Asked(done)
            if asked.is_answered:
                answered, asked = asked, None
                try:
                    if answered.answer():
                        return
                    seen = None
                except requests.RequestException as error:
                    seen = in_short(error)
                    if error.response is not None and error.response.status_code in FATAL:
                        raise ClusterError(f"{what}: {seen}; {self._remedy(error.response.status_code)}") from None
            self._check()
            now_s = time.monotonic()
            if now_s - begin_s > self._config.startup_timeout_s:
                raise ClusterError(f"{too_late(self._config, what, seen)}; the logs are in {self._config.log_dir}")
            if now_s - said_s >= PROGRESS_S:
                told = [doing() if doing else None, None if doing and seen in STARTING else seen]
                self._say(f"waiting for {what} ({'; '.join([f'{now_s - begin_s:.0f} s', *filter(None, told)])})")
                said_s = now_s
            time.sleep(POLL_S)

    def _remedy(self, status_code: int) -> str:
        remedy = "look for the reason in the logs"
        if status_code in UNAUTHORIZED:
            remedy = "give each launch.py of the cluster the same --api-key, and SGLang and smg no other"
        return f"{remedy} (in {self._config.log_dir})"


def in_short(error: requests.RequestException) -> str:
    """What came back instead of an answer, in short."""
    if error.response is None:
        return NO_CONNECTION if isinstance(error, requests.ConnectionError) else type(error).__name__
    body = " ".join(error.response.text.split())
    return f"HTTP {error.response.status_code} {body[:SHOWN_CHARACTERS]}".rstrip()


def too_late(config: ClusterConfig, what: str, seen: str | None) -> str:
    """The sentence about ``what`` has not come up in time, with what was ``seen`` last instead of an answer."""
    late = f"{what} did not come up within {config.startup_timeout_s:g} s (--startup-timeout-s)"
    return f"{late}: {seen}" if seen else late
