"""Stills as video encoders leave them, in five levels: H.264, HEVC and AV1.

Three ways a picture goes through an encoder: as a keyframe; as a keyframe of a smaller rendition
that a player enlarges; and as the last of a few frames that move, predicted from the earlier ones.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import av
import numpy as np

from topiq_core.training.distortions import LEVELS, RGB, scaled_through

os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 prints its settings otherwise

# Constant-quality settings from barely visible to severe; encoders' own scales (AV1: 0..63).
_QUALITIES = {
    "h264": ("libx264", (23, 29, 35, 41, 48)),
    "hevc": ("libx265", (23, 29, 35, 41, 48)),
    "av1": ("libsvtav1", (32, 43, 53, 60, 63)),
}
_OPTIONS = {
    "libx264": {"preset": "fast"},
    "libx265": {"preset": "fast", "x265-params": "log-level=none:pools=1:frame-threads=1"},
    "libsvtav1": {"preset": "9", "svtav1-params": "lp=1"},
}
_DECODERS = {"libx264": "h264", "libx265": "hevc", "libsvtav1": "libdav1d"}
# A smaller rendition is enlarged from this share of its side; its bits are less scarce.
_FACTORS = (0.8, 0.67, 0.5, 0.4, 0.3)
_SCALED_QUALITIES = {
    "h264": (20, 24, 28, 33, 38),
    "hevc": (20, 24, 28, 33, 38),
    "av1": (25, 32, 39, 47, 55),
}
_MOVING_FRAMES, _MOVING_PIXELS = 5, 3

KINDS: tuple[str, ...] = tuple(
    f"{way}{codec}" for way in ("", "scaled_", "moving_") for codec in _QUALITIES
)


@contextmanager
def usual_priority() -> Iterator[None]:
    """Encode with the calling thread's priority put back afterwards.

    SVT-AV1, run by root, as in most containers, makes the thread that calls it a real-time one
    (SCHED_FIFO, 99) and leaves it so: from then on it and all processes that it starts are served
    before any other of the machine, Ray's among them.
    """
    if not hasattr(os, "sched_getscheduler"):  # not on Linux
        yield
        return
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def coded(image: RGB, kind: str, level: int) -> RGB:
    """uint8 RGB [H,W,3], both sides even, after coding. kind: one of KINDS; level: 1..5.

    Deterministic: encoders run on one thread. Raises KeyError or ValueError for another kind or
    level.
    """
    if level not in LEVELS:
        raise ValueError(f"level {level}: 1 to {len(LEVELS)} is needed")
    way, _, codec = kind.rpartition("_")
    encoder, qualities = _QUALITIES[codec]
    quality = qualities[level - 1]
    if way == "scaled":
        quality = _SCALED_QUALITIES[codec][level - 1]
        return scaled_through(
            image, _FACTORS[level - 1], lambda small: _last_of([small], encoder, quality)
        )
    return _last_of(_panned(image) if way == "moving" else [image], encoder, quality)


def _panned(image: RGB) -> list[RGB]:
    """A camera that comes to rest where `image` is all it sees."""
    height, width = image.shape[:2]
    reach = _MOVING_PIXELS * (_MOVING_FRAMES - 1)
    padded = np.pad(image, ((reach, 0), (reach, 0), (0, 0)), mode="reflect")
    starts = [_MOVING_PIXELS * number for number in range(_MOVING_FRAMES)]
    return [np.ascontiguousarray(padded[s : s + height, s : s + width]) for s in starts]


def _last_of(frames: Sequence[RGB], encoder: str, quality: int) -> RGB:
    """The last frame, decoded. There is no container: the encoders' streams hold their headers."""
    writer: Any = av.CodecContext.create(encoder, "w")
    writer.options = {**_OPTIONS[encoder], "crf": str(quality)}
    writer.height, writer.width = frames[0].shape[:2]
    writer.pix_fmt = "yuv420p"
    writer.time_base, writer.framerate, writer.thread_count = Fraction(1, 25), 25, 1
    packets = []
    with usual_priority():
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, writer.time_base
            packets += writer.encode(frame)
        packets += writer.encode(None)
    reader: Any = av.CodecContext.create(_DECODERS[encoder], "r")
    reader.thread_count = 1
    decoded = [frame for packet in (*packets, None) for frame in reader.decode(packet)]
    if len(decoded) != len(frames):
        raise RuntimeError(f"{encoder} gave {len(decoded)} of {len(frames)} frames back")
    return np.asarray(decoded[-1].to_ndarray(format="rgb24"))
