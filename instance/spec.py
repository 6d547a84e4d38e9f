"""What must an instance be told to start, and what does it tell when it has started? msgspec JSON between actors."""

from __future__ import annotations

from enum import Enum

import msgspec


class EngineKind(Enum):
    VLLM = "vllm"
    FAKE = "fake"


class Carrier(Enum):
    """What moves KV blocks between instances."""

    SHM = "shm"
    """Shared memory; between two machines it goes through the socket by itself."""
    TCP = "tcp"
    NCCL = "nccl"
    """From GPU to GPU; needs CuPy's NCCL, and knows no checksum."""


class InstanceSpec(msgspec.Struct, frozen=True):
    """One instance to start."""

    instance: str
    epoch: int
    engine: EngineKind = EngineKind.VLLM
    engine_argv: tuple[str, ...] = ()
    """`vllm serve` arguments, the model first, exactly as a user would write them."""
    host: str = "127.0.0.1"
    """Address the inbox and the carriers bind to and are reached at."""
    carrier: Carrier = Carrier.SHM
    carrier_checksum: bool = False
    """Send a sum with every chunk of blocks; the receiver writes no chunk that does not match its own. Each sender says
    whether it sums, so members need not be alike."""
    copy_bytes_per_s: float | None = None
    """Budget for copies of requests that decode on: of all that leave, and again of all that arrive. 0: no limit; None:
    what suits the machine (`instance.vllm.rank.CPU_BYTES_PER_S` without a GPU, no limit with one, nor for the fake)."""
    token: str = ""
    """Shared secret of the fleet, never empty: it authenticates inboxes and carriers. Never logged."""
    num_sharing: int = 1
    """Instances that share a machine's memory where there is no GPU, this one included."""
    max_waiting: int = 1024
    """Submissions are refused while so many requests wait."""
    max_migrations_out: int = 2
    max_migrations_in: int = 2


class InstanceStarted(msgspec.Struct, frozen=True):
    """What the actor's `start` returns."""

    instance: str
    epoch: int
    address: str
    """Where its inbox listens."""
    model: str
    block_size: int
    total_blocks: int
    max_model_len: int
    max_num_seqs: int
    tensor_parallel_size: int
    start_s: float


class MigrationSummary(msgspec.Struct, frozen=True):
    """`migration.types.MigrationReport` in plain types, as it crosses Ray."""

    migration_id: str
    request_id: str
    source: str
    destination: str
    outcome: str
    reason: str
    cached_tokens: int
    moved_tokens: int
    num_stages: int
    copied_blocks: int
    tail_blocks: int
    num_bytes: int
    duration_s: float
    stopped_s: float
    steps_during_copy: int
