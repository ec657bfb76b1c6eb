"""Which reference frame belongs to which distorted frame: pure arithmetic on times and features.

Frames belong together when they are on screen together. Between two files that is only so up to an
offset (`reference time = distorted time + offset`), because starts are cut, and encoders and
containers delay. `match` pairs frames under a given offset; `estimate_offset` finds the offset from
what the pictures show, and says how far it can be believed.
"""

import functools
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pipeline.errors import Misaligned

Floats = npt.NDArray[np.float64]
Feature = npt.NDArray[np.float32]
Indexes = npt.NDArray[np.int64]

# A feature is the luma of a frame, averaged over a grid of this many cells each way.
GRID = 32
# Correlation of the changes in two clips. Unrelated ones were seen to reach 0.46, and heavily
# compressed ones to keep 0.9 (docs/full-reference.md).
MIN_SIMILARITY = 0.7
# An offset must leave a fifth less unexplained than any other that is a frame or more away. Offsets
# that were a frame off, in a slow and heavily compressed scene, were seen to reach 0.135.
MIN_CONFIDENCE = 0.2

_BT709_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)
# Fewer common frames than this, or than this share of the shorter clip, prove nothing.
_LEAST_FRAMES = 12
_LEAST_SHARE = 1 / 3
# Offsets are tried this many times per frame, so that clips of different rates meet well.
_TRIES_PER_FRAME = 4
# A share of unexplained change that says nothing: compression leaves more, at its best.
_NEGLIGIBLE = 1e-3
# Cells that are compared: with more of them, slow scenes in heavy compression drown in noise.
_LIVELY_SHARE = 0.1
# What changes less than this (RMS over cells and frames, in steps of 255) stands still; keyframes
# of a still picture can be seen to pulse, but they follow the encoder, not the picture.
_STILL = 1.5
# Times that should be equal differ by less: floating point, and clocks of a microsecond.
_EQUAL_S = 2e-6


def luma_feature(picture: npt.NDArray[np.uint8] | npt.NDArray[np.float32]) -> Feature:
    """What alignment sees of a frame: mean luma over a grid, float32 [GRID, GRID], 0 to 255.

    picture: RGB [H, W, 3] (luma by BT.709) or a luma plane [H, W], on a scale of 0 to 255. It is
    stretched to the grid, so renditions of other sizes and pixel shapes compare; crops do not.
    """
    luma = picture @ _BT709_LUMA if picture.ndim == 3 else picture.astype(np.float32)
    height, width = luma.shape
    return np.asarray(_area_weights(height) @ luma @ _area_weights(width).T, np.float32)


@functools.lru_cache(maxsize=64)
def _area_weights(size: int) -> Feature:
    """The share of each of `size` pixels in each cell: float32 [GRID, size], rows add up to 1."""
    edges = np.linspace(0, size, GRID + 1)[:, None]
    pixel = np.arange(size)
    overlap = np.minimum(edges[1:], pixel + 1) - np.maximum(edges[:-1], pixel)
    return (overlap.clip(0) * GRID / size).astype(np.float32)


@dataclass(frozen=True)
class Track:
    """Some seconds of a video as alignment sees them.

    pts_s: [N] presentation times, ascending, of all frames in that stretch. features: [N, GRID,
    GRID], one `luma_feature` per frame.
    """

    pts_s: Floats
    features: Feature


@dataclass(frozen=True)
class Matches:
    """reference: [N] for each distorted frame the index of its reference frame, -1 for none."""

    reference: Indexes

    @property
    def matched(self) -> int:
        """Distorted frames with a reference frame."""
        return int((self.reference >= 0).sum())

    @property
    def unmatched(self) -> int:
        """Distorted frames at whose time the reference shows nothing."""
        return len(self.reference) - self.matched


def interval_s(pts_s: Floats) -> float:
    """The usual time from frame to frame: the median, in seconds; 0 for a single frame."""
    return float(np.median(np.diff(pts_s))) if len(pts_s) > 1 else 0.0


def match(
    distorted_pts_s: Floats, reference_pts_s: Floats, offset_s: float, frame_s: float
) -> Matches:
    """Pair frames by presentation time: each distorted frame with the reference frame on screen.

    distorted_pts_s: the frames to pair, which may be a sample of all. reference_pts_s: all frames
    of the reference, ascending, not empty. offset_s: reference time minus distorted time. frame_s:
    the usual interval of the distorted video, of all its frames.

    A reference frame counts from half a frame before its own time on (half of the shorter of the
    two intervals around it), so that rounded clocks do not tip a frame to its neighbour: with equal
    rates the nearest frame is taken, and of a slower reference the one on screen halfway through
    the distorted frame. Frames before the first and after the last stay unmatched. A reference
    frame may serve several distorted frames, or none.
    """
    usual = interval_s(reference_pts_s) or frame_s
    gaps = np.diff(reference_pts_s, prepend=reference_pts_s[0] - usual)
    begins = reference_pts_s - np.minimum(gaps, frame_s) / 2
    end = reference_pts_s[-1] + usual - min(usual, frame_s) / 2
    times = distorted_pts_s + offset_s
    index = np.searchsorted(begins, times + _EQUAL_S, side="right") - 1
    return Matches(np.where(times < end - _EQUAL_S, index, -1).astype(np.int64))


def match_by_number(numbers: Indexes, reference_frames: int) -> Matches:
    """Pair the n-th frame with the n-th, whatever their times, for `--align none`.

    numbers: [N] the frames to pair, counted from 0 over all frames of the distorted video.
    """
    return Matches(np.where(numbers < reference_frames, numbers, -1).astype(np.int64))


@dataclass(frozen=True)
class Estimate:
    """An offset read off the pictures, and how far to believe it.

    offset_s: reference time minus distorted time, in seconds. similarity: the correlation, at that
    offset, of what changes in the two videos, at most 1. confidence: by what share less it leaves
    unexplained than its best rival, 0 (any other offset would do as well) to 1. rival_s: that
    rival, None when there is none. n_frames: frames compared.
    """

    offset_s: float
    similarity: float
    confidence: float
    rival_s: float | None
    n_frames: int

    @property
    def trusted(self) -> bool:
        """Whether the offset may be used."""
        return self.similarity >= MIN_SIMILARITY and self.confidence >= MIN_CONFIDENCE


def trusted_offset(estimate: Estimate, uri: str) -> float:
    """The offset of an estimate, in seconds. Raises Misaligned, with the numbers, when in doubt."""
    if estimate.trusted:
        return estimate.offset_s
    rival = "" if estimate.rival_s is None else f", next best {estimate.rival_s:+.3f} s"
    raise Misaligned(
        f"{uri}: where it lies in its reference cannot be told from the pictures: best offset "
        f"{estimate.offset_s:+.3f} s over {estimate.n_frames} frames, similarity "
        f"{estimate.similarity:.3f} (at least {MIN_SIMILARITY}), confidence "
        f"{estimate.confidence:.3f} (at least {MIN_CONFIDENCE}){rival}. Check the pair; when its "
        "time stamps are right, use --align pts."
    )


def estimate_offset(
    distorted: Track, reference: Track, max_offset_s: float, around_s: float = 0.0
) -> Estimate:
    """The constant offset under which two videos change in the same way.

    Offsets up to `max_offset_s` (seconds) either side of `around_s` are tried, in quarters of a
    frame. Under each, frames are paired as by `match`, and the features of both sides are compared
    over the paired frames after taking away each frame's own mean (fades, flashes, exposure) and
    each cell's mean over time (all that stands still: logos, bars, a changed black level). What is
    left is correlated over all cells and frames at once, so contrast does not matter either. The
    best offset is the middle of the best run of offsets that pair frames alike. A rival is any
    offset a frame or more away, judged on the frames that have a partner under both.

    Doubt shows as low confidence: still or periodic pictures, and slow ones in heavy compression,
    look much the same under another offset. Confidence is 0 where nothing moves, where an offset
    beyond those tried could be better, and where a third of the stretch, taken alone, is sure of
    another offset: then there is no constant one, as after a change of speed or a lost frame.
    """
    frame_s, reference_s = interval_s(distorted.pts_s), interval_s(reference.pts_s)
    step = min(frame_s, reference_s) / _TRIES_PER_FRAME
    if step <= 0:
        return _nothing(around_s)
    reach = int(max_offset_s / step)
    # Between the times at which pairings of equal rates change, so that the middle comes out exact.
    offsets = np.asarray(around_s + step * (np.arange(-reach, reach) + 0.5), np.float64)
    pairings = [match(distorted.pts_s, reference.pts_s, o, frame_s).reference for o in offsets]
    search = _Search(
        offsets,
        _distinct(pairings),
        *_liveliest(_levelled(distorted.features), _levelled(reference.features)),
        apart_s=max(frame_s, reference_s) - step / 2,
    )
    n = len(distorted.pts_s)
    found = search.over(slice(0, n), _LEAST_SHARE * min(n, len(reference.pts_s)))
    still = min(_change(search.distorted), _change(search.reference)) < _STILL
    paired = match(distorted.pts_s, reference.pts_s, found.offset_s, frame_s).reference >= 0
    thirds = (slice(n * k // 3, n * (k + 1) // 3) for k in range(3))
    doubtful = still or any(search.objects(third, paired[third], found) for third in thirds)
    return replace(found, confidence=0.0) if doubtful else found


def _nothing(offset_s: float) -> Estimate:
    return Estimate(offset_s, 0.0, 0.0, None, 0)


def _distinct(pairings: list[Indexes]) -> list[tuple[int, int, Indexes]]:
    """Runs of equal pairings: the first and last position of each, and the pairing."""
    runs: list[tuple[int, int, Indexes]] = []
    for at, pairing in enumerate(pairings):
        if runs and np.array_equal(runs[-1][2], pairing):
            runs[-1] = (runs[-1][0], at, pairing)
        else:
            runs.append((at, at, pairing))
    return runs


def _levelled(features: Feature) -> Floats:
    """Features as rows, float64 [N, cells], each frame's mean taken away."""
    rows = features.reshape(len(features), -1).astype(np.float64)
    return np.asarray(rows - rows.mean(1, keepdims=True))


def _liveliest(distorted: Floats, reference: Floats) -> tuple[Floats, Floats]:
    """Both without the cells where the reference changes little: those hold noise, not evidence."""
    cells = np.argsort(reference.var(0))[-round(_LIVELY_SHARE * reference.shape[1]) :]
    return distorted[:, cells], reference[:, cells]


def _change(rows: Floats) -> float:
    """How much the pictures change: RMS over cells and frames."""
    return float((rows - rows.mean(0)).std())


@dataclass(frozen=True)
class _Search:
    """Offsets to try, and the distinct ways in which they pair frames."""

    offsets: Floats
    runs: list[tuple[int, int, Indexes]]
    distorted: Floats
    reference: Floats
    apart_s: float

    def over(self, part: slice, least: float) -> Estimate:
        """The best offset for some of the distorted frames, and its most dangerous rival.

        Offsets under which fewer than `least` frames have a partner are not looked at.
        """
        runs = [(first, last, pairing[part]) for first, last, pairing in self.runs]
        rows = self.distorted[part]
        least = max(_LEAST_FRAMES, least)
        left = np.array([self._unexplained(rows, p, p >= 0, least) for _, _, p in runs])
        if np.isnan(left).all():
            return _nothing(float(self.offsets.mean()))
        at = int(np.nanargmin(left))
        first, last, best = runs[at]
        offset_s = float(self.offsets[first] + self.offsets[last]) / 2
        confidence, rival_s = 1.0, None
        for start, end, pairing in runs:
            middle_s = float(self.offsets[start] + self.offsets[end]) / 2
            if abs(middle_s - offset_s) < self.apart_s:
                continue
            both = (pairing >= 0) & (best >= 0)
            own = self._unexplained(rows, best, both, least)
            other = self._unexplained(rows, pairing, both, least)
            margin = 1 - (own + _NEGLIGIBLE) / (other + _NEGLIGIBLE)
            if margin < confidence:
                confidence, rival_s = margin, middle_s
        enclosed = 0 < at < len(runs) - 1 and not np.isnan(left[[at - 1, at + 1]]).any()
        if rival_s is None or not enclosed:
            confidence = 0.0
        n_frames = int((best >= 0).sum())
        return Estimate(offset_s, 1 - float(left[at]), max(0.0, confidence), rival_s, n_frames)

    def objects(self, part: slice, paired: npt.NDArray[np.bool_], found: Estimate) -> bool:
        """Whether some of the distorted frames, alone, are sure of another offset than that found.

        They are heard only when most of them have a partner under the offset found as well.
        """
        most = max(_LEAST_FRAMES, 0.75 * len(paired))
        if paired.sum() < most:
            return False
        own = self.over(part, most)
        return own.trusted and abs(own.offset_s - found.offset_s) > self.apart_s

    def _unexplained(
        self, rows: Floats, pairing: Indexes, among: npt.NDArray[np.bool_], least: float
    ) -> float:
        """One minus the correlation of changes, over the frames `among`; NaN when too few."""
        if among.sum() < least:
            return np.nan
        return 1 - _correlation(rows[among], self.reference[pairing[among]])


def _correlation(a: Floats, b: Floats) -> float:
    """Of changes over time, all cells together: [N, cells] each. 0 where one side stands still."""
    a, b = a - a.mean(0), b - b.mean(0)
    energy = float(np.vdot(a, a) * np.vdot(b, b))
    return float(np.vdot(a, b)) / energy**0.5 if energy > 0 else 0.0
