"""`python -m analytics_svc prove`: the continuous audit, in a process that `consume` starts, and that ends with it.

A proof reads all purchases of a day. In the consumer's own loop it would hold up the queue, the keeper and the health.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import structlog
from prometheus_client import Counter

from analytics_svc import database
from analytics_svc.proof.auditor import Auditor
from analytics_svc.settings import ProveSettings
from analytics_svc.upstream import chain
from chassis import lifecycle, postgres, tls, zones
from chassis.lifecycle import Backoff, wait_set

COMMAND = (sys.executable, "-m", "analytics_svc", "prove")
CONNECTIONS = 4  # one holds the lock, two work, one is there when one breaks
STATEMENT_TIMEOUT_S = 300.0  # a range of a long history takes seconds
STOP_TIMEOUT_S = 5.0
RAN_WELL_S = 60.0  # who lived so long is started again at once

ENDED = Counter("analytics_audit_ended_total", "Times that the audit's process ended and was started again.")

log = structlog.get_logger()


async def prove(config: ProveSettings, stop: asyncio.Event) -> None:
    """Audit until `stop`, or until whoever holds the other end of our standard input is gone."""
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), _stop_at_end, stop)
    async with (
        postgres.open_pool(
            config.database_url,
            role="analytics_consumer",
            application_name="analytics audit",
            size=CONNECTIONS,
            statement_timeout_s=STATEMENT_TIMEOUT_S,
        ) as pool,
        chain.connect(
            config,
            zones.load(config.business_time_zone),
            tls.credentials(config),
            purchases=config.purchases_target,
            relay=config.relay_target,
        ) as cells,
    ):
        if await database.wait_until_ready(pool, config.business_time_zone, stop):
            async with lifecycle.beside(cells.follow(), Auditor(pool, cells).run()):
                await stop.wait()


def _stop_at_end(stop: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 1_024):
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        stop.set()


@asynccontextmanager
async def proving(config: ProveSettings) -> AsyncIterator[None]:
    """Keep such a process running while the block lasts."""
    async with lifecycle.beside(_keep_running(config)):
        yield


async def _keep_running(config: ProveSettings) -> None:
    environment = os.environ | {
        "ANALYTICS_DATABASE_URL": config.database_url,
        "BUSINESS_TIME_ZONE": config.business_time_zone,
        "PURCHASES_TARGET": config.purchases_target,
        "CELLS_FILE": config.cells_file,
        "LOG_LEVEL": config.log_level,
        "TLS_CERTIFICATE_FILE": config.certificate_file,
        "TLS_KEY_FILE": config.key_file,
        "TLS_CA_FILE": config.ca_file,
        "ALLOW_PLAINTEXT": config.allow_plaintext,
    }
    backoff = Backoff(1.0, 30.0)
    now = asyncio.get_running_loop().time
    while True:
        began = now()
        process = await asyncio.create_subprocess_exec(*COMMAND, stdin=asyncio.subprocess.PIPE, env=environment)
        try:
            code = await process.wait()
        finally:
            if process.returncode is None:
                await _end(process)
        ENDED.inc()
        if now() - began >= RAN_WELL_S:
            backoff.reset()
        pause_s = backoff.next_s()
        log.error("the audit's process has ended; starting another one", code=code, pause_s=round(pause_s, 1))
        await asyncio.sleep(pause_s)


async def _end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
    ended = asyncio.Event()
    waiting = asyncio.ensure_future(process.wait())
    waiting.add_done_callback(lambda _: ended.set())
    if not await wait_set(ended, STOP_TIMEOUT_S):
        with suppress(ProcessLookupError):
            process.kill()
        await waiting
