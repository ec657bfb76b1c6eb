"""How a run grows with its catalog and with the length of a file: time, driver and object store.

    python benchmarks/growth.py [--units 1000 10000 100000] [--minutes 1 20] [--json FILE]

Each run is a process of its own and is real but for the network, which is replaced by a mean of
pixels: what is measured is everything around it. Catalogs are tiny pictures, one unit each; long
files are one small video of which every frame is a sample.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import ray
from machine import described
from PIL import Image

from jobs.sample_media import encode, landscape
from pipeline import run, score
from pipeline.config import Config

FPS = 25


class StubScoreUnits(score.ScoreUnits):
    """Scores by a mean of pixels; everything else as it is. Defined here: pickled by value."""

    def __init__(self, config, weights, _shares, monitor) -> None:  # type: ignore[no-untyped-def]
        class Stub:
            def score(self, frames):  # type: ignore[no-untyped-def]
                return np.array([frame[::8, ::8].mean() / 255 for frame in frames], np.float32)

        self._scorers, self._refused = [Stub()], None
        self.weights, self.config, self.monitor = weights, config, monitor


class Watch:
    """The most memory that this process and Ray's object store have held, in MB."""

    def __init__(self) -> None:
        self.driver, self.store = 0.0, 0.0
        self.base = psutil.Process().memory_info().rss / 1e6
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        from ray._private import internal_api

        while not self.ended.wait(0.2):
            self.driver = max(self.driver, psutil.Process().memory_info().rss / 1e6)
            if ray.is_initialized():
                try:
                    address = ray.get_runtime_context().gcs_address
                    state = internal_api.get_state_from_address(address)
                    stats = internal_api.get_memory_info_reply(state).store_stats
                    self.store = max(self.store, stats.object_store_bytes_used / 1e6)
                except Exception:  # the cluster is starting or ending
                    continue

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def one_run(source: str, out: str, sample: str) -> dict[str, float]:
    """A whole run in this process: seconds of its parts and peaks of memory."""
    score.UNITS = dataclasses.replace(score.UNITS, score=StubScoreUnits)
    events: dict[str, float] = {}

    def event(name: str, **_: object) -> None:
        events.setdefault(name, time.monotonic())

    started = time.monotonic()
    with Watch() as watch:
        summary = run.score_catalog(source, out, Config(sample=sample), event)
    record = json.loads(Path(out, "run.json").read_text())
    return {
        "units": record["plan"]["units"],
        "frames": summary.frames_scored,
        "seconds": round(time.monotonic() - started, 2),
        "plan_s": record["plan"]["seconds"],
        "score_s": round(time.monotonic() - events["planned"], 2),
        "driver_growth_mb": round(watch.driver - watch.base),
        "object_store_mb": round(watch.store),
    }


def pictures(folder: Path, count: int) -> Path:
    """Links to a few tiny pictures: what is in them does not matter here."""
    folder.mkdir()
    for seed in range(16):
        Image.fromarray(landscape(32, 32, seed=seed)).save(folder.parent / f"{seed}.png")
    for index in range(count):
        shard = folder / f"{index // 1000:04}"
        shard.mkdir(exist_ok=True)
        (shard / f"{index:06}.png").hardlink_to(folder.parent / f"{index % 16}.png")
    return folder


def video(path: Path, minutes: float) -> Path:
    """A small video of that length."""
    scene = landscape(90, 160 + 400, seed=1)
    frames = (
        np.ascontiguousarray(scene[:, i % 400 : i % 400 + 160])
        for i in range(round(minutes * 60 * FPS))
    )
    return encode(path, frames, options={"preset": "ultrafast"}, gop=50)


def apart(source: Path, sample: str) -> dict[str, float]:
    """A run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", str(source), folder + "/out", sample]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--minutes", type=float, nargs="*", default=[1, 20])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_run(*options.one)))
        return
    rows = []
    for count in options.units:
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"what": "units"} | apart(pictures(Path(folder, "c"), count), "uniform:1"))
            print(rows[-1], flush=True)
    for minutes in options.minutes:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(
                {"what": f"{minutes:g} minutes"}
                | apart(video(Path(folder, "v.mp4"), minutes), "all")
            )
            print(rows[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": described(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
