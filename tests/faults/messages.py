"""Messages that the rig itself puts on the queue: bad ones, and good ones once more."""

import hashlib
import json
import random
import uuid
from collections.abc import Callable

import grpc
import psycopg
from pika import BasicProperties
from pika.exceptions import AMQPError

from deploy.local.machine import wait_until
from retail.analytics.v1.quarantine_service_pb2 import ListQuarantinedEventsRequest, RedriveEventsRequest
from retail.analytics.v1.quarantine_service_pb2_grpc import QuarantineServiceStub
from tests.faults.ledger import Ledger
from tests.faults.system import Instance, System

EXCHANGE, ROUTING_KEY = "purchases", "purchases.created"
PERSISTENT = 2
TIMEOUT_S = 10.0
PATIENCE_S = 30.0  # until some bad message is quarantined, and the consumer answers


class Messages:
    """Published with confirms; the ledger has each bad one, as sent before and as taken after."""

    def __init__(self, system: System, ledger: Ledger) -> None:
        self._system, self._ledger = system, ledger

    def publish_bad(self, chance: random.Random) -> bool:
        """Three messages that no consumer may count, drop, or let itself be stopped by."""
        bodies = [chance.choice(BAD)(chance) for _ in range(3)]
        for body in bodies:
            sha256 = hashlib.sha256(body).hexdigest()
            self._ledger.write("poison_sent", sha256=sha256)
            if not self._publish(body, {}, str(uuid.UUID(int=chance.getrandbits(128), version=4))):
                return False
            self._ledger.write("poison", sha256=sha256)
        return True

    def publish_again(self, chance: random.Random) -> bool:
        """Events that were sent once already, three times more each."""
        try:
            with self._system.database(chance.choice(self._system.databases("purchases"))) as connection:
                rows = connection.execute(
                    "SELECT event_id::text, payload_json::text FROM outbox_events WHERE status = 'SENT'"
                    " ORDER BY event_id DESC LIMIT 500"
                ).fetchall()
        except psycopg.Error:
            return False
        for event_id, payload in chance.sample(rows, min(10, len(rows))):
            for _ in range(3):
                if not self._publish(str(payload).encode(), {"schema_version": 1}, str(event_id)):
                    return False
        return bool(rows)

    def redrive(self, consumer: Instance) -> bool:
        """Have the newest bad messages tried again: they are as bad as before, and each is kept once."""
        return wait_until(lambda: self._try_redrive(consumer), PATIENCE_S)

    def _try_redrive(self, consumer: Instance) -> bool:
        """Whether there was any, and the consumer has tried it."""
        with consumer.identities.channel(consumer.address) as channel:
            stub = QuarantineServiceStub(channel)
            try:
                kept = stub.ListQuarantinedEvents(ListQuarantinedEventsRequest(page_size=10), timeout=TIMEOUT_S)
                ids = [event.quarantine_id for event in kept.quarantined_events]
                if not ids:
                    return False
                done = stub.RedriveEvents(RedriveEventsRequest(quarantine_ids=ids), timeout=TIMEOUT_S)
            except grpc.RpcError as error:
                if error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
                    self._ledger.write("wrong", number=0, why=f"redrive: {error.code().name} {error.details()}")
                return False
        if done.redriven_count:
            self._ledger.write("wrong", number=0, why=f"{done.redriven_count} bad messages were counted when redriven")
        return True

    def _publish(self, body: bytes, headers: dict[str, object], message_id: str) -> bool:
        """Whether the broker took it, and some queue with it."""
        properties = BasicProperties(
            message_id=message_id, type="PurchaseCreated", delivery_mode=PERSISTENT, headers=headers
        )
        try:
            with self._system.channel() as channel:
                channel.confirm_delivery()
                channel.basic_publish(EXCHANGE, ROUTING_KEY, body, properties, mandatory=True)
        except (AMQPError, OSError):
            return False
        return True


def _event(chance: random.Random, **changes: object) -> bytes:
    """A fresh event, as it would be counted, apart from the changes to its purchase."""

    def new() -> str:
        return str(uuid.UUID(int=chance.getrandbits(128), version=4))

    purchase = {
        "purchase_id": new(), "receipt_id": "X1", "idempotency_key": new(), "branch_id": 1, "cashier_id": 1,
        "pos_id": "POS-X", "purchase_time": "2026-01-06T10:14:59Z", "total_amount": 8.9,
        "items": [{"product_id": 1, "qty": 1, "unit_price": 8.9}],
    }  # fmt: skip
    event = {
        "event_id": new(),
        "event_type": "PurchaseCreated",
        "occurred_at": "2026-01-06T10:15:00Z",
        "purchase": purchase | changes,
    }
    return json.dumps(event).encode()


BAD: list[Callable[[random.Random], bytes]] = [
    lambda chance: chance.randbytes(chance.randrange(1, 200)),
    lambda chance: _event(chance)[: chance.randrange(1, 200)],
    lambda chance: _event(chance, total_amount=chance.choice([8.91, 9, -1, 1e30, "8.90"])),
    lambda chance: _event(chance, branch_id=chance.choice([0, -1, 2**31, "1", None])),
    lambda chance: _event(chance, purchase_time=chance.choice(["yesterday", "9999-12-31T23:59:60Z", 0])),
    lambda chance: _event(chance, items=chance.choice([[], {}, [{"product_id": 1, "qty": 0, "unit_price": 8.9}]])),
    lambda chance: _event(chance).replace(b"PurchaseCreated", b"PurchaseDestroyed"),
]
