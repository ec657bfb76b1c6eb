"""Black bars around the picture: where they are in one frame, and in a whole video."""

import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.media.colour import RGB

Luma = npt.NDArray[np.float32]

_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)

# A row or column is black up to this mean, of 0..255 at full range: FFmpeg's cropdetect has the
# same, 24 of limited range.
_BLACK = 9.5
# Bars are made in pairs; a dark floor or sky has none opposite. As a share of the size.
_UNEVEN = 0.02
# A border this narrow is how codecs and scalers end a picture, not a bar.
LEAST_BAR = 4


@dataclass(frozen=True)
class Box:
    """A part of an upright picture, in pixels; right and bottom are just outside it."""

    left: int
    top: int
    right: int
    bottom: int

    def __or__(self, other: "Box") -> "Box":
        """The smallest box around both."""
        return Box(
            min(self.left, other.left),
            min(self.top, other.top),
            max(self.right, other.right),
            max(self.bottom, other.bottom),
        )

    def __str__(self) -> str:
        return f"{self.right - self.left}:{self.bottom - self.top}:{self.left}:{self.top}"

    @classmethod
    def parse(cls, text: str) -> "Box":
        """Read `WIDTH:HEIGHT:LEFT:TOP`, as FFmpeg's crop filter writes it."""
        width, height, left, top = map(int, text.split(":"))
        return cls(left, top, left + width, top + height)

    def of(self, rgb: RGB) -> RGB:
        """This part of a picture, as a view; it is smaller where the picture does not reach."""
        return rgb[self.top : self.bottom, self.left : self.right]


def luma(rgb: RGB) -> Luma:
    """Luma of BT.709, 0..255, [H,W]."""
    return np.asarray(rgb @ _LUMA, np.float32)


def lit(luma: Luma) -> Box | None:
    """What the black edges of a frame leave, of full-range luma [H,W]; None of a black frame."""
    rows = np.flatnonzero(luma.mean(axis=1) > _BLACK)
    if not rows.size:
        return None
    columns = np.flatnonzero(luma[rows[0] : rows[-1] + 1].mean(axis=0) > _BLACK)
    if not columns.size:
        return None
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def picture(shape: tuple[int, int], boxes: Iterable[Box | None]) -> Box | None:
    """What bars leave of a video of `shape` (height, width), from `lit` of frames all over it.

    Only what is black in all of them is a bar, and only where there is one opposite of nearly the
    same size. None when there are no bars, or nothing else.
    """
    seen = [box for box in boxes if box is not None]
    if not seen:
        return None
    around = functools.reduce(operator.or_, seen)
    height, width = shape
    left, right = _pair(around.left, around.right, width)
    top, bottom = _pair(around.top, around.bottom, height)
    box = Box(left, top, right, bottom)
    return None if box == Box(0, 0, width, height) else box


def _pair(begin: int, end: int, size: int) -> tuple[int, int]:
    """The two bars of one axis, or none."""
    before, after = begin, size - end
    if min(before, after) < LEAST_BAR or abs(before - after) > max(2, _UNEVEN * size):
        return 0, size
    return begin, end
