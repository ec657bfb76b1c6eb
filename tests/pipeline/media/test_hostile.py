"""Files made to harm: they may fail, and nothing else.

A file that points elsewhere points at a named pipe, which holds whoever opens it for ever, and at a
server that counts requests.
"""

import http.server
import os
import threading
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from jobs.sample_media import encode, pan
from pipeline.errors import DecodeTimeout, MediaError
from pipeline.media.guard import Guard

PIXELS = 10**8


@pytest.fixture(scope="module")
def server():
    """A server on loopback and the paths that were asked of it."""
    hits = []

    class Counting(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            hits.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counting) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}", hits
        found.shutdown()


@pytest.fixture(scope="module")
def guard():
    guard = Guard(1 << 30)
    yield guard
    guard.close()


def playlists(target, http):
    """Descriptions that make FFmpeg open something else, by the suffix that it expects."""
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{}\n#EXT-X-ENDLIST\n"
    dash = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT5S"><Period><AdaptationSet mimeType="video/mp4">'
        '<Representation id="1" bandwidth="1"><BaseURL>{}</BaseURL></Representation>'
        "</AdaptationSet></Period></MPD>"
    )
    sdp = (
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
    )
    return {
        "hls-file.m3u8": hls.format(f"file://{target}"),
        "hls-path.m3u8": hls.format(target),
        "hls-http.m3u8": hls.format(f"{http}/a.ts"),
        "concat.ffconcat": f"ffconcat version 1.0\nfile {target}\n",
        "dash-http.mpd": dash.format(f"{http}/v.mp4"),
        "dash-file.mpd": dash.format(f"file://{target}"),
        "session.sdp": sdp,
    }


NAMES = list(playlists("", ""))


@pytest.mark.parametrize("suffix", [None, ".mp4", ".ts"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_points_elsewhere_is_not_followed(tmp_path, guard, server, name, suffix):
    http, hits = server
    canary = tmp_path / "canary.ts"
    os.mkfifo(canary)
    path = tmp_path / (name if suffix is None else name.split(".")[0] + suffix)
    path.write_text(playlists(canary, http)[name])
    with pytest.raises(MediaError) as caught:
        guard.probe(str(path), "all", PIXELS, 20.0)
    assert caught.value.code == "not_media"
    assert hits == []


def test_the_canaries_are_alive(tmp_path, guard, server, clips):
    """Without the allow-list FFmpeg does follow them, and opening the pipe does hang."""
    http, hits = server
    path = tmp_path / "list.m3u8"
    path.write_text(playlists(clips["h264.ts"], http)["hls-file.m3u8"])
    with av.open(str(path)) as container:
        assert container.format.name == "hls"
        assert len(container.streams.video) == 1
    path.write_text(playlists("", http)["hls-http.m3u8"])
    allowed = {"protocol_whitelist": "file,http,tcp"}
    with pytest.raises(av.error.FFmpegError), av.open(str(path), container_options=allowed):
        pass
    assert "/a.ts" in hits
    hits.clear()
    os.mkfifo(tmp_path / "pipe.ts")
    with pytest.raises(DecodeTimeout):
        guard.probe(str(tmp_path / "pipe.ts"), "all", PIXELS, 0.5)


def test_every_kind_of_sample_clip_is_on_the_allow_list(guard, clips):
    for path in clips.values():
        assert guard.probe(str(path), "uniform:1", PIXELS, 20.0).facts.kind == "video"


@pytest.mark.parametrize(
    "name", ["quote\"and'quote.mp4", "new\nline.mp4", "%03d.mp4", "a:b.mp4", "-i.mp4", "\u202e.mp4"]
)
def test_odd_names_are_only_names(tmp_path, guard, name):
    path = encode(tmp_path / "plain.mp4", pan(64, 96, 4, seed=1))
    path = path.rename(tmp_path / name)
    assert guard.probe(str(path), "all", PIXELS, 20.0).facts.codec == "h264"


def test_a_name_as_long_as_a_name_can_be_is_only_a_name(tmp_path, guard):
    path = encode(tmp_path / "plain.mp4", pan(64, 96, 4, seed=1))
    deep = tmp_path
    for _ in range(5):
        deep = deep / ("d" * 200)
    deep.mkdir(parents=True)
    path = path.rename(deep / ("n" * 250 + ".mp4"))
    assert len(str(path)) > 1000
    assert guard.probe(str(path), "all", PIXELS, 20.0).facts.codec == "h264"


def peak_mb(guard):
    """The most memory that the child has ever held."""
    status = Path(f"/proc/{guard._process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def black_video(path, side):
    """One black frame: a few kilobytes that decode to side * side pixels."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame(side, side, "yuv420p")
        for plane, level in zip(frame.planes, (16, 128, 128), strict=True):
            plane.update(np.full(plane.buffer_size, level, np.uint8))
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def bombs(folder):
    """Files of under 1 MB whose pictures would take hundreds of megabytes."""
    side = 16_000
    Image.new("1", (side, side)).save(folder / "bomb.png")
    Image.new("RGB", (16_383, 16_383)).save(folder / "bomb.webp", lossless=True, method=0)
    video = black_video(folder / "bomb.mp4", 8192)
    # The same with a header that says 64x64, and a small one with a header that says 65535x65535.
    for name, source, size in (
        ("lies-small.mp4", video, 64),
        ("lies-large.mp4", black_video(folder / "small.mp4", 64), 65_535),
    ):
        data = bytearray(source.read_bytes())
        at = data.index(b"avc1", data.index(b"stsd")) + 28  # ISO/IEC 14496-12, VisualSampleEntry
        data[at : at + 4] = 2 * size.to_bytes(2, "big")
        (folder / name).write_bytes(data)
    (folder / "small.mp4").unlink()


def test_pictures_that_unpack_to_gigabytes_are_refused_before_they_do(tmp_path):
    bombs(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        assert path.stat().st_size < 1_000_000
        guard = Guard(1 << 30)
        try:
            try:
                guard.probe(str(path), "all", 25_000_000, 20.0)
                found = guard.decode_video(
                    str(path), [0.0], [1.0], 25_000_000, 2 * 3 * 64 * 64, 20.0
                )
                outcome = (found.widths, found.heights)
            except MediaError as error:
                outcome = error.code
            assert peak_mb(guard) < 300, path.name
        finally:
            guard.close()
        # Of the last one the stream itself says how large it is, and that is believed.
        expected = ([64], [64]) if path.name == "lies-large.mp4" else "too_large"
        assert outcome == expected, path.name


def test_a_file_of_a_thousand_tracks_is_refused(tmp_path, guard):
    path = tmp_path / "tracks.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("mpeg4", rate=25) for _ in range(300)]
        for stream in streams:
            stream.width = stream.height = 32
            stream.pix_fmt = "yuv420p"
        for stream in streams:
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
    with pytest.raises(MediaError, match="300 streams") as caught:
        guard.probe(str(path), "all", PIXELS, 60.0)
    assert caught.value.code == "too_large"


def test_a_name_that_is_not_text_is_only_a_name(tmp_path, guard):
    path = encode(tmp_path / "plain.mp4", pan(64, 96, 4, seed=1))
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")
    os.rename(path, odd)  # noqa: PTH104
    assert guard.probe(odd, "all", PIXELS, 20.0).facts.codec == "h264"
