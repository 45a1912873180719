"""The load: tills that sell, repeat themselves, contradict themselves and go offline, and write down all of it.

One integer decides what they sell and when they misbehave. What no answer or a passing trouble came for is sent again
with the same key until there is an answer, through either of the two purchases services.
"""

import functools
import itertools
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from tempfile import TemporaryDirectory
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from pos.journal.rows import State
from retail.analytics.v1.analytics_service_pb2 import GetCustomerLoyaltyRequest
from retail.analytics.v1.analytics_service_pb2_grpc import AnalyticsServiceStub
from retail.purchases.v1.purchases_service_pb2 import (
    CreatePurchaseRequest,
    CreatePurchaseResponse,
    UploadPurchasesRequest,
)
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.faults.identities import READER, Identities
from tests.faults.journal_till import JournalTill
from tests.faults.ledger import Ledger, Sale

ATTEMPT_TIMEOUT_S = 4.0
PAUSE_S = (0.05, 0.4)  # between attempts
DAY_US = 86_400_000_000
HOUR_US = DAY_US // 24
BRANCHES = 5
PRODUCTS = 40
CUSTOMERS = 60
REMEMBERED = 200  # acknowledged sales of a till that it may repeat or contradict
FORGETFUL = 0.02  # a till that got no answer breaks down with this chance, and never asks again

TRY_AGAIN = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
}
REFUSALS = {
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.OUT_OF_RANGE,
}
TIME_AHEAD = "PURCHASE_TIME_AHEAD"
OPTIONS: list[tuple[str, Any]] = [
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 500),
]


class Clock:
    """What a till takes for the time: the faults set it wrong."""

    def __init__(self) -> None:
        self.offset_us = 0

    def now_us(self) -> int:
        return time.time_ns() // 1000 + self.offset_us


class Tills:
    """`count` tills that make about `rate` sales a second together."""

    def __init__(
        self,
        identities: Identities,
        targets: Callable[[int], Sequence[str]],
        analytics: str,
        ledger: Ledger,
        numbers: "Numbers",
        *,
        seed: str,
        count: int,
        rate: float,
    ) -> None:
        """`targets` are those of the purchases services that record a branch's sales."""
        self.identities, self.analytics = identities, analytics
        self._ledger, self._numbers, self._seed = ledger, numbers, seed
        self._targets = targets
        self.clocks = [Clock() for _ in range(count)]
        self.stop = threading.Event()  # finish the sale at hand
        self.give_up = threading.Event()  # do not even do that
        # How old some of the sales are, now and then: retention closes months from the far end, and months that have
        # no partition yet are found at the near one.
        self.ages_us: list[int] = []
        self._pace_s = count / rate
        self._count, self._lock = count, threading.Lock()
        self._threads = [threading.Thread(target=self._work, args=[n], name=f"till-{n}") for n in range(count)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def finish(self, within_s: float) -> bool:
        """Settle what is on its way and sell no more; False when some sale gets no answer in time."""
        self.stop.set()
        deadline = time.monotonic() + within_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Do not even ask again for what has no answer."""
        self.stop.set()
        self.give_up.set()
        for thread in self._threads:
            thread.join()

    def beside(self, target: str) -> "Till":
        """One more till, that knows one of the services only, and whose clock nobody sets wrong."""
        with self._lock:
            number = next(it for it in itertools.count(self._count) if target in self._targets(branch_of(it)))
            self._count = number + 1
            return self._till(number, Clock(), [target])

    def _till(self, number: int, clock: Clock, targets: Sequence[str]) -> "Till":
        return Till(self, number, clock, targets, self._ledger, self._numbers, f"{self._seed}/till/{number}")

    def _work(self, number: int) -> None:
        with self._till(number, self.clocks[number], self._targets(branch_of(number))) as till:
            next_at = time.monotonic()
            while not self.stop.is_set():
                sales = till.act()
                next_at = max(next_at + self._pace_s * sales, time.monotonic() - 1.0)
                self.stop.wait(max(0.0, next_at - time.monotonic()))


class Numbers:
    """Numbers for sales, each once, over all rounds."""

    def __init__(self) -> None:
        self._lock, self._last = threading.Lock(), 0

    def next(self) -> int:
        with self._lock:
            self._last += 1
            return self._last


class Till:
    """One till, with a connection to each purchases service."""

    def __init__(
        self,
        tills: Tills,
        number: int,
        clock: Clock,
        targets: Sequence[str],
        ledger: Ledger,
        numbers: Numbers,
        seed: str,
    ) -> None:
        self._tills, self._ledger, self._numbers = tills, ledger, numbers
        self._clock = clock
        self._seed, self._random = seed, random.Random(seed)
        self._branch, self._pos = branch_of(number), f"POS-{number}"
        self._receipts = 0
        self.answers = 0  # that said what became of a sale
        self._done: list[Sale] = []
        self._token = ""  # of the latest acknowledged sale
        own = f"branch/{self._branch}/till/{self._pos}"
        self._channels = [tills.identities.channel(target, own, OPTIONS) for target in targets]
        self._stubs = [PurchasesServiceStub(channel) for channel in self._channels]
        self._channels.append(tills.identities.channel(tills.analytics, READER, OPTIONS))
        self._analytics = AnalyticsServiceStub(self._channels[-1])
        self._both = ThreadPoolExecutor(2)
        self._disk = TemporaryDirectory(prefix="till-")
        self._journal = JournalTill(self._disk.name, self._branch, self._pos, self._channels[: len(targets)])

    def __enter__(self) -> "Till":
        return self

    def __exit__(self, *_: object) -> None:
        self._both.shutdown()
        self._journal.close()
        self._disk.cleanup()
        for channel in self._channels:
            channel.close()

    def act(self) -> int:
        """One thing that a till does; how many sales it was."""
        acts: list[tuple[float, Callable[[], int]]] = [
            (70, self.sell),
            (7, self._upload),
            (5, self._offline),
            (5, self._repeat),
            (5, self._twins),
            (3, self._contradict),
            (3, self._take_a_receipt_twice),
            (3, self._rivals),
            (2, self._unknown_customer),
            (2, self._from_the_future),
        ]
        (act,) = self._random.choices([act for _, act in acts], [weight for weight, _ in acts])
        return act()

    # --- what tills do ---

    def sell(self) -> int:
        self.deliver(self.sale())
        return 1

    def flood(self, sales: Iterator[Sale], at_once: int, until: Callable[[], bool]) -> None:
        """Send sales, `at_once` of them, without waiting for answers, and once more each time that one comes; none is
        sent twice because it got none.
        """
        room, stub = threading.Semaphore(at_once), self._stubs[0]

        def answered(sale: Sale, call: Any) -> None:
            try:
                self._acknowledged(sale, call.result())
            except grpc.RpcError as error:
                self._not_acknowledged(sale, error.code(), _status(error))
            finally:
                room.release()

        for sale in sales:
            if until() or self._tills.give_up.is_set():
                break
            room.acquire()
            call = stub.CreatePurchase.future(to_request(sale), timeout=ATTEMPT_TIMEOUT_S)
            call.add_done_callback(functools.partial(answered, sale))
        for _ in range(at_once):
            room.acquire()

    def _upload(self) -> int:
        """The backlog of a till that was offline, some of it sent before."""
        sales = [self.sale() for _ in range(self._random.randint(2, 25))]
        for sale in sales:
            self._ledger.sale_sent(sale)
        left = {sale.number: sale for sale in sales}
        while left and not self._tills.give_up.is_set():
            message = UploadPurchasesRequest()
            for sale in left.values():
                upload = message.uploads.add(sequence_number=sale.number)
                upload.create_purchase.CopyFrom(to_request(sale))
            try:
                stub = self._random.choice(self._stubs)
                for response in stub.UploadPurchases(iter([message]), timeout=2 * ATTEMPT_TIMEOUT_S):
                    for result in response.results:
                        sale = left[result.sequence_number]
                        if result.WhichOneof("outcome") == "created":
                            outcome: str | None = self._acknowledged(sale, result.created)
                        else:
                            outcome = self._not_acknowledged(sale, _code(result.error.code), result.error)
                        if outcome:
                            del left[sale.number]
            except grpc.RpcError as error:
                for sale in list(left.values()):
                    if self._not_acknowledged(sale, error.code(), _status(error)):
                        del left[sale.number]
            if left:
                self._wait()
        return len(sales)

    def _offline(self) -> int:
        """A till with a journal of its own, that was offline: what is on its disk is stored, each once, and the service
        says that none of it is missing.
        """
        recorded = self._journal.record([self.sale() for _ in range(self._random.randint(1, 10))])
        for sale in recorded:
            self._ledger.sale_sent(sale)
        while not self._tills.give_up.is_set() and not self._journal.flush(self._random):
            for sale in recorded:
                self._ledger.sale_unknown(sale, "in the journal")
            self._wait()
        for sale, state, told in self._journal.settled(recorded):
            if state is State.STORED:
                self.answers += 1
                self._ledger.sale_ok(sale, told, "")
            elif state is State.REFUSED:
                self.answers += 1
                self._ledger.sale_refused(sale, told.partition(":")[0])
        if (missing := self._journal.missing(self._random)) is not None:
            self._ledger.write("wrong", number=recorded[0].number, why=f"the service lacks of the journal {missing}")
        return len(recorded)

    def _repeat(self) -> int:
        """A sale that was acknowledged long ago, sent again as it was: its answer must be the same."""
        if self._done:
            self.deliver(self._random.choice(self._done), again=True)
        return 1

    def _twins(self) -> int:
        """The same sale at both services in the same moment."""
        sale = self.sale()
        self._ledger.sale_sent(sale)
        both = self._stubs if len(self._stubs) > 1 else 2 * self._stubs
        list(self._both.map(lambda stub: self._call(sale, [stub], random.Random(sale.key)), both))
        return 1

    def _contradict(self) -> int:
        """Another sale under a key that is taken; now and then both at the same moment."""
        if self._random.random() < 0.5 and self._done:
            self.deliver(self.sale(key=self._random.choice(self._done).key))
        else:
            first = self.sale()
            self._deliver_both(first, self.sale(key=first.key))
        return 1

    def _take_a_receipt_twice(self) -> int:
        """A receipt number that is taken; the till corrects it and keeps the key."""
        if self._done:
            taken = self._random.choice(self._done)
            sale = self.sale(receipt_id=taken.receipt_id, time_us=taken.time_us)
            if self.deliver(sale) == "refused":
                self.deliver(sale._replace(number=self._numbers.next(), receipt_id=self._receipt()))
        return 1

    def _rivals(self) -> int:
        """Two sales under one receipt number at the same moment: one gets it."""
        first = self.sale()
        self._deliver_both(first, self.sale(receipt_id=first.receipt_id, time_us=first.time_us))
        return 2

    def _unknown_customer(self) -> int:
        """A customer that nobody has registered; then with registration, under the same key."""
        sale = self.sale()._replace(customer_id=self._uuid(), register=False)
        if self.deliver(sale) == "refused":
            sale = sale._replace(number=self._numbers.next(), register=True)
            if self.deliver(sale) == "ok":
                self._read_own_write(sale)
        return 1

    def _read_own_write(self, sale: Sale) -> None:
        """The customer's only sale: with its token, analytics tells it or says that it cannot yet."""
        request = GetCustomerLoyaltyRequest(customer_id=sale.customer_id or "", consistency_token=self._token)
        try:
            answer = self._analytics.GetCustomerLoyalty(request, timeout=ATTEMPT_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() not in TRY_AGAIN:
                why = f"read with its token: {error.code().name} {_reason(_status(error))}"
                self._ledger.write("wrong", number=sale.number, why=why)
            return
        if answer.loyal_customer.purchase_count != 1:
            why = f"read with its token: {answer.loyal_customer.purchase_count} purchases of its customer"
            self._ledger.write("wrong", number=sale.number, why=why)

    def _from_the_future(self) -> int:
        """A clock that is an hour ahead: refused. Four minutes ahead: taken."""
        ahead_us = self._random.choice([HOUR_US, 4 * HOUR_US // 60])
        self.deliver(self.sale(time_us=self._clock.now_us() + ahead_us))
        return 1

    # --- how ---

    def sale(self, key: str | None = None, receipt_id: str | None = None, time_us: int | None = None) -> Sale:
        chance = self._random
        customer = None
        if chance.random() < 0.5:
            customer = str(uuid.UUID(int=random.Random(f"customer {chance.randrange(CUSTOMERS)}").getrandbits(128)))
        products = chance.sample(range(1, PRODUCTS + 1), chance.choice([1, 1, 2, 3, 5, 8]))
        items = tuple((product, chance.choice([chance.randrange(1, 2_000), 115, 890, 1999])) for product in products)
        return Sale(
            number=self._numbers.next(),
            key=key or self._uuid(),
            receipt_id=receipt_id or self._receipt(),
            branch_id=self._branch,
            cashier_id=chance.randrange(1, 30),
            pos_id=self._pos,
            customer_id=customer,
            time_us=time_us if time_us is not None else self._time_us(),
            items=items,
            register=customer is not None,
        )

    def _time_us(self) -> int:
        """Mostly now, some of the last weeks; a few as old as a fault wants to have them."""
        now, kind = self._clock.now_us(), self._random.random()
        if kind < 0.08 and self._tills.ages_us:
            return now - self._random.choice(self._tills.ages_us) - self._random.randrange(DAY_US)
        if kind < 0.70:
            return now - self._random.randrange(2_000_000)
        return now - self._random.randrange(40 * DAY_US)

    def _receipt(self) -> str:
        self._receipts += 1
        return f"{self._seed.partition('/till')[0]}/{self._receipts}"

    def _uuid(self) -> str:
        return str(uuid.UUID(int=self._random.getrandbits(128), version=4))

    def deliver(self, sale: Sale, *, again: bool = False) -> str:
        """Send until there is an answer; "ok", "refused", "wrong", or "unknown" when this till will never know."""
        if not again:
            self._ledger.sale_sent(sale)
        return self._call(sale, self._stubs, self._random)

    def _deliver_both(self, first: Sale, second: Sale) -> None:
        for sale in (first, second):
            self._ledger.sale_sent(sale)
        pairs = zip((first, second), itertools.cycle(self._stubs), strict=False)
        list(self._both.map(lambda pair: self._call(pair[0], [pair[1]], random.Random(pair[0].number)), pairs))

    def _call(self, sale: Sale, stubs: Sequence[Any], chance: random.Random) -> str:
        request = to_request(sale)
        while True:
            try:
                response = chance.choice(stubs).CreatePurchase(request, timeout=ATTEMPT_TIMEOUT_S)
            except grpc.RpcError as error:
                outcome = self._not_acknowledged(sale, error.code(), _status(error))
            else:
                outcome = self._acknowledged(sale, response)
            if outcome:
                return outcome
            if self._tills.give_up.is_set() or chance.random() < FORGETFUL:
                return "unknown"
            self._wait(chance)

    def _wait(self, chance: random.Random | None = None) -> None:
        self._tills.give_up.wait((chance or self._random).uniform(*PAUSE_S))

    def _acknowledged(self, sale: Sale, response: CreatePurchaseResponse) -> str:
        if (problem := difference(sale, response)) is not None:
            self._ledger.write("wrong", number=sale.number, why=f"acknowledged with {problem}")
            return "wrong"
        self.answers += 1
        self._token = response.consistency_token
        self._ledger.sale_ok(sale, response.purchase.purchase_id, response.consistency_token)
        if len(self._done) < REMEMBERED:
            self._done.append(sale)
        else:
            self._done[self._random.randrange(REMEMBERED)] = sale
        return "ok"

    def _not_acknowledged(self, sale: Sale, code: grpc.StatusCode, status: status_pb2.Status) -> str | None:
        """What an error says of the sale: None when nothing, and it has to be sent again."""
        reason = _reason(status)
        if code in TRY_AGAIN and reason != TIME_AHEAD:
            self._ledger.sale_unknown(sale, f"{code.name} {reason}")
            return None
        if code in REFUSALS or reason == TIME_AHEAD:  # for that time, no till here has the patience
            self.answers += 1
            self._ledger.sale_refused(sale, reason)
            return "refused"
        self._ledger.write("wrong", number=sale.number, why=f"{code.name} {reason}: {status.message[:200]}")
        return "wrong"


def branch_of(till: int) -> int:
    return till % BRANCHES + 1


def to_request(sale: Sale) -> CreatePurchaseRequest:
    request = CreatePurchaseRequest(idempotency_key=sale.key, register_customer=sale.register)
    purchase = request.purchase
    purchase.receipt_id, purchase.branch_id, purchase.cashier_id = sale.receipt_id, sale.branch_id, sale.cashier_id
    purchase.pos_id = sale.pos_id
    if sale.customer_id:
        purchase.customer_id = sale.customer_id
    purchase.purchase_time.seconds, micros = divmod(sale.time_us, 1_000_000)
    purchase.purchase_time.nanos = micros * 1000
    for product, cents in sale.items:
        purchase.items.add(product_id=product, quantity=1).unit_price.value = f"{cents // 100}.{cents % 100:02}"
    return request


def difference(sale: Sale, response: CreatePurchaseResponse) -> str | None:
    """What the acknowledged purchase says otherwise than the sale; None when nothing."""
    sent, stored = to_request(sale).purchase, response.purchase
    for name in ("receipt_id", "branch_id", "cashier_id", "pos_id", "customer_id", "purchase_time"):
        if getattr(sent, name) != getattr(stored, name):
            return f"{name} {getattr(stored, name)!r}"
    items = sorted((item.product_id, item.unit_price.value) for item in sent.items)
    if items != sorted((item.product_id, item.unit_price.value) for item in stored.items):
        return "other items"
    if stored.total_amount.value != f"{sale.cents // 100}.{sale.cents % 100:02}":
        return f"total_amount {stored.total_amount.value}"
    return None


def _status(error: grpc.RpcError) -> status_pb2.Status:
    metadata: Any = error.trailing_metadata() or ()
    details = dict(metadata).get("grpc-status-details-bin", b"")
    status = status_pb2.Status.FromString(details)
    status.message = status.message or error.details() or ""
    return status


def _reason(status: status_pb2.Status) -> str:
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            return str(info.reason)
    return ""


def _code(number: int) -> grpc.StatusCode:
    return next(code for code in grpc.StatusCode if code.value[0] == number)
