"""A till that keeps a journal on its own disk (`pos.journal`), for the load."""

import random
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc

from chassis.wire import EPOCH
from pos.client import Item, PosClient
from pos.errors import PosError
from pos.journal import Journal
from pos.journal.rows import State
from tests.faults.ledger import Sale

WITHIN_S = 4.0


class JournalTill:
    """One journal, sent through any of the services."""

    def __init__(self, directory: str, branch_id: int, pos_id: str, channels: Sequence[grpc.Channel]) -> None:
        self._clients = [
            PosClient(channel, attempt_timeout_s=WITHIN_S, total_timeout_s=WITHIN_S, pause=_no_pause)
            for channel in channels
        ]
        self._journal = Journal(Path(directory), branch_id=branch_id, pos_id=pos_id)

    def close(self) -> None:
        self._journal.close()

    def record(self, drafts: Sequence[Sale]) -> list[Sale]:
        """On the disk, with the numbers and keys that they get there. Whatever the till's clock says, none is sold
        tomorrow: such a sale waits until then.
        """
        return [self._record(draft) for draft in drafts]

    def _record(self, draft: Sale) -> Sale:
        moment = min(EPOCH + timedelta(microseconds=draft.time_us), datetime.now(UTC))
        receipt = self._journal.record_sale(
            [Item(product, cents) for product, cents in draft.items],
            cashier_id=draft.cashier_id,
            customer_id=draft.customer_id,
            register_customer=draft.register,
            purchase_time=moment,
        )
        return draft._replace(
            key=receipt.sale.idempotency_key,
            receipt_id=receipt.receipt_id,
            time_us=(moment - EPOCH) // timedelta(microseconds=1),
        )

    def flush(self, chance: random.Random) -> bool:
        """Whether nothing waits any more."""
        return self._journal.flush(chance.choice(self._clients), within_s=WITHIN_S).waiting == 0

    def settled(self, sales: Sequence[Sale]) -> Iterator[tuple[Sale, State, str]]:
        """What the journal says of these: with the purchase's id, or why it was refused."""
        by_key = {row.idempotency_key: row for row in self._journal._store.rows()}
        for sale in sales:
            row = by_key[sale.key]
            yield sale, row.state, row.purchase_id if row.state is State.STORED else row.reason

    def missing(self, chance: random.Random) -> str | None:
        """What the service lacks of what is stored by this journal; None when nothing, or it does not say."""
        stored = {row.sequence for row in self._journal._store.rows([State.STORED])}
        try:
            states = chance.choice(self._clients).till_states(self._journal.branch_id, self._journal.pos_id)
        except PosError:
            return None
        epoch = self._journal.status().epoch
        for state in states:
            gaps = [gap for gap in state.missing if stored & set(range(gap[0], gap[1] + 1))]
            if state.epoch == epoch and (gaps or state.conflict_count):
                return f"{gaps}, {state.conflict_count} conflicts"
        return None


def _no_pause(_: float, why: PosError) -> None:
    raise why
