"""The commands: help, wrong calls, what is printed where, settings, and the local stack's settings."""

import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from analytics_svc.__main__ import commands as analytics
from chassis import cli
from pos.__main__ import commands as pos
from purchases_svc.__main__ import commands as purchases
from relay_svc.__main__ import commands as relay
from relay_svc.settings import ClientSettings, PartitionsSettings

ALL = {commands.name: commands for commands in (purchases, relay, analytics, pos)}
URL = "postgresql://till:s3cret@db1:5432,db2/purchases?sslmode=verify-full&sslpassword=s3cret"


def every(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Each command as it is called."""
    found = []
    for name, command in group.commands.items():
        found += every(command, (*path, name)) if isinstance(command, click.Group) else [(*path, name)]
    return found


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, group in ALL.items() for path in every(group)])
def test_every_command_has_help(name: str | None, path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert ALL[name].carry_out([*path, "--help"]) == 0
    said = capsys.readouterr().out
    assert "Usage:" in said
    assert "MISSING" not in said


@pytest.mark.parametrize("name", ALL)
def test_summaries_are_whole_in_a_narrow_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """None ends with an ellipsis in the list of commands."""
    assert ALL[name].carry_out(["--help"]) == 0
    assert "..." not in capsys.readouterr().out.partition("Commands:")[2]


@pytest.mark.parametrize(
    ("name", "arguments", "wrong"),
    [
        ("retail-relay", ["sing"], "sing"),
        ("retail-relay", ["events", "--limit", "0"], "--limit"),
        ("retail-relay", ["events", "--status", "LOST"], "--status"),
        ("retail-relay", ["requeue"], "--all-failed"),
        ("retail-relay", ["requeue", "id", "--all-failed"], "--all-failed"),
        ("retail-relay", ["serve", "now"], "now"),
        ("retail-purchases", ["partitions", "--dorp"], "--dorp"),
        ("retail-purchases", ["settings", "relay"], "relay"),
        ("retail-analytics", ["audit", "--first", "today"], "--first"),
        ("retail-analytics", ["quarantine", "discard"], "ENTRY"),
        ("retail-analytics", ["quarantine", "redrive", "--all", "id"], "--reason"),
    ],
)
def test_wrong_calls_end_with_2(
    name: str, arguments: list[str], wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And name what is wrong, on standard error."""
    assert ALL[name].carry_out(arguments) == 2
    said = capsys.readouterr()
    assert wrong in said.err
    assert not said.out


def test_processes_start_with_the_environment_only(
    local_stack: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What serves, consumes or migrates never takes the local stack's settings."""
    for name in ("PURCHASES_DATABASE_URL", "ANALYTICS_DATABASE_URL", "AMQP_URL"):
        monkeypatch.delenv(name, raising=False)
    for group, arguments in ((purchases, "serve"), (purchases, "migrate"), (relay, "serve"), (analytics, "consume")):
        assert group.carry_out([arguments]) == 2
        assert "_DATABASE_URL is not set" in capsys.readouterr().err


SERVERS = {
    "PURCHASES_DATABASE_URL": "postgresql://u:p@localhost/d",
    "ANALYTICS_DATABASE_URL": "postgresql://u:p@localhost/d",
    "AMQP_URL": "amqp://u:p@localhost/%2F",
}


@pytest.mark.parametrize(
    ("group", "process", "setting"),
    [
        (purchases, "migrate", "PURCHASES_DATABASE_URL"),
        (purchases, "serve", "PURCHASES_DATABASE_URL"),
        (relay, "serve", "PURCHASES_DATABASE_URL"),
        (relay, "serve", "AMQP_URL"),
        (analytics, "migrate", "ANALYTICS_DATABASE_URL"),
        (analytics, "consume", "ANALYTICS_DATABASE_URL"),
        (analytics, "consume", "AMQP_URL"),
        (analytics, "prove", "ANALYTICS_DATABASE_URL"),
        (analytics, "serve", "ANALYTICS_DATABASE_URL"),
    ],
)
@pytest.mark.parametrize("wrong", ["?port=http", "?ssl_options={'ca_certs':'/nowhere'}&sslrootcert=/nowhere"])
def test_no_process_starts_with_a_wrong_url(
    group: cli.Commands,
    process: str,
    setting: str,
    wrong: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a database or the broker, or an option of its TLS: it says so, and looks for no server."""
    for name, url in SERVERS.items():
        monkeypatch.setenv(name, url)
    monkeypatch.setenv(setting, SERVERS[setting].replace("amqp:", "amqps:") + wrong)
    assert group.carry_out([process]) == 2
    said = capsys.readouterr().err
    assert f"{setting}=(hidden): " in said


@pytest.fixture
def local_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkout whose .venv we seem to run in."""
    run = tmp_path / ".local" / "run"
    run.mkdir(parents=True)
    told = {"RELAY_TARGET": "127.0.0.1:1111", "PURCHASES_DATABASE_URL": URL, "LOG_LEVEL": "ERROR"}
    lines = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in told.items())
    for process in ("relay", "purchases", "consumer", "analytics"):
        (run / f"{process}.env").write_text(lines)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    for name in told:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_local_stack(local_stack: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A command that is told of no server takes the local stack's, and says so; one that is told takes none of it."""
    assert cli.of_environment_or_local_stack(ClientSettings, "relay").relay_target == "127.0.0.1:1111"
    assert str(local_stack) in capsys.readouterr().err
    assert cli.of_environment_or_local_stack(PartitionsSettings, "relay").log_level == "ERROR"
    operator = "export TLS_CERTIFICATE_FILE=operator.pem\n"
    (local_stack / ".local" / "run" / "operator.env").write_text(operator)  # a person is nobody's process
    assert cli.of_environment_or_local_stack(ClientSettings, "relay").certificate_file == "operator.pem"
    monkeypatch.setenv("LOG_LEVEL", "DEBUG")
    assert cli.of_environment_or_local_stack(PartitionsSettings, "relay").log_level == "DEBUG"
    monkeypatch.delenv("LOG_LEVEL")
    monkeypatch.setenv("PURCHASES_DATABASE_URL", "postgresql://localhost:1/purchases")
    capsys.readouterr()
    assert cli.of_environment_or_local_stack(PartitionsSettings, "relay") == PartitionsSettings(
        "postgresql://localhost:1/purchases"
    )
    assert not capsys.readouterr().err
    monkeypatch.setattr(sys, "prefix", "/usr")
    monkeypatch.delenv("PURCHASES_DATABASE_URL")
    assert relay.carry_out(["partitions"]) == 2
    assert "PURCHASES_DATABASE_URL is not set" in capsys.readouterr().err


def test_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Name, value, default, unit and meaning, each on a line of its own; nothing secret; what is wrong gives 2."""
    monkeypatch.setenv("PURCHASES_DATABASE_URL", URL)
    monkeypatch.setenv("RELAY_WINDOW", "250")
    monkeypatch.setenv("RELAY_LISTEN", "[::1]:50053")
    assert relay.carry_out(["settings", "serve"]) == 0
    said = capsys.readouterr().out
    lines = {line.split()[0]: line for line in said.splitlines() if line.strip()}
    assert lines["RELAY_WINDOW"].split()[1:4] == ["250", "500", "events"]
    assert "[::1]:50053" in lines["RELAY_LISTEN"]
    assert "db1:5432,db2/purchases" in lines["PURCHASES_DATABASE_URL"]
    assert "s3cret" not in said
    monkeypatch.setenv("RELAY_LISTEN", "[::]:50053")
    assert relay.carry_out(["settings", "serve"]) == 2
    assert "RELAY_LISTEN: [::] is beyond this machine" in capsys.readouterr().out
    monkeypatch.setenv("RELAY_WINDOW", "many")
    assert relay.carry_out(["settings"]) == 2
    assert "many: must be a whole number from 1 to 10000" in capsys.readouterr().out


def test_nothing_that_is_printed_is_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """What events, errors and addresses contain is shown as it is."""
    cli.console().print("[::]:50051 [red]is[/] :key:")
    assert capsys.readouterr().out == "[::]:50051 [red]is[/] :key:\n"


def test_pipes_get_whole_lines() -> None:
    """Lines are broken to fit a terminal only; what a program reads is not a terminal."""
    program = "from chassis import cli; cli.console().print('word ' * 100 + 'end')"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said == "word " * 100 + "end\n"
