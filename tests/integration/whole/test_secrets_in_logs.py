"""Each layer of each process fails while passwords and customers are at hand; the logs have neither."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import pika
import psycopg
import pytest
from google.type import date_pb2

from deploy.local.machine import wait_until
from retail.analytics.v1 import analytics_service_pb2, audit_service_pb2, quarantine_service_pb2
from retail.analytics.v1.analytics_service_pb2_grpc import AnalyticsServiceStub
from retail.analytics.v1.audit_service_pb2_grpc import AuditServiceStub
from retail.analytics.v1.quarantine_service_pb2_grpc import QuarantineServiceStub
from retail.purchases.v1 import customers_service_pb2, purchases_service_pb2
from retail.purchases.v1.customers_service_pb2_grpc import CustomersServiceStub
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from retail.relay.v1 import outbox_service_pb2
from retail.relay.v1.outbox_service_pb2_grpc import OutboxServiceStub
from tests.integration.processes import COMMANDS, Processes
from tests.integration.purchase_events import sold
from tests.integration.purchases.test_upload_purchases import message
from tests.integration.sales import sale

PASSWORD = "s3cr3t-pa55word"
CUSTOMER = str(uuid.uuid4())
LOGIN = f"secretive_{os.getpid()}"
PATIENCE_S = 60.0
FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
DAY = date_pb2.Date(year=2026, month=3, day=1)


@pytest.fixture
def secretive(postgres_url: str) -> Iterator[str]:
    """A login that may be everything that a process is."""
    groups = "purchases_service, purchases_relay, analytics_consumer, analytics_server"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {LOGIN} LOGIN PASSWORD '{PASSWORD}' IN ROLE {groups}")
        yield LOGIN
        connection.execute(f"DROP ROLE {LOGIN}")


@pytest.fixture
def processes(
    purchases_db: str, analytics_db: str, amqp_url: str, secretive: str, tmp_path: Path
) -> Iterator[Processes]:
    purchases, analytics = (
        urlsplit(url)._replace(netloc=f"{secretive}:{PASSWORD}@{urlsplit(url).netloc.rpartition('@')[2]}").geturl()
        for url in (purchases_db, analytics_db)
    )
    with Processes.all_running(purchases, analytics, amqp_url, tmp_path) as running:
        yield running


def take_away_all_rights(url: str, *roles: str) -> None:
    """From now on whatever a process does with its database fails, in a way that nobody has foreseen."""
    with psycopg.connect(url, autocommit=True) as connection:
        for kind in ("TABLES", "SEQUENCES"):
            connection.execute(f"REVOKE ALL ON ALL {kind} IN SCHEMA public FROM {', '.join(roles)}")


def ask(method: Any, request: Any) -> grpc.StatusCode:
    """How a call ends, whatever it is."""
    try:
        replies = method(request, timeout=5)
        for _ in replies if hasattr(replies, "initial_metadata") else ():
            pass
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def ask_everything(processes: Processes) -> dict[str, list[grpc.StatusCode]]:
    """Every method of every process, with a customer wherever one can be named."""
    answers: dict[str, list[grpc.StatusCode]] = {}
    days = {"first_date": DAY, "last_date": DAY}
    uuids = str(uuid.uuid4())
    with (
        grpc.insecure_channel(processes.address["purchases"]) as purchases,
        grpc.insecure_channel(processes.address["analytics"]) as analytics,
        grpc.insecure_channel(processes.address["consumer"]) as consumer,
        grpc.insecure_channel(processes.address["relay"]) as relay,
    ):
        tills, desk = PurchasesServiceStub(purchases), CustomersServiceStub(purchases)
        owner, auditor = AnalyticsServiceStub(analytics), AuditServiceStub(consumer)
        quarantine, outbox = QuarantineServiceStub(consumer), OutboxServiceStub(relay)
        p, a = purchases_service_pb2, analytics_service_pb2
        with_customer = sale(customer_id=CUSTOMER, register_customer=True)
        answers["purchases"] = [
            ask(tills.CreatePurchase, with_customer),
            ask(tills.CreatePurchase, sale(customer_id=CUSTOMER)),
            ask(tills.UploadPurchases, iter([message(0, [sale(customer_id=CUSTOMER, register_customer=True)])])),
            ask(tills.GetPurchase, p.GetPurchaseRequest(purchase_id=uuids)),
            ask(tills.ListPurchases, p.ListPurchasesRequest(customer_id=CUSTOMER)),
            ask(tills.ListControlTotals, p.ListControlTotalsRequest(**days)),
            ask(tills.ExportPurchases, p.ExportPurchasesRequest(**days, customer_ids=[CUSTOMER])),
            ask(desk.CreateCustomer, customers_service_pb2.CreateCustomerRequest(customer_id=CUSTOMER)),
            ask(desk.GetCustomer, customers_service_pb2.GetCustomerRequest(customer_id=CUSTOMER)),
            ask(desk.ListCustomers, customers_service_pb2.ListCustomersRequest()),
        ]
        answers["analytics"] = [
            ask(owner.GetSalesSummary, a.GetSalesSummaryRequest()),
            ask(owner.ListDailySales, a.ListDailySalesRequest()),
            ask(owner.ListLoyalCustomers, a.ListLoyalCustomersRequest()),
            ask(owner.GetCustomerLoyalty, a.GetCustomerLoyaltyRequest(customer_id=CUSTOMER)),
        ]
        answers["consumer"] = [
            ask(auditor.GetAuditStatus, audit_service_pb2.GetAuditStatusRequest()),
            ask(auditor.RebuildDay, audit_service_pb2.RebuildDayRequest(sales_date=DAY)),
            ask(quarantine.ListQuarantinedEvents, quarantine_service_pb2.ListQuarantinedEventsRequest()),
            ask(quarantine.RedriveEvents, quarantine_service_pb2.RedriveEventsRequest(quarantine_ids=[uuids])),
        ]
        answers["relay"] = [
            ask(outbox.GetOutboxStatus, outbox_service_pb2.GetOutboxStatusRequest()),
            ask(outbox.ListOutboxEvents, outbox_service_pb2.ListOutboxEventsRequest()),
            ask(outbox.RequeueEvents, outbox_service_pb2.RequeueEventsRequest(event_ids=[uuids])),
            ask(outbox.ListCommittedEventIds, outbox_service_pb2.ListCommittedEventIdsRequest()),
        ]
    return answers


def test_no_log_has_a_password_or_a_customer(
    processes: Processes, purchases_db: str, analytics_db: str, amqp_url: str
) -> None:
    """Neither while all is well, nor when customers are refused, nor when every layer fails with all of it at hand."""

    def publish(**changes: Any) -> None:
        with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
            body = sold(customer_id=CUSTOMER).body(**changes)
            connection.channel().basic_publish("purchases", "purchases.created", body)

    with grpc.insecure_channel(processes.address["purchases"]) as channel:
        assert ask(PurchasesServiceStub(channel).CreatePurchase, sale(customer_id=CUSTOMER)) is FAILED_PRECONDITION
        get = CustomersServiceStub(channel).GetCustomer
        assert ask(get, customers_service_pb2.GetCustomerRequest(customer_id=CUSTOMER)) is grpc.StatusCode.NOT_FOUND
    ask_everything(processes)
    publish(total_amount="nothing")
    take_away_all_rights(purchases_db, "purchases_service", "purchases_relay")
    take_away_all_rights(analytics_db, "analytics_consumer", "analytics_server")
    publish()
    answers = ask_everything(processes)
    for name in COMMANDS:
        assert wait_until(lambda name=name: "permission denied" in processes.log(name), PATIENCE_S), name  # type: ignore[misc]
    assert {code for name in answers for code in answers[name]} >= {grpc.StatusCode.INTERNAL}, answers
    for name in COMMANDS:
        assert PASSWORD not in processes.log(name), name
        assert CUSTOMER not in processes.log(name), name
        assert f":{urlsplit(amqp_url).password}@" not in processes.log(name), name
