"""What any page has to be for anybody: nothing that axe finds or its policy forbids, and no wider than its window."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page

TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
Scheme = Literal["light", "dark"]


@asynccontextmanager
async def looking(browser: Browser, address: str, **options: Any) -> AsyncIterator[Page]:
    """A page in a browser of its own. Whatever the browser complains about, such as its policy, fails the test."""
    context = await browser.new_context(**options)
    complaints: list[str] = []
    try:
        page = await context.new_page()
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        await page.goto(address)
        yield page
        await page.wait_for_load_state()
        assert [said for said in complaints if "Failed to load resource" not in said] == []
    finally:
        await context.close()


async def _nothing(_: Page) -> None:
    pass


async def check(browser: Browser, address: str, prepare: Callable[[Page], Awaitable[None]] = _nothing) -> None:
    """In light and dark, on a phone and a screen; after `prepare` has done something there."""
    for scheme in ("light", "dark"):
        for width in (320, 1280):
            async with looking(browser, address, color_scheme=scheme, viewport={"width": width, "height": 800}) as page:
                await prepare(page)
                found = await Axe().run(page, options={"runOnly": TAGS})
                assert found.violations_count == 0, f"{address} {scheme} {width}: {found.generate_report()}"
                overflowing = await page.evaluate("document.documentElement.scrollWidth - innerWidth")
                assert overflowing <= 0, f"{address} is {overflowing} px wider than {width}"
