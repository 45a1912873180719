"""structlog, set up once: one JSON object a line, or columns when a person is watching.

Nothing secret or personal gets in. Tracebacks have no local variables: those are database URLs, sales and customers.
Of PostgreSQL's errors only the message proper is written: the DETAIL that follows it quotes rows. What else happens in
a process (uncaught, in a thread, in a callback, inside a library) takes the same way out.
"""

import asyncio
import logging
import re
import sys
import threading
import traceback
from collections.abc import Hashable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import psycopg
import structlog

from chassis import traces

FRAMES_MAX = 30  # of a traceback, the innermost
ERRORS_MAX = 10  # of a chain or a group
TEXT_MAX = 1_000  # characters of an error's text
EVERY_S = 1.0  # of a flood, a line

_SECRET = re.compile(r"(?<=://)[^\s/@]+(?=@)|(?<=password=)\S+")  # the user and password of a URL, of a conninfo
_QUOTED = re.compile(r'"[^"]*"')


def configure(process: str, level: str) -> None:
    """Route everything, libraries' logging included, to stderr. `level` is a name of the logging module."""
    threshold: int = getattr(logging, level)
    person = sys.stderr.isatty()
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        _with_trace,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.ExceptionRenderer(_traceback),
        _without_secrets,
    ]
    render: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if person
        else structlog.processors.JSONRenderer(default=str)
    )
    structlog.configure(
        processors=[*shared, render],
        # The level is decided when the logger is made: a debug call below it costs nothing on a hot path.
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(threshold, logging.WARNING))  # libraries speak only when something is wrong
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # every loss is reported once, by our own code
    logging.getLogger("asyncio").addFilter(_without_arguments)
    logging.raiseExceptions = False  # or a record that cannot be written is printed with its arguments

    sys.excepthook = _uncaught
    threading.excepthook = lambda failed: _uncaught(failed.exc_type, failed.exc_value, failed.exc_traceback)
    sys.unraisablehook = lambda failed: _uncaught(failed.exc_type, failed.exc_value, failed.exc_traceback)


def text_of(error: BaseException) -> str:
    """What an error says, without the data that it is about."""
    if isinstance(error, psycopg.Error) and error.sqlstate:
        text = error.diag.message_primary or f"SQLSTATE {error.sqlstate}"
        if error.sqlstate.startswith("22"):  # data exceptions quote the data
            text = _QUOTED.sub('"…"', text)
    else:
        text = _SECRET.sub("…", str(error).strip()) or type(error).__name__
    return text if len(text) <= TEXT_MAX else text[:TEXT_MAX] + "…"


def _with_trace(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """The ids of the span within which a line is written, if it is recorded."""
    span = traces.current()
    return {**span.ids, **event} if span else event


def _without_secrets(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Whoever logs an error hands over the error, as in `error=error`; what may be written of it is decided here."""
    for name, value in event.items():
        if isinstance(value, BaseException):
            event[name] = text_of(value)
        elif isinstance(value, str):
            event[name] = _SECRET.sub("…", value)
    return event


def _traceback(exc_info: structlog.typing.ExcInfo) -> str:
    return "\n".join(["Traceback, the innermost last:", *_lines(exc_info[1], set())])


def _lines(error: BaseException, told: set[int]) -> list[str]:
    """The innermost frames, then the error; before it what it came of, after it what it is made of."""
    if id(error) in told or len(told) >= ERRORS_MAX:
        return ["…"]
    told.add(id(error))
    lines: list[str] = []
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        lines += [*_lines(before, told), "from which came:"]
    frames = traceback.extract_tb(error.__traceback__, limit=-FRAMES_MAX)
    lines += [f"  {frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
    lines.append(f"{type(error).__module__}.{type(error).__qualname__}: {text_of(error)}")
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            lines += [f"  | {line}" for line in _lines(part, told)]
    return lines


def _uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return  # somebody ended a command, and knows it
    structlog.get_logger().critical("uncaught error", exc_info=(kind, error or kind(), trace))


def _without_arguments(record: logging.LogRecord) -> bool:
    """asyncio names the callback that failed with its arguments, and a task with its result."""
    record.msg, record.args = re.split(r"\n| in callback ", record.getMessage(), maxsplit=1)[0], ()
    return True


class _Flood(NamedTuple):
    """What was left out since the last line, and what that line said."""

    left_out: int
    values: dict[str, Any]


class Sampled:
    """Writes what may come in floods: one line a second for each kind of it, with how many it stands for.

    For the event loop's thread. What was left out is told when its second is over, whether or not more comes. Kinds
    must be few: whoever floods us must not make them up.
    """

    def __init__(self, level: str, event: str) -> None:
        self._level, self._event = level, event
        self._floods: dict[Hashable, _Flood] = {}  # kinds of which a line was written within the last second

    def __call__(self, kind: Hashable, **values: Any) -> Mapping[str, Any]:
        """Note an event. Returns the values of the line that stands for it."""
        flood = self._floods.get(kind)
        if flood is None:
            self._tell(kind, values)
            values.pop("exc_info", None)  # it would keep alive whatever its traceback holds
            return values
        self._floods[kind] = flood._replace(left_out=flood.left_out + 1)
        return flood.values

    def _tell(self, kind: Hashable, values: dict[str, Any]) -> None:
        getattr(structlog.get_logger(), self._level)(self._event, **values)
        self._floods[kind] = _Flood(0, values)
        asyncio.get_running_loop().call_later(EVERY_S, self._look_again, kind)

    def _look_again(self, kind: Hashable) -> None:
        flood = self._floods.pop(kind)
        if flood.left_out:
            self._tell(kind, {**flood.values, "count": flood.left_out})
