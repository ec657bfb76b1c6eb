"""What has happened so far in a run, seen from everywhere in the cluster."""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


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

    def __init__(self) -> None:
        self.failures_allowed: int | None = None
        self.progress = Progress()
        self._failed: set[str] = set()
        self.beats = 0

    def allow(self, failures: int | None) -> None:
        """How many units may fail before the run must stop; None: all of them."""
        self.failures_allowed = failures

    def beat(self) -> None:
        """Something moved."""
        self.beats += 1

    def moved(self) -> int:
        """Another number than before when something has moved since."""
        return self.beats + self.progress.units

    def scored(self, units: int, frames: int) -> None:
        """So many more units were scored, with so many frames in all."""
        self.progress.units += units
        self.progress.frames += frames

    def failed(self, unit_id: str, uri: str, code: str, message: str) -> None:
        """A unit failed. One that is done again, as after the loss of a node, counts once."""
        if unit_id in self._failed:
            return
        self._failed.add(unit_id)
        self.progress.units += 1
        self.progress.failed[code] += 1
        self.progress.recent_failures.append((uri, code, message))

    def stopped(self) -> bool:
        """Whether the run must stop: more units have failed than are allowed."""
        return self.failures_allowed is not None and len(self._failed) > self.failures_allowed

    def poll(self) -> Progress:
        """Progress so far; failures are handed out once."""
        now = self.progress
        self.progress = Progress(now.units, now.frames, Counter(now.failed))
        return now


BEAT_S = 5.0
"""How often it is told, at most, and looked at, that something moves."""


class Pulse:
    """Tells a monitor, from within a task, that it gets on: its rows are only seen at its end.

    monitor: None when nobody watches.
    """

    def __init__(self, monitor: Any) -> None:
        self.monitor = monitor
        self._told = time.monotonic()

    def beat(self) -> None:
        """A piece of the work is done."""
        now = time.monotonic()
        if self.monitor is not None and now - self._told >= BEAT_S:
            self._told = now
            self.monitor.beat.remote()
