"""How exact colours are, and what HDR costs: the tables of docs/colour.md.

    python benchmarks/colour.py

Every conversion is compared with the formulas of the standards, computed here in float64 and one
colour at a time: ITU-R BT.709, BT.601, BT.2020, SMPTE 240M and FCC by ITU-T H.273, SMPTE ST 2084,
ITU-R BT.2100, BT.2390 and BT.1886. Errors are in levels of 8 bits, and are at best 0.5: a half
level is what rounding takes.
"""

import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter

from pipeline.media.colour import look_of, to_rgb

Array = npt.NDArray[np.float64]

# H.273 number, Kr and Kb of each matrix.
MATRICES = {
    "bt601": (6, 0.299, 0.114),
    "bt709": (1, 0.2126, 0.0722),
    "bt2020": (9, 0.2627, 0.0593),
    "smpte240m": (7, 0.212, 0.087),
    "fcc": (4, 0.30, 0.11),
}
DEPTHS = (8, 10, 12, 16)
SUBSAMPLINGS = {"420": (2, 2), "422": (2, 1), "444": (1, 1)}
PATCH = 16
_BARS = tuple(itertools.product((0.0, 1.0), repeat=3))


@dataclass(frozen=True)
class Signal:
    """How colours are coded in a frame."""

    matrix: str
    full: bool
    depth: int
    subsampling: str

    def ranges(self) -> tuple[float, float, float, float]:
        """Codes of black and white, of neutral chroma, and of the width of the chroma scale."""
        scale, top = 2.0 ** (self.depth - 8), 2.0**self.depth - 1
        if self.full:
            return 0.0, top, 128 * scale, top
        return 16 * scale, 235 * scale, 128 * scale, 224 * scale


def signals() -> Iterator[Signal]:
    """Every combination of the table."""
    for values in itertools.product(MATRICES, (False, True), DEPTHS, SUBSAMPLINGS):
        yield Signal(*values)


def decoded(signal: Signal, yuv: Array) -> Array:
    """What codes [...,3] stand for, as R'G'B' of 0..1 (H.273, 8.3); not clipped."""
    black, white, neutral, width = signal.ranges()
    _, kr, kb = MATRICES[signal.matrix]
    luma = (yuv[..., 0] - black) / (white - black)
    red = luma + 2 * (1 - kr) * (yuv[..., 2] - neutral) / width
    blue = luma + 2 * (1 - kb) * (yuv[..., 1] - neutral) / width
    green = (luma - kr * red - kb * blue) / (1 - kr - kb)
    return np.stack([red, green, blue], -1)


def coded(signal: Signal, rgb: Array) -> Array:
    """The nearest codes [...,3] for R'G'B' of 0..1."""
    black, white, neutral, width = signal.ranges()
    _, kr, kb = MATRICES[signal.matrix]
    luma = kr * rgb[..., 0] + (1 - kr - kb) * rgb[..., 1] + kb * rgb[..., 2]
    cb = (rgb[..., 2] - luma) / (2 * (1 - kb)) * width + neutral
    cr = (rgb[..., 0] - luma) / (2 * (1 - kr)) * width + neutral
    yuv = np.stack([luma * (white - black) + black, cb, cr], -1)
    return np.clip(np.rint(yuv), 0, 2**signal.depth - 1)


def chart(signal: Signal) -> Array:
    """Codes of colour patches, [n,3]: bars of 100 and 75 %, a grey ramp, a grid over all codes."""
    black, white, neutral, width = signal.ranges()
    bars = np.concatenate([np.array(_BARS), 0.75 * np.array(_BARS)])
    ramp = np.full((256, 3), neutral)
    ramp[:, 0] = np.rint(np.linspace(black, white, 256))
    low, high = max(neutral - width / 2, 0.0), min(neutral + width / 2, 2.0**signal.depth - 1)
    axes = (np.linspace(black, white, 9), *2 * (np.linspace(low, high, 9),))
    grid = np.rint(np.stack(np.meshgrid(*axes, indexing="ij"), -1)).reshape(-1, 3)
    return np.concatenate([coded(signal, bars), ramp, grid])


def patches(signal: Signal, yuv: Array) -> av.VideoFrame:
    """A frame of flat patches, in one row, of codes [n,3]; primaries and transfer of BT.709."""
    across, down = SUBSAMPLINGS[signal.subsampling]
    suffix = "" if signal.depth == 8 else f"{signal.depth}le"
    name = f"yuv{signal.subsampling}p{suffix}"
    picture = np.repeat(np.repeat(yuv[None], PATCH, 0), PATCH, 1)
    frame = av.VideoFrame(picture.shape[1], PATCH, name)
    dtype = np.uint8 if signal.depth == 8 else np.dtype("<u2")
    for index, plane in enumerate(frame.planes):
        codes = picture[:, :, 0] if index == 0 else picture[::down, ::across, index]
        lines = np.zeros((plane.height, plane.line_size // np.dtype(dtype).itemsize), dtype)
        lines[:, : plane.width] = codes
        plane.update(lines.tobytes())
    frame.colorspace, frame.color_range = MATRICES[signal.matrix][0], 2 if signal.full else 1
    frame.color_primaries = frame.color_trc = 1
    return frame


def centres(frame: av.VideoFrame) -> Array:
    """The converted colour of each patch, [n,3], in levels."""
    rgb = to_rgb(frame, look_of(frame), VideoReformatter())
    return rgb[PATCH // 2, PATCH // 2 :: PATCH].astype(float)


def sdr_error(signal: Signal) -> float:
    """The largest error of a channel over the chart, in levels."""
    yuv = chart(signal)
    expected = 255 * np.clip(decoded(signal, yuv), 0, 1)
    return float(np.abs(centres(patches(signal, yuv)) - expected).max())


def gray_error(full: bool, depth: int) -> float:
    """The largest error over all codes of 4:0:0 video, in levels."""
    codes = np.arange(2**depth).reshape(-1, 256)
    frame = av.VideoFrame(256, len(codes), "gray" if depth == 8 else f"gray{depth}le")
    frame.planes[0].update(codes.astype(np.uint8 if depth == 8 else "<u2").tobytes())
    frame.colorspace, frame.color_range = 1, 2 if full else 1
    black, white, *_ = Signal("bt709", full, depth, "400").ranges()
    expected = 255 * np.clip((codes - black) / (white - black), 0, 1)
    rgb = to_rgb(frame, look_of(frame), VideoReformatter())
    return float(np.abs(rgb - expected[:, :, None]).max())


# --- HDR ----------------------------------------------------------------------------------------

HDR_SIGNAL = Signal("bt2020", full=False, depth=10, subsampling="420")
TRANSFERS = {"pq": 16, "hlg": 18}
_TO_BT709 = np.array(  # ITU-R BT.2407, 2.2
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
)


def pq_eotf(code: float) -> float:
    """SMPTE ST 2084, equation 4.1: 0..1 to cd/m2."""
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    root = code ** (1 / m2)
    return 10000 * float(max(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)


def pq_inverse(nits: float) -> float:
    """SMPTE ST 2084, equation 5.2: cd/m2 to 0..1."""
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    power = (nits / 10000) ** m1
    return float((c1 + c2 * power) / (1 + c3 * power)) ** m2


def hlg_eotf(rgb: Array) -> Array:
    """ITU-R BT.2100 table 5, for a display of 1000 cd/m2: R'G'B' of 0..1 to cd/m2."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = [e * e / 3 if e <= 0.5 else (np.exp((e - c) / a) + b) / 12 for e in rgb]
    luminance = 0.2627 * scene[0] + 0.6780 * scene[1] + 0.0593 * scene[2]
    return 1000 * float(luminance) ** 0.2 * np.array(scene)


def eetf(nits: float, peak: float, target: float) -> float:
    """ITU-R BT.2390, 5.4.1, with a black of 0."""
    most = pq_inverse(target) / pq_inverse(peak)
    knee = 1.5 * most - 0.5
    e1 = min(pq_inverse(nits) / pq_inverse(peak), 1.0)
    if e1 >= knee:
        t = (e1 - knee) / (1 - knee)
        e1 = (
            (2 * t**3 - 3 * t**2 + 1) * knee
            + (t**3 - 2 * t**2 + t) * (1 - knee)
            + (-2 * t**3 + 3 * t**2) * most
        )
    return pq_eotf(e1 * pq_inverse(peak))


def hdr_expected(transfer: str, rgb: Array, peak: float = 1000.0) -> Array:
    """R'G'B' of 0..1 of an HDR signal, [n,3], to levels of the tone-mapped BT.709 picture."""
    out = []
    for colour in np.clip(rgb, 0, 1):
        light = np.array([pq_eotf(e) for e in colour]) if transfer == "pq" else hlg_eotf(colour)
        mapped = np.array([eetf(nits, peak, 203.0) / 203.0 for nits in light])
        out.append(255 * np.clip(_TO_BT709 @ mapped, 0, 1) ** (1 / 2.4))
    return np.array(out)


def hdr_error(transfer: str) -> float:
    """The largest error of a channel over the chart, in levels."""
    yuv = chart(HDR_SIGNAL)
    frame = patches(HDR_SIGNAL, yuv)
    frame.color_primaries, frame.color_trc = 9, TRANSFERS[transfer]
    expected = hdr_expected(transfer, decoded(HDR_SIGNAL, yuv))
    return float(np.abs(centres(frame) - expected).max())


def milliseconds(transfer: int, primaries: int, depth: int) -> float:
    """CPU time to convert a 1080p frame on one core: the median of nine."""
    frame = av.VideoFrame(1920, 1080, "yuv420p" if depth == 8 else f"yuv420p{depth}le")
    rng = np.random.default_rng(0)
    for plane in frame.planes:
        codes = rng.integers(16 << (depth - 8), 235 << (depth - 8), plane.buffer_size)
        plane.update(codes.astype(np.uint8 if depth == 8 else "<u2").tobytes()[: plane.buffer_size])
    frame.colorspace, frame.color_range = primaries, 1
    frame.color_primaries, frame.color_trc = primaries, transfer
    reformatter, taken = VideoReformatter(), []
    for _ in range(10):
        started = time.process_time()
        to_rgb(frame, look_of(frame), reformatter)
        taken.append(time.process_time() - started)
    return 1000 * statistics.median(taken[1:])


def main() -> None:
    """Measure and print, as Markdown."""
    print("| matrix | range | bits | 4:2:0 | 4:2:2 | 4:4:4 |\n|---|---|---|---|---|---|")
    for matrix, full, depth in itertools.product(MATRICES, (False, True), DEPTHS):
        errors = [sdr_error(Signal(matrix, full, depth, s)) for s in SUBSAMPLINGS]
        cells = " | ".join(f"{error:.2f}" for error in errors)
        print(f"| {matrix} | {'full' if full else 'limited'} | {depth} | {cells} |")
    print(
        "\n| 4:0:0 |" + "".join(f" {depth} bits |" for depth in DEPTHS) + "\n|---|---|---|---|---|"
    )
    for span in ("limited", "full"):
        cells = " | ".join(f"{gray_error(span == 'full', depth):.2f}" for depth in DEPTHS)
        print(f"| {span} | {cells} |")
    print("\n| HDR | error |\n|---|---|")
    for transfer in TRANSFERS:
        print(f"| {transfer} | {hdr_error(transfer):.2f} |")
    print("\n| 1080p frame | CPU ms |\n|---|---|")
    kinds = {
        "8-bit BT.709": (1, 1, 8),
        "10-bit BT.709": (1, 1, 10),
        "10-bit BT.2020, standard range": (14, 9, 10),
        "10-bit PQ": (16, 9, 10),
        "10-bit HLG": (18, 9, 10),
    }
    for name, codes in kinds.items():
        print(f"| {name} | {milliseconds(*codes):.0f} |")


if __name__ == "__main__":
    main()
