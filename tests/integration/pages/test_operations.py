"""What an operator sees and does by the page; and what a reader cannot."""

import http.client
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pika
import psycopg
import pytest
from playwright.async_api import Browser, expect

from deploy.local.machine import wait_until
from pos.client import PosClient
from tests.conftest import WAIT_S
from tests.integration.access.backbone import Backbone
from tests.integration.conftest import free_address
from tests.integration.pages.conftest import Site, answers
from tests.integration.pages.looks import check, looking
from tests.integration.pages.test_owner import get, sale
from tests.integration.processes import ROOT, START_TIMEOUT_S

WAIT_MS = WAIT_S * 1_000


async def test_what_is_stuck_is_shown_and_set_going(
    site: Site, till: PosClient, browser: Browser, purchases_db: str, amqp_url: str, one_day: None
) -> None:
    """Events that were given up, and those that cannot be counted: each by a button, after a question."""
    await check(browser, f"{site.url}/operations")
    till.create_purchase(sale())
    async with looking(browser, f"{site.url}/operations") as page:
        models = page.locator(".stage").nth(4).locator(".value")
        await expect(models).to_have_text("1", timeout=WAIT_MS)
        await expect(page.locator("#failed")).to_contain_text("No event was given up.")

        site.kill("relay")
        till.create_purchase(sale())
        await expect(page.locator(".stage").nth(1)).to_contain_text("No answer from the relay", timeout=WAIT_MS)
        with psycopg.connect(purchases_db) as connection:
            given_up = (
                "UPDATE outbox_events SET status = 'FAILED', attempts = 5, next_attempt_at = 'infinity',"
                " last_error = %s WHERE status = 'NEW'"
            )
            assert connection.execute(given_up, ["no <b>luck</b>"]).rowcount == 1
        with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
            connection.channel().basic_publish("", "purchases.created", b"<script>alert(1)</script>")
        site.start("relay")
        await expect(page.locator("#failed h3")).to_have_text("1 × no <b>luck</b>", timeout=WAIT_MS)
        await expect(page.locator("#quarantine pre")).to_have_text("<script>alert(1)</script>", timeout=WAIT_MS)
        await check(browser, f"{site.url}/operations")

        for button, sure, result in (
            ("Publish again …", "Publish 1 event again", "1 event is published again."),
            ("Try again …", "Try 1 event again", "None could be counted. 1 event stays in quarantine."),
            ("Remove …", "Remove 1 event for good", "1 event is removed for good."),
        ):
            await page.get_by_role("link", name=button).click()
            await check(browser, page.url)
            await page.get_by_role("button", name=sure).click()
            await expect(page.locator(".result")).to_have_text(result)
            await page.get_by_role("link", name="Back to operations").click()
        await expect(models).to_have_text("2", timeout=WAIT_MS)
        await expect(page.locator("#failed")).to_contain_text("No event was given up.", timeout=WAIT_MS)
        await expect(page.locator("#quarantine")).to_contain_text("Every event that came could be counted.")


async def test_tills_of_which_sales_are_missing_are_listed(site: Site, browser: Browser, purchases_db: str) -> None:
    """Of whose journals something has been missing for more than a day; and whose numbers came twice."""
    epoch = "1f0c1b1e-6f0c-4f0e-9d43-5d8a4e1f2a3b"
    with psycopg.connect(purchases_db) as connection:
        connection.execute(
            "INSERT INTO till_journals (branch_id, pos_id, epoch, first_sequence, last_sequence, complete_through,"
            " complete_since) VALUES (7, 'POS-9', %s, 1, 12, 3, now() - interval '50 hours')",
            [epoch],
        )
        connection.execute(
            "INSERT INTO till_conflicts (branch_id, pos_id, epoch, sequence, purchase_id)"
            " VALUES (7, 'POS-9', %s, 2, gen_random_uuid())",
            [epoch],
        )
    await check(browser, f"{site.url}/operations")
    async with looking(browser, f"{site.url}/operations") as page:
        row = page.locator("#tills tbody tr")
        await expect(row.locator("th")).to_have_text("Branch 7, POS-9")
        await expect(row).to_contain_text("2 d 2 h")
        await expect(row.locator("td").last).to_have_text("1")


async def test_a_day_that_is_wrong_is_repaired(
    site: Site, till: PosClient, browser: Browser, analytics_db: str, one_day: None
) -> None:
    """It says what has been wrong."""
    till.create_purchase(sale(1_000))
    async with looking(browser, site.url) as owner, looking(browser, f"{site.url}/operations") as page:
        await expect(owner.locator("#today .hero dd")).to_have_text("10.00", timeout=WAIT_MS)
        with psycopg.connect(analytics_db) as connection:
            connection.execute("UPDATE daily_sales_by_branch SET revenue_sum = 99")
        await page.get_by_role("button", name="Rebuild …").click()
        await page.get_by_role("button", name="Rebuild").click()
        await expect(page.locator(".result")).to_contain_text("put right")
        await expect(page.locator(".result")).to_contain_text("The day is right now")
        await owner.reload()
        await expect(owner.locator("#today .hero dd")).to_have_text("10.00")


def test_a_form_of_another_site_does_nothing(site: Site) -> None:
    """Nor does a link: what changes something is sent by POST, from a page of ours."""
    for path in ("/operations/rebuild", "/operations/discard", "/till"):
        for origin in ("https://bank.example", "null", "http://127.0.0.1:1", ""):
            headers = {"Origin": origin} if origin else {}
            assert get(site, path, method="POST", **headers)[0] == 403
    assert get(site, "/operations/rebuild?day=2026-03-01")[0] == 200
    assert "Rebuild 1 Mar 2026?" in get(site, "/operations/rebuild?day=2026-03-01")[1]
    assert get(site, "/operations/rebuild?day=soon")[0] == 502
    assert get(site, "/operations/explode")[0] == 404
    assert get(site, "/operations/discard?reason=NONE")[0] == 502


class ReadersSite(Backbone):
    """With certificates; the pages run as somebody who may read."""

    def start_pages(self, *, tokens: bool) -> str:
        self.certificate("/reader/hq").write(self.directory, "reader")
        address = free_address()
        environ = {
            "JWT_LISTEN": "",
            "PAGES_LISTEN": address,
            "PAGES_METRICS_LISTEN": "127.0.0.1:0",
            "CONSUMER_TARGET": self.address["consumer"],
            "TLS_CERTIFICATE_FILE": str(self.directory / "reader.pem"),
            "TLS_KEY_FILE": str(self.directory / "reader-key.pem"),
        }
        environ = self.environ | environ
        for name in () if tokens else self.issuer.environ:
            del environ[name]
        with (self.directory / "pages.log").open("ab") as log:
            command = [sys.executable, "-m", "pages_svc", "serve"]
            self._running["pages"] = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log)
        assert wait_until(lambda: answers(f"http://{address}"), START_TIMEOUT_S), self.log("pages")
        return f"http://{address}"


@pytest.fixture
def readers_site(purchases_db: str, analytics_db: str, amqp_url: str, tmp_path: Path) -> Iterator[str]:
    with ReadersSite.all_running(purchases_db, analytics_db, amqp_url, tmp_path) as running:
        yield running.start_pages(tokens=False)


async def test_a_reader_sees_the_numbers_and_changes_nothing(readers_site: str, browser: Browser) -> None:
    async with looking(browser, readers_site) as page:
        await expect(page.get_by_role("heading", level=1)).to_have_text("The whole chain")
        await page.goto(f"{readers_site}/operations")
        await expect(page.locator("#failed")).to_contain_text("This is not for you to see or do.")
        await expect(page.get_by_role("button")).to_have_count(0)
        await check(browser, f"{readers_site}/operations")
    host = urlsplit(readers_site).netloc
    for path, form in (
        ("rebuild", {"day": "2026-03-01"}),
        ("discard", {"id": "4f7c2d1e-9b3a-4c58-8e6f-0a1b2c3d4e5f"}),
        ("requeue", {"id": "4f7c2d1e-9b3a-4c58-8e6f-0a1b2c3d4e5f"}),
    ):
        connection = http.client.HTTPConnection(host, timeout=30)
        connection.request("POST", f"/operations/{path}", urlencode(form), {"Origin": readers_site})
        reply = connection.getresponse()
        assert reply.status == 403
        assert "This is not for you to see or do." in reply.read().decode()
