"""What is in a till's journal: its rows, its file's versions, and what can be wrong with it."""

import contextlib
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

APPLICATION_ID = 0x5254_4A4C  # "RTJL", by which a file is told to be a till's journal
NO_HASH = bytes(32)  # before the first row
_LETTERS = "BCDFGHJKLMNPQRSTVWXZ"  # of receipt numbers: no digits to be taken for a card's, no vowels, no words


class JournalError(Exception):
    """The sale is not in the journal, and must not get a receipt; the text says what to do."""


class JournalLocked(JournalError):
    """Another process, or this one, has it open."""


class JournalOfAnotherTill(JournalError):
    """It belongs to another branch or till, or is no journal at all."""


class JournalTooNew(JournalError):
    """A later version of this library wrote it; there is no way back, as what it holds might not survive it."""


class JournalDamaged(JournalError):
    """What it holds was changed, or is broken."""


class JournalNotWritten(JournalError):
    """The disk refused. Nothing of what was to be written is kept, nor will it come back."""


class State(StrEnum):
    """What became of a sale."""

    WAITING = "waiting"  # for the service's answer
    STORED = "stored"  # durable at the service
    REFUSED = "refused"  # for somebody to look at
    RESOLVED = "resolved"  # was refused, and somebody has
    VOID = "void"  # never happened: the disk refused it, and its till was told so


class Row(NamedTuple):
    """A sale in the journal: what was written once, then what became of it."""

    sequence: int
    epoch: str
    idempotency_key: str
    receipt_id: str
    business_date: str | None
    device_time: str
    boot_id: str
    boot_ns: int
    clock_offset_ms: int | None
    amount_cents: int
    payload: bytes
    hash: bytes
    state: State
    reason: str
    purchase_id: str
    settled_time: str
    note: str


class New(NamedTuple):
    """What a sale's row is made of; its receipt number is a part of what is sent."""

    idempotency_key: str
    business_date: str | None
    device_time: str
    boot_id: str
    boot_ns: int
    amount_cents: int
    payload: Callable[[str], bytes]  # of the receipt number


class Settled(NamedTuple):
    """What became of a sale that waited."""

    sequence: int
    state: State
    reason: str = ""
    purchase_id: str = ""
    note: str = ""


class Meta(NamedTuple):
    branch_id: int
    pos_id: str
    epoch: str
    epoch_first: int  # the first sequence number of the epoch
    next_sequence: int
    last_hash: bytes
    kept_from: int  # the first sequence number that has not been removed
    kept_hash: bytes  # of the row before it
    clock_offset_ms: int | None
    note: str  # what somebody who looks after the till should know


# One script for each version of the file; an upgrade runs what is missing, in one transaction.
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE journal (
        sequence INTEGER PRIMARY KEY,
        epoch TEXT NOT NULL,
        idempotency_key TEXT NOT NULL UNIQUE,
        receipt_id TEXT NOT NULL UNIQUE,
        business_date TEXT,
        device_time TEXT NOT NULL,
        boot_id TEXT NOT NULL,
        boot_ns INTEGER NOT NULL,
        clock_offset_ms INTEGER,
        amount_cents INTEGER NOT NULL,
        payload BLOB NOT NULL,
        hash BLOB NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('waiting', 'stored', 'refused', 'resolved', 'void')),
        reason TEXT NOT NULL DEFAULT '',
        purchase_id TEXT NOT NULL DEFAULT '',
        settled_time TEXT NOT NULL DEFAULT '',
        note TEXT NOT NULL DEFAULT ''
    ) STRICT;
    CREATE INDEX open_sales ON journal (state, sequence) WHERE state IN ('waiting', 'refused');
    CREATE TABLE meta (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        branch_id INTEGER NOT NULL,
        pos_id TEXT NOT NULL,
        epoch TEXT NOT NULL,
        epoch_first INTEGER NOT NULL,
        next_sequence INTEGER NOT NULL,
        last_hash BLOB NOT NULL,
        kept_from INTEGER NOT NULL,
        kept_hash BLOB NOT NULL,
        clock_offset_ms INTEGER,
        note TEXT NOT NULL
    ) STRICT;
    """,
)

META_COLUMNS = ", ".join(Meta._fields)
ROW_COLUMNS = ", ".join(Row._fields)


def chained(previous: bytes, fields: Sequence[object]) -> bytes:
    """The hash of a row: over all that is written once, and the row before it."""
    *values, payload = fields
    assert isinstance(payload, bytes)
    return hashlib.sha256(previous + json.dumps(values).encode() + b"\0" + payload).digest()


def letters(epoch: str) -> str:
    """What an epoch's receipt numbers begin with, so that those of two journals of one till do not meet."""
    number, text = uuid.UUID(epoch).int, ""
    for _ in range(4):
        number, place = divmod(number, len(_LETTERS))
        text += _LETTERS[place]
    return text


def boot() -> tuple[str, int]:
    """Which start of the machine this is, and the nanoseconds since: a clock that nobody sets."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        with contextlib.suppress(OSError):
            return _boot_id(), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return "", time.monotonic_ns()


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
