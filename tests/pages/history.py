"""A chain that has sold for some weeks, until this moment: the simulated one, moved so that its last day goes on."""

import datetime
from collections.abc import Iterator
from dataclasses import replace

from pos.client import Sale
from pos.simulator import FIRST_DAY, simulate

AFTERNOON = datetime.time(15, 30, tzinfo=datetime.UTC)


def sales(seed: int, *, days: int, purchases: int, now: datetime.datetime | None = None) -> Iterator[Sale]:
    """Somewhat less than so many purchases over the last `days` days, in their order, none after `now`."""
    now = now or datetime.datetime.now(datetime.UTC)
    moved = now - datetime.datetime.combine(FIRST_DAY + datetime.timedelta(days=days - 1), AFTERNOON)
    for sale in simulate(seed, days=days, purchases=purchases):
        if (moment := sale.purchase_time + moved) <= now:
            yield replace(sale, purchase_time=moment, receipt_id=f"{sale.receipt_id}-{moment:%m%d}")
