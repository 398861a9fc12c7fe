"""``/health`` on SGLang's own handler: what the scheduler does decides, and not the wall clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.entrypoints import http_server
from sglang.srt.managers.tokenizer_manager import ServerStatus

from sgl_flowprefill.patches.health import answering_when_the_scheduler_does


class Manager:
    """The tokenizer manager of a server whose scheduler answers a probe after ``answers_after_s``, or never; the first
    ``ignores`` probes never.
    """

    is_generation = True
    gracefully_exit = False
    server_status = ServerStatus.Up

    def __init__(self, answers_after_s: float | None, ignores: int = 0) -> None:
        self.answers_after_s = answers_after_s
        self.ignores = ignores
        self.asked = 0
        self.last_receive_tstamp = http_server.time.time()
        self.rid_to_state: dict[str, Any] = {}

    async def generate_request(self, _request: Any, _http: Any) -> Any:
        self.asked += 1
        answered = asyncio.Event()

        def answer() -> None:
            self.last_receive_tstamp = http_server.time.time()
            answered.set()

        if self.answers_after_s is not None and self.asked > self.ignores:
            asyncio.get_running_loop().call_later(self.answers_after_s, answer)
        await answered.wait()
        yield {}


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The wall clock of SGLang's HTTP server, which tests step."""
    clock = SimpleNamespace(step_s=0.0)
    module = SimpleNamespace(**vars(time))
    module.time = lambda: time.time() + clock.step_s
    monkeypatch.setattr(http_server, "time", module)
    return clock


def ask(
    manager: Manager,
    monkeypatch: pytest.MonkeyPatch,
    timeout_s: float = 3.0,
    meanwhile: Callable[[], Awaitable[None]] | None = None,
) -> tuple[int, float]:
    """Status of ``/health``, and how long it took; afterwards the background has come to its end."""
    monkeypatch.setattr(http_server, "_global_state", SimpleNamespace(tokenizer_manager=manager))
    monkeypatch.setattr(http_server, "HEALTH_CHECK_TIMEOUT", timeout_s)
    monkeypatch.setattr(http_server, "get_disagg", lambda: SimpleNamespace(disaggregation_mode="null"))
    health = answering_when_the_scheduler_does(http_server.health_generate)

    async def one() -> tuple[int, float]:
        other = asyncio.ensure_future(meanwhile()) if meanwhile else None
        started_s = time.monotonic()
        response = await health(SimpleNamespace(url=SimpleNamespace(path="/health")))  # type: ignore[arg-type]
        took_s = time.monotonic() - started_s
        if other:
            await other
        while len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0.01)
        return response.status_code, took_s

    return asyncio.run(one())


def test_it_answers_when_the_scheduler_does(monkeypatch: pytest.MonkeyPatch) -> None:
    status, took_s = ask(Manager(answers_after_s=0.05), monkeypatch)
    assert status == 200
    assert took_s < 0.9, "that was SGLang's sleep of a second"


def test_a_scheduler_that_hangs_is_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager(None)
    status, took_s = ask(manager, monkeypatch, timeout_s=0.5)
    assert status == 503
    assert 0.4 < took_s < 2.0
    assert manager.server_status == ServerStatus.UnHealthy


def test_a_wall_clock_set_back_makes_no_hanging_scheduler_healthy(wall: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager(None)  # the last answer came before the step
    wall.step_s = -30.0
    status, _ = ask(manager, monkeypatch, timeout_s=1.5)
    assert status == 503
    assert manager.server_status == ServerStatus.UnHealthy


def test_a_wall_clock_set_forward_makes_no_busy_scheduler_unhealthy(wall: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def step() -> None:
        await asyncio.sleep(0.2)
        wall.step_s = 30.0

    for ignores in (0, 1):  # SGLang's handler gives its probe up, which may be aborted before it is answered
        wall.step_s = 0.0
        manager = Manager(1.5, ignores)
        status, took_s = ask(manager, monkeypatch, timeout_s=6.0, meanwhile=step)
        assert status == 200
        assert 1.4 < took_s < 5.0
        assert manager.asked == 2
        assert manager.server_status == ServerStatus.Up


def test_a_server_that_starts_or_ends_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    starting, ending = Manager(0.0), Manager(0.0)
    starting.server_status = ServerStatus.Starting
    ending.gracefully_exit = True
    for manager in (starting, ending):
        status, took_s = ask(manager, monkeypatch)
        assert status == 503
        assert took_s < 0.5
    assert starting.server_status == ServerStatus.Starting
