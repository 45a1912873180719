"""A process serves while all of its parts are well."""

from collections.abc import Awaitable, Callable


class Health:
    def __init__(self, set_serving: Callable[[bool], Awaitable[None]], unwell: set[str]) -> None:
        """`unwell`: the parts that have to report before the process serves."""
        self._set_serving, self._unwell = set_serving, unwell

    async def report(self, part: str, well: bool) -> None:
        if well:
            self._unwell.discard(part)
        else:
            self._unwell.add(part)
        await self._set_serving(not self._unwell)
