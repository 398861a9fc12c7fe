"""``python -m tests.pictures``: docs/live.png, docs/live-phone.png and docs/site.png made anew, in headless Chromium.

The first two are of a unified server with the embedded model, which has more to do than it can: the page as soon as
something runs, waits, is suspended and has missed its objective. The third is the front page of the site that ``make
docs`` has built.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event
from typing import Final, NamedTuple

import requests

from sgl_flowprefill.cluster import Cluster, ClusterConfig
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.live import PAGE
from sgl_flowprefill.live.routes import FILE
from tests.browser import Page, chromium
from tests.prompts import prompt

ROOT: Final = Path(__file__).parents[1]
SITE: Final = ROOT / "out/docs"
SHOWN: Final = ROOT / "docs/live.sha256"
"""The hash of the live page that the pictures show."""
DESK_PX: Final = 1280, 800
PHONE_PX: Final = 390, 844
SITE_PX: Final = 1280, 1085
TIMEOUT_S: Final = 300.0
WORTH_A_PICTURE: Final = """(() => {
  const count = selector => document.querySelectorAll(selector).length;
  return count('#waiting .row') >= 4 && count('#tasks > *') >= 2 && count('#misses > *') >= 4;
})()"""


class Kind(NamedTuple):
    """Requests of a class, asked for by so many clients, each of which waits for its answer."""

    name: str
    ttft_s: float
    tokens: tuple[int, int]
    clients: int
    output_tokens: int


KINDS: Final = (
    Kind("chat", 0.75, (100, 700), 6, 24),
    Kind("search", 6.0, (1500, 4000), 4, 8),
    Kind("file", 30.0, (5000, 8000), 2, 8),
)


@contextmanager
def busy(url: str) -> Iterator[None]:
    """A context in which clients of all kinds ask the server at ``url``."""
    over = Event()

    def ask(kind: Kind, client: int) -> None:
        rng, asked = random.Random(client), 0
        while not over.wait(rng.uniform(0.0, 1.0)):
            asked += 1
            sampling = {"max_new_tokens": kind.output_tokens, "ignore_eos": True}
            body = {
                "rid": f"{kind.name}-{client}{asked:03d}",
                "input_ids": prompt(100 * asked + client, rng.randint(*kind.tokens)),
                "sampling_params": sampling | {"custom_params": {"slo_class": kind.name}},
            }
            requests.post(f"{url}/generate", json=body, timeout=TIMEOUT_S).raise_for_status()

    kinds = [kind for kind in KINDS for _ in range(kind.clients)]
    with ThreadPoolExecutor(len(kinds)) as clients:
        asking = [clients.submit(ask, kind, client) for client, kind in enumerate(kinds, start=1)]
        try:
            yield
        finally:
            over.set()
    for one in asking:
        one.result()


def page_hash() -> str:
    """Of the live page as it is."""
    return hashlib.sha256(FILE.read_bytes()).hexdigest()


async def take_live(browser: Page, url: str) -> None:
    await browser.open(url + PAGE, *DESK_PX)
    for (width, height), dark, name in ((DESK_PX, False, "live"), (PHONE_PX, True, "live-phone")):
        await browser.show(width, height, dark)
        await browser.until(WORTH_A_PICTURE, TIMEOUT_S)
        await browser.screenshot(ROOT / f"docs/{name}.png")
    SHOWN.write_text(page_hash() + "\n")


@contextmanager
def site() -> Iterator[str]:
    """URL of the front page: its search needs a web server."""
    handler = partial(SimpleHTTPRequestHandler, directory=SITE)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, ThreadPoolExecutor(1) as thread:
        thread.submit(server.serve_forever, 0.02)
        try:
            yield f"http://127.0.0.1:{server.server_port}/index.html"
        finally:
            server.shutdown()


async def take_site(browser: Page, url: str) -> None:
    await browser.open(url, *SITE_PX)
    await asyncio.sleep(1)
    await browser.screenshot(ROOT / "docs/site.png")


async def take_all(url: str) -> None:
    async with chromium() as browser:
        await take_live(browser, url)
        with site() as front_page:
            await take_site(browser, front_page)
        assert browser.errors == []


def main() -> None:
    if not (SITE / "index.html").is_file():
        sys.exit(f"no {SITE}/index.html: run make docs first")
    with tempfile.TemporaryDirectory() as folder:
        policy = Path(folder, "policy.yaml")
        policy.write_text("classes:\n" + "".join(f"  {kind.name}: {{ttft_s: {kind.ttft_s}}}\n" for kind in KINDS))
        options = FlowPrefillConfig(slo_policy=str(policy))
        config = ClusterConfig(
            flowprefill=True, prefill=0, decode=0, unified=1, log_dir=Path(folder, "logs"), options=options
        )
        with Cluster(config, on_progress=print) as server, busy(server.url):
            asyncio.run(take_all(server.url))


if __name__ == "__main__":
    main()
