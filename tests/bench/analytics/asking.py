"""One question at a time: how long it takes, and how many rows PostgreSQL reads for it."""

import time
from typing import NamedTuple, TypeAlias

import grpc
import psycopg

from tests.bench.analytics.questions import SERVICE, Question
from tests.bench.figures import percentile

Call: TypeAlias = "grpc.UnaryUnaryMultiCallable[bytes, bytes]"

CALLS, MEASURE_S = 200, 0.5  # for a figure, whichever is reached first
CALL_TIMEOUT_S = 60.0
CONNECTIONS = 4  # of the server, which takes them in turn
HEAVY = {"ListTopProducts": 2}  # questions for which it has others, and how many
STATISTICS_S = 1.2  # PostgreSQL passes on what it counted once a second, at the end of a statement


class Asked(NamedTuple):
    """What the answers to one question took."""

    p50_ms: float
    p99_ms: float


class History(NamedTuple):
    """A running query server, and how much history it has: so many times the range that is asked for."""

    times: int
    url: str
    address: str


def ask(history: History, question: Question) -> Asked:
    """Answers stay bytes: what a client makes of them is no cost of the server's."""
    with grpc.insecure_channel(history.address) as channel:
        call: Call = channel.unary_unary(SERVICE + question.rpc)
        _call(call, question)
        took_ms: list[float] = []
        until = time.perf_counter() + MEASURE_S
        while len(took_ms) < CALLS and (time.perf_counter() < until or not took_ms):
            request = question.request().SerializeToString()
            started = time.perf_counter()
            call(request, timeout=CALL_TIMEOUT_S)
            took_ms.append((time.perf_counter() - started) * 1_000)
    took_ms.sort()
    return Asked(percentile(took_ms, 50), percentile(took_ms, 99))


def rows_read(history: History, question: Question) -> float:
    """Index entries and rows of scanned tables for one answer, as PostgreSQL counts them.

    Each connection is asked once at the end: what it keeps to itself would be counted among another question's rows.
    """
    connections = HEAVY.get(question.name, CONNECTIONS)
    with grpc.insecure_channel(history.address) as channel:
        call: Call = channel.unary_unary(SERVICE + question.rpc)

        def ask_each_connection(times: int = 1) -> None:
            for _ in range(times * connections):
                _call(call, question)

        def rows_so_far() -> int:
            time.sleep(STATISTICS_S)
            ask_each_connection()
            with psycopg.connect(history.url) as connection:
                row = connection.execute(
                    "SELECT (SELECT sum(seq_tup_read) FROM pg_stat_user_tables)"
                    " + (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes)"
                ).fetchone()
            assert row
            return int(row[0])

        before = rows_so_far()
        ask_each_connection(times=2)
        return (rows_so_far() - before) / (3 * connections)


def ask_purchases(url: str, question: Question) -> float:
    """Milliseconds that the same question to the tables of purchases takes."""
    with psycopg.connect(url, autocommit=True) as connection:
        started = time.perf_counter()
        connection.execute(question.sql.encode(), question.parameters).fetchall()
        return (time.perf_counter() - started) * 1_000


def _call(call: Call, question: Question) -> None:
    call(question.request().SerializeToString(), timeout=CALL_TIMEOUT_S)
