"""Rules are read from the contract; what has none is not served. Identities are read strictly."""

import itertools
from collections.abc import Iterable

import pytest
import structlog
from google.protobuf import descriptor_pb2, descriptor_pool
from prometheus_client import REGISTRY

from chassis import grpc_server, identity
from chassis.access import Gate
from chassis.errors import AccessRefused
from chassis.identity import Caller, Certificates
from chassis.rules import RuleMissing, rules_of
from retail.access.v1 import access_pb2
from retail.analytics.v1 import analytics_service_pb2, audit_service_pb2, quarantine_service_pb2
from retail.purchases.v1 import customers_service_pb2, purchases_service_pb2
from retail.relay.v1 import outbox_service_pb2

CONTRACTS = [
    analytics_service_pb2,
    audit_service_pb2,
    quarantine_service_pb2,
    customers_service_pb2,
    purchases_service_pb2,
    outbox_service_pb2,
]
SERVICES = [name.full_name for module in CONTRACTS for name in module.DESCRIPTOR.services_by_name.values()]
PURCHASES = "/retail.purchases.v1.PurchasesService/"
TILL = Caller("spiffe://retail.example/branch/12/till/POS-3", "till", 12, "POS-3")

_numbers = itertools.count(1)


def service(rule: access_pb2.Rule | None, request: str = ".retail.purchases.v1.GetPurchaseRequest") -> str:
    """A service of one method, as a contract would have it."""
    name = f"test_access_{next(_numbers)}"
    file = descriptor_pb2.FileDescriptorProto(name=f"{name}.proto", package=name, syntax="proto3")
    file.dependency.append("retail/purchases/v1/purchases_service.proto")
    method = file.service.add(name="Service").method.add(name="Do", input_type=request, output_type=request)
    if rule is not None:
        method.options.Extensions[access_pb2.rule].CopyFrom(rule)
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
    return f"{name}.Service"


def test_every_method_of_ours_has_a_rule() -> None:
    rules = rules_of(SERVICES)
    assert len(rules) >= 26
    assert all(rule.roles for rule in rules.values())


@pytest.mark.parametrize(
    "rule",
    [
        None,
        access_pb2.Rule(roles=[access_pb2.ROLE_OPERATOR]),
        access_pb2.Rule(roles=[access_pb2.ROLE_UNSPECIFIED], binding=access_pb2.BINDING_ANY),
        # What GetPurchase is asked names no branch and no till, so that nobody could be held to it.
        access_pb2.Rule(roles=[access_pb2.ROLE_TILL], binding=access_pb2.BINDING_NAMES_OWN_BRANCH),
        access_pb2.Rule(roles=[access_pb2.ROLE_TILL], binding=access_pb2.BINDING_NAMES_OWN_TILL),
        access_pb2.Rule(roles=[access_pb2.ROLE_TILL], binding=access_pb2.BINDING_ANY, services=["consumer"]),
    ],
    ids=["none", "no binding", "no role", "no branch to look at", "no till to look at", "a service, but not the role"],
)
async def test_a_server_does_not_start_with_a_method_whose_rule_cannot_be_kept(rule: access_pb2.Rule | None) -> None:
    name = service(rule)
    host = grpc_server.Server("test.retail.example")
    with pytest.raises(RuleMissing, match=f"/{name}/Do"):
        async with host.listening("127.0.0.1:0", [grpc_server.Service(lambda *_: None, None, name)]):
            pass


class Connection:
    """What the gate asks of a call's context."""

    def __init__(self, *uris: str) -> None:
        self._uris = [uri.encode() for uri in uris]

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"peer_uri": self._uris, "x509_pem_cert": [b"-----BEGIN"]}

    def peer(self) -> str:
        return "ipv4:192.0.2.1:40000"


@pytest.mark.parametrize(
    ("uris", "what", "caller"),
    [
        ([], "identity", "ipv4:192.0.2.1:40000"),
        (["spiffe://retail.example/reader/hq"], "role", "spiffe://retail.example/reader/hq"),
        (["spiffe://retail.example/branch/13/till/POS-3"], "branch", "spiffe://retail.example/branch/13/till/POS-3"),
        (["spiffe://retail.example/branch/12/till/POS-4"], "till", "spiffe://retail.example/branch/12/till/POS-4"),
    ],
)
async def test_a_refusal_is_counted_and_on_record(uris: list[str], what: str, caller: str) -> None:
    """And tells the caller the same in every case."""
    rule = rules_of(["retail.purchases.v1.PurchasesService"])[f"{PURCHASES}UploadPurchases"]
    gate, counted = Gate(Certificates("retail.example")), _refusals(what)
    with structlog.testing.capture_logs() as lines, pytest.raises(AccessRefused) as refused:
        gate.check(rule, gate.admit(rule, Connection(*uris)), sales((12, "POS-3")))
    assert refused.value.message in ("it is not known who calls", "this caller is not permitted to do this")
    assert not refused.value.metadata
    assert _refusals(what) == counted + 1
    (line,) = lines
    assert (line["audit"], line["method"], line["caller"], line["what"]) == (True, rule.method, caller, what)


def _refusals(what: str) -> float:
    labels = {"grpc_service": "retail.purchases.v1.PurchasesService", "grpc_method": "UploadPurchases", "what": what}
    return REGISTRY.get_sample_value("grpc_server_access_refused_total", labels) or 0.0


def test_a_rule_without_roles_lets_nobody_in() -> None:
    (rule,) = rules_of([service(access_pb2.Rule(binding=access_pb2.BINDING_ANY))]).values()
    assert not rule.roles


def test_of_services_only_those_that_are_named_are_let_in() -> None:
    roles, binding = [access_pb2.ROLE_SERVICE, access_pb2.ROLE_OPERATOR], access_pb2.BINDING_ANY
    (named,) = rules_of([service(access_pb2.Rule(roles=roles, binding=binding, services=["consumer"]))]).values()
    (every,) = rules_of([service(access_pb2.Rule(roles=roles, binding=binding))]).values()
    of = {
        it: identity.of_uri(f"spiffe://retail.example/service/{it}", "retail.example") for it in ("consumer", "relay")
    }
    operator = identity.of_uri("spiffe://retail.example/operator/relay", "retail.example")
    assert of["consumer"] and of["relay"] and operator
    assert named.permits(of["consumer"]) and named.permits(operator) and not named.permits(of["relay"])
    assert every.permits(of["relay"])


def sales(*tills: tuple[int, str]) -> purchases_service_pb2.UploadPurchasesRequest:
    request = purchases_service_pb2.UploadPurchasesRequest()
    for branch_id, pos_id in tills:
        purchase = request.uploads.add().create_purchase.purchase
        purchase.branch_id, purchase.pos_id = branch_id, pos_id
    return request


@pytest.mark.parametrize(
    ("tills", "overstepped"),
    [
        ([(12, "POS-3"), (12, "POS-3")], ""),
        ([(12, "POS-3"), (13, "POS-3")], "branch"),
        ([(12, "POS-3"), (12, "POS-4")], "till"),
        ([(12, "")], "till"),
        ([(0, "POS-3")], "branch"),
        ([], ""),
    ],
)
def test_every_sale_of_an_upload_is_of_the_callers_own_till(tills: Iterable[tuple[int, str]], overstepped: str) -> None:
    rule = rules_of(["retail.purchases.v1.PurchasesService"])[f"{PURCHASES}UploadPurchases"]
    assert rule.oversteps(TILL, sales(*tills)) == overstepped


@pytest.mark.parametrize(
    ("branch_ids", "overstepped"), [([12], ""), ([12, 12], ""), ([12, 13], "branch"), ([13], "branch"), ([], "branch")]
)
def test_a_list_of_branches_names_the_own_one_only(branch_ids: list[int], overstepped: str) -> None:
    rule = rules_of(["retail.purchases.v1.PurchasesService"])[f"{PURCHASES}ListControlTotals"]
    request = purchases_service_pb2.ListControlTotalsRequest(branch_ids=branch_ids)
    assert rule.oversteps(TILL, request) == overstepped
    assert rule.oversteps(Caller("hq", "reader"), request) == ""


def test_a_branch_that_is_not_given_is_all_of_them() -> None:
    rule = rules_of(["retail.purchases.v1.PurchasesService"])[f"{PURCHASES}ListPurchases"]
    assert rule.oversteps(TILL, purchases_service_pb2.ListPurchasesRequest()) == "branch"
    assert rule.oversteps(TILL, purchases_service_pb2.ListPurchasesRequest(branch_id=12)) == ""


@pytest.mark.parametrize(
    ("path", "overstepped"), [("/service/consumer", ""), ("/service/gateway", "field"), ("/operator/kim", "field")]
)
def test_what_only_one_may_set(path: str, overstepped: str) -> None:
    """Also whom the method lets in; without the field, they may call it. Nor does a token's subject pass for a path."""
    rule = rules_of(["retail.relay.v1.OutboxService"])["/retail.relay.v1.OutboxService/ListCommittedEventIds"]
    caller = identity.of_uri(f"spiffe://retail.example{path}", "retail.example")
    assert caller is not None
    assert rule.oversteps(caller, outbox_service_pb2.ListCommittedEventIdsRequest(acknowledge=True)) == overstepped
    assert rule.oversteps(caller, outbox_service_pb2.ListCommittedEventIdsRequest(after_snapshot="1")) == ""
    token = Caller(f"https://login.example#{path}", "service")
    assert rule.oversteps(token, outbox_service_pb2.ListCommittedEventIdsRequest(acknowledge=True)) == "field"


@pytest.mark.parametrize(
    ("path", "caller"),
    [
        ("/branch/12/till/POS-3", ("till", 12, "POS-3")),
        ("/branch/12/manager/anna", ("manager", 12, None)),
        ("/reader/hq", ("reader", None, None)),
        ("/operator/kim", ("operator", None, None)),
        ("/service/consumer", ("service", None, None)),
        ("/branch/012/till/POS-3", None),
        ("/branch/0/till/POS-3", None),
        ("/branch/-12/till/POS-3", None),
        ("/branch/12/till/", None),
        ("/branch/12/till/..", None),
        ("/branch/12/till/POS-3/", None),
        ("/branch/12/till/POS 3", None),
        ("/branch/12/operator/kim", None),
        ("/branch/12", None),
        ("/till/POS-3", None),
        ("/operator/kim\n", None),
        ("/operator/kim?role=till", None),
        ("/Operator/kim", None),
        ("", None),
    ],
)
def test_an_identity_is_read_strictly(path: str, caller: tuple[str, int | None, str | None] | None) -> None:
    uri = f"spiffe://retail.example{path}"
    expected = caller and Caller(uri, *caller, path=path, service="consumer" if caller[0] == "service" else "")
    assert identity.of_uri(uri, "retail.example") == expected
    assert identity.of_uri(uri, "retail.exampl") is None
    assert identity.of_uri(f"x{uri}", "retail.example") is None


def test_a_certificate_has_exactly_one_uri() -> None:
    certificates = Certificates("retail.example")
    kim, evil = b"spiffe://retail.example/operator/kim", b"spiffe://evil.example/operator/kim"
    assert certificates.caller({"peer_uri": [kim]}) == Caller(kim.decode(), "operator", path="/operator/kim")
    for uris in ([], [kim, kim], [kim, evil], [evil], [b"\xff"]):
        assert certificates.caller({"peer_uri": uris}) is None
    assert certificates.caller({}) is None
