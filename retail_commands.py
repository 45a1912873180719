"""The commands as they are installed: `retail-purchases`, `retail-relay`, `retail-analytics`, `retail-pages` and
`retail-pos`.

Each does what `python -m` does with its package. Where only a till's part was installed, it says what is missing.
"""

import importlib
import sys

OURS = ("analytics_svc", "chassis", "pages_svc", "pos", "purchases_svc", "relay_svc", "retail")


def purchases() -> None:
    _run("purchases_svc")


def relay() -> None:
    _run("relay_svc")


def analytics() -> None:
    _run("analytics_svc")


def pages() -> None:
    _run("pages_svc", extras="server,pages")


def pos() -> None:
    _run("pos")


def _run(package: str, extras: str = "server") -> None:
    try:
        module = importlib.import_module(f"{package}.__main__")
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] in OURS:
            raise
        sys.exit(f"{missing.name} is missing: the commands need pip install 'retail-backbone[{extras}]'")
    module.main()
