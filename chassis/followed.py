"""A file that others write while we run: what it says takes effect within seconds, and without a restart."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from chassis.settings import SettingsError

LOOK_EVERY_S = 2.0

T = TypeVar("T")

log = structlog.get_logger()


class Followed(Generic[T]):
    """What a file says. It is best replaced by another, as `mv` does: then nobody reads half of it."""

    def __init__(self, setting: str, path: str, parse: Callable[[str], T]) -> None:
        """`parse` raises ValueError for what makes no sense.

        Raises:
            SettingsError: there is no such file, or it makes no sense.
        """
        self._path, self._parse = Path(path), parse
        try:
            self._text = self._read()
            self.value = parse(self._text)
        except (OSError, ValueError) as error:
            raise SettingsError([f"{setting}={path}: {error}"]) from None

    def _read(self) -> str:
        return self._path.read_text(encoding="utf-8")

    async def follow(self, on_change: Callable[[], None]) -> None:
        """Until it is cancelled. While the file cannot be read, what it said before holds."""
        broken = False
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                said = await asyncio.to_thread(self._read)
                value = self.value if said == self._text else self._parse(said)
            except (OSError, ValueError) as error:
                if not broken:
                    log.error("a file cannot be read; what it said before holds", path=str(self._path), error=error)
                broken = True
                continue
            broken = False
            if said != self._text:
                self._text, self.value = said, value
                on_change()
