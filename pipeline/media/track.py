"""A stretch of a video as alignment sees it: its frames, each reduced to a grid of mean luma."""

from collections.abc import Sequence

import numpy as np
from av.video.frame import VideoFrame

from pipeline.media import colour, decode
from pipeline.media.align import Feature, Track, luma_feature


def track(url: str, times: Sequence[float], max_pixels: int) -> Track:
    """The frames on screen at `times` (seconds, ascending). Raises MediaError."""
    features: list[Feature] = []

    def see(frame: VideoFrame) -> None:
        luma = frame.to_ndarray(format="gray").astype(np.uint8, copy=False)
        features.append(luma_feature(colour.upright(luma, *colour.orientation(frame))))

    limits = decode.Limits(max_pixels, 3 * max_pixels * len(times))
    found = decode.decode_at(url, times, [1.0] * len(times), limits, see=see, convert=False)
    return Track(np.array([shot.pts_s for shot in found.shots]), np.stack(features))
