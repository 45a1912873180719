"""The commands as they are installed: `retail-purchases`, `retail-relay`, `retail-analytics`, `retail-pos`.

Each does what `python -m` does with its package. Where only a till's part was installed, it says what is missing.
"""

import importlib
import sys

OURS = ("analytics_svc", "chassis", "pos", "purchases_svc", "relay_svc", "retail")


def purchases() -> None:
    _run("purchases_svc")


def relay() -> None:
    _run("relay_svc")


def analytics() -> None:
    _run("analytics_svc")


def pos() -> None:
    _run("pos")


def _run(package: str) -> None:
    try:
        module = importlib.import_module(f"{package}.__main__")
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] in OURS:
            raise
        sys.exit(f"{missing.name} is missing: the commands need pip install 'retail-backbone[server]'")
    module.main()
