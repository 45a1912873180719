"""To what the release before has, the present one may add, and change nothing: both run side by side in an upgrade."""

import subprocess
from zoneinfo import ZoneInfo

import pytest

from analytics_svc.ingest.events import decode
from chassis import migrate
from tests.conftest import ROOT
from tests.release_before import Release, unpack

UTC_ZONE = ZoneInfo("UTC")


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return unpack(tmp_path_factory.mktemp("before"))


@pytest.mark.parametrize("package", ["purchases_svc", "analytics_svc"])
def test_no_migration_of_it_was_changed(before: Release, package: str) -> None:
    """A database of that release goes on with new files, never with other ones."""
    old, present = (migrate.read(root / package / "migrations") for root in (before.root, ROOT))
    assert old
    assert present[: len(old)] == old, "a new migration is a new file"


@pytest.mark.parametrize("package", ["purchases_svc", "analytics_svc"])
def test_each_migration_has_a_number_of_its_own(package: str) -> None:
    """Two changes that come together may have taken the same."""
    numbers = [migration.version for migration in migrate.read(ROOT / package / "migrations")]
    assert numbers == list(range(1, len(numbers) + 1))


def test_its_clients_and_servers_understand_ours(before: Release) -> None:
    """No breaking change, whatever `make contract` has accepted meanwhile."""
    done = subprocess.run(
        [ROOT / ".venv" / "bin" / "buf", "breaking", "proto", "--against", before.root / "proto" / "image.binpb"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_event_is_read(before: Release) -> None:
    """Messages of that release wait in the queue when the present consumer starts."""
    example = before.root / "proto" / "events" / "purchase_created.v1.example.json"
    assert decode(example.read_bytes(), UTC_ZONE).items
