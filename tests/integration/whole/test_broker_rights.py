"""The broker's users: relay and consumer can do their work, and are refused whatever else there is."""

import re
from collections.abc import Callable, Iterator

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import ChannelClosedByBroker, ProbableAccessDeniedError, ProbableAuthenticationError

from deploy.broker import PROCESSES
from deploy.local.rabbitmq import USER, RabbitMQ
from relay_svc import topology
from relay_svc.outbox import OutboxEvent
from relay_svc.publisher import Publisher
from tests.conftest import ROOT
from tests.integration.consumers import COUNTED, consuming, counts
from tests.integration.purchase_events import sold

EXCHANGE, QUEUE = topology.EXCHANGE, topology.QUEUE
ACCESS_REFUSED = 403


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """A node on which nobody has done anything, set up as the one of the compose file is."""
    lines = (ROOT / "deploy" / "rabbitmq" / "retail.conf").read_text().splitlines()
    settings = dict(line.split(" = ") for line in lines if not line.startswith("#"))
    assert settings.pop("load_definitions")  # from another place; made in the same way
    node = RabbitMQ(tmp_path_factory.mktemp("rights"), settings=settings)
    try:
        node.start()
        yield node
    finally:
        node.stop()


@pytest.fixture
def empty(node: RabbitMQ) -> None:
    with pika.BlockingConnection(pika.URLParameters(node.url)) as connection:
        channel = connection.channel()
        channel.queue_delete(QUEUE)
        channel.exchange_delete(EXCHANGE)


def event() -> tuple[OutboxEvent, str]:
    sale = sold("1.00")
    return OutboxEvent(sale.event_id, "PurchaseCreated", sale.body().decode(), None, 0), sale.event_id


async def publish_as_relay(node: RabbitMQ) -> None:
    publisher = Publisher(node.url_of("relay"), confirm_timeout_s=60)
    published, event_id = event()
    outcome = await publisher.publish([published])
    publisher.disconnect()
    assert (outcome.confirmed, outcome.outage) == ([event_id], None)


async def test_each_can_do_its_work_whoever_comes_first(node: RabbitMQ, empty: None, analytics_db: str) -> None:
    """Exchange, queue and binding are made by either; what the relay publishes, the consumer counts."""
    await publish_as_relay(node)
    async with consuming(analytics_db, node.url_of("consumer")):
        await counts(analytics_db, COUNTED, 1)
        await publish_as_relay(node)
        await counts(analytics_db, COUNTED, 2)


REFUSED: dict[str, tuple[str, Callable[[BlockingChannel], object]]] = {
    "the relay reads no sale": ("relay", lambda channel: channel.basic_get(QUEUE)),
    "it consumes none": ("relay", lambda channel: channel.basic_consume(QUEUE, lambda *_: None)),
    "it throws none away": ("relay", lambda channel: channel.queue_purge(QUEUE)),
    "it passes no exchange by": ("relay", lambda channel: publish(channel, "", QUEUE)),
    "it publishes nowhere else": ("relay", lambda channel: publish(channel, "amq.topic", QUEUE)),
    "it leads nothing away": ("relay", lambda channel: channel.queue_declare("purchases.copy")),
    "the consumer makes no sale": ("consumer", lambda channel: publish(channel, EXCHANGE, QUEUE)),
    "neither past the exchange": ("consumer", lambda channel: publish(channel, "", QUEUE)),
    "it does not delete the exchange": ("consumer", lambda channel: channel.exchange_delete(EXCHANGE)),
    "it makes no exchange": ("consumer", lambda channel: channel.exchange_declare("purchases.mine")),
    "it makes no other queue": ("consumer", lambda channel: channel.queue_declare("purchases")),
}


def publish(channel: BlockingChannel, exchange: str, routing_key: str) -> None:
    channel.confirm_delivery()
    channel.basic_publish(exchange, routing_key, b"{}", mandatory=True)


@pytest.mark.parametrize(("user", "attempt"), REFUSED.values(), ids=REFUSED.keys())
async def test_the_rest_is_refused(
    node: RabbitMQ, empty: None, user: str, attempt: Callable[[BlockingChannel], object]
) -> None:
    await publish_as_relay(node)
    with (
        pika.BlockingConnection(pika.URLParameters(node.url_of(user))) as connection,
        pytest.raises(ChannelClosedByBroker) as caught,
    ):
        attempt(connection.channel())
    assert caught.value.reply_code == ACCESS_REFUSED


def test_the_runbook_gives_the_same_rights() -> None:
    runbook = (ROOT / "deploy" / "RUNBOOK.md").read_text()
    for name, rights in PROCESSES.items():
        line = rf"^rabbitmqctl set_permissions {name} +'{re.escape(rights.configure)}' '{re.escape(rights.write)}' "
        assert re.search(line + rf"'{re.escape(rights.read)}'$", runbook, re.MULTILINE), name


def test_nobody_administers_and_nobody_else_is_there(node: RabbitMQ) -> None:
    """No tag for any user, no `guest`, and no way into another virtual host, or in without the password."""
    users = [line.split() for line in node.ctl("list_users", "--no-table-headers").splitlines()]
    assert sorted(users) == [[name, "[]"] for name in sorted([USER, *PROCESSES])]

    node.ctl("add_vhost", "another")
    for user in PROCESSES:
        with pytest.raises(ProbableAccessDeniedError):
            pika.BlockingConnection(pika.URLParameters(node.url_of(user).removesuffix("%2F") + "another"))
    with pytest.raises(ProbableAuthenticationError):
        pika.BlockingConnection(pika.URLParameters(f"amqp://guest:guest@{node.address}/%2F"))
