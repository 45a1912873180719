"""The write path: CreatePurchase, an open stream and UploadPurchases beside pgbench, on the same tables."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path

from deploy import certificates
from deploy.local.postgres import Postgres
from tests.bench import history, machine, pgbench, stage
from tests.bench.figures import (
    Contender,
    Figure,
    Goal,
    Outcome,
    Plan,
    Rounds,
    best,
    cpu,
    latency,
    raw,
    scores,
    short,
    speed,
    versus,
)
from tests.bench.load import Job, LoadClient, load_client
from tests.bench.show import Show
from tests.bench.write import telemetry
from tests.bench.write.plot import plot

DATABASE = "purchases"
CLIENTS, CALLS_IN_FLIGHT, STREAMS = (1, 8, 32), (1, 8, 64, 256), (1, 4)
CERTIFIED_AT_ONCE, TILL = 64, "branch/1/till/POS-3"
FIRST_STOP = 1_000_000  # purchases; on the way to more, the growth is measured there too

GOALS = {
    "create_vs_pgbench": Goal("CreatePurchase, purchases/s", 1.25, more_is_better=True),
    "create_cpu_vs_pgbench": Goal("CreatePurchase, CPU a purchase", 0.65, more_is_better=False),
    "upload_vs_pgbench": Goal("UploadPurchases, purchases/s", 4.0, more_is_better=True),
    "stream_vs_pgbench": Goal("open stream, purchases/s", 2.0, more_is_better=True),
    "stream_cpu_vs_pgbench": Goal("open stream, CPU a purchase", 0.45, more_is_better=False),
    "create_latency_vs_pgbench": Goal("CreatePurchase, latency alone", 3.0, more_is_better=False),
    "telemetry_cost": Goal(
        "CPU a purchase with logs, metrics and traces at 1 %, beside none", 1.05, more_is_better=False
    ),
    "journal_cost": Goal(
        "CPU a purchase with its place in its till's journal, beside none", 1.15, more_is_better=False
    ),
    "identity_cost": Goal("CPU a purchase with certificates and rules, beside without", 1.15, more_is_better=False),
}


def run(plan: Plan, show: Show) -> Outcome:
    with ExitStack() as stack:
        show.say("Starting a private PostgreSQL and the purchases service …")
        directory = stack.enter_context(stage.temporary_directory())
        history.require_room(plan.rows, directory)
        server = stack.enter_context(stage.private_postgres(directory))
        url = stage.migrated(server, DATABASE, "purchases_svc")
        # Nothing takes the events away here, so the outbox must not be found full.
        settings = {"PURCHASES_DATABASE_URL": url, "PURCHASES_OUTBOX_MAX": "0", "LOG_LEVEL": "WARNING"}
        service = stack.enter_context(stage.service("purchases", ("purchases_svc", "serve"), settings, directory))
        client = stack.enter_context(load_client(service.address, directory))

        families = contenders(server, service, client, plan.measure_s, directory)
        certified = stack.enter_context(with_certificates(server, settings, plan.measure_s, directory))
        telling = telemetry.telemetry(server, settings, plan.measure_s, measured_load, directory)
        (plain,) = (contender for contender in families[1] if contender.at_once == certified.at_once)
        # What is compared is measured shortly after one another: the machine may be another one a minute later.
        order = [contender for contender in chain(*zip_longest(*families)) if contender]
        order.insert(order.index(plain) + 1, certified)
        empty = measure(order, plan.rounds, show, "no purchases there", before=lambda: stage.empty_purchases(url))
        finalists = [best(empty, family) for family in families]
        with telling as told:
            pairs = max(plan.rounds, telemetry.PAIRS)
            telemetry_rounds = measure(told, pairs, show, "logs, metrics, traces", lambda: stage.empty_purchases(url))
        kept = journals(server, service, client, plan.measure_s)
        journal_rounds = measure(kept, pairs, show, "places in tills' journals", lambda: stage.empty_purchases(url))

        stage.empty_purchases(url)
        grown: dict[int, Rounds] = {}
        there = 0
        for rows in sorted({min(FIRST_STOP, plan.rows), plan.rows} - {0}):
            with show.progress(f"{rows:,} purchases, loading", rows - there) as advance:
                history.load(url, rows - there, advance)
            there = rows
            grown[rows] = measure(finalists, plan.rounds, show, f"{rows:,} purchases there")
        with server.connect() as connection:
            version = connection.info.parameter_status("server_version")

    pgbench_best, create, stream, upload = finalists
    (pgbench_alone, *_), (create_alone, *_), *_ = families
    ratios = {
        "create_vs_pgbench": versus(empty, create, pgbench_best, speed),
        "create_cpu_vs_pgbench": versus(empty, create, pgbench_best, cpu),
        "stream_vs_pgbench": versus(empty, stream, pgbench_best, speed),
        "stream_cpu_vs_pgbench": versus(empty, stream, pgbench_best, cpu),
        "upload_vs_pgbench": versus(empty, upload, pgbench_best, speed),
        "create_latency_vs_pgbench": versus(empty, create_alone, pgbench_alone, latency),
        "identity_cost": versus(empty, certified, plain, cpu),
        "telemetry_cost": versus(telemetry_rounds, told.on, told.off, cpu),
        "journal_cost": versus(journal_rounds, kept.on, kept.off, cpu),
    }
    for rows, figures in grown.items():
        # How it slowed down, beside how pgbench did: the speed of the disk and of the hour cancels out.
        for name, ours in (("create", create), ("stream", stream), ("upload", upload)):
            growth = versus(figures, ours, pgbench_best, speed) / versus(empty, ours, pgbench_best, speed)
            ratios[f"{name}_at_{short(rows)}_vs_empty"] = growth

    show.figures("With no purchases there", empty)
    for rows, figures in grown.items():
        show.figures(f"With {rows:,} purchases there", figures)
    show.ratios("Beside pgbench, which is 1", ratios, GOALS)
    details = {
        "postgresql": version,
        "compared": [contender.name for contender in finalists],
        "no_purchases": raw(empty),
        "telemetry": raw(telemetry_rounds),
        "journals": raw(journal_rounds),
        **{f"{rows}_purchases": raw(figures) for rows, figures in grown.items()},
    }
    return Outcome({**ratios}, details, plot(families, empty, finalists), scores(ratios, GOALS))


def contenders(
    server: Postgres, service: stage.Service, client: LoadClient, measure_s: int, directory: Path
) -> tuple[list[Contender], ...]:
    """pgbench, CreatePurchase, an open stream and UploadPurchases; the least at once first."""

    def yardstick(clients: int) -> Figure:
        return pgbench.run(server, DATABASE, clients, measure_s, directory)

    def load(method: str, at_once: int) -> Figure:
        return measured_load(server, service, client, Job(method, at_once, measure_s))

    return (
        [Contender("pgbench", n, partial(yardstick, n)) for n in CLIENTS],
        [Contender("CreatePurchase", n, partial(load, "create", n)) for n in CALLS_IN_FLIGHT],
        [Contender("open stream", n, partial(load, "stream", n)) for n in CALLS_IN_FLIGHT],
        [Contender("UploadPurchases", n, partial(load, "upload", n)) for n in STREAMS],
    )


@contextmanager
def with_certificates(
    server: Postgres, settings: Mapping[str, str], measure_s: int, directory: Path
) -> Iterator[Contender]:
    """CreatePurchase once more, by a till with a certificate from a service that has one, and holds it to the rules."""
    files = directory / "certificates"
    certificates.make(files, {"service/purchases": certificates.LOOPBACK, TILL: ()})
    known = {**settings, **certificates.environ(files, "service/purchases"), "CALLER_CALLS_PER_S": "1000000"}
    with (
        stage.service("purchases", ("purchases_svc", "serve"), known, directory) as service,
        load_client(service.address, directory, identity=certificates.environ(files, TILL)) as client,
    ):
        job = Job("create", CERTIFIED_AT_ONCE, measure_s)
        measured = partial(measured_load, server, service, client, job)
        yield Contender("CreatePurchase with certificates", CERTIFIED_AT_ONCE, measured)


def journals(server: Postgres, service: stage.Service, client: LoadClient, measure_s: int) -> telemetry.Pair:
    """CreatePurchase by tills that keep a journal and by tills that keep none, at one rate: so commits are as large."""

    def load(journal: bool) -> Figure:
        job = Job("create", telemetry.AT_ONCE, measure_s, telemetry.PER_S, journal=journal)
        return measured_load(server, service, client, job)

    return telemetry.Pair(
        Contender("CreatePurchase, from a journal", telemetry.AT_ONCE, partial(load, True)),
        Contender("CreatePurchase, from none", telemetry.AT_ONCE, partial(load, False)),
    )


def measured_load(server: Postgres, service: stage.Service, client: LoadClient, job: Job) -> Figure:
    assert server.process
    pids = (service.process.pid, server.process.pid)
    spent: list[list[float]] = []
    seen = client.run(job, lambda: spent.append([machine.cpu_s(pid) for pid in pids]))
    ours_s, database_s = (after - before for before, after in zip(*spent, strict=True))
    return Figure(
        seen.purchases / seen.seconds,
        seen.p50_ms,
        seen.p99_ms,
        ours_s / seen.purchases * 1e6,
        database_s / seen.purchases * 1e6,
    )


def measure(
    order: Sequence[Contender], rounds: int, show: Show, title: str, before: Callable[[], None] = lambda: None
) -> Rounds:
    def measured(contender: Contender) -> Figure:
        before()
        return contender.measure()

    return show.in_turn({contender.name: partial(measured, contender) for contender in order}, rounds, title)
