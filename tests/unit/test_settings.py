"""Settings: read once, every problem named at once."""

import pytest

from chassis.settings import SettingsError, load
from purchases_svc.sale import ITEMS_MAX
from purchases_svc.server import MESSAGE_BYTES_MAX
from purchases_svc.settings import ServeSettings
from purchases_svc.upload import UPLOADS_PER_MESSAGE_MAX
from relay_svc.settings import ServeSettings as RelaySettings
from retail.purchases.v1.purchases_service_pb2 import CreatePurchaseRequest

GOOD = {"PURCHASES_DATABASE_URL": "postgresql://u:p@h/d"}


def test_defaults_are_filled_in() -> None:
    """Only what has no default must be set; an empty variable counts as not set."""
    settings = load(ServeSettings, {**GOOD, "PURCHASES_LISTEN": ""})
    assert (settings.listen, settings.business_time_zone) == ("127.0.0.1:50051", "UTC")


def test_every_problem_is_named_at_once() -> None:
    """One start is enough to learn all that is wrong; passwords are not shown."""
    wrong = {
        "PURCHASES_DATABASE_URL": "mysql://user:secret@host/d",
        "BUSINESS_TIME_ZONE": "Mars/Olympus",
        "LOG_LEVEL": "loud",
        "PURCHASES_LISTEN": "50051",
        "PURCHASES_BATCH_MAX": "0",
        "PURCHASES_WAITING_MAX": "499",
        "PURCHASES_FLUSH_TIMEOUT_S": "nan",
        "PURCHASES_READ_CONNECTIONS": "٣",
    }
    with pytest.raises(SettingsError) as caught:
        load(ServeSettings, wrong)
    assert len(caught.value.problems) == len(wrong)
    assert all(any(p.startswith(name) for p in caught.value.problems) for name in wrong)
    assert "secret" not in str(caught.value)


def test_missing_settings_are_named() -> None:
    """What must be set and is not is named, all of it."""
    with pytest.raises(SettingsError) as caught:
        load(RelaySettings, {})
    assert caught.value.problems == ["PURCHASES_DATABASE_URL is not set", "AMQP_URL is not set"]


def test_least_limits_let_in_the_fullest_message() -> None:
    """However low the limits are set, there is a time when any message of UploadPurchases is taken."""
    sale = CreatePurchaseRequest()
    for product_id in range(1, ITEMS_MAX + 1):
        sale.purchase.items.add(product_id=product_id, quantity=1).unit_price.value = "0"
    items = MESSAGE_BYTES_MAX * ITEMS_MAX // sale.ByteSize()
    assert items > 80_000  # or the message is not the fullest
    for name, least in ("PURCHASES_WAITING_MAX", UPLOADS_PER_MESSAGE_MAX), ("PURCHASES_WAITING_ITEMS_MAX", items):
        with pytest.raises(SettingsError, match=name):
            load(ServeSettings, {**GOOD, name: str(least - 1)})
