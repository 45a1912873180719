"""What outsiders rely on stays as it is."""

import json
from decimal import Decimal
from pathlib import Path

import jsonschema
import pytest
from google.protobuf import descriptor_pool

import retail.analytics.v1.analytics_service_pb2
import retail.analytics.v1.audit_service_pb2
import retail.analytics.v1.quarantine_service_pb2
import retail.purchases.v1.customers_service_pb2
import retail.purchases.v1.purchases_service_pb2
import retail.relay.v1.outbox_service_pb2  # noqa: F401

EVENTS = Path(__file__).parent.parent.parent / "proto" / "events"

SERVICES = {
    "retail.purchases.v1.PurchasesService": (
        "CreatePurchase GetPurchase ListPurchases UploadPurchases ListControlTotals ListRecordedDays ReportTill"
        " GetTillState ListIncompleteTills ExportPurchases GetCell"
    ),
    "retail.purchases.v1.CustomersService": "CreateCustomer GetCustomer ListCustomers ListNewCustomers",
    "retail.relay.v1.OutboxService": "GetOutboxStatus ListOutboxEvents RequeueEvents ListCommittedEventIds",
    "retail.analytics.v1.AnalyticsService": (
        "ListDailySales ListProductSales ListTopProducts ListLoyalCustomers GetCustomerLoyalty GetSalesSummary"
        " WatchDailySales"
    ),
    "retail.analytics.v1.QuarantineService": "ListQuarantinedEvents RedriveEvents DiscardEvents",
    "retail.analytics.v1.AuditService": "CompareControlTotals RebuildDay GetAuditStatus",
}


@pytest.mark.parametrize("name", SERVICES)
def test_service_has_its_methods(name: str) -> None:
    """Services and methods keep their names."""
    service = descriptor_pool.Default().FindServiceByName(name)
    assert [method.name for method in service.methods] == SERVICES[name].split()


@pytest.mark.parametrize("name", [s for s in SERVICES if "analytics.v1.Analytics" in s])
def test_every_analytics_answer_says_how_fresh_it_is(name: str) -> None:
    """Requests take a consistency token, responses carry the three marks of freshness."""
    for method in descriptor_pool.Default().FindServiceByName(name).methods:
        assert "consistency_token" in method.input_type.fields_by_name
        assert {"data_as_of_time", "complete_through_time", "quarantined_count"} <= set(
            method.output_type.fields_by_name
        )


def test_golden_example_keeps_the_schema() -> None:
    """The golden event is a valid event."""
    validator = event_validator()
    validator.validate(json.loads((EVENTS / "purchase_created.v1.example.json").read_text(), parse_float=Decimal))


def event_validator() -> jsonschema.protocols.Validator:
    """Amounts are read as decimals on both sides, or 8.9 would be no multiple of 0.01."""
    schema = json.loads((EVENTS / "purchase_created.v1.schema.json").read_text(), parse_float=Decimal)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)
