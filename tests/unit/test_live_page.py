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


pytestmark = pytest.mark.timeout(300)
