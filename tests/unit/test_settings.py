"""Settings: read once, every problem named at once."""

import pytest

from chassis import amqp
from chassis.settings import SettingsError, amqp_url, load, postgres_url
from purchases_svc.sale import ITEMS_MAX
from purchases_svc.server import UPLOAD_BYTES_MAX
from purchases_svc.settings import ServeSettings
from purchases_svc.upload import UPLOADS_PER_MESSAGE_MAX
from relay_svc.settings import ServeSettings as RelaySettings
from retail.purchases.v1.purchases_service_pb2 import CreatePurchaseRequest

GOOD = {"PURCHASES_DATABASE_URL": "postgresql://u:p@localhost/d"}


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
    items = UPLOAD_BYTES_MAX * ITEMS_MAX // sale.ByteSize()
    assert items > 80_000  # or the message is not the fullest
    for name, least in ("PURCHASES_WAITING_MAX", UPLOADS_PER_MESSAGE_MAX), ("PURCHASES_WAITING_ITEMS_MAX", items):
        with pytest.raises(SettingsError, match=name):
            load(ServeSettings, {**GOOD, name: str(least - 1)})


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:p@h1:5432,h2:5433/d?target_session_attrs=read-write",
        "postgresql://u:p@h1,h2/d",
        "postgresql:///d?host=/run/postgresql&sslmode=verify-full&sslrootcert=system",
        "postgresql:///d?hostaddr=10.0.0.7,10.0.0.8&port=5432,5433&connect_timeout=9",
        "postgresql://u:p@[::1]:5432,[::2]/d",
    ],
)
def test_postgres_urls(url: str) -> None:
    assert postgres_url(url) == url


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("postgresql://u:secret@h1:5432,h2:port/d", "such as postgresql://"),
        ("postgresql://u:secret@h1:0/d", "such as postgresql://"),
        ("postgresql://u:secret%zz@h/d", "such as postgresql://"),
        ("postgresql://u:secret@h/d?targets=1", "targets"),
        ("postgresql://u:secret@h/d?sslmode=verify", 'invalid sslmode value: "verify"'),
        ("postgresql://u:secret@h/d?sslmode=require&sslrootcert=system", 'weak sslmode "require"'),
        ("postgresql://u:secret@h/d?ssl_min_protocol_version=TLSv9", 'invalid "ssl_min_protocol_version"'),
        ("postgresql://u:secret@h/d?scram_client_key=secret", "invalid SCRAM client key"),
        ("postgresql://u:secret@h1,h2/d?target_session_attrs=rw", 'invalid target_session_attrs value: "rw"'),
        ("postgresql://u:secret@h1,h2/d?port=1,2,3", "could not match 3 port numbers to 2 hosts"),
        ("postgresql://u:secret@h/d?keepalives_idle=often", "keepalives_idle must be a whole number"),
        ("postgresql://u:secret@h/d?sslrootcert=/nowhere/ca.pem", "sslrootcert: [Errno 2] No such file"),
        ("postgresql://u:secret@h/d?sslrootcert=/etc/passwd", "no certificate or crl found"),
        ("postgresql://u:secret@h/d?sslcert=/nowhere/own.pem", "sslcert: [Errno 2] No such file"),
        ("postgresql://u:secret@h/d?sslkey=/etc", "sslkey: [Errno 21] Is a directory"),
        (f"postgresql://u:secret@{'h' * 64}.example/d", "such as postgresql://"),
    ],
)
def test_wrong_postgres_urls(url: str, problem: str) -> None:
    check_refusal("PURCHASES_DATABASE_URL", url, problem)


@pytest.mark.parametrize(
    ("url", "hosts", "virtual_host"),
    [
        ("amqp://u:p@h/%2F", ["h:5672"], "/"),
        ("amqp://u:p@h1:5671,h2,h3:5673/v%2Fw?heartbeat=5", ["h1:5671", "h2:5672", "h3:5673"], "v/w"),
        ("amqps://u:p@h1,[::1]:5670/", ["h1:5671", "::1:5670"], "/"),
    ],
)
def test_broker_urls(url: str, hosts: list[str], virtual_host: str) -> None:
    assert amqp_url(url) == url
    nodes = amqp.nodes(url)
    assert [f"{node.host}:{node.port}" for node in nodes] == hosts
    assert {node.virtual_host for node in nodes} == {virtual_host}


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://u:secret@h/", "such as amqp://"),
        ("amqp://u:secret@h1:5672,h2:port/", "such as amqp://"),
        ("amqp://u:secret@h1:5672,h2:70000/", "such as amqp://"),
        ("amqp://u:secret@h1,,h2/", "a host in the list is empty"),
        ("amqp://a/%2F,amqp://b/%2F", "several hosts are one list"),
        ("amqp://u:secret@a/%2F,amqp://u:secret@b/%2F", "several hosts are one list"),
        ("amqp://secret@h/", "without a password"),
        ("amqp://u:secret@h/?heartbeat=often", "heartbeat"),
        ("amqp://u:secret@h/?heartbeats=5", "heartbeats"),
        ("amqps://u:secret@h/?ssl_options={'ca_certs':'/nowhere/ca.pem'}", "No such file"),
        ("amqps://u:secret@h/?ssl_options=yes", "an option is wrong"),
        ("amqps://u:secret@h/?ssl_options={", "an option is wrong"),
        (f"amqp://u:secret@{'h' * 64}.example/", "such as amqp://"),
        (f"amqp://u:secret@h/{'v' * 256}", "more than 255 bytes"),
    ],
)
def test_wrong_broker_urls(url: str, problem: str) -> None:
    check_refusal("AMQP_URL", url, problem)


def check_refusal(name: str, url: str, problem: str) -> None:
    """The process does not start; it says which setting is wrong, and how, and no password."""
    good = {"PURCHASES_DATABASE_URL": "postgresql://u:p@localhost/d", "AMQP_URL": "amqp://u:p@localhost/%2F"}
    with pytest.raises(SettingsError) as caught:
        load(RelaySettings, good | {name: url})
    (said,) = caught.value.problems
    assert said.startswith(f"{name}=(hidden): ")
    assert problem in said
    assert "secret" not in said
