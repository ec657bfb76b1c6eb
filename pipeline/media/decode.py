"""Decode the frames that are on screen at given moments of a video."""

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from pipeline.errors import DecodeError, StorageError, TooLarge, UnsupportedColour
from pipeline.media import colour
from pipeline.media.colour import DEFAULT_POLICY, RGB, Look, Policy
from pipeline.media.container import explain, frame_interval, open_video
from pipeline.media.interlace import deinterlaced
from pipeline.media.letterbox import Box

# A container without an index is sought in only when this much can be skipped.
_BLIND_SEEK_S = 5.0
_SEEKABLE = ("mov", "matroska", "mpegts", "avi")
# How far before a target to seek, in turn, until a keyframe before it is found.
_SEEK_BACK_S = (0.0, 1.0, 5.0, 20.0)
# A last frame may be shown this much longer than the stream says; beyond it, material is missing.
_TAIL_S = 0.5
_NO_PIXELS: RGB = np.empty((0, 0, 3), np.uint8)


@dataclass(frozen=True)
class Limits:
    """What decoding one unit may use, whatever the file's header has promised."""

    max_pixels: int
    """Pixels of a frame."""
    max_bytes: int
    """RGB bytes of all frames together; one frame may exceed it."""


@dataclass(frozen=True)
class Shot:
    """One decoded frame: when it is on screen, and the seconds of video that it stands for."""

    pts_s: float
    weight_s: float
    rgb: RGB


@dataclass
class Decoded:
    """What became of one work unit's samples."""

    shots: list[Shot] = field(default_factory=list)
    look: Look | None = None
    missing: int = 0
    """Samples for which no frame was on screen, because material is missing or damaged."""
    problem: str | None = None
    """Why frames are missing or doubtful; None when all went well."""


def decode_at(
    url: str,
    times: Sequence[float],
    weights: Sequence[float],
    limits: Limits,
    take: Callable[[RGB], None] | None = None,
    policy: Policy = DEFAULT_POLICY,
    crop: str | None = None,
) -> Decoded:
    """Decode the frame on screen at each of `times` (seconds, ascending).

    A frame on screen at several of them comes once, with their weights added. Damage is passed
    over as a player would do, and reported in `problem`. take: is given each frame as soon as it
    is decoded; shots then hold no pixels. crop: the part of the upright picture that is wanted, as
    `letterbox` writes it. Raises MediaError when nothing at all could be decoded.
    """
    with open_video(url, limits.max_pixels) as (container, stream):
        decoder = _Decoder(url, container, stream, limits, take, policy, crop)
        return decoder.run(times, weights)


class _Decoder:
    def __init__(
        self,
        url: str,
        container: InputContainer,
        stream: VideoStream,
        limits: Limits,
        take: Callable[[RGB], None] | None,
        policy: Policy,
        crop: str | None,
    ) -> None:
        self.url, self.container, self.stream = url, container, stream
        self.limits, self.take = limits, take
        self.policy, self.crop = policy, Box.parse(crop) if crop else None
        self.before: VideoFrame | None = None
        self.after: VideoFrame | None = None
        self.lead_s = 0.0
        self.bytes = 0
        self.tick = float(stream.time_base or 1 / 90000)
        self.reformatter = VideoReformatter()
        self.errors = 0
        self.concealed = 0
        self.last_error: Exception | None = None
        self.out = Decoded()
        self.unstamped = 0
        self.may_seek = any(name in container.format.name for name in _SEEKABLE)
        self.keyframes = _keyframe_index(stream, self.tick)
        self.first_s = self.keyframes[0] if self.keyframes else 0.0

    def run(self, times: Sequence[float], weights: Sequence[float]) -> Decoded:
        """Walk the frames in presentation order, seeking over what no sample needs."""
        on_screen: tuple[float, VideoFrame] | None = None
        last: VideoFrame | None = None
        done, sought = 0, 0
        seek = self._worth_seeking(self.first_s, times[0])
        frames = self._after_seek(times[0]) if seek else self._decoded()
        while done < len(times):
            pts_s, frame = next(frames, (0.0, None))
            if frame is None:
                break
            # A frame that is to be deinterlaced waits for the one after it.
            waits, self.after = self._waits(frame), frame
            while done < len(times) and times[done] < pts_s - self.tick / 2:
                if on_screen is None and waits:
                    break
                self._take(*(on_screen or (pts_s, frame)), weights[done])
                done += 1
            self.before, self.after = last, None
            on_screen, last = (pts_s, frame), frame
            while done < len(times) and abs(times[done] - pts_s) <= self.tick / 2 and not waits:
                self._take(pts_s, frame, weights[done])
                done += 1
            if sought < done < len(times) and self._worth_seeking(pts_s, times[done]):
                frames = self._after_seek(times[done])
                sought, last = done, None
        if on_screen is not None:
            end = on_screen[0] + _TAIL_S + float(on_screen[1].duration or 0) * self.tick
            while done < len(times) and times[done] <= end:
                self._take(*on_screen, weights[done])
                done += 1
        self.out.missing = len(times) - done
        self._settle(on_screen)
        return self.out

    def _settle(self, on_screen: tuple[float, VideoFrame] | None) -> None:
        if not self.out.shots:
            cause = self.last_error or DecodeError(f"{self.url}: no frame could be decoded.")
            raise explain(self.url, cause)
        problems = []
        if self.errors:
            problems.append(f"{self.errors} damaged packets were passed over")
        if self.concealed:
            problems.append(f"{self.concealed} scored frames are damaged")
        if self.out.missing and on_screen is not None:
            problems.append(
                f"the video ends at {on_screen[0]:.2f} s: {self.out.missing} samples are missing"
            )
        self.out.problem = "; ".join(problems) or None

    def _take(self, pts_s: float, frame: VideoFrame, weight: float) -> None:
        shots = self.out.shots
        if shots and shots[-1].pts_s == pts_s:
            shots[-1] = Shot(pts_s, shots[-1].weight_s + weight, shots[-1].rgb)
            return
        if frame.width * frame.height > self.limits.max_pixels:
            raise TooLarge(
                f"{self.url}: a frame of {frame.width}x{frame.height} pixels, over the limit of "
                f"{self.limits.max_pixels}. Raise max_pixels if there is memory for it."
            )
        self.bytes += 3 * frame.width * frame.height
        if shots and self.bytes > self.limits.max_bytes:
            raise TooLarge(
                f"{self.url}: frames are larger than the header says: {self.bytes} bytes in one "
                f"unit, {self.limits.max_bytes} allowed. Lower unit_frames or raise unit_bytes."
            )
        # Cut short by a damaged packet, and so the last one before a hole, or patched up.
        self.concealed += bool(frame.is_corrupt)
        rgb = self._converted(frame)
        if self.take is not None:
            self.take(rgb)
            rgb = _NO_PIXELS
        shots.append(Shot(pts_s, weight, rgb))

    def _converted(self, frame: VideoFrame) -> RGB:
        """A frame as the policy wants it. `before` and `after` are its neighbours."""
        codec = self.stream.codec_context
        look = colour.look_of(frame, (codec.coded_width, codec.coded_height), self._waits(frame))
        if objection := colour.objection(look, self.policy):
            raise UnsupportedColour(f"{self.url}: {objection}.")
        self.out.look = self.out.look or look
        if look.deinterlaced:
            frame = deinterlaced(self.before, frame, self.after)
        rgb = colour.to_rgb(frame, look, self.reformatter)
        if self.crop is None:
            return rgb
        if rgb.shape[0] < self.crop.bottom or rgb.shape[1] < self.crop.right:
            raise DecodeError(
                f"{self.url}: a frame of {rgb.shape[1]}x{rgb.shape[0]} pixels is too small for the "
                f"crop {self.crop} that others gave. Use crop=none."
            )
        return np.ascontiguousarray(self.crop.of(rgb))

    def _waits(self, frame: VideoFrame) -> bool:
        """Whether a frame is to be deinterlaced, for which its neighbours must be known."""
        waits = bool(frame.interlaced_frame) and self.policy.interlaced == "deinterlace"
        if waits and not self.lead_s:  # from now on, seek to at least a frame before a target
            shown = float(frame.duration or 0) * self.tick
            self.lead_s = max(shown, frame_interval(self.stream))
        return waits

    def _worth_seeking(self, now: float, target: float) -> bool:
        """Whether a keyframe lies between: decoding up to it can be saved."""
        if not self.may_seek:
            return False
        target -= self.lead_s
        if len(self.keyframes) > 1:
            before = bisect.bisect_right(self.keyframes, target) - 1
            return before >= 0 and self.keyframes[before] > now + self.tick
        return target - now > _BLIND_SEEK_S

    def _after_seek(self, target: float) -> Iterator[tuple[float, VideoFrame]]:
        """Frames in presentation order, from a keyframe at or before `target` on.

        Indexes count in decoding order and may be wrong, so the frame that a seek arrives at is
        looked at before it is believed; without a good one the file is decoded from its start.
        """
        for back in _SEEK_BACK_S:
            try:
                self._seek(target - self.lead_s - back)
            except av.error.FFmpegError:
                break
            # What comes before the first keyframe lacks its references.
            frames = itertools.dropwhile(lambda f: not f[1].key_frame, self._decoded())
            first = next(frames, None)
            if first is not None:
                self._waits(first[1])
                if first[0] <= target - self.lead_s + self.tick / 2:
                    return itertools.chain((first,), frames)
        self.may_seek = False
        try:
            self._seek(min(self.first_s, 0.0))
        except av.error.FFmpegError as error:  # no way back: what still comes is all there is
            self.errors += 1
            reason = f"damaged or incomplete: its start cannot be found again ({error.strerror})"
            self.last_error = DecodeError(f"{self.url}: {reason}.")
        return self._decoded()

    def _seek(self, position_s: float) -> None:
        self.container.seek(math.floor(position_s / self.tick), stream=self.stream)

    def _decoded(self) -> Iterator[tuple[float, VideoFrame]]:
        """Everything from the current position on, passing over damage."""
        for packet in self._packets():
            try:
                frames = self.stream.decode(packet)
            except MemoryError:
                raise
            except av.error.FFmpegError as error:
                self.errors += 1
                self.last_error = error
                continue
            for frame in frames:
                if frame.pts is None:  # a bare stream: frames count, times do not exist
                    self.may_seek = False
                    yield self.unstamped * frame_interval(self.stream), frame
                    self.unstamped += 1
                else:
                    yield frame.pts * self.tick, frame

    def _packets(self) -> Iterator[Any]:
        """The stream's packets, and a last one that empties the decoder."""
        try:
            yield from self.container.demux(self.stream)
        except av.error.FFmpegError as error:
            self.errors += 1
            self.last_error = error
            yield None
        except OSError as error:  # the store, not the file: nothing to pass over
            raise StorageError(f"{self.url}: reading broke off ({error}).") from error


def _keyframe_index(stream: VideoStream, tick: float) -> list[float]:
    """Times of the keyframes that the container's index lists, in seconds; may be empty."""
    return sorted(e.timestamp * tick for e in stream.index_entries if e.is_keyframe)
