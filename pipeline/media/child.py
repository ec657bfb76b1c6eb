"""The child process that opens media: the only place where a stranger's file meets a decoder.

Started by `guard`, one request at a time over a socket, until the guard goes away. It never
imports torch, with which FFmpeg's threads can deadlock, and its memory is capped.
"""

import ctypes
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame

from pipeline.errors import DecodeMemory, InternalError, MediaError, TooLarge
from pipeline.media import decode, image, probe, wire
from pipeline.media.colour import RGB, Background, Policy
from pipeline.media.planes import Planes, upright_planes
from pipeline.media.sample import SampleSpec
from pipeline.media.scale import scaled
from pipeline.media.track import track

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve the socket whose number is the first argument; the second caps memory, in bytes."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the guard decides when this ends
    _die_with_parent()
    _cap_memory(int(sys.argv[2]))
    wire.send(sock, {"ready": True})
    while True:
        try:
            request, _ = wire.receive(sock)
        except wire.Closed:
            return
        wire.send(sock, {"begun": True})
        with _FrameFile() as frames:
            before = _Clock.now()
            reply = _answer(frames, **request)
            reply["wait_s"] = before.waited_since()
            wire.send(sock, reply, frames.number if frames.sizes else None)


def _answer(frames: "_FrameFile", op: str, url: str, **request: Any) -> dict[str, Any]:
    try:
        return _ANSWERS[op](frames, url, **request)
    except MediaError as error:
        kind: type[MediaError] = type(error)
        message = str(error)
    except MemoryError:
        kind, message = DecodeMemory, f"{url}: its decoder needs more than decode_memory_bytes."
    except Exception as error:
        kind, message = InternalError, f"{url}: {type(error).__name__}: {error}"
    frames.sizes.clear()
    return {"code": kind.code, "message": message}


def _probe(
    _: "_FrameFile", url: str, sample: str, max_pixels: int, policy: dict[str, Any]
) -> dict[str, Any]:
    return asdict(probe.probe(url, SampleSpec.parse(sample), max_pixels, Policy(**policy)))


def _decode_video(
    frames: "_FrameFile",
    url: str,
    times: list[float],
    weights: list[float],
    max_pixels: int,
    max_bytes: int,
    policy: dict[str, Any],
    crop: str | None,
    size: tuple[int, int] | None,
    planes: bool,
    form: str | None,
) -> dict[str, Any]:
    """`size`: width and height that frames are brought to. `planes`: whether their stored planes
    are wanted too, upright, and `form`: `WIDTHxHEIGHT PIX_FMT RANGE` that those are brought to.
    """
    forms: list[str] = []
    stored: list[Planes] = []

    def see(frame: VideoFrame) -> None:
        if not planes:
            return
        found, its_form = upright_planes(frame, form)
        forms.append(its_form)
        stored.append(found or _NO_PLANES)

    def take(rgb: RGB) -> None:
        width, height = size or (rgb.shape[1], rgb.shape[0])
        if frames.sizes and frames.bytes + 3 * width * height > max_bytes:
            raise TooLarge(
                f"{url}: frames brought to {width}x{height} are over the {max_bytes} bytes that "
                "are allowed in one unit. Lower unit_frames or raise unit_bytes."
            )
        frames.write(rgb, size)
        if stored:
            frames.write_planes(stored.pop())

    limits = decode.Limits(max_pixels, max_bytes)
    found = decode.decode_at(
        url, times, weights, limits, take, policy=Policy(**policy), crop=crop, see=see
    )
    return {
        "pts_s": [shot.pts_s for shot in found.shots],
        "weight_s": [shot.weight_s for shot in found.shots],
        "sizes": frames.sizes,
        "planes": frames.planes,
        "form": forms[0] if forms else None,
        "unscaled": frames.unscaled,
        "look": found.look and asdict(found.look),
        "missing": found.missing,
        "problem": found.problem,
    }


_NO_PLANES = Planes(np.empty((0, 0), np.uint8), None, None, 8)


def _decode_image(
    frames: "_FrameFile",
    url: str,
    max_pixels: int,
    alpha: Background,
    size: tuple[int, int] | None,
) -> dict[str, Any]:
    frames.write(image.decode(url, max_pixels, alpha), size)
    return {"sizes": frames.sizes, "unscaled": frames.unscaled}


def _track(_: "_FrameFile", url: str, times: list[float], max_pixels: int) -> dict[str, Any]:
    found = track(url, times, max_pixels)
    return {"pts_s": found.pts_s.tolist(), "features": found.features.round(3).tolist()}


_ANSWERS: dict[str, Callable[..., dict[str, Any]]] = {
    "probe": _probe,
    "decode_video": _decode_video,
    "decode_image": _decode_image,
    "track": _track,
}


class _FrameFile:
    """Frames end to end in a file that lives in memory and has no name."""

    def __init__(self) -> None:
        self.bytes = 0
        self.sizes: list[tuple[int, int]] = []
        self.planes: list[dict[str, Any]] = []
        self.unscaled: str | None = None
        if hasattr(os, "memfd_create"):
            self.number = os.memfd_create("frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        else:
            with tempfile.TemporaryFile() as file:
                self.number = os.dup(file.fileno())

    def __enter__(self) -> "_FrameFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.number)

    def write(self, rgb: RGB, size: tuple[int, int] | None) -> None:
        """A frame, brought to `size` (width, height)."""
        self.unscaled = self.unscaled or f"{rgb.shape[1]}x{rgb.shape[0]}"
        rgb = scaled(rgb, *size) if size else rgb
        self.bytes += rgb.nbytes
        self._append(rgb)
        self.sizes.append((rgb.shape[0], rgb.shape[1]))

    def write_planes(self, planes: Planes) -> None:
        """After the frame that they are of."""
        parts = [part for part in (planes.y, planes.u, planes.v) if part is not None]
        for part in parts:
            if part.size:
                self._append(part)
        self.planes.append({"bits": planes.bits, "shapes": [part.shape for part in parts]})

    def _append(self, pixels: npt.NDArray[Any]) -> None:
        rest = np.ascontiguousarray(pixels).data.cast("B")
        while rest:
            rest = rest[os.write(self.number, rest) :]


@dataclass(frozen=True)
class _Clock:
    """Where this thread's time went, in seconds."""

    wall: float
    cpu: float
    queue: float
    """Ready to run, while other processes had the CPUs."""

    @classmethod
    def now(cls) -> "_Clock":
        queue = 0.0
        if sys.platform == "linux":
            with open("/proc/thread-self/schedstat", encoding="ascii") as schedstat:  # noqa: PTH123
                queue = int(schedstat.read().split()[1]) / 1e9
        return cls(time.perf_counter(), time.thread_time(), queue)

    def waited_since(self) -> float:
        """Seconds since then that were spent neither computing nor in the queue for a CPU."""
        now = self.now()
        return max(0.0, now.wall - self.wall - (now.cpu - self.cpu) - (now.queue - self.queue))


def _die_with_parent() -> None:
    """Be killed by the kernel when the process that started this one ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _cap_memory(allowed: int) -> None:
    """Let this process grow by so much and no more; allocations beyond it fail."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as statm:  # noqa: PTH123
            pages = int(statm.read().split()[0])
        cap = pages * resource.getpagesize() + allowed
        resource.setrlimit(resource.RLIMIT_AS, (cap, cap))


if __name__ == "__main__":
    main()
