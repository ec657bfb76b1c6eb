"""HDR and wide-gamut pictures to BT.709, in linear light: pure arithmetic on 16-bit planes.

    code -> linear light of the source's display -> tone curve -> BT.709 primaries -> BT.1886 code

Curves are tables, so that a 1080p frame takes a fraction of a tenth of a second on one core.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Plane = npt.NDArray[np.uint16]

WHITE_NITS = 203.0
"""Reference white of HDR (ITU-R BT.2408); it is the peak of the display that is mapped to."""
DEFAULT_PEAK_NITS = 1000.0
"""Peak of a source that does not state one, and the nominal peak of HLG (ITU-R BT.2100)."""

# Chromaticities of red, green and blue, by name; white is D65 for all of them.
_PRIMARIES = {
    "bt709": ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    "bt2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    "p3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
_D65 = (0.3127, 0.3290)
_SDR_GAMMA = 2.4
_HLG_GAMMA = 1.2
_LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)
# Rows converted at a time: what they need stays in the cache.
_STRIP = 16
# Tables over linear light are spaced by its square root: evenly enough for the eye.
_LEVELS = 1 << 14


@dataclass(frozen=True)
class Light:
    """What the codes of a picture stand for. peak_nits counts for `pq` and `hlg` only."""

    transfer: Literal["pq", "hlg", "sdr"]
    primaries: Literal["bt709", "bt2020", "p3"]
    peak_nits: float = DEFAULT_PEAK_NITS


def to_bt709(
    red: Plane, green: Plane, blue: Plane, light: Light, bottom: int, top: int
) -> npt.NDArray[np.uint8]:
    """Planes [H,W] to BT.709 RGB of a BT.1886 display, uint8 [H,W,3].

    `bottom` and `top` are the codes of 0 and of 1. Colours outside BT.709 are clipped, channel by
    channel.
    """
    linear, tone, encode = _linear_table(light, bottom, top), _tone_table(light), _encode_table()
    matrix = gamut_matrix(light.primaries, "bt709").astype(np.float32)
    out = np.empty((*red.shape, 3), np.uint8)
    for start in range(0, red.shape[0], _STRIP):
        rows = slice(start, start + _STRIP)
        source = [linear[plane[rows]] for plane in (red, green, blue)]
        if light.transfer == "hlg":
            _hlg_display(source)
            source = [tone[_level(channel)] for channel in source]
        for index, (r, g, b) in enumerate(matrix):
            mixed = r * source[0]
            mixed += g * source[1]
            mixed += b * source[2]
            out[rows, :, index] = encode[_level(mixed)]
    return out


def _level(light: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Where light of 0..1 stands in a table; overwrites its argument."""
    np.clip(light, 0, 1, out=light)
    np.sqrt(light, out=light)
    light *= _LEVELS - 1
    light += 0.5
    return light.astype(np.uint16)


def _hlg_display(scene: list[npt.NDArray[np.float32]]) -> None:
    """Scene light to display light, both 0..1, in place: the OOTF of BT.2100 at 1000 nit."""
    luminance = _LUMA_2020[0] * scene[0]
    luminance += _LUMA_2020[1] * scene[1]
    luminance += _LUMA_2020[2] * scene[2]
    gain = _ootf_table()[_level(luminance)]
    for channel in scene:
        channel *= gain


# --- curves, in float64 -------------------------------------------------------------------------


def pq_to_nits(code: Floats) -> Floats:
    """The EOTF of SMPTE ST 2084: code 0..1 to cd/m2."""
    root = np.power(code, 1 / _M2)
    return 10000 * np.power(np.maximum(root - _C1, 0) / (_C2 - _C3 * root), 1 / _M1)


def nits_to_pq(nits: Floats) -> Floats:
    """The inverse EOTF of SMPTE ST 2084: cd/m2 to code 0..1."""
    power = np.power(nits / 10000, _M1)
    return np.power((_C1 + _C2 * power) / (1 + _C3 * power), _M2)


_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32


def hlg_to_scene(code: Floats) -> Floats:
    """The inverse OETF of HLG (ARIB STD-B67, ITU-R BT.2100 table 5): code 0..1 to scene light."""
    a = 0.17883277
    b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
    return np.where(code <= 0.5, code * code / 3, (np.exp((code - c) / a) + b) / 12)


def tone_curve(nits: Floats, peak_nits: float) -> Floats:
    """The EETF of ITU-R BT.2390 (5.4.1): light of a source to that of a display of WHITE_NITS.

    Below a knee light stays as it is; from there to the source's peak it is rolled off in PQ
    space by a Hermite spline. Black is 0 on both sides.
    """
    if peak_nits <= WHITE_NITS:
        return np.minimum(nits, WHITE_NITS)
    source_peak = nits_to_pq(np.array(peak_nits))
    most = nits_to_pq(np.array(WHITE_NITS)) / source_peak
    knee = 1.5 * most - 0.5
    code = np.minimum(nits_to_pq(nits) / source_peak, 1)
    t = (code - knee) / (1 - knee)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (3 * t**2 - 2 * t**3) * most
    )
    return pq_to_nits(np.where(code < knee, code, spline) * source_peak)


def gamut_matrix(source: str, target: str) -> Floats:
    """Linear RGB of some primaries to that of others, [3,3]; the white is the same."""
    return np.linalg.inv(_to_xyz(target)) @ _to_xyz(source)


def _to_xyz(primaries: str) -> Floats:
    """SMPTE RP 177: the matrix whose columns add up to the white point."""
    columns = np.array([_xyz(x, y) for x, y in _PRIMARIES[primaries]]).T
    return columns * np.linalg.solve(columns, _xyz(*_D65))


def _xyz(x: float, y: float) -> Floats:
    return np.array([x / y, 1.0, (1 - x - y) / y])


# --- tables -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _linear_table(light: Light, bottom: int, top: int) -> npt.NDArray[np.float32]:
    """From a 16-bit code: light of the target display (PQ, SDR) or of the scene (HLG), 0..1."""
    code = np.clip((np.arange(1 << 16) - bottom) / (top - bottom), 0, 1)
    if light.transfer == "pq":
        linear = tone_curve(pq_to_nits(code), light.peak_nits) / WHITE_NITS
    elif light.transfer == "hlg":
        linear = hlg_to_scene(code)
    else:
        linear = code**_SDR_GAMMA
    return linear.astype(np.float32)


@functools.lru_cache(maxsize=4)
def _tone_table(light: Light) -> npt.NDArray[np.float32]:
    """From light of an HLG display (0..1 by square root) to that of the target display, 0..1."""
    shown = np.square(np.arange(_LEVELS) / (_LEVELS - 1)) * DEFAULT_PEAK_NITS
    return (tone_curve(shown, light.peak_nits) / WHITE_NITS).astype(np.float32)


@functools.cache
def _ootf_table() -> npt.NDArray[np.float32]:
    """From luminance of the scene (0..1 by square root) to what its light is multiplied by."""
    luminance = np.square(np.arange(_LEVELS) / (_LEVELS - 1))
    return (luminance ** (_HLG_GAMMA - 1)).astype(np.float32)


@functools.cache
def _encode_table() -> npt.NDArray[np.uint8]:
    """From light (0..1 by square root) to the code of a BT.1886 display with a black of 0."""
    linear = np.square(np.arange(_LEVELS) / (_LEVELS - 1))
    return np.rint(255 * linear ** (1 / _SDR_GAMMA)).astype(np.uint8)
