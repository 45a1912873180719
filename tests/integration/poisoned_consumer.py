"""`python -m analytics_svc`, with a bug: a process that touches an event with the marker ends at once.

As a script: `poisoned_consumer.py decode|apply consume`. The bug is in reading the event, or in counting it.
"""

import os
import sys
from typing import Any

import analytics_svc.__main__ as analytics
from analytics_svc.ingest import events, settling

MARKER = b"POISON"  # in the event's pos_id, for the decoder
MARKED_PRODUCT_ID = 666  # for what follows, which sees no more of it
EXIT_CODE = 77

decode, apply = events.decode, vars(settling)["apply"]


def decode_or_die(body: bytes, *args: Any, **kwargs: Any) -> Any:
    if MARKER in body:
        os._exit(EXIT_CODE)
    return decode(body, *args, **kwargs)


async def apply_or_die(connection: Any, counted: Any, unfit: Any) -> Any:
    applied = await apply(connection, counted, unfit)
    if any(item.product_id == MARKED_PRODUCT_ID for event in counted for item in event.items):
        os._exit(EXIT_CODE)  # the transaction is all but committed
    return applied


if __name__ == "__main__":
    match sys.argv.pop(1):
        case "decode":
            vars(events)["decode"] = decode_or_die
        case "apply":
            vars(settling)["apply"] = apply_or_die
    analytics.main()
