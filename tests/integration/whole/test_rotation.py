"""Certificates are changed while calls are made, on both sides and with another CA: nobody notices.

Drilled as deploy/SECURITY.md has it. Connections live a moment here, instead of ten minutes.
"""

import asyncio
import itertools
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

import purchases_svc.__main__ as purchases
from analytics_svc.upstream import SERVICE_CONFIG
from chassis import grpc_client, grpc_server, tls
from chassis.tls import Credentials
from deploy import certificates
from deploy.certificates import Authority
from pos.client import PosClient, connect
from pos.errors import PosError
from purchases_svc.settings import ServeSettings
from retail.purchases.v1.purchases_service_pb2 import GetPurchaseRequest
from retail.purchases.v1.purchases_service_pb2_grpc import PurchasesServiceStub
from tests.conftest import eventually
from tests.integration.conftest import free_address

CALLERS = 4
CALLS = 500  # of each, at least
STEPS_PAUSE_S = 0.3
DEADLINE_S = 30.0
FILES = {"certificate": "own.pem", "key": "own-key.pem", "ca": "ca.pem"}
SERVER, CLIENT = "service/purchases", "operator/kim"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(grpc_server, "CONNECTION_AGE_S", 0.4)
    monkeypatch.setattr(grpc_server, "CONNECTION_GRACE_S", 30.0)


@dataclass
class Pki:
    """The files of a server and of a client, which need not believe the same CAs."""

    server: Path
    client: Path
    authority: Authority

    def issue(self, directory: Path) -> None:
        path = SERVER if directory == self.server else CLIENT
        hosts = certificates.LOOPBACK if directory == self.server else ()
        self.authority.issue(f"spiffe://retail.example/{path}", hosts=hosts).write(directory, "own")

    def believe(self, directory: Path, *authorities: Authority) -> None:
        certificates._replace(directory / "ca.pem", b"".join(it.pair.certificate for it in authorities), 0o644)

    def files(self, directory: Path) -> dict[str, Any]:
        return {f"{name}_file": str(directory / file) for name, file in FILES.items()}

    def credentials(self, directory: Path) -> Credentials:
        return Credentials(**self.files(directory))


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    made = Pki(tmp_path / "server", tmp_path / "client", Authority.new("old"))
    for directory in (made.server, made.client):
        directory.mkdir()
        made.issue(directory)
        made.believe(directory, made.authority)
    return made


@asynccontextmanager
async def serving(purchases_db: str, pki: Pki) -> AsyncIterator[str]:
    config = ServeSettings(
        purchases_db, listen=free_address(), metrics_listen="127.0.0.1:0", backlog_months=0, **pki.files(pki.server)
    )
    stop = asyncio.Event()
    task = asyncio.ensure_future(purchases.serve(config, stop))
    try:
        async with grpc_client.connect(config.listen, SERVICE_CONFIG, pki.credentials(pki.client)) as channel:

            async def up() -> bool:
                if task.done():
                    await task
                return await code_of(channel) == "NOT_FOUND"

            await eventually(up, "the service is up")
        yield config.listen
    finally:
        stop.set()
        await task


async def code_of(channel: grpc.aio.Channel) -> str:
    """How a call ends that finds nothing, if all is well."""
    request = GetPurchaseRequest(purchase_id=str(uuid.uuid4()))
    try:
        await PurchasesServiceStub(channel).GetPurchase(request, timeout=DEADLINE_S)
    except grpc.aio.AioRpcError as error:
        return error.code().name if error.code() is not grpc.StatusCode.UNAVAILABLE else error.details() or ""
    return "OK"


def steps(pki: Pki) -> Iterator[None]:
    """One after another; between any two, both sides go on."""
    old, new = pki.authority, Authority.new("new")
    for directory in (pki.server, pki.client):
        pki.issue(directory)
        yield
    for directory in (pki.server, pki.client):
        pki.believe(directory, old, new)
        yield
    pki.authority = new
    for directory in (pki.server, pki.client):
        pki.issue(directory)
        yield
    for directory in (pki.server, pki.client):
        pki.believe(directory, new)
        yield


async def test_no_call_fails_while_everything_is_changed(purchases_db: str, pki: Pki) -> None:
    """Certificates, keys, then the CA: first both are believed, then only the new one. Four callers, 2,000 calls at
    least, and a connection of each never gets older than half a second."""
    codes: Counter[str] = Counter()
    done = asyncio.Event()
    async with serving(purchases_db, pki) as address:

        async def call() -> None:
            async with grpc_client.connect(address, SERVICE_CONFIG, pki.credentials(pki.client)) as channel:
                for number in itertools.count():
                    if done.is_set() and number >= CALLS:
                        return
                    codes[await code_of(channel)] += 1

        async with asyncio.TaskGroup() as callers:
            for _ in range(CALLERS):
                callers.create_task(call())
            for _ in steps(pki):
                seen = codes.total()
                await asyncio.sleep(STEPS_PAUSE_S)

                async def moved(seen: int = seen) -> bool:
                    return codes.total() >= seen + 10 * CALLERS

                await eventually(moved, "calls go on")
            done.set()
        assert set(codes) == {"NOT_FOUND"}, codes
        assert codes.total() >= CALLERS * CALLS

        stranger = replace(pki, authority=Authority.new("another"))
        stranger.issue(stranger.client)
        async with grpc_client.connect(address, SERVICE_CONFIG, pki.credentials(pki.client)) as channel:
            request = GetPurchaseRequest(purchase_id=str(uuid.uuid4()))
            with pytest.raises(grpc.aio.AioRpcError):
                await PurchasesServiceStub(channel).GetPurchase(request, timeout=1)


async def test_tills_follow_too(purchases_db: str, pki: Pki) -> None:
    """The till's own channel, in a thread: one that stays open for days."""
    codes: Counter[str] = Counter()
    async with serving(purchases_db, pki) as address:
        done = asyncio.Event()

        def call() -> None:
            with connect(address, pki.credentials(pki.client)) as channel:
                client = PosClient(channel)
                while not done.is_set():
                    try:
                        client.get_purchase(str(uuid.uuid4()))
                    except PosError as error:
                        codes[error.status.code.name] += 1

        calling = asyncio.create_task(asyncio.to_thread(call))
        try:
            for _ in steps(pki):
                seen = codes.total()
                await asyncio.sleep(STEPS_PAUSE_S)

                async def moved(seen: int = seen) -> bool:
                    return codes.total() >= seen + 10

                await eventually(moved, "calls go on")
        finally:
            done.set()
            await calling
    assert set(codes) == {"NOT_FOUND"}, codes
