"""Open a video container and choose its stream."""

import contextlib
from collections.abc import Iterator
from typing import IO, Any

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from pipeline import storage
from pipeline.errors import (
    AccessDenied,
    DecodeError,
    Encrypted,
    MediaError,
    NotFound,
    NotMedia,
    NoVideoStream,
    StorageError,
    TooLarge,
    UnsupportedCodec,
)

# What is read from the start and the end of a file to tell encryption from damage.
_EVIDENCE_BYTES = 1 << 20
_ATTACHED_PIC = 0x400
# Multiplexes of whole broadcast transponders have fewer.
MAX_STREAMS = 256

# Demuxers that read the one file they are given. Playlists and descriptions (HLS, DASH, concat,
# SDP, image sequences), which make FFmpeg open other files and addresses, are not among them.
# fmt: off
DEMUXERS = (
    "mov", "matroska", "mpegts", "mpeg", "avi", "flv", "live_flv", "ogg", "asf", "mxf", "gxf",
    "nut", "ivf", "obu", "rm", "dv", "wtv", "swf", "gif", "apng", "yuv4mpegpipe",
    "h261", "h263", "h264", "hevc", "vvc", "m4v", "mpegvideo", "mjpeg", "vc1", "dirac", "dnxhd",
    # Audio, so that the error can say that there is only audio.
    "mp3", "aac", "flac", "wav", "aiff", "ac3", "eac3", "amr", "caf",
)
# fmt: on
SAFE_OPTIONS = {"format_whitelist": ",".join(DEMUXERS), "protocol_whitelist": "file"}


@contextlib.contextmanager
def open_video(
    url: str, max_pixels: int, places: int = 1
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a URL and yield its container and best video stream, ready to decode on one thread.

    places: in how many places of it frames will be read; see `storage.open_media`.
    Decoding stays on the calling thread: FFmpeg's frame threads can deadlock in a process that
    has imported torch, and work units side by side use the cores better. Raises MediaError.
    """
    with storage.open_media(url, places) as source, _open(url, source) as container:
        stream = _best_stream(url, container)
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(max_pixels)}
        yield container, stream


@contextlib.contextmanager
def _open(url: str, source: str | IO[bytes]) -> Iterator[InputContainer]:
    try:
        container = av.open(source, container_options=SAFE_OPTIONS)
    except (av.error.FFmpegError, OSError, UnicodeError, ValueError) as error:
        raise explain(url, error) from error
    with container:
        yield container


def _best_stream(url: str, container: InputContainer) -> VideoStream:
    if len(container.streams) > MAX_STREAMS:
        raise TooLarge(f"{url}: {len(container.streams)} streams, over the limit of {MAX_STREAMS}.")
    streams = [s for s in container.streams.video if not int(s.disposition) & _ATTACHED_PIC]
    if not streams:
        kinds = ", ".join(sorted({str(s.type) for s in container.streams})) or "nothing"
        raise NoVideoStream(f"{url}: no video track in it, only {kinds}.")
    known = [s for s in streams if s.codec_context is not None]
    if not known:
        raise UnsupportedCodec(f"{url}: FFmpeg has no decoder for its video codec.")
    best: Any = container.streams.best("video")
    return best if best in known else known[0]


def read_ahead(container: InputContainer, count: float) -> None:
    """Have a remote file that is read in ranges fetch so many bytes at a time."""
    storage.read_ahead(getattr(container.file, "file", None), count)


def frame_interval(stream: VideoStream) -> float:
    """Seconds from frame to frame by the declared rate: for bare streams, which hold no times."""
    rate = stream.guessed_rate or stream.average_rate
    return float(1 / rate) if rate else 1 / 25


def explain(url: str, error: Exception) -> MediaError:
    """The typed error behind an FFmpeg error. MemoryError is raised on: the guard explains it."""
    if isinstance(error, MediaError):
        return error
    if isinstance(error, MemoryError):
        raise error
    if isinstance(error, av.error.FileNotFoundError):
        return NotFound(f"{url}: no such file or object.")
    if isinstance(error, av.error.PermissionError):
        return AccessDenied(f"{url}: reading is not permitted. Check its access rights.")
    if isinstance(error, av.error.PatchWelcomeError | av.error.DecoderNotFoundError):
        return UnsupportedCodec(f"{url}: FFmpeg does not know this variant ({error.strerror}).")
    if is_encrypted(url):
        return Encrypted(f"{url}: the video is encrypted (DRM); there is no key to open it with.")
    # FFmpeg says EINVAL of a format that is not on the list.
    damaged = av.error.InvalidDataError | av.error.EOFError | av.error.ArgumentError | EOFError
    if isinstance(error, damaged):
        if not looks_like_media(storage.read_head(url)):
            return NotMedia(f"{url}: neither an image nor a video of a kind that is read here.")
        return DecodeError(f"{url}: damaged or incomplete: {_reason(error)}.")
    if isinstance(error, OSError) and not isinstance(error, av.error.FFmpegError):
        return StorageError(f"{url}: cannot be read ({error}).")
    return DecodeError(f"{url}: {_reason(error)}.")


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", "") or error or type(error).__name__)


# Signatures of the containers and elementary streams that FFmpeg demuxes: offset and bytes.
_MAGIC = (
    (4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (4, b"moof"), (4, b"styp"), (4, b"wide"),
    (4, b"free"), (4, b"skip"), (4, b"sidx"), (4, b"pnot"),
    (0, b"\x1aE\xdf\xa3"), (0, b"RIFF"), (0, b"FLV\x01"), (0, b"OggS"), (0, b"\x00\x00\x01"),
    (0, b"\x00\x00\x00\x01"), (0, b"0&\xb2u\x8ef\xcf\x11"), (0, b".RMF"), (0, b"GIF8"),
    (0, b"\x06\x0e+4"), (0, b"DKIF"), (0, b"YUV4MPEG2"), (0, b"ID3"), (0, b"fLaC"),
)  # fmt: skip


def looks_like_media(head: bytes) -> bool:
    """Whether the first bytes are those of an audio or video container."""
    if head.startswith(b"\x00\x00\x01\x00"):  # icons; no MPEG stream begins with a picture
        return False
    if any(head[offset : offset + len(magic)] == magic for offset, magic in _MAGIC):
        return True
    return any(
        len(head) > 2 * size + start and head[start::size][:3] == b"GGG"
        for start, size in ((0, 188), (4, 192), (0, 204))  # MPEG transport stream packets
    )


def is_encrypted(url: str) -> bool:
    """Whether the file carries common-encryption marks (ISO/IEC 23001-7, Matroska or WebM)."""
    head = storage.read_head(url, _EVIDENCE_BYTES)
    if head[:4] == b"\x1aE\xdf\xa3":
        return b"\x50\x35" in head and b"\x47\xe2" in head  # ContentEncryption, its key id
    return any(mark in head for mark in (b"encv", b"schmcenc", b"schm\0\0\0\0cenc", b"pssh"))
