"""A till that is taken off the network by its switch sells on, and what it sold is sent once it is back."""

from playwright.async_api import Browser, Page, expect

from pos.client import PosClient
from tests.conftest import WAIT_S, eventually
from tests.integration.pages.conftest import Site
from tests.integration.pages.looks import check, looking
from tests.integration.pages.test_till import form_of, pay, scan, send_again

WAIT_MS = WAIT_S * 1_000
SALES = 20


async def sell(page: Page, number: int) -> None:
    await scan(page, str(3_000 + number), f"{number + 1}.00")
    async with page.expect_navigation():
        await pay(page)
    await expect(page.get_by_role("heading", level=1)).to_have_text(f"{number + 1}.00")


async def test_what_was_sold_offline_is_sent_once(site: Site, till: PosClient, browser: Browser, one_day: None) -> None:
    """Twenty sales, of which some wait while the pages die; the owner sees each once."""
    total = sum(range(1, SALES + 1))
    async with looking(browser, site.url) as owner, looking(browser, f"{site.url}/till") as page:
        await page.get_by_role("button", name="Go offline").click()
        await check(browser, page.url)
        for number in range(SALES - 5):
            await sell(page, number)
            await expect(page.locator(".state")).to_contain_text("On this till's disk")
            await page.get_by_role("link", name="Next customer").click()
        await expect(page.locator("#journal")).to_contain_text(f"{SALES - 5} sales wait")
        assert list(till.list_purchases()) == []

        site.kill("purchases")
        site.kill("pages")  # a restart has it online; there is nobody to send to
        site.start("pages")
        site.wait_ready("pages")
        await page.goto(f"{site.url}/till")
        await page.get_by_role("button", name="Go offline").click()
        for number in range(SALES - 5, SALES):
            await sell(page, number)
            await page.get_by_role("link", name="Next customer").click()
        site.start("purchases")
        site.wait_ready("purchases")
        await page.get_by_role("button", name="Go online").click()
        await expect(owner.locator("#today .hero dd")).to_have_text(f"{total}.00", timeout=WAIT_MS)
        await expect(page.locator("#journal .waiting")).to_have_count(0, timeout=WAIT_MS)

    async def all_there() -> bool:
        return len(list(till.list_purchases())) == SALES

    await eventually(all_there, "each is stored once")
    assert sum(it.total_cents for it in till.list_purchases()) == 100 * total
    assert len({it.receipt_id for it in till.list_purchases()}) == SALES


async def test_a_receipt_that_is_paid_twice_is_one_sale(site: Site, till: PosClient, browser: Browser) -> None:
    """As when a browser sends the form once more, while the till is offline."""
    async with looking(browser, f"{site.url}/till") as page:
        await page.get_by_role("button", name="Go offline").click()
        await scan(page, "2001")
        form = await form_of(page)
        await pay(page)
        await expect(page.get_by_role("heading", level=1)).to_have_text("3.49")
        assert await send_again(page, site, form) == "3.49"
        await page.get_by_role("link", name="Next customer").click()
        await expect(page.locator("#journal")).to_contain_text("1 sale waits")
        await page.get_by_role("button", name="Go online").click()
        await expect(page.locator("#journal .waiting")).to_have_count(0, timeout=WAIT_MS)
    assert len(list(till.list_purchases())) == 1
