"""Which bounds does a carrier have? Chunk size, pacing, pool and connection limits, each with its name and default."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CarrierParams:
    """Bounds of one rank's carriers, both ends."""

    chunk_bytes: int = 1 << 20
    """Bytes gathered, sent and scattered at once while a budget paces a push (always at least one block index)."""
    burst_chunks: int = 2
    """The same in chunks, where no budget does. More than this times `num_slots` leaves the processor's cache."""
    in_place_chunks: int = 4
    """The same again, where blocks leave from where they lie. Measured: 16 took a quarter longer than 4."""
    link_chunks: int = 32
    """The same again from GPU to GPU, where a chunk passes in less time than it takes to speak of it. Each end has two
    slots of this size on its GPU for each peer."""
    max_chunk_bytes: int = 64 << 20
    """A receiver holds a buffer of at most this size a connection and refuses larger chunks."""
    bytes_per_s: float | None = None
    """Budget of one rank for pushes that are not urgent: all that leave it share one, and all that arrive another, so
    that neither several migrations out nor several peers cost those who decode more. None: as fast as it goes."""
    num_slots: int = 4
    """Chunks in flight through a shared memory segment."""
    checksum: bool = False
    """A sender's: crc32 over every chunk. The receiver writes no chunk that does not match its sum."""
    max_connections: int = 32
    """Connections a receiver serves at once."""
    max_idle: int = 4
    """Idle connections a sender keeps for each peer."""
    max_tickets: int = 256
    """Migrations a receiver has open at once."""
    stall_s: float = 30.0
    """A push of which nothing comes for so long is given up by the receiver."""
    handshake_s: float = 5.0
    """A connection that has not said who it is by then is closed."""

    link_s: float = 30.0
    """A link between two GPUs that is not up by then is given up."""

    def __post_init__(self) -> None:
        if not 0 < self.chunk_bytes <= self.max_chunk_bytes:
            raise ValueError("chunk_bytes must lie in (0, max_chunk_bytes]")
        if min(self.burst_chunks, self.in_place_chunks, self.link_chunks) < 1:
            raise ValueError("burst_chunks, in_place_chunks and link_chunks must be at least 1")
        if self.bytes_per_s is not None and self.bytes_per_s <= 0:
            raise ValueError("bytes_per_s must be positive (None: no pacing)")
        if (
            min(self.num_slots - 1, self.max_connections, self.max_tickets, self.handshake_s, self.stall_s, self.link_s)
            <= 0
            or self.max_idle < 0
        ):
            raise ValueError("num_slots must be at least 2, the other bounds positive")

    @property
    def max_segment_bytes(self) -> int:
        """A receiver maps at most so large a segment."""
        return 4 * self.max_chunk_bytes
