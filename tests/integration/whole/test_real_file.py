"""The real file, where it is given: 19,959 purchases from the till to the owner's numbers, right to the cent."""

import json
import os
from pathlib import Path

import pytest

from tests.integration.processes import Processes
from tests.integration.whole.test_whole_path import run_demo

REAL_FILE = os.environ.get("ONLINE_RETAIL_FILE")


@pytest.mark.skipif(
    not REAL_FILE,
    reason="ONLINE_RETAIL_FILE does not name the UCI Online Retail file, which is not part of the project",
)
@pytest.mark.timeout(900)
def test_real_file_comes_out_to_the_cent(
    purchases_db: str, analytics_db: str, amqp_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report's figures are those computed from the file by other means."""
    assert REAL_FILE
    with Processes.all_running(purchases_db, analytics_db, amqp_url, tmp_path) as processes:
        assert run_demo(processes, monkeypatch, tmp_path / "report", "--file", REAL_FILE) == 0
    report = json.loads((tmp_path / "report").read_text(), parse_float=str)
    assert report["duplicates_sent"] > 0
    assert {key: report[key] for key in EXPECTED} == EXPECTED


EXPECTED = {
    "purchases": 19_959,
    "items": 519_598,
    "revenue": "2027195.43",
    "unique_customers": 4_338,
    "loyal_customers": 2_010,
    "top_products": [
        {"product_id": 4537, "quantity": 2_198},
        {"product_id": 4516, "quantity": 2_089},
        {"product_id": 2349, "quantity": 1_988},
        {"product_id": 3734, "quantity": 1_685},
        {"product_id": 1181, "quantity": 1_565},
    ],
    "daily_sales_sha256": "6cf35e80ac5efceb2ec2a84f931f4c2c5ae1132259f22621e638009c998a378a",
    "control_totals_agree": True,
}
