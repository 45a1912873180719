"""`python healthcheck.py [--alive] HOST:PORT`: exit code 0 if the gRPC server there is SERVING. For containers.

The pages are asked as https://HOST:PORT.

With `--alive`, any answer will do: a process whose database is away is not to be restarted. With certificates, HOST is
a name in the server's: that of its container, or localhost."""

import http.client
import ssl
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chassis import grpc_client, settings, tls

TIMEOUT_S = 2.0


def is_serving(target: str, credentials: tls.Credentials | None = None, *, alive: bool = False) -> bool:
    """Whether it is; with `alive`, whether it answers at all."""
    with grpc_client.connect_blocking(target, credentials) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)  # type: ignore[attr-defined]
        except grpc.RpcError:
            return False
    return alive or bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def are_served(address: str, ca_file: str) -> bool:
    """Whether the pages are."""
    trusted = ssl.create_default_context(cafile=ca_file or None)
    try:
        connection = http.client.HTTPSConnection(address, timeout=TIMEOUT_S, context=trusted)
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except OSError:
        return False


if __name__ == "__main__":
    own = settings.load(tls.TlsSettings)  # the process's
    *options, target = sys.argv[1:]
    if target.startswith("https://"):
        sys.exit(0 if are_served(target.removeprefix("https://"), own.ca_file) else 1)
    sys.exit(0 if is_serving(target, tls.credentials(own), alive=options == ["--alive"]) else 1)
