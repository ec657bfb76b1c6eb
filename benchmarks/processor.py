"""Where a run's processor time goes: run a `topiq score` command and watch it.

    python benchmarks/processor.py [--after S] -- topiq score clips/ -o out --sample fps:1

Prints processor seconds and the share of the machine's by kind of process, as the scheduler
accounts for them (/proc/PID/task/*/schedstat). What `top` shows is counted at the kernel's ticks,
with which the timers of idle processes wake up: it says four times as much of these. With --after,
what happens in the first S seconds, as processes start, is left out.
"""

import argparse
import os
import subprocess
import time
from collections import defaultdict
from pathlib import Path

from memory import descendants

# By what is in the title of a process; the first that fits.
KINDS = {
    "MapWorker(": "scorers",
    "pipeline.media.child": "decoders",
    **dict.fromkeys(
        ("ray::IDLE", "ray::Map", "ray::Read", "ray::Write"),
        "Ray's other workers, which run the decode stage",
    ),
    "ray::": "Ray's and our small actors, and agents",
    "/ray/": "Ray's servers and monitors",
    "jobs": "driver",
    "topiq": "driver",
}


def kind_and_seconds(pid: int) -> tuple[str, float]:
    """What a process is, by its title, and the processor time that its threads have taken."""
    folder = Path(f"/proc/{pid}")
    title = folder.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    if not title:
        raise ProcessLookupError  # it has ended
    kind = next((kind for part, kind in KINDS.items() if part in title), "other")
    threads = folder.joinpath("task").glob("*/schedstat")
    return kind, sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def main() -> None:
    """Parse, run, watch, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--after", type=float, default=0.0)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    before: dict[int, float] = {}
    latest: dict[int, tuple[str, float]] = {}
    process = subprocess.Popen(options.command)
    started = counted_from = time.monotonic()
    while process.poll() is None:
        for pid in descendants(process.pid):
            try:
                latest[pid] = kind_and_seconds(pid)
            except OSError:
                continue
        if time.monotonic() - started < options.after:
            before = {pid: seconds for pid, (_, seconds) in latest.items()}
            counted_from = time.monotonic()
        time.sleep(1)
    whole = (time.monotonic() - counted_from) * len(os.sched_getaffinity(0))
    sums: dict[str, float] = defaultdict(float)
    for pid, (kind, seconds) in latest.items():
        sums[kind] += seconds - before.get(pid, 0.0)
    for kind, seconds in sorted(sums.items(), key=lambda item: -item[1]):
        print(f"{seconds:9.1f} s  {seconds / whole:6.1%}  {kind}")


if __name__ == "__main__":
    main()
