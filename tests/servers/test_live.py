"""Real servers, watched: what page and terminal show of them while they serve."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from sgl_flowprefill.cluster import Cluster
from sgl_flowprefill.cluster.cli import main
from sgl_flowprefill.cluster.live import page
from sgl_flowprefill.cluster.top_command import documents
from sgl_flowprefill.events import Arrival, decode_events
from sgl_flowprefill.live import EVENTS, PAGE, TIMELINE
from sgl_flowprefill.live.state import Document
from tests.browser import Page, chromium
from tests.prompts import prompt
from tests.reference import Comparison

LONG_TOKENS, SHORT_TOKENS, SHORT = 9000, 900, 8
HOPELESS_S = 0.001
"""An objective that nothing can meet."""


@contextmanager
def load(url: str, name: str, seed: int, comparison: Comparison) -> Iterator[list[Future[requests.Response]]]:
    """A context in which requests are answered: a long one, and behind it short ones of which every other is late
    whatever happens. Their ids begin with ``name``. The answers to the short ones are compared."""
    prompts = [prompt(seed + number, SHORT_TOKENS if number else LONG_TOKENS) for number in range(SHORT + 1)]

    def ask(number: int) -> requests.Response:
        slo_s = 120.0 if number % 2 == 0 else HOPELESS_S
        sampling = {"max_new_tokens": 4, "temperature": 0, "custom_params": {"ttft_slo": slo_s}}
        body = {"input_ids": prompts[number], "sampling_params": sampling, "return_logprob": True}
        return requests.post(f"{url}/generate", json=body | {"rid": f"{name}-{number}"}, timeout=300)

    with ThreadPoolExecutor(SHORT + 1) as clients:
        answers = [clients.submit(ask, number) for number in range(SHORT + 1)]
        yield answers
        responses = [answer.result(300) for answer in answers]
    assert [response.status_code for response in responses] == [200] * (SHORT + 1)
    for number in range(1, SHORT + 1):
        comparison.generated(f"{name}-{number}", prompts[number], responses[number].json()["meta_info"])
    comparison.assert_same_with_logprobs()


def watch(url: str, name: str, answers: list[Future[requests.Response]]) -> list[Document]:
    """What is told until all of ``answers`` are there and what became of them is told."""
    told = []
    for document in documents(url, None):
        told.append(document)
        late = [miss.rid for server in document.servers for miss in server.misses if miss.rid.startswith(name)]
        if len(late) == SHORT / 2 and not wait(answers, timeout=0).not_done:
            return told
    pytest.fail("the server has ended the connection")


def test_a_unified_server_shows_what_waits_and_why_requests_missed(
    unified_server: Cluster,
    comparison: Comparison,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with load(unified_server.url, "watched", 5000, comparison) as answers:
        told = watch(unified_server.url, "watched", answers)
    states = [server.state for document in told for server in document.servers if server.state is not None]
    assert any(task.rids[0].startswith("watched") and task.runs for state in states for task in state.tasks)
    standings = {one.rid: one.standing for state in states for one in state.waiting if one.rid.startswith("watched")}
    assert standings, "somebody waits behind the long prompt"
    late = {f"watched-{number}" for number in range(1, SHORT + 1, 2)}
    assert all((standing == "infeasible") == (rid in late) for rid, standing in standings.items())
    assert states[-1].decodes

    [server] = told[-1].servers
    misses = {miss.rid: miss.cause for miss in server.misses if miss.rid.startswith("watched")}
    assert set(misses) == late
    lines = requests.get(f"{unified_server.url}{EVENTS}?seconds=300", timeout=60).content
    assert late < {event.rid for event in decode_events(lines) if isinstance(event, Arrival)}

    monkeypatch.setenv("COLUMNS", "200")
    assert main(["top", "--url", unified_server.url, "--once"]) == 0
    shown = capsys.readouterr().out
    assert "watched-1" in shown
    assert misses["watched-1"] in shown


def test_the_page_of_a_cluster_shows_the_servers_behind_the_gateway(
    flowprefill_cluster: Cluster, comparison: Comparison, tmp_path: Path
) -> None:
    async def see(url: str) -> None:
        async with chromium() as browser:
            await browser.open(url, 1280, 800)
            await browser.until("document.getElementById('link').className === 'live'")
            with load(flowprefill_cluster.url, "behind", 5100, comparison):
                await browser.until("document.querySelector('#waiting .row .work') !== null")
                await seen(browser)
            await browser.until("document.getElementById('misses').innerText.includes('behind-1')")
            await browser.screenshot(tmp_path / "cluster.png")
            assert browser.errors == []

    async def seen(browser: Page) -> None:
        await browser.screenshot(tmp_path / "waiting.png")

    with page(flowprefill_cluster.prefilling_urls, "127.0.0.1", 0, None) as url:
        assert url.endswith(PAGE)
        asyncio.run(see(url))
        response = requests.get(url.removesuffix(PAGE) + TIMELINE, timeout=60)
        assert response.ok
        assert b"behind-1" in response.content
    print(tmp_path)
