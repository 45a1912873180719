"""Whatever goes wrong, wherever: the log says where and what, and has nothing secret or personal in it."""

import asyncio
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import structlog

from chassis import grpc_guard, logs

ROOT = Path(__file__).parent.parent.parent
PASSWORD, CUSTOMER = "s3cr3t-pa55word", "4f7c2d1e-9b3a-4c58-8e6f-0a1b2c3d4e5f"

# Each way ends by an error on which a local variable, an argument or a default holds what must not be written.
PRELUDE = f"""
import asyncio, logging, os, sys, threading
import grpc, psycopg, structlog
from chassis import grpc_guard, lifecycle, logs
logs.configure("test", "INFO")
log = structlog.get_logger()
URL, CUSTOMER = "postgresql://till:{PASSWORD}@db.example:5432/sales", "{CUSTOMER}"

def fail(url=URL, customer=CUSTOMER):
    request = {{"customer_id": customer, "url": url}}
    raise RuntimeError("it broke", )

def chain():
    try:
        fail()
    except RuntimeError as error:
        try:
            fail()
        except RuntimeError:
            raise ExceptionGroup("several", [error, KeyError("other")])
"""
WAYS = {
    "our log, by exc_info": "try: chain()\nexcept Exception as error: log.error('bug', exc_info=error)",
    "our log, by exception()": "try: chain()\nexcept Exception: log.exception('bug')",
    "a library's log": "try: fail()\nexcept Exception: logging.getLogger('library').exception('bug')",
    "an error as a value": "log.error('bug it broke RuntimeError', error=psycopg.OperationalError(f'bad {URL}'))",
    "uncaught": "chain()",
    "in a thread": "thread = threading.Thread(target=fail, args=(URL, CUSTOMER)); thread.start(); thread.join()",
    "where nothing can be raised": "class Held:\n    def __del__(self): fail()\nheld = Held()\ndel held",
    "a task that nobody awaits": """
async def main():
    async def work(url): fail(url)
    asyncio.get_running_loop().create_task(work(URL))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    import gc; gc.collect()
asyncio.run(main())""",
    "a callback of the loop": """
async def main():
    asyncio.get_running_loop().call_soon(fail, URL, CUSTOMER)
    await asyncio.sleep(0.01)
asyncio.run(main())""",
    "a callback of uvloop": """
async def main(stop):
    asyncio.get_running_loop().call_soon(fail, URL, CUSTOMER)
    await asyncio.sleep(0.01)
lifecycle.run(main)""",
    "the main task": """
async def main(stop):
    url = URL
    async with lifecycle.beside(asyncio.sleep(1)):
        fail()
lifecycle.run(main)""",
    "a handler": """
async def main():
    error = None
    try: chain()
    except Exception as failed: grpc_guard.explain(failed, 'CreatePurchase')
asyncio.run(main())""",
    "a handler of gRPC's own": """
async def main():
    async def handler(request, context): fail()
    server = grpc.aio.server()
    method = grpc.unary_unary_rpc_method_handler(handler)
    server.add_registered_method_handlers('s', {'m': method})
    port = server.add_insecure_port('127.0.0.1:0')
    await server.start()
    async with grpc.aio.insecure_channel(f'127.0.0.1:{port}') as channel:
        try: await channel.unary_unary('/s/m')(b'', wait_for_ready=True)
        except grpc.RpcError: pass
    await server.stop(None)
asyncio.run(main())""",
}


def run(way: str, *, person: bool = False) -> str:
    """What a process writes that fails in this way."""
    command = [sys.executable, "-c", PRELUDE + WAYS[way]]
    if not person:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stderr
    terminal, ours = pty.openpty()
    with subprocess.Popen(command, cwd=ROOT, stdout=ours, stderr=ours):
        os.close(ours)
        written = b""
        try:
            while part := os.read(terminal, 65_536):
                written += part
        except OSError:  # the last who could write is gone
            pass
    os.close(terminal)
    return written.decode()


@pytest.mark.parametrize("person", [False, True], ids=["JSON", "console"])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_secret_is_logged(way: str, person: bool) -> None:
    """The error is told, with its place; the password and the customer, which its frames hold, are not."""
    written = run(way, person=person)
    assert "RuntimeError" in written and "it broke" in written, written
    assert PASSWORD not in written and CUSTOMER not in written, written


@pytest.mark.parametrize("way", WAYS)
def test_every_line_is_json(way: str) -> None:
    """A collector of logs can read all of it, whoever wrote it."""
    for line in run(way).splitlines():
        assert json.loads(line)["level"] in ("error", "critical"), line


def test_what_postgresql_quotes_is_not_told(postgres_url: str) -> None:
    """Neither the row that broke a constraint, which comes as DETAIL, nor the value that is none of its type."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("CREATE TEMP TABLE sold (customer_id text CHECK (length(customer_id) < 9))")
        for statement in ("INSERT INTO sold VALUES (%s)", "SELECT ('x' || %s)::uuid"):
            with pytest.raises(psycopg.Error) as caught:
                connection.execute(statement, [CUSTOMER])
            assert CUSTOMER in str(caught.value)
            assert CUSTOMER not in logs.text_of(caught.value)
            assert logs.text_of(caught.value).split(" ")[0] in ("new", "invalid"), "the message proper is told"


def test_errors_are_logged_as_errors() -> None:
    """Whoever makes a text of an error before logging it takes away the decision what of it may be written."""
    made_text = re.compile(r"\blog\.\w+\([^\n]*(str|repr)\(\w*err|\blog\.\w+\([^\n]*\{\w*error", re.MULTILINE)
    services = ("chassis", "purchases_svc", "relay_svc", "analytics_svc", "pos")
    files = [file for service in services for file in (ROOT / service).rglob("*.py")]
    assert len(files) > 60
    assert [str(file) for file in files if made_text.search(file.read_text())] == []


def written(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


@pytest.fixture
def to_stderr() -> Iterator[None]:
    """What is logged goes to the test's stderr, as JSON."""
    structlog.configure(
        processors=[structlog.processors.JSONRenderer()],
        logger_factory=lambda: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )
    yield
    structlog.reset_defaults()


async def test_a_flood_is_sampled(
    to_stderr: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a thousand refusals one line, then one with how many it stands for; another kind has lines of its own."""
    monkeypatch.setattr(logs, "EVERY_S", 0.05)
    refused = logs.Sampled("info", "refused")
    for _ in range(1_000):
        refused("busy", code="RESOURCE_EXHAUSTED")
    refused("wrong", code="INVALID_ARGUMENT")
    lines = written(capsys)
    assert [(line["code"], line.get("count")) for line in lines] == [
        ("RESOURCE_EXHAUSTED", None),
        ("INVALID_ARGUMENT", None),
    ]
    await asyncio.sleep(0.5)  # ten times as long as it takes
    assert [(line["code"], line.get("count")) for line in written(capsys)] == [("RESOURCE_EXHAUSTED", 999)]
    refused("busy", code="RESOURCE_EXHAUSTED")
    assert [line.get("count") for line in written(capsys)] == [None], "the flood is over, and forgotten"


async def test_one_bug_has_one_entry(to_stderr: None, capsys: pytest.CaptureFixture[str]) -> None:
    """However many calls meet it: each is told the id of the one entry that has the traceback."""

    def broken() -> None:
        raise RuntimeError("a bug")

    told = set()
    for _ in range(500):
        with pytest.raises(RuntimeError) as caught:
            broken()
        told.add(grpc_guard.explain(caught.value, "CreatePurchase").metadata["error_id"])
    assert [line["error_id"] for line in written(capsys)] == list(told)
