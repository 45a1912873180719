"""The command `retail-pos`, or `python -m pos`."""

from pathlib import Path
from typing import IO

import click

from chassis import cli
from pos.demo import demo
from pos.importing import command as import_command
from pos.settings import Settings

commands = cli.Commands(
    "retail-pos", "The tills' side: a simulated chain, and books that come in.", {"demo": (Settings, "purchases")}
)
commands.add_command(demo)


@commands.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--map", "name", metavar="MAP", help="What its columns mean: a TOML file, or one of those that come along."
)
@click.option("--guess", is_flag=True, help="Print a first map for the file.")
@click.option("--dry-run", is_flag=True, help="Read all of it, say what would become of it, send nothing.")
@click.option("--report", type=click.File("w", lazy=False), metavar="FILE", help="Write all that is told as JSON.")
def _import(file: Path, name: str | None, guess: bool, dry_run: bool, report: IO[str] | None) -> int:
    """Bring in a chain's history: CSV, TSV or Parquet.

    Whatever is left out is counted by its reason. Sent again, the same file changes nothing, so an import that was
    stopped is begun anew. The exit code is 0 only if the service has what was sent, to the cent; 2 if nothing was sent.
    """
    if guess == (name is not None):
        raise click.UsageError("give either --map or --guess")
    if guess:
        return import_command.run_guess(file)
    assert name is not None
    settings = cli.of_environment_or_local_stack(Settings, "purchases")
    return import_command.run(file, name, settings, cli.console(), dry_run=dry_run, report=report)


main = commands.run

if __name__ == "__main__":
    main()
