"""The guarded decoder: media is opened in a child process that may hang, crash or be killed.

    decode worker --(request)--> child: open, probe, decode --(facts, or a file of frames)-->

Whatever a file does to the child becomes one MediaError here, and the next file gets a new child.
Frames come through memory that both share, without being copied or pickled.
"""

import fcntl
import mmap
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import (
    BY_CODE,
    DecodeCrash,
    DecodeTimeout,
    InternalError,
)
from pipeline.media import wire
from pipeline.media.colour import DEFAULT_POLICY, Look, Policy
from pipeline.media.image import Background
from pipeline.media.probe import Facts, Probe
from pipeline.media.sample import Timeline

_ROOT = Path(__file__).parents[2]
# To start Python and import the decoders, on a machine that is busy with everything else.
_START_S = 120.0


@dataclass(frozen=True)
class Frames:
    """What became of one work unit's samples. `pixels` holds the frames' RGB end to end."""

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
    ) -> Frames:
        """`decode.decode_at`, in the child."""
        reply, file = self._ask(
            timeout_s, op="decode_video", url=url, times=times, weights=weights,
            max_pixels=max_pixels, max_bytes=max_bytes, policy=asdict(policy), crop=crop,
        )  # fmt: skip
        look = Look(**reply["look"]) if reply["look"] else None
        heights, widths, pixels = self._frames(url, reply["sizes"], file)
        return Frames(
            reply["pts_s"], reply["weight_s"], heights, widths, pixels, look,
            reply["missing"], reply["problem"], reply["wait_s"],
        )  # fmt: skip

    def decode_image(
        self, url: str, max_pixels: int, alpha: Background, timeout_s: float
    ) -> Frames:
        """`image.decode`, in the child. The one frame is at 0 s, with a weight of 0 s."""
        reply, file = self._ask(
            timeout_s, op="decode_image", url=url, max_pixels=max_pixels, alpha=alpha
        )
        frames = self._frames(url, reply["sizes"], file)
        return Frames([0.0], [0.0], *frames, wait_s=reply["wait_s"])

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
        self, url: str, sizes: list[tuple[int, int]], file: int | None
    ) -> tuple[list[int], list[int], mmap.mmap | bytes]:
        """Map the file that the child has filled, once it can no longer be made shorter."""
        if file is None:
            raise DecodeCrash(f"{url}: the decoder sent no frames.")
        try:
            if hasattr(os, "memfd_create"):
                fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            expected = sum(3 * height * width for height, width in sizes)
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
