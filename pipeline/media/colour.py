"""From a decoded frame to full-range RGB of a BT.709 display. docs/colour.md states the policy.

swscale undoes the matrix, the range and the chroma subsampling, with accurate rounding; `tonemap`
does what needs linear light: HDR, and primaries wider than those of BT.709.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from pipeline.media import tonemap

RGB = npt.NDArray[np.uint8]
Hdr = Literal["tonemap", "refuse"]
Interlaced = Literal["deinterlace", "keep"]
Crop = Literal["none", "auto"]
Background = Literal["black", "white"]

_MATRIX_NAMES = {  # ITU-T H.273 matrix coefficients; 0 (RGB), 2 and 3 say nothing of YUV
    1: "bt709",
    4: "fcc",
    5: "bt601",
    6: "bt601",
    7: "smpte240m",
    8: "ycgco",
    9: "bt2020",
    10: "bt2020cl",
    11: "ydzdx",
    12: "chroma_derived",
    13: "chroma_derived_cl",
    14: "ictcp",
    15: "ipt_c2",
    16: "ycgco_re",
    17: "ycgco_ro",
}
_SWSCALE = {
    "rgb": None,
    "bt709": Colorspace.ITU709,
    "fcc": Colorspace.FCC,
    "bt601": Colorspace.ITU601,
    "smpte240m": Colorspace.SMPTE240M,
    "bt2020": Colorspace.BT2020,
}
_FLAGS = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)
_HDR_TRANSFERS = {16: "pq", 18: "hlg"}
_PRIMARIES: dict[int, Literal["bt709", "bt2020", "p3"]] = {9: "bt2020", 11: "p3", 12: "p3"}
_UNTAGGED = (0, 2)
# What a mastering display or a content light level may sensibly claim.
_PEAK_NITS = (100.0, 10000.0)


@dataclass(frozen=True)
class Policy:
    """What may be done to pictures that are not progressive standard-range ones without bars, and
    what transparent ones are laid over.
    """

    hdr: Hdr = "tonemap"
    interlaced: Interlaced = "deinterlace"
    crop: Crop = "none"
    alpha: Background = "black"


DEFAULT_POLICY = Policy()


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
    codec_padding: str | None
    """What the codec codes beyond the picture, `COLUMNSxROWS`; its own cropping cut it off."""
    peak_nits: float | None
    """What tone mapping took for the brightest of the source; None when there was none."""
    gamut_mapped: bool
    deinterlaced: bool


def look_of(frame: VideoFrame, coded: tuple[int, int] = (0, 0), deinterlaced: bool = False) -> Look:
    """Read a frame's tags and settle what they leave open. coded: the codec's width and height."""
    is_rgb = frame.format.is_rgb
    tagged = _MATRIX_NAMES.get(int(frame.colorspace))
    hd = frame.height >= 720 or frame.width >= 1280
    matrix = "rgb" if is_rgb else tagged or ("bt709" if hd else "bt601")
    rotation, mirrored = orientation(frame)
    transfer, primaries = int(frame.color_trc), int(frame.color_primaries)
    hdr = _HDR_TRANSFERS.get(transfer)
    return Look(
        pix_fmt=frame.format.name,
        matrix=matrix,
        matrix_tagged=tagged is not None or is_rgb,
        full_range=is_full_range(frame),
        primaries=primaries,
        transfer=transfer,
        hdr=hdr,
        interlaced=bool(frame.interlaced_frame),
        rotation=rotation,
        mirrored=mirrored,
        codec_padding=_padding(frame, *coded),
        peak_nits=_peak_nits(frame) if hdr else None,
        gamut_mapped=_gamut(primaries, matrix, hdr) != "bt709",
        deinterlaced=deinterlaced,
    )


def is_full_range(frame: VideoFrame) -> bool:
    """Whether code values reach from 0 to the highest; otherwise they keep to the video range."""
    kind = frame.format
    return kind.is_rgb or kind.name.startswith("yuvj") or int(frame.color_range) == 2


def objection(look: Look, policy: Policy) -> str | None:
    """Why a frame is not to be converted; None when it is."""
    if look.hdr and policy.hdr == "refuse":
        return f"HDR ({look.hdr}), which the option hdr=refuse turns away"
    if look.matrix not in _SWSCALE:
        return f"its colours are in {look.matrix}, for which there is no conversion here"
    return None


def to_rgb(
    frame: VideoFrame,
    look: Look,
    reformatter: VideoReformatter,
    background: Background = "black",
) -> RGB:
    """Full-range RGB, uint8 [H,W,3], upright, laid over the background where it is transparent.

    The look's matrix must be one without objection.
    """
    depth = min(frame.format.components[0].bits, 16)
    linear = look.hdr is not None or look.gamut_mapped
    # To swscale gray is full-range, whatever it is told; and to 8 bits it takes the top of a
    # full-range 10-bit scale for 1020, not 1023.
    narrow_gray = _is_gray(frame) and not look.full_range
    layered = frame.format.has_palette or any(c.is_alpha for c in frame.format.components)
    deep = linear or narrow_gray or (depth > 8 and (look.full_range or layered))
    # To planes, swscale is five times as fast as to pixels, with the same result.
    converted = reformatter.reformat(
        frame,
        format=("gbrap" if layered else "gbrp") + ("16le" if deep else ""),
        interpolation=_FLAGS,
        src_colorspace=_SWSCALE[look.matrix],
        src_color_range=ColorRange.JPEG if look.full_range else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        threads=1,
    )
    red, green, blue, *alpha = _planes(converted, np.dtype("<u2") if deep else np.dtype(np.uint8))
    # swscale widens full-range values by a shift, and takes limited-range white for 255 x 256.
    widened = ((1 << depth) - 1) << (16 - depth)
    if look.full_range:
        bottom, top = 0, widened
    elif narrow_gray:  # ITU-R BT.709-6, quantisation: 16 and 235, times 2 to the depth - 8
        bottom, top = 16 << 8, 235 << 8
    else:
        bottom, top = 0, 255 << 8
    if linear:
        image = tonemap.to_bt709(red, green, blue, _light(look), bottom, top)
    else:
        image = np.empty((*red.shape, 3), np.uint8)
        for index, plane in enumerate((red, green, blue)):
            image[:, :, index] = _rounding_table(bottom, top)[plane] if deep else plane
    if layered and not _is_unused(alpha[0], image, look):
        _lay_over(image, alpha[0], widened if deep else 255, background)
    return upright(image, look.rotation, look.mirrored)


def _is_unused(alpha: npt.NDArray[Any], image: RGB, look: Look) -> bool:
    """Whether alpha, which would hide all of a picture, is but the fourth byte of its pixels.

    Uncompressed AVI is such. GIFs come in the same format, and are white where transparent.
    """
    return look.pix_fmt == "bgra" and not alpha.any() and image.min() < image.max()


def _lay_over(image: RGB, alpha: npt.NDArray[Any], opaque: int, background: Background) -> None:
    """Lay a picture over the background, in place. Colours are taken as not multiplied by alpha."""
    back = 0.0 if background == "black" else 255.0
    for row in np.flatnonzero((alpha < opaque).any(axis=1)):  # by rows, to save memory
        share = alpha[row, :, None] / opaque
        image[row] = np.rint(image[row] * share + back * (1 - share))


def upright(image: npt.NDArray[Any], rotation: int, mirrored: bool) -> npt.NDArray[Any]:
    """A picture [H, W] or [H, W, 3] as it is to be shown: see `orientation`."""
    if mirrored:
        image = image[:, ::-1]
    return np.ascontiguousarray(np.rot90(image, (-rotation // 90) % 4))


def _is_gray(frame: VideoFrame) -> bool:
    """Whether a frame has luma alone, of 8 to 16 bits: not a palette, bits or floats."""
    luma = [c.bits for c in frame.format.components if not c.is_alpha]
    return len(luma) == 1 and 8 <= luma[0] <= 16 and not frame.format.has_palette


def _planes(frame: VideoFrame, dtype: np.dtype[Any]) -> list[npt.NDArray[Any]]:
    """Red, green, blue and any alpha of a planar RGB frame, which has them as G, B, R, A; views."""
    planes = [np.frombuffer(memoryview(p), dtype).reshape(frame.height, -1) for p in frame.planes]
    return [planes[i][:, : frame.width] for i in (2, 0, 1, 3)[: len(planes)]]


@functools.lru_cache(maxsize=4)
def _rounding_table(bottom: int, top: int) -> RGB:
    """From a 16-bit code to an 8-bit one, `bottom` being black and `top` white."""
    codes = np.clip((np.arange(1 << 16) - bottom) / (top - bottom), 0, 1)
    return np.asarray(np.rint(255 * codes), np.uint8)


def _light(look: Look) -> tonemap.Light:
    gamut = _gamut(look.primaries, look.matrix, look.hdr)
    if look.hdr is None:
        return tonemap.Light("sdr", gamut)
    transfer: Literal["pq", "hlg"] = "pq" if look.hdr == "pq" else "hlg"
    return tonemap.Light(transfer, gamut, look.peak_nits or tonemap.DEFAULT_PEAK_NITS)


def _gamut(primaries: int, matrix: str, hdr: str | None) -> Literal["bt709", "bt2020", "p3"]:
    """The primaries to convert from; sets close to BT.709's (BT.601) count as those.

    Untagged means BT.2020 where the matrix or the transfer are of that family.
    """
    if primaries in _UNTAGGED and (matrix == "bt2020" or hdr):
        return "bt2020"
    return _PRIMARIES.get(primaries, "bt709")


def _peak_nits(frame: VideoFrame) -> float:
    """The brightest light of an HDR video, cd/m2: MaxCLL, else the mastering display's peak.

    HLG is scene-referred and has a nominal peak instead (ITU-R BT.2100).
    """
    if _HDR_TRANSFERS.get(int(frame.color_trc)) == "hlg":
        return tonemap.DEFAULT_PEAK_NITS
    level = _side_data(frame, SideDataType.CONTENT_LIGHT_LEVEL)
    if level is not None:  # AVContentLightMetadata: unsigned MaxCLL, MaxFALL
        brightest = float(np.frombuffer(level, "<u4")[0])
        if brightest:
            return float(np.clip(brightest, *_PEAK_NITS))
    mastering = _side_data(frame, SideDataType.MASTERING_DISPLAY_METADATA)
    if mastering is not None:
        # AVMasteringDisplayMetadata: eight chromaticities, least and most light (each a fraction
        # of two ints), and whether the chromaticities and the light are set.
        values = np.frombuffer(mastering, "<i4")
        numerator, denominator, has_light = values[18], values[19], values[21]
        if has_light and numerator > 0 and denominator > 0:
            return float(np.clip(numerator / denominator, *_PEAK_NITS))
    return tonemap.DEFAULT_PEAK_NITS


def _padding(frame: VideoFrame, width: int, height: int) -> str | None:
    columns, rows = max(width - frame.width, 0), max(height - frame.height, 0)
    return f"{columns}x{rows}" if columns or rows else None


def _side_data(frame: VideoFrame, kind: SideDataType) -> bytes | None:
    try:
        data: Any = frame.side_data.get(kind)  # type: ignore[call-overload]
    except ValueError:  # PyAV does not know every kind of side data there is
        return None
    return None if data is None else bytes(data)


def orientation(frame: VideoFrame) -> tuple[int, bool]:
    """Clockwise degrees to turn the picture upright, and whether to mirror it first.

    From the display matrix (ISO/IEC 14496-12, 6.2.2); angles are rounded to quarter turns.
    """
    data = _side_data(frame, SideDataType.DISPLAYMATRIX)
    if data is None:
        return (-frame.rotation) % 360, False
    a, b, _, c, d = (int(v) for v in np.frombuffer(data, dtype="<i4")[:5])
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    degrees = round(np.degrees(np.arctan2(b, a)) / 90) * 90
    return int(degrees) % 360, mirrored
