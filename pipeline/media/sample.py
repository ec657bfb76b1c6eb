"""Which moments of a video to score: pure arithmetic on presentation times, in seconds.

A sample is a moment; it is scored on the frame that is on screen then. Frame numbers are never
guessed from rates, so variable frame rate and edit lists need no special case.
"""

import bisect
import itertools
import re
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import ConfigError

Mode = Literal["uniform", "fps", "every", "keyframes", "all"]

# Container time bases round frame times to a millisecond or so; smaller differences in spacing
# are not variable frame rate.
_ROUNDING_S = 0.0021

# No frame weighs nothing, however broken the times of a file are.
_LEAST_S = 1e-6

_HELP = "uniform:N, fps:R, every:K, keyframes or all"


@dataclass(frozen=True)
class SampleSpec:
    """A parsed `--sample`: the mode and its number (frames, frames per second, or a stride)."""

    mode: Mode
    value: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "SampleSpec":
        """Read `uniform:16`, `fps:2`, `every:10`, `keyframes` or `all`. Raises ConfigError."""
        if text == "all":
            return cls("all")
        if text == "keyframes":
            return cls("keyframes")
        counted = re.fullmatch(r"(uniform|every):(\d+)", text)
        if counted and int(counted[2]) > 0:
            return cls("uniform" if counted[1] == "uniform" else "every", int(counted[2]))
        rate = re.fullmatch(r"fps:(\d+(?:\.\d+)?)", text)
        if rate and float(rate[1]) > 0:
            return cls("fps", float(rate[1]))
        raise ConfigError(f"sample '{text}': use {_HELP}, with a number above zero.")

    @property
    def needs_frame_times(self) -> bool:
        """Whether the times of all frames must be known (read from the packets, not decoded)."""
        return self.mode in ("every", "keyframes", "all")


@dataclass(frozen=True)
class Timeline:
    """When a video is on screen. `frame_times` is sorted; empty when it was not needed."""

    start_s: float
    duration_s: float
    frame_times: tuple[float, ...] = ()
    keyframe_times: tuple[float, ...] = ()
    coded_bytes: int | None = None
    """Of all frames, where their packets were read."""


@dataclass(frozen=True)
class Samples:
    """Moments to score, and the seconds of the video that each stands for."""

    times: tuple[float, ...]
    weights: tuple[float, ...]


def plan_samples(spec: SampleSpec, timeline: Timeline) -> Samples:
    """The moments that a spec asks of a timeline.

    Weights are equal unless the spacing of frames really varies; then each frame counts for the
    time it is on screen.
    """
    start, duration = timeline.start_s, max(timeline.duration_s, _ROUNDING_S)
    if spec.mode == "uniform":
        n = int(spec.value)
        step = duration / n
        return Samples(tuple(start + (i + 0.5) * step for i in range(n)), (step,) * n)
    if spec.mode == "fps":
        n = max(1, int(duration * spec.value + 1e-6))
        step = 1.0 / spec.value
        return Samples(tuple(start + i * step for i in range(n)), (step,) * n)
    if spec.mode == "keyframes":
        times = timeline.keyframe_times or timeline.frame_times[:1]
    else:
        stride = int(spec.value) if spec.mode == "every" else 1
        times = timeline.frame_times[::stride]
    known = timeline.frame_times
    frame_s = (known[-1] - known[0]) / (len(known) - 1) if len(known) > 1 else 0.0
    return Samples(times, spacing_weights(times, start + duration, frame_s))


def spacing_weights(
    times: tuple[float, ...], end_s: float, frame_s: float = 0.0
) -> tuple[float, ...]:
    """Seconds from each time to the next, the last one to `end_s`; equal when nearly so.

    frame_s: how long a frame is on screen. By so much an end may be off that is told by a header.
    """
    if len(times) < 2:
        return (max(end_s - times[0], _ROUNDING_S),) if times else ()
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    last = end_s - times[-1]
    if max(gaps) - min(gaps) <= max(_ROUNDING_S, 0.01 * mean):
        cut_short = _LEAST_S < last < mean - frame_s - _ROUNDING_S
        return (*(mean,) * len(gaps), last if cut_short else mean)
    return (*(max(g, _LEAST_S) for g in gaps), last if last > _LEAST_S else mean)


def slice_units(
    samples: Samples, keyframe_times: tuple[float, ...], max_frames: int
) -> list[Samples]:
    """Cut samples into work units of at most `max_frames`.

    A cut is moved back to a keyframe when one lies in the second half of the unit, so that the
    next unit need not decode what this one already has.
    """
    units = []
    begin, total = 0, len(samples.times)
    while begin < total:
        end = min(begin + max_frames, total)
        if end < total and keyframe_times:
            index = bisect.bisect_right(keyframe_times, samples.times[end]) - 1
            moved = bisect.bisect_left(samples.times, keyframe_times[index]) if index >= 0 else 0
            if begin + (max_frames + 1) // 2 <= moved < end:
                end = moved
        units.append(Samples(samples.times[begin:end], samples.weights[begin:end]))
        begin = end
    return units
