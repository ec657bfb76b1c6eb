"""Conversions against the formulas of the standards, which benchmarks/colour.py has in float64."""

import re
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, VideoReformatter
from PIL import Image

from benchmarks.colour import (
    DEPTHS,
    HDR_SIGNAL,
    MATRICES,
    SUBSAMPLINGS,
    TRANSFERS,
    Signal,
    centres,
    coded,
    decoded,
    gray_error,
    hdr_error,
    hdr_expected,
    patches,
    sdr_error,
)
from jobs.sample_media import landscape
from pipeline.errors import MediaError
from pipeline.media import image
from pipeline.media.colour import Policy, look_of, objection, to_rgb
from pipeline.media.decode import Limits, decode_at

LIMITS = Limits(10**8, 10**10)
PAGE = (Path(__file__).parents[3] / "docs/colour.md").read_text(encoding="utf-8")


def blank(height=64, width=64, name="yuv420p", **tags):
    frame = av.VideoFrame(width, height, name)
    for plane in frame.planes:
        plane.update(bytes(plane.buffer_size))
    for tag, value in tags.items():
        setattr(frame, tag, value)
    return frame


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
def test_every_colour_is_within_one_level_of_the_standard(matrix, full, depth):
    errors = {s: sdr_error(Signal(matrix, full, depth, s)) for s in SUBSAMPLINGS}
    assert max(errors.values()) <= 1.0, errors


def test_the_table_of_the_page_is_what_is_measured():
    rows = re.findall(r"^\| (\w+) \| (limited|full) \| (\d+) \| (.+) \|$", PAGE, re.M)
    assert len(rows) == 2 * len(MATRICES) * len(DEPTHS)
    for matrix, span, depth, cells in rows:
        for subsampling, cell in zip(SUBSAMPLINGS, cells.split(" | "), strict=True):
            found = sdr_error(Signal(matrix, span == "full", int(depth), subsampling))
            assert float(cell) == pytest.approx(found, abs=0.1)


def test_the_table_of_gray_video_is_what_is_measured():
    rows = re.findall(r"^\| (limited|full) \| (.+) \|$", PAGE, re.M)
    assert [span for span, _ in rows] == ["limited", "full"]
    for span, cells in rows:
        for depth, cell in zip(DEPTHS, cells.split(" | "), strict=True):
            found = gray_error(span == "full", depth)
            assert found <= 0.51
            assert float(cell) == pytest.approx(found, abs=0.01)


@pytest.mark.parametrize("depth", [8, 10, 12])
@pytest.mark.parametrize(("span", "black", "white"), [(0, 16, 235), (1, 16, 235), (2, 0, 255)])
def test_gray_video_of_limited_range_is_expanded(tmp_path, depth, span, black, white):
    """HEVC 4:0:0; a range that is not tagged is limited, as everywhere."""
    name, dtype = ("gray", "u1") if depth == 8 else (f"gray{depth}le", "<u2")
    top = (1 << depth) - 1 if span == 2 else white << (depth - 8)
    with av.open(str(tmp_path / "gray.mp4"), "w") as container:
        options = {"x265-params": "log-level=none:lossless=1"}
        stream = container.add_stream("libx265", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 128, 64, name
        stream.codec_context.color_range = span
        for index in range(5):
            frame = av.VideoFrame(128, 64, name)
            (plane,) = frame.planes
            codes = np.full((64, plane.line_size // np.dtype(dtype).itemsize), top, dtype)
            codes[:, :64] = black << (depth - 8)
            plane.update(codes.tobytes())
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    found = decode_at(str(tmp_path / "gray.mp4"), [0.0], [1.0], LIMITS)
    assert (found.look.pix_fmt, found.look.full_range) == (name, span == 2)
    assert (found.shots[0].rgb[:, :64] == 0).all()
    assert (found.shots[0].rgb[:, 64:] == 255).all()


def test_hdr_gray_of_limited_range_is_black_at_the_bottom_and_white_at_the_top():
    frame = blank(16, 128, "gray10le", color_trc=16, color_range=1)
    codes = np.full((16, frame.planes[0].line_size // 2), 940, "<u2")
    codes[:, :64] = 64
    frame.planes[0].update(codes.tobytes())
    rgb = to_rgb(frame, look_of(frame), VideoReformatter())
    assert (rgb[:, :64] == 0).all()
    assert (rgb[:, 64:] == 255).all()


@pytest.mark.parametrize(
    ("planar", "other"),
    [("yuv420p", "nv12"), ("yuv422p", "yuyv422"), ("yuv420p10le", "p010le")],
)
def test_packed_and_semi_planar_formats_are_converted_like_planar_ones(planar, other):
    picture = av.VideoFrame.from_ndarray(landscape(96, 128, seed=2), format="rgb24")
    frame = picture.reformat(format=planar, dst_colorspace="ITU709", dst_color_range="MPEG")
    packed = frame.reformat(format=other)
    assert packed.format.name == other
    for each in (frame, packed):
        each.colorspace, each.color_range = 1, ColorRange.MPEG
    expected = to_rgb(frame, look_of(frame), VideoReformatter())
    assert np.array_equal(to_rgb(packed, look_of(packed), VideoReformatter()), expected)


@pytest.mark.parametrize("depth", [8, 10, 12, 16])
def test_rgb_video_of_any_depth_keeps_its_values(depth):
    codes = np.rint(np.linspace(0, 2**depth - 1, 192)).astype(int)
    frame = blank(16, 192, "gbrp" if depth == 8 else f"gbrp{depth}le")
    for plane in frame.planes:
        dtype = np.dtype(np.uint8 if depth == 8 else "<u2")
        lines = np.zeros((plane.height, plane.line_size // dtype.itemsize), dtype)
        lines[:, :192] = codes
        plane.update(lines.tobytes())
    rgb = to_rgb(frame, look_of(frame), VideoReformatter())
    assert np.abs(rgb - 255 * codes[:, None] / (2**depth - 1)).max() <= 0.51


@pytest.mark.parametrize(("location", "offset"), [(0, 0.0), (1, -0.5)])
def test_chroma_is_taken_from_where_the_stream_says_it_is(tmp_path, location, offset):
    """H.264's chroma_sample_loc_type: 0 is level with every second column, 1 is between two."""
    width, height = 128, 64
    frame = blank(height, width)
    ramp = np.arange(40, 40 + width, 2)
    for plane, codes in zip(frame.planes, (128, 128, ramp), strict=True):
        lines = np.zeros((plane.height, plane.line_size), np.uint8)
        lines[:, : plane.width] = codes
        plane.update(lines.tobytes())
    with av.open(str(tmp_path / "ramp.mp4"), "w") as container:
        options = {"qp": "0", "x264-params": f"chromaloc={location}"}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.colorspace = 1
        frame.pts = 0
        container.mux([*stream.encode(frame), *stream.encode(None)])
    rgb = decode_at(str(tmp_path / "ramp.mp4"), [0.0], [1.0], LIMITS).shots[0].rgb
    yuv = np.full((width, 3), 128.0)
    yuv[:, 2] = 40 + np.arange(width) + offset
    expected = 255 * decoded(Signal("bt709", False, 8, "420"), yuv)
    inner = slice(16, -16)
    assert np.abs(rgb[height // 2] - expected)[inner].max() <= 0.6


@pytest.mark.parametrize(
    ("height", "width", "matrix"), [(720, 1280, "bt709"), (1080, 608, "bt709"), (576, 704, "bt601")]
)
def test_untagged_video_is_bt709_when_hd_and_bt601_when_sd(height, width, matrix):
    look = look_of(blank(height, width))
    assert (look.matrix, look.matrix_tagged, look.full_range) == (matrix, False, False)


def test_a_matrix_without_a_conversion_is_an_objection_not_a_guess():
    assert "ictcp" in objection(look_of(blank(colorspace=14)), Policy())
    assert objection(look_of(blank(colorspace=9)), Policy()) is None


# --- transparency -------------------------------------------------------------------------------


def write_frames(path, codec, frames):
    """Frames as they are, in a codec without losses."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = frames[0].width, frames[0].height
        stream.pix_fmt = frames[0].format.name
        for index, frame in enumerate(frames):
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def over(path, background):
    policy = Policy(alpha=background)
    return decode_at(str(path), [0.0], [1.0], LIMITS, policy=policy).shots[0].rgb


@pytest.mark.parametrize(("background", "level"), [("black", 0), ("white", 255)])
@pytest.mark.parametrize("frames", [1, 3])
def test_a_gif_is_laid_over_the_background_as_a_png_is(tmp_path, frames, background, level):
    layer = Image.new("P", (64, 48), 1)
    layer.putpalette([255, 0, 255, 0, 255, 0])
    layer.paste(0, (0, 0, 32, 48))
    layer.save(tmp_path / "a.png", transparency=0)
    others = [layer.transpose(Image.Transpose.FLIP_TOP_BOTTOM)] * (frames - 1)
    layer.save(tmp_path / "a.gif", transparency=0, save_all=True, append_images=others)
    rgb = over(tmp_path / "a.gif", background)
    assert (rgb[:, :32] == level).all()
    assert (rgb[:, 32:] == (0, 255, 0)).all()
    assert np.array_equal(rgb, image.decode(str(tmp_path / "a.png"), 10**8, background))


@pytest.mark.parametrize(("background", "back"), [("black", 0), ("white", 255)])
@pytest.mark.parametrize(
    ("file", "codec", "name"),
    [("a.mov", "qtrle", "argb"), ("a.mkv", "ffv1", "bgra"), ("a.avi", "png", "rgba")],
)
def test_video_with_alpha_is_laid_over_the_background(
    tmp_path, file, codec, name, background, back
):
    pixels = np.zeros((64, 256, 4), np.uint8)
    pixels[...] = (200, 100, 50, 0)
    pixels[..., 3] = np.arange(256)
    order = ["rgba".index(channel) for channel in name]
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[..., order]), format=name)
    found = over(write_frames(tmp_path / file, codec, [frame]), background)
    share = np.arange(256)[:, None] / 255
    expected = np.array([200, 100, 50]) * share + back * (1 - share)
    assert np.abs(found - expected).max() <= 0.51


@pytest.mark.parametrize(
    ("name", "plain_name"),
    [
        ("yuva420p", "yuv420p"),
        ("yuva444p10le", "yuv444p10le"),
        ("yuva444p16le", "yuv444p16le"),
        ("gbrap12le", "gbrp12le"),
        ("ya16le", "gray16le"),
    ],
)
@pytest.mark.parametrize("span", [1, 2])
def test_alpha_of_any_depth_hides_all_at_zero_and_nothing_at_its_top(name, plain_name, span):
    """The colours of what is opaque are those of the same format without alpha."""
    layered, plain = (blank(16, 128, n, color_range=span) for n in (name, plain_name))
    depth = layered.format.components[0].bits
    dtype = np.dtype("u1" if depth == 8 else "<u2")
    middle, top = 150 << (depth - 8), (1 << depth) - 1
    for frame in (layered, plain):
        for index, plane in enumerate(frame.planes):
            codes = np.full((plane.height, plane.line_size // dtype.itemsize), middle, dtype)
            if frame is layered and name == "ya16le":
                codes[:, 1:128:2], codes[:, 129:256:2] = 0, top
            elif index == 3:
                codes[:, :64], codes[:, 64:] = 0, top
            plane.update(codes.tobytes())
    rgb = to_rgb(layered, look_of(layered), VideoReformatter(), "white")
    assert (rgb[:, :64] == 255).all()
    opaque = to_rgb(plain, look_of(plain), VideoReformatter())[:, 64:]
    assert np.abs(rgb[:, 64:].astype(int) - opaque).max() <= (0 if depth == 8 else 1)


def test_a_palette_may_have_transparent_colours():
    """PNG in MOV or AVI has them."""
    indices = np.repeat(np.array([[0, 1, 2]], np.uint8), 64, axis=0).repeat(64, axis=1)
    palette = np.zeros((256, 4), np.uint8)
    palette[:3] = [(255, 10, 20, 30), (0, 10, 20, 30), (51, 255, 0, 100)]  # A, R, G, B
    frame = av.VideoFrame.from_ndarray((indices, palette), format="pal8")
    rgb = to_rgb(frame, look_of(frame), VideoReformatter(), "white")
    assert rgb[5, [5, 70, 140]].tolist() == [[10, 20, 30], [255, 255, 255], [255, 204, 224]]


def test_the_unused_fourth_byte_of_uncompressed_avi_hides_nothing(tmp_path):
    pixels = np.zeros((64, 96, 4), np.uint8)
    pixels[..., :3] = landscape(64, 96, seed=3)[..., ::-1]
    frame = av.VideoFrame.from_ndarray(pixels, format="bgra")
    path = write_frames(tmp_path / "capture.avi", "rawvideo", [frame])
    assert np.array_equal(over(path, "black"), pixels[..., 2::-1])


# --- HDR and wide gamut -------------------------------------------------------------------------


def hdr_patches(rgb, transfer, primaries=9):
    """A frame of flat patches, and the R'G'B' of 0..1 that its codes are exactly."""
    yuv = coded(HDR_SIGNAL, np.asarray(rgb, float))
    frame = patches(HDR_SIGNAL, yuv)
    frame.color_primaries, frame.color_trc = primaries, transfer
    return frame, decoded(HDR_SIGNAL, yuv)


def hdr_file(path, transfer, parameters=""):
    """A short HEVC file, 10 bits, tagged BT.2020."""
    options = {"x265-params": ":".join(filter(None, ["log-level=0", parameters]))}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx265", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p10le"
        for name, value in (("colorspace", 9), ("color_primaries", 9), ("color_trc", transfer)):
            setattr(stream.codec_context, name, value)
        for index in range(5):  # x265 gives a lone frame no usable time
            frame = blank(64, 96, "yuv420p10le")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def test_hdr_is_recognised_by_its_transfer():
    kinds = {16: "pq", 18: "hlg", 1: None, 14: None}
    assert {t: look_of(blank(color_trc=t)).hdr for t in kinds} == kinds


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_tone_mapping_is_within_one_level_of_the_standards_formulas(transfer):
    assert hdr_error(transfer) <= 1.0


@pytest.mark.parametrize(("transfer", "code"), [(16, 0.58), (18, 0.75)])
def test_reference_white_of_both_kinds_of_hdr_looks_the_same(transfer, code):
    """BT.2408 table 1: 203 cd/m2 is 58 % of PQ and 75 % of HLG, here of a 1000 cd/m2 source."""
    frame, _ = hdr_patches([[code] * 3], transfer)
    expected = hdr_expected("pq", np.full((1, 3), 0.5807))[0]
    assert np.abs(centres(frame)[0] - expected).max() <= 1.5


def test_light_below_the_knee_of_the_tone_curve_is_kept_as_it_is():
    """50 cd/m2, PQ code 0.440 (ST 2084), is 50/203 of white on a display of gamma 2.4."""
    frame, _ = hdr_patches([[0.4403] * 3], 16)
    assert centres(frame)[0] == pytest.approx(255 * (50 / 203) ** (1 / 2.4), abs=1.5)


def test_the_peak_of_the_source_becomes_white_and_black_stays_black():
    frame, _ = hdr_patches([[0.0] * 3, [0.7518] * 3, [1.0] * 3], 16)  # 0, 1000, 10000 cd/m2
    black, peak, beyond = centres(frame)
    assert black == pytest.approx([0, 0, 0])
    assert peak == pytest.approx([255, 255, 255], abs=1)
    assert beyond == pytest.approx([255, 255, 255])


@pytest.mark.parametrize(
    ("metadata", "nits"),
    [
        ("", 1000.0),
        ("max-cll=600,300", 600.0),
        ("master-display=G(1,1)B(1,1)R(1,1)WP(1,1)L(40000000,50)", 4000.0),
        ("max-cll=600,300:master-display=G(1,1)B(1,1)R(1,1)WP(1,1)L(40000000,50)", 600.0),
        ("max-cll=0,0:master-display=G(1,1)B(1,1)R(1,1)WP(1,1)L(40000000,50)", 4000.0),
        ("max-cll=65535,1", 10000.0),
    ],
)
def test_the_peak_comes_from_the_content_then_the_mastering_display(tmp_path, metadata, nits):
    look = decode_at(hdr_file(tmp_path / "hdr.mp4", 16, metadata), [0.0], [1.0], LIMITS).look
    assert (look.hdr, look.peak_nits, look.gamut_mapped) == ("pq", nits, True)


def test_hdr_is_refused_by_option_with_a_code(tmp_path):
    path = hdr_file(tmp_path / "hdr.mp4", 18)
    with pytest.raises(MediaError, match=r"hdr\.mp4: HDR \(hlg\)") as caught:
        decode_at(path, [0.0], [1.0], LIMITS, policy=Policy(hdr="refuse"))
    assert caught.value.code == "unsupported_colour"


def test_bt709_colours_in_a_bt2020_container_come_back_as_themselves():
    """BT.2087: red, green and blue of BT.709 and a grey, in linear BT.2020, then gamma 2.4."""
    linear_2020 = np.array(
        [[0.6274, 0.0691, 0.0164], [0.3293, 0.9195, 0.0880], [0.0433, 0.0114, 0.8956], [0.2] * 3]
    )
    frame, _ = hdr_patches(linear_2020 ** (1 / 2.4), 14)
    grey = 255 * 0.2 ** (1 / 2.4)
    expected = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [grey] * 3]
    found = centres(frame)
    # Near black the gamma curve is steep: a step of a 10-bit code is many levels.
    assert np.abs(found[3] - expected[3]).max() <= 1.0
    light = (found[:3] / 255) ** 2.4
    assert np.abs(light - np.eye(3)).max() <= 0.01


def test_standard_gamut_is_left_alone():
    assert not look_of(blank(color_primaries=6)).gamut_mapped
    assert not look_of(blank(color_primaries=1, colorspace=9)).gamut_mapped
    assert look_of(blank(color_primaries=2, colorspace=9)).gamut_mapped
    assert look_of(blank(color_primaries=12)).gamut_mapped


def test_real_hdr_clips_become_pictures_that_are_neither_dark_nor_blown_out(data_dir):
    names = [
        "hdr10-av1.mp4", "hlg10-color-test.mp4", "sample_with_it35_track.mp4",
        "sample_with_color_info.mp4",
    ]  # fmt: skip
    for name in names:
        found = decode_at(
            str(data_dir / "clips" / f"androidx-media__mp4__{name}"), [0.1], [1.0], LIMITS
        )
        assert found.look.hdr in ("pq", "hlg"), name
        assert 20 < found.shots[0].rgb.mean() < 220, name
