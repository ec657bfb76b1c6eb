"""What has happened so far in a run, seen from everywhere in the cluster."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Progress:
    """Counts of this run: work units, frames, and failed units by code."""

    units: int = 0
    frames: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    recent_failures: list[tuple[str, str, str]] = field(default_factory=list)
    """(uri, code, message) not yet shown to anyone."""

    @property
    def n_failed(self) -> int:
        """Failed units."""
        return sum(self.failed.values())


class Monitor:
    """Collects progress, as a Ray actor: stages report to it, the driver polls it."""

    def __init__(self, failures_allowed: int | None) -> None:
        self.failures_allowed = failures_allowed
        self.progress = Progress()

    def scored(self, units: int, frames: int) -> None:
        """So many more units were scored, with so many frames in all."""
        self.progress.units += units
        self.progress.frames += frames

    def failed(self, uri: str, code: str, message: str) -> bool:
        """A unit failed. Returns whether the run must stop: more failed than is allowed."""
        self.progress.units += 1
        self.progress.failed[code] += 1
        self.progress.recent_failures.append((uri, code, message))
        allowed = self.failures_allowed
        return allowed is not None and self.progress.n_failed > allowed

    def poll(self) -> Progress:
        """Progress so far; failures are handed out once."""
        now = self.progress
        self.progress = Progress(now.units, now.frames, Counter(now.failed))
        return now
