"""What decoding a plan costs, counted in frames and in bytes, and that it changes no pixel."""

import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from av.video.reformatter import VideoReformatter

from jobs.sample_media import encode, pan, repeat
from pipeline.media.colour import DEFAULT_POLICY, look_of, to_rgb
from pipeline.media.container import open_video
from pipeline.media.decode import Limits, _Decoder, decode_at
from pipeline.media.probe import probe
from pipeline.media.sample import SampleSpec, plan_samples

PIXELS = 10**8
LIMITS = Limits(PIXELS, max_bytes=10**10)
FRAMES, FPS, GOP = 400, 25, 25


class CountingDecoder(_Decoder):
    """Counts the frames that come out of FFmpeg's decoder."""

    decoded = 0

    def _decoded(self, packets):
        for timed in super()._decoded(packets):
            self.decoded += 1
            yield timed


def cost(path, times):
    """How many frames are decoded for the samples at `times`; each sample must be found."""
    with open_video(str(path), PIXELS) as (container, stream):
        decoder = CountingDecoder(str(path), container, stream, LIMITS, None, DEFAULT_POLICY, None)
        found = decoder.run(times, [1.0] * len(times))
    assert len(found.shots) == len(times)
    assert (found.missing, found.problem) == (0, None)
    return decoder.decoded


def plainly(path, limit=10**6):
    """Every frame by plain decoding from the start, without seeks or anything left out."""
    frames = {}
    with open_video(str(path), PIXELS) as (container, stream):
        for frame in container.decode(stream):
            frames[frame.pts * float(frame.time_base)] = frame
            if len(frames) == limit:
                break
    return frames


def pixels(frame):
    return to_rgb(frame, look_of(frame), VideoReformatter())


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """16 s in several containers: 3 B frames, also ones that are referred to, 25 to a GOP."""
    folder = tmp_path_factory.mktemp("long")
    options = {"bf": "3", "b-pyramid": "normal", "sc_threshold": "0", "crf": "20"}
    return {
        kind: encode(folder / f"h264.{kind}", pan(64, 96, FRAMES), options=options, gop=GOP)
        for kind in ("mp4", "mkv", "ts")
    }


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts"])
def test_any_choice_of_samples_gives_the_frames_of_plain_decoding(long, kind):
    plain = plainly(long[kind])
    known, choose = sorted(plain), random.Random(7)
    for count in (1, 2, 4, 9, 30, 120):
        times = sorted(choose.sample(known, count))
        found = decode_at(str(long[kind]), [t + 0.013 for t in times], [1.0] * count, LIMITS)
        assert [s.pts_s for s in found.shots] == pytest.approx(times, abs=1e-6)
        for shot, time in zip(found.shots, times, strict=True):
            assert np.array_equal(shot.rgb, pixels(plain[time]))


def test_real_clips_give_the_frames_of_plain_decoding_for_any_choice(data_dir):
    choose = random.Random(11)
    for path in sorted((data_dir / "clips").iterdir()):
        timeline = probe(str(path), SampleSpec.parse("all"), PIXELS).timeline
        shown = timeline.frame_times[:60]
        plain = plainly(path, limit=len(shown))
        shown = [t for t in shown if t in plain]
        for count in (1, 4):
            times = sorted(choose.sample(shown, min(count, len(shown))))
            found = decode_at(str(path), times, [1.0] * len(times), LIMITS)
            assert [s.pts_s for s in found.shots] == times, path.name
            for shot in found.shots:
                assert np.array_equal(shot.rgb, pixels(plain[shot.pts_s])), path.name


def test_sampling_every_frame_decodes_every_frame_once(long):
    times = sorted(plainly(long["mp4"]))
    assert cost(long["mp4"], times) == len(times) == FRAMES


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts"])
def test_a_sparse_plan_decodes_a_part_of_each_gop_that_it_touches(long, kind):
    start = min(plainly(long[kind], limit=4))
    # Two seconds apart, 20 frames after a keyframe each.
    times = [start + second + 0.8 for second in range(1, 16, 2)]
    # Of the 20 about half are B frames to which none refers. A file without an index is decoded
    # from its start until its GOP is known.
    assert cost(long[kind], times) <= len(times) * 16 + (60 if kind != "mp4" else 0)


def test_frames_that_others_need_are_all_decoded(tmp_path):
    """Without B frames every frame is referred to: all 21 from the keyframe on, none after."""
    path = encode(
        tmp_path / "p.mp4", pan(64, 96, 100), options={"bf": "0", "sc_threshold": "0"}, gop=25
    )
    assert cost(path, [75 / 25 + 20 / 25]) == 21


def test_a_single_keyframe_is_not_started_from_again_for_each_sample(tmp_path):
    path = encode(tmp_path / "one.mp4", pan(64, 96, FRAMES), options={"sc_threshold": "0"}, gop=999)
    assert cost(path, [1.0, 7.5, 14.0]) <= FRAMES


class _RangeHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(send=False)

    def do_GET(self):
        self._answer(send=True)

    def _answer(self, send):
        data, asked = self.server.data, self.headers.get("Range")
        begin, end = 0, len(data)
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            begin, end = int(first), min(end, int(last) + 1)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - begin))
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.end_headers()
        if send:
            self.server.sent.append(end - begin)
            self.wfile.write(data[begin:end])


@pytest.fixture
def far():
    """A server on loopback for one file at a time, `data`; it lists what it has `sent`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _RangeHandler)
    server.data, server.sent = b"", []
    server.url = f"http://127.0.0.1:{server.server_port}/clip"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def heavy(tmp_path_factory):
    """Noise at 25 Mb/s or so, 24 s in several containers: too large to be fetched whole."""
    folder, noise = tmp_path_factory.mktemp("heavy"), np.random.default_rng(3)
    images = (noise.integers(0, 256, (288, 352, 3), np.uint8) for _ in range(FPS))
    short = encode(folder / "short.mp4", images, options={"crf": "8", "bf": "2"}, gop=FPS)
    return {kind: repeat(short, folder / f"long.{kind}", 24 * FPS) for kind in ("mp4", "mkv", "ts")}


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts"])
def test_a_sparse_plan_of_a_long_remote_file_fetches_a_part_of_it(heavy, far, kind):
    far.data = heavy[kind].read_bytes()
    spec = SampleSpec.parse("uniform:2")
    timeline = probe(far.url, spec, PIXELS).timeline
    assert sum(far.sent) < len(far.data) / 8  # the header, not the frames
    times = plan_samples(spec, timeline).times
    far.sent.clear()
    found = decode_at(far.url, times, [1.0] * 2, LIMITS)
    assert sum(far.sent) < len(far.data) / 3
    near = decode_at(str(heavy[kind]), times, [1.0] * 2, LIMITS)
    assert [s.pts_s for s in found.shots] == [s.pts_s for s in near.shots]
    for one, other in zip(found.shots, near.shots, strict=True):
        assert np.array_equal(one.rgb, other.rgb)


def test_a_dense_plan_of_a_remote_file_fetches_its_span_in_few_requests(heavy, far):
    far.data = heavy["mp4"].read_bytes()
    times = [12 + index / FPS for index in range(2 * FPS)]
    decode_at(far.url, times, [1.0] * len(times), LIMITS)
    assert sum(far.sent) < len(far.data) / 4  # 2 s of 24
    assert len(far.sent) <= 8


def test_a_short_remote_file_is_fetched_at_once(long, far):
    far.data = long["mp4"].read_bytes()
    decode_at(far.url, [1.0, 8.0, 15.0], [1.0] * 3, LIMITS)
    assert far.sent == [len(far.data)]
