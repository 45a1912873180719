"""Idempotency keys are looked up and then inserted, without a unique key behind it."""

from typing import Any

FAULTS = ("till.clock",) * 6
CAUGHT_AS = {"doubled"}


def prepare(purchases: Any, analytics: Any) -> None:
    purchases.execute("ALTER TABLE idempotency_keys DROP CONSTRAINT idempotency_keys_pkey")
    purchases.execute("CREATE INDEX ON idempotency_keys (idempotency_key)")


def plant() -> None:
    """The statement looks the key up and inserts it, as ever: what made that safe is gone."""
