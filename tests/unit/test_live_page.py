"""The live page in a browser, served by the real routes from a scheduler whose answers are made here."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sgl_flowprefill.live import PAGE
from tests.browser import chromium
from tests.watched import HOSTILE, Scheduler, served

ROWS = "document.querySelectorAll('#waiting .row').length"
BARS = "[...document.querySelectorAll('#waiting .row .work')].map(bar => bar.style.transform).join()"
GROUPS = "[...document.querySelectorAll('#waiting .group b')].map(one => one.innerText).join()"
HIDE = "Object.defineProperty(document, 'hidden', {{ value: {}, configurable: true }}); document.onvisibilitychange()"
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def test_rows_appear_and_bars_move_on_phones_and_desks_in_light_and_dark(tmp_path: Path) -> None:
    async def look(url: str) -> None:
        async with chromium() as page:
            await page.open(url + PAGE, 390, 844)
            await page.until(f"{ROWS} === 9")
            before = await page.value(BARS)
            await page.until(f"{BARS} !== {before!r}")
            shown = await page.value("document.body.innerText")
            for text in ("runs and 2 more", "× 1.07", "feasible", "chat", "search", "Misprediction", "and 3 more"):
                assert text in shown, shown
            assert HOSTILE in shown, "a request's id is shown as it is"
            assert await page.value("document.querySelectorAll('img').length") == 0, "and is no part of the page"
            assert await page.value(GROUPS) == "In time, all of them,Too late"
            grounds = set()
            for width, height in ((390, 844), (1280, 800)):
                for dark in (False, True):
                    await page.show(width, height, dark)
                    assert await page.value(TOO_WIDE) <= 0, f"{width} wide, the page is wider"
                    grounds.add(await page.value("getComputedStyle(document.body).backgroundColor"))
                    await asyncio.sleep(0.5)
                    await page.screenshot(tmp_path / f"live-{width}-{'dark' if dark else 'light'}.png")
            assert len(grounds) == 2
            assert page.errors == []

    with served(Scheduler()) as url:
        asyncio.run(look(url))
    print(tmp_path)


def test_a_page_that_nobody_sees_asks_for_nothing_and_one_with_a_key_asks_for_it() -> None:
    scheduler = Scheduler()

    async def look(url: str) -> None:
        async with chromium() as page:
            await page.open(url + PAGE, 1280, 800)
            await page.until("!document.getElementById('ask').hidden")
            assert scheduler.asked == 0
            await page.value("document.getElementById('key').value = 'secret'")
            await page.value("document.querySelector('#ask button').click()")
            await page.until(f"{ROWS} === 9")
            await page.value(HIDE.format("true"))
            await asyncio.sleep(3)  # the server notices a connection that has ended when it sends
            asked = scheduler.asked
            await asyncio.sleep(2)
            assert scheduler.asked == asked
            await page.value(HIDE.format("false"))
            await page.until("document.getElementById('link').className === 'live'")
            assert scheduler.asked > asked
            refused = [error for error in page.errors if "401" not in error]
            assert refused == []

    with served(scheduler, "secret") as url:
        asyncio.run(look(url))


LOST = "{ name: 'another', state: null, age_s: 0, attainment: [], misses: [], error: 'it cannot be reached' }"
SHOW_LOST = f"show({{ servers: [{LOST}], window_s: 300, bin_s: 15 }})"
SILENT = """window.asked = 0; window.fetch = (url, options) => {
  window.asked += 1;
  const nothing = new ReadableStream({
    start: stream => options.signal.addEventListener('abort', () => stream.error(options.signal.reason)),
  });
  return Promise.resolve(new Response(nothing));
}; null"""
NO_TIMELINE = """const fetched = window.fetch; window.fetch = (url, options) =>
  url.includes('timeline') ? Promise.resolve(new Response('', { status: 500 })) : fetched(url, options); null"""


def test_of_a_server_that_says_nothing_of_itself_nothing_of_another_is_shown() -> None:
    async def look(url: str) -> None:
        async with chromium() as page:
            await page.open(url + PAGE, 1280, 800)
            await page.until(f"{ROWS} === 9")
            await page.value(HIDE.format("true"))  # it hears no more
            await page.value(SHOW_LOST)
            shown = await page.value("document.body.innerText")
            assert "it cannot be reached" in shown
            for text in ("kept-1", "runs and 2 more", "feasible", "requests wait", "A block is a prefill"):
                assert text not in shown, shown
            assert page.errors == []

    with served(Scheduler()) as url:
        asyncio.run(look(url))


def test_a_server_that_sends_nothing_for_long_is_asked_again_and_what_is_wrong_is_said_until_it_is_not() -> None:
    async def look(url: str) -> None:
        async with chromium() as page:
            await page.open(url + PAGE, 1280, 800)
            await page.until(f"{ROWS} === 9")
            await page.value(NO_TIMELINE)
            await page.value("document.getElementById('trace').click()")
            words = "document.getElementById('words').innerText"
            await page.until(f"{words} === 'The timeline cannot be loaded: status 500'")
            await asyncio.sleep(1)  # some more states are shown
            assert await page.value(words) == "The timeline cannot be loaded: status 500"
            await page.value(HIDE.format("true"))
            await page.value(SILENT)
            await page.value(HIDE.format("false"))
            await page.until("window.asked >= 2")

    with served(Scheduler()) as url:
        asyncio.run(look(url))


pytestmark = pytest.mark.timeout(300)
