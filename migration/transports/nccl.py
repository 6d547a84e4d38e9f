"""How do blocks get from GPU to GPU? Through CuPy's NCCL, or, on one GPU, through CUDA IPC. Needs torch and CuPy only.

A link is one communicator of two ranks (sender 0, receiver 1), with slots and streams of its own; ending one ends no
other. Written from CuPy's and NCCL's documentation; see the README for what has been run.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from migration.errors import CopyFailed
from migration.transports.links import NUM_SLOTS, Link, LinkAnswer, LinkOffer
from migration.transports.store import KVLayout
from migration.types import BlockTable

SENDER, RECEIVER = 0, 1
_WARM_UP_BYTES = 16
_HIGH_PRIORITY = -1


class DeviceKVStore(Protocol):
    """A store whose blocks lie on a GPU (`instance.vllm.pages.PageStore`). Both work on torch's current stream."""

    @property
    def layout(self) -> KVLayout: ...

    @property
    def device_index(self) -> int | None:
        """None: its memory is not a GPU's."""

    def gather_on_device(self, block_ids: BlockTable, out: Any) -> None:
        """`out`: uint8 tensor of the device, exactly n * index_bytes long. Waits for nothing."""

    def scatter_on_device(self, block_ids: BlockTable, data: Any) -> None: ...


def why_unavailable() -> str | None:
    """The reason why there is no NCCL here, or None."""
    try:
        import torch  # noqa: PLC0415 - neither is there on every machine
    except ImportError:
        return "torch is not installed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuPy says at length what we say in a line
            from cupy.cuda import nccl  # noqa: PLC0415
    except ImportError:
        return "CuPy is not installed"
    if not nccl.available:
        return "CuPy finds no NCCL library"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


class NcclMaker:
    """`migration.transports.links.LinkMaker` over one rank's GPU."""

    def __init__(self, store: DeviceKVStore, *, prefers_ipc: bool = True) -> None:
        """`prefers_ipc`: use CUDA IPC where both ends share a GPU (tests of NCCL on one GPU say no). Raises
        `CopyFailed` with the reason where there is no NCCL."""
        reason = why_unavailable()
        if reason is None and store.device_index is None:
            reason = "the KV memory is not a GPU's"
        if reason is not None:
            raise CopyFailed(f"no carrier nccl: {reason}")
        self._store = store
        self._prefers_ipc = prefers_ipc

    def offer(self, slot_bytes: int) -> LinkOffer:
        from cupy.cuda import nccl  # noqa: PLC0415

        gpu = _gpu_name(self._device) if self._prefers_ipc else b""
        return LinkOffer(nccl.get_unique_id(), gpu, slot_bytes)

    def answer(self, offer: LinkOffer) -> tuple[LinkAnswer, Callable[[], Link]]:
        if self._prefers_ipc and offer.gpu == _gpu_name(self._device):
            link = IpcLink.receiving(self._store, self._device, offer.slot_bytes)
            return LinkAnswer(link.handles), lambda: link
        return LinkAnswer(()), partial(NcclLink, self._store, self._device, offer, RECEIVER)

    def connect(self, offer: LinkOffer, answer: LinkAnswer) -> Link:
        if answer.slot_handles:
            return IpcLink.sending(self._store, self._device, offer.slot_bytes, answer.slot_handles)
        return NcclLink(self._store, self._device, offer, SENDER)

    @property
    def _device(self) -> int:
        device = self._store.device_index
        assert device is not None  # tested when it was made
        return device


class NcclLink:
    """Chunks through a communicator of two. Packing has a stream of its own, so that chunk k + 1 is packed while chunk
    k is sent."""

    is_direct = False

    def __init__(self, store: DeviceKVStore, device: int, offer: LinkOffer, rank: int) -> None:
        """Waits for the peer, perhaps for ever: call it through `make_in_time`."""
        import torch  # noqa: PLC0415
        from cupy.cuda import Device, nccl  # noqa: PLC0415

        self._torch, self._nccl, self._store, self._device = torch, nccl, store, device
        self._peer = RECEIVER if rank == SENDER else SENDER
        self._is_aborted = False
        self._on_device = Device(device)
        with self._on_device:
            torch.cuda.set_device(device)  # of this thread
            self._packing = torch.cuda.Stream(device)
            self._wire = torch.cuda.Stream(device, priority=_HIGH_PRIORITY)
            self._slots = [torch.empty(offer.slot_bytes, dtype=torch.uint8, device=device) for _ in range(NUM_SLOTS)]
            self._shipped = [torch.cuda.Event() for _ in range(NUM_SLOTS)]
            torch.cuda.current_stream(device).synchronize()
            self._communicator = nccl.NcclCommunicator(2, offer.unique_id, rank)
            (self.ship if rank == SENDER else self.receive)(0, _WARM_UP_BYTES)
            self._wire.synchronize()

    def pack(self, slot: int, block_ids: BlockTable) -> None:
        with self._torch.cuda.stream(self._packing):
            self._packing.wait_event(self._shipped[slot])  # the chunk before in this slot
            self._store.gather_on_device(block_ids, self._part(slot, block_ids))

    def ship(self, slot: int, num_bytes: int) -> None:
        self._wire.wait_stream(self._packing)
        self._transfer(self._communicator_or_fail().send, slot, num_bytes)

    def receive(self, slot: int, num_bytes: int) -> None:
        self._transfer(self._communicator_or_fail().recv, slot, num_bytes)

    def is_done(self, slot: int) -> bool:
        try:
            self._communicator_or_fail().check_async_error()
        except self._nccl.NcclError as error:
            raise CopyFailed(f"NCCL on this pair: {error}") from error
        return bool(self._shipped[slot].query())

    def unpack(self, slot: int, block_ids: BlockTable) -> None:
        with self._torch.cuda.stream(self._packing):
            self._packing.wait_event(self._shipped[slot])
            self._store.scatter_on_device(block_ids, self._part(slot, block_ids))
        self._packing.synchronize()

    def abort(self) -> None:
        if not self._is_aborted:
            self._is_aborted = True
            with self._on_device:
                self._communicator.abort()

    def _transfer(self, call: Callable[..., None], slot: int, num_bytes: int) -> None:
        with self._on_device:
            self._nccl.groupStart()
            call(self._slots[slot].data_ptr(), num_bytes, self._nccl.NCCL_UINT8, self._peer, self._wire.cuda_stream)
            self._nccl.groupEnd()
            self._shipped[slot].record(self._wire)

    def _part(self, slot: int, block_ids: BlockTable) -> Any:
        return self._slots[slot][: len(block_ids[0]) * self._store.layout.index_bytes]

    def _communicator_or_fail(self) -> Any:
        if self._is_aborted:
            raise CopyFailed("the link to the peer's GPU was aborted")
        return self._communicator


class IpcLink:
    """Two processes of one GPU: the sender packs into the receiver's slots, which it has mapped."""

    is_direct = True

    def __init__(self, store: DeviceKVStore, device: int, slots: list[Any], release: Callable[[], None]) -> None:
        """`slots`: uint8 tensors over device memory; `release` gives it back."""
        import torch  # noqa: PLC0415

        self.handles: tuple[bytes, ...] = ()
        self._torch, self._store, self._slots, self._release = torch, store, slots, release
        self._stream = torch.cuda.Stream(device)
        self._packed = [torch.cuda.Event() for _ in slots]
        self._is_aborted = False

    @classmethod
    def receiving(cls, store: DeviceKVStore, device: int, slot_bytes: int) -> IpcLink:
        """Memory of its own, not of torch's allocator: a handle names a whole allocation."""
        from cupy.cuda import Device, runtime  # noqa: PLC0415

        with Device(device):
            addresses = [runtime.malloc(slot_bytes) for _ in range(NUM_SLOTS)]
            slots = [_tensor_at(address, slot_bytes, device) for address in addresses]
            link = cls(store, device, slots, partial(_for_each, runtime.free, addresses))
            link.handles = tuple(bytes(runtime.ipcGetMemHandle(address)) for address in addresses)
        return link

    @classmethod
    def sending(cls, store: DeviceKVStore, device: int, slot_bytes: int, handles: tuple[bytes, ...]) -> IpcLink:
        from cupy.cuda import Device, runtime  # noqa: PLC0415

        with Device(device):
            addresses = [runtime.ipcOpenMemHandle(handle) for handle in handles]
            slots = [_tensor_at(address, slot_bytes, device) for address in addresses]
            return cls(store, device, slots, partial(_for_each, runtime.ipcCloseMemHandle, addresses))

    def pack(self, slot: int, block_ids: BlockTable) -> None:
        self._fail_if_aborted()
        with self._torch.cuda.stream(self._stream):
            self._store.gather_on_device(block_ids, self._part(slot, block_ids))
            self._packed[slot].record(self._stream)

    def ship(self, slot: int, num_bytes: int) -> None:  # noqa: ARG002 - the sender has packed into its place
        self._fail_if_aborted()

    def receive(self, slot: int, num_bytes: int) -> None:  # noqa: ARG002 - as above
        self._fail_if_aborted()

    def is_done(self, slot: int) -> bool:
        self._fail_if_aborted()
        return bool(self._packed[slot].query())  # at the receiver nothing was recorded: done

    def unpack(self, slot: int, block_ids: BlockTable) -> None:
        self._fail_if_aborted()
        with self._torch.cuda.stream(self._stream):
            self._store.scatter_on_device(block_ids, self._part(slot, block_ids))
        self._stream.synchronize()

    def abort(self) -> None:
        if not self._is_aborted:
            self._is_aborted = True
            self._stream.synchronize()  # a gather that is under way writes into this memory
            self._release()

    def _part(self, slot: int, block_ids: BlockTable) -> Any:
        return self._slots[slot][: len(block_ids[0]) * self._store.layout.index_bytes]

    def _fail_if_aborted(self) -> None:
        if self._is_aborted:
            raise CopyFailed("the link to the peer's GPU was aborted")


def _tensor_at(address: int, num_bytes: int, device: int) -> Any:
    """A torch tensor over device memory that someone else owns."""
    import cupy  # noqa: PLC0415
    import torch  # noqa: PLC0415

    memory = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(address, num_bytes, None, device), 0)
    return torch.as_tensor(cupy.ndarray((num_bytes,), dtype=cupy.uint8, memptr=memory), device=f"cuda:{device}")


def _for_each(call: Callable[[int], None], addresses: list[int]) -> None:
    for address in addresses:
        call(address)


def _gpu_name(device: int) -> bytes:
    """Equal in two processes exactly when they use the same GPU under the same running kernel."""
    from cupy.cuda import runtime  # noqa: PLC0415

    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return hashlib.sha256(boot + bytes(runtime.getDeviceProperties(device)["uuid"])).digest()
