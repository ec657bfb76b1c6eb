"""The stored samples of a frame: luma and chroma planes, neither converted nor resized."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorRange

from pipeline.media import colour

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


_RANGES = {"full": ColorRange.JPEG, "limited": ColorRange.MPEG}


def upright_planes(frame: "VideoFrame", form: str | None) -> tuple[Planes | None, str]:
    """The planes of a frame as it is to be shown, and their form, `WIDTHxHEIGHT PIX_FMT RANGE`.

    form: what to bring them to, by swscale's bicubic filter. There are none of RGB, of palettes,
    and of pictures that lie on their side and whose chroma is halved in one direction only.
    """
    rotation, mirrored = colour.orientation(frame)
    lies = rotation % 180 != 0
    if form is None:
        own = "full" if colour.is_full_range(frame) else "limited"
        width, height = (frame.height, frame.width) if lies else (frame.width, frame.height)
        its_form = f"{width}x{height} {frame.format.name} {own}"
    else:
        brought = _brought_to(form, frame, lies)
        if brought is None:
            return None, form
        frame, its_form = brought, form
    try:
        found = planes_of(frame)
    except ValueError:
        return None, its_form
    if lies and found.u is not None and _is_oblong(found.y, found.u):
        return None, its_form

    def turned(plane: Plane) -> Plane:
        return colour.upright(plane, rotation, mirrored)

    u, v = (None if plane is None else turned(plane) for plane in (found.u, found.v))
    return Planes(turned(found.y), u, v, found.bits), its_form


def _brought_to(form: str, frame: "VideoFrame", lies: bool) -> "VideoFrame | None":
    """A frame in another's form; None where swscale cannot do that, as with palettes."""
    shape, pix_fmt, wanted = form.split()
    size = [int(side) for side in shape.split("x")]
    width, height = reversed(size) if lies else size
    own = "full" if colour.is_full_range(frame) else "limited"
    grays = frame.format.name.startswith("gray"), pix_fmt.startswith("gray")
    if grays in ((True, False), (False, True)):
        # Gray is full-range to swscale, whatever it is told: codes of one range are kept as they
        # are, and of two ranges it can make gray only what is full, and of gray only that.
        if own == wanted:
            own = wanted = "full"
        elif (own if grays[0] else wanted) == "limited":
            return None
    try:
        return frame.reformat(
            width,
            height,
            pix_fmt,
            interpolation="BICUBIC",
            src_color_range=_RANGES[own],
            dst_color_range=_RANGES[wanted],
        )
    except (ValueError, OSError):
        return None


def _is_oblong(luma: Plane, chroma: Plane) -> bool:
    """Whether chroma is halved in one direction only."""
    halved = [a < b for a, b in zip(chroma.shape, luma.shape, strict=True)]
    return bool(halved[0] != halved[1])


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
