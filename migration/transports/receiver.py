"""Who takes blocks in? The receiving end of one rank: a server thread, a thread a connection, and the tickets."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time

from migration.errors import MalformedMessage
from migration.transports.budget import Budget
from migration.transports.frames import Failed, FrameKind, FrameSocket, tune
from migration.transports.links import LinkMaker
from migration.transports.params import CarrierParams
from migration.transports.serving import Reception, ServedConnection
from migration.transports.store import KVStore, host_store
from migration.transports.tickets import TicketTable
from migration.types import BlockTable, MigrationId

_LOG = logging.getLogger(__name__)
_BACKLOG = 64
_ACCEPT_AGAIN_S = 0.1
"""After an accept that failed: descriptors, say, come back only when a connection ends."""
_REFUSE_S = 0.1
"""For the reason of a refusal, by the thread that accepts: it fits into any socket's buffer."""


class BlockReceiver:
    """The receiving end of one rank. Thread-safe; `close` ends its threads."""

    def __init__(self, store: KVStore, url: str, token: bytes, params: CarrierParams) -> None:
        self.store = store
        self.url = url
        """Where senders push to."""
        self.token = token
        self.tickets = TicketTable(store.layout, params.max_tickets)

    def open(self, migration_id: MigrationId, block_table: BlockTable) -> None:
        """Accept pushes of this migration into these blocks; again when the table has grown.

        Raises `CopyFailed` when too many are open, `ValueError` when the table does not fit the layout.
        """
        self.tickets.open(migration_id, block_table)

    def close_ticket(self, migration_id: MigrationId) -> None:
        """Refuse further chunks of it; return when none is being written. Unknown ids are ignored."""
        self.tickets.close(migration_id)

    def try_close_ticket(self, migration_id: MigrationId) -> bool:
        """As `close_ticket` but never waits: False if a chunk is still being written (further ones are refused)."""
        return self.tickets.try_close(migration_id)

    def close(self) -> None:
        """End every connection and thread. Idempotent."""


class SocketReceiver(BlockReceiver):
    """Serves ``tcp://``, ``shm://`` and, with a `link_maker`, ``nccl://`` senders on one listening socket."""

    def __init__(
        self,
        store: KVStore,
        scheme: str,
        host: str,
        token: bytes,
        params: CarrierParams,
        link_maker: LinkMaker | None = None,
    ) -> None:
        in_place = host_store(store)
        self._listener = socket.create_server((host, 0), backlog=_BACKLOG)
        super().__init__(store, f"{scheme}://{host}:{self._listener.getsockname()[1]}", token, params)
        self._params = params
        budget = Budget(params.bytes_per_s)
        self._reception = Reception(store, in_place, token, params, self.tickets, link_maker, budget)
        self._lock = threading.Lock()
        self._connections: dict[FrameSocket, threading.Thread] = {}
        self._ended: set[FrameSocket] = set()
        """Those of them that made room for another."""
        self._is_closed = False
        self._acceptor = threading.Thread(target=self._accept, name="kv-accept", daemon=True)
        self._acceptor.start()

    @property
    def num_connections(self) -> int:
        with self._lock:
            return len(self._connections)

    @property
    def num_idle_connections(self) -> int:
        return self._reception.idle.num_idle

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._reception.is_closing.set()
            connections = dict(self._connections)
        # Wakes the acceptor; platforms that refuse this on a listening socket wake it by the close.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for frames in connections:
            frames.interrupt()
        for thread in (self._acceptor, *connections.values()):
            thread.join()

    def _accept(self) -> None:
        """Until the receiver closes: what one peer or a lack of descriptors does to a call must not end it for all."""
        while not self._reception.is_closing.is_set():
            try:
                sock, _ = self._listener.accept()
                tune(sock)
            except OSError as error:
                if not self._reception.is_closing.is_set():
                    _LOG.warning("accepted no block connection: %s", error)
                    self._reception.is_closing.wait(_ACCEPT_AGAIN_S)
                continue
            self._take_in(FrameSocket(sock))

    def _take_in(self, frames: FrameSocket) -> None:
        with self._lock:
            if not self._is_closed and self._has_room():
                thread = threading.Thread(target=self._serve, args=(frames,), name="kv-receive", daemon=True)
                self._connections[frames] = thread
                try:
                    thread.start()
                except RuntimeError as error:  # no more threads can be had
                    del self._connections[frames]
                    _LOG.warning("refused a block connection: %s", error)
                else:
                    return
        with contextlib.suppress(OSError):
            frames.set_deadline(time.monotonic() + _REFUSE_S)
            frames.send(FrameKind.FAILED, Failed("the receiver takes no more connections now"))
        frames.close()

    def _has_room(self) -> bool:
        """For one more, perhaps because one that was idle is ended for it (its thread is about to notice)."""
        if len(self._connections) - len(self._ended) < self._params.max_connections:
            return True
        ended = self._reception.idle.end_longest()
        if ended is None:
            _LOG.warning("refused a block connection: %d push", len(self._connections))
            return False
        self._ended.add(ended)
        return True

    def _serve(self, frames: FrameSocket) -> None:
        connection = ServedConnection(self._reception, frames)
        try:
            connection.serve()
        except MalformedMessage as error:
            _LOG.warning("closed a block connection: %s", error)
        except OSError as error:
            _LOG.info("lost a block connection: %s", error)
        finally:
            try:
                connection.close()
            finally:
                with self._lock:
                    del self._connections[frames]
                    self._ended.discard(frames)
