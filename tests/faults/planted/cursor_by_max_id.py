"""The relay's cursor passes over transactions that were still in progress when it looked."""

from typing import Any

from tests.faults.planted import replace

FAULTS = ("till.clock",) * 8
CAUGHT_AS = {"late", "not_quiet", "lost"}  # a sweep finds them, half a minute later at most


def prepare(purchases: Any, analytics: Any) -> None:
    """A sale that takes its time is no bug; it lets the other one show."""
    purchases.execute(
        """
        CREATE FUNCTION take_time() RETURNS trigger LANGUAGE plpgsql
        AS $$ BEGIN PERFORM pg_sleep(0.3) WHERE random() < 0.1; RETURN NULL; END $$
        """
    )
    purchases.execute("GRANT EXECUTE ON FUNCTION take_time() TO PUBLIC")
    purchases.execute(
        "CREATE TRIGGER slow AFTER INSERT ON outbox_events FOR EACH STATEMENT EXECUTE FUNCTION take_time()"
    )


def plant() -> None:
    from relay_svc import outbox

    def everything_in(snapshot: str) -> Any:
        return original(snapshot)._replace(in_progress=())

    original = replace(outbox, "_everything_in", everything_in)
