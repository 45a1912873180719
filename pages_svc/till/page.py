"""The routes of the till. Every press of a button is a form; a receipt has an address of its own."""

import asyncio
import datetime
import itertools
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qsl, urlencode

from markupsafe import escape
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from chassis.tls import Broken
from chassis.wire import ID_MAX
from pages_svc.live import Live, Parts
from pages_svc.till.assortment import Product
from pages_svc.till.cart import FOUND_MAX, Cart
from pages_svc.till.clients import Clients
from pages_svc.till.journals import Journals, Till, Zone
from pages_svc.web import Templates
from pos.client import Customer, Purchase, Sale
from pos.errors import (
    CustomerUnknown,
    IdempotencyKeyReused,
    InvalidRequest,
    NotFound,
    OutcomeUnknown,
    PosError,
    ReceiptTaken,
    SaleRefused,
)
from pos.journal import JournalError

THREADS = 16  # calls of the client library at once; more wait
FIELDS_MAX = 1_000

T = TypeVar("T")


class TillPage:
    """Sells by the client library."""

    def __init__(
        self,
        clients: Clients,
        assortment: Mapping[int, Product],
        templates: Templates,
        zone: Zone,
        journals: Path | None,
    ) -> None:
        """`journals` is where tills keep what they sell offline; without, there is no switch for that."""
        self._clients, self._assortment, self._templates, self._zone = clients, assortment, templates, zone
        self._threads = ThreadPoolExecutor(THREADS, "till")
        self._journals = Journals(journals, clients, zone, self._threads) if journals else None
        self.live: Live[Till] | None = None  # given by the wiring, as it renders by us

    def routes(self) -> list[Route]:
        return [
            Route("/till", self.show),
            Route("/till", self.press, methods=["POST"]),
            Route("/till/live", self.follow),
        ]

    async def run(self) -> None:
        """Send what was sold offline, for ever."""
        if self._journals:
            await self._journals.drain()

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        if self._journals:
            self._journals.close()

    async def show(self, request: Request) -> Response:
        asked = request.query_params
        if purchase_id := asked.get("paid"):
            return await self._receipt(purchase_id, asked)
        cart = Cart.begin(*(asked.get(name, "") for name in ("branch", "pos", "cashier")))
        if asked.get("kept") and self._journals and (till := till_of(cart)):
            return await self._kept(till, asked)
        return await self._render(cart)

    async def follow(self, request: Request) -> Response:
        """How the till's journal does."""
        asked = request.query_params
        till = till_of(Cart.begin(asked.get("branch", ""), asked.get("pos", "")))
        if not (self._journals and self.live and till) or self.live.full:
            return PlainTextResponse("Nothing to follow.\n", 503)
        return StreamingResponse(
            self.live.follow(till),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )

    async def render(self, till: Till) -> Parts:
        assert self._journals
        try:
            state = await self._journals.state(till)
        except JournalError as error:
            return {"journal": str(escape(str(error)))}
        return {"journal": self._templates.part("till/journal.html", state=state)}

    async def press(self, request: Request) -> Response:
        pairs = parse_qsl((await request.body()).decode(errors="replace"), max_num_fields=FIELDS_MAX)
        form = dict(pairs)
        cart = Cart.of_form(form, [value for name, value in pairs if name == "line"])
        pressed, _, what = form.get("do", "scan").partition(":")
        if pressed == "new":
            return await self._render(Cart.begin(cart.branch, cart.pos, cart.cashier))
        if pressed in ("offline", "online"):
            return await self._switch(cart, offline=pressed == "offline")
        if pressed == "pay":
            return await self._pay(cart)
        if cart.pending:  # it may be stored as it is
            return await self._unknown(cart, "")
        if pressed == "scan" and not form.get("scan", "").strip() and cart.find:
            pressed = "find"  # Enter in the search
        found: Sequence[Customer] = ()
        match pressed:
            case "add":
                cart = cart.scan(what, "", self._assortment)
            case "scan":
                cart = cart.scan(form.get("scan", ""), form.get("price", ""), self._assortment)
            case "remove":
                cart = cart.without(what)
            case "customer":
                cart = replace(cart, customer=what, is_new=False, find="")
            case "anonymous":
                cart = replace(cart, customer="", is_new=False, find="")
            case "register":
                cart = replace(cart, customer=str(uuid.uuid4()), is_new=True, find="")
            case "find":
                cart, found = await self._find(cart)
        return await self._render(cart, found, scanned=form.get("scan", "") if "price" in cart.wrong else "")

    async def _find(self, cart: Cart) -> tuple[Cart, Sequence[Customer]]:
        """Those whose number begins so; all of them, from the first on, when nothing is said."""
        branch_id = int(cart.branch) if cart.branch.isdecimal() else None
        reader, *_ = self._clients.readers(branch_id)
        try:
            listed = await self._call(lambda: list(itertools.islice(reader.list_customers(cart.find), FOUND_MAX + 1)))
        except InvalidRequest:
            return cart.said(find="A customer's number has the digits 0–9, letters a–f, and hyphens."), ()
        except PosError as error:
            return cart.said(find=_in_words(error)), ()
        return (cart, listed) if listed else (cart.said(find="Nobody is registered whose number begins so."), ())

    async def _pay(self, cart: Cart) -> Response:
        now = datetime.datetime.now(datetime.UTC)
        sale = cart.sale(now)
        if sale is None:
            return await self._render(cart.checked(), status=422)
        if self._journals and self._journals.is_offline((sale.branch_id, sale.pos_id)):
            return await self._keep(cart, sale, self._journals)
        try:
            till = self._clients.of_till(sale.branch_id, sale.pos_id)
            recorded = await self._call(lambda: till.create_purchase(sale, register_customer=cart.is_new))
        except Broken:
            return await self._render(
                cart.said(pos="This till has no certificate here, so it cannot sell."), status=403
            )
        except OutcomeUnknown as error:
            return await self._unknown(replace(cart, time=sale.purchase_time.isoformat()), _in_words(error))
        except SaleRefused as error:
            return await self._render(_refused(cart, error), status=422)
        except PosError as error:
            return await self._render(cart.said(pay=_in_words(error)), status=503)
        paid = {"paid": recorded.purchase.purchase_id, **_till_of(sale)}
        return RedirectResponse(f"/till?{urlencode(paid)}", 303)

    async def _keep(self, cart: Cart, sale: Sale, journals: Journals) -> Response:
        """Sell offline: the receipt is printed once the sale is on the disk."""
        try:
            number = await journals.sell(sale, cart.is_new)
        except SaleRefused as error:
            return await self._render(_refused(cart, error), status=422)
        except JournalError as error:
            return await self._render(cart.said(pay=f"It is not sold: {error}"), status=503)
        return RedirectResponse(f"/till?{urlencode({'kept': number, **_till_of(sale)})}", 303)

    async def _switch(self, cart: Cart, *, offline: bool) -> Response:
        till = till_of(cart)
        if till is None or self._journals is None:
            return await self._render(cart.said(branch="Say which branch and till this is."), status=422)
        try:
            await self._journals.switch(till, offline=offline)
        except JournalError as error:
            return await self._render(cart.said(pay=f"This till cannot go offline: {error}"), status=503)
        return await self._render(cart)

    async def _kept(self, till: Till, asked: Mapping[str, str]) -> Response:
        assert self._journals
        try:
            state = await self._journals.state(till)
        except JournalError as error:
            return await self._render(Cart.begin().said(pay=str(error)), status=503)
        if not state.journal or not state.journal.last or str(state.journal.last.sequence) != asked["kept"]:
            return await self._render(Cart.begin().said(pay="There is no such receipt."), status=404)
        return self._templates.page(
            "kept.html",
            path="/till",
            title="Receipt",
            receipt=state.journal.last,
            zone=await self._zone() or datetime.UTC,
            names=self._names,
            next=_next(asked),
        )

    async def _receipt(self, purchase_id: str, asked: Mapping[str, str]) -> Response:
        try:
            purchase = await self._call(lambda: self._found(purchase_id))
        except (NotFound, InvalidRequest):
            return await self._render(Cart.begin().said(pay="There is no such receipt."), status=404)
        except PosError as error:
            return await self._render(Cart.begin().said(pay=_in_words(error)), status=503)
        return self._templates.page(
            "receipt.html",
            path="/till",
            title="Receipt",
            purchase=purchase,
            zone=await self._zone() or datetime.UTC,
            names=self._names,
            next=_next(asked),
        )

    def _found(self, purchase_id: str) -> Purchase:
        """In whichever cell it is.

        Raises:
            PosError: of one that does not tell, or NotFound.
        """
        *first, last = self._clients.readers()
        for reader in first:
            with suppress(NotFound):
                return reader.get_purchase(purchase_id)
        return last.get_purchase(purchase_id)

    @property
    def _names(self) -> Mapping[int, str]:
        return {product.product_id: product.name for product in self._assortment.values()}

    async def _unknown(self, cart: Cart, why: str) -> Response:
        text = "Nobody knows yet whether this sale is stored. Send it again: it cannot be stored twice."
        return await self._render(cart.said(pay=f"{text} {why}".strip()), status=503 if why else 200)

    async def _render(
        self, cart: Cart, found: Sequence[Customer] = (), *, status: int = 200, scanned: str = ""
    ) -> Response:
        till = till_of(cart) if self._journals else None
        groups: dict[str, list[Product]] = {}
        for product in self._assortment.values():
            groups.setdefault(product.group, []).append(product)
        return self._templates.page(
            "till.html",
            status=status,
            path="/till",
            title="Till",
            cart=cart,
            groups=groups,
            assortment=self._assortment,
            live=f"/till/live?{urlencode({'branch': till[0], 'pos': till[1]})}" if till else "",
            journal=(await self.render(till))["journal"] if till else "",
            offline=till is not None and self._journals is not None and self._journals.is_offline(till),
            found=found[:FOUND_MAX],
            found_more=len(found) > FOUND_MAX,
            scanned=scanned,
        )

    async def _call(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def till_of(cart: Cart) -> Till | None:
    """None while it is not said which."""
    branch = cart.branch.strip()
    named = branch.isascii() and branch.isdigit() and 0 < int(branch) <= ID_MAX and cart.pos.strip()
    return (int(branch), cart.pos) if named else None


def _next(asked: Mapping[str, str]) -> str:
    """Where the next sale at the same till begins."""
    return f"/till?{urlencode({name: asked.get(name, '') for name in ('branch', 'pos', 'cashier')})}"


def _till_of(sale: Sale) -> dict[str, object]:
    return {"branch": sale.branch_id, "pos": sale.pos_id, "cashier": sale.cashier_id}


def _refused(cart: Cart, error: SaleRefused) -> Cart:
    match error:
        case ReceiptTaken():
            return cart.refused("", ()).said(receipt="Another sale of this till has this number today.", pay="")
        case IdempotencyKeyReused():
            return cart.refused("This sale was stored with other content. Start a new one.", ())
        case CustomerUnknown():
            return cart.refused("", ()).said(customer="This customer is not registered.", pay="")
    return cart.refused(_in_words(error), error.violations)


def _in_words(error: PosError) -> str:
    if not error.status.reason and isinstance(error, OutcomeUnknown):
        return "The purchases service does not answer."
    return f"The purchases service says: {error.status.message or error.status.code.name}."
