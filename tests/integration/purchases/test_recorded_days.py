"""ListRecordedDays: on which business days something was recorded since an earlier answer, events or none."""

import asyncio
import random
import uuid
from datetime import UTC, date, datetime, timedelta
from typing import Any

import grpc
import psycopg
import pytest
from uuid_utils import uuid7

from retail.purchases.v1 import purchases_service_pb2 as pb
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.integration.purchase_events import query
from tests.integration.sales import NOON, refusal, sale

DAY_S = 86_400
WRITERS, WRITES = 4, 15
FIRST = date(2026, 3, 1)


@pytest.fixture
def tills(purchases_channel: grpc.aio.Channel) -> Any:
    return PurchasesServiceStub(purchases_channel)


async def ask(tills: Any, after: str = "") -> tuple[list[int], str]:
    """How many days after the first one, and where the answer ends."""
    reply = await tills.ListRecordedDays(pb.ListRecordedDaysRequest(after_position=after))
    assert reply.time_zone == "UTC"
    return [(date(day.year, day.month, day.day) - FIRST).days for day in reply.sales_dates], reply.position


async def sell(tills: Any, *days: int) -> None:
    for day in days:
        await tills.CreatePurchase(sale(seconds=NOON + day * DAY_S))


async def test_days_on_which_something_was_recorded(tills: Any, purchases_db: str) -> None:
    """All at first, then those since the answer before; also when nothing is left of the event."""
    assert (await ask(tills))[0] == []
    await sell(tills, 0, 40, 40, 2)
    days, position = await ask(tills)
    assert days == [0, 2, 40]
    assert (await ask(tills, position))[0] == []
    await sell(tills, 2)
    query(purchases_db, "DELETE FROM outbox_events")
    days, last = await ask(tills, position)
    assert days == [2]
    assert (await ask(tills, last))[0] == []
    assert (await ask(tills, position))[0] == [2]  # the answer was lost: it is given again


def insert(connection: psycopg.Connection, moment: datetime) -> None:
    connection.execute(
        "INSERT INTO purchases (purchase_id, purchase_time, business_day, receipt_id, idempotency_key, branch_id,"
        " cashier_id, pos_id, total_amount, item_count, event_id)"
        " VALUES (%s, %s, %s, 'R', %s, 1, 1, 'P', 5, 1, %s)",
        [uuid.UUID(str(uuid7())), moment, moment.date(), uuid.uuid4(), uuid.UUID(str(uuid7()))],
    )


async def test_what_commits_late_is_in_a_later_answer(tills: Any, purchases_db: str) -> None:
    """A transaction that was under way when others were listed, whatever its number is."""
    await sell(tills, 0, 1)
    _, position = await ask(tills)
    with psycopg.connect(purchases_db) as slow:
        insert(slow, datetime(2026, 3, 2, 12, tzinfo=UTC))
        await sell(tills, 0)
        days, position = await ask(tills, position)
        assert days == [0]
        await sell(tills, 0)
        _, position = await ask(tills, position)
        slow.commit()
    days, position = await ask(tills, position)
    assert 1 in days
    assert (await ask(tills, position))[0] == []


@pytest.mark.parametrize(
    "happens",
    [
        "UPDATE recorded_days_listing SET given_xid = '3'",  # the server is set back to before it gave the position
        "UPDATE recorded_days_listing SET realm = 'another'",
    ],
)
async def test_a_server_that_was_set_back_lists_everything(tills: Any, purchases_db: str, happens: str) -> None:
    """Its transaction ids are handed out a second time: what a position says means nothing any more."""
    await sell(tills, 0, 5)
    _, position = await ask(tills)
    query(purchases_db, happens)
    days, again = await ask(tills, position)
    assert days == [0, 5]
    assert (await ask(tills, again))[0] == []
    realm, xid = again.rsplit(":", 1)
    assert (await ask(tills, f"{realm}0:{xid}"))[0] == [0, 5]
    assert (await ask(tills, f"{realm}:{int(xid) + 1_000_000}"))[0] == [0, 5]


@pytest.mark.parametrize("position", ["x", "1.00000001.5:", "1.00000001.5:99999999999999999999", "a:1", "é"])
async def test_a_position_that_is_none(tills: Any, position: str) -> None:
    """Is refused, and means neither all days nor none."""
    refused = await refusal(tills.ListRecordedDays(pb.ListRecordedDaysRequest(after_position=position)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TOKEN")


async def test_no_commit_is_ever_passed_over(tills: Any, purchases_db: str) -> None:
    """Transactions of all lengths, committed in any order or rolled back: their days are told of, and no others."""
    await asyncio.gather(*(sell(tills, day) for day in range(WRITERS * WRITES)))
    chance = random.Random(1)
    _, position = await ask(tills)

    def write(day: int, hold_s: float, commit: bool) -> None:
        with psycopg.connect(purchases_db) as connection:
            insert(connection, datetime(2026, 3, 1, 12, tzinfo=UTC) + timedelta(days=day))
            connection.execute("SELECT pg_sleep(%s)", [hold_s])
            if not commit:
                connection.rollback()

    committed: set[int] = set()

    async def writer(number: int) -> None:
        for day in range(number * WRITES, (number + 1) * WRITES):
            commit = chance.random() < 0.8
            await asyncio.to_thread(write, day, chance.choice([0, 0, 0.05, 0.4]), commit)
            committed.update({day} if commit else ())

    writers = [asyncio.ensure_future(writer(number)) for number in range(WRITERS)]
    told: set[int] = set()
    while not all(task.done() for task in writers):
        days, position = await ask(tills, position)
        told.update(days)
    await asyncio.gather(*writers)
    days, position = await ask(tills, position)
    assert told | set(days) == committed
    assert (await ask(tills, position))[0] == []
