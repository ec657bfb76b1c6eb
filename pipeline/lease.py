"""One run at a time on an output folder: a lease that its owner renews, and loses when it dies.

The lease is a small file in the folder, with a number that goes up every few seconds. A run that
finds one watches it: if the number moves, somebody is at work; if it does not, the owner is gone
and the lease is taken over. No clocks are compared. An owner on this machine is looked up instead.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import OutputError, RunError
from pipeline.output import Output

FILE = "_lease.json"
PERIOD_S = 5.0
# Renewals that may be late or lost before an owner counts as dead.
_PATIENCE = 4
# Two runs that start at the same moment both find no lease; the one that wrote last keeps it.
_SETTLE_S = 0.5


# A signal that comes while Ray waits in its own code is lost.
_SIGNAL_EVERY_S = 1.0


class Lost(BaseException):
    """Ends the main thread's work, which no `except Exception` on the way may keep from ending.

    The output is another run's then: nothing more may be written where that run writes.
    """


class _Lease:
    def __init__(self, output: Output, run_id: str) -> None:
        self.output = output
        pid = os.getpid()
        self.fields: dict[str, Any] = {
            "owner": uuid.uuid4().hex, "run_id": run_id, "machine": _machine(), "pid": pid,
            "process_start": _process_start(pid), "host": socket.gethostname(), "renewals": 0,
        }  # fmt: skip
        self.lost = False
        self.released = threading.Event()
        # What goes on writing would be there twice: the other run does the same units.
        self.ends_main = threading.current_thread() is threading.main_thread()

    def found(self) -> dict[str, Any] | None:
        """Whose lease lies there; None when there is none, or only a part of one."""
        text = self.output.read_text(FILE)
        try:
            fields = json.loads(text or "null")
        except ValueError:
            return None
        return fields if isinstance(fields, dict) else None

    def is_ours(self) -> bool:
        found = self.found()
        return found is not None and found.get("owner") == self.fields["owner"]

    def write(self) -> None:
        self.fields["renewals"] += 1
        self.output.write_text(json.dumps(self.fields) + "\n", FILE)

    def take(self) -> None:
        other = self.found()
        if other is not None and self._at_work(other):
            raise OutputError(
                f"{self.output.url}: run {other.get('run_id')} is writing to it (process "
                f"{other.get('pid')} on {other.get('host')}). Wait for it, or end it, or name "
                "another output."
            )
        self.write()
        time.sleep(_SETTLE_S)
        if not self.is_ours():
            raise OutputError(f"{self.output.url}: another run started at the same moment.")

    def _at_work(self, other: dict[str, Any]) -> bool:
        start = other.get("process_start")  # None where there is no /proc
        if start is not None and other.get("machine") == self.fields["machine"]:
            return _process_start(int(other["pid"])) == str(start)
        deadline = time.monotonic() + _PATIENCE * PERIOD_S
        while time.monotonic() < deadline:
            time.sleep(PERIOD_S / 5)
            now = self.found()
            if now is None:
                return False
            if now != other:
                return True
        return False

    def keep(self) -> None:
        while not self.released.wait(PERIOD_S):
            # A store that does not answer now, in whatever words, may do so the next time.
            with contextlib.suppress(Exception):
                if not self.is_ours():
                    self.lost = True
                    self._end_main()
                    return
                self.write()

    def _end_main(self) -> None:
        while self.ends_main and not self.released.wait(_SIGNAL_EVERY_S):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)


@contextlib.contextmanager
def held(output: Output, run_id: str) -> Iterator[None]:
    """Hold the output for the time of the body. What a killed owner left half-written is removed.

    Raises OutputError when another run holds it, and RunError when it was lost in between: the
    machine then stood still for so long that another run took over.
    """
    lease = _Lease(output, run_id)
    lease.take()
    output.remove_partials()
    before: Any = signal.getsignal(signal.SIGUSR1) if lease.ends_main else None

    def on_signal(number: int, frame: Any) -> None:
        if lease.lost:
            raise Lost
        if callable(before):  # somebody else's signal, as of a batch system
            before(number, frame)

    if lease.ends_main:
        signal.signal(signal.SIGUSR1, on_signal)
    thread = threading.Thread(target=lease.keep, daemon=True)
    thread.start()
    try:
        yield
    except Lost:
        pass
    finally:
        with contextlib.suppress(Lost):
            lease.released.set()
            thread.join()
        if lease.ends_main:
            signal.signal(signal.SIGUSR1, before or signal.SIG_DFL)
        if not lease.lost:
            with contextlib.suppress(OutputError):  # the next run sees that nobody renews it
                output.remove(output.inside(FILE))
    if lease.lost:
        raise RunError(f"{output.url}: another run took this output over. Look at its run.json.")


def _machine() -> str:
    """Differs where process numbers mean something else: on another machine, after it starts anew,
    and in another container on it.
    """
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return f"{uuid.getnode():x}"


def _process_start(pid: int) -> str | None:
    """When a process started, in ticks of this machine; None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rsplit(")", 1)[1].split()
    return None if fields[0] == "Z" else fields[19]
