"""The till in a browser: by keyboard alone, without JavaScript, in trouble."""

import re

from playwright.async_api import Browser, Page, expect

from pos.client import PosClient
from tests.conftest import WAIT_S
from tests.integration.pages.conftest import Site
from tests.integration.pages.looks import check, looking

WAIT_MS = WAIT_S * 1_000


async def scan(page: Page, product: str, price: str = "") -> None:
    await page.locator("#scan").fill(product)
    await page.locator("#price").fill(price)
    async with page.expect_navigation():
        await page.locator("#scan").press("Enter")


async def form_of(page: Page) -> str:
    """What a press of `Pay` sends."""
    fields = await page.evaluate("new URLSearchParams(new FormData(document.querySelector('form.till'))).toString()")
    return f"{fields}&do=pay"


async def send_again(page: Page, site: Site, form: str) -> str:
    """The heading of the receipt that is the answer."""
    headers = {"Origin": site.url, "Content-Type": "application/x-www-form-urlencoded"}
    reply = await page.request.post(f"{site.url}/till", data=form, headers=headers)
    assert reply.status == 200
    (heading,) = re.findall(r'<h1 id="paid-title">(.*)</h1>', await reply.text())
    return str(heading)


async def pay(page: Page) -> None:
    await page.get_by_role("button", name=re.compile("Pay|Send it again")).click()


async def test_a_sale_at_the_till_is_on_the_owners_page(
    site: Site, till: PosClient, browser: Browser, one_day: None
) -> None:
    """Typed, without JavaScript; seen by the owner without reloading; stored as it was typed."""
    async with (
        looking(browser, site.url) as owner,
        looking(browser, f"{site.url}/till", java_script_enabled=False) as page,
    ):
        await expect(owner.locator("#today .hero dd")).to_have_text("0.00")
        await page.keyboard.type("2001")  # the focus waits there for a scanner
        async with page.expect_navigation():
            await page.keyboard.press("Enter")
        await scan(page, "4006381333931")
        await expect(page.locator("#price-wrong")).to_contain_text("what does it cost?")
        await page.locator("#price").fill("12.5")
        await page.locator("#price").press("Enter")
        await scan(page, "2001")
        await expect(page.locator("#scan-wrong")).to_contain_text("one unit a sale")
        await page.get_by_role("button", name="Honey").press("Enter")
        await page.get_by_role("button", name="Take Honey 500 g off").press("Enter")
        await page.get_by_role("button", name="New customer").press("Enter")
        await expect(page.locator(".total dd")).to_have_text("15.99")
        await pay(page)
        await expect(page.get_by_role("heading", level=1)).to_have_text("15.99")
        await expect(owner.locator("#today .hero dd")).to_have_text("15.99", timeout=WAIT_MS)
        (purchase,) = till.list_purchases()
        assert [tuple(item) for item in purchase.items] == [(2001, 349), (4006381333931, 1250)]
        assert purchase.customer_id

        await page.get_by_role("link", name="Next customer").press("Enter")
        await page.locator("#find").fill(purchase.customer_id[:9])
        await page.locator("#find").press("Enter")
        await page.get_by_role("button", name=purchase.customer_id).press("Enter")
        await scan(page, "2002")
        await pay(page)
        await expect(owner.locator("#today .hero dd")).to_have_text("17.34", timeout=WAIT_MS)
        assert len(list(till.list_purchases(customer_id=purchase.customer_id))) == 2


async def test_what_is_refused_is_told_at_its_field(site: Site, till: PosClient, browser: Browser) -> None:
    """And nothing of the sale is lost by it."""
    async with looking(browser, f"{site.url}/till") as page:
        await scan(page, "bread")
        await expect(page.locator("#scan-wrong")).to_contain_text("is no product")
        await scan(page, "2001")
        await page.get_by_text("Branch 1, till POS-1").click()
        await page.locator("#pos").fill("till one!")
        await page.locator("#cashier").fill("0")
        await pay(page)
        for name in ("pos", "cashier"):
            await expect(page.locator(f"#{name}")).to_have_attribute("aria-invalid", "true")
            await expect(page.locator(f"#{name}-wrong")).to_be_visible()
        await page.locator("#pos").fill("POS-1")
        await page.locator("#cashier").fill("x")
        await pay(page)
        await expect(page.locator("#cashier-wrong")).to_have_text("must be a number")
        await page.locator("#cashier").fill("17")
        await page.locator("#receipt").fill("R-1")
        await pay(page)
        await expect(page.get_by_role("heading", level=1)).to_have_text("3.49")

        await page.goto(f"{site.url}/till")
        await scan(page, "2002")
        await page.get_by_text("Branch 1, till POS-1").click()
        await page.locator("#receipt").fill("R-1")
        await pay(page)
        await expect(page.locator("#receipt-wrong")).to_contain_text("Another sale")
        await expect(page.locator(".total dd")).to_have_text("1.35")
        await page.locator("#find").fill("nobody")
        await page.get_by_role("button", name="Find").click()
        await expect(page.locator("#find-wrong")).to_be_visible()
        await page.goto(f"{site.url}/till?paid=nothing")
        await expect(page.get_by_role("alert")).to_have_text("There is no such receipt.")
    assert len(list(till.list_purchases())) == 1


async def test_a_sale_whose_answer_is_lost_is_sent_again_and_stored_once(
    site: Site, till: PosClient, browser: Browser
) -> None:
    """It stays as it is until somebody knows; a receipt that is loaded again sells nothing."""
    async with looking(browser, f"{site.url}/till") as page:
        await scan(page, "2018")
        site.kill("purchases")
        await pay(page)
        await expect(page.get_by_role("alert")).to_contain_text("cannot be stored twice", timeout=WAIT_MS)
        await expect(page.locator("#receipt")).to_have_attribute("readonly", "")
        await expect(page.get_by_role("button", name="Honey")).to_be_disabled()
        site.start("purchases")
        site.wait_ready("purchases")
        form = await form_of(page)
        await pay(page)
        await expect(page.get_by_role("heading", level=1)).to_have_text("13.99", timeout=WAIT_MS)
        await page.reload()
        assert await send_again(page, site, form) == "13.99"
    assert len(list(till.list_purchases())) == 1


async def test_anybody_can_use_it(site: Site, browser: Browser) -> None:
    async def full(page: Page) -> None:
        await scan(page, "2001")
        await scan(page, "123")
        await page.locator("#find").fill("?")
        await page.get_by_role("button", name="Find").click()
        await page.get_by_text("Branch 1, till POS-1").click()

    async def paid(page: Page) -> None:
        await scan(page, "2001")
        await pay(page)
        await expect(page.get_by_role("heading", level=1)).to_have_text("3.49")

    await check(browser, f"{site.url}/till")
    await check(browser, f"{site.url}/till", full)
    await check(browser, f"{site.url}/till", paid)
