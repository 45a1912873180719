"""The four processes with certificates, and everybody who may come along."""

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.certificates import Authority, Pair
from deploy.local.machine import wait_until
from tests.integration.conftest import free_address
from tests.integration.processes import COMMANDS, START_TIMEOUT_S, Processes

DOMAIN = "spiffe://retail.example"
ISSUER = "https://login.retail.example"
BANNED = (
    "/branch/1/till/POS-9",
    "/branch/1/manager/ben",
    "/reader/gone",
    "/operator/gone",
    "/service/gone",
    f"{ISSUER}#gone",
)


class Backbone(Processes):
    """Each process has the certificate of a service; anybody's channel is opened by `channel`."""

    def __init__(self, purchases_url: str, analytics_url: str, amqp_url: str, directory: Path) -> None:
        super().__init__(purchases_url, analytics_url, amqp_url, directory)
        self.tokens_address = {name: free_address() for name in COMMANDS}
        self.authority, self.stranger = Authority.new(), Authority.new("somebody else's CA")
        self.directory, self._channels = directory, list[grpc.Channel]()
        self.bans = directory / "banned"
        self.ban(*BANNED)
        (directory / "ca.pem").write_bytes(self.authority.pair.certificate)
        for name in COMMANDS:
            self.authority.issue(f"{DOMAIN}/service/{name}", hosts=["localhost", "127.0.0.1"]).write(directory, name)
        self.issuer = Issuer(directory / "jwks.json")
        self.environ |= self.issuer.environ
        self.environ |= {"TLS_CA_FILE": str(directory / "ca.pem"), "TLS_BANNED_FILE": str(self.bans)}

    def start(self, name: str) -> None:
        self.environ |= {
            "TLS_CERTIFICATE_FILE": str(self.directory / f"{name}.pem"),
            "TLS_KEY_FILE": str(self.directory / f"{name}-key.pem"),
            "JWT_LISTEN": self.tokens_address[name],
        }
        super().start(name)

    def wait_ready(self, name: str) -> None:
        with self.channel(name, self.certificate("/operator/ready")) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)

            def ready() -> bool:
                try:
                    reply = health.Check(health_pb2.HealthCheckRequest(), timeout=5)
                except grpc.RpcError:
                    return False
                return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

            assert wait_until(ready, START_TIMEOUT_S), f"{name} is not up: {self.log(name)[-2000:]}"

    def ban(self, *paths: str) -> None:
        new = self.bans.with_suffix(".new")
        new.write_text("# lost or stolen\n" + "".join(f"{_uri(path)}  # by hand\n" for path in paths))
        new.replace(self.bans)

    def certificate(self, *paths: str) -> Pair:
        return self.authority.issue(*map(_uri, paths))

    def channel(self, process: str, pair: Pair | None, *, for_tokens: bool = False) -> grpc.Channel:
        """With a connection of its own."""
        credentials = grpc.ssl_channel_credentials(
            self.authority.pair.certificate, pair.key if pair else None, pair.certificate if pair else None
        )
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 600_000)]
        address = (self.tokens_address if for_tokens else self.address)[process]
        return grpc.secure_channel(address, credentials, options=options)

    def records(self, name: str) -> list[dict[str, Any]]:
        """What a process has put on record about callers."""
        lines = (json.loads(line) for line in self.log(name).splitlines() if line.startswith("{"))
        return [line for line in lines if line.get("audit")]


class Issuer:
    """An identity provider."""

    def __init__(self, keys: Path) -> None:
        self.key, self.other_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        self.keys = keys
        self.publish()
        self.environ = {"JWT_ISSUER": ISSUER, "JWT_AUDIENCE": "backbone", "JWT_KEYS_FILE": str(keys)}

    def publish(self, kid: str = "one") -> None:
        """Its key, by that id, and another that has been there for long."""
        old = ec.generate_private_key(ec.SECP256R1())
        listed = [
            {**json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key())), "kid": name}
            for name, key in ((kid, self.key), ("old", old))
        ]
        new = self.keys.with_suffix(".new")
        new.write_text(json.dumps({"keys": listed}))
        new.replace(self.keys)

    def token(self, role: Any, key: Any = None, algorithm: str = "ES256", kid: str = "one", **claims: Any) -> str:
        """For an hour; a claim that is None is left out."""
        now = int(time.time())
        said = {"iss": ISSUER, "aud": "backbone", "sub": "kim", "iat": now, "exp": now + 3_600, "role": role, **claims}
        said = {name: value for name, value in said.items() if value is not None}
        return jwt.encode(said, key if key is not None else self.key, algorithm, {"kid": kid})

    def secret(self) -> bytes:
        """The public key, taken for the secret of a symmetric algorithm."""
        return self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _uri(path: str) -> str:
    return path if ":" in path else f"{DOMAIN}{path}"


def expired(authority: Authority) -> Pair:
    day = timedelta(days=1)
    return authority.issue(f"{DOMAIN}/operator/kim", begins=datetime.now(UTC) - 2 * day, lasts=day)


def not_yet_valid(authority: Authority) -> Pair:
    return authority.issue(f"{DOMAIN}/operator/kim", begins=datetime.now(UTC) + timedelta(days=1))
