"""Conversions against the formulas of the standards, computed here in float64."""

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, VideoReformatter

from pipeline.media.colour import _FLAGS, _MATRICES, look_of, to_rgb

# Kr, Kb of ITU-R BT.709, BT.601 and BT.2020, by H.273 number.
MATRICES = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}


def flat_frame(y, u, v, depth=8, height=64, width=64):
    """A frame of one colour, 4:2:0."""
    dtype, fmt = (np.uint8, "yuv420p") if depth == 8 else (np.uint16, f"yuv420p{depth}le")
    planes = np.empty((height * 3 // 2, width), dtype)
    planes[:height] = y
    planes[height : height * 5 // 4].flat = u
    planes[height * 5 // 4 :].flat = v
    return av.VideoFrame.from_ndarray(planes, format=fmt)


def expected_rgb(y, u, v, kr, kb, full, depth):
    """BT.709/601/2020 non-constant luminance, quantisation of BT.2100 table 9; RGB 0..255."""
    top, scale = 2**depth - 1, 2 ** (depth - 8)
    if full:
        luma, cb, cr = y / top, (u - 128 * scale) / top, (v - 128 * scale) / top
    else:
        luma = (y / scale - 16) / 219
        cb, cr = (u / scale - 128) / 224, (v / scale - 128) / 224
    red = luma + 2 * (1 - kr) * cr
    blue = luma + 2 * (1 - kb) * cb
    green = (luma - kr * red - kb * blue) / (1 - kr - kb)
    return np.clip(np.array([red, green, blue]) * 255, 0, 255)


@pytest.mark.parametrize("depth", [8, 10])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
def test_yuv_becomes_rgb_within_one_level(matrix, full, depth):
    rng = np.random.default_rng(matrix)
    worst = 0.0
    for y, u, v in rng.integers(16, 236, (40, 3)) * 2 ** (depth - 8):
        frame = flat_frame(y, u, v, depth)
        frame.colorspace, frame.color_range = matrix, 2 if full else 1
        rgb = to_rgb(frame, look_of(frame), VideoReformatter()).reshape(-1, 3).astype(float)
        want = expected_rgb(float(y), float(u), float(v), *MATRICES[matrix], full, depth)
        worst = max(worst, float(np.abs(rgb - want).max()))
    assert worst <= 1.0


@pytest.mark.parametrize(
    ("height", "width", "matrix"), [(720, 1280, "bt709"), (1080, 608, "bt709"), (576, 704, "bt601")]
)
def test_untagged_video_is_bt709_when_hd_and_bt601_when_sd(height, width, matrix):
    look = look_of(flat_frame(81, 90, 240, height=height, width=width))
    assert (look.matrix, look.matrix_tagged, look.full_range) == (matrix, False, False)


def test_hdr_and_interlaced_frames_are_recognised():
    frame = flat_frame(300, 512, 512, depth=10)
    frame.color_trc = 16
    assert look_of(frame).hdr == "pq"
    frame.color_trc = 18
    assert look_of(frame).hdr == "hlg"
    frame.color_trc = 1
    assert look_of(frame).hdr is None


@pytest.mark.parametrize(
    "pix_fmt",
    ["yuv420p", "yuvj420p", "yuv422p", "yuv444p", "yuv411p", "nv12", "yuva420p", "gray",
     "yuv420p10le", "yuv422p10le", "yuv444p12le", "p010le"],
)  # fmt: skip
@pytest.mark.parametrize("size", [(64, 48), (67, 45)])
def test_the_planar_path_gives_the_very_bytes_of_the_packed_one(pix_fmt, size):
    rng = np.random.default_rng(3)
    frame = av.VideoFrame(*size, pix_fmt)
    for plane in frame.planes:
        noise = rng.integers(0, 256, plane.buffer_size, np.uint8)
        if pix_fmt.endswith(("10le", "12le")):  # nothing above the top of the scale
            noise[1::2] &= 3
        plane.update(noise.tobytes())
    frame.colorspace = 1
    look = look_of(frame)
    packed = VideoReformatter().reformat(
        frame,
        format="rgb24",
        interpolation=_FLAGS,
        src_colorspace=_MATRICES[1],
        src_color_range=ColorRange.JPEG if look.full_range else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        threads=1,
    )
    assert np.array_equal(to_rgb(frame, look, VideoReformatter()), packed.to_ndarray())
