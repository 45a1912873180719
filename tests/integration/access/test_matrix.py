"""Every method of every process × everybody who may come along, by the contract itself: no method can be forgotten."""

import base64
import hmac
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import jwt
import psycopg

from deploy.certificates import Pair
from retail.access.v1 import access_pb2
from tests.integration.access.backbone import BANNED, DOMAIN, Backbone, expired, not_yet_valid
from tests.integration.access.contract import SERVED, Method, Outcome, methods

ROOT = Path(__file__).parents[3]
NO_CONNECTION, UNKNOWN, DENIED, LET_IN = "no connection", "unauthenticated", "permission denied", "let in"

TEXTS = {
    UNKNOWN: Outcome(grpc.StatusCode.UNAUTHENTICATED, "it is not known who calls", "UNAUTHENTICATED", 1),
    DENIED: Outcome(
        grpc.StatusCode.PERMISSION_DENIED, "this caller is not permitted to do this", "PERMISSION_DENIED", 1
    ),
}


@dataclass(frozen=True)
class Comer:
    """Somebody with a certificate, or with none; `role` is empty for nobody of ours."""

    what: str
    pair: Pair | None
    otherwise: str = LET_IN  # what becomes of all its calls
    role: str = ""
    own_branch: bool = True  # the one that is asked for
    own_till: bool = True
    service: str = ""
    plaintext: bool = False
    for_tokens: bool = False  # comes where no certificate is asked for
    metadata: tuple[tuple[str, str], ...] = ()

    def expected(self, method: Method) -> str:
        if self.otherwise != LET_IN:
            return self.otherwise
        if self.role not in method.roles or (self.service and method.services and self.service not in method.services):
            return DENIED
        of_a_branch = self.role in ("till", "manager")
        named = method.binding in (access_pb2.BINDING_NAMES_OWN_BRANCH, access_pb2.BINDING_NAMES_OWN_TILL)
        if of_a_branch and named and not self.own_branch:
            return DENIED
        if method.binding == access_pb2.BINDING_NAMES_OWN_TILL and not self.own_till:
            return DENIED
        return LET_IN


def comers(chain: Backbone) -> list[Comer]:
    own, issue = chain.certificate, chain.authority.issue
    operator = f"{DOMAIN}/operator/kim"
    return [
        Comer("plaintext", None, NO_CONNECTION, plaintext=True),
        Comer("nothing", None, NO_CONNECTION),
        Comer("made by itself", chain.stranger.pair, NO_CONNECTION),
        Comer("another CA", chain.stranger.issue(operator), NO_CONNECTION),
        Comer("expired", expired(chain.authority), NO_CONNECTION),
        Comer("not yet valid", not_yet_valid(chain.authority), NO_CONNECTION),
        Comer("no SAN", issue(), UNKNOWN),
        Comer("a host's name only", issue(hosts=["operator"]), UNKNOWN),
        Comer("two SANs", own("/operator/kim", "/operator/kim2"), UNKNOWN),
        Comer("the same SAN twice", own("/operator/kim", "/operator/kim"), UNKNOWN),
        Comer("ours and a foreign SAN", own("/operator/kim", "spiffe://evil.example/operator/kim"), UNKNOWN),
        Comer("foreign domain", own("spiffe://evil.example/operator/kim"), UNKNOWN),
        Comer("a longer domain", own("spiffe://retail.example.evil/operator/kim"), UNKNOWN),
        Comer("no SPIFFE", own("https://retail.example/operator/kim"), UNKNOWN),
        Comer("no role's path", own("/admin/kim"), UNKNOWN),
        Comer("a path that goes on", own("/operator/kim/x"), UNKNOWN),
        *(Comer(f"banned: {path}", own(path), UNKNOWN) for path in BANNED),
        Comer("till", own("/branch/1/till/POS-3"), role="till"),
        Comer("till of another branch", own("/branch/2/till/POS-3"), role="till", own_branch=False),
        Comer("till of branch 11", own("/branch/11/till/POS-3"), role="till", own_branch=False),
        Comer("another till", own("/branch/1/till/POS-4"), role="till", own_till=False),
        Comer("manager", own("/branch/1/manager/anna"), role="manager"),
        Comer("manager of another branch", own("/branch/2/manager/anna"), role="manager", own_branch=False),
        Comer("reader", own("/reader/hq"), role="reader"),
        Comer("operator", own("/operator/kim"), role="operator"),
        *(
            Comer(it, own(f"/service/{it}"), role="service", service=it)
            for it in ("purchases", "consumer", "relay", "analytics")
        ),
        *bearers(chain),
    ]


def bearers(chain: Backbone) -> list[Comer]:
    """Who has a token, over the connection of a service that passes it on."""
    issuer, gateway, now = chain.issuer, chain.certificate("/service/gateway"), int(time.time())
    token = issuer.token

    def bearer(what: str, *tokens: str, by: Pair | None = gateway, **more: Any) -> Comer:
        metadata = tuple(("authorization", f"Bearer {token}") for token in tokens)
        return Comer(f"token: {what}", by, metadata=metadata, **{"otherwise": UNKNOWN, **more})

    good = token("operator")
    head, body, signature = good.split(".")
    other_branch: dict[str, Any] = {"otherwise": LET_IN, "role": "manager", "own_branch": False}
    alone: dict[str, Any] = {"by": None, "for_tokens": True}
    return [
        Comer("no token, no certificate", None, UNKNOWN, for_tokens=True),
        Comer("a certificate where none is asked for", chain.certificate("/operator/kim"), UNKNOWN, for_tokens=True),
        bearer("alone: garbage", "x.y.z", **alone),
        bearer("alone: wrong key", token("operator", issuer.other_key), **alone),
        bearer("alone: operator", good, **alone, otherwise=LET_IN, role="operator"),
        bearer("alone: other branch", token("manager", branch_id=2), **alone, **other_branch),
        bearer("none in it", ""),
        bearer("garbage", "x.y.z"),
        bearer("a long one", "x" * 6_000),
        bearer("not signed", f"{head}.{body}."),
        bearer("cut", good[:-4]),
        bearer("another body", f"{head}.{token('operator', sub='lee').split('.')[1]}.{signature}"),
        bearer("alg none", jwt.encode({**_claims(good)}, None, "none", {"kid": "one"})),  # type: ignore[arg-type]
        bearer("HS256 with the public key", _symmetric(issuer.secret(), _claims(good))),
        bearer("wrong key", token("operator", issuer.other_key)),
        bearer("unknown kid", token("operator", kid="two")),
        bearer("no kid", jwt.encode(_claims(good), issuer.key, "ES256")),
        bearer("wrong audience", token("operator", aud="payroll")),
        bearer("wrong issuer", token("operator", iss="https://login.evil.example")),
        bearer("expired", token("operator", exp=now - 60)),
        bearer("future", token("operator", nbf=now + 600)),
        bearer("made in the future", token("operator", iat=now + 600)),
        *(bearer(f"without {claim}", token("operator", **_without(claim))) for claim in ("exp", "iss", "aud", "sub")),
        bearer("without a role", token(None)),
        bearer("of no role of ours", token("admin")),
        bearer("of two roles", token(["operator", "reader"])),
        bearer("till", token("till", branch_id=1)),
        bearer("manager of no branch", token("manager")),
        *(bearer(f"branch {it!r}", token("manager", branch_id=it)) for it in (0, -1, True, "x", 1.5, [1], 2**40)),
        bearer("banned", token("operator", sub="gone")),
        bearer("two of them", good, good),
        Comer("token: as Basic", gateway, UNKNOWN, metadata=(("authorization", "Basic a2ltOmtpbQ=="),)),
        bearer("brought by who is banned", good, by=chain.certificate("/operator/gone")),
        bearer("brought by nobody of ours", good, by=chain.certificate("/operator/kim", "/operator/lee")),
        bearer("brought by another CA", good, by=chain.stranger.pair, otherwise=NO_CONNECTION),
        bearer("manager", token("manager", branch_id=1), otherwise=LET_IN, role="manager"),
        bearer("branch as text", token("manager", branch_id="1"), otherwise=LET_IN, role="manager"),
        bearer("other branch", token("manager", branch_id=2), **other_branch),
        bearer("reader", token(["staff", "reader"]), otherwise=LET_IN, role="reader"),
        bearer("operator", good, otherwise=LET_IN, role="operator"),
        *(
            bearer(f"service {it}", token("service", sub=it), otherwise=LET_IN, role="service", service=it)
            for it in ("consumer", "gateway")
        ),
    ]


def _without(claim: str) -> dict[str, Any]:
    return {claim: None}


def _claims(token: str) -> dict[str, Any]:
    claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return claims


def _symmetric(secret: bytes, claims: dict[str, Any]) -> str:
    """By hand: the library makes no such token."""

    def part(content: bytes) -> bytes:
        return base64.urlsafe_b64encode(content).rstrip(b"=")

    head = json.dumps({"alg": "HS256", "kid": "one"}).encode()
    signed = part(head) + b"." + part(json.dumps(claims).encode())
    return (signed + b"." + part(hmac.digest(secret, signed, "sha256"))).decode()


def test_every_file_of_the_contract_is_looked_at() -> None:
    """Also one that is new."""
    served = {file.DESCRIPTOR.name for files in SERVED.values() for file in files}
    assert served == {str(path.relative_to(ROOT / "proto")) for path in (ROOT / "proto").rglob("*_service.proto")}


def test_what_is_found_in_the_own_branch_only_is_tested_by_name() -> None:
    """For whoever adds one: the rule promises what the handler has to do. See test_objects."""
    found = {m.descriptor.name for m in methods() if m.binding == access_pb2.BINDING_FINDS_OWN_BRANCH}
    assert found == {"GetPurchase"}


def test_no_method_has_a_hole(chain_with_certificates: Backbone, purchases_url: str) -> None:
    """Nobody gets further than the contract says, nor less far; every refusal says the same."""
    chain, holes, calls = chain_with_certificates, [], 0
    for comer in comers(chain):
        for process in SERVED:
            if comer.plaintext:
                channel = grpc.insecure_channel(chain.address[process])
            else:
                channel = chain.channel(process, comer.pair, for_tokens=comer.for_tokens)
            with channel:
                for method in methods():
                    if method.process != process:
                        continue
                    calls += 1
                    outcome = method.call(channel, method.request(), metadata=comer.metadata)
                    if (found := _found(outcome)) != (expected := comer.expected(method)):
                        holes.append(f"{comer.what} → {method}: {found} instead of {expected} ({outcome})")
    assert not holes, f"{len(holes)} of {calls}:\n" + "\n".join(holes)
    assert calls == len(comers(chain)) * len(methods()) > 1_000
    with psycopg.connect(purchases_url) as connection:
        assert connection.execute("SELECT count(*) FROM purchases").fetchone() == (0,)


def _found(outcome: Outcome) -> str:
    for name, expected in TEXTS.items():
        if outcome.code == expected.code:
            return name if outcome == expected else f"{name}, in other words"
    if outcome.code == grpc.StatusCode.UNAVAILABLE and not outcome.reason:
        return NO_CONNECTION
    if outcome.code == grpc.StatusCode.OK or outcome.reason:
        return LET_IN
    return f"neither answered nor refused: {outcome}"
