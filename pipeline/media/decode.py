"""Decode the frames that are on screen at given moments of a video."""

import itertools
import math
from collections import deque
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
from pipeline.media.clock import Clock, demuxed
from pipeline.media.colour import DEFAULT_POLICY, RGB, Look, Policy
from pipeline.media.container import explain, frame_interval, open_video, read_ahead
from pipeline.media.interlace import deinterlaced
from pipeline.media.letterbox import Box

# Formats that are sought in, and those among them whose index is real: in a transport stream,
# FFmpeg notes places that it came by, and calls them all keyframes.
_SEEKABLE = ("mov", "matroska", "mpegts", "avi")
_INDEXED = ("mov", "matroska", "avi")
# A seek has a price too, here in frames decoded: the decoder starts empty and has to fill again.
_SEEK_FRAMES = 4
# How far apart keyframes may be, as long as neither an index nor the frames themselves tell it,
# and the least that is believed of the frames.
_GOP_S = 5.0
_SHORT_GOP_S = 1.0
# Samples further apart than most GOPs are long lie in different places of a file.
_APART_S = 2.0
# Codecs in which a frame that says that none refers to it can be left out without a trace. (In
# HEVC it is only said of frames of the same temporal layer.)
_DISPOSES = ("h264",)
_PROGRESSIVE = 1  # AVFieldOrder; 0 is unknown
# Frames that a stream may reorder (H.264, A.3.1): so far back, packets say what comes later.
_REORDERED = 16
# How far before a target to seek, in turn, until a keyframe before it is found.
_SEEK_BACK_S = (1.0, 5.0, 20.0)
# A last frame may be shown this much longer than the stream says; beyond it, material is missing.
_TAIL_S = 0.5
_NO_PIXELS: RGB = np.empty((0, 0, 3), np.uint8)

# A decoded frame and when it comes on screen, in seconds.
_Timed = tuple[float, VideoFrame]


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
    see: Callable[[VideoFrame], None] | None = None,
    convert: bool = True,
) -> Decoded:
    """Decode the frame on screen at each of `times` (seconds, ascending).

    A frame on screen at several of them comes once, with their weights added. Damage is passed
    over as a player would do, and reported in `problem`. take: is given each frame as soon as it
    is decoded; shots then hold no pixels. crop: the part of the upright picture that is wanted, as
    `letterbox` writes it. see: is shown each frame before that, as it was stored. convert: whether
    RGB is wanted at all. Raises MediaError when nothing at all could be decoded.
    """
    with open_video(url, limits.max_pixels, _places(times)) as (container, stream):
        decoder = _Decoder(url, container, stream, limits, take, policy, crop, see, convert)
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
        see: Callable[[VideoFrame], None] | None = None,
        convert: bool = True,
    ) -> None:
        self.url, self.container, self.stream = url, container, stream
        self.limits, self.take, self.see, self.convert = limits, take, see, convert
        self.policy, self.crop = policy, Box.parse(crop) if crop else None
        self.lead_s = 0.0
        self.bytes = 0
        self.tick = float(stream.time_base or 1 / 90000)
        self.interval = frame_interval(stream)
        self.reformatter = VideoReformatter()
        self.errors = 0
        self.concealed = 0
        self.last_error: Exception | None = None
        self.out = Decoded()
        self.clock = Clock(container, stream)
        self.may_seek = any(name in container.format.name for name in _SEEKABLE)
        self.indexed = any(name in container.format.name for name in _INDEXED)
        # A frame that is deinterlaced needs its neighbours, those that none refers to as well.
        progressive = int(stream.codec_context.field_order) <= _PROGRESSIVE
        self.may_dispose = stream.codec_context.name in _DISPOSES and progressive
        self.gop_s = _GOP_S
        self.longest_gop_s = 0.0
        self.on_screen: _Timed | None = None
        self.ahead: _Timed | None = None
        self.last: VideoFrame | None = None
        self.before: VideoFrame | None = None
        self.goal = -math.inf
        self.leave = False
        self.drained = False

    def run(self, times: Sequence[float], weights: Sequence[float]) -> Decoded:
        """Walk the frames in presentation order, seeking over what no sample needs."""
        frames = self._decoded(self._packets())
        seek = self._worth_seeking(self._first_s(), times[0])
        for index, (time, weight) in enumerate(zip(times, weights, strict=True)):
            self.goal = time
            if seek or not index:
                self._read_ahead(times[index:], seek)
            if seek:
                frames = self._after_seek(time)
            following = times[index + 1 : index + 2]
            self.leave = not following or self._worth_seeking(time, following[0])
            found = self._on_screen_at(time, frames)
            if found is None:
                self.out.missing = len(times) - index
                break
            self._take(*found, weight)
            seek = self.leave and self.may_seek
        self._settle()
        return self.out

    def _on_screen_at(self, time: float, frames: Iterator[_Timed]) -> _Timed | None:
        """The frame on screen at `time`, or the first one after it; None when the file is over."""
        while not self.on_screen or abs(time - self.on_screen[0]) > self.tick / 2:
            self.ahead = self.ahead or next(frames, None)
            if self.ahead is None or self.ahead[0] > time + self.tick / 2:
                break
            self._show(self.ahead)
        if self.on_screen is None and self.ahead is not None and self._waits(self.ahead[1]):
            self._show(self.ahead)
        if self.on_screen is not None and self._waits(self.on_screen[1]):
            self.ahead = self.ahead or next(frames, None)
        if self.on_screen is None or self.ahead is not None or self.drained:
            return self.on_screen or self.ahead
        pts_s, frame = self.on_screen
        held_s = _TAIL_S + float(frame.duration or 0) * self.tick
        return self.on_screen if time <= pts_s + held_s else None

    def _show(self, timed: _Timed) -> None:
        self.on_screen, self.ahead = timed, None
        self.before, self.last = self.last, timed[1]

    def _settle(self) -> None:
        if not self.out.shots:
            cause = self.last_error or DecodeError(f"{self.url}: no frame could be decoded.")
            raise explain(self.url, cause)
        problems = []
        if self.errors:
            problems.append(f"{self.errors} damaged packets were passed over")
        if self.concealed:
            problems.append(f"{self.concealed} scored frames are damaged")
        if self.out.missing and self.on_screen is not None:
            end_s, missing = self.on_screen[0], self.out.missing
            problems.append(f"the video ends at {end_s:.2f} s: {missing} samples are missing")
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
        if self.see is not None:
            self.see(frame)
        rgb = self._converted(frame) if self.convert else _NO_PIXELS
        if self.take is not None:
            self.take(rgb)
            rgb = _NO_PIXELS
        shots.append(Shot(pts_s, weight, rgb))

    def _read_ahead(self, times: Sequence[float], seek: bool) -> None:
        """Have the file read ahead as far as the samples up to the next seek need it."""
        if not self.container.size or not self.container.duration:
            return
        if seek and not self.indexed:  # FFmpeg looks for the place by halves, all over the file
            read_ahead(self.container, 0)
            return
        stays = itertools.takewhile(
            lambda p: not self._worth_seeking(*p), itertools.pairwise(times)
        )
        last = max((after for _, after in stays), default=times[0])
        # Where the index ends before the samples, its last keyframe says nothing about theirs.
        seconds = last - max(self._keyframe_before(times[0]), times[0] - self.gop_s)
        rate = self.container.size * av.time_base / self.container.duration
        read_ahead(self.container, seconds * rate)

    def _first_s(self) -> float:
        entries = self.stream.index_entries
        return entries[0].timestamp * self.tick if len(entries) else 0.0

    def _converted(self, frame: VideoFrame) -> RGB:
        """A frame as the policy wants it."""
        codec = self.stream.codec_context
        look = colour.look_of(frame, (codec.coded_width, codec.coded_height), self._waits(frame))
        if objection := colour.objection(look, self.policy):
            raise UnsupportedColour(f"{self.url}: {objection}.")
        self.out.look = self.out.look or look
        if look.deinterlaced:
            frame = deinterlaced(self.before, frame, self.ahead[1] if self.ahead else None)
        rgb = colour.to_rgb(frame, look, self.reformatter, self.policy.alpha)
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
        """Whether fewer frames are decoded from the keyframe before `target` than from `now` on.

        An index is asked as it is at that moment: some are only read at the first seek.
        """
        if not self.may_seek:
            return False
        target -= self.lead_s
        keyframe_s = self._keyframe_before(target)
        if keyframe_s - now > _SEEK_FRAMES * self.interval:
            return True
        if keyframe_s > -math.inf:
            entries = self.stream.index_entries
            if entries[len(entries) - 1].timestamp * self.tick > target - self.gop_s:
                return False  # the index reaches as far as the target and has no keyframe between
        return target - now > self.gop_s

    def _keyframe_before(self, target: float) -> float:
        """When the keyframe is that an index puts at or before `target`; minus infinity if none."""
        entries = self.stream.index_entries
        found = entries.search_timestamp(round(target / self.tick)) if self.indexed else -1
        return entries[found].timestamp * self.tick if found >= 0 else -math.inf

    def _after_seek(self, target: float) -> Iterator[_Timed]:
        """Frames in presentation order, from a keyframe at or before `target` on.

        Indexes count in decoding order and may be wrong, so the frame that a seek arrives at is
        looked at before it is believed; without a good one the file is decoded from its start.
        """
        self.ahead = self.last = None
        # Without an index a seek arrives in the middle of a GOP: one GOP back is right.
        least = 0.0 if self.indexed else self.longest_gop_s or _SHORT_GOP_S
        for back in (least, *(b for b in _SEEK_BACK_S if b > least)):
            try:
                self._seek(target - self.lead_s - back)
            except av.error.FFmpegError:
                break
            first, frames = self._from_keyframe(target)
            if first is not None:
                if self.on_screen is not None and first[0] <= self.on_screen[0]:
                    self._learn(2 * (target - self.on_screen[0]))  # sought in vain
                return itertools.chain((first,), frames)
        self.may_seek = False
        try:
            self._seek(min(self._first_s(), 0.0))
        except av.error.FFmpegError as error:  # no way back: what still comes is all there is
            self.errors += 1
            reason = f"damaged or incomplete: its start cannot be found again ({error.strerror})"
            self.last_error = DecodeError(f"{self.url}: {reason}.")
        return self._decoded(self._packets())

    def _from_keyframe(self, target: float) -> tuple[_Timed | None, Iterator[_Timed]]:
        """The first keyframe from here on, if it is not after `target`, and the frames after it.

        What comes before it lacks its references. Its packet is looked at first, for a fraction
        of what decoding it would cost.
        """
        packets = itertools.dropwhile(
            lambda p: p is not None and not p.is_keyframe, self._packets()
        )
        packet = next(packets, None)
        if packet is None or not self.clock.may_start_at(packet):
            return None, iter(())
        if (self.clock.time_of(packet) or 0.0) > target - self.lead_s + self.tick / 2:
            return None, iter(())
        frames = self._decoded(itertools.chain((packet,), packets))
        first = next((f for f in frames if f[1].key_frame), None)
        late = first is not None and first[0] > target - self.lead_s + self.tick / 2
        if first is None or late or not self.may_seek:
            return None, frames
        return first, frames

    def _seek(self, position_s: float) -> None:
        self.leave = self.drained = False
        self.clock.seek()
        self.container.seek(math.floor(position_s / self.tick), stream=self.stream)

    def _learn(self, gop_s: float) -> None:
        self.longest_gop_s = max(self.longest_gop_s, gop_s)
        self.gop_s = max(self.longest_gop_s, _SHORT_GOP_S)

    def _decoded(self, packets: Iterator[Any]) -> Iterator[_Timed]:
        """Everything from the current position on, passing over damage.

        Two kinds of work are saved: frames that none refers to are left out where a later one is
        on screen at the goal; and when all is sent that the goal needs, and nothing after it is
        wanted, the decoder is emptied instead of being fed until it lets go of the goal.
        """
        recent: deque[float] = deque(maxlen=_REORDERED)
        keyframe_s, shown, in_order = math.inf, False, True
        for packet in packets:
            if packet is not None:
                self.clock.send(packet)
            if packet is not None and packet.dts is not None and packet.pts is not None:
                in_order = in_order and packet.dts <= packet.pts and not self.clock.by_order
                past = packet.dts * self.tick > self.goal + self.tick / 2
                self.drained = self.leave and shown and in_order and past and not self.lead_s
            if self.may_dispose and packet is not None and not self.lead_s:
                self._dispose(packet, recent)
            try:
                frames = self.stream.decode(None if self.drained else packet)
            except MemoryError:
                raise
            except av.error.FFmpegError as error:
                self.errors += 1
                self.last_error = error
                frames = []
            for frame in frames:
                if frame.pts is None and not self.clock.by_order:  # it rests on those before it
                    self.may_seek = False
                pts_s = self.clock.show(frame)
                self._waits(frame)
                if frame.key_frame:
                    if pts_s > keyframe_s:
                        self._learn(pts_s - keyframe_s)
                    keyframe_s = pts_s
                shown = shown or pts_s <= self.goal + self.tick / 2
                yield pts_s, frame
            if self.drained:
                return

    def _dispose(self, packet: Any, recent: deque[float]) -> None:
        """Have the decoder leave out a frame that no other needs, where a later one is due.

        Not where the times of other frames rest on it.
        """
        late = False
        if packet.pts is not None and not self.clock.by_order and not self.clock.gaps:
            pts_s = packet.pts * self.tick
            late = any(pts_s < other <= self.goal + self.tick / 2 for other in recent)
            recent.append(pts_s)
        self.stream.codec_context.skip_frame = "NONREF" if late else "DEFAULT"

    def _packets(self) -> Iterator[Any]:
        """The stream's packets, and a last one that empties the decoder."""
        try:
            yield from demuxed(self.container, self.stream)
        except av.error.FFmpegError as error:
            self.errors += 1
            self.last_error = error
            yield None
        except OSError as error:  # the store, not the file: nothing to pass over
            raise StorageError(f"{self.url}: reading broke off ({error}).") from error


def _places(times: Sequence[float]) -> int:
    """In how many places of a file the samples lie."""
    return 1 + sum(b - a > _APART_S for a, b in itertools.pairwise(times))
