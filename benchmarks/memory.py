"""Peak memory of a run, by kind of process: run a `topiq score` command and watch it.

    python benchmarks/memory.py [--seconds S] -- topiq score clip.mp4 -o out --sample all

Prints the largest proportional set size (PSS: shared pages divided among their users) of each
kind of process and of all together, in MB, sampled twice a second from /proc. With --seconds the
command is interrupted after that time; memory is flat long before a long video ends.
"""

import argparse
import signal
import subprocess
import time
from collections import defaultdict
from pathlib import Path


def descendants(root: int) -> list[int]:
    """All processes below `root`, itself included."""
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        children[int(fields[1])].append(int(stat.parent.name))
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += children[pid]
    return found


def kind_and_pss(pid: int) -> tuple[str, float]:
    """What a process is doing, by its title, and its PSS in MB."""
    folder = Path(f"/proc/{pid}")
    title = folder.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    for kind in ("ScoreUnits", "decode_units", "_Planner", "raylet", "gcs_server"):
        if kind in title:
            break
    else:
        kind = "driver" if "score" in title and "ray::" not in title else "other"
    rollup = folder.joinpath("smaps_rollup").read_text()
    line = next(line for line in rollup.splitlines() if line.startswith("Pss:"))
    return kind, int(line.split()[1]) / 1024


def main() -> None:
    """Parse, run, watch, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    peaks: dict[str, float] = defaultdict(float)
    process = subprocess.Popen(options.command)
    started = time.monotonic()
    while process.poll() is None:
        now: dict[str, list[float]] = defaultdict(list)
        for pid in descendants(process.pid):
            try:
                kind, size = kind_and_pss(pid)
            except (OSError, StopIteration):
                continue
            now[kind].append(size)
        for kind, sizes in now.items():
            peaks[f"largest {kind}"] = max(peaks[f"largest {kind}"], *sizes)
        total = sum(sum(sizes) for sizes in now.values())
        peaks["all processes"] = max(peaks["all processes"], total)
        if time.monotonic() - started > options.seconds:
            process.send_signal(signal.SIGINT)
            process.wait()
        time.sleep(0.5)
    for kind, peak in sorted(peaks.items(), key=lambda item: item[1]):
        print(f"{peak:9.0f} MB  {kind}")


if __name__ == "__main__":
    main()
