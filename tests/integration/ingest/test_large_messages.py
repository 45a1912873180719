"""Messages too large to be ours, in any number: memory stays bounded, the queue moves, nothing is lost."""

import re
import subprocess
from pathlib import Path
from typing import Any

from pika.adapters.blocking_connection import BlockingChannel

from analytics_svc.ingest.consumer import HELD_BYTES_MAX
from analytics_svc.ingest.quarantine import BODY_KEPT_MAX
from tests.integration.conftest import free_address
from tests.integration.consumers import COUNTED, QUARANTINED, consuming, counts, depth, publish, start
from tests.integration.purchase_events import expected, query, read_models, some_sales
from tests.sizes import how_many

LARGE = how_many("LARGE_MESSAGES")
LARGE_BYTES = 8 << 20
# The process without them, what may be in hand, and copies of one message while it is put together from its frames.
PEAK_BYTES_MAX = (128 << 20) + HELD_BYTES_MAX + 2 * LARGE_BYTES


def peak_bytes(process: "subprocess.Popen[bytes]") -> int:
    """The most memory that the process ever had."""
    (kilobytes,) = re.findall(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    return int(kilobytes) << 10


async def test_large_messages_among_good_ones(
    analytics_db: str, amqp_url: str, channel: BlockingChannel, processes: list[Any]
) -> None:
    """More bytes than may be in hand, within the prefetch: the good count, of the large ones the beginning is kept."""
    async with consuming(analytics_db, amqp_url):
        pass  # the queue is there
    sales = some_sales(50 * LARGE, seed=31)
    for number in range(LARGE):
        publish(channel, b"%d" % number + b"x" * (LARGE_BYTES - len(str(number))))
        publish(channel, *[sale.body() for sale in sales[number::LARGE]])
    address = free_address()
    process = start("consume", ANALYTICS_DATABASE_URL=analytics_db, AMQP_URL=amqp_url, CONSUMER_LISTEN=address)
    processes.append(process)
    await counts(analytics_db, QUARANTINED, LARGE, within_s=90)
    await counts(analytics_db, COUNTED, len(sales))
    print(f"peak: {peak_bytes(process) >> 20} MiB")
    assert peak_bytes(process) < PEAK_BYTES_MAX
    assert query(analytics_db, "SELECT DISTINCT reason, octet_length(body), body_size FROM quarantined_events") == [
        ("TOO_LARGE", BODY_KEPT_MAX, LARGE_BYTES)
    ]
    assert read_models(analytics_db) == expected(sales)
    assert depth(channel) == 0
