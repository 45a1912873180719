"""Events named by their ids: those of as many days at once as one statement may be about."""

import time

from uuid_utils import uuid7

from relay_svc.days import DAYS_AT_ONCE, ids_in_parts

DAY_NS = 86_400 * 10**9
DAYS = 2 * DAYS_AT_ONCE + 7


def test_ids_of_many_days_come_in_parts() -> None:
    now = time.time_ns()
    ids = [str(uuid7(nanoseconds=now - age * DAY_NS)) for age in range(DAYS) for _ in range(2)]
    parts = list(ids_in_parts(ids))
    assert [len(part) for part in parts] == [2 * DAYS_AT_ONCE, 2 * DAYS_AT_ONCE, 14]
    assert sorted(ids) == [event_id for part in parts for event_id in part]
    days = [{event_id[:8] + event_id[9:13] for event_id in part} for part in parts]
    assert not set.intersection(*days)


def test_made_up_ids_have_days_too() -> None:
    ids = ["ffffffff-ffff-7fff-bfff-ffffffffffff", "00000000-0000-0000-0000-000000000000"]
    assert list(ids_in_parts(ids)) == [sorted(ids)]
