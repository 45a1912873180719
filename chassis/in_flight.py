"""What a server has in hand: calls, and the bytes of their requests, in all and for each connection.

A message is counted when it has come and before it is parsed, so that a flood costs its own refusals and no more.
"""

import asyncio
from collections import deque

from chassis.errors import Overloaded, ShuttingDown

CALLS_MAX = 20_000
BYTES_MAX = 96 << 20
PEER_BYTES_MAX = 24 << 20  # of one connection
CALL_BYTES = 2_048  # what a call costs besides its request
MESSAGES_OF_STREAM = 2  # that may be in hand at once; earlier ones are dealt with when the next is read


class InFlight:
    """Counts calls and their bytes, and lets none in once the server drains."""

    def __init__(self) -> None:
        self.draining = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()
        self.calls = 0
        self._bytes = 0
        self._bytes_of_peer: dict[str, int] = {}

    def enter(self, peer: str, size: int = 0) -> None:
        """A call begins, with a request of `size` bytes; each must `leave` with the same size.

        Raises:
            ShuttingDown, Overloaded: it was not let in.
        """
        if self.draining.is_set():
            raise ShuttingDown("this server is shutting down; try another one")
        if self.calls >= CALLS_MAX:
            raise Overloaded(f"{self.calls:,} calls are in flight; try again a little later")
        self.take(peer, size + CALL_BYTES)
        self.calls += 1
        self.idle.clear()

    def leave(self, peer: str, size: int = 0) -> None:
        self.give_back(peer, size + CALL_BYTES)
        self.calls -= 1
        if not self.calls:
            self.idle.set()

    def take(self, peer: str, size: int) -> None:
        """Bytes come into hand.

        Raises:
            Overloaded: there is no room for them.
        """
        own = self._bytes_of_peer.get(peer, 0) + size
        if self._bytes + size > BYTES_MAX or own > PEER_BYTES_MAX:
            whose = "this connection" if own > PEER_BYTES_MAX else "all connections"
            raise Overloaded(f"the requests of {whose} that are in flight are too large; try again a little later")
        self._bytes += size
        self._bytes_of_peer[peer] = own

    def give_back(self, peer: str, size: int) -> None:
        self._bytes -= size
        left = self._bytes_of_peer.pop(peer, 0) - size
        if left > 0:
            self._bytes_of_peer[peer] = left


class Stream:
    """The messages of one call that are in hand."""

    def __init__(self, in_flight: InFlight, peer: str) -> None:
        self._in_flight, self._peer = in_flight, peer
        self._held: deque[int] = deque()
        self._closed = False

    def take(self, size: int) -> None:
        """The next message has come. Raises Overloaded."""
        if self._closed:
            return
        if len(self._held) == MESSAGES_OF_STREAM:
            self._in_flight.give_back(self._peer, self._held.popleft())
        self._in_flight.take(self._peer, size)
        self._held.append(size)

    def close(self) -> None:
        self._closed = True
        while self._held:
            self._in_flight.give_back(self._peer, self._held.popleft())
