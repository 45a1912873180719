"""A sale on its way from its caller to its answer."""

import asyncio

from chassis.traces import Span
from purchases_svc.answers import Outcome
from purchases_svc.sale import Purchase, Sale


class Call:
    """A caller who waits for what becomes of its sales. One future for all of them, however many there are."""

    __slots__ = ("_open", "_outcomes", "answered", "caller", "kept", "sales")

    def __init__(self, caller: str, sales: int, *, kept: bool = False) -> None:
        """`kept`: they lay in a till's journal for a while, and nobody stands at the till for them."""
        self.caller, self.sales, self.kept = caller, sales, kept
        self._outcomes: list[Outcome | None] = [None] * sales
        self._open = sales
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def outcomes(self) -> list[Outcome]:
        """What became of each sale, so far as it is known; of all of them, once the call is answered."""
        return [outcome for outcome in self._outcomes if outcome is not None]

    def settled(self, place: int) -> bool:
        return self._outcomes[place] is not None

    def settle(self, place: int, outcome: Outcome) -> None:
        self._outcomes[place] = outcome
        self._open -= 1
        if not self._open and not self.answered.done():  # the caller may have given up
            self.answered.set_result(None)


class Entry:
    """A sale on its way, as the purchase it will be, and its place among the sales of its caller."""

    __slots__ = ("_call", "_place", "had_partition", "purchase", "repeats", "span")

    def __init__(self, purchase: Purchase, call: Call, place: int, span: Span | None = None) -> None:
        """`span` is what brought the sale, if that is recorded."""
        self.purchase, self._call, self._place, self.span = purchase, call, place, span
        self.had_partition = False  # it was made sure of, for this very sale
        self.repeats: list[Entry] = []  # came with the same key while this one was on its way

    @property
    def sale(self) -> Sale:
        return self.purchase.sale

    @property
    def caller(self) -> str:
        return self._call.caller

    @property
    def came_alone(self) -> bool:
        """A sale at a till, where somebody waits for it, and not one of many, nor of a backlog."""
        return self._call.sales == 1 and not self._call.kept

    @property
    def abandoned(self) -> bool:
        """The caller gave up."""
        return self._call.answered.cancelled()

    @property
    def settled(self) -> bool:
        return self._call.settled(self._place)

    def settle(self, outcome: Outcome) -> None:
        self._call.settle(self._place, outcome)
