"""The local stack, without its servers: processes, ports, environments, and a stack of two stand-in services."""

import fcntl
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from chassis import cells as chassis_cells
from deploy.local import cells, machine, services
from deploy.local.launch import how_it_ended
from deploy.local.machine import Notebook, Process, StackError
from deploy.local.services import PURCHASES, SERVICES, STACK, Service, programs_of
from deploy.local.stack import Stack, is_call_of

STAND_IN = """
import os, signal, sys
from concurrent.futures import ThreadPoolExecutor
import grpc
from grpc_health.v1 import health, health_pb2_grpc

name = sys.argv[1]
if name == "migrate":
    sys.exit("made by another version" if os.environ.get("LOG_REFUSE") == name else 0)
if os.environ.get("LOG_REFUSE") == name:
    sys.exit("I refuse")
server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
server.add_insecure_port(os.environ[name.upper() + "_LISTEN"])
server.start()
signal.sigwait({signal.SIGTERM})
server.stop(None).wait()
"""

ENV_OF_2 = ".local/run/relay-2.env"
DATABASE = services.Database("purchases", "owner", ("stand_in", "migrate"))


@pytest.fixture
def sleeper() -> Iterator[Process]:
    process = machine.spawn(["sleep", "60"], os.environ, Path.cwd(), Path(os.devnull))
    yield process
    process.end()


@pytest.fixture
def table() -> tuple[Service, ...]:
    return tuple(
        Service(name, ("stand_in", name), machine.pick_port(), machine.pick_port(), DATABASE, role="none")
        for name in ("purchases", "relay")
    )


@pytest.fixture
def table_of_cells() -> tuple[Service, ...]:
    """The same, once per cell, and what all cells share."""

    def both() -> tuple[int, int]:
        while not machine.port_is_free((port := machine.pick_port()) + services.PORTS_PER_CELL):
            pass
        return port, machine.pick_port()

    names = ("purchases", "relay", "consumer")
    return tuple(
        Service(name, ("stand_in", name), *both(), DATABASE, role="none", per_cell=name != "consumer") for name in names
    )


@pytest.fixture
def caller() -> dict[str, str]:
    """The environment of somebody who has servers already, so that none is started here."""
    plain = {name: value for name, value in os.environ.items() if name not in services.settings_of(os.environ)}
    elsewhere = {f"PURCHASES_{number}DATABASE_URL": "postgresql://elsewhere/purchases" for number in ("", "2_")}
    return plain | elsewhere | {"AMQP_URL": "amqp://elsewhere"}


@pytest.fixture
def stack(tmp_path: Path, table: tuple[Service, ...], caller: dict[str, str]) -> Iterator[Stack]:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    stack = Stack(tmp_path, table, caller)
    yield stack
    stack.stop()


def test_a_recycled_pid_is_another_process(sleeper: Process) -> None:
    """Nothing that merely has the pid of a process of ours is ever signalled."""
    former = Process(sleeper.pid, sleeper.started - 1)
    former.send(signal.SIGKILL)
    assert not former.alive
    assert not former.end()
    assert sleeper.alive


def test_a_dead_process_tells_how_it_ended(sleeper: Process) -> None:
    """Dead but not yet reaped counts as dead; its signal is named."""
    assert not sleeper.end(signal.SIGTERM)
    assert not sleeper.alive
    assert how_it_ended(sleeper) == "was killed by SIGTERM"


def test_a_process_that_does_not_heed_is_killed(tmp_path: Path) -> None:
    """Everything that waits has a deadline."""
    log = tmp_path / "log"
    deaf = machine.spawn(["sh", "-c", "trap '' TERM; echo ready; exec sleep 60"], os.environ, tmp_path, log)
    assert machine.wait_until(lambda: log.read_text() == "ready\n", 60)
    assert deaf.end(signal.SIGTERM, patience_s=0.1)


def test_a_service_gets_what_it_needs_and_no_more() -> None:
    """Its own URLs and the targets that it needs; the caller's settings reach all, but nobody else's URLs."""
    settings = {
        "BUSINESS_TIME_ZONE": "UTC",
        "RELAY_LISTEN": "0.0.0.0:7000",
        "ANALYTICS_DATABASE_URL": "a",
        "AMQP_URL": "b",
    }
    urls = {it.name: {it.database.setting: f"of {it.name}"} for it in SERVICES}
    purchases, relay, consumer, _, pages = (
        services.service_environ(it, STACK, settings, urls.get(it.name, {})) for it in STACK
    )
    assert purchases["PURCHASES_DATABASE_URL"] == "of purchases"
    assert not {"AMQP_URL", "ANALYTICS_DATABASE_URL", "RELAY_TARGET"} & purchases.keys()
    assert relay["RELAY_LISTEN"] == "0.0.0.0:7000"
    assert consumer["RELAY_TARGET"] == "127.0.0.1:7000"
    assert consumer["CONSUMER_METRICS_LISTEN"] == "127.0.0.1:9467"
    assert {it["BUSINESS_TIME_ZONE"] for it in (purchases, relay, consumer)} == {"UTC"}
    assert not any(name.endswith("_URL") for name in pages)
    assert pages["RELAY_TARGET"] == "127.0.0.1:7000"


def test_an_empty_setting_is_no_setting() -> None:
    assert services.settings_of({"AMQP_URL": "", "LOG_LEVEL": "debug", "HOME": "/"}) == {"LOG_LEVEL": "debug"}


def test_a_wrong_address_names_its_setting() -> None:
    with pytest.raises(StackError, match="RELAY_LISTEN=here: must be host:port"):
        SERVICES[1].addresses({"RELAY_LISTEN": "here"})


def test_the_env_file_survives_a_shell(tmp_path: Path) -> None:
    """Whatever a value holds, `. FILE` brings it back."""
    file = tmp_path / "x.env"
    file.write_text(services.export_lines({"X": 'it\'s $HOME `id` \\ "x"'}))
    read = subprocess.run(["sh", "-c", '. "$0"; printf %s "$X"', file], capture_output=True, text=True, check=True)
    assert read.stdout == 'it\'s $HOME `id` \\ "x"'


def test_a_private_port_moves_when_it_is_taken_and_stays_moved(tmp_path: Path) -> None:
    notes = Notebook(tmp_path / "notes.json")
    first = notes.port("x", None, in_use=False)
    with socket.create_server(("127.0.0.1", first)):
        assert notes.port("x", None, in_use=True) == first
        second = notes.port("x", None, in_use=False)
    assert second != first
    assert notes.port("x", None, in_use=False) == second
    assert (tmp_path / "notes.json").stat().st_mode & 0o777 == 0o600


def test_all_taken_ports_are_named_at_once(stack: Stack, table: tuple[Service, ...]) -> None:
    """With the setting that moves each, and who has it."""
    first, second = table
    taken = [socket.create_server(("127.0.0.1", port)) for port in (first.port, second.metrics_port)]
    with taken[0], taken[1], pytest.raises(StackError) as caught:
        stack.start()
    message = str(caught.value)
    assert f"port {first.port} (purchases, PURCHASES_LISTEN) is taken by pid {os.getpid()}" in message
    assert f"port {second.metrics_port} (relay, RELAY_METRICS_LISTEN) is taken by pid {os.getpid()}" in message


def test_a_reserved_port_is_still_there_for_a_server() -> None:
    port = machine.pick_port()
    with machine.reserve_port(port) or pytest.fail("it was free"), socket.create_server(("127.0.0.1", port)):
        assert not machine.port_is_free(port)


def test_what_is_missing_is_started_and_nothing_else(stack: Stack) -> None:
    """Twice in a row, after kill -9 of one, and with one restarted by hand."""
    assert stack.start() == ["purchases", "relay"]
    assert stack.start() == []
    relay = stack.processes()["relay"]
    assert relay
    relay.end(signal.SIGKILL)
    assert stack.start() == ["relay"]

    stack.stop(["relay"])
    by_hand = f". .local/run/relay.env && exec {shlex.quote(sys.executable)} -m stand_in relay"
    with subprocess.Popen(["sh", "-c", by_hand], cwd=stack.root, env={}):
        assert machine.wait_until(lambda: stack.processes()["relay"] is not None, 10)
        assert stack.start() == []
        stack.stop()
    assert not any(stack.processes().values())


def test_one_that_cannot_start_takes_down_what_was_started_with_it(
    tmp_path: Path, stack: Stack, table: tuple[Service, ...], caller: dict[str, str]
) -> None:
    """And the end of its log is in the message."""
    refusing = Stack(tmp_path, table, {**caller, "LOG_REFUSE": "relay"})
    with pytest.raises(StackError, match=r"relay ended with exit code 1(?s:.*)I refuse"):
        refusing.start()
    assert not any(refusing.processes().values())


def test_databases_of_another_version(
    tmp_path: Path, stack: Stack, table: tuple[Service, ...], caller: dict[str, str]
) -> None:
    """Whose databases are ours hears what to remove; other people's are nothing to remove."""
    refusing = Stack(tmp_path, table, {**caller, "LOG_REFUSE": "migrate"})
    with pytest.raises(StackError) as refused:
        refusing.start()
    assert "made by another version" in str(refused.value)
    assert "remove" not in str(refused.value)
    advice = refusing.launcher._how_to_start_anew({})
    assert all(f"{tmp_path}/.local/{server}" in advice for server in ("postgres", "rabbitmq"))


def test_a_restart_from_another_shell_keeps_the_settings(
    tmp_path: Path, stack: Stack, table: tuple[Service, ...]
) -> None:
    """Somebody types `make start` in a shell that knows nothing of the servers and ports in use."""
    stack.start()
    assert Stack(tmp_path, table, {"LOG_LEVEL": "debug"}).settings == {**stack.settings, "LOG_LEVEL": "debug"}
    stack.stop()
    assert Stack(tmp_path, table, {}).settings == {}


def test_the_last_user_stops_what_was_started_for_a_while(
    tmp_path: Path, table: tuple[Service, ...], caller: dict[str, str], stack: Stack
) -> None:
    """Two demos at once: the first one to end leaves the stack to the other."""
    other = Stack(tmp_path, table, caller)
    with other.used(temporary=True) as borrowed:
        with stack.used(temporary=True) as started:
            assert (borrowed, started) == (["purchases", "relay"], [])
        assert all(stack.processes().values())
    assert not any(stack.processes().values())


def test_what_somebody_wants_to_keep_is_kept(stack: Stack) -> None:
    """`make start` while a demo runs: the demo then stops nothing."""
    with stack.used(temporary=True), stack.used(temporary=False):
        pass
    assert all(stack.processes().values())


def test_one_command_at_a_time(tmp_path: Path) -> None:
    waited: list[bool] = []
    with machine.locked(tmp_path / "lock"), closing((tmp_path / "lock").open("w")) as second:
        assert not machine.try_lock(second.fileno(), fcntl.LOCK_EX)
    with machine.locked(tmp_path / "lock", lambda: waited.append(True)):
        assert waited == []


def test_the_table_is_complete() -> None:
    """No port is given out twice, however many cells there are, and each database has an owner."""
    everything = programs_of(services.CELLS_MAX)
    ports = [port for program in everything for port in (program.port, program.metrics_port)]
    assert len(set(ports)) == len(ports)
    assert PURCHASES.setting == "PURCHASES_DATABASE_URL"
    assert programs_of(1) == STACK


def test_the_second_cell_is_told_so_and_finds_its_own() -> None:
    """The first one's names and ports are those of an only one; the caller's settings of one reach no other."""
    programs = programs_of(2)
    names = [program.name for program in programs]
    assert names == ["purchases", "purchases-2", "relay", "relay-2", "consumer", "analytics", "pages"]
    first, second = programs[:2]
    settings = {"PURCHASES_LISTEN": "0.0.0.0:7000", "PURCHASES_2_DATABASE_URL": "secret"}
    told = [services.service_environ(it, programs, settings, {}) for it in (first, second)]
    assert [it["PURCHASES_LISTEN"] for it in told] == ["0.0.0.0:7000", "127.0.0.1:50061"]
    assert [it["PURCHASES_METRICS_LISTEN"] for it in told] == ["127.0.0.1:9464", "127.0.0.1:9474"]
    assert not any("secret" in it.values() for it in told)
    assert isinstance(second, Service) and second.database.name == "purchases-2"
    file = Path("cells.toml")
    assert [cells.environ(program, file)["CELL"] for program in programs[:3]] == ["default", "cell-2", "default"]
    assert cells.environ(programs[4], file)["CELL"] == ""
    assert cells.environ(first, None) == {}


@pytest.mark.parametrize("said", ["0", "5", "two", "-1", "1.0", "02"])
def test_a_number_of_cells_that_cannot_be(tmp_path: Path, said: str) -> None:
    with pytest.raises(StackError, match=f"CELLS={said}: must be 1 to 4"):
        Stack(tmp_path, STACK, {"CELLS": said})


@pytest.mark.parametrize("number", range(1, services.CELLS_MAX + 1))
def test_each_branch_is_in_a_cell_and_every_cell_has_some(tmp_path: Path, number: int) -> None:
    """Also of chains that count from 1, from 100, or from 1000."""
    cells.write(tmp_path / "cells.toml", programs_of(number), {})
    listed = chassis_cells.parse((tmp_path / "cells.toml").read_text())

    def having(branch: int) -> str:
        found = listed.of_branch(branch)
        assert found, f"branch {branch} is in no cell"
        return found.name

    assert {having(branch) for branch in (9, 10, 99, 100, 999, 1_000, 9_999, 10_000, chassis_cells.BRANCH_MAX)}
    for first, last in ((1, 4), (100, 140), (1_000, 1_400)):
        assert {having(branch) for branch in range(first, last + 1)} == listed.by_name.keys()
    assert len(listed.by_name) == number


def test_a_branch_that_has_moved_stays_where_it_is(tmp_path: Path) -> None:
    """A start writes the addresses of now; which branch is where is the file's to say. What makes no sense stays."""
    file = tmp_path / "cells.toml"
    programs = programs_of(2)
    cells.write(file, programs, {})
    file.write_text(file.read_text().replace("branches = [1, 3,", "branches = [3,").replace("[2,", "[1, 2,"))
    cells.write(file, programs, {"PURCHASES_2_LISTEN": "0.0.0.0:7000"})
    listed = chassis_cells.parse(file.read_text())
    assert listed.has("cell-2", 1) and listed.has("cell-2", 2) and listed.has("default", 3)
    assert listed.by_name["cell-2"].purchases == "127.0.0.1:7000"
    for broken in ("[default]\n", file.read_text().replace("cell-2", "south")):
        file.write_text(broken)
        with pytest.raises(StackError, match="does not list the 2 cells"):
            cells.write(file, programs, {})
        assert file.read_text() == broken


def test_cells_on_one_machine(tmp_path: Path, table_of_cells: tuple[Service, ...], caller: dict[str, str]) -> None:
    """Each process is known by its cell, also after kill -9 and when started by hand. While they run, another number of
    cells is refused."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    stack = Stack(tmp_path, table_of_cells, {**caller, "CELLS": "2"})
    names = ["purchases", "purchases-2", "relay", "relay-2", "consumer"]
    try:
        assert stack.start() == names
        again = Stack(tmp_path, table_of_cells, caller)
        assert again.start() == [] and list(again.processes()) == names
        for other in ("1", "3"):
            with pytest.raises(
                StackError, match=f"CELLS={other}, but the services run with CELLS=2: `make stop` first"
            ):
                Stack(tmp_path, table_of_cells, {**caller, "CELLS": other}).start()
        assert "CELLS_FILE" in again.client_environ()

        killed, other_cells = (again.processes()[name] for name in ("relay-2", "relay"))
        assert killed and other_cells
        killed.end(signal.SIGKILL)
        by_hand = f". .local/run/relay-2.env && exec {shlex.quote(sys.executable)} -m stand_in relay"
        with subprocess.Popen(["sh", "-c", by_hand], cwd=tmp_path, env={}):
            assert machine.wait_until(lambda: again.processes()["relay-2"] is not None, 10)
            assert again.processes()["relay"] == other_cells
            assert again.start() == []
            words = shlex.split((tmp_path / ENV_OF_2).read_text())
            in_that_shell = Stack(tmp_path, table_of_cells, dict(word.split("=", 1) for word in words if "=" in word))
            assert in_that_shell.start() == []
            assert not {"RELAY_LISTEN", "CELL", "CELLS_FILE"} & in_that_shell.settings.keys()
            again.stop()
    finally:
        stack.stop()
    assert not any(stack.processes().values())
    assert Stack(tmp_path, table_of_cells, caller).start() == ["purchases", "relay", "consumer"]
    Stack(tmp_path, table_of_cells, caller).stop()


@pytest.mark.parametrize(
    ("argv", "ours"),
    [
        ("/x/.venv/bin/python -m relay_svc serve", True),
        ("/x/.venv/bin/python /x/.venv/bin/retail-relay serve", True),
        ("/x/.venv/bin/python /x/.venv/bin/retail-relay status", False),
        ("/x/.venv/bin/python /x/.venv/bin/retail-purchases serve", False),
        ("/x/.venv/bin/python -m purchases_svc serve", False),
        ("tail -f retail-relay", False),
    ],
)
def test_a_service_is_known_by_its_call(argv: str, ours: bool) -> None:
    """However it was started: by the stack, or by hand."""
    assert is_call_of(("relay_svc", "serve"), argv.split()) is ours
