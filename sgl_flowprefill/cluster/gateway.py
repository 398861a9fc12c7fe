"""smg's worker API: which servers a gateway routes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import requests

from sgl_flowprefill.cluster.commands import Role

TIMEOUT_S: Final = 10


@dataclass(frozen=True)
class Worker:
    """A server as its gateway knows it."""

    role: Role
    url: str
    bootstrap: int | None
    """Port of a prefill server's bootstrap service; None for a decode server."""


class Gateway:
    """A running gateway. Methods raise ``requests.RequestException`` while it cannot be asked."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """``api_key`` is the key of the gateway and of the servers that it is told about."""
        self.url = url
        self._api_key = api_key
        self._headers = bearer(api_key)

    def workers(self) -> list[dict[str, Any]]:
        """What ``GET /workers`` lists."""
        response = requests.get(f"{self.url}/workers", headers=self._headers, timeout=TIMEOUT_S)
        response.raise_for_status()
        found: list[dict[str, Any]] = response.json()["workers"]
        return found

    def ensure(self, worker: Worker) -> bool:
        """Whether requests go to ``worker``; if not, do the next step towards that. To be called until it is so, and
        from time to time after that: a gateway that was started again knows nobody."""
        listed = self._find(worker.url)
        if listed is None:
            spec = {"url": worker.url, "worker_type": worker.role, "bootstrap_port": worker.bootstrap}
            spec |= {"runtime_type": "sglang", "connection_mode": "http"}
            spec |= {"api_key": self._api_key} if self._api_key else {}
            response = requests.post(f"{self.url}/workers", json=spec, headers=self._headers, timeout=TIMEOUT_S)
            if response.status_code != requests.codes.conflict:  # a registration that is under way
                response.raise_for_status()
            return False
        if listed.get("bootstrap_port") != worker.bootstrap:  # what listened there before
            self._delete(listed)
            return False
        return bool(listed.get("is_healthy"))

    def remove(self, url: str) -> None:
        """Send no more requests to the server at ``url``."""
        listed = self._find(url)
        if listed is not None:
            self._delete(listed)

    def _find(self, url: str) -> dict[str, Any] | None:
        return next((worker for worker in self.workers() if worker["url"] == url), None)

    def _delete(self, listed: dict[str, Any]) -> None:
        response = requests.delete(f"{self.url}/workers/{listed['id']}", headers=self._headers, timeout=TIMEOUT_S)
        if response.status_code != requests.codes.not_found:  # gone since it was listed
            response.raise_for_status()


def bearer(api_key: str | None) -> dict[str, str]:
    """Headers of a request that shows ``api_key``."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}
