"""What is in chassis/ is there for several packages, and can be read at one sitting."""

import grimp

from tests.conftest import ROOT

USERS = ("purchases_svc", "relay_svc", "analytics_svc", "pos")
LINES_MAX = 400


def test_each_file_is_used_by_two_packages() -> None:
    """Directly, or by another file of chassis."""
    graph = grimp.build_graph("chassis", *USERS)
    for path in (ROOT / "chassis").glob("[!_]*.py"):
        importers = graph.find_downstream_modules(f"chassis.{path.stem}")
        users = {user for user in USERS if any(it.split(".")[0] == user for it in importers)}
        assert len(users) > 1, (path.name, users)
        assert len(path.read_text().splitlines()) <= LINES_MAX, path.name
