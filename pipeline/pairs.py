"""Which frames of an item are compared with which of its reference: decided while planning."""

import bisect
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np

from pipeline.errors import Misaligned, Unpaired
from pipeline.media import align
from pipeline.media.align import Estimate, Floats, Indexes, Track
from pipeline.media.letterbox import LEAST_BAR, Box
from pipeline.media.probe import Facts, Probe
from pipeline.media.sample import Samples, SampleSpec, Timeline, plan_samples

Watch = Callable[[str, list[float]], Track]
"""From an address and times to what alignment sees of those frames."""

# So much of an item is looked at to find its offset, at these places in turn until one is sure.
_WINDOW_S = 2.5
_WINDOWS = (0.0, 0.4, 0.75)
# So many lines apart, crops are the same.
_SAME_CUT = 3


@dataclass(frozen=True)
class Offset:
    """Reference time minus distorted time, in seconds; read off the pictures, how sure it is."""

    seconds: float
    estimate: Estimate | None = None


@dataclass(frozen=True)
class Pairs:
    """Frames to compare, by their presentation times in either file.

    n_matched and n_unmatched count all frames of the distorted video, not only those sampled.
    """

    samples: Samples
    reference_times: tuple[float, ...]
    n_matched: int
    n_unmatched: int


def same_kind(uri: str, distorted: Probe, reference: Probe) -> None:
    """Raises Unpaired for a picture and a video."""
    if distorted.facts.kind != reference.facts.kind:
        raise Unpaired(
            f"{uri}: is {distorted.facts.kind}, its reference is {reference.facts.kind}: they "
            "cannot be compared."
        )


def common_crop(distorted: Facts, reference: Facts) -> str | None:
    """The distorted video's crop: its reference's, where its own is the same but for rounding.

    Bars of small renditions are blurred and fall between pixels: cut by its own, a picture would
    be compared with its reference up to two lines of theirs away. Bars of few lines are not seen at
    all there: a rendition of the reference's shape is cut where they must be.
    """
    if reference.crop is None:
        return distorted.crop
    width, height = distorted.coded_width, distorted.coded_height
    across, down = width / reference.coded_width, height / reference.coded_height
    theirs = Box.parse(reference.crop)
    left, right = round(theirs.left * across), round(theirs.right * across)
    top, bottom = round(theirs.top * down), round(theirs.bottom * down)
    same = Box(left, top, right, bottom)
    if distorted.crop is None:
        unseen = max(left, width - right, top, height - bottom) <= LEAST_BAR
        full = reference.coded_width / reference.coded_height
        cut = (theirs.right - theirs.left) / (theirs.bottom - theirs.top)
        shape = width / height  # nearer to which: sizes are rounded
        return str(same) if unseen and abs(shape - full) < abs(shape - cut) else None
    own = Box.parse(distorted.crop)
    sides = zip(astuple(own), astuple(same), strict=True)
    near = all(abs(a - b) <= _SAME_CUT for a, b in sides)
    return str(same) if near else distorted.crop


def offset_by_start(distorted: Timeline, reference: Timeline) -> Offset:
    """Both begin together, as FFmpeg has it when several files are its input."""
    return Offset(reference.frame_times[0] - distorted.frame_times[0])


def offset_by_pictures(
    uri: str,
    sides: tuple[tuple[str, Timeline], tuple[str, Timeline]],
    within_s: float,
    watch: Watch,
) -> Offset:
    """The offset that a short stretch of both shows. Raises Misaligned when none is sure.

    sides: address and timeline of the distorted and of the reference.
    """
    (address, distorted), (reference_address, reference) = sides
    around = offset_by_start(distorted, reference).seconds
    best: Estimate | None = None
    for share in _WINDOWS:
        begin = distorted.frame_times[0] + share * distorted.duration_s
        ours = _between(distorted.frame_times, begin, begin + _WINDOW_S)
        theirs = _between(
            reference.frame_times,
            begin + around - within_s,
            begin + around + _WINDOW_S + within_s,
        )
        if not ours or not theirs:
            continue
        tracks = watch(address, ours), watch(reference_address, theirs)
        found = align.estimate_offset(*tracks, within_s, around)
        if found.trusted:
            return Offset(found.offset_s, found)
        if best is None or found.confidence > best.confidence:
            best = found
    if best is None:
        raise Misaligned(f"{uri}: it and its reference show nothing at the same time.")
    return Offset(align.trusted_offset(best, uri), best)


def _between(times: tuple[float, ...], begin: float, end: float) -> list[float]:
    return list(times[bisect.bisect_left(times, begin) : bisect.bisect_left(times, end)])


def pair_frames(
    uri: str,
    spec: SampleSpec,
    distorted: Timeline,
    reference: Timeline,
    offset_s: float,
    rule: Literal["time", "number"] = "time",
) -> Pairs:
    """The frames that a sample spec asks for, each with its reference frame.

    Moments (`uniform`, `fps`) are those of the reference, so that all its renditions are compared
    at the same ones, with the same reference frames. `every`, `keyframes` and `all` count frames of
    the distorted video. What has no partner is left out. Raises Misaligned when nothing has one.
    """
    ours, theirs = np.array(distorted.frame_times), np.array(reference.frame_times)
    if rule == "number" or len(ours) == len(theirs) == 1:  # one frame has no duration to go by
        partner = align.match_by_number(np.arange(len(ours)), len(theirs)).reference
    else:
        partner = align.match(ours, theirs, offset_s, align.interval_s(ours)).reference
    if spec.mode in ("uniform", "fps"):
        moments = plan_samples(spec, reference)
        chosen = [_at(moment, offset_s, ours, theirs, partner) for moment in moments.times]
    else:
        moments = plan_samples(spec, distorted)
        chosen = [int(i) for i in np.searchsorted(ours, np.array(moments.times) - 1e-9)]
    weight: dict[int, float] = {}
    for index, seconds in zip(chosen, moments.weights, strict=True):
        if index >= 0 and partner[index] >= 0:
            weight[index] = weight.get(index, 0.0) + seconds
    together = np.flatnonzero(partner >= 0)
    if not weight and len(together):  # all moments lie outside of what both show
        weight[int(together[len(together) // 2])] = sum(moments.weights)
    if not weight:
        raise Misaligned(
            f"{uri}: no frame of it is on screen together with one of its reference, at an offset "
            f"of {offset_s:+.3f} s. Check the pair, or use --align auto."
        )
    order = sorted(weight)
    matched = len(together)
    return Pairs(
        Samples(tuple(float(ours[i]) for i in order), tuple(weight[i] for i in order)),
        tuple(float(theirs[partner[i]]) for i in order),
        matched,
        len(partner) - matched,
    )


def _at(moment: float, offset_s: float, ours: Floats, theirs: Floats, partner: Indexes) -> int:
    """The distorted frame to compare at a moment of the reference; -1 when there is none.

    That is one whose reference frame is on screen then. Where the distorted video has dropped it,
    the one on screen instead, which is compared with its own reference frame. A distorted video
    that has ended shows none.
    """
    shown = max(0, int(np.searchsorted(theirs, moment + 1e-9, side="right")) - 1)
    own = np.flatnonzero(partner == shown)
    if len(own):
        return int(own[0])
    if moment - offset_s >= ours[-1] + align.interval_s(ours):
        return -1
    return int(np.searchsorted(ours, moment - offset_s + 1e-9, side="right")) - 1
