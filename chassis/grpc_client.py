"""How a process of ours asks another one: a channel that notices when its peer is gone, and soon when it is back."""

from typing import Any

import grpc

from chassis.grpc_server import REPLY_BYTES_MAX

OPTIONS: list[tuple[str, Any]] = [
    ("grpc.service_config_disable_resolution", 1),  # DNS must not replace what we are given
    ("grpc.max_receive_message_length", REPLY_BYTES_MAX),
    ("grpc.keepalive_time_ms", 30_000),  # servers allow a ping every 20 s; some calls have no deadline
    ("grpc.keepalive_timeout_ms", 10_000),
    # Between two attempts to connect every call fails at once, though the peer may be back: gRPC's own pauses grow to
    # two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),  # time given to one attempt to connect
    ("grpc.max_reconnect_backoff_ms", 1_000),
]


def connect(target: str, service_config: str) -> grpc.aio.Channel:
    """A channel to `host:port`, which need not be up yet; `service_config` is the JSON that the contract has for every
    client: how long calls may take, which are tried again, and which servers are asked."""
    return grpc.aio.insecure_channel(target, options=[*OPTIONS, ("grpc.service_config", service_config)])
