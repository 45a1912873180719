"""`python -m analytics_svc report [--days N] [--branch ID] [--json | --png FILE]`: the owner's page.

Reads everything through the analytics API, so it works from anywhere that reaches the server.
"""

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console

from analytics_svc.commands import report_page
from analytics_svc.commands.figures import as_json, gather
from analytics_svc.settings import ReportSettings
from chassis import grpc_client
from retail.analytics.v1.analytics_service_pb2_grpc import AnalyticsServiceStub

CALL_TIMEOUT_S = 30.0
DAYS, DAYS_MAX = 28, 366  # by default, at most: beyond, a page is no page any more
TOP = 10  # products, customers
ROWS_PER_PAGE = 1_000
DAY = datetime.timedelta(days=1)
EARLIEST = datetime.date(2000, 1, 1)  # no sale lies before it


def run(config: ReportSettings, arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    options = _parse(arguments)
    if options.png:
        try:
            from analytics_svc.commands.report_plots import draw
        except ImportError:
            message = "report: --png needs matplotlib: .venv/bin/pip install --require-hashes -r requirements-plots.txt"
            print(message, file=sys.stderr)
            return 1
    try:
        with grpc_client.connect_blocking(config.analytics_target) as channel:
            found = gather(AnalyticsServiceStub(channel), options.days, options.branch)
    except grpc.RpcError as error:
        print(f"report: {config.analytics_target}: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    if options.png:
        draw(found, options.png)
        print(options.png)
    elif options.json:
        print(as_json(found))
    else:
        report_page.show(found, Console(highlight=False))
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m analytics_svc report", description="The owner's page.")
    parser.add_argument("--days", type=_number(DAYS_MAX), default=DAYS, help=f"to look back ({DAYS})")
    parser.add_argument("--branch", type=_number(2**31 - 1), help="one branch only")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="for programs; amounts are texts, as they are exact")
    output.add_argument("--png", type=_file, metavar="FILE", help="a picture; needs matplotlib")
    return parser.parse_args(arguments)


def _number(most: int) -> Any:
    def number(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {most}")
        return int(text)

    return number


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError("must be a file in a directory that exists")
    return path
