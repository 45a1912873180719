"""Tills of the simulated chain that keep a journal: each of their sales is stored once, however often they begin."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import grpc
import psycopg
import pytest

from pos.client import Sale
from pos.simulator import simulate
from pos.tills import SaleFailed, Tills
from tests.conftest import WAIT_S
from tests.integration.purchases.test_create_purchase import count

SALES = list(islice(simulate(1), 500))


def sell(sales: Sequence[Sale], address: str, journals: Path) -> Tills:
    with Tills(sales, address, seed=1, journals=journals) as tills:
        assert tills.wait(WAIT_S)
    return tills


def placed(database: str) -> list[tuple[int, str, int]]:
    """How many sales have a place in a journal, by branch and till."""
    with psycopg.connect(database) as connection:
        return connection.execute(
            "SELECT branch_id, pos_id, count(*) FROM till_sales GROUP BY 1, 2 ORDER BY 1, 2"
        ).fetchall()


async def test_they_go_on_with_their_disks(
    purchases_address: str, purchases_channel: grpc.aio.Channel, purchases_db: str, tmp_path: Path
) -> None:
    """A part of the sales first, then all of them, then nothing is new."""
    expected = [(200, 0), (500, 200), (500, 500)]
    for recorded, replayed in expected:
        tills = await asyncio.to_thread(sell, SALES[:recorded], purchases_address, tmp_path / "tills")
        assert (tills.recorded, tills.replayed) == (recorded, replayed)
        assert count(purchases_db, "purchases") == recorded
    with_journal = {sale.branch_id for sale in SALES if sale.pos_id == "POS-1"}
    assert placed(purchases_db) == [
        (branch, "POS-1", sum((sale.branch_id, sale.pos_id) == (branch, "POS-1") for sale in SALES))
        for branch in sorted(with_journal)
    ]


async def test_disks_of_another_chain_are_not_gone_on_with(
    purchases_address: str, purchases_channel: grpc.aio.Channel, purchases_db: str, tmp_path: Path
) -> None:
    await asyncio.to_thread(sell, SALES[:200], purchases_address, tmp_path / "tills")
    with psycopg.connect(purchases_db) as connection:  # the same as a database that was set up anew
        connection.execute(
            "TRUNCATE purchases, purchase_items, receipts, idempotency_keys, outbox_events, till_sales, till_journals"
        )
    tills = await asyncio.to_thread(sell, SALES[:200], purchases_address, tmp_path / "tills")
    assert (tills.recorded, tills.replayed) == (200, 0)
    assert count(purchases_db, "purchases") == 200


async def test_a_refused_sale_is_told(
    purchases_address: str, purchases_channel: grpc.aio.Channel, tmp_path: Path
) -> None:
    wrong = replace(next(sale for sale in SALES if sale.pos_id == "POS-1"), cashier_id=0)
    with pytest.raises(SaleFailed, match="cashier_id"):
        await asyncio.to_thread(sell, [wrong], purchases_address, tmp_path / "tills")
