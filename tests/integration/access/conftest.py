"""One backbone with certificates, on databases of its own, for all tests of a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote, urlsplit

import pytest

from tests.conftest import _clone, _required
from tests.integration.access.backbone import Backbone


@pytest.fixture(scope="module")
def purchases_url(postgres_url: str, _purchases_template: str) -> Iterator[str]:
    yield from _clone(postgres_url, _purchases_template)


@pytest.fixture(scope="module")
def chain_with_certificates(
    purchases_url: str,
    postgres_url: str,
    _analytics_template: str,
    _virtual_host: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Backbone]:
    amqp_url = urlsplit(_required("TEST_AMQP_URL"))._replace(path="/" + quote(_virtual_host, safe="")).geturl()
    with (
        contextmanager(_clone)(postgres_url, _analytics_template) as analytics_url,
        Backbone.all_running(purchases_url, analytics_url, amqp_url, tmp_path_factory.mktemp("backbone")) as running,
    ):
        yield running
