"""`python -m analytics_svc consume | serve | migrate | audit | rebuild | quarantine … | report …`: what runs what."""

import asyncio
import sys

import psycopg
from rich.console import Console

from analytics_svc import database
from analytics_svc.commands import audit, quarantine, rebuild, report
from analytics_svc.commands.consume import consume
from analytics_svc.commands.serve import serve
from analytics_svc.settings import (
    ConsumerClientSettings,
    ConsumeSettings,
    MigrateSettings,
    RebuildSettings,
    ReportSettings,
    ServeSettings,
)
from chassis import lifecycle, logs, migrate, settings
from chassis.errors import PortTaken

USAGE = "consume | serve | migrate | audit … | rebuild [--days-only] | report … | quarantine …"


def main() -> None:
    command = " ".join(sys.argv[1:2])
    try:
        match sys.argv[1:]:
            case ["consume"]:
                consuming = settings.load(ConsumeSettings)
                logs.configure("analytics-consume", consuming.log_level)
                lifecycle.run(lambda stop: consume(consuming, stop))
            case ["serve"]:
                serving = settings.load(ServeSettings)
                logs.configure("analytics-serve", serving.log_level)
                lifecycle.run(lambda stop: serve(serving, stop))
            case ["migrate"]:
                migration = settings.load(MigrateSettings)
                logs.configure("analytics-migrate", migration.log_level)
                database.migrate_database(migration)
            case ["quarantine", *arguments]:
                raise SystemExit(quarantine.run(settings.load(ConsumerClientSettings), arguments))
            case ["report", *arguments]:
                raise SystemExit(report.run(settings.load(ReportSettings), arguments))
            case ["audit", *arguments]:
                raise SystemExit(audit.run(settings.load(ConsumerClientSettings), arguments, Console(highlight=False)))
            case ["rebuild", *options] if options in ([], ["--days-only"]):
                rebuilding = settings.load(RebuildSettings)
                logs.configure("analytics-rebuild", "WARNING")
                console = Console(highlight=False)
                work = rebuild.run(rebuilding, days_only=bool(options), console=console)
                raise SystemExit(asyncio.run(work))
            case _:
                print(f"usage: python -m analytics_svc {USAGE}", file=sys.stderr)
                raise SystemExit(2)
    except settings.SettingsError as error:
        lifecycle.exit_with_settings_problems(f"analytics {command}", error)
    except (migrate.MigrationError, PortTaken, psycopg.Error) as error:
        raise SystemExit(f"analytics {command}: {logs.text_of(error)}") from error


if __name__ == "__main__":
    main()
