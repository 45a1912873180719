"""What logs, metrics and traces cost: the service with all of them, beside the service with none."""

import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from deploy.local.collector import collecting
from deploy.local.machine import pick_port
from deploy.local.postgres import Postgres
from tests.bench import stage
from tests.bench.figures import Contender, Figure
from tests.bench.load import Job, LoadClient, load_client

PAIRS = 9  # measured one after the other, at least
AT_ONCE = 64
PER_S = 1_000  # purchases: at the same rate, both have commits of the same size
SCRAPED_EVERY_S = 1.0  # far more often than any Prometheus
TRACED = "0.01"

Measure = Callable[[Postgres, stage.Service, LoadClient, Job], Figure]


class Pair(NamedTuple):
    on: Contender
    off: Contender


@contextmanager
def telemetry(
    server: Postgres, settings: Mapping[str, str], measure_s: int, measure: Measure, directory: Path
) -> Iterator[Pair]:
    """CreatePurchase with all of it and with none of it."""
    page, collector = f"127.0.0.1:{pick_port()}", f"127.0.0.1:{pick_port()}"
    all_of_it = {
        **settings,
        "LOG_LEVEL": "INFO",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collector}",
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": TRACED,
    }
    none_of_it = {**settings, "LOG_LEVEL": "ERROR", "OTEL_SDK_DISABLED": "true"}
    job = Job("create", AT_ONCE, measure_s, PER_S)
    with (
        collecting(collector),
        stage.service("purchases", ("purchases_svc", "serve"), all_of_it, directory, metrics=page) as told,
        scraped(page),
        load_client(told.address, directory) as told_client,
        stage.service("purchases", ("tests.bench.write.silent",), none_of_it, directory) as silent,
        load_client(silent.address, directory) as silent_client,
    ):
        yield Pair(
            Contender("CreatePurchase, all told", AT_ONCE, partial(measure, server, told, told_client, job)),
            Contender("CreatePurchase, nothing told", AT_ONCE, partial(measure, server, silent, silent_client, job)),
        )


@contextmanager
def scraped(page: str) -> Iterator[None]:
    """Read the metrics again and again while the block lasts, as Prometheus does."""
    over = threading.Event()
    asked = urllib.request.Request(f"http://{page}/metrics", headers={"Accept": "application/openmetrics-text"})

    def scrape() -> None:
        while not over.wait(SCRAPED_EVERY_S):
            with urllib.request.urlopen(asked, timeout=10) as reply:
                reply.read()

    scraping = threading.Thread(target=scrape, daemon=True)
    scraping.start()
    try:
        yield
    finally:
        over.set()
        scraping.join()
