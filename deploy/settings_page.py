"""Makes docs/settings.md, or the file that is named, of what the processes declare."""

import sys
from pathlib import Path

import pos.settings as pos
from analytics_svc import settings as analytics
from chassis.settings import settings_of
from chassis.tls import TlsSettings
from chassis.traces import TraceSettings
from pages_svc import settings as pages
from purchases_svc import settings as purchases
from relay_svc import settings as relay

TRACES = "Whatever serves or sells: its traces, see [traces.md](traces.md)"
EVERYWHERE = "All processes and commands: who they are, and what may be in plaintext"
PROCESSES: dict[str, tuple[type, ...]] = {
    "The purchases service: `retail-purchases serve`": (purchases.ServeSettings,),
    "The relay: `retail-relay serve`": (relay.ServeSettings,),
    "The consumer: `retail-analytics consume`": (analytics.ConsumeSettings,),
    "The query server: `retail-analytics serve`": (analytics.ServeSettings,),
    "The pages: `retail-pages serve`": (pages.ServeSettings,),
    "Moving a branch: `retail-purchases move`": (purchases.MoveSettings,),
    TRACES: (TraceSettings,),
    EVERYWHERE: (TlsSettings,),
    "Where commands find the services": (
        pos.Settings,
        relay.ClientSettings,
        analytics.ConsumerClientSettings,
        analytics.ReportSettings,
        analytics.RebuildSettings,
    ),
}

HEAD = """\
# Settings

Made of the settings' declarations by `make settings`; do not edit.

Settings are environment variables. An empty one counts as not set. A wrong one stops the start, and all wrong ones are
named. `retail-purchases settings`, `retail-relay settings`, `retail-analytics settings`, `retail-pages settings` and
`retail-pos settings` print the same with the present values. `migrate` reads the database's URL (of its owner),
BUSINESS_TIME_ZONE and LOG_LEVEL.

URLs may name several servers of one cluster: `postgresql://user:password@host1:5432,host2:5432/database`,
`amqp://user:password@host1:5672,host2:5672/%2F`.
"""


def page() -> str:
    parts = [HEAD]
    of_all = {declared.name for cls in (TlsSettings, TraceSettings) for declared in settings_of(cls)}
    for title, classes in PROCESSES.items():
        parts.append(f"\n## {title}\n\n| setting | default | unit | |\n|---|---|---|---|\n")
        every = {declared.name: declared for cls in classes for declared in settings_of(cls)}
        if len(classes) > 1:
            every = {name: declared for name, declared in every.items() if name.endswith("_TARGET")}
        elif title not in (TRACES, EVERYWHERE):
            every = {name: declared for name, declared in every.items() if name not in of_all}
        for name, (_, _, unit, meaning, default) in every.items():
            shown = "must be set" if default is None else f"`{default}`" if default else ""
            parts.append(f"| `{name}` | {shown} | {unit} | {meaning} |\n")
    return "".join(parts)


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else "docs/settings.md").write_text(page())
