"""How long the commands take to start: `topiq --help`, and a run on one picture.

    python benchmarks/startup.py [--rounds N] [--json FILE]

Whole processes, in turn; medians in seconds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import described
from PIL import Image

from jobs.sample_media import landscape


def seconds(command: list[str]) -> float:
    """Wall time of a command."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    taken: dict[str, list[float]] = {"help": [], "one picture": [], "again": []}
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(landscape(384, 512)).save(f"{folder}/one.png")
        for index in range(options.rounds):
            run = [sys.executable, "-m", "jobs", "score", f"{folder}/one.png"]
            run += ["-o", f"{folder}/out{index}"]
            taken["help"].append(seconds([sys.executable, "-m", "jobs", "--help"]))
            taken["one picture"].append(seconds(run))
            taken["again"].append(seconds(run))
    medians = {name: round(statistics.median(times), 3) for name, times in taken.items()}
    print(medians)
    if options.json:
        options.json.write_text(json.dumps({"machine": described(), "seconds": medians}, indent=1))


if __name__ == "__main__":
    main()
