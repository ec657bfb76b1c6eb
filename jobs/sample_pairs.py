"""Pairs of clips whose offset is known, made from any moving pictures: for tests and benchmarks."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.filter import Graph

from jobs.sample_media import RGB, encode, landscape
from pipeline.media.align import Track, luma_feature

# Pictures before and after the reference's stretch, from which shifted renditions begin or end.
MARGIN = 12
HEIGHT = 144

Frames = list[RGB]
_FAST = {"preset": "ultrafast"}
_GOOD, _FAIR, _POOR = ({**_FAST, "crf": crf} for crf in ("18", "26", "34"))


@dataclass(frozen=True)
class Scene:
    """Moving pictures, all of one size, at a constant rate a second."""

    name: str
    frames: Frames
    fps: Fraction


@dataclass(frozen=True)
class Case:
    """A rendition and its reference. offset_s: reference time minus distorted time; None: none."""

    name: str
    kind: str
    distorted: Path
    reference: Path
    offset_s: float | None
    tolerance_s: float


def wander(frames: int, seed: int, fps: int = 25, stride: float = 1.5) -> Scene:
    """A camera that wanders over a landscape, never twice the same way."""
    rng = np.random.default_rng(seed)
    height, width = HEIGHT, 192
    scene = landscape(2 * height, 4 * width, seed)
    steps = np.cumsum(rng.normal(0, stride, (frames, 2)), 0)  # a speed that varies
    path = np.cumsum(0.15 * steps + rng.normal(0, 0.4 * stride, (frames, 2)), 0)
    tops, lefts = (_reflected(path[:, 0], height), _reflected(path[:, 1], 3 * width))
    cut = [scene[t : t + height, x : x + width] for t, x in zip(tops, lefts, strict=True)]
    return Scene(f"wander {seed}", [np.ascontiguousarray(f) for f in cut], Fraction(fps))


def _reflected(path: np.ndarray[Any, Any], limit: int) -> list[int]:
    """Whole positions in 0..limit, turning back at its ends."""
    folded = np.abs((path + limit / 2) % (2 * limit) - limit)
    return [int(p) for p in np.rint(folded)]


def scene_from(clip: Path, most: int) -> Scene:
    """The first `most` frames of a clip with a constant rate, scaled to HEIGHT lines."""
    frames = []
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in itertools.islice(container.decode(stream), most):
            width = 2 * round(frame.width * HEIGHT / frame.height / 2)
            frames.append(frame.reformat(width, HEIGHT, "rgb24").to_ndarray())
        return Scene(clip.stem, frames, Fraction(stream.average_rate or 25))


def track(clip: Path) -> Track:
    """All of a clip, as alignment sees it."""
    times, features = [], []
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            times.append(float(frame.time or 0.0))
            features.append(luma_feature(frame.to_ndarray(format="gray")))
    return Track(np.asarray(times), np.stack(features))


def resampled(frames: Sequence[RGB], fps: Fraction, to: Fraction) -> tuple[Frames, list[float]]:
    """Frames at another rate, as FFmpeg's `fps` filter repeats and drops them, and their times."""
    graph: Any = Graph()
    height, width = frames[0].shape[:2]
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=1 / fps)
    rate, sink = graph.add("fps", f"fps={to}"), graph.add("buffersink")
    source.link_to(rate)
    rate.link_to(sink)
    graph.configure()
    for number, image in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts, frame.time_base = number, 1 / fps
        source.push(frame)
    source.push(None)
    out: Frames = []
    times: list[float] = []
    while True:
        try:
            frame = sink.pull()
        except (av.error.EOFError, av.error.BlockingIOError):
            return out, times
        out.append(frame.to_ndarray())
        times.append(float(frame.pts * frame.time_base))


class Maker:
    """Encodes the pairs of one scene into a folder.

    scene: at least `length` + 2 MARGIN frames. The reference is the middle `length` of them.
    """

    def __init__(self, folder: Path, scene: Scene, length: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.scene, self.length = folder, scene, length
        self.frame_s = float(1 / scene.fps)
        self.reference = self.encoded("reference", self.stretch(0), _GOOD)

    def stretch(self, shift: int) -> Frames:
        """As long as the reference, and begun `shift` frames later."""
        begin = MARGIN + shift
        return self.scene.frames[begin : begin + self.length]

    def encoded(
        self,
        name: str,
        frames: Frames,
        options: dict[str, str],
        times: Sequence[float] | None = None,
        codec: str = "libx264",
        gop: int = 24,
    ) -> Path:
        """Encode, by default at the scene's own rate."""
        spaced = [number * self.frame_s for number in range(len(frames))]
        suffix = ".mp4" if codec == "libx264" else ".mkv"
        path = self.folder / f"{name.replace(' ', '_').replace('/', '_')}{suffix}"
        return encode(path, frames, codec, 25, times or spaced, options, gop=gop)

    def case(
        self, kind: str, name: str, distorted: Path, shift: int | None, interval_s: float = 0.0
    ) -> Case:
        """A case with this scene's reference; right within half of the longer frame interval."""
        offset_s = None if shift is None else shift * self.frame_s
        tolerance_s = max(self.frame_s, interval_s) / 2
        name = f"{self.scene.name}: {name}"
        return Case(name, kind, distorted, self.reference, offset_s, tolerance_s)

    def offset(self, shift: int) -> Case:
        """A rendition that begins `shift` frames into the reference, or before it."""
        path = self.encoded(f"offset {shift}", self.stretch(shift), _FAIR)
        return self.case("offset", f"{shift:+d} frames", path, shift)

    def poor(self, shift: int) -> Case:
        """Few bits, and half the size."""
        small = [np.ascontiguousarray(f[::2, ::2][: HEIGHT // 2]) for f in self.stretch(shift)]
        small = [f[:, : f.shape[1] // 2 * 2] for f in small]
        path = self.encoded(f"poor {shift}", small, _POOR, gop=40)
        return self.case("poor and small", f"{shift:+d} frames, half size", path, shift)

    def darker(self, shift: int) -> Case:
        """Other brightness and contrast, another codec, and a logo that stands still."""
        frames = [(20 + 0.7 * f).astype(np.uint8) for f in self.stretch(shift)]
        for frame in frames:
            frame[4:24, 4:60] = 235
        path = self.encoded(f"darker {shift}", frames, {"qmin": "4", "qmax": "4"}, codec="mpeg4")
        return self.case("logo, contrast", f"{shift:+d} frames, MPEG-4", path, shift)

    def dropped(self, shift: int, share: float, seed: int) -> Case:
        """Frames are missing here and there; the others keep their times."""
        frames, rng = self.stretch(shift), np.random.default_rng(seed)
        count = round(len(frames) * (1 - share))
        keep = np.sort(rng.choice(np.arange(1, len(frames)), count, replace=False))
        keep[0] = 0
        times = [int(k) * self.frame_s for k in keep]
        path = self.encoded(f"dropped {shift} {share}", [frames[k] for k in keep], _FAIR, times)
        return self.case("dropped frames", f"{shift:+d} frames, {share:.0%} dropped", path, shift)

    def frozen(self, shift: int, share: float, seed: int) -> Case:
        """Frames here and there are replaced by the one before."""
        frames, rng = self.stretch(shift), np.random.default_rng(seed)
        for at in rng.choice(np.arange(1, len(frames)), round(share * len(frames)), replace=False):
            frames[at] = frames[at - 1]
        path = self.encoded(f"frozen {shift} {share}", frames, _FAIR)
        return self.case("repeated frames", f"{shift:+d} frames, {share:.0%} repeated", path, shift)

    def rate(self, shift: int, to: Fraction) -> Case:
        """Another frame rate."""
        frames, times = resampled(self.stretch(shift), self.scene.fps, to)
        path = self.encoded(f"rate {shift} {float(to):.3f}", frames, _FAIR, times)
        name = f"{shift:+d} frames, {float(self.scene.fps):.5g} to {float(to):.5g} fps"
        return self.case("frame rate", name, path, shift, float(1 / to))

    def late(self, shift: int, start_s: float) -> Case:
        """The first frame is not at zero, as in a transport stream."""
        times = [start_s + number * self.frame_s for number in range(self.length)]
        path = self.encoded(f"late {shift}", self.stretch(shift), _FAIR, times)
        made = self.case("start time", f"{shift:+d} frames, starts at {start_s} s", path, shift)
        offset_s = shift * self.frame_s - start_s
        return Case(made.name, made.kind, path, made.reference, offset_s, made.tolerance_s)

    def still(self) -> Case:
        """Nothing moves in either, but for the pulse of keyframes at the same distance."""
        frames = [self.scene.frames[MARGIN]] * self.length
        reference = self.encoded("still reference", frames, _FAIR, gop=12)
        path = self.encoded("still", frames, _FAIR, gop=12)
        return Case(f"{self.scene.name}: still", "still", path, reference, None, 0.0)

    def periodic(self, period: int) -> Case:
        """The same few frames over and over, in both."""
        loop = self.scene.frames[MARGIN : MARGIN + period]
        frames = list(itertools.islice(itertools.cycle(loop), self.length + 3))
        reference = self.encoded(f"loop {period} reference", frames[: self.length], _GOOD)
        path = self.encoded(f"loop {period}", frames[3:], _FAIR)
        return Case(f"{self.scene.name}: loop of {period}", "periodic", path, reference, None, 0.0)

    def there_and_back(self, period: int) -> Case:
        """The same few frames forwards and backwards, in both."""
        way = self.scene.frames[MARGIN : MARGIN + period]
        frames = list(itertools.islice(itertools.cycle(way + way[::-1]), self.length + 3))
        reference = self.encoded(f"back {period} reference", frames[: self.length], _GOOD)
        path = self.encoded(f"back {period}", frames[3:], _FAIR)
        name = f"{self.scene.name}: {period} there and back"
        return Case(name, "periodic", path, reference, None, 0.0)

    def reversed(self) -> Case:
        """Backwards."""
        path = self.encoded("reversed", self.stretch(0)[::-1], _FAIR)
        return self.case("reversed", "reversed", path, None)

    def faster(self) -> Case:
        """Played 1/24 faster, as film for television: no constant offset."""
        times = [number * self.frame_s * 24 / 25 for number in range(self.length)]
        path = self.encoded("faster", self.stretch(0), _FAIR, times)
        return self.case("speed", "25/24 times as fast", path, None)

    def spliced(self) -> Case:
        """A few frames are cut out of the middle and the gap is closed: two offsets."""
        frames = self.stretch(0)
        middle = len(frames) // 2
        path = self.encoded("spliced", frames[: middle - 2] + frames[middle + 2 :], _FAIR)
        return self.case("spliced", "4 frames cut out", path, None)


def unrelated(makers: Sequence[Maker]) -> Iterator[Case]:
    """Every reference with every other."""
    for a, b in itertools.permutations(makers, 2):
        name = f"{a.scene.name} against {b.scene.name}"
        yield Case(name, "unrelated", a.reference, b.reference, None, 0.0)
