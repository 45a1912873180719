"""A Prometheus that has no patience, and a system that soon gives it something to tell."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.local.machine import find, wait_until
from deploy.local.prometheus import ALARMS, Prometheus
from tests.integration import poisoned_consumer
from tests.integration.whole.test_alarms import Scraped

PATIENCE_S = 120.0
OUTBOX_MAX = 60

fired: set[str] = set()  # all alarms that were seen to fire


class Watch:
    """A Prometheus, and which alarms it has raised."""

    def __init__(self, prometheus: Prometheus) -> None:
        self._prometheus = prometheus

    def sees(self, name: str, cause: Callable[[], object] = lambda: None) -> None:
        """Wait until the alarm fires, and print it; the cause is repeated until then."""

        def fires() -> bool:
            cause()
            return bool(self._firing(name))

        assert wait_until(fires, PATIENCE_S), name
        for alert in self._firing(name)[:1]:
            labels, texts = alert["labels"], alert["annotations"]
            print(f"{name} ({labels['severity']}): {texts['summary']} → {texts['runbook']}")
        fired.add(name)

    def is_over(self, name: str) -> None:
        assert wait_until(lambda: not self._firing(name), PATIENCE_S), name

    def _firing(self, name: str) -> list[dict[str, Any]]:
        alerts = self._prometheus.get("/api/v1/alerts")["alerts"]
        return [it for it in alerts if it["labels"]["alertname"] == name and it["state"] == "firing"]


@contextmanager
def watching(pages: dict[str, str], directory: Path) -> Iterator[Watch]:
    """With no pause before an alarm, and small figures in the place of large ones."""
    impatient = directory / "alarms.yaml"
    text = re.sub(r"for: \w+", "for: 0s", ALARMS.read_text())
    for pattern, small in (
        (r"> (120|3600|5000|10)\b", "> 3"),
        (r"> 0\.5\n", "> 0\n"),
        (r"\[1h\]\)( >) 3", r"[1h])\1 0"),
        (r"\[5m\]", "[15s]"),
        (r"\[2m\]", "[15s]"),
    ):
        assert re.search(pattern, text), pattern
        text = re.sub(pattern, small, text)
    impatient.write_text(text)
    prometheus = Prometheus(directory / "prometheus", alarms=impatient, every="1s")
    prometheus.start(pages)
    try:
        yield Watch(prometheus)
    finally:
        prometheus.stop()


class Drilled(Scraped):
    """An outbox that is soon full, and events that are soon given up."""

    poisoned = False  # whether the consumer dies of what `poisoned_consumer` names

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.environ |= {"PURCHASES_OUTBOX_MAX": str(OUTBOX_MAX), "RELAY_ATTEMPTS_MAX": "1"}

    def program(self, name: str) -> list[str]:
        poisoned = name == "consumer" and self.poisoned
        return [poisoned_consumer.__file__, "decode", "consume"] if poisoned else super().program(name)

    def audit_pid(self) -> int | None:
        """The process that the consumer has started."""
        pid = self._running["consumer"].pid
        found = find(lambda process: process.parent == pid and "prove" in process.argv)
        return found[0].pid if found else None
