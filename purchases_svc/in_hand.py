"""What an upload stream has in hand: what was read, and whose answer is not out yet.

It bounds how far the reading runs ahead of the answers, and tells what can be answered, in whatever order that comes.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from itertools import islice
from typing import Any

from chassis.errors import ServiceError
from chassis.in_flight import InFlight
from purchases_svc.answers import Outcome
from purchases_svc.entry import Call

# While so much is in hand, no more is read: the client is slowed down by HTTP/2, and whoever does not read answers
# holds up nobody else.
BATCHES_MAX = 2
SINGLES_MAX, SINGLES_BYTES_MAX = 500, 1 << 20  # the message that is read last may exceed them
SINGLES_OF_ANSWER_MAX = 500

Batch = asyncio.Task[Any]  # its result is the answer


class Single:
    """A sale that is answered by itself."""

    __slots__ = ("bytes", "call", "refusal", "upload")

    def __init__(self, upload: Any, size: int) -> None:
        self.upload, self.bytes = upload, size  # as it came, and as large
        self.call: Call | None = None  # one of them is set
        self.refusal: ServiceError | None = None  # why it was not even taken in

    @property
    def outcome(self) -> Outcome:
        """What became of it; to be asked when it is answered."""
        if self.refusal:
            return self.refusal
        assert self.call
        (outcome,) = self.call.outcomes
        return outcome


class InHand:
    """Of one stream. To be closed."""

    def __init__(self, in_flight: InFlight, caller: str) -> None:
        self._in_flight, self._caller = in_flight, caller
        self._batches: set[Batch] = set()
        self._singles: set[Single] = set()
        self._bytes = 0  # of singles
        self._done_batches: deque[Batch] = deque()
        self._done_singles: deque[Single] = deque()
        self._all_read = False
        self._news, self._room = asyncio.Event(), asyncio.Event()

    async def room(self) -> None:
        """Wait until another message may be read."""
        while (
            len(self._batches) >= BATCHES_MAX or len(self._singles) >= SINGLES_MAX or self._bytes >= SINGLES_BYTES_MAX
        ):
            self._room.clear()
            await self._room.wait()

    def take_batch(self, batch: Batch) -> None:
        """Sales that are answered together."""
        self._batches.add(batch)
        batch.add_done_callback(self._done_with_batch)

    def take_single(self, upload: Any, size: int) -> Single:
        """The caller sees to its `call` or `refusal`, and calls `settled`.

        Raises:
            Overloaded: there is no room for its bytes.
        """
        single = Single(upload, size)
        self._in_flight.take(self._caller, size)
        self._singles.add(single)
        self._bytes += size
        return single

    def settled(self, single: Single) -> None:
        self._done_singles.append(single)
        self._news.set()

    def all_read(self) -> None:
        """No more will come."""
        self._all_read = True
        self._news.set()

    async def answerable(self) -> AsyncGenerator[Batch | list[Single], None]:
        """What can be answered, as soon as it can be, until all is. It is in hand until the next is asked for."""
        while True:
            if singles := list(islice(self._done_singles, SINGLES_OF_ANSWER_MAX)):
                yield singles
                for single in singles:
                    self._done_singles.popleft()
                    self._singles.discard(single)
                    self._give_back(single)
            elif self._done_batches:
                yield self._done_batches[0]
                self._batches.discard(self._done_batches.popleft())
            elif self._all_read and not self._singles and not self._batches:
                return
            else:
                self._news.clear()
                await self._news.wait()
            self._room.set()

    def close(self) -> None:
        """What is being stored goes on: only the waiting for it ends."""
        for batch in self._batches:
            batch.cancel()
        for single in self._singles:
            if single.call:
                single.call.answered.cancel()
            self._give_back(single)
        self._singles.clear()

    def _done_with_batch(self, batch: Batch) -> None:
        self._done_batches.append(batch)
        self._news.set()

    def _give_back(self, single: Single) -> None:
        self._bytes -= single.bytes
        self._in_flight.give_back(self._caller, single.bytes)
