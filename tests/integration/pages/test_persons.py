"""Where the pages know who looks: everybody brings a token, and may by the pages what the services permit."""

import http.client
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode, urlsplit

import pytest

from chassis.settings import SettingsError
from pages_svc.settings import ServeSettings, check
from tests.integration.pages.test_operations import ReadersSite


class Reply(NamedTuple):
    status: int
    text: str
    headers: http.client.HTTPMessage


class TokensSite(ReadersSite):
    """The pages have a certificate of their own, to follow the numbers; whoever looks brings a token."""

    def ask(self, url: str, path: str, token: str = "", form: dict[str, str] | None = None, **headers: str) -> Reply:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
        if token:
            headers["Authorization"] = f"Bearer {token}"
        if form is None:
            connection.request("GET", path, headers=headers)
        else:
            connection.request("POST", path, urlencode(form), {"Origin": url, **headers})
        reply = connection.getresponse()
        return Reply(reply.status, reply.read().decode(), reply.headers)


@pytest.fixture
def site(purchases_db: str, analytics_db: str, amqp_url: str, tmp_path: Path) -> Iterator[TokensSite]:
    with TokensSite.all_running(purchases_db, analytics_db, amqp_url, tmp_path) as running:
        yield running


def test_everybody_sees_and_does_what_the_services_permit(site: TokensSite) -> None:
    """By the person's own token: a reader reads, a manager sees one branch, an operator acts, nobody else gets in."""
    url = site.start_pages(tokens=True)
    reader, operator = site.issuer.token("reader"), site.issuer.token("operator")
    manager = site.issuer.token("manager", branch_id=2)

    for bad in ("", "x", site.issuer.token("reader", exp=int(time.time()) - 600), site.issuer.token("till")):
        assert site.ask(url, "/", bad).status == 401
        assert site.ask(url, "/live", bad).status == 401
        assert site.ask(url, "/sales.csv", bad).status == 401
        assert site.ask(url, "/operations/rebuild", bad, {"day": "2026-03-01"}).status == 401

    page = site.ask(url, "/", reader)
    assert page.status == 200 and "kim, reader" in page.text
    assert "This is not for you" in site.ask(url, "/operations", reader).text
    assert site.ask(url, "/operations/rebuild", reader, {"day": "2026-03-01"}).status == 403

    assert site.ask(url, "/", manager).headers["location"] == "/?branch=2"
    assert site.ask(url, "/?branch=2", manager).status == 200
    assert "This is not for you" in site.ask(url, "/?branch=2", manager).text  # the chain's best products
    assert site.ask(url, "/?branch=1", manager).status == 403
    assert site.ask(url, "/sales.csv?branch=1", manager).status == 403

    done = site.ask(url, "/operations/rebuild", operator, {"day": "2026-03-01"})
    assert done.status == 200 and "Done" in done.text
    changes = [it for it in site.records("consumer") if it.get("method", "").endswith("RebuildDay") and "request" in it]
    assert [it["caller"] for it in changes] == [f"{site.issuer.environ['JWT_ISSUER']}#kim"]
    assert site.ask(url, "/till", operator).status == 404  # a till has a certificate, and no token


def test_a_token_is_kept_in_a_cookie_that_other_sites_never_send(site: TokensSite) -> None:
    url = site.start_pages(tokens=True)
    reader = site.issuer.token("reader")
    assert site.ask(url, "/sign-in").status == 200
    assert site.ask(url, "/sign-in", form={"token": "wrong"}).status == 401
    entered = site.ask(url, "/sign-in", form={"token": reader})
    name, *rules = entered.headers["set-cookie"].split("; ")
    assert entered.status == 303 and set(rules) == {"Path=/", "Secure", "HttpOnly", "SameSite=Strict"}
    assert site.ask(url, "/", Cookie=name).status == 200
    assert site.ask(url, "/", Cookie="a=b; " + name).status == 200
    assert site.ask(url, "/", Cookie=name.replace("=", "=x")).status == 401
    assert (
        site.ask(url, "/operations/rebuild", form={"day": "x"}, Cookie=name, Origin="https://bank.example").status
        == 403
    )
    left = site.ask(url, "/sign-out", form={}, Cookie=name)
    assert left.status == 303 and "Max-Age=0" in left.headers["set-cookie"]


def test_beyond_this_machine_nobody_is_let_in_unasked() -> None:
    """It does not even start."""
    open_to_all = ServeSettings(listen="0.0.0.0:8080")
    with pytest.raises(SettingsError, match="set JWT_ISSUER"):
        check(open_to_all, tokens=False, certified=True)
    with pytest.raises(SettingsError, match="set TLS_CERTIFICATE_FILE"):
        check(open_to_all, tokens=True, certified=False)
    with pytest.raises(SettingsError, match="must not travel in plaintext"):
        check(ServeSettings(), tokens=True, certified=False)
    check(open_to_all, tokens=True, certified=True)
    check(ServeSettings(), tokens=False, certified=False)
