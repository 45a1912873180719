"""The command `retail-analytics`, or `python -m analytics_svc`: what runs what."""

import psycopg
from psycopg_pool import PoolTimeout

from analytics_svc import database
from analytics_svc.commands import audit, quarantine, rebuild, report
from analytics_svc.settings import ConsumeSettings, MigrateSettings, ProveSettings, ServeSettings
from chassis import cli, lifecycle, logs, migrate, settings, traces
from chassis.errors import PortTaken

commands = cli.Commands(
    "retail-analytics",
    "The owner's numbers: two processes that count and answer, and what shows, proves and repairs the numbers.",
    {
        "consume": (ConsumeSettings, "consumer"),
        "serve": (ServeSettings, "analytics"),
        "prove": (ProveSettings, "consumer"),
        "migrate": (MigrateSettings, "consumer"),
    },
    failures=(migrate.MigrationError, PortTaken, psycopg.Error, PoolTimeout),
)


@commands.command("consume")
def _consume() -> None:
    """Count what RabbitMQ brings until SIGTERM.

    It proves the numbers meanwhile, and finishes what is in flight.
    """
    from analytics_svc.commands.consume import consume  # here, as the metrics of one process are no other's

    config = settings.load(ConsumeSettings)
    logs.configure("analytics-consume", config.log_level)
    with traces.exported(config, "consumer"):
        lifecycle.run(lambda stop: consume(config, stop))


@commands.command("serve")
def _serve() -> None:
    """Answer questions until SIGTERM.

    Then what is in flight is finished, which takes 20 s at most.
    """
    from analytics_svc.commands.serve import serve

    config = settings.load(ServeSettings)
    logs.configure("analytics-serve", config.log_level)
    with traces.exported(config, "analytics"):
        lifecycle.run(lambda stop: serve(config, stop))


@commands.command("prove", hidden=True)
def _prove() -> None:
    """Prove the numbers all the time. `consume` starts it, and it ends with that."""
    from analytics_svc.commands.prove import prove

    config = settings.load(ProveSettings)
    logs.configure("analytics-audit", config.log_level)
    lifecycle.run(lambda stop: prove(config, stop))


@commands.command("migrate")
def _migrate() -> None:
    """Bring the database up to date. As its owner; may be repeated."""
    config = settings.load(MigrateSettings)
    logs.configure("analytics-migrate", config.log_level)
    database.migrate_database(config)


commands.add_command(report.report)
commands.add_command(audit.audit)
commands.add_command(rebuild.command)
commands.add_command(quarantine.quarantine)

main = commands.run

if __name__ == "__main__":
    main()
