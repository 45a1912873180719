"""`python healthcheck.py [--alive] HOST:PORT`: exit code 0 if the gRPC server there is SERVING. For containers.

With `--alive`, any answer will do: a process whose database is away is not to be restarted. With certificates, HOST is
a name in the server's: that of its container, or localhost."""

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


if __name__ == "__main__":
    credentials = tls.credentials(settings.load(tls.TlsSettings))  # the process's own
    *options, target = sys.argv[1:]
    sys.exit(0 if is_serving(target, credentials, alive=options == ["--alive"]) else 1)
