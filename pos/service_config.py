"""What the contract asks of every client: the part of proto/service_config.json that gRPC leaves to us."""

import json
from importlib import resources

from grpc import StatusCode

TEXT = (resources.files("retail") / "service_config.json").read_text()

_USUAL = json.loads(TEXT)["methodConfig"][0]  # of every method but the few that are named after it
_RETRY = _USUAL["retryPolicy"]


def _seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


TOTAL_TIMEOUT_S = _seconds(_USUAL["timeout"])  # as long as a customer may be kept waiting for a receipt
FIRST_BACKOFF_S = _seconds(_RETRY["initialBackoff"])
MOST_BACKOFF_S = _seconds(_RETRY["maxBackoff"])  # a service that is back is found again this soon
BACKOFF_FACTOR = _RETRY["backoffMultiplier"]
RETRYABLE = frozenset(StatusCode[name] for name in _RETRY["retryableStatusCodes"])
