"""The owner's page in a browser, and as what a browser gets."""

import asyncio
import csv
import datetime
import http.client
import io
import re
from urllib.parse import urlsplit
from urllib.request import urlopen

from playwright.async_api import Browser, expect

from pos.client import Item, PosClient, Sale
from tests.conftest import WAIT_S, eventually
from tests.integration.pages.conftest import Site
from tests.integration.pages.looks import check, looking
from tests.pages.history import sales

WAIT_MS = WAIT_S * 1_000
VIEWERS = 200


def sale(cents: int = 1_250, **changes: object) -> Sale:
    number = f"{datetime.datetime.now(datetime.UTC):%H%M%S%f}"
    fields = {"receipt_id": number, "branch_id": 1, "cashier_id": 17, "pos_id": "POS-1", "items": [Item(1001, cents)]}
    return Sale(**{**fields, **changes})  # type: ignore[arg-type]


def get(site: Site, path: str, method: str = "GET", **headers: str) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection(urlsplit(site.url).netloc, timeout=30)
    connection.request(method, path, headers=headers)
    reply = connection.getresponse()
    return reply.status, reply.read().decode(), reply.headers


async def test_a_sale_is_on_the_page_by_itself(site: Site, till: PosClient, browser: Browser, one_day: None) -> None:
    """Also after the pages, and the query server, were killed and came back: and nothing is there twice."""
    async with looking(browser, site.url) as page:
        revenue = page.locator("#today .hero dd")
        await expect(revenue).to_have_text("0.00")
        till.create_purchase(sale(1_250))
        await expect(revenue).to_have_text("12.50", timeout=WAIT_MS)

        site.kill("pages")
        await expect(page.locator("body[data-lost]")).to_have_count(1, timeout=WAIT_MS)
        till.create_purchase(sale(10_000))
        site.start("pages")
        await expect(revenue).to_have_text("112.50", timeout=WAIT_MS)
        await expect(page.locator("body[data-lost]")).to_have_count(0)

        site.kill("analytics")
        await expect(page.locator("#notice")).to_contain_text("No answer from the analytics service", timeout=WAIT_MS)
        till.create_purchase(sale(100))
        site.start("analytics")
        await expect(revenue).to_have_text("113.50", timeout=WAIT_MS)
        await expect(page.locator("#notice p")).to_have_count(0, timeout=WAIT_MS)
        for part in ("#today .hero", "#period dl", "#branches table", "#products table"):
            await expect(page.locator(part)).to_have_count(1)


async def test_anybody_can_read_it(site: Site, till: PosClient, browser: Browser) -> None:
    """Empty, full, of one branch, with a mistake in its address, and while the numbers cannot be had."""
    await check(browser, site.url)
    list(till.upload_purchases(sales(3, days=40, purchases=800), register_customers=True))
    await eventually(lambda: _shows(site, "Branch"), "sales are counted")
    for address in ("/", "/?range=today&branch=2&best=units", "/?range=custom&first=2026-13-01", "/nowhere"):
        await check(browser, f"{site.url}{address}")
    site.kill("analytics")
    site.kill("pages")
    site.start("pages")
    site.wait_ready("pages")
    await check(browser, site.url)
    async with looking(browser, site.url) as page:
        await expect(page.get_by_role("heading", level=1)).to_have_text("The numbers cannot be shown just now")
        site.start("analytics")
        await expect(page.get_by_role("heading", level=1)).to_have_text("The whole chain", timeout=WAIT_MS)


async def test_the_keyboard_is_enough_and_so_is_no_javascript(site: Site, till: PosClient, browser: Browser) -> None:
    list(till.upload_purchases(sales(3, days=10, purchases=200), register_customers=True))
    await eventually(lambda: _shows(site, '<option value="4"'), "sales are counted")
    async with looking(browser, site.url, java_script_enabled=False) as page:
        await page.keyboard.press("Tab")
        await expect(page.get_by_role("link", name="To the content")).to_be_focused()
        await page.locator("#branch").select_option("2")
        await page.locator(".filter button").press("Enter")
        await expect(page.get_by_role("heading", level=1)).to_have_text("Branch 2")
        await page.get_by_role("link", name="7 days").press("Enter")
        await expect(page.locator("[aria-current=true]").first).to_have_text("7 days")
        await expect(page.get_by_role("heading", level=1)).to_have_text("Branch 2")


async def test_what_is_shown_is_what_is_in_the_files(site: Site, till: PosClient) -> None:
    """To the cent, of all that was sold."""
    sent = list(sales(3, days=40, purchases=600))
    list(till.upload_purchases(sent, register_customers=True))
    whole = f"{sum(it.total_cents for it in sent) / 100:,.2f}"
    first, last = (f(it.purchase_time for it in sent).date() for f in (min, max))
    address = f"?range=custom&first={first}&last={last}"
    await eventually(lambda: _shows(site, whole, f"/{address}"), "everything is counted")
    status, text, headers = get(site, f"/sales.csv{address}")
    assert (status, headers["content-type"]) == (200, "text/csv; charset=utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert sum(int(row["revenue"].replace(".", "")) for row in rows) == sum(it.total_cents for it in sent)
    assert {(row["day"], row["branch"]) for row in rows} == {
        (str(s.purchase_time.date()), str(s.branch_id)) for s in sent
    }

    async def listed(name: str, more_than: int) -> bool:  # which is remembered for a moment, perhaps of one before
        text = (await asyncio.to_thread(get, site, f"/{name}.csv{address}"))[1]
        return len(list(csv.reader(io.StringIO(text)))) > more_than

    await eventually(lambda: listed("products", 10), "the best products are in the file")
    await eventually(lambda: listed("customers", 5), "the most loyal customers are in the file")
    assert get(site, "/else.csv")[0] == 404
    assert get(site, "/sales.csv?range=custom&first=yesterday")[0] == 400


async def test_many_viewers_share_one_watch(site: Site, till: PosClient) -> None:
    """However many look, the query server has one watcher; who leaves, leaves nothing behind."""
    host, port = site.address["pages"].split(":")
    till.create_purchase(sale())

    async def viewer() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"GET /live HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
        await asyncio.wait_for(reader.readuntil(b"event: parts"), WAIT_S)
        return reader, writer

    first = await viewer()
    before = site.memory_bytes
    others = [await viewer() for _ in range(VIEWERS - 1)]
    assert site.metric("pages_viewers") == VIEWERS
    assert site.metric("pages_watching") == 1
    for number in range(5):
        till.create_purchase(sale(100_000 + number))
        amount = f"{sum(range(number + 1)) + 1_250 + 100_000 * (number + 1):03d}"
        shown = f"{int(amount) / 100:,.2f}".encode()
        await asyncio.gather(*(asyncio.wait_for(r.readuntil(shown), WAIT_S) for r, _ in (first, *others)))
    assert site.memory_bytes - before < 40 << 20
    for _, writer in (first, *others):
        writer.close()

    async def nobody() -> bool:
        return site.metric("pages_viewers") == 0

    await eventually(nobody, "all have left")


async def test_what_a_browser_is_told(site: Site) -> None:
    """No code but ours, no cookie, no other name for this machine, nothing from another site."""
    status, text, headers = get(site, "/")
    assert status == 200
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert "set-cookie" not in headers
    assert not re.search(r"<script>|<style|style=|onclick|javascript:", text)
    assert get(site, "/", Host="bank.example")[0] == 421
    assert get(site, "/", Host="127.0.0.1.bank.example")[0] == 421
    assert get(site, "/", method="POST", Origin="https://bank.example")[0] == 403
    assert get(site, "/", method="POST")[0] == 403
    assert get(site, "/../../etc/passwd")[0] == 404
    assert get(site, "/static/../settings.py")[0] == 404
    assert site.stop("pages") == 0


async def _shows(site: Site, text: str, path: str = "/") -> bool:
    def read() -> bool:
        with urlopen(site.url + path, timeout=30) as reply:
            return text in reply.read().decode()

    return await asyncio.to_thread(read)
