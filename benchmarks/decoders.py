"""How many decoders are at work at once where decoding is the limit, as on a machine with GPUs.

    python benchmarks/decoders.py [--cpus N] [--megabytes M] [--store S] [--rounds N] [--json FILE]

CPUs and a GPU are only booked: decoding sleeps and yields a unit of so many megabytes, the network
gives zeros, everything between them is real. In turn with what a run tells Ray Data about sharing
its resources (`cluster.leave_room_to_decode`) and without. Sizes are a sixteenth of what they are
there: units of 8 MB in an object store of 1 GiB, for units of 128 MB in 16 GiB, which is what a
machine with 16 CPUs has. Counted in the middle of the run, when all workers have started and none
has run out of work.
"""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from machine import summarised
from PIL import Image

from pipeline import cluster, run, score
from pipeline.config import Config
from pipeline.media.guard import Frames

_SLEEP_S = 0.8
_UNITS = 40  # for each decoder
_MIDDLE = 0.45, 0.8  # of the time between the first unit's start and the last one's end


class ZeroScoreUnits(score.ScoreUnits):
    """Scores without a network; everything else as it is. Defined here: pickled by value."""

    def __init__(self, config, weights, _shares, monitor) -> None:  # type: ignore[no-untyped-def]
        class Zeros:
            def score(self, frames):  # type: ignore[no-untyped-def]
                return np.zeros(len(frames), np.float32)

        self._scorers, self._refused = [Zeros()], None
        self.weights, self.config, self.monitor = weights, config, monitor


def at_work(cpus: int, megabytes: float, store: int, tuned: bool) -> dict[str, float]:
    """One run in this process: decoders that were at work on average, and that there were."""
    side = math.isqrt(round(megabytes * 1e6 / 3))

    def sleeping(units: pa.Table, _config: Config, run_id: str, *_: Any) -> Iterator[pa.Table]:
        pixels = bytes(3 * side * side)
        for unit in units.to_pylist():
            started = time.time()
            time.sleep(_SLEEP_S)
            row = score.begun(unit, run_id, 0) | {
                "pts_s": [0.0], "weight_s": [0.0], "wait_s": started, "decode_s": time.time(),
                "frame": {"width": side, "height": side},
            }  # fmt: skip
            yield score.with_frames([(row, Frames([0.0], [0.0], [side], [side], pixels))])

    score.UNITS = dataclasses.replace(score.UNITS, decode=sleeping, score=ZeroScoreUnits)
    if not tuned:
        cluster.leave_room_to_decode = lambda: None
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = max(1 << 20, round(megabytes * (1 << 20)))
    ray.init(
        address="local", num_cpus=cpus + cluster.SPARE_CPUS, num_gpus=1,
        object_store_memory=store << 20, include_dashboard=False, log_to_driver=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name, "in"), Path(name, "out")
        source.mkdir()
        for index in range(_UNITS * cpus):
            Image.new("RGB", (32, 32), (index % 256,) * 3).save(source / f"{index}.png")
        run.score_catalog(str(source), str(out), Config(), lambda *_, **__: None)
        record = json.loads((out / "run.json").read_text())
        found = pa.concat_tables(
            pq.read_table(path, columns=["wait_s", "decode_s"])
            for path in (out / "frame_scores").glob("*.parquet")
        )
    starts, ends = found["wait_s"].to_numpy(), found["decode_s"].to_numpy()
    first, last = starts.min(), ends.max()
    low, high = (first + share * (last - first) for share in _MIDDLE)
    busy = np.clip(np.minimum(ends, high) - np.maximum(starts, low), 0, None).sum()
    return {"decoders": record["cluster"]["decode_tasks"], "at work": busy / (high - low)}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpus", type=int, default=16)
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--store", type=int, default=1024, help="megabytes of the object store")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=["tuned", "untuned"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        tuned = options.one == "tuned"
        print(json.dumps(at_work(options.cpus, options.megabytes, options.store, tuned)))
        return
    rounds = []
    for _ in range(options.rounds):
        found: dict[str, float] = {}
        for way in ("untuned", "tuned"):
            command = [sys.executable, __file__, *sys.argv[1:], "--one", way]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
            )
            one = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("{")))
            found |= {"decoders": one["decoders"], f"at work, {way}": round(one["at work"], 1)}
        rounds.append(found)
        print(found, flush=True)
    summarised(rounds, "none", options.json)


if __name__ == "__main__":
    main()
