"""When decoded frames are on screen, also where packets do not say so."""

import heapq
import re
from collections.abc import Iterator

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pipeline.media.container import frame_interval

# Codecs for which FFmpeg does not work out presentation times where a container has none.
_AS_STORED = ("h264", "hevc", "vvc")
# Containers with one time per packet, which FFmpeg takes for that of decoding. It then makes up a
# presentation time by adding a constant; the video itself starts at the first time of decoding.
_ONE_TIME = ("avi", "asf")
# Frames that a stream may reorder (H.264, A.3.1).
_REORDERED = 16
# Keyframes that no frame reaches across (IDR pictures), as byte streams show them.
_CLOSED = {
    "h264": re.compile(rb"\x00\x00\x01[\x25\x45\x65]"),
    "hevc": re.compile(rb"\x00\x00\x01[\x26\x28]"),
}


class Clock:
    """Gives each frame of a stream, as the decoder hands them out, its time in seconds.

    Decoders hand out frames in presentation order. Which time is the frame's depends on what the
    packets hold:

    - presentation times, as nearly always: the frame has that of its packet. One without it, as of
      several frames in one packet of a program stream, comes an interval after the frame before;
    - times of decoding only, though frames are reordered (AVI, ASF, some MXF and MOV): the time of
      its packet is that of another frame, so the n-th frame has the n-th time. This is so where
      the container is known for it, and where no packet so far was against it: with real
      presentation times, the first packet of a stream that reorders has two different times (in
      MXF, where FFmpeg makes up one of them, some packets are earlier than those before);
    - no times at all (bare streams): frames are counted.

    Frames that are lost would make all after them early in the second case, so times before that
    of a keyframe's own packet lapse as it comes: what is sent before a keyframe is also shown
    before it.
    """

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._codec = stream.codec_context
        self._tick = float(stream.time_base or 1 / 90000)
        self._interval = frame_interval(stream)
        self._as_stored = self._codec.name in _AS_STORED
        self._one_time = self._as_stored and container.format.name in _ONE_TIME
        self._made_up = self._as_stored and container.format.name == "mxf"
        self._true_times = False
        self._last: int | None = None
        self._lag = 0
        self._unused: list[int] = []
        self._stamped = False
        self._counted = 0
        self._before: float | None = None
        self.gaps = False
        """Whether a packet had no time: those of frames without one rest on the frames before."""

    @property
    def by_order(self) -> bool:
        """Whether times are given out in order, so that no frame may be left out."""
        reorders = self._as_stored and bool(self._codec.has_b_frames)
        return reorders and (self._one_time or not self._true_times)

    def time_of(self, packet: "Packet[VideoStream]") -> float | None:
        """The time that a packet holds, of its own frame or (`by_order`) of another one."""
        stamp = self._stamp(packet)
        return None if stamp is None else float(stamp * self._tick)

    def send(self, packet: "Packet[VideoStream]") -> None:
        """Take note of a packet, before the decoder is given it."""
        if packet.is_discard or not packet.size:
            return
        stamp = self._stamp(packet)
        if stamp is None:
            self.gaps = self._true_times = True
            return
        self._stamped = True
        earlier = self._last is not None and stamp < self._last
        two = packet.dts is None or packet.pts not in (None, packet.dts)
        self._true_times |= earlier or (two and not self._made_up)
        self._last = stamp
        self._lag = 0 if packet.pts is None else packet.pts - stamp
        if self._as_stored:
            heapq.heappush(self._unused, stamp)

    def show(self, frame: VideoFrame) -> float:
        """The time of the next frame that the decoder hands out."""
        self._before = self._next(frame)
        self._counted += 1
        return self._before

    def seek(self) -> None:
        """Take note that the next packet is not the one after the last one."""
        self._unused.clear()
        self._counted, self._before, self._last = 0, None, None

    def may_start_at(self, keyframe: "Packet[VideoStream]") -> bool:
        """Whether all frames get their times when decoding starts at this packet.

        By their order they only do when none is lost, as are those that reach across the first
        keyframe of an open GOP. Without a sign that the GOP is closed, it counts as open.
        """
        if not (self._one_time and self.by_order):
            return True
        sign = _CLOSED.get(self._codec.name)
        return sign is not None and sign.search(bytes(keyframe)) is not None

    def _stamp(self, packet: "Packet[VideoStream]") -> int | None:
        if packet.pts is None or (self._one_time and packet.dts is not None):
            return packet.dts
        return packet.pts

    def _next(self, frame: VideoFrame) -> float:
        own = None if frame.pts is None else frame.pts - self._lag
        if own is not None and (frame.key_frame or not self.by_order):
            while self._unused and self._unused[0] < own:
                heapq.heappop(self._unused)
        if self.by_order and self._unused:
            return heapq.heappop(self._unused) * self._tick
        if own is not None and not self.by_order:
            return float(own * self._tick)
        if self._before is None or not self._stamped:
            return self._counted * self._interval
        return self._before + self._interval


def demuxed(container: InputContainer, stream: VideoStream) -> "Iterator[Packet[VideoStream]]":
    """The stream's packets, without times that are another packet's.

    In a program stream, FFmpeg at times gives that of a frame also to the one sent before it, which
    reaches into the same packet of the container. Raises what demuxing raises.
    """
    packets = container.demux(stream)
    if container.format.name != "mpeg" or stream.codec_context.name not in _AS_STORED:
        yield from packets
        return
    held = next(packets, None)
    while held is not None:
        try:
            following = next(packets, None)
        except (av.error.FFmpegError, OSError):
            yield held
            raise
        if following is not None and held.pts == following.pts:
            held.pts = held.dts = None
        yield held
        held = following


def filled(stamped: list[float], missing: int, trailing: int, interval: float) -> list[float]:
    """The times of all frames, ascending, as a `Clock` gives them out; packets alone are known.

    stamped: the times that packets hold, ascending. missing: packets without a time. trailing:
    those of them behind the last packet with one. They are where there is room between the others,
    and after them. What fits in neither place are no frames, but the second fields of some.
    """
    times: list[float] = []
    left = missing
    for time in stamped:
        while left and times and time - times[-1] > 1.5 * interval:
            times.append(times[-1] + interval)
            left -= 1
        times.append(time)
    if not times:
        return [number * interval for number in range(missing)]
    if left > trailing + (_REORDERED if left < missing else 0):
        left = trailing
    for _ in range(left):
        times.append(times[-1] + interval)
    return times
