"""structlog, set up once: one JSON object a line, or coloured columns when a person is watching."""

import logging
import sys

import structlog


def configure(process: str, level: str) -> None:
    """Route everything, libraries' logging included, to stderr. `level` is a name of the logging module."""
    threshold: int = getattr(logging, level)
    person = sys.stderr.isatty()
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if person else structlog.processors.JSONRenderer(default=str)
    )
    tracebacks = [] if person else [structlog.processors.dict_tracebacks]
    structlog.configure(
        processors=[*shared, *tracebacks, render],
        # The level is decided when the logger is made: a debug call below it costs nothing on a hot path.
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tracebacks, render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(threshold, logging.WARNING))  # libraries speak only when something is wrong
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # every loss is reported once, by our own code
