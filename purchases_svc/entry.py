"""A sale on its way from its caller to its answer."""

import asyncio

from purchases_svc.answers import Outcome
from purchases_svc.sale import Purchase, Sale


class Call:
    """A caller who waits for what becomes of its sales. One future for all of them, however many there are."""

    __slots__ = ("answered", "caller", "open", "outcomes")

    def __init__(self, caller: str, sales: int) -> None:
        self.caller = caller
        self.outcomes: list[Outcome | None] = [None] * sales
        self.open = sales
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Entry:
    """A sale on its way, as the purchase it will be, and its place among the sales of its caller."""

    __slots__ = ("_call", "_place", "had_partition", "purchase", "repeats")

    def __init__(self, purchase: Purchase, call: Call, place: int) -> None:
        self.purchase, self._call, self._place = purchase, call, place
        self.had_partition = False  # it was made sure of, for this very sale
        self.repeats: list[Entry] = []  # came with the same key while this one was on its way

    @property
    def sale(self) -> Sale:
        return self.purchase.sale

    @property
    def caller(self) -> str:
        return self._call.caller

    @property
    def abandoned(self) -> bool:
        """The caller gave up."""
        return self._call.answered.cancelled()

    @property
    def settled(self) -> bool:
        return self._call.outcomes[self._place] is not None

    def settle(self, outcome: Outcome) -> None:
        call = self._call
        call.outcomes[self._place] = outcome
        call.open -= 1
        if not call.open and not call.answered.done():  # the caller may have given up
            call.answered.set_result(None)
