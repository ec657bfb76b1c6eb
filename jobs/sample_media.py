"""Small, really encoded media made on the spot, for the demo and the tests."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from pipeline.media.coded import usual_priority

RGB = npt.NDArray[np.uint8]
# Divides by the usual frame rates, and MPEG-4 part 2 takes no finer one.
_TICK = Fraction(1, 60_000)


def landscape(height: int, width: int, seed: int = 0) -> RGB:
    """A made-up picture with sky, ridges and grass: uint8 RGB [height, width, 3]."""
    rng = np.random.Generator(np.random.PCG64(seed))
    y, x = np.mgrid[0:height, 0:width] / height
    clouds = _clouds(rng, height, width)
    sky = np.stack([0.45 + 0.3 * y, 0.62 + 0.22 * y, 0.92 - 0.05 * y], -1)
    image = sky + 0.25 * np.clip(clouds - 0.55, 0, 1)[..., None]
    tints = ([0.45, 0.5, 0.58], [0.3, 0.38, 0.36], [0.2, 0.34, 0.14])
    for level, tint in zip((0.42, 0.58, 0.74), tints, strict=True):
        ridge = level + 0.10 * (_clouds(rng, 1, width)[0] - 0.5) + 0.03 * np.sin(9 * x[0] + level)
        texture = _clouds(rng, height, width, finest=1) - 0.5
        surface = np.asarray(tint) * (1 + 0.9 * texture[..., None])
        image = np.where((y > ridge)[..., None], surface, image)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _clouds(
    rng: np.random.Generator, height: int, width: int, finest: int = 2
) -> npt.NDArray[np.float64]:
    """Noise with a 1/f spectrum, 0..1."""
    total = np.zeros((height, width))
    sigma, weight = max(width / 8, 1.0), 1.0
    while sigma >= finest:
        layer = ndimage.gaussian_filter(rng.standard_normal((height, width)), sigma, mode="wrap")
        total += weight * layer / (layer.std() + 1e-9)
        sigma, weight = sigma / 2, weight * 0.6
    total -= total.min()
    return total / (total.max() or 1.0)


def pan(height: int, width: int, frames: int, seed: int = 0) -> Iterable[RGB]:
    """A slow pan over a landscape."""
    wide = landscape(height, width + 2 * frames, seed)
    for index in range(frames):
        yield np.ascontiguousarray(wide[:, 2 * index : 2 * index + width])


def encode(
    path: Path,
    frames: Iterable[RGB],
    codec: str = "libx264",
    fps: int = 25,
    times_s: Sequence[float] | None = None,
    options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    rotation: int = 0,
    tags: dict[str, int] | None = None,
) -> Path:
    """Encode RGB frames as a video file; the container follows from the suffix of `path`.

    times_s: presentation times, for variable frame rate. tags: `colorspace`, `color_range`,
    `color_primaries`, `color_trc` as ITU-T H.273 numbers.
    """
    with usual_priority(), av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps, options=options or {})
        stream.pix_fmt = pix_fmt
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, fps) if codec == "mpeg2video" else _TICK
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if rotation:
            stream.set_display_rotation(rotation)
        for index, image in enumerate(frames):
            if index == 0:
                stream.height, stream.width = image.shape[:2]
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            second = times_s[index] if times_s is not None else index / fps
            frame.pts, frame.time_base = round(second / _TICK), _TICK
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def repeat(source: Path, path: Path, frames: int) -> Path:
    """A video of so many frames from the packets of a shorter one, over and over: nothing encoded.

    The first frame of `source` must be a keyframe that nothing reaches across (a closed GOP).
    """
    with av.open(str(source)) as given, av.open(str(path), "w") as made:
        stream = given.streams.video[0]
        copy = made.add_stream_from_template(stream)
        packets = [p for p in given.demux(stream) if p.size]
        for index in range(frames):
            loops, number = divmod(index, len(packets))
            old = packets[number]
            packet = av.Packet(bytes(old))
            shift = loops * int(stream.duration or 0)
            packet.pts, packet.dts = (old.pts or 0) + shift, (old.dts or 0) + shift
            packet.time_base, packet.stream = old.time_base, copy
            packet.is_keyframe = old.is_keyframe
            made.mux(packet)
    return path


def demo_catalog(folder: Path) -> None:
    """The demo's catalog: one scene in several codecs and qualities, photos, and a broken file."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = [
        ("h264_crf18.mp4", "libx264", {"crf": "18", "preset": "veryfast"}),
        ("h264_crf34.mp4", "libx264", {"crf": "34", "preset": "veryfast"}),
        ("h264_crf46.mp4", "libx264", {"crf": "46", "preset": "veryfast"}),
        ("hevc_crf24.mkv", "libx265", {"crf": "24", "x265-params": "log-level=0"}),
        ("av1_crf60.mp4", "libsvtav1", {"crf": "60", "preset": "11"}),
        ("mpeg4_q20.avi", "mpeg4", {"qmin": "20", "qmax": "20"}),
    ]  # fmt: skip
    for name, codec, options in clips:
        encode(folder / name, pan(360, 640, 50, seed=7), codec, options=options)
    photo = Image.fromarray(landscape(480, 720, seed=3))
    photo.save(folder / "photo_q95.jpg", quality=95)
    photo.save(folder / "photo_q8.jpg", quality=8)
    photo.save(folder / "photo.png")
    photo.save(folder / "photo_q5.webp", quality=5)
    blurred = ndimage.gaussian_filter(np.asarray(photo), sigma=(4, 4, 0))
    Image.fromarray(blurred).save(folder / "photo_blurred.avif", quality=80)
    whole = (folder / "h264_crf18.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
