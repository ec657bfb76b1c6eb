"""The guarded decoder: media is opened in a child process that may hang, crash or be killed.

    decode worker --(request)--> child: open, probe, decode --(facts, or a file of frames)-->

Whatever a file does to the child becomes one MediaError here, and the next file gets a new child.
Frames come through memory that both share, without being copied or pickled.
"""

import fcntl
import math
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import (
    BY_CODE,
    DecodeCrash,
    DecodeTimeout,
    InternalError,
)
from pipeline.media import wire
from pipeline.media.align import Track
from pipeline.media.colour import DEFAULT_POLICY, Background, Look, Policy
from pipeline.media.planes import Planes
from pipeline.media.probe import Facts, Probe
from pipeline.media.sample import Timeline

_ROOT = Path(__file__).parents[2]
# To start Python and import the decoders, on a machine that is busy with everything else.
_START_S = 120.0


@dataclass(frozen=True)
class Frames:
    """What became of one work unit's samples.

    `pixels` holds the frames' RGB end to end, each followed by its planes where those were asked
    for; `planes` says of which form those are.
    """

    pts_s: list[float]
    weight_s: list[float]
    heights: list[int]
    widths: list[int]
    pixels: mmap.mmap | bytes
    look: Look | None = None
    missing: int = 0
    """Samples for which no frame was on screen, because material is missing or damaged."""
    problem: str | None = None
    """Why frames are missing or doubtful; None when all went well."""
    wait_s: float = 0.0
    """Seconds in which the child neither computed nor waited for a CPU: it waited for storage."""
    planes: list[dict[str, Any]] = field(default_factory=list)
    form: str | None = None
    """`WIDTHxHEIGHT PIX_FMT RANGE` of the planes, when there are any."""
    unscaled: str | None = None
    """`WIDTHxHEIGHT` of the first frame before it was brought to the size asked for."""

    def pictures(self) -> Iterator[tuple[npt.NDArray[np.uint8], Planes | None]]:
        """Each frame as uint8 RGB [H, W, 3], and its planes; views of `pixels`."""
        at = 0

        def take(shape: Sequence[int], dtype: str) -> npt.NDArray[Any]:
            nonlocal at
            count = math.prod(shape)
            out = np.frombuffer(self.pixels, dtype, count, at).reshape(shape)
            at += out.nbytes
            return out

        for index, (height, width) in enumerate(zip(self.heights, self.widths, strict=True)):
            rgb = take((height, width, 3), "u1")
            if not self.planes:
                yield rgb, None
                continue
            bits, shapes = self.planes[index]["bits"], self.planes[index]["shapes"]
            parts = [take(shape, "u1" if bits <= 8 else "u2") for shape in shapes]
            y, u, v = parts if len(parts) == 3 else (parts[0], None, None)
            yield rgb, Planes(y, u, v, bits) if y.size else None


class Guard:
    """One child process, started when it is needed and again after it has died.

    memory_bytes: how much the child may grow. Every method raises MediaError: what the decoders
    say of the file, or DecodeTimeout, DecodeCrash and DecodeMemory.
    """

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None

    def probe(
        self,
        url: str,
        sample: str,
        max_pixels: int,
        timeout_s: float,
        policy: Policy = DEFAULT_POLICY,
    ) -> Probe:
        """`probe.probe`, in the child."""
        reply, _ = self._ask(
            timeout_s, op="probe", url=url, sample=sample, max_pixels=max_pixels,
            policy=asdict(policy),
        )  # fmt: skip
        found = reply["timeline"]
        for name in ("frame_times", "keyframe_times"):
            found[name] = tuple(found[name])
        return Probe(Facts(**reply["facts"]), Timeline(**found))

    def decode_video(
        self,
        url: str,
        times: list[float],
        weights: list[float],
        max_pixels: int,
        max_bytes: int,
        timeout_s: float,
        policy: Policy = DEFAULT_POLICY,
        crop: str | None = None,
        size: tuple[int, int] | None = None,
        planes: bool = False,
        form: str | None = None,
    ) -> Frames:
        """`decode.decode_at`, in the child.

        size: width and height to bring frames to. planes: whether their stored planes are wanted
        as well; form: `Frames.form` of a reference, to which those are brought.
        """
        reply, file = self._ask(
            timeout_s, op="decode_video", url=url, times=times, weights=weights,
            max_pixels=max_pixels, max_bytes=max_bytes, policy=asdict(policy), crop=crop,
            size=size, planes=planes, form=form,
        )  # fmt: skip
        look = Look(**reply["look"]) if reply["look"] else None
        heights, widths, pixels = self._frames(url, reply["sizes"], reply["planes"], file)
        return Frames(
            reply["pts_s"], reply["weight_s"], heights, widths, pixels, look,
            reply["missing"], reply["problem"], reply["wait_s"],
            reply["planes"], reply["form"], reply["unscaled"],
        )  # fmt: skip

    def decode_image(
        self,
        url: str,
        max_pixels: int,
        alpha: Background,
        timeout_s: float,
        size: tuple[int, int] | None = None,
    ) -> Frames:
        """`image.decode`, in the child. The one frame is at 0 s, with a weight of 0 s."""
        reply, file = self._ask(
            timeout_s, op="decode_image", url=url, max_pixels=max_pixels, alpha=alpha, size=size
        )
        frames = self._frames(url, reply["sizes"], [], file)
        return Frames([0.0], [0.0], *frames, wait_s=reply["wait_s"], unscaled=reply["unscaled"])

    def track(self, url: str, times: list[float], max_pixels: int, timeout_s: float) -> Track:
        """`track.track`, in the child."""
        reply, _ = self._ask(timeout_s, op="track", url=url, times=times, max_pixels=max_pixels)
        return Track(np.array(reply["pts_s"]), np.array(reply["features"], np.float32))

    def close(self) -> None:
        """End the child, if there is one."""
        if self._sock is not None:
            self._sock.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._sock = self._process = None

    def _ask(self, timeout_s: float, **request: Any) -> tuple[dict[str, Any], int | None]:
        url = request["url"]
        sock = self._asked(timeout_s, request)
        try:
            reply, file = wire.receive(sock)
        except TimeoutError as error:
            self.close()
            raise DecodeTimeout(
                f"{url}: not done after {timeout_s:g} s, so the decoder was stopped. Raise "
                "decode_timeout_s if the file is merely large or far away."
            ) from error
        except (wire.Closed, OSError) as error:
            raise DecodeCrash(f"{url}: the decoder {self._epitaph()} on this file.") from error
        if "code" in reply:
            raise BY_CODE[reply["code"]](reply["message"])
        return reply, file

    def _asked(self, timeout_s: float, request: dict[str, Any]) -> socket.socket:
        """A child that has begun on the request. One that died before it did so is not to blame."""
        if self._sock is not None and self._begun(self._sock, timeout_s, request):
            return self._sock
        sock = self._start(request["url"])
        if not self._begun(sock, timeout_s, request):
            raise DecodeCrash(f"{request['url']}: the decoder {self._epitaph()} before this file.")
        return sock

    def _begun(self, sock: socket.socket, timeout_s: float, request: dict[str, Any]) -> bool:
        sock.settimeout(timeout_s)
        try:
            wire.send(sock, request)
            wire.receive(sock)
        except (wire.Closed, OSError):
            return False
        return True

    def _start(self, url: str) -> socket.socket:
        self.close()
        ours, theirs = socket.socketpair()
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.child", str(theirs.fileno()),
                 str(self.memory_bytes)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )  # fmt: skip
        self._sock = ours
        ours.settimeout(_START_S)
        try:
            wire.receive(ours)
        except (wire.Closed, TimeoutError) as error:
            raise InternalError(
                f"{url}: the decoder process {self._epitaph()} at start."
            ) from error
        return ours

    def _epitaph(self) -> str:
        """How the child ended; it is certainly gone after this."""
        assert self._process is not None
        try:
            status = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            status = 0
        self.close()
        if status < 0:
            name = signal.Signals(-status).name
            hint = " (killed from outside, or for want of memory)" if name == "SIGKILL" else ""
            return f"died of {name}{hint}"
        return f"ended with status {status}"

    def _frames(
        self,
        url: str,
        sizes: list[tuple[int, int]],
        planes: list[dict[str, Any]],
        file: int | None,
    ) -> tuple[list[int], list[int], mmap.mmap | bytes]:
        """Map the file that the child has filled, once it can no longer be made shorter."""
        if file is None:
            raise DecodeCrash(f"{url}: the decoder sent no frames.")
        try:
            if hasattr(os, "memfd_create"):
                fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            expected = sum(3 * height * width for height, width in sizes)
            for kept in planes:
                samples = sum(math.prod(shape) for shape in kept["shapes"])
                expected += samples * (1 if kept["bits"] <= 8 else 2)
            if expected == 0 or os.fstat(file).st_size < expected:
                raise DecodeCrash(f"{url}: the decoder sent fewer frames than it said.")
            pixels = mmap.mmap(file, expected, prot=mmap.PROT_READ)
        finally:
            os.close(file)
        return [s[0] for s in sizes], [s[1] for s in sizes], pixels


_shared: Guard | None = None


def shared(memory_bytes: int) -> Guard:
    """This process's guard: its child is kept from file to file and from task to task."""
    global _shared
    if _shared is None or _shared.memory_bytes != memory_bytes:
        if _shared is not None:
            _shared.close()
        _shared = Guard(memory_bytes)
    return _shared
