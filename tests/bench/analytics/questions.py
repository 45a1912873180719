"""What is asked: each question as a request, and as the same question in SQL to the tables of purchases."""

import datetime
import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from google.protobuf.message import Message
from google.type.date_pb2 import Date

from retail.analytics.v1 import analytics_service_pb2 as pb
from tests.bench.analytics.years import BRANCHES, DAY

SERVICE = "/retail.analytics.v1.AnalyticsService/"
RANGE_DAYS = 11


class Question(NamedTuple):
    """An RPC, for the last days, for all time, or as it knows no time."""

    name: str  # in the report, where the growth with the history is meant
    rpc: str
    oltp_name: str  # … and where read models are compared with the tables of purchases: of all time, if not said
    request: Callable[[], Message]  # another one each time, where there is something to choose
    sql: str
    parameters: Mapping[str, Any]


def questions(last: datetime.date, customers: list[str]) -> list[Question]:
    """Ranges end on `last`, the last day of the history."""
    first = last - (RANGE_DAYS - 1) * DAY
    days = {"first_date": date(first), "last_date": date(last)}
    random_branch = random.Random(1)
    some_customers = random.Random(2)

    def branch() -> int:
        return random_branch.randint(1, BRANCHES)

    in_days = "purchase_time >= %(first)s AND purchase_time < %(next)s"
    parameters = {"first": first, "next": last + DAY, "branch_id": 7, "customer_id": customers[0]}
    top = """
        SELECT product_id, sum(qty), sum(line_total) FROM purchase_items WHERE {} GROUP BY product_id
        ORDER BY 2 DESC, 1 LIMIT 10
        """
    summary = """
        SELECT sum(total_amount), sum(item_count), count(*), count(DISTINCT customer_id) FROM purchases WHERE {}
        """
    listed: list[tuple[str, str, str, Callable[[], Message], str]] = [
        (
            "ListDailySales",
            "ListDailySales",
            "ListDailySales",
            lambda: pb.ListDailySalesRequest(**days),
            f"""
            SELECT business_day, branch_id, sum(total_amount), sum(item_count), count(*),
                count(customer_id)
            FROM purchases WHERE {in_days} GROUP BY 1, 2 ORDER BY 1, 2 LIMIT 500
            """,
        ),
        (
            "ListProductSales",
            "ListProductSales",
            "ListProductSales",
            lambda: pb.ListProductSalesRequest(branch_ids=[branch()], **days),
            f"""
            SELECT business_day, branch_id, product_id, sum(qty), sum(line_total)
            FROM purchases JOIN purchase_items USING (purchase_id, purchase_time)
            WHERE {in_days} AND branch_id = %(branch_id)s GROUP BY 1, 2, 3 ORDER BY 1, 2, 3 LIMIT 500
            """,
        ),
        (
            "ListTopProducts",
            "ListTopProducts",
            "ListTopProducts_11_days",
            lambda: pb.ListTopProductsRequest(**days),
            top.format(in_days),
        ),
        (
            "ListTopProducts_all_time",
            "ListTopProducts",
            "ListTopProducts",
            pb.ListTopProductsRequest,
            top.format("true"),
        ),
        (
            "ListLoyalCustomers",
            "ListLoyalCustomers",
            "ListLoyalCustomers",
            lambda: pb.ListLoyalCustomersRequest(min_purchase_count=2),  # fills a page with any history
            """
            SELECT customer_id, count(*), max(purchase_time) FROM purchases WHERE customer_id IS NOT NULL
            GROUP BY customer_id HAVING count(*) >= 2 ORDER BY 2 DESC, 1 LIMIT 50
            """,
        ),
        (
            "GetCustomerLoyalty",
            "GetCustomerLoyalty",
            "GetCustomerLoyalty",
            lambda: pb.GetCustomerLoyaltyRequest(customer_id=some_customers.choice(customers)),
            """
            SELECT branch_id, count(*), max(purchase_time) FROM purchases WHERE customer_id = %(customer_id)s
            GROUP BY branch_id ORDER BY branch_id
            """,
        ),
        (
            "GetSalesSummary",
            "GetSalesSummary",
            "GetSalesSummary_11_days",
            lambda: pb.GetSalesSummaryRequest(**days),
            summary.format(in_days),
        ),
        (
            "GetSalesSummary_all_time",
            "GetSalesSummary",
            "GetSalesSummary",
            pb.GetSalesSummaryRequest,
            summary.format("true"),
        ),
    ]
    return [Question(*each, parameters) for each in listed]


def different_summaries(count: int, first: datetime.date, last: datetime.date) -> list[bytes]:
    """Summaries of so many different ranges, most of them of one branch, serialized."""
    chance = random.Random(3)
    span = (last - first).days
    seen: dict[bytes, None] = {}
    while len(seen) < count:
        start, end = sorted(first + chance.randint(0, span) * DAY for _ in range(2))
        branch_id = chance.randint(1, BRANCHES) if chance.random() < 0.8 else None
        request = pb.GetSalesSummaryRequest(branch_id=branch_id, first_date=date(start), last_date=date(end))
        seen[request.SerializeToString()] = None
    return list(seen)


def date(day: datetime.date) -> Date:
    return Date(year=day.year, month=day.month, day=day.day)
