"""Whatever a file does to the process that opens it, this one goes on.

A named pipe stands for a file that hangs a decoder: opening it waits for a writer for ever. While
the child waits there, a signal does to it what a fault in a C library would do.
"""

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from jobs.sample_media import encode, landscape
from pipeline.errors import (
    DecodeCrash,
    DecodeError,
    DecodeMemory,
    DecodeTimeout,
    MediaError,
    TooLarge,
    UnsupportedColour,
)
from pipeline.media import image
from pipeline.media.colour import Policy
from pipeline.media.decode import Limits, decode_at
from pipeline.media.guard import Guard
from pipeline.media.probe import probe
from pipeline.media.sample import SampleSpec

PIXELS, BYTES = 10**8, 10**10
LONG_S = 60.0


@pytest.fixture
def guard():
    guard = Guard(memory_bytes=1 << 30)
    yield guard
    guard.close()


@pytest.fixture
def hanging(tmp_path):
    path = tmp_path / "hangs.mp4"
    os.mkfifo(path)
    return str(path)


def child_of(guard):
    return psutil.Process(guard._process.pid)


def decode(guard, path, times=(0.2, 1.0), timeout_s=LONG_S):
    return guard.decode_video(str(path), list(times), [1.0, 1.0], PIXELS, BYTES, timeout_s)


def pictures(frames):
    ends = np.cumsum([3 * h * w for h, w in zip(frames.heights, frames.widths, strict=True)])
    parts = np.split(np.frombuffer(frames.pixels, np.uint8), ends[:-1])
    sizes = zip(parts, frames.heights, frames.widths, strict=True)
    return [part.reshape(h, w, 3) for part, h, w in sizes]


@pytest.mark.parametrize("name", ["h264.mp4", "h264.flv", "vp9.webm", "av1.mp4"])
def test_frames_of_the_child_are_those_of_the_decoder_to_the_bit(guard, clips, name):
    times, weights = [0.2, 0.21, 1.0], [1.0, 2.0, 3.0]
    found = guard.decode_video(str(clips[name]), times, weights, PIXELS, BYTES, LONG_S)
    plain = decode_at(str(clips[name]), times, weights, Limits(PIXELS, BYTES))
    assert found.pts_s == [shot.pts_s for shot in plain.shots]
    assert found.weight_s == [shot.weight_s for shot in plain.shots]
    assert (found.look, found.missing, found.problem) == (plain.look, 0, None)
    for picture, shot in zip(pictures(found), plain.shots, strict=True):
        assert np.array_equal(picture, shot.rgb)


def test_the_policy_and_the_crop_reach_the_child(guard, tmp_path):
    scene = np.pad(landscape(64, 96), ((16, 16), (0, 0), (0, 0)))
    path = str(encode(tmp_path / "film.mp4", [scene] * 25, options={"crf": "8"}))
    found = guard.probe(path, "uniform:2", PIXELS, LONG_S, Policy(crop="auto"))
    assert found == probe(path, SampleSpec("uniform", 2), PIXELS, Policy(crop="auto"))
    assert found.facts.crop == "96:64:0:16"
    cut = guard.decode_video(path, [0.5], [1.0], PIXELS, BYTES, LONG_S, crop=found.facts.crop)
    assert (cut.heights, cut.widths) == ([64], [96])
    hdr = str(encode(tmp_path / "hdr.mp4", [scene] * 2, tags={"color_trc": 18}))
    assert guard.decode_video(hdr, [0.0], [1.0], PIXELS, BYTES, LONG_S).look.hdr == "hlg"
    refuse = Policy(hdr="refuse")
    with pytest.raises(UnsupportedColour, match=r"hdr\.mp4"):
        guard.decode_video(hdr, [0.0], [1.0], PIXELS, BYTES, LONG_S, refuse)


def test_the_background_of_transparent_video_reaches_the_child(guard, tmp_path):
    layer = Image.new("P", (64, 48), 0)
    layer.putpalette([255, 0, 255])
    layer.save(tmp_path / "a.gif", transparency=0)
    for background, level in (("black", 0), ("white", 255)):
        policy = Policy(alpha=background)
        path = str(tmp_path / "a.gif")
        (picture,) = pictures(guard.decode_video(path, [0.0], [1.0], PIXELS, BYTES, LONG_S, policy))
        assert (picture == level).all()


def test_an_image_of_the_child_is_that_of_the_decoder(guard, tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(landscape(40, 60, seed=1)).save(path)
    (picture,) = pictures(guard.decode_image(str(path), PIXELS, "black", LONG_S))
    assert np.array_equal(picture, image.decode(str(path), PIXELS, "black"))


def test_time_that_a_slow_store_takes_is_told_apart_from_decoding(guard, clips):
    class Slow(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(clips["h264.mp4"].stat().st_size))
            self.end_headers()

        def do_GET(self):
            time.sleep(1.0)
            self.do_HEAD()
            self.wfile.write(clips["h264.mp4"].read_bytes())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        far = decode(guard, f"http://127.0.0.1:{server.server_port}/h264.mp4")
        server.shutdown()
    near = decode(guard, clips["h264.mp4"])
    assert far.pts_s == near.pts_s
    assert far.wait_s >= 1.0
    assert near.wait_s < 0.5


def test_facts_of_the_child_are_those_of_the_probe(guard, clips):
    path = str(clips["h264.mkv"])
    assert guard.probe(path, "all", PIXELS, LONG_S) == probe(path, SampleSpec("all"), PIXELS)


def test_frames_stay_as_they_are_while_the_child_decodes_other_files(guard, clips):
    first = decode(guard, clips["h264.mp4"])
    before = [picture.copy() for picture in pictures(first)]
    decode(guard, clips["vp9.webm"])
    guard.close()
    assert all(map(np.array_equal, pictures(first), before))


def test_one_child_serves_many_files_and_leaks_no_files(guard, clips):
    decode(guard, clips["h264.mp4"])
    child, me = child_of(guard), psutil.Process()
    # The child lets go of its frames after it has answered: one more may be open for a time.
    before = (child.num_fds(), me.num_fds())
    for _ in range(20):
        decode(guard, clips["h264.mp4"])
        with pytest.raises(MediaError):
            decode(guard, clips["h264.mp4"].parent / "absent.mp4")
    assert child_of(guard).pid == child.pid
    until = time.monotonic() + 10
    while (now := (child.num_fds(), me.num_fds())) != before and time.monotonic() < until:
        time.sleep(0.01)
    assert all(after <= first for after, first in zip(now, before, strict=True))


def test_a_file_that_hangs_the_decoder_times_out_and_the_next_is_decoded(guard, clips, hanging):
    decode(guard, clips["h264.mp4"])
    stuck = child_of(guard)
    with pytest.raises(DecodeTimeout, match=r"hangs\.mp4.*decode_timeout_s"):
        decode(guard, hanging, timeout_s=0.5)
    assert not stuck.is_running()
    assert len(decode(guard, clips["h264.mp4"]).pts_s) == 2


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL, signal.SIGBUS])
def test_a_file_that_crashes_the_decoder_is_named_and_the_next_is_decoded(
    guard, clips, hanging, number
):
    decode(guard, clips["h264.mp4"])
    child = child_of(guard)

    def crash_when_it_reads():
        writer = writer_of(hanging)
        child.send_signal(number)
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        os.close(writer)

    thread = threading.Thread(target=crash_when_it_reads)
    thread.start()
    with pytest.raises(DecodeCrash, match=rf"hangs\.mp4.*{number.name}"):
        decode(guard, hanging)
    thread.join()
    assert len(decode(guard, clips["h264.mp4"]).pts_s) == 2


def writer_of(pipe):
    """Opens a named pipe as soon as somebody waits to read it."""
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.01)


def test_a_child_that_died_between_files_is_not_blamed_on_the_next(guard, clips):
    decode(guard, clips["h264.mp4"])
    child_of(guard).kill()
    assert len(decode(guard, clips["vp9.webm"]).pts_s) == 2


def test_a_picture_that_needs_more_memory_than_allowed_fails_and_the_next_is_decoded(
    tmp_path, clips
):
    guard = Guard(memory_bytes=128 << 20)
    Image.new("RGB", (9000, 9000)).save(tmp_path / "bomb.png")
    try:
        with pytest.raises(DecodeMemory, match=r"bomb\.png"):
            guard.decode_image(str(tmp_path / "bomb.png"), PIXELS, "black", LONG_S)
        assert len(decode(guard, clips["h264.mp4"]).pts_s) == 2
    finally:
        guard.close()


def test_damage_is_reported_as_the_decoder_reports_it(guard, clips, tmp_path):
    path = tmp_path / "half.mp4"
    path.write_bytes(clips["h264.mp4"].read_bytes()[:3000])
    with pytest.raises(DecodeError, match=r"half\.mp4"):
        guard.probe(str(path), "all", PIXELS, LONG_S)


def test_the_child_dies_with_a_worker_that_is_killed(clips):
    program = (
        "import sys, time\n"
        "from pipeline.media.guard import Guard\n"
        "guard = Guard(1 << 30)\n"
        "guard.probe(sys.argv[1], 'all', 10**8, 60)\n"
        "print(guard._process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", program, str(clips["h264.mp4"])], stdout=subprocess.PIPE, text=True
    )
    child = psutil.Process(int(worker.stdout.readline()))
    worker.kill()
    worker.wait()
    gone, _ = psutil.wait_procs([child], timeout=10)
    assert gone == [child]


def test_no_torch_in_the_child(guard, clips):
    """FFmpeg's threads can deadlock in a process that has loaded it."""
    decode(guard, clips["h264.mp4"])
    loaded = {Path(m.path).name for m in child_of(guard).memory_maps()}
    assert any(name.startswith("libavcodec") for name in loaded)
    assert not any("torch" in name for name in loaded)


def test_frames_are_not_enlarged_beyond_the_bytes_of_a_unit(guard, clips):
    """As by a stream whose first frame is a large one, to whose size the others are brought."""
    times, size = [0.2, 0.6, 1.0], (640, 360)
    given = str(clips["h264.mp4"]), times, [1.0] * 3, PIXELS
    allowed = 3 * size[0] * size[1] * len(times)
    assert guard.decode_video(*given, allowed, LONG_S, size=size).widths == [640] * 3
    with pytest.raises(TooLarge, match=r"h264\.mp4: .*640x360.*unit_frames"):
        guard.decode_video(*given, allowed - 1, LONG_S, size=size)
