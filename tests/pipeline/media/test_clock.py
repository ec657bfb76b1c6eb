"""Which frame is on screen when, told by numbers in the pictures, in containers of every kind."""

import bisect
import functools
import itertools
import random
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.media.clock import Clock, filled
from pipeline.media.decode import Limits, decode_at
from pipeline.media.probe import probe
from pipeline.media.sample import Samples, SampleSpec, plan_samples

PIXELS = 10**8
LIMITS = Limits(PIXELS, max_bytes=10**10)
FRAMES, FPS, GOP = 100, 25, 20


def x264(options):
    return {"preset": "ultrafast", "x264-params": f"keyint={GOP}:scenecut=0:b-adapt=0:{options}"}


X264 = x264("bframes=3")
ONE_B = x264("bframes=1")
OPEN = x264("bframes=3:open-gop=1")
WIDE = x264("bframes=5:b-pyramid=none:keyint=250:crf=40")
PLAIN = x264("bframes=0")
REFRESH = x264("bframes=0:intra-refresh=1")
MPEG = {"bf": "2", "g": "15"}
VPX = {"deadline": "realtime", "cpu-used": "8", "g": str(GOP)}
X265 = {"preset": "ultrafast", "x265-params": "log-level=none:keyint=20:bframes=3"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}

# Containers in which the times of packets are not those of their frames, or are not all there.
# name: codec, its options, the format where the suffix does not tell it, and its options.
UNTOLD = {
    "h264.avi": ("libx264", X264, None, {}),
    "one_b.avi": ("libx264", ONE_B, None, {}),
    "open.avi": ("libx264", OPEN, None, {}),
    "plain.avi": ("libx264", PLAIN, None, {}),
    "h264.asf": ("libx264", X264, None, {}),
    "h264.mxf": ("libx264", X264, None, {}),
    "h264.mpg": ("libx264", X264, "vob", {}),
    "wide.mxf": ("libx264", WIDE, None, {}),
    "wide.mpg": ("libx264", WIDE, "vob", {}),
    "plain.mpg": ("libx264", PLAIN, "vob", {}),
}
TOLD = {
    "h264.mp4": ("libx264", X264, None, {}),
    "one_b.mp4": ("libx264", ONE_B, None, {}),
    "open.mp4": ("libx264", OPEN, None, {}),
    "refresh.mp4": ("libx264", REFRESH, None, {}),
    "pieces.mp4": ("libx264", X264, None, FRAGMENTS),
    "h264.mkv": ("libx264", X264, None, {}),
    "hevc.mkv": ("libx265", X265, None, {}),
    "h264.ts": ("libx264", X264, None, {}),
    "open.ts": ("libx264", OPEN, None, {}),
    "h264.flv": ("libx264", X264, None, {}),
    "h264.nut": ("libx264", X264, None, {}),
    "vp9.webm": ("libvpx-vp9", VPX, None, {}),
    "vp9.ivf": ("libvpx-vp9", VPX, None, {}),
    "mpeg4.avi": ("mpeg4", MPEG, None, {}),
    "mpeg4.asf": ("mpeg4", MPEG, None, {}),
    "mpeg2.mxf": ("mpeg2video", MPEG, None, {}),
    "mpeg2.mpg": ("mpeg2video", MPEG, None, {}),
}
BARE = {"bare.h264": ("libx264", X264, None, {}), "bare.hevc": ("libx265", X265, "hevc", {})}
KINDS = UNTOLD | TOLD | BARE


def numbered(number):
    """A picture that shows its number in binary, over a texture that changes now and then."""
    image = np.full((64, 128, 3), 60, np.uint8)
    for bit in range(10):
        if number >> bit & 1:
            image[8:40, bit * 12 : bit * 12 + 12] = 220
    image[44:] = np.random.default_rng(number // 40).integers(0, 255, (20, 128, 3))
    return image


def number_of(rgb):
    return sum(int(rgb[10:38, b * 12 + 2 : b * 12 + 10].mean() > 140) << b for b in range(10))


def encoded(path, codec, options, form, container_options):
    with av.open(str(path), "w", format=form, options=container_options) as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = 64, 128, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, FPS)
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Makes the film of one kind, once."""
    folder, made = tmp_path_factory.mktemp("films"), {}

    def make(name):
        if name not in made:
            made[name] = encoded(folder / name, *KINDS[name])
        return made[name]

    return make


@functools.cache
def counted(path):
    """Time and number of each frame that plain decoding gives, in that order."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        tick = float(stream.time_base)
        start = (stream.start_time or 0) * tick
        frames = list(container.decode(stream))
    if path.name in TOLD:
        times = [frame.pts * tick for frame in frames]
    else:
        times = [start + index / FPS for index in range(len(frames))]
    return times, [number_of(frame.to_ndarray(format="rgb24")) for frame in frames]


def planned(path, text):
    spec = SampleSpec.parse(text)
    return plan_samples(spec, probe(str(path), spec, PIXELS).timeline)


def on_screen(path, moments):
    """Time and number of the frames that plain decoding has on screen at `moments`, each once.

    Half a tick of the container's clock before its time, a frame counts as on screen.
    """
    times, numbers = counted(path)
    with av.open(str(path)) as container:
        tick = float(container.streams.video[0].time_base)
    found = [max(bisect.bisect_right(times, m + tick / 2) - 1, 0) for m in moments]
    return [(times[i], numbers[i]) for i, _ in itertools.groupby(found)]


def assert_takes(path, samples, expected):
    found = decode_at(str(path), samples.times, samples.weights, LIMITS)
    assert [number_of(shot.rgb) for shot in found.shots] == [number for _, number in expected]
    assert [s.pts_s for s in found.shots] == pytest.approx([t for t, _ in expected], abs=1e-6)
    assert (found.missing, found.problem) == (0, None)


def test_some_times_of_a_program_stream_are_another_frames(film):
    """FFmpeg gives two packets in a row the same time; otherwise `wide.mpg` would test nothing."""
    with av.open(str(film("wide.mpg"))) as container:
        times = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert None in times
    assert any(a == b is not None for a, b in itertools.pairwise(times))


@pytest.mark.parametrize("name", KINDS)
def test_all_gives_every_frame_once_with_times_in_the_order_of_presentation(film, name):
    path = film(name)
    samples = planned(path, "all")
    times, numbers = counted(path)
    assert numbers == list(range(FRAMES))
    assert samples.times == pytest.approx(times, abs=1e-6)
    assert_takes(path, samples, list(zip(times, numbers, strict=True)))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("count", [2, 16])
def test_uniform_takes_the_frames_that_counting_gives(film, name, count):
    samples = planned(film(name), f"uniform:{count}")
    assert_takes(film(name), samples, on_screen(film(name), samples.times))


@pytest.mark.parametrize("name", KINDS)
def test_any_moments_show_the_frames_that_counting_gives(film, name):
    times, _ = counted(film(name))
    chance = random.Random(5)
    for count in (1, 1, 1, 1, 2, 3, 5):
        moments = sorted(chance.choice(times) + chance.choice((0.0, 0.03)) for _ in range(count))
        samples = Samples(tuple(moments), (1.0,) * count)
        assert_takes(film(name), samples, on_screen(film(name), moments))


@pytest.mark.parametrize("name", ["h264.avi", "h264.mxf", "h264.mpg", "plain.mpg", "bare.h264"])
def test_keyframes_have_the_times_of_their_frames(film, name):
    timeline = probe(str(film(name)), SampleSpec("keyframes"), PIXELS).timeline
    times, _ = counted(film(name))
    assert timeline.keyframe_times == pytest.approx(times[::GOP], abs=1e-6)


def test_frames_lost_to_damage_shift_no_times_beyond_the_next_keyframe(film, tmp_path):
    """Three slices name a set of parameters that does not exist: their frames never come out."""
    data = bytearray(film("h264.avi").read_bytes())
    with av.open(str(film("h264.avi"))) as container:
        packets = [bytes(p) for p in container.demux(video=0) if p.size]
    at = 0
    for number, packet in enumerate(packets):
        at = data.index(packet, at)
        if number in range(GOP + 7, GOP + 10):
            data[at + 5 : at + 7] = b"\xc0\x7f"  # after the start code and the type of the unit
        at += len(packet)
    path = tmp_path / "damaged.avi"
    path.write_bytes(data)
    samples = planned(path, "all")
    found = decode_at(str(path), samples.times, samples.weights, LIMITS)
    assert found.problem == "3 damaged packets were passed over"
    shown = {round(shot.pts_s * FPS): number_of(shot.rgb) for shot in found.shots}
    assert len(shown) == FRAMES - 3
    sound = [*range(GOP + 4), *range(2 * GOP, FRAMES)]
    assert [shown[number] for number in sound] == sound


def test_a_long_avi_is_sought_in_where_its_gops_are_closed(film, monkeypatch):
    """The last GOP, and not the whole film, is decoded for a sample in it."""
    shown, plain = [], Clock.show
    monkeypatch.setattr(Clock, "show", lambda self, f: shown.append(f) or plain(self, f))
    for name, least, most in (("h264.avi", 1, GOP), ("open.avi", FRAMES - GOP, 2 * FRAMES)):
        shown.clear()
        decode_at(str(film(name)), [(FRAMES - 2) / FPS], [1.0], LIMITS)
        assert least <= len(shown) <= most


@given(
    st.lists(st.booleans(), min_size=1, max_size=60),
    st.sampled_from([0.04, 1001 / 24000]),
    st.floats(0, 1000),
)
def test_frames_without_a_time_are_put_between_those_with_one(stamped, interval, start):
    stamped[0] = True
    times = [start + number * interval for number in range(len(stamped))]
    known = [time for time, has in zip(times, stamped, strict=True) if has]
    trailing = stamped[::-1].index(True)
    assert filled(known, len(times) - len(known), trailing, interval) == pytest.approx(times)


def test_frames_are_counted_where_none_has_a_time():
    assert filled([], 3, 3, 0.04) == pytest.approx([0.0, 0.04, 0.08])


def test_second_fields_in_packets_of_their_own_are_no_frames():
    times = [1 + number / FPS for number in range(FRAMES)]
    assert filled(times, FRAMES - 1, 0, 1 / FPS) == times
