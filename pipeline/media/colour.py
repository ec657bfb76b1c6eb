"""From a decoded frame to full-range RGB: matrix, range, orientation. One stated policy.

Matrix: as tagged; untagged means BT.709 from 720 lines (or 1280 columns) up, BT.601 below.
Range: as tagged; untagged means limited, except for full-range pixel formats. RGB stays as it is.
Chroma is upsampled bicubically, rounding is accurate. HDR and interlaced material is converted
like any other and marked.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

RGB = npt.NDArray[np.uint8]

_MATRICES = {  # ITU-T H.273 matrix coefficients
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}
_FLAGS = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)
_HDR_TRANSFERS = {16: "pq", 18: "hlg"}
_MATRIX_NAMES = {
    0: "rgb",
    1: "bt709",
    4: "fcc",
    5: "bt601",
    6: "bt601",
    7: "smpte240m",
    9: "bt2020",
}


@dataclass(frozen=True)
class Look:
    """How a frame was turned into RGB, and what it is. `rotation` in degrees, clockwise."""

    pix_fmt: str
    matrix: str
    matrix_tagged: bool
    full_range: bool
    primaries: int
    transfer: int
    hdr: str | None
    interlaced: bool
    rotation: int
    mirrored: bool


def look_of(frame: VideoFrame) -> Look:
    """Read a frame's tags and settle what they leave open."""
    tag = int(frame.colorspace)
    is_rgb = frame.format.is_rgb
    known = tag in _MATRICES and not is_rgb
    hd = frame.height >= 720 or frame.width >= 1280
    matrix = 0 if is_rgb else tag if known else 1 if hd else 6
    full = is_rgb or frame.format.name.startswith("yuvj") or int(frame.color_range) == 2
    rotation, mirrored = orientation(frame)
    transfer = int(frame.color_trc)
    return Look(
        pix_fmt=frame.format.name,
        matrix=_MATRIX_NAMES.get(matrix, "bt2020"),
        matrix_tagged=known or is_rgb,
        full_range=full,
        primaries=int(frame.color_primaries),
        transfer=transfer,
        hdr=_HDR_TRANSFERS.get(transfer),
        interlaced=bool(frame.interlaced_frame),
        rotation=rotation,
        mirrored=mirrored,
    )


def to_rgb(frame: VideoFrame, look: Look, reformatter: VideoReformatter) -> RGB:
    """Full-range RGB, uint8 [H,W,3], upright."""
    matrix = {v: _MATRICES.get(k) for k, v in _MATRIX_NAMES.items()}.get(look.matrix)
    # To 8 bits, swscale takes the top of a full-range 10-bit scale for 1020, not 1023.
    deep = look.full_range and frame.format.components[0].bits > 8
    # Planes come with the same values as packed pixels, from vector instead of scalar code.
    target = "rgb48le" if deep else "rgb24" if look.matrix == "rgb" else "gbrp"
    converted = reformatter.reformat(
        frame,
        format=target,
        interpolation=_FLAGS,
        src_colorspace=matrix,
        src_color_range=ColorRange.JPEG if look.full_range else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        threads=1,
    )
    image = converted.to_ndarray()
    if deep:
        image = ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if look.mirrored:
        image = image[:, ::-1]
    turns = (-look.rotation // 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns))


def orientation(frame: VideoFrame) -> tuple[int, bool]:
    """Clockwise degrees to turn the picture upright, and whether to mirror it first.

    From the display matrix (ISO/IEC 14496-12, 6.2.2); angles are rounded to quarter turns.
    """
    try:
        data: Any = frame.side_data.get(SideDataType.DISPLAYMATRIX)  # type: ignore[call-overload]
    except ValueError:  # PyAV does not know every kind of side data there is
        return (-frame.rotation) % 360, False
    if data is None:
        return 0, False
    a, b, _, c, d = (int(v) for v in np.frombuffer(bytes(data), dtype="<i4")[:5])
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    degrees = round(np.degrees(np.arctan2(b, a)) / 90) * 90
    return int(degrees) % 360, mirrored
