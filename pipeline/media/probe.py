"""What a media item is, and when its frames are on screen: from headers and packets.

Nothing is decoded, unless black bars are to be looked for.
"""

import math
from dataclasses import dataclass
from typing import Literal

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from pipeline import storage
from pipeline.errors import NoFrames, NotMedia, TooLarge
from pipeline.media import decode, image, letterbox
from pipeline.media.clock import Clock, demuxed, filled
from pipeline.media.colour import DEFAULT_POLICY, RGB, Policy
from pipeline.media.container import (
    explain,
    frame_interval,
    looks_like_media,
    open_video,
    read_ahead,
)
from pipeline.media.sample import SampleSpec, Timeline, plan_samples

Kind = Literal["video", "image"]


@dataclass(frozen=True)
class Facts:
    """What the container says; absent facts are None. Seconds, and bits per second."""

    kind: Kind
    container: str
    codec: str
    profile: str | None
    coded_width: int
    coded_height: int
    fps: float | None
    duration_s: float | None
    bit_rate: int | None
    pix_fmt: str | None
    sample_aspect_ratio: str | None
    crop: str | None
    n_video_streams: int
    field_order: str | None


@dataclass(frozen=True)
class Probe:
    """An item's facts, and for a video its timeline."""

    facts: Facts
    timeline: Timeline


# Enough of them to see past dark scenes, few enough to cost about a second.
_BAR_FRAMES = SampleSpec("uniform", 8)
_FIELD_ORDERS = {1: "progressive", 2: "tt", 3: "bb", 4: "tb", 5: "bt"}  # AVFieldOrder


def kind_of(head: bytes) -> Kind | None:
    """Image or video by the first bytes; None when they are neither's."""
    if image.sniff(head):
        return "image"
    return "video" if looks_like_media(head) else None


def probe(url: str, spec: SampleSpec, max_pixels: int, policy: Policy = DEFAULT_POLICY) -> Probe:
    """Read what planning needs to know of one item. Raises MediaError."""
    head = storage.read_head(url)
    if not head:
        raise NotMedia(f"{url}: the file is empty.")
    if kind_of(head) == "image":
        return _probe_image(url, max_pixels)
    return _probe_video(url, spec, max_pixels, policy)


def _probe_image(url: str, max_pixels: int) -> Probe:
    found = image.facts(url, max_pixels)
    facts = Facts(
        kind="image",
        container=found.format.lower(),
        codec=found.format.lower(),
        profile=None,
        coded_width=found.width,
        coded_height=found.height,
        fps=None,
        duration_s=None,
        bit_rate=None,
        pix_fmt=f"{found.mode.lower()}{found.bits if found.bits > 8 else ''}",
        sample_aspect_ratio=None,
        crop=None,
        n_video_streams=0,
        field_order=None,
    )
    return Probe(facts, Timeline(0.0, 0.0, (0.0,), (0.0,)))


def _probe_video(url: str, spec: SampleSpec, max_pixels: int, policy: Policy) -> Probe:
    with open_video(url, max_pixels) as (container, stream):
        codec = stream.codec_context
        width, height = codec.width, codec.height
        if width * height > max_pixels:
            raise TooLarge(
                f"{url}: {width}x{height} pixels a frame, over the limit of {max_pixels}. "
                "Raise max_pixels if there is memory for it."
            )
        timeline = _timeline(url, container, stream, spec)
        rate = stream.average_rate
        aspect = stream.sample_aspect_ratio
        facts = Facts(
            kind="video",
            container=container.format.name.split(",")[0],
            codec=codec.codec.canonical_name,
            profile=codec.profile,
            coded_width=width,
            coded_height=height,
            fps=_plausible(float(rate) if rate else None, container, timeline),
            duration_s=timeline.duration_s,
            bit_rate=_bit_rate(container, stream, timeline),
            pix_fmt=codec.pix_fmt,
            sample_aspect_ratio=str(aspect) if aspect and aspect != 1 else None,
            crop=_between_bars(url, timeline, max_pixels, policy),
            n_video_streams=len(container.streams.video),
            field_order=_FIELD_ORDERS.get(int(codec.field_order)),
        )
        return Probe(facts, timeline)


def _between_bars(url: str, timeline: Timeline, max_pixels: int, policy: Policy) -> str | None:
    """The picture between black bars, by frames all over the video; the only ones decoded here."""
    if policy.crop == "none":
        return None
    shapes: set[tuple[int, int]] = set()
    boxes: list[letterbox.Box | None] = []

    def look(rgb: RGB) -> None:
        shapes.add((rgb.shape[0], rgb.shape[1]))
        boxes.append(letterbox.lit(letterbox.luma(rgb)))

    samples = plan_samples(_BAR_FRAMES, timeline)
    limits = decode.Limits(max_pixels, 3 * max_pixels * len(samples.times))
    decode.decode_at(url, samples.times, samples.weights, limits, look, policy)
    box = letterbox.picture(shapes.pop(), boxes) if len(shapes) == 1 else None
    return str(box) if box else None


def _plausible(fps: float | None, container: InputContainer, timeline: Timeline) -> float | None:
    """The frame rate; where all frame times are known, from them rather than from the header."""
    if len(timeline.frame_times) > 1 and timeline.duration_s > 0:
        span = timeline.frame_times[-1] - timeline.frame_times[0]
        if span > 0:
            return round((len(timeline.frame_times) - 1) / span, 3)
    # FLV's header rate is its millisecond clock.
    return None if container.format.name == "flv" else fps


def _bit_rate(container: InputContainer, stream: VideoStream, timeline: Timeline) -> int | None:
    """Of the video; where its packets were not read, what headers say, of the file if need be."""
    if timeline.coded_bytes and timeline.duration_s > 0:
        return round(8 * timeline.coded_bytes / timeline.duration_s)
    return stream.bit_rate or container.bit_rate or None


def _timeline(
    url: str, container: InputContainer, stream: VideoStream, spec: SampleSpec
) -> Timeline:
    tick = float(stream.time_base or 1 / 90000)
    start = (stream.start_time or 0) * tick
    duration = _declared_duration(container, stream, tick)
    if start > frame_interval(stream) and "matroska" in container.format.name:
        # What Matroska declares is a length to some writers, and the end to others (FFmpeg).
        duration = None if spec.needs_frame_times else _length_by_seeking(container, stream, start)
    indexed = max((e.timestamp for e in stream.index_entries), default=0) * tick
    if duration and indexed > start + duration:  # the header is wrong: frames lie beyond its end
        duration = indexed - start + frame_interval(stream)
    if duration and not spec.needs_frame_times:
        return Timeline(start, duration)
    times, keys, end, coded_bytes = _scan(url, container, stream, tick)
    if not times:
        raise NoFrames(f"{url}: a video track without frames (an initialisation segment?).")
    if not duration or times[0] + duration < times[-1]:
        duration = end - times[0]
    if lost := _beyond(stream, times[-1], tick):
        # Cut off: what is missing is planned for, and so is found to be missing when it is decoded.
        times += [time for time, _ in lost]
        keys += [time for time, is_keyframe in lost if is_keyframe]
        coded_bytes = 0
    return Timeline(times[0], duration, tuple(times), tuple(keys), coded_bytes or None)


def _beyond(stream: VideoStream, last: float, tick: float) -> list[tuple[float, bool]]:
    """Frames that an index puts after the last one that is there, and which are keyframes.

    By their times of decoding, a few frames early; so some frames after the last are left out.
    """
    entries = (e for e in stream.index_entries if not e.is_discard)
    found = sorted((e.timestamp * tick, bool(e.is_keyframe)) for e in entries)
    return [entry for entry in found if entry[0] > last + _TAIL_FRAMES * frame_interval(stream)]


_TAIL_FRAMES = 2


def _length_by_seeking(
    container: InputContainer, stream: VideoStream, start: float
) -> float | None:
    """Seconds from the start to the end of the last frame, from the packets after the last seek
    point; None when there is no way to get there.

    Of a file that is cut off it is what was declared, if that was meant as the end.
    """
    if not container.duration:
        return None
    tick = float(stream.time_base or 1 / 90000)
    declared = container.duration / av.time_base
    end = 0.0
    try:
        container.seek(int((start + declared) / tick), stream=stream)
        for packet in container.demux(stream):
            if packet.size and packet.pts is not None:
                end = max(end, (packet.pts + (packet.duration or 0)) * tick)
        container.seek(0, stream=stream)
    except (av.error.FFmpegError, OSError):
        end = 0.0
    return max(end, declared) - start if end else None


def _declared_duration(container: InputContainer, stream: VideoStream, tick: float) -> float | None:
    """The video's own duration where the container has it, else the container's."""
    if stream.duration:
        return float(stream.duration * tick)
    tag = stream.metadata.get("DURATION", "")  # Matroska: HH:MM:SS.fraction
    parts = tag.split(":")
    if len(parts) == 3:
        try:
            return float(parts[0]) * 3600 + float(parts[1]) * 60 + float(parts[2])
        except ValueError:
            pass
    return float(container.duration / av.time_base) if container.duration else None


def _scan(
    url: str, container: InputContainer, stream: VideoStream, tick: float
) -> tuple[list[float], list[float], float, int]:
    """Presentation times of all frames and of the keyframes, the end, and bytes: of all packets."""
    times: set[float] = set()
    keys: set[float] = set()
    unstamped_keys: list[int] = []
    end, count, missing, trailing, coded_bytes = 0.0, 0, 0, 0, 0
    clock = Clock(container, stream)
    read_ahead(container, math.inf)
    try:
        for packet in demuxed(container, stream):
            if packet.is_discard or packet.size == 0:
                continue
            coded_bytes += packet.size
            shown = clock.time_of(packet)
            if shown is None:
                missing, trailing = missing + 1, trailing + 1
                if packet.is_keyframe:
                    unstamped_keys.append(count)
            else:
                trailing = 0
                times.add(shown)
                end = max(end, shown + (packet.duration or 0) * tick)
                if packet.is_keyframe:
                    keys.add(shown)
            count += 1
    except (av.error.FFmpegError, OSError) as error:
        if not count:
            raise explain(url, error) from error
    interval = frame_interval(stream)
    every = filled(sorted(times), missing, trailing, interval)
    if len(every) == count:  # what is sent before a keyframe is also shown before it
        keys.update(every[number] for number in unstamped_keys)
    if missing:
        end = max(end, every[-1] + interval)
    return every, sorted(keys), end or len(every) * interval, coded_bytes
