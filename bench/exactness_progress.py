"""What has been done of a run of bench.exactness, and what came of it? One JSON line a request, appended; figures."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from io import FileIO
from pathlib import Path

import msgspec
from rich.table import Table

from bench.exactness_kinds import BY_NAME, NOT_MOVED
from bench.report import Result, Value, spread_of, this_machine

ROOT = Path(__file__).resolve().parent.parent


class ProgressError(RuntimeError):
    """The progress file is of another run, or cannot be read; the message says which."""


class Verdict(Enum):
    EXACT = "exact"
    MISMATCHED = "mismatched"
    NOT_MOVED = "not moved"
    """It ended first, or nobody took it; compared all the same, and not counted."""
    OTHER_STATE = "other state"
    """Moved and exact, but never found in the state its kind is about; not counted."""


class HopRecord(msgspec.Struct, frozen=True, array_like=True):
    sequence: int
    source: int
    mode_and_stages: str
    tokens: int
    """Of output, at the order."""
    moved_tokens: int
    cached_tokens: int
    stopped_s: float


class RequestRecord(msgspec.Struct, frozen=True, tag="request", omit_defaults=True):
    kind: str
    seed: int
    verdict: Verdict
    num_tokens: int
    hops: tuple[HopRecord, ...]
    num_refusals: int = 0
    num_faults: int = 0
    difference: str = ""
    lost: int = 0
    doubled: int = 0
    is_run_alone: bool = False
    unmoved_difference: str = ""
    prompt: tuple[int, ...] = ()
    """Of a mismatched request."""


class BatchRecord(msgspec.Struct, frozen=True, tag="batch"):
    """What a batch left behind in the two instances once they were idle, and how long it took."""

    scene: str
    leaked_blocks: int
    told: str
    seconds: float


class SessionRecord(msgspec.Struct, frozen=True, tag="session"):
    """One start of the bench."""

    seed: int
    control: str
    code: str
    """Digest of the sources that run in an instance."""


Record = SessionRecord | RequestRecord | BatchRecord
_DECODER: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def code_digest() -> str:
    digest = hashlib.sha256()
    for package in ("instance", "migration"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class Progress:
    """Everything recorded so far, in memory and (with a path) in its file."""

    def __init__(self, path: Path | None, session: SessionRecord, fresh: bool) -> None:
        """Raises ProgressError when the file there belongs to a run with another seed or control."""
        self.requests: list[RequestRecord] = []
        self.batches: list[BatchRecord] = []
        self.sessions: list[SessionRecord] = []
        self._file: FileIO | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not fresh:
                self._read(path, session)
            self._file = path.open("wb" if fresh else "ab", buffering=0)
        self.num_resumed = self.num_migrated
        self.add(session)

    def add(self, *records: Record) -> None:
        """All lines of one call are written at once: a batch is there whole or not at all."""
        for record in records:
            self._take(record)
        if self._file is not None:
            self._file.write(b"".join(msgspec.json.encode(record) + b"\n" for record in records))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _read(self, path: Path, session: SessionRecord) -> None:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # a line cut off by a kill is run again
        try:
            records = [_DECODER.decode(line) for line in whole.splitlines()]
        except msgspec.DecodeError as error:
            raise ProgressError(f"{path} is no progress file of this bench ({error}); --fresh begins anew") from error
        for record in records:
            if isinstance(record, SessionRecord) and (record.seed, record.control) != (session.seed, session.control):
                what = f"seed {record.seed}" + (f", control {record.control}" if record.control else "")
                raise ProgressError(f"{path} is of another run ({what}); --fresh begins anew, --progress names another")
            self._take(record)
        if len(whole) < len(data):
            path.write_bytes(whole)

    def _take(self, record: Record) -> None:
        match record:
            case SessionRecord():
                self.sessions.append(record)
            case RequestRecord():
                self.requests.append(record)
            case BatchRecord():
                self.batches.append(record)

    # ---- figures
    @property
    def migrated(self) -> list[RequestRecord]:
        """Moved at least once, found in the state of its kind, and compared."""
        return [r for r in self.requests if r.verdict in (Verdict.EXACT, Verdict.MISMATCHED)]

    @property
    def num_migrated(self) -> int:
        return len(self.migrated)

    @property
    def mismatched(self) -> list[RequestRecord]:
        """Whatever was moved and differs, and what differs though it was not moved (a refused move may harm too)."""
        return [r for r in self.requests if r.difference]

    @property
    def leaks(self) -> list[BatchRecord]:
        return [batch for batch in self.batches if batch.told]

    def is_clean(self) -> bool:
        figures = self.figures()
        return not any(
            figures[name] for name in ("mismatched_requests", "leaked_blocks", "lost_or_doubled_tokens")
        ) and (not self.leaks)

    def figures(self) -> dict[str, float | int | None]:
        hops = [hop for record in self.requests for hop in record.hops]
        seconds = sum(batch.seconds for batch in self.batches)
        return {
            "migrated_requests": self.num_migrated,
            "mismatched_requests": len(self.mismatched),
            "leaked_blocks": sum(batch.leaked_blocks for batch in self.batches),
            "lost_or_doubled_tokens": sum(record.lost + record.doubled for record in self.requests),
            "kinds": len({record.kind for record in self.migrated}),
            "migrations": len(hops),
            "faulted_migrations": sum(record.num_faults for record in self.requests),
            "requests_alone": sum(record.is_run_alone for record in self.requests),
            "unmoved_mismatched_requests": sum(bool(record.unmoved_difference) for record in self.requests),
            "requests_per_s": self.num_migrated / seconds if seconds else None,
        }


def result_of(progress: Progress, command: str) -> Result:
    rows: dict[str, dict[str, Value]] = {name: dict(row) for name, row in rows_of(progress.requests).items()}
    codes = sorted({session.code for session in progress.sessions})
    rows["run"] = {"code_states": len(codes), "sessions": len(progress.sessions), "refused": "; ".join(NOT_MOVED)}
    hops = [hop for record in progress.requests for hop in record.hops]
    return Result(
        name="exactness",
        command=command,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        figures=progress.figures(),
        arms=rows,
        n={"requests": len(progress.requests), "batches": len(progress.batches), "hops": len(hops)},
        spread={
            "tokens_of_a_request": spread_of([record.num_tokens for record in progress.migrated]),
            "hops_of_a_request": spread_of([len(record.hops) for record in progress.migrated]),
            "stopped_ms": spread_of([hop.stopped_s * 1e3 for hop in hops]),
        },
        machine=this_machine(),
    )


def rows_of(records: Iterable[RequestRecord]) -> Mapping[str, Mapping[str, int]]:
    """Of each kind, in the order of the kinds."""
    counters: dict[str, Counter[str]] = {}
    for record in records:
        counter = counters.setdefault(record.kind, Counter())
        counter["migrated"] += record.verdict in (Verdict.EXACT, Verdict.MISMATCHED)
        counter["mismatched"] += bool(record.difference)
        counter["lost_or_doubled"] += record.lost + record.doubled
        counter["hops"] += len(record.hops)
        counter["refusals"] += record.num_refusals
        counter["faults"] += record.num_faults
        counter["other_state"] += record.verdict is Verdict.OTHER_STATE
        counter["not_moved"] += record.verdict is Verdict.NOT_MOVED
        counter["unmoved_mismatched"] += bool(record.unmoved_difference)
    known = [name for name in BY_NAME if name in counters]
    return {name: dict(counters[name]) for name in known}


COLUMNS: Sequence[str] = (
    "migrated",
    "mismatched",
    "hops",
    "refusals",
    "faults",
    "other_state",
    "not_moved",
    "unmoved_mismatched",
)


def table_of(progress: Progress) -> Table:
    table = Table(title="Moved requests against the same requests unmoved", title_justify="left")
    table.add_column("kind")
    for column in COLUMNS:
        table.add_column(column.replace("_", " "), justify="right")
    for name, row in rows_of(progress.requests).items():
        style = "red" if row["mismatched"] or row["lost_or_doubled"] else ""
        table.add_row(name, *(f"{row[column]:,}" for column in COLUMNS), style=style)
    return table
