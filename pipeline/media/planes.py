"""The stored samples of a frame: luma and chroma planes, neither converted nor resized."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

Plane = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Planes:
    """Code values of Y, U and V: [H, W] luma and [H', W'] chroma, of `bits` bits (8 to 16).

    Gray video has no chroma.
    """

    y: Plane
    u: Plane | None
    v: Plane | None
    bits: int


def planes_of(frame: "VideoFrame") -> Planes:
    """Copy the planes of a decoded YUV or gray frame.

    Raises ValueError for RGB and packed formats: what they hold are not separate planes of Y, U
    and V.
    """
    kind = frame.format
    components = kind.components
    if kind.is_rgb or len(components) not in (1, 3) or len(frame.planes) != len(components):
        raise ValueError(f"no Y, U and V planes in pixel format {kind.name}")
    found = [_plane(frame, index) for index in range(len(components))]
    y, u, v = found if len(found) == 3 else (found[0], None, None)
    return Planes(y, u, v, components[0].bits)


def planes_of_rgb(rgb: npt.NDArray[np.uint8]) -> Planes:
    """Full-range BT.601 planes (as in JPEG) of a picture that is stored as RGB [H, W, 3]."""
    from PIL import Image

    y, u, v = np.moveaxis(np.asarray(Image.fromarray(rgb).convert("YCbCr")), 2, 0)
    return Planes(y, u, v, 8)


def _plane(frame: "VideoFrame", index: int) -> Plane:
    component, plane = frame.format.components[index], frame.planes[index]
    wide = ">u2" if frame.format.is_big_endian else "<u2"
    dtype = np.dtype("u1" if component.bits <= 8 else wide)
    samples = np.frombuffer(memoryview(plane), dtype)
    rows = samples.reshape(plane.height, plane.line_size // dtype.itemsize)
    return np.ascontiguousarray(rows[:, : plane.width], dtype.newbyteorder("="))
