"""Frame scores to the scores of a video: pure functions of times, weights and scores."""

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import ConfigError

Array = npt.NDArray[np.float64]

DEFAULT_POOLING = (
    "mean", "se", "hmean", "min", "max", "std", "p1", "p5", "p10", "p50", "worst_1s", "worst_5s",
)  # fmt: skip

_SIMPLE = ("mean", "se", "hmean", "min", "max", "std")
_PERCENTILE = re.compile(r"p(\d{1,2})")
_WORST = re.compile(r"worst_(\d+)s")


def check_names(names: tuple[str, ...]) -> None:
    """Raise ConfigError unless every name is a pooling we know, and none comes twice."""
    for name in names:
        known = name in _SIMPLE or _PERCENTILE.fullmatch(name) or _WORST.fullmatch(name)
        if not known or name == "worst_0s":
            raise ConfigError(
                f"unknown pooling '{name}': use {', '.join(_SIMPLE)}, pN (0 to 99) or worst_Ns"
            )
    if len(set(names)) != len(names):
        raise ConfigError("a pooling is named twice")


def columns(names: tuple[str, ...]) -> dict[str, str]:
    """Output columns of the poolings, in order, and their kind: `float` or `int`.

    `score`, the mean over time, is always there.
    """
    out = {"score": "float"}
    for name in names:
        if name == "mean":
            continue
        if _WORST.fullmatch(name):
            out[f"score_{name}"] = "float"
            out[f"{name}_start_s"] = "float"
            out[f"{name}_n_frames"] = "int"
        else:
            out[f"score_{name}"] = "float"
    return out


@dataclass(frozen=True)
class Frames:
    """Scored frames of one item in order of time: [N] each, N >= 1; weights in seconds."""

    times: Array
    weights: Array
    scores: Array


def pool(frames: Frames, names: tuple[str, ...]) -> dict[str, float | int | None]:
    """Pool frame scores over time. Keys are those of `columns`.

    `se` is the standard error of the mean, had the frames been drawn at random; evenly spread ones
    err less. It is null for a single frame. Every statistic counts a frame for the time that it
    stands for. The harmonic mean is null when a score is zero or below, where it is not defined.
    With equal weights, percentiles interpolate linearly between frames (numpy's default); otherwise
    they are the score that at least N % of the time is at or below (inverted distribution
    function).
    """
    out: dict[str, float | int | None] = {"score": _mean(frames)}
    percentiles = _percentiles(frames, [name for name in names if _PERCENTILE.fullmatch(name)])
    for name in names:
        if name == "mean":
            continue
        if worst := _WORST.fullmatch(name):
            score, start, count = worst_window(frames, float(worst[1]))
            out[f"score_{name}"] = score
            out[f"{name}_start_s"] = start
            out[f"{name}_n_frames"] = count
        else:
            out[f"score_{name}"] = (
                percentiles[name] if name in percentiles else _single(frames, name)
            )
    return out


def _single(frames: Frames, name: str) -> float | None:
    scores, weights = frames.scores, frames.weights
    if name == "hmean":
        return float(weights.sum() / np.dot(weights, 1 / scores)) if scores.min() > 0 else None
    if name == "se":
        return _standard_error(frames)
    if name == "min":
        return float(scores.min())
    if name == "max":
        return float(scores.max())
    return float(np.sqrt(np.dot(weights, (scores - _mean(frames)) ** 2) / weights.sum()))


def _percentiles(frames: Frames, names: list[str]) -> dict[str, float]:
    """All at once: numpy takes 0.1 ms to start on any, as long as an item's other poolings."""
    percents = [int(name[1:]) for name in names]
    weights = frames.weights
    if np.ptp(weights) <= 1e-9 * weights.max():
        found = np.percentile(frames.scores, percents)
    else:
        found = np.percentile(frames.scores, percents, weights=weights, method="inverted_cdf")
    return dict(zip(names, found.tolist(), strict=True))


def _standard_error(frames: Frames) -> float | None:
    """sqrt(n / (n - 1) sum (w (x - mean))^2) / sum w: s / sqrt(n) when all weigh the same."""
    n = len(frames.scores)
    if n < 2:
        return None
    off = frames.weights * (frames.scores - _mean(frames))
    return float(np.sqrt(n / (n - 1) * np.vdot(off, off)) / frames.weights.sum())


def _mean(frames: Frames) -> float:
    return float(np.dot(frames.scores, frames.weights) / frames.weights.sum())


def worst_window(frames: Frames, length_s: float) -> tuple[float, float, int]:
    """The window of `length_s` seconds with the lowest mean score.

    Windows begin at a frame and hold every frame less than `length_s` later, the last of them for
    what is left of the window; those reaching past the last frame are looked at only when the item
    is shorter than the window. The end may be off by half of what a frame weighs: samples are of
    the frames next to their times. Returns the mean (time-weighted), the time of the first frame in
    seconds, and the number of frames.
    """
    times, scores, weights = frames.times, frames.scores, frames.weights
    usual = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else weights[-1]
    slack = 0.5 * min(weights[-1], usual)
    last_start = max(times[0], times[-1] + weights[-1] + slack - length_s)
    starts = np.flatnonzero(times <= last_start + 1e-9)
    lasts = np.searchsorted(times, times[starts] + length_s - 1e-9, side="left") - 1
    total = np.concatenate(([0.0], np.cumsum(scores * weights)))
    weight = np.concatenate(([0.0], np.cumsum(weights)))
    left = np.minimum(weights[lasts], times[starts] + length_s - times[lasts])
    means = (total[lasts] - total[starts] + scores[lasts] * left) / (
        weight[lasts] - weight[starts] + left
    )
    best = int(np.argmin(means))
    begin = int(starts[best])
    return float(means[best]), float(times[begin]), int(lasts[best] + 1 - begin)
