"""A local stack of two cells, as `make run CELLS=2` starts it, in a directory and on ports of its own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.local import services
from deploy.local.stack import Stack
from tests.integration.conftest import free_address


@contextmanager
def local_chain(directory: Path, **settings: str) -> Iterator[Stack]:
    """It runs until the block ends."""
    plain = {name: value for name, value in os.environ.items() if name not in services.settings_of(os.environ)}
    listens = [name for program in services.programs_of(2) for name in program.addresses({})]
    addresses = {name: free_address() for name in listens}
    stack = Stack(directory, environ=plain | addresses | {"CELLS": "2"} | settings)
    try:
        with stack.changing():
            stack.start()
        yield stack
    finally:
        with stack.changing():
            stack.stop()
