"""The relay makes the consumer's queue when it is missing: RabbitMQ refuses a declaration that differs."""

from analytics_svc.ingest import consumer
from relay_svc import topology


def test_relay_and_consumer_mean_the_same_queue() -> None:
    assert (topology.EXCHANGE, topology.QUEUE, topology.ROUTING_KEY, dict(topology.QUEUE_ARGUMENTS)) == (
        consumer.EXCHANGE,
        consumer.QUEUE,
        consumer.ROUTING_KEY,
        consumer.QUEUE_ARGUMENTS,
    )
