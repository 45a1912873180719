"""What the analytics service answers, against what was counted: the tables may be right and an answer wrong."""

import datetime
import time
from collections import Counter
from collections.abc import Iterable

import grpc

from retail.analytics.v1.analytics_service_pb2 import GetSalesSummaryRequest, ListDailySalesRequest
from retail.analytics.v1.analytics_service_pb2_grpc import AnalyticsServiceStub
from tests.faults.findings import ALTERED, WRONG_ANSWER, Findings
from tests.faults.identities import READER, Identities
from tests.faults.ledger import Sale

TIMEOUT_S = 20.0
PATIENCE_S = 10.0
PAUSE_S = 0.2


def check_answers(
    identities: Identities, target: str, counted: Iterable[tuple[Sale, datetime.date]], findings: Findings
) -> None:
    """Days, branches and the whole chain, as a client gets them."""
    revenue: Counter[tuple[datetime.date, int]] = Counter()
    purchases: Counter[tuple[datetime.date, int]] = Counter()
    for sale, day in counted:
        revenue[day, sale.branch_id] += sale.cents
        purchases[day, sale.branch_id] += 1
    with identities.channel(target, READER) as channel:
        stub = AnalyticsServiceStub(channel)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                days = _daily_sales(stub)
                chain = stub.GetSalesSummary(GetSalesSummaryRequest(), timeout=TIMEOUT_S)
                break
            except grpc.RpcError as error:
                # Connections that broke while nobody asked are noticed by those who ask next: they ask again.
                if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                    findings.add(WRONG_ANSWER, f"analytics answers {error.code().name}: {error.details()}")
                    return
                time.sleep(PAUSE_S)
    wanted = {key: (_text(cents), purchases[key]) for key, cents in revenue.items()}
    for key in sorted(wanted.keys() | days.keys()):
        if wanted.get(key) != days.get(key):
            findings.add(
                ALTERED, f"ListDailySales says of {key[0]}, branch {key[1]}: {days.get(key)}, not {wanted.get(key)}"
            )
    total = _text(sum(revenue.values())), sum(purchases.values())
    if (chain.revenue.value or "0.00", chain.purchase_count) != total:
        findings.add(ALTERED, f"GetSalesSummary says {chain.revenue.value}, {chain.purchase_count}, not {total}")


def _daily_sales(stub: AnalyticsServiceStub) -> dict[tuple[datetime.date, int], tuple[str, int]]:
    found = {}
    request = ListDailySalesRequest(page_size=1_000)
    while True:
        page = stub.ListDailySales(request, timeout=TIMEOUT_S)
        for row in page.daily_sales:
            day = datetime.date(row.sales_date.year, row.sales_date.month, row.sales_date.day)
            found[day, row.branch_id] = row.revenue.value, row.purchase_count
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


def _text(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02}"
