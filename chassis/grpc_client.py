"""How anything of ours asks a process of ours: a channel that notices when its peer is gone, and soon when it is back.

Nobody opens one in another way. It imports gRPC alone, so that commands and health checks start quickly.
"""

from typing import Any

import grpc

REPLY_BYTES_MAX = 16 << 20  # what our servers send at most; gRPC's own limit is 4 MiB

OPTIONS: list[tuple[str, Any]] = [
    ("grpc.enable_http_proxy", 0),  # http_proxy is meant for the web, not for the chain's own network
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


def connect_blocking(target: str) -> grpc.Channel:
    """For commands and checks, which ask once and want to know at once: a channel without asyncio and retries."""
    return grpc.insecure_channel(target, options=OPTIONS)
