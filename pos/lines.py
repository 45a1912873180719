"""The connections of a chain's tills to its purchases service, or to those of all cells."""

import threading
from pathlib import Path
from typing import NamedTuple

import grpc

from chassis.tls import Credentials
from pos.calls import Pause
from pos.client import OpenStream, PosClient, Recorded, Sale, connect

ATTEMPT_TIMEOUT_S = 10.0
TOTAL_TIMEOUT_S = 180.0  # rides out an outage of two minutes, and the rush after it


class Identities(NamedTuple):
    """Who tills are."""

    own: Credentials | None = None  # of this process; None: all is in plaintext
    tills: Path | None = None  # a directory of the tills' own: branch-1-till-POS-3.pem, …-key.pem, and ca.pem


class Lines:
    """Where tills have certificates, each has a connection of its own, as it may send its own sales only.

    Without, all share a few.
    """

    def __init__(self, target: str, identities: Identities, *, shared: int, pause: Pause) -> None:
        self._target, self._pause = target, pause
        own, self._certificates = identities
        self._opening = threading.Lock()
        self._closed = False
        self._channels: list[grpc.Channel] = []
        self._own: dict[tuple[int, str], PosClient] = {}
        self._streams: dict[PosClient, OpenStream[Recorded]] = {}
        self._shared = [self._open(own) for _ in range(0 if self._certificates else shared)]

    def of(self, sale: Sale, thread: int = 0) -> PosClient:
        """The client that sends this sale; of the shared ones, that of the thread with this number.

        Raises:
            chassis.tls.Broken: the till has no certificate.
        """
        if self._certificates is None:
            return self._shared[thread % len(self._shared)]
        with self._opening:
            till = (sale.branch_id, sale.pos_id)
            if till not in self._own:
                files = self._certificates / f"branch-{sale.branch_id}-till-{sale.pos_id}"
                self._own[till] = self._open(
                    Credentials(f"{files}.pem", f"{files}-key.pem", str(self._certificates / "ca.pem"))
                )
            return self._own[till]

    def stream_of(self, sale: Sale, thread: int = 0) -> OpenStream[Recorded]:
        """As `of`: that client's open stream."""
        client = self.of(sale, thread)
        with self._opening:
            if client not in self._streams:
                self._streams[client] = client.open_stream()
            return self._streams[client]

    def close(self) -> None:
        """Ends the calls in flight, and the streams."""
        with self._opening:
            self._closed = True
            for channel in self._channels:
                channel.close()
            for stream in self._streams.values():
                stream.close(drain_s=0)

    def _open(self, credentials: Credentials | None) -> PosClient:
        def reach(target: str) -> grpc.Channel:
            """Also later, when a sale turns out to be another cell's."""
            channel = connect(target, credentials)
            self._channels.append(channel)
            if self._closed:
                channel.close()
            return channel

        return PosClient(
            reach(self._target),
            attempt_timeout_s=ATTEMPT_TIMEOUT_S,
            total_timeout_s=TOTAL_TIMEOUT_S,
            pause=self._pause,
            reach=reach,
        )
