"""Plaintext stays within the machine: what of a process's settings may be without TLS, and what the refusals name."""

import dataclasses
from typing import Any

import pytest

import analytics_svc.settings
import purchases_svc.settings
import relay_svc.settings
from analytics_svc.settings import ConsumeSettings
from chassis import plaintext, settings
from chassis.plaintext import is_local
from chassis.settings import SettingsError, load
from pos import demo
from purchases_svc.settings import ServeSettings
from relay_svc.settings import ClientSettings
from relay_svc.settings import ServeSettings as RelaySettings

GOOD = {"PURCHASES_DATABASE_URL": "postgresql://u:p@localhost/d", "AMQP_URL": "amqp://u:p@127.0.0.1/%2F"}
CERTIFIED = dict(zip(plaintext.TLS_FILES, ("c.pem", "k.pem", "ca.pem"), strict=True))
MESH = {"ALLOW_PLAINTEXT": "yes"}


def refused(cls: type, environ: dict[str, str]) -> list[str]:
    try:
        load(cls, environ)
    except SettingsError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "127.8.8.8", "::1", "[::1]", "/run/postgresql", "@abstract"]
)
def test_within_the_machine(host: str) -> None:
    assert is_local(host)


@pytest.mark.parametrize(
    "host",
    ["", "0.0.0.0", "::", "[::]", "10.0.0.1", "db", "localhost.evil.example", "127.0.0.1.evil.example", "128.0.0.1"],
)
def test_beyond_the_machine(host: str) -> None:
    assert not is_local(host)


@pytest.mark.parametrize("listen", ["0.0.0.0:50051", "[::]:50051", "10.1.2.3:50051", "purchases:50051"])
def test_where_it_listens(listen: str) -> None:
    """Refused in plaintext, with the names of the settings; taken with certificates, or for a mesh."""
    environ = GOOD | {"PURCHASES_LISTEN": listen}
    (problem,) = refused(ServeSettings, environ)
    assert problem.startswith("PURCHASES_LISTEN: ")
    assert all(name in problem for name in (*plaintext.TLS_FILES, "ALLOW_PLAINTEXT=yes"))
    assert not refused(ServeSettings, environ | CERTIFIED)
    assert not refused(ServeSettings, environ | MESH)


@pytest.mark.parametrize(
    "target", ["relay:50053", "dns:///relay:50053", "ipv4:127.0.0.1:50053,10.0.0.7:50053", "dns://10.0.0.1/relay:50053"]
)
def test_whom_it_calls(target: str) -> None:
    """Each address counts."""
    environ = {"RELAY_TARGET": target}
    (problem,) = refused(ClientSettings, environ)
    assert problem.startswith("RELAY_TARGET: ")
    assert not refused(ClientSettings, environ | CERTIFIED)
    assert not refused(ClientSettings, environ | MESH)


@pytest.mark.parametrize(
    "target", ["localhost:1", "[::1]:1", "dns:///localhost:1", "unix:/run/relay.sock", "ipv6:[::1]:1"]
)
def test_whom_it_calls_within_the_machine(target: str) -> None:
    assert not refused(ClientSettings, {"RELAY_TARGET": target})


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:secret@db/d",
        "postgresql://u:secret@db/d?sslmode=require",
        "postgresql://u:secret@db/d?sslmode=verify-ca",
        "postgresql://u:secret@db/d?sslmode=verify-full&ssl_min_protocol_version=TLSv1.1",
        "postgresql://u:secret@localhost,db2/d",
        "postgresql://u:secret@localhost/d?hostaddr=10.0.0.7",
        "postgresql:///d?host=db&user=u&password=secret",
        "postgresql:///d?service=ours",
    ],
)
def test_databases_elsewhere(url: str) -> None:
    """Only verify-full knows whom it talks to. Certificates for gRPC change nothing in that."""
    environ = GOOD | CERTIFIED | {"PURCHASES_DATABASE_URL": url}
    (problem,) = refused(ServeSettings, environ)
    assert problem.startswith("PURCHASES_DATABASE_URL: ")
    assert "sslmode=verify-full" in problem
    assert "secret" not in problem
    assert not refused(ServeSettings, environ | MESH)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:p@db,db2/d?sslmode=verify-full",
        "postgresql://u:p@localhost,[::1]/d",
        "postgresql:///d?host=/run/postgresql",
        "postgresql:///d?connect_timeout=9",
        "postgresql://u:p@db/d?hostaddr=127.0.0.1",
    ],
)
def test_databases_within_the_machine_or_verified(url: str) -> None:
    assert not refused(ServeSettings, {"PURCHASES_DATABASE_URL": url})


def test_what_the_environment_adds_to_a_database_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As libpq has it: PGHOST where the URL names none, PGSSLMODE where it has no sslmode."""
    url = {"PURCHASES_DATABASE_URL": "postgresql:///d?connect_timeout=9"}
    monkeypatch.setenv("PGHOST", "db")
    assert refused(ServeSettings, url)
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    assert not refused(ServeSettings, url)


@pytest.mark.parametrize(
    "url",
    [
        "amqp://u:secret@mq/%2F",
        "amqp://u:secret@localhost,mq/%2F",
        "amqps://u:secret@mq/%2F?ssl_options={'protocol':2,'capath':'/'}",  # PROTOCOL_TLS checks nothing
    ],
)
@pytest.mark.filterwarnings("ignore:ssl.PROTOCOL_TLS is deprecated:DeprecationWarning")
def test_brokers_elsewhere(url: str) -> None:
    environ = GOOD | CERTIFIED | {"AMQP_URL": url}
    (problem,) = refused(RelaySettings, environ)
    assert problem.startswith("AMQP_URL: mq ")
    assert "amqps://" in problem
    assert "secret" not in problem
    assert not refused(RelaySettings, environ | MESH)


@pytest.mark.parametrize("url", ["amqps://u:p@mq,mq2/%2F", "amqp://u:p@localhost,[::1]/%2F"])
def test_brokers_within_the_machine_or_verified(url: str) -> None:
    assert not refused(RelaySettings, GOOD | {"AMQP_URL": url})


def test_every_problem_is_named_at_once() -> None:
    """One start is enough to learn of all of them, and of what is wrong besides."""
    environ = {
        "ANALYTICS_DATABASE_URL": "postgresql://u:p@db/d",
        "AMQP_URL": "amqp://u:p@mq/%2F",
        "CONSUMER_LISTEN": "0.0.0.0:1",
        "PURCHASES_TARGET": "purchases:1",
        "RELAY_TARGET": "relay:1",
        "CONSUMER_PREFETCH": "many",
    }
    named = [problem.partition(":")[0].partition("=")[0] for problem in refused(ConsumeSettings, environ)]
    assert sorted(named) == sorted(environ)


@pytest.mark.parametrize("word", ["1", "true", "YES"])
def test_the_word_is_yes(word: str) -> None:
    assert any("ALLOW_PLAINTEXT" in it for it in refused(ServeSettings, GOOD | {"ALLOW_PLAINTEXT": word}))


def every_settings_class() -> list[type]:
    found: list[type] = []
    for module in (purchases_svc.settings, relay_svc.settings, analytics_svc.settings, demo):
        found += [it for it in vars(module).values() if isinstance(it, type) and dataclasses.is_dataclass(it)]
    made = [it for it in found if not it.__module__.startswith("chassis.")]  # those are parts of others
    return [it for it in made if any("setting" in field.metadata for field in dataclasses.fields(it))]


@pytest.mark.parametrize("cls", every_settings_class())
def test_no_process_or_command_is_forgotten(cls: Any) -> None:
    """Whatever has an address or a server among its settings says how it is kept; a rule without its words would refuse
    for ever."""
    declared = settings.settings_of(cls)
    names, kinds = {each.name for each in declared}, {each.parse for each in declared}
    if kinds & {settings.listen_address, settings.target}:
        assert {*plaintext.TLS_FILES, plaintext.ALLOW} <= names
    if kinds & {settings.postgres_url, settings.amqp_url}:
        assert plaintext.ALLOW in names
    for each in declared:
        if each.name.endswith(("_LISTEN", "_TARGET", "_URL")) and "METRICS" not in each.name:
            assert each.parse in plaintext._REACHED, each.name
