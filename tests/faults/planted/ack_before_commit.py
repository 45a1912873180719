"""The consumer acknowledges what it was given before it has counted it."""

from typing import Any

from tests.faults.planted import replace

FAULTS = ("consumer.after_decode", "consumer.after_apply", "postgres.immediate_stop")
CAUGHT_AS = {"lost", "falsely_sent"}


def plant() -> None:
    import analytics_svc.ingest.consumer as consumer

    async def subscribe(self: Any, channel: Any, inbox: Any) -> None:
        put = inbox.put

        def acknowledged(delivery: Any) -> None:
            channel.basic_ack(delivery.tag)
            put(delivery)

        inbox.put = acknowledged
        await original(self, channel, inbox)

    original = replace(consumer.Consumer, "_subscribe", subscribe)
    settle = consumer.Consumer._settle

    async def settle_silently(self: Any, batch: Any, inbox: Any) -> bool:
        await settle(self, batch, inbox)
        return False  # acknowledged already

    replace(consumer.Consumer, "_settle", settle_silently)
