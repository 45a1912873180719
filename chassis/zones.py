"""Business days: which day of the chain's time zone a moment lies on.

One zone database decides, on every machine: that of the locked `tzdata` package. The system's may be older or newer,
and so may PostgreSQL's; nothing of ours asks either.
"""

from datetime import date, datetime
from functools import cache
from importlib import metadata, resources
from zoneinfo import ZoneInfo

VERSION = metadata.version("tzdata")

# SQL takes these names for abbreviations, with one offset all year round: whoever asks our databases for the sales of a
# day would get others than we do. Each with a zone that means the same here.
ABBREVIATIONS = {"CET": "Europe/Brussels", "EET": "Europe/Athens", "MET": "Europe/Brussels", "WET": "Europe/Lisbon"}


@cache
def names() -> frozenset[str]:
    """The IANA names of all zones."""
    return frozenset(resources.files("tzdata").joinpath("zones").read_text().split())


@cache
def load(name: str) -> ZoneInfo:
    """The zone of that IANA name.

    Raises:
        KeyError: there is none.
    """
    if name not in names():
        raise KeyError(name)
    with resources.files("tzdata").joinpath("zoneinfo", *name.split("/")).open("rb") as file:
        return ZoneInfo.from_file(file, key=name)


def business_day(moment: datetime, zone: ZoneInfo) -> date:
    """The day that the zone's clocks show at that moment. At most one day away from UTC's: no offset is a whole day.

    Raises:
        OverflowError: it is before year 1 or after year 9999.
    """
    return moment.astimezone(zone).date()
