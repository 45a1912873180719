"""The routes of the till. Every press of a button is a form; a receipt has an address of its own."""

import asyncio
import datetime
import itertools
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar
from urllib.parse import parse_qsl, urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from chassis.tls import Broken
from pages_svc.till.assortment import Product
from pages_svc.till.cart import FOUND_MAX, Cart
from pages_svc.till.clients import Clients
from pages_svc.web import Templates
from pos.client import Customer, Sale
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

THREADS = 16  # calls of the client library at once; more wait
FIELDS_MAX = 1_000

T = TypeVar("T")
Zone = Callable[[], Awaitable[datetime.tzinfo]]  # the chain's


class TillPage:
    """Sells by the client library."""

    def __init__(self, clients: Clients, assortment: Mapping[int, Product], templates: Templates, zone: Zone) -> None:
        self._clients, self._assortment, self._templates, self._zone = clients, assortment, templates, zone
        self._threads = ThreadPoolExecutor(THREADS, "till")

    def routes(self) -> list[Route]:
        return [Route("/till", self.show), Route("/till", self.press, methods=["POST"])]

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    async def show(self, request: Request) -> Response:
        asked = request.query_params
        if purchase_id := asked.get("paid"):
            return await self._receipt(purchase_id, asked)
        return self._render(Cart.begin(*(asked.get(name, "") for name in ("branch", "pos", "cashier"))))

    async def press(self, request: Request) -> Response:
        pairs = parse_qsl((await request.body()).decode(errors="replace"), max_num_fields=FIELDS_MAX)
        form = dict(pairs)
        cart = Cart.of_form(form, [value for name, value in pairs if name == "line"])
        pressed, _, what = form.get("do", "scan").partition(":")
        if pressed == "new":
            return self._render(Cart.begin(cart.branch, cart.pos, cart.cashier))
        if pressed == "pay":
            return await self._pay(cart)
        if cart.pending:  # it may be stored as it is
            return self._unknown(cart, "")
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
        return self._render(cart, found, scanned=form.get("scan", "") if "price" in cart.wrong else "")

    async def _find(self, cart: Cart) -> tuple[Cart, Sequence[Customer]]:
        """Those whose number begins so; all of them, from the first on, when nothing is said."""
        try:
            listed = await self._call(
                lambda: list(itertools.islice(self._clients.own.list_customers(cart.find), FOUND_MAX + 1))
            )
        except InvalidRequest:
            return cart.said(find="A customer's number has the digits 0–9, letters a–f, and hyphens."), ()
        except PosError as error:
            return cart.said(find=_in_words(error)), ()
        return (cart, listed) if listed else (cart.said(find="Nobody is registered whose number begins so."), ())

    async def _pay(self, cart: Cart) -> Response:
        now = datetime.datetime.now(datetime.UTC)
        sale = cart.sale(now)
        if sale is None:
            return self._render(cart.checked(), status=422)
        try:
            till = self._clients.of_till(sale.branch_id, sale.pos_id)
            recorded = await self._call(lambda: till.create_purchase(sale, register_customer=cart.is_new))
        except Broken:
            return self._render(cart.said(pos="This till has no certificate here, so it cannot sell."), status=403)
        except OutcomeUnknown as error:
            return self._unknown(replace(cart, time=sale.purchase_time.isoformat()), _in_words(error))
        except SaleRefused as error:
            return self._render(_refused(cart, error), status=422)
        except PosError as error:
            return self._render(cart.said(pay=_in_words(error)), status=503)
        paid = {"paid": recorded.purchase.purchase_id, **_till_of(sale)}
        return RedirectResponse(f"/till?{urlencode(paid)}", 303)

    async def _receipt(self, purchase_id: str, asked: Mapping[str, str]) -> Response:
        try:
            purchase = await self._call(lambda: self._clients.own.get_purchase(purchase_id))
        except (NotFound, InvalidRequest):
            return self._render(Cart.begin().said(pay="There is no such receipt."), status=404)
        except PosError as error:
            return self._render(Cart.begin().said(pay=_in_words(error)), status=503)
        till = {name: asked.get(name, "") for name in ("branch", "pos", "cashier")}
        return self._templates.page(
            "receipt.html",
            path="/till",
            title="Receipt",
            purchase=purchase,
            zone=await self._zone(),
            names={product.product_id: product.name for product in self._assortment.values()},
            next=f"/till?{urlencode(till)}",
        )

    def _unknown(self, cart: Cart, why: str) -> Response:
        text = "Nobody knows yet whether this sale is stored. Send it again: it cannot be stored twice."
        return self._render(cart.said(pay=f"{text} {why}".strip()), status=503 if why else 200)

    def _render(self, cart: Cart, found: Sequence[Customer] = (), *, status: int = 200, scanned: str = "") -> Response:
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
            found=found[:FOUND_MAX],
            found_more=len(found) > FOUND_MAX,
            scanned=scanned,
        )

    async def _call(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


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
