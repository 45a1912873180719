"""`python -m tests.bench.pipeline.notify [SECONDS]`: what waking the relay costs the writers, in commits per second.

Each transaction writes one event; sixteen clients. Beside the plain insert: with a look at whether a relay waits, which
is what the purchases service does; and with NOTIFY in the transaction, which is what it does not do.
"""

import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import psycopg

from deploy.local.machine import StackError
from deploy.local.postgres import Postgres, binaries
from tests.bench import stage

CLIENTS = 16
ROUNDS = 5

_INSERT = """
INSERT INTO outbox_events (event_id, event_type, aggregate_id, occurred_at, payload_json)
VALUES (uuidv7(), 'PurchaseCreated', gen_random_uuid(), now(), '{"purchase": {"items": [1, 2, 3]}}')
"""
WAYS = {
    "insert alone": f"{_INSERT};",
    "with a look at who waits": f"""
        WITH event AS ({_INSERT}) SELECT -1 WHERE EXISTS (SELECT FROM relay_waiting WHERE until > now());""",
    "with NOTIFY inside": f"WITH event AS ({_INSERT}) SELECT pg_notify('outbox_events', '');",
}


def main() -> None:
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    with stage.temporary_directory() as directory, stage.private_postgres(directory / "postgres") as server:
        url = stage.migrated(server, "notify", "purchases_svc")
        stage.ensure_today(url)
        with psycopg.connect(url, autocommit=True) as listening:
            listening.execute("LISTEN outbox_events")
            for _ in range(ROUNDS):
                for way, script in WAYS.items():
                    rates[way].append(commits_per_s(server, script, seconds, directory / "script.sql"))
                    list(listening.notifies(timeout=0))
    plain = median(rates["insert alone"])
    for way, values in rates.items():
        print(f"{way:26} {median(values):8,.0f} commits/s  {median(values) / plain:5.2f}")


def commits_per_s(server: Postgres, script: str, seconds: int, file: Path) -> float:
    file.write_text(script)
    host, _, port = server.address.rpartition(":")
    where = ["-h", host, "-p", port, "-U", "postgres", "notify"]
    done = subprocess.run(
        [
            str(binaries() / "pgbench"),
            "-n",
            "-M",
            "prepared",
            "-f",
            str(file),
            "-c",
            str(CLIENTS),
            "-j",
            "2",
            "-T",
            str(seconds),
            *where,
        ],
        env={"PGPASSWORD": server.notes.password("postgres")},
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=False,
    )
    rate = re.search(r"^tps = ([0-9.]+)", done.stdout, re.MULTILINE)
    if done.returncode or not rate:
        raise StackError(f"pgbench failed:\n{done.stdout}{done.stderr}")
    return float(rate[1])


if __name__ == "__main__":
    main()
