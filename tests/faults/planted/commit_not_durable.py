"""The purchases service commits asynchronously: an acknowledged sale may be gone after a power failure."""

from typing import Any

from tests.faults.planted import replace

FAULTS = ("postgres.immediate_stop",) * 3
CAUGHT_AS = {"lost"}


def plant() -> None:
    from chassis import postgres

    def open_pool(*arguments: Any, **options: Any) -> Any:
        if str(options["application_name"]).startswith("purchases write"):
            options["settings"] = {**(options.get("settings") or {}), "synchronous_commit": "off"}
        return original(*arguments, **options)

    original = replace(postgres, "open_pool", open_pool)
