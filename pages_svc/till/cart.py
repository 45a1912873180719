"""One sale in the making. All of it is in the form that goes to and fro: the page server keeps nothing of it."""

import datetime
import re
import secrets
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from chassis.errors import Violation
from chassis.wire import parse_cents, parse_uuid
from pages_svc.till.assortment import Product, parse_product_id
from pos.client import Item, Sale

LINES_MAX = 500  # of a form; the chain takes more
FOUND_MAX = 12  # customers listed at once

# Where a rule of the contract is shown: at the input of that field.
_INPUTS = {
    "purchase.branch_id": "branch",
    "purchase.pos_id": "pos",
    "purchase.cashier_id": "cashier",
    "purchase.receipt_id": "receipt",
    "purchase.customer_id": "customer",
}
_LINE = re.compile(r"purchase\.items\[(\d+)\]")


@dataclass(frozen=True)
class Cart:
    """As typed: what is wrong with it, the service says. `key` is made once, and goes with every attempt to pay."""

    branch: str = "1"
    pos: str = "POS-1"
    cashier: str = "17"
    receipt: str = ""
    key: str = ""
    time: str = ""  # of the first attempt to pay, whose outcome is not known: the sale stays as it is from then on
    lines: tuple[Item, ...] = ()
    customer: str = ""
    is_new: bool = False  # the customer is registered with the sale
    find: str = ""
    wrong: Mapping[str, str] = field(default_factory=dict)  # by input, or by `line-` and a product's id

    @classmethod
    def begin(cls, branch: str = "", pos: str = "", cashier: str = "") -> Self:
        """A new sale at this till."""
        now = datetime.datetime.now(datetime.UTC)
        return cls(
            branch=branch[:10] or cls.branch,
            pos=pos[:32] or cls.pos,
            cashier=cashier[:10] or cls.cashier,
            receipt=f"{now:%H%M%S}-{secrets.token_hex(2)}",
            key=str(uuid.uuid4()),
        )

    @classmethod
    def of_form(cls, form: Mapping[str, str], lines: Sequence[str]) -> Self:
        """Whatever a form may hold; what no page of ours has put there is left out."""
        begun = cls.begin(form.get("branch", ""), form.get("pos", ""), form.get("cashier", ""))
        items: dict[int, Item] = {}
        for line in lines[:LINES_MAX]:
            product_id, cents = parse_product_id(line.partition(":")[0]), parse_cents(line.partition(":")[2])
            if product_id and cents is not None:
                items.setdefault(product_id, Item(product_id, cents))
        return replace(
            begun,
            receipt=form.get("receipt", "")[:64] or begun.receipt,
            key=parse_uuid(form.get("key", "")) or begun.key,
            time=form.get("time", "")[:40],
            lines=tuple(items.values()),
            customer=parse_uuid(form.get("customer", "")) or "",
            is_new=form.get("is_new") == "1",
            find=form.get("find", "").strip()[:36],
        )

    @property
    def total_cents(self) -> int:
        return sum(item.price_cents for item in self.lines)

    @property
    def pending(self) -> bool:
        """It was sent, and nobody knows yet whether it is stored."""
        return bool(self.time)

    def said(self, **wrong: str) -> Self:
        return replace(self, wrong={**self.wrong, **wrong})

    def scan(self, said: str, price: str, assortment: Mapping[int, Product]) -> Self:
        """Add what was scanned or typed: a product of the assortment, or another with its price."""
        product_id = parse_product_id(said)
        if product_id is None:
            return self.said(scan=f"“{said[:20]}” is no product: they are numbers of up to 14 digits.")
        known, cents = assortment.get(product_id), parse_cents(price.strip()) if price.strip() else None
        if price.strip() and cents is None:
            return self.said(price=f"“{price[:15]}” is no price: write it as 12.50.")
        if cents is None and known is None:
            return self.said(price=f"{product_id} is not in the assortment: what does it cost?")
        if any(item.product_id == product_id for item in self.lines):
            return self.said(scan=f"{known.name if known else product_id} is on the receipt already: one unit a sale.")
        if len(self.lines) >= LINES_MAX:
            return self.said(scan=f"A receipt of this till has at most {LINES_MAX} lines.")
        price_cents = cents if cents is not None else known.price_cents if known else 0
        return replace(self, lines=(*self.lines, Item(product_id, price_cents)))

    def without(self, product_id: str) -> Self:
        return replace(self, lines=tuple(item for item in self.lines if str(item.product_id) != product_id))

    def sale(self, now: datetime.datetime) -> Sale | None:
        """What is sent; None when there is something that no sale can hold, which `wrong` of `checked` tells."""
        if self.checked().wrong:
            return None
        return Sale(
            receipt_id=self.receipt,
            branch_id=int(self.branch),
            cashier_id=int(self.cashier),
            pos_id=self.pos,
            items=self.lines,
            customer_id=self.customer or None,
            purchase_time=datetime.datetime.fromisoformat(self.time) if self.time else now,
            idempotency_key=self.key,
        )

    def checked(self) -> Self:
        """Only what cannot even be sent is told here; the rules are the service's."""
        wrong: dict[str, str] = {}
        for name in ("branch", "cashier"):
            said = getattr(self, name).strip()
            if not (said.isascii() and said.isdigit()):
                wrong[name] = "must be a number"
        if not self.lines:
            wrong["scan"] = "Nothing is on the receipt yet."
        if self.time:
            try:
                datetime.datetime.fromisoformat(self.time)
            except ValueError:
                wrong["receipt"] = "This sale's time is lost; start a new one."
        return self.said(**wrong)

    def refused(self, text: str, violations: Sequence[Violation]) -> Self:
        """Each rule at its input; what belongs to none of them at the receipt's foot."""
        wrong: dict[str, str] = {}
        for violation in violations:
            if line := _LINE.match(violation.field):
                place = int(line[1])
                name = f"line-{self.lines[place].product_id}" if place < len(self.lines) else "pay"
            else:
                name = _INPUTS.get(violation.field, "pay")
            label = f"{violation.field}: " if name == "pay" else ""
            wrong[name] = "; ".join(filter(None, [wrong.get(name), label + violation.description]))
        return replace(self, time="").said(**(wrong or {"pay": text}))
