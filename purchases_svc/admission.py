"""How many sales may be on their way at once, and whose turn it is: nobody's flood fills the room of all others."""

from collections import OrderedDict, deque
from collections.abc import Sequence

from prometheus_client import Gauge

from chassis.errors import Overloaded
from purchases_svc.entry import Entry
from purchases_svc.sale import Sale

SHARE = 10  # one caller may have a tenth of all that may be on its way
# …but always as much as two messages of an upload, which are in flight together: 500 sales each, or as many items as
# fit into a message.
SHARE_SALES_MIN, SHARE_ITEMS_MIN = 1_000, 200_000

IN_HAND = Gauge("purchases_sales_in_hand", "Sales that were taken in and are not answered yet.")
IN_HAND_MAX = Gauge("purchases_sales_in_hand_max", "So many at most; more are refused.")


class _Load:
    """What is on its way: taken in, and not answered yet."""

    __slots__ = ("items", "sales")

    def __init__(self) -> None:
        self.sales = self.items = 0


class Admission:
    """Counts the sales that were taken in, in all and for each caller, and refuses what would be too many."""

    def __init__(self, sales_max: int, items_max: int) -> None:
        self._sales_max, self._items_max = sales_max, items_max
        self._share_sales = max(sales_max // SHARE, SHARE_SALES_MIN)
        self._share_items = max(items_max // SHARE, SHARE_ITEMS_MIN)
        self._all = _Load()
        self._callers: dict[str, _Load] = {}
        IN_HAND.set_function(lambda: self._all.sales)
        IN_HAND_MAX.set(sales_max)

    def enter(self, caller: str, sales: Sequence[Sale]) -> None:
        """Take in sales; each of them has to `leave` once.

        Raises:
            Overloaded: they would be too many, for everybody or for this caller; none is taken in.
        """
        count, items = len(sales), sum(len(sale.items) for sale in sales)
        self.require_room(caller, count, items)
        own = self._callers.setdefault(caller, _Load())
        for load in (self._all, own):
            load.sales += count
            load.items += items

    def require_room(self, caller: str, sales: int, items: int = 0) -> None:
        """Whether so much could be taken in, to be asked before anything is made of it.

        Raises:
            Overloaded
        """
        if self._all.sales + sales > self._sales_max or self._all.items + items > self._items_max:
            raise Overloaded(f"{self._all.sales} sales wait to be stored; try again a little later")
        own = self._callers.get(caller) or _Load()
        if own.sales + sales > self._share_sales or own.items + items > self._share_items:
            raise Overloaded(f"{own.sales} sales of this caller wait to be stored; try again a little later")

    def leave(self, caller: str, sale: Sale) -> None:
        """A sale was answered, or its caller is gone."""
        own = self._callers[caller]
        for load in (self._all, own):
            load.sales -= 1
            load.items -= len(sale.items)
        if not own.sales:
            del self._callers[caller]


class Turns:
    """A queue in which callers take turns, one sale each: who sends many waits behind itself."""

    def __init__(self) -> None:
        self._callers: OrderedDict[str, deque[Entry]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._callers)

    @property
    def callers(self) -> int:
        """How many of them wait."""
        return len(self._callers)

    @property
    def next_caller(self) -> str:
        """Whose turn it is; of them, somebody must wait."""
        return next(iter(self._callers))

    def put(self, entry: Entry) -> None:
        if (own := self._callers.get(entry.caller)) is None:
            own = self._callers[entry.caller] = deque()
        own.append(entry)

    def take(self) -> Entry:
        """The oldest of the caller whose turn it is.

        Raises:
            KeyError: nobody waits.
        """
        caller, own = self._callers.popitem(last=False)
        entry = own.popleft()
        if own:
            self._callers[caller] = own  # at the end
        return entry
