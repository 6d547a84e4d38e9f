"""What can be chosen about a demo, and which bars must it reach?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from instance.spec import Carrier

MIN_DURATION_S = 5.0
MAX_DURATION_S = 3600.0
CPU_CARRIERS = (Carrier.SHM.value, Carrier.TCP.value)


class OptionError(ValueError):
    """An option cannot be used; the text is one line saying what to do."""


@dataclass(frozen=True, slots=True)
class Bars:
    """The demo fails when one of these does not hold."""

    min_committed_migrations: int = 20
    max_mismatched_tokens: int = 0
    max_client_errors: int = 0
    max_drain_s: float = 10.0


@dataclass(frozen=True, slots=True)
class DemoOptions:
    duration_s: float = 60.0
    """How long requests are sent; answers under way are waited for, and the check takes as long again."""
    trace: Path | None = None
    """Azure CSV or Mooncake JSONL, plain or gzipped; None: a generated workload."""
    seed: int = 0
    out: Path = Path("demo-out")
    """Folder for result.json and moves.png."""
    model: str | None = None
    """Hugging Face folder or hub name; None: the small model of bench/models/tiny."""
    carrier: str = Carrier.SHM.value
    carrier_checksum: bool = False
    bars: Bars = field(default_factory=Bars)

    def check(self) -> None:
        """Raises OptionError."""
        if not MIN_DURATION_S <= self.duration_s <= MAX_DURATION_S:
            raise OptionError(
                f"--duration is {self.duration_s:g} s; give {MIN_DURATION_S:g} to {MAX_DURATION_S:g} seconds"
            )
        if self.carrier not in CPU_CARRIERS:
            raise OptionError(f"--carrier is {self.carrier!r}; the demo's instances have no GPU: give it shm or tcp")
        if self.out.exists() and not self.out.is_dir():
            raise OptionError(f"{self.out} is a file; give --out a folder")


def small_model() -> str:
    """The folder of the small model, beside this package in the checkout or the install. Raises OptionError."""
    folder = Path(__file__).resolve().parents[2] / "bench" / "models" / "tiny"
    if not (folder / "config.json").is_file():
        raise OptionError(f"the small model is missing: {folder} (make it with `python -m bench.models.train`)")
    return str(folder)
