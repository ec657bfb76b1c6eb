from fractions import Fraction

import av
import numpy as np
import pytest

from jobs.sample_media import encode, pan
from pipeline.errors import MediaError
from pipeline.media.container import open_video
from pipeline.media.decode import Limits, decode_at
from pipeline.media.probe import probe
from pipeline.media.sample import SampleSpec, plan_samples

PIXELS = 10**8
LIMITS = Limits(PIXELS, max_bytes=10**10)
NAMES = [
    "h264.mp4", "h264.mkv", "h264.ts", "h264.flv", "hevc.mp4", "vp9.webm", "av1.mp4", "mpeg4.avi",
    "mpeg2.mpg",
]  # fmt: skip


def sequential(path):
    """Every frame's time and pixels, by plain decoding from the start."""
    with open_video(str(path), PIXELS) as (container, stream):
        tick = float(stream.time_base)
        return [(f.pts * tick, f.to_ndarray(format="rgb24")) for f in container.decode(stream)]


def sampled(path, text):
    timeline = probe(str(path), SampleSpec.parse(text), PIXELS).timeline
    samples = plan_samples(SampleSpec.parse(text), timeline)
    return samples, decode_at(str(path), samples.times, samples.weights, LIMITS)


@pytest.mark.parametrize("name", NAMES)
def test_all_scores_every_frame_once_in_order(clips, name):
    samples, found = sampled(clips[name], "all")
    times = [t for t, _ in sequential(clips[name])]
    assert len(samples.times) == len(times) == 40
    assert [s.pts_s for s in found.shots] == pytest.approx(times, abs=1e-6)
    assert found.missing == 0
    assert found.problem is None


@pytest.mark.parametrize("name", NAMES)
def test_seeking_gives_the_frames_that_plain_decoding_gives(clips, name):
    everything = decode_at(
        str(clips[name]), [t for t, _ in sequential(clips[name])], [1.0] * 40, LIMITS
    )
    for index in (5, 17, 39):
        shot = everything.shots[index]
        alone = decode_at(str(clips[name]), [shot.pts_s], [1.0], LIMITS).shots[0]
        assert alone.pts_s == shot.pts_s
        assert np.array_equal(alone.rgb, shot.rgb)


def test_sparse_samples_decode_only_their_gops(clips):
    path = str(clips["h264.mp4"])
    with open_video(path, PIXELS) as (_, stream):
        keys = [e for e in stream.index_entries if e.is_keyframe]
    assert len(keys) >= 3
    last = sequential(clips["h264.mp4"])[-1][0]
    sparse = decode_at(path, [0.0, last], [1.0, 1.0], LIMITS)
    assert [round(s.pts_s, 3) for s in sparse.shots] == [0.0, round(last, 3)]


def test_uniform_takes_the_frame_on_screen_in_the_middle_of_each_slice(clips):
    samples, found = sampled(clips["h264.mp4"], "uniform:4")
    assert samples.times == pytest.approx([0.2, 0.6, 1.0, 1.4], abs=1e-6)
    assert [s.pts_s for s in found.shots] == pytest.approx([0.2, 0.6, 1.0, 1.4], abs=1e-6)


def test_variable_frame_rate_is_sampled_by_time_not_by_number(tmp_path):
    times = [0.0, 0.04, 0.08, 0.12, 1.0, 2.0, 3.0]
    path = encode(tmp_path / "vfr.mp4", pan(64, 96, 7), times_s=times, options={"bf": "0"})
    _, found = sampled(path, "fps:1")
    assert [s.pts_s for s in found.shots] == pytest.approx([0.0, 1.0, 2.0], abs=1e-3)
    samples, _ = sampled(path, "all")
    assert samples.weights[4] == pytest.approx(1.0, abs=1e-3)
    assert samples.weights[0] == pytest.approx(0.04, abs=1e-3)


def test_a_frame_on_screen_at_several_moments_comes_once_with_all_their_weight(clips):
    found = decode_at(str(clips["h264.mp4"]), [0.001, 0.01, 0.02, 0.5], [1, 2, 3, 4], LIMITS)
    assert [(round(s.pts_s, 2), s.weight_s) for s in found.shots] == [(0.0, 6), (0.48, 4)]


def test_keyframes_are_the_frames_that_the_encoder_marked(clips):
    samples, found = sampled(clips["h264.mp4"], "keyframes")
    with av.open(str(clips["h264.mp4"])) as container:
        keys = [float(f.pts * f.time_base) for f in container.decode(video=0) if f.key_frame]
    assert list(samples.times) == pytest.approx(keys)
    assert [s.pts_s for s in found.shots] == pytest.approx(keys)


def test_missing_duration_is_found_from_the_packets(tmp_path):
    path = tmp_path / "raw.h264"
    with av.open(str(path), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for image in pan(64, 96, 30):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    _, found = sampled(path, "uniform:4")
    assert len(found.shots) == 4


@pytest.mark.parametrize(("degrees", "shape"), [(90, (96, 64)), (180, (64, 96)), (-90, (96, 64))])
def test_rotation_is_applied(tmp_path, degrees, shape):
    path = encode(tmp_path / "turned.mp4", pan(64, 96, 3), rotation=degrees)
    plain = encode(tmp_path / "plain.mp4", pan(64, 96, 3))
    turned = decode_at(str(path), [0.0], [1.0], LIMITS)
    upright = decode_at(str(plain), [0.0], [1.0], LIMITS).shots[0].rgb
    assert turned.shots[0].rgb.shape[:2] == shape
    # FFmpeg counts the display rotation anticlockwise.
    assert np.array_equal(np.rot90(upright, degrees // 90), turned.shots[0].rgb)


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
@pytest.mark.parametrize("reach", [0.6, 1.4])
def test_a_damaged_middle_is_passed_over_and_reported(tmp_path, suffix, reach):
    """Zeros within one packet are patched up by the decoder; zeros into the next make a hole."""
    whole = encode(tmp_path / f"whole.{suffix}", pan(128, 192, 60), options={"crf": "10"}, gop=10)
    with av.open(str(whole)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        hit = packets[len(packets) // 2]
        start, size = hit.pos, hit.size
    data = bytearray(whole.read_bytes())
    begin, end = start + round(0.4 * size), start + round(reach * size)
    data[begin:end] = bytes(end - begin)
    (tmp_path / f"damaged.{suffix}").write_bytes(data)
    times = [i / 25 for i in range(60)]
    found = decode_at(str(tmp_path / f"damaged.{suffix}"), times, [0.04] * 60, LIMITS)
    assert 20 <= len(found.shots) <= 60
    assert "damaged" in found.problem


def test_a_truncated_file_says_how_much_is_missing(tmp_path):
    whole = encode(tmp_path / "whole.mkv", pan(128, 192, 100), options={"crf": "10"}, gop=10)
    (tmp_path / "cut.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    times = [i / 25 for i in range(100)]
    found = decode_at(str(tmp_path / "cut.mkv"), times, [0.04] * 100, LIMITS)
    assert found.missing > 20
    assert len(found.shots) + found.missing <= 100 + 13  # the last frame holds for half a second
    assert "missing" in found.problem


def test_a_file_without_a_decodable_frame_is_an_error_that_names_it(tmp_path, clips):
    data = bytearray(clips["h264.mkv"].read_bytes())
    data[600:] = bytes(len(data) - 600)
    path = tmp_path / "zeros.mkv"
    path.write_bytes(data)
    with pytest.raises(MediaError, match="zeros.mkv"):
        sampled(path, "uniform:4")


def test_a_transport_stream_that_cannot_be_sought_in_fails_as_damaged(tmp_path, clips):
    """Three packets: the tables and the start of one picture. FFmpeg then forbids seeking."""
    path = tmp_path / "stub.ts"
    path.write_bytes(clips["h264.ts"].read_bytes()[: 3 * 188])
    with pytest.raises(MediaError, match=r"stub\.ts") as caught:
        decode_at(str(path), [20.0], [1.0], LIMITS)
    assert caught.value.code == "decode_error"


def test_a_frame_over_the_pixel_limit_is_refused_before_it_is_decoded(clips):
    with pytest.raises(MediaError) as caught:
        decode_at(str(clips["h264.mp4"]), [0.0], [1.0], Limits(1000, 10**9))
    assert caught.value.code in ("too_large", "decode_error")


def test_frames_larger_than_the_header_says_are_refused_not_piled_up(clips):
    times = [i / 25 for i in range(10)]
    with pytest.raises(MediaError, match="larger than the header says") as caught:
        decode_at(str(clips["h264.mp4"]), times, [1.0] * 10, Limits(PIXELS, 4 * 96 * 64 * 3))
    assert caught.value.code == "too_large"


@pytest.mark.parametrize("name", ["long.ts", "long.avi", "long.mkv", "long.mpg", "long.flv"])
def test_a_sample_far_into_a_long_file_is_the_exact_frame(tmp_path, name):
    codec = {"avi": "mpeg4", "mpg": "mpeg2video"}.get(name[5:], "libx264")
    path = encode(tmp_path / name, pan(64, 96, 400), codec, gop=25)
    times = [t for t, _ in sequential(path)]
    assert len(times) >= 399
    far = [times[20], times[230], times[398]]
    whole = {s.pts_s: s.rgb for s in decode_at(str(path), times, [1.0] * len(times), LIMITS).shots}
    sparse = decode_at(str(path), far, [1.0] * 3, LIMITS)
    assert [s.pts_s for s in sparse.shots] == pytest.approx(far)
    for shot in sparse.shots:
        assert np.array_equal(shot.rgb, whole[shot.pts_s])


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
@pytest.mark.parametrize("spec", ["uniform:8", "all"])
def test_a_video_that_begins_late_is_as_long_as_its_frames(tmp_path, name, spec):
    times = [10 + i / 25 for i in range(60)]
    path = encode(tmp_path / name, pan(64, 96, 60), times_s=times)
    found = probe(str(path), SampleSpec.parse(spec), PIXELS)
    assert found.facts.duration_s == pytest.approx(2.4, abs=0.01)
    samples = plan_samples(SampleSpec.parse(spec), found.timeline)
    shots = decode_at(str(path), samples.times, samples.weights, LIMITS)
    assert shots.problem is None
    assert len(shots.shots) == len(samples.times)
    assert sum(samples.weights) == pytest.approx(2.4, abs=0.01)


def test_a_late_recording_that_was_piped_and_has_no_length_is_as_long_as_its_frames(tmp_path):
    class Pipe:
        def __init__(self, file):
            self.write = file.write

    times = [10 + i / 25 for i in range(60)]
    whole = encode(tmp_path / "whole.mkv", pan(64, 96, 60), times_s=times)
    with (
        (tmp_path / "live.mkv").open("wb") as file,
        av.open(str(whole)) as given,
        av.open(Pipe(file), "w", format="matroska") as live,
    ):
        stream = live.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = stream
                live.mux(packet)
    with av.open(str(tmp_path / "live.mkv")) as container:
        assert container.duration is None
    found = probe(str(tmp_path / "live.mkv"), SampleSpec.parse("uniform:8"), PIXELS)
    assert found.facts.duration_s == pytest.approx(2.4, abs=0.05)


def test_a_late_recording_that_is_cut_off_keeps_its_declared_length(tmp_path):
    times = [10 + i / 25 for i in range(100)]
    options = {"crf": "10"}
    whole = encode(tmp_path / "a.mkv", pan(128, 192, 100), times_s=times, options=options, gop=10)
    (tmp_path / "cut.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    found = probe(str(tmp_path / "cut.mkv"), SampleSpec.parse("uniform:8"), PIXELS)
    assert found.facts.duration_s == pytest.approx(4.0, abs=0.05)
