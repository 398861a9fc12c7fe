"""smg's worker API: which servers a gateway routes to."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Literal

import requests

from sgl_flowprefill.cluster.asked import Asked
from sgl_flowprefill.cluster.commands import Role

TIMEOUT_S: Final = 10


@dataclass(frozen=True)
class Worker:
    """A server as its gateway knows it."""

    role: Role
    url: str
    bootstrap: int | None
    """Port of a prefill server's bootstrap service; None for other servers."""

    @property
    def worker_type(self) -> Literal["prefill", "decode", "regular"]:
        """smg's name of the role."""
        return "regular" if self.role == "unified" else self.role


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
            spec = {"url": worker.url, "worker_type": worker.worker_type, "bootstrap_port": worker.bootstrap}
            spec |= {"runtime_type": "sglang", "connection_mode": "http"}
            spec |= {"api_key": self._api_key} if self._api_key else {}
            response = requests.post(f"{self.url}/workers", json=spec, headers=self._headers, timeout=TIMEOUT_S)
            if response.status_code != requests.codes.conflict:  # a registration that is under way
                response.raise_for_status()
            return False
        if listed.get("bootstrap_port") != worker.bootstrap:  # what listened there before
            self._delete(listed)
            return False
        if not listed.get("is_healthy"):
            return False
        if worker.role == "unified":  # a gateway of prefill and decode servers lists it, too, and is not ready
            requests.get(f"{self.url}/readiness", headers=self._headers, timeout=TIMEOUT_S).raise_for_status()
        return True

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


class Routing:
    """The way of a gateway that starts to where it routes to the servers at ``urls``, whoever else has joined it."""

    def __init__(self, gateway: Gateway, urls: Collection[str]) -> None:
        self._gateway, self._urls = gateway, set(urls)
        self._healthy: int | None = None
        """Servers of these that the gateway has found healthy; None before its first answer."""

    def is_complete(self) -> bool:
        """Whether requests go to all of them. Raises ``requests.RequestException`` while the gateway is silent."""
        healthy = {worker["url"] for worker in self._gateway.workers() if worker.get("is_healthy")}
        self._healthy = len(healthy & self._urls)
        return healthy >= self._urls

    def phase(self) -> str:
        """What the gateway does until then."""
        if self._healthy is None:
            return "starting"
        return f"it has found {self._healthy} of {len(self._urls)} servers healthy"


class Errands:
    """What is to be done at a gateway, one after the other. Nobody waits for it; what a gateway does not answer is
    dropped."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object]] = deque()
        self._under_way: Asked[object] | None = None

    @property
    def are_begun(self) -> bool:
        """Whether none waits for its turn."""
        return not self._waiting

    def add(self, errand: Callable[[], object]) -> None:
        self._waiting.append(errand)

    def go_on(self) -> None:
        """Begin the next errand, if none is under way."""
        if self._under_way is not None and self._under_way.is_answered:
            with suppress(requests.RequestException):
                self._under_way.answer()
            self._under_way = None
        if self._under_way is None and self._waiting:
            self._under_way = Asked(self._waiting.popleft())


def bearer(api_key: str | None) -> dict[str, str]:
    """Headers of a request that shows ``api_key``."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}
