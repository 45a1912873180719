"""The yardstick: PostgreSQL's own load generator, which writes the same rows as plain statements."""

import datetime
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from deploy.local.machine import StackError
from deploy.local.postgres import Postgres, binaries
from tests.bench import machine
from tests.bench.figures import Figure, percentile

THREADS_MAX = 2
CONNECT_ALLOWANCE_S = 60.0

SCRIPT = Path(__file__).with_name("purchase.sql")


def run(server: Postgres, database: str, clients: int, measure_s: int, directory: Path) -> Figure:
    """One purchase after the other from each of `clients` connections, for `measure_s`."""
    assert server.process
    script = directory / "purchase.sql"
    script.write_text(SCRIPT.read_text().replace("DAY", datetime.datetime.now(datetime.UTC).date().isoformat()))
    log = directory / "pgbench"
    command = [binaries() / "pgbench", "-n", "-M", "prepared", "-f", script, "-c", clients, "-T", measure_s]
    command += ["-j", min(clients, THREADS_MAX), "-l", "--log-prefix", log, *_where(server), database]
    # As our service does: once autovacuum saw the tables empty, foreign keys would be checked by reading them whole.
    options = "-c enable_seqscan=off"
    environ = {**os.environ, "PGPASSWORD": server.notes.password("postgres"), "PGOPTIONS": options}
    database_before_s, own_before_s = machine.cpu_s(server.process.pid), _children_cpu_s()
    done = subprocess.run(
        [str(word) for word in command],
        env=environ,
        capture_output=True,
        text=True,
        timeout=measure_s + CONNECT_ALLOWANCE_S,
        check=False,
        start_new_session=True,  # Ctrl-C reaches us alone, and we end it
    )
    database_s, own_s = machine.cpu_s(server.process.pid) - database_before_s, _children_cpu_s() - own_before_s
    rate = re.search(r"^tps = ([0-9.]+)", done.stdout, re.MULTILINE)
    count = re.search(r"^number of transactions actually processed: (\d+)", done.stdout, re.MULTILINE)
    if done.returncode or not rate or not count or int(count[1]) == 0:
        raise StackError(f"pgbench failed:\n{done.stdout}{done.stderr}")
    latencies_ms = sorted(_latencies_ms(log))
    return Figure(
        float(rate[1]),
        percentile(latencies_ms, 50),
        percentile(latencies_ms, 99),
        own_s / int(count[1]) * 1e6,
        database_s / int(count[1]) * 1e6,
    )


def _where(server: Postgres) -> list[str]:
    """The same TCP loopback as our service uses."""
    host, _, port = server.address.rpartition(":")
    return ["-h", host, "-p", port, "-U", "postgres"]


def _children_cpu_s() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _latencies_ms(log: Path) -> Iterator[float]:
    """Of each transaction; the files, one for each thread, are removed."""
    for file in log.parent.glob(f"{log.name}.*"):
        for line in file.read_text().splitlines():
            yield int(line.split()[2]) / 1_000
        file.unlink()
