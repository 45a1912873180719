"""What the tills know is read as they meant it."""

from pathlib import Path

from tests.faults.ledger import Ledger, Sale, read_ledger


def test_which_of_two_equal_sales_is_stored(tmp_path: Path) -> None:
    """Refused without registration, sent once more with it, and no answer came: it is the second that may be there."""
    first = Sale(1, "key", "receipt", 1, 1, "POS-1", "customer", 0, ((1, 100),), register=False)
    second = first._replace(number=2, register=True)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.sale_sent(first)
    ledger.sale_refused(first, "CUSTOMER_NOT_FOUND")
    ledger.sale_sent(second)
    ledger.sale_unknown(second, "DEADLINE_EXCEEDED")
    assert read_ledger(ledger.path).under("key") == [2, 1]
    ledger.sale_ok(first, "purchase", "event")
    assert read_ledger(ledger.path).under("key") == [1, 2]
    ledger.close()
