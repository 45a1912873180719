"""The commands of a process, as a person or a program calls them.

Every command takes its settings from the environment. Exit codes that all have: 0 it is done, 1 it is not, 2 it was
called wrongly or a setting is wrong, 130 somebody pressed Ctrl-C.
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from chassis import logs
from chassis.lifecycle import FORCED_EXIT_CODE
from chassis.settings import SettingsError, beyond, load, settings_of

T = TypeVar("T")

COLUMNS = ("setting", "value", "default", "unit", "meaning")
WIDTH_OF_PIPES = 10_000
HELP_WIDTH_MAX = 100
LOCAL_STACK = Path(".local", "run")  # holds NAME.env, the settings of each process of a checkout's local stack
LOCAL_STACK_RULE = (
    "Run from a checkout's .venv, a command (but not what serves, consumes or migrates) takes its settings from the "
    "checkout's local stack if the environment names none of the servers that it needs (…_TARGET, …_URL). It says so."
)


def console() -> Console:
    """Where to print: a terminal's lines are broken to fit it; those for a program or a file are left whole."""
    width = None if sys.stdout.isatty() else WIDTH_OF_PIPES
    return Console(width=width, highlight=False, markup=False, emoji=False)


class Commands(click.Group):
    """All commands of a package. A command's function returns its exit code, or nothing when it is 0.

    `processes` are those that have settings: the class, and the name by which the local stack knows the process.
    `failures` are what commands may fail with; anything else is a bug.
    """

    def __init__(
        self,
        name: str,
        meaning: str,
        processes: Mapping[str, tuple[type, str]],
        failures: tuple[type[Exception], ...] = (),
    ) -> None:
        super().__init__(
            name,
            help=meaning,
            epilog=LOCAL_STACK_RULE,
            context_settings={"help_option_names": ["-h", "--help"], "max_content_width": HELP_WIDTH_MAX},
        )
        self._failures = failures
        click.version_option(package_name="retail-backbone", message="%(package)s %(version)s")(self)
        self.add_command(_settings_command(processes))

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*(name for name in self.commands if name != "settings"), "settings"]

    def carry_out(self, arguments: Sequence[str]) -> int:
        """Do what is asked, tell what is wrong on standard error, and return the exit code."""
        asked = " ".join([self.name or "", *arguments[:1]])
        try:
            return int(self.main(list(arguments), standalone_mode=False) or 0)
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except click.Abort:
            return FORCED_EXIT_CODE
        except SettingsError as error:
            click.echo(f"{asked}: wrong settings:", err=True)
            for problem in error.problems:
                click.echo(f"  {problem}", err=True)
            return 2
        except self._failures as error:
            click.echo(f"{asked}: {logs.text_of(error)}", err=True)
            return 1

    def run(self) -> None:
        """As a program: the arguments are the command line's, and the exit code is the process's."""
        if code := self.carry_out(sys.argv[1:]):
            raise SystemExit(code)


def of_environment_or_local_stack(cls: type[T], process: str) -> T:
    """The settings of a command that an operator runs by hand; the rule for the local stack is in every `--help`.

    Raises:
        SettingsError: as `load`.
    """
    return load(cls, _environ_of(cls, process))


def _environ_of(cls: type, process: str) -> Mapping[str, str]:
    prefix, environ = Path(sys.prefix), {name: value for name, value in os.environ.items() if value.strip()}
    names = {declared.name for declared in settings_of(cls)}
    file = prefix.parent / LOCAL_STACK / f"{process}.env"
    if prefix.name != ".venv" or any(name in environ for name in names if name.endswith(("_TARGET", "_URL"))):
        return environ
    operator = file.with_name("operator.env")  # who a person is, where there are certificates
    try:
        words = shlex.split(file.read_text() + (operator.read_text() if operator.exists() else ""))
    except (FileNotFoundError, PermissionError):  # no local stack, or somebody else's
        return environ
    click.echo(f"as the local stack is set: {file}", err=True)
    told = dict(word.split("=", 1) for word in words if "=" in word)
    return {name: told[name] for name in names & told.keys()} | environ


def _settings_command(processes: Mapping[str, tuple[type, str]]) -> click.Command:
    @click.command("settings")
    @click.argument("process", type=click.Choice(list(processes)), required=False)
    def settings(process: str | None) -> int:
        """What can be set, and what is.

        Of PROCESS, or of all: every setting with its present value, default, unit and meaning; secrets are hidden. The
        exit code is 2 if a value is wrong.
        """
        shown = [_show(name, *processes[name]) for name in ([process] if process else processes)]
        return 0 if all(shown) else 2

    return settings


def _show(process: str, cls: type, of_stack: str) -> bool:
    """Print a table; False if a value is wrong."""
    environ, well = _environ_of(cls, of_stack), True
    table = Table(*COLUMNS, box=box.SIMPLE_HEAD, show_edge=False)
    for declared in settings_of(cls):
        value, problem = declared.shown(environ)
        well = well and not problem
        if problem or (not value and declared.default is None):
            value = f"{value}: {problem}" if problem else "not set, and must be"
            table.add_row(declared.name, Text(value, style="red"), "", declared.unit, declared.meaning)
        else:
            table.add_row(declared.name, Text(value), declared.default or "", declared.unit, declared.meaning)
    out = console()
    out.print(process, style="bold")
    out.print(table)
    for problem in (refused := beyond(cls, environ)):
        out.print(problem, style="red")
    return well and not refused


json_option = click.option("--json", "as_json", is_flag=True, help="For programs.")
