from fractions import Fraction

import av
import numpy as np
import pytest
from av.filter import Graph
from scipy import ndimage

from jobs.sample_media import encode, landscape, pan
from pipeline.media.colour import Policy
from pipeline.media.decode import Limits, decode_at

LIMITS = Limits(10**8, 10**10)
HEIGHT, WIDTH, FRAMES = 144, 176, 24
_ILDCT_AND_ILME = 1 << 18 | 1 << 29  # AV_CODEC_FLAG_INTERLACED_DCT, AV_CODEC_FLAG_INTERLACED_ME


def fields(moving=True):
    """Pictures at the rate of fields, twice that of frames: a pan over a landscape."""
    wide = landscape(HEIGHT, WIDTH + 6 * FRAMES, seed=3)
    # No finer than what a field can show.
    wide = ndimage.gaussian_filter(wide, (1.5, 1.5, 0))
    starts = range(0, 6 * FRAMES, 3) if moving else [0] * 2 * FRAMES
    return [np.ascontiguousarray(wide[:, x : x + WIDTH]) for x in starts]


def woven(pictures, first):
    """Frames with the lines of two pictures each; first: `tff` or `bff`."""
    lines = 0 if first == "tff" else 1
    frames = []
    for one, other in zip(pictures[::2], pictures[1::2], strict=True):
        frame = other.copy()
        frame[lines::2] = one[lines::2]
        frames.append(frame)
    return frames


def encode_interlaced(path, frames, first, codec="libx264", gop=6):
    options = {"libx264": {"crf": "10"}, "mpeg2video": {"qmin": "2", "qmax": "2"}}[codec]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.flags |= _ILDCT_AND_ILME
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame = frame.reformat(
                format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG"
            )
            frame = flagged(frame, first)
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def flagged(frame, first):
    graph = Graph()
    frame.time_base = Fraction(1, 25)
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
    )
    graph.link_nodes(source, graph.add("setfield", first), graph.add("buffersink")).configure()
    graph.vpush(frame)
    return graph.vpull()


def psnr(a, b):
    inner = (slice(16, -16), slice(16, -16))
    return 10 * np.log10(255**2 / np.mean((a[inner].astype(float) - b[inner]) ** 2))


def decoded(path, times, **options):
    return decode_at(str(path), times, [1.0] * len(times), LIMITS, policy=Policy(**options))


@pytest.mark.parametrize("first", ["tff", "bff"])
def test_a_flagged_frame_becomes_the_picture_of_its_first_field(tmp_path, first):
    pictures = fields()
    path = encode_interlaced(tmp_path / "pan.mp4", woven(pictures, first), first)
    times = [0.2, 0.4, 0.6]
    found, kept = decoded(path, times), decoded(path, times, interlaced="keep")
    assert (found.look.interlaced, found.look.deinterlaced) == (True, True)
    assert (kept.look.interlaced, kept.look.deinterlaced) == (True, False)
    for time, shot, combed in zip(times, found.shots, kept.shots, strict=True):
        one, other = pictures[2 * round(25 * time) :][:2]
        assert psnr(shot.rgb, one) > psnr(combed.rgb, one) + 2
        assert psnr(shot.rgb, one) > psnr(shot.rgb, other) + 2


def test_what_stands_still_keeps_both_fields(tmp_path):
    pictures = fields(moving=False)
    path = encode_interlaced(tmp_path / "still.mp4", woven(pictures, "tff"), "tff")
    found, kept = decoded(path, [0.4]), decoded(path, [0.4], interlaced="keep")
    assert psnr(found.shots[0].rgb, kept.shots[0].rgb) > 45


@pytest.mark.parametrize(
    ("name", "codec", "gop"),
    [
        ("a.mp4", "libx264", 6), ("a.mp4", "libx264", 1), ("a.ts", "libx264", 6),
        ("a.mpg", "mpeg2video", 6), ("a.mkv", "mpeg2video", 1),
    ],
)  # fmt: skip
def test_a_frame_is_deinterlaced_alike_however_it_was_reached(tmp_path, name, codec, gop):
    """Every frame alone, keyframes included, against all of them in a row."""
    path = encode_interlaced(tmp_path / name, woven(fields(), "tff"), "tff", codec, gop)
    with av.open(str(path)) as container:
        times = [float(f.pts * f.time_base) for f in container.decode(video=0)]
    whole = decoded(path, times)
    assert [s.pts_s for s in whole.shots] == pytest.approx(times)
    assert len(times) == FRAMES
    assert whole.look.deinterlaced
    for index in range(0, FRAMES, 3):
        for moment in (times[index], times[index] + 0.03):
            alone = decoded(path, [moment]).shots[0]
            assert alone.pts_s == whole.shots[index].pts_s
            assert np.array_equal(alone.rgb, whole.shots[index].rgb), (index, moment)


def test_sparse_samples_are_deinterlaced_like_dense_ones(tmp_path):
    path = encode_interlaced(tmp_path / "pan.mp4", woven(fields(), "tff"), "tff")
    times = [i / 25 for i in range(FRAMES)]
    whole, sparse = decoded(path, times), decoded(path, times[::5])
    for shot, expected in zip(sparse.shots, whole.shots[::5], strict=True):
        assert np.array_equal(shot.rgb, expected.rgb)


def test_a_lone_frame_is_deinterlaced_from_itself(tmp_path):
    path = encode_interlaced(tmp_path / "one.mp4", woven(fields(), "tff")[:1], "tff")
    found = decoded(path, [-1.0, 0.0])
    assert [s.weight_s for s in found.shots] == [2.0]
    assert found.look.deinterlaced


def test_progressive_video_is_not_touched(tmp_path):
    path = encode(tmp_path / "plain.mp4", pan(64, 96, 5))
    found, kept = decoded(path, [0.1]), decoded(path, [0.1], interlaced="keep")
    assert not found.look.interlaced
    assert not found.look.deinterlaced
    assert np.array_equal(found.shots[0].rgb, kept.shots[0].rgb)
