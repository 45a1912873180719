"""`retail-analytics report [--days N] [--branch ID] [--json | --png FILE]`: the owner's page.

Reads everything through the analytics API, so it works from anywhere that reaches the server.
"""

from pathlib import Path

import click
import grpc

from analytics_svc.commands import figures, report_page
from analytics_svc.settings import ReportSettings
from chassis import cli, grpc_client, tls
from retail.analytics.v1.analytics_service_pb2_grpc import AnalyticsServiceStub

DAYS, DAYS_MAX = 28, 366  # by default, at most: beyond, a page is no page any more


def _new_file(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    if path and not path.absolute().parent.is_dir():
        raise click.BadParameter("must be a file in a directory that exists")
    return path


@click.command()
@click.option(
    "--days", type=click.IntRange(1, DAYS_MAX), default=DAYS, show_default=True, metavar="N", help="To look back."
)
@click.option("--branch", type=click.IntRange(1, 2**31 - 1), metavar="ID", help="One branch only. [default: all]")
@click.option("--json", "as_json", is_flag=True, help="For programs; amounts are texts, as they are exact.")
@click.option(
    "--png",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_new_file,
    metavar="FILE",
    help="A picture instead; needs matplotlib.",
)
def report(days: int, branch: int | None, as_json: bool, png: Path | None) -> int:
    """Show the owner's page.

    Revenue, branches, top products, loyal customers, and how fresh all that is.
    """
    if as_json and png:
        raise click.UsageError("--json or --png, not both")
    if png:
        try:
            from analytics_svc.commands.report_plots import draw
        except ImportError:
            click.echo(
                "report: --png needs matplotlib: pip install 'retail-backbone[plots]', "
                "or in a checkout .venv/bin/pip install --require-hashes -r requirements-plots.txt",
                err=True,
            )
            return 1
    config = cli.of_environment_or_local_stack(ReportSettings, "analytics")
    target = config.analytics_target
    try:
        with grpc_client.connect_blocking(target, tls.credentials(config)) as channel:
            found = figures.gather(AnalyticsServiceStub(channel), days, branch)
    except grpc.RpcError as error:
        click.echo(f"report: {target}: {error.code().name}: {error.details()}", err=True)
        return 1
    if png:
        draw(found, png)
        click.echo(png)
    elif as_json:
        click.echo(figures.as_json(found))
    else:
        report_page.show(found, cli.console())
    return 0
