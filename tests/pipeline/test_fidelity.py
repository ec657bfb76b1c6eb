import itertools
import json

import av
import numpy as np
import piq
import pytest
import torch
from av.video.reformatter import ColorRange
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import correlate1d

from jobs.sample_media import encode, landscape
from pipeline.fidelity import MEASURES, fidelity
from pipeline.media.planes import Planes, planes_of, upright_planes

ALL = tuple(MEASURES)
GAUSSIAN = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
GAUSSIAN /= GAUSSIAN.sum()
# The low-pass filter of the 9/7 wavelets (Cohen, Daubechies, Feauveau), to six digits.
LOW_PASS = np.array([0.026727, -0.016828, -0.078201, 0.266846, 0.602914])
LOW_PASS = np.concatenate([LOW_PASS, LOW_PASS[-2::-1]])
MS_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def frames(path):
    with av.open(str(path)) as container:
        return [planes_of(frame) for frame in container.decode(video=0)]


@pytest.fixture(scope="module")
def pairs(data_dir):
    """Pairs with the numbers that libvmaf's own tests assert of them."""
    folder = data_dir / "fr_pairs"
    listed = json.loads((folder / "expected.json").read_text())["pairs"]
    return {
        pair["name"]: (pair, frames(folder / pair["distorted"]), frames(folder / pair["reference"]))
        for pair in listed
        if "ssim" in pair
    }


@pytest.fixture(scope="module")
def measured(pairs):
    return {
        name: [fidelity(d, r, ALL) for d, r in zip(distorted, reference, strict=True)]
        for name, (_, distorted, reference) in pairs.items()
    }


def mean(numbers, name):
    return np.mean([one[name] for one in numbers])


def eight_bit(planes):
    return planes.y / 2.0 ** (planes.bits - 8)


def smooth(image, window):
    return correlate1d(correlate1d(image, window, 0), window, 1)[5:-5, 5:-5]


def ssim_terms(distorted, reference, window):
    """Luminance, contrast and structure of every window: the formulas of the paper."""
    mean_d, mean_r = smooth(distorted, window), smooth(reference, window)
    var_d = (smooth(distorted**2, window) - mean_d**2).clip(0)
    var_r = (smooth(reference**2, window) - mean_r**2).clip(0)
    covariance = smooth(distorted * reference, window) - mean_d * mean_r
    both = np.sqrt(var_d * var_r)
    luminance = (2 * mean_d * mean_r + C1) / (mean_d**2 + mean_r**2 + C1)
    contrast = (2 * both + C2) / (var_d + var_r + C2)
    return luminance, contrast, (covariance + C2 / 2) / (both + C2 / 2)


def ssim(distorted, reference, window):
    luminance, contrast, structure = ssim_terms(distorted, reference, window)
    return (luminance * contrast * structure).mean()


def ms_ssim_of_libvmaf(distorted, reference, window):
    """Halved by a wavelet filter, and each of the three terms averaged by itself."""
    total = 1.0
    for scale, weight in enumerate(MS_WEIGHTS):
        luminance, contrast, structure = ssim_terms(distorted, reference, window)
        total *= (contrast.mean() * structure.mean()) ** weight
        if scale == 4:
            return total * luminance.mean() ** weight
        distorted, reference = (
            correlate1d(correlate1d(image, LOW_PASS, 0), LOW_PASS, 1)[::2, ::2]
            for image in (distorted, reference)
        )
    return None


def test_psnr_of_luma_is_what_libvmaf_asserts(pairs, measured):
    for name, (expected, *_) in pairs.items():
        assert mean(measured[name], "psnr_y") == pytest.approx(expected["psnr_y"], abs=1e-4)


def test_ssim_is_what_libvmaf_asserts_but_for_its_rounded_window(pairs, measured):
    """libvmaf writes its window with six digits: it adds up to 1.000002, and variances suffer."""
    rounded = np.round(GAUSSIAN, 6)
    for name, (expected, distorted, reference) in pairs.items():
        both = [(eight_bit(d), eight_bit(r)) for d, r in zip(distorted, reference, strict=True)]
        assert mean(measured[name], "ssim") == pytest.approx(expected["ssim"], abs=2e-5)
        ours = np.mean([ssim(d, r, GAUSSIAN) for d, r in both])
        assert mean(measured[name], "ssim") == pytest.approx(ours, abs=1e-7)
        theirs = np.mean([ssim(d, r, rounded) for d, r in both])
        assert theirs == pytest.approx(expected["ssim"], abs=1e-6)


def test_ms_ssim_is_what_libvmaf_asserts_but_for_its_way_to_the_coarser_scales(pairs, measured):
    rounded = np.round(GAUSSIAN, 6)
    for name, (expected, distorted, reference) in pairs.items():
        assert mean(measured[name], "ms_ssim") == pytest.approx(expected["ms_ssim"], abs=2e-3)
        theirs = [
            ms_ssim_of_libvmaf(eight_bit(d), eight_bit(r), rounded)
            for d, r in zip(distorted, reference, strict=True)
        ]
        assert np.mean(theirs) == pytest.approx(expected["ms_ssim"], abs=1e-6)


@pytest.mark.parametrize("size", [(161, 200), (256, 256), (333, 517), (700, 385), (801, 802)])
@pytest.mark.parametrize("error", [0.5, 5, 80])
def test_ssim_and_ms_ssim_are_those_of_piq(size, error):
    reference = landscape(*size, seed=5)[..., 1]
    noise = np.random.default_rng(6).normal(0, error, size)
    distorted = np.clip((reference + noise).round(), 0, 255).astype(np.uint8)
    found = fidelity(*(Planes(y, None, None, 8) for y in (distorted, reference)), ALL)
    both = [torch.from_numpy(y / 255)[None, None] for y in (distorted, reference)]
    assert found["ssim"] == pytest.approx(float(piq.ssim(*both, data_range=1.0)), abs=1e-9)
    theirs = float(piq.multi_scale_ssim(*both, data_range=1.0))
    assert found["ms_ssim"] == pytest.approx(theirs, abs=1e-9)


def picture(height, width, bits=8, chroma=True, seed=0):
    rng = np.random.default_rng(seed)
    dtype = np.uint8 if bits == 8 else np.uint16

    def plane(h, w):
        return rng.integers(0, 2**bits, (h, w), dtype)

    half = (height + 1) // 2, (width + 1) // 2
    u, v = (plane(*half), plane(*half)) if chroma else (None, None)
    return Planes(plane(height, width), u, v, bits)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_equal_frames_have_the_highest_numbers(bits):
    one = picture(192, 200, bits)
    found = fidelity(one, one, ALL)
    assert found["psnr_y"] == found["psnr_weighted"] == 6 * bits + 12
    assert found["ssim"] == pytest.approx(1)
    assert found["ms_ssim"] == pytest.approx(1)


@given(error=st.integers(1, 90), u=st.integers(1, 90), v=st.integers(1, 90))
@settings(max_examples=20)
def test_psnr_of_a_constant_error_is_that_of_the_formula(error, u, v):
    zero = Planes(*(np.zeros(s, np.uint8) for s in ((20, 30), (10, 15), (10, 15))), 8)
    off = Planes(zero.y + np.uint8(error), zero.u + np.uint8(u), zero.v + np.uint8(v), 8)
    db = [20 * np.log10(255 / e) for e in (error, u, v)]
    found = fidelity(off, zero, ["psnr"])
    assert found["psnr_y"] == pytest.approx(db[0])
    assert found["psnr_weighted"] == pytest.approx((6 * db[0] + db[1] + db[2]) / 8)


def test_the_same_picture_in_more_bits_has_the_same_ssim():
    a, b = picture(64, 64, seed=1), picture(64, 64, seed=2)
    deep = [Planes(p.y.astype(np.uint16) << 2, None, None, 10) for p in (a, b)]
    assert fidelity(*deep, ["ssim"])["ssim"] == pytest.approx(fidelity(a, b, ["ssim"])["ssim"])


def test_what_is_not_defined_is_none_and_what_is_not_asked_for_is_absent():
    gray = picture(64, 64, chroma=False)
    assert fidelity(gray, gray, ["psnr", "ms_ssim"]) == {
        "psnr_y": 60, "psnr_weighted": None, "ms_ssim": None
    }  # fmt: skip
    tiny = picture(8, 64)
    assert fidelity(tiny, tiny, ["ssim"]) == {"ssim": None}


@pytest.mark.parametrize(
    "other", [picture(64, 62), picture(64, 64, bits=10), picture(64, 64, chroma=False)]
)
def test_frames_of_different_form_are_refused(other):
    with pytest.raises(ValueError, match="do not compare"):
        fidelity(picture(64, 64), other, ["psnr"])


@pytest.mark.parametrize(
    "pix_fmt", ["yuv420p", "yuv422p10le", "yuv444p12be", "yuv420p16le", "gray", "gray10le"]
)
@pytest.mark.parametrize("size", [(17, 35), (64, 96)])
def test_planes_come_out_sample_by_sample_without_their_padding(pix_fmt, size):
    height, width = size
    frame = av.VideoFrame(width, height, pix_fmt)
    rng = np.random.default_rng(3)
    bits = frame.format.components[0].bits
    order = ">u2" if frame.format.is_big_endian else "<u2"
    wanted = []
    for plane in frame.planes:
        values = rng.integers(0, 2**bits, (plane.height, plane.width))
        padded = np.zeros((plane.height, plane.line_size // (1 if bits == 8 else 2)), int)
        padded[:, : plane.width] = values
        plane.update(padded.astype("u1" if bits == 8 else order).tobytes())
        wanted.append(values)
    found = planes_of(frame)
    assert found.bits == bits
    for got, want in itertools.zip_longest((found.y, found.u, found.v), wanted):
        assert (got is None) == (want is None)
        assert got is None or (np.array_equal(got, want) and got.dtype.isnative)


@pytest.mark.parametrize("pix_fmt", ["rgb24", "gbrp", "nv12", "yuyv422"])
def test_what_has_no_planes_of_its_own_is_refused(pix_fmt):
    with pytest.raises(ValueError, match=pix_fmt):
        planes_of(av.VideoFrame(32, 16, pix_fmt))


def first_planes(path, form=None):
    with av.open(str(path)) as container:
        return upright_planes(next(container.decode(video=0)), form)


@pytest.mark.parametrize("mirrored", [False, True])
def test_planes_of_a_picture_on_its_side_are_those_of_it_upright(tmp_path, mirrored):
    """As the master of a phone, and a transcode that was turned for good; either may be first."""
    picture = landscape(128, 96, seed=4)
    lying = np.rot90(picture, 3)  # FFmpeg counts the display rotation anticlockwise
    upright = encode(tmp_path / "upright.mp4", [picture] * 3, options={"crf": "4"})
    lies = encode(tmp_path / "lies.mp4", [lying] * 3, options={"crf": "4"}, rotation=90)
    reference, distorted = (lies, upright) if mirrored else (upright, lies)
    theirs, form = first_planes(reference)
    ours, same = first_planes(distorted, form)
    assert form == same == "96x128 yuv420p limited"
    assert fidelity(ours, theirs, ["psnr"])["psnr_y"] > 40


def test_a_rendition_in_another_range_is_brought_to_that_of_its_reference(tmp_path):
    picture = landscape(96, 128, seed=4)
    clips = {}
    for name, pix_fmt in (("full", "yuvj420p"), ("limited", "yuv420p")):
        clips[name] = encode(
            tmp_path / f"{name}.mp4", [picture] * 3, options={"crf": "4"}, pix_fmt=pix_fmt
        )
    for reference, distorted in (("full", "limited"), ("limited", "full")):
        theirs, form = first_planes(clips[reference])
        assert form.endswith(reference)
        ours, _ = first_planes(clips[distorted], form)
        assert fidelity(ours, theirs, ["psnr"])["psnr_y"] > 40


@pytest.mark.parametrize("pix_fmt", ["gray", "yuv420p"])
def test_gray_and_yuv_of_one_range_are_compared_code_by_code(pix_fmt):
    """swscale takes gray for full-range, whatever it is told."""
    codes = np.tile(np.arange(16, 236, dtype=np.uint8), (64, 1))
    chroma = np.full((32, 220), 128, np.uint8)
    array = codes if pix_fmt == "gray" else np.concatenate([codes, chroma])
    frame = av.VideoFrame.from_ndarray(array, format=pix_fmt)
    frame.color_range = ColorRange.MPEG
    other = "yuv420p" if pix_fmt == "gray" else "gray"
    found, form = upright_planes(frame, f"220x64 {other} limited")
    assert form == f"220x64 {other} limited"
    assert np.array_equal(found.y, codes)
    wider, _ = upright_planes(frame, f"220x64 {other} full")
    if pix_fmt == "gray":
        assert wider is None  # swscale cannot
    else:
        assert (wider.y.min(), wider.y.max()) == (0, 255)
    assert upright_planes(frame, "220x64 pal8 full")[0] is None


def test_chroma_that_is_halved_one_way_does_not_go_on_its_side(tmp_path):
    lies = encode(
        tmp_path / "a.mp4", [landscape(96, 128, seed=4)] * 3, rotation=90, pix_fmt="yuv422p"
    )
    planes, form = first_planes(lies)
    assert (planes, form) == (None, "96x128 yuv422p limited")
