"""One zone database cuts business days: that of the locked package, whatever the machine and the databases have."""

import re
import shutil
import zoneinfo
from datetime import UTC, date, datetime, timedelta
from importlib import resources
from pathlib import Path

import pytest

from chassis import settings, zones
from purchases_svc.control_totals import first_day_from
from tests.conftest import ROOT

MINUTE = timedelta(minutes=1)


def test_the_machines_zones_are_not_asked(tmp_path: Path) -> None:
    """Where the system has other data, the package's counts."""
    (tmp_path / "Europe").mkdir()
    with resources.as_file(resources.files("tzdata") / "zoneinfo" / "Asia" / "Tokyo") as other:
        shutil.copy(other, tmp_path / "Europe" / "Berlin")
    zoneinfo.reset_tzpath([str(tmp_path)])
    zoneinfo.ZoneInfo.clear_cache()
    zones.load.cache_clear()
    try:
        evening = datetime(2026, 1, 6, 20, tzinfo=UTC)
        assert evening.astimezone(zoneinfo.ZoneInfo("Europe/Berlin")).date() == date(2026, 1, 7)
        assert zones.business_day(evening, zones.load("Europe/Berlin")) == date(2026, 1, 6)
    finally:
        zoneinfo.reset_tzpath()
        zoneinfo.ZoneInfo.clear_cache()


def test_no_statement_cuts_days() -> None:
    """PostgreSQL is asked about no zone but UTC: its data may be of another age, and it has other names."""
    for package in ("purchases_svc", "relay_svc", "analytics_svc", "chassis"):
        for path in [*(ROOT / package).rglob("*.py"), *(ROOT / package).rglob("*.sql")]:
            for found in re.findall(r"at time zone\s+\S+|\btimezone\(\s*\S+", path.read_text(), re.IGNORECASE):
                assert "'UTC'" in found, (path, found)


@pytest.mark.parametrize("name", ["CET", "EET", "MET", "WET"])
def test_names_that_sql_takes_for_abbreviations(name: str) -> None:
    """They are refused with what to write, which means the same to us."""
    with pytest.raises(ValueError, match=f"write {zones.ABBREVIATIONS[name]}"):
        settings.time_zone(name)
    for hours in range(0, 365 * 24, 12):
        moment = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=hours)
        shown = (moment.astimezone(zones.load(each)) for each in (name, zones.ABBREVIATIONS[name]))
        assert len({each.replace(tzinfo=None) for each in shown}) == 1


@pytest.mark.parametrize(
    "name", ["", "Berlin", "europe/berlin", "Europe/Berlin ", "../zones", "/etc/localtime", "UTC+1"]
)
def test_names_that_are_none(name: str) -> None:
    """Only the IANA names, as they are written."""
    with pytest.raises(ValueError, match="IANA"):
        settings.time_zone(name)


@pytest.mark.parametrize("month", [date(2011, 12, 1), date(2026, 3, 1)])
def test_first_whole_day_of_what_is_kept(month: date) -> None:
    """In every zone, no moment before the month lies on that day or later; and the day before has such a moment."""
    start = datetime.combine(month, datetime.min.time(), UTC)
    before = [start - n * 30 * MINUTE for n in range(1, 100)] + [start - timedelta.resolution]
    for name in zones.names():
        zone = zones.load(name)
        assert max(zones.business_day(moment, zone) for moment in before) == first_day_from(month, zone) - timedelta(1)
