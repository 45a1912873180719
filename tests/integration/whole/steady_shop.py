"""A shop that never closes: `python steady_shop.py PURCHASES ANALYTICS SEED`, until its standard input ends.

A program and not a module of the tests, so that it runs with the client library of whichever release is on the path.
Tills sell one after the other, and the owner asks for the sums; each call has the retries that its client always has,
and no others. In the end it prints what it was told, as JSON.
"""

import json
import sys
import threading
import time

from pos.analytics import AnalyticsClient
from pos.client import PosClient, Sale, connect
from pos.errors import PosError
from pos.simulator import simulate

TILLS = 2
PAUSE_S = 0.04  # between two sales of a till: a busy shop, and room on the machine for what is tested
ASK_EVERY_S = 0.1

_stop = threading.Event()
_lock = threading.Lock()
sold: dict[str, str] = {}  # purchases, by the keys of their sales
asked: list[int] = []  # how many purchases each answer had
failed: list[str] = []
slowest_s = {"sale": 0.0, "question": 0.0}


def main(purchases: str, analytics: str, seed: str) -> None:
    sales = simulate(int(seed), days=14, purchases=200_000)

    def next_sale() -> Sale:
        with _lock:
            return next(sales)

    def sell() -> None:
        with connect(purchases) as channel:
            client = PosClient(channel)
            while not _stop.wait(PAUSE_S):
                sale = next_sale()
                began = time.monotonic()
                try:
                    recorded = client.create_purchase(sale, register_customer=True)
                except PosError as error:
                    failed.append(f"sale: {error}")
                    continue
                note("sale", began)
                with _lock:
                    sold[sale.idempotency_key] = recorded.purchase.purchase_id

    def ask() -> None:
        with connect(analytics) as channel:
            client = AnalyticsClient(channel)
            while not _stop.wait(ASK_EVERY_S):
                began = time.monotonic()
                try:
                    asked.append(client.summary().purchase_count)
                except PosError as error:
                    failed.append(f"question: {error}")
                    continue
                note("question", began)

    threads = [threading.Thread(target=sell) for _ in range(TILLS)] + [threading.Thread(target=ask)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    _stop.set()
    for thread in threads:
        thread.join()
    json.dump({"sold": sold, "asked": asked, "failed": failed, "slowest_s": slowest_s}, sys.stdout)


def note(what: str, began: float) -> None:
    slowest_s[what] = max(slowest_s[what], round(time.monotonic() - began, 2))


if __name__ == "__main__":
    main(*sys.argv[1:])
