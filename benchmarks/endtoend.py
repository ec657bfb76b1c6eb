"""The pipeline against its own parts: frames a second of a run over the slower of its two stages.

    python benchmarks/endtoend.py [--rounds N] [--model CARD] [--weights FILE] [--json FILE]

In turn, on one catalog: a whole run, decoding alone (the decode stage in as many processes as a run
has), and scoring alone (the frames in memory, as many scorers with as many threads as a run has).
Machines get faster and slower within the minutes of a run, so scoring alone is measured before and
after each, for half a minute or so, and is the mean of both. Of the run, the time of scoring
counts, in which both stages work; starting Ray and planning do not, starting scorers does. On a
machine without a GPU both stages share the CPUs, so the best that a run can do there is the
harmonic sum of the two, which is printed as well.

Weights of a model that is not bundled are made from the names of its parameters if no --weights are
given: they take as long as any.

With --decode-bound the network is a mean of pixels, as if GPUs scored faster than CPUs decode; then
a run is compared with decoding alone.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from machine import summarised
from model import made_weights

from jobs.sample_media import encode, landscape
from pipeline import cluster, score
from pipeline.config import Config
from pipeline.lookup import Lookup
from topiq_core import environment

SAMPLE = "fps:1"
FPS = 12


def clips(folder: Path, count: int, seconds: int) -> Path:
    """Copies of a 720p clip with a pan over a textured scene, keyframes every two seconds."""
    folder.mkdir()
    scene = landscape(720, 1280 + 4 * FPS * seconds, seed=0)
    frames = (np.ascontiguousarray(scene[:, 4 * i : 4 * i + 1280]) for i in range(FPS * seconds))
    options = {"preset": "veryfast"}
    first = encode(folder / "0.mp4", frames, fps=FPS, options=options, gop=2 * FPS)
    for index in range(1, count):
        shutil.copy(first, folder / f"{index}.mp4")
    return folder


def decode_one(row: dict[str, object]) -> int:
    """Decode one unit as a run does. Returns its frames."""
    import pyarrow as pa

    units = pa.Table.from_pylist([row])
    (found,) = score.decode_units(
        units, Config(sample=SAMPLE), "benchmark", Lookup({}), Lookup({}), None
    )
    return len(found["pts_s"][0])


def decode_only(plan: Path, workers: int) -> float:
    """Frames a second of the decode stage alone."""
    rows = pq.read_table(plan).to_pylist()
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(decode_one, rows[:workers]))  # starts the processes and their decoders
        started = time.perf_counter()
        frames = sum(pool.map(decode_one, rows))
        return frames / (time.perf_counter() - started)


_SCORE_ONLY = """
import sys, time
import numpy as np, torch
from pipeline.config import Config
from topiq_core import environment
from topiq_core import Scorer
torch.set_num_threads(int(sys.argv[1]))
scorer = Scorer.load(sys.argv[2], weights=sys.argv[3] or None, verify=False)
frames = np.random.default_rng(0).integers(0, 256, (16, 720, 1280, 3), np.uint8)
scorer.score(frames[:2])
print("ready", flush=True)
input()
started, done = time.perf_counter(), 0
while time.perf_counter() - started < 30:
    scorer.score(frames)
    done += len(frames)
print(done / (time.perf_counter() - started))
"""


def score_only(model: str, weights: str | None, threads: int, scorers: int) -> float:
    """Frames a second of the scorers alone, in processes like those of a run."""
    command = [sys.executable, "-c", _SCORE_ONLY, str(threads), model, weights or ""]
    env = os.environ | environment.CPU_SCORER
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True)
        for _ in range(scorers)
    ]
    for process in processes:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("a scorer did not start")
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in processes)


def whole(
    source: Path, out: Path, model: str, weights: str | None, scorers: int | None
) -> dict[str, Any]:
    """The record of a run, in a process of its own."""
    command = [
        sys.executable, "-m", "jobs.score", str(source), "-o", str(out), "--sample", SAMPLE,
        "--model", model,
    ]  # fmt: skip
    if scorers:
        command += ["--set", f"score_actors={scorers}"]
    if weights:
        command += ["--weights", weights, "--set", "verify_weights=false"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads((out / "run.json").read_text())
    return found


def without_network(source: Path, out: Path) -> dict[str, Any]:
    """The record of a run whose network is a mean of pixels."""
    growth = Path(__file__).with_name("growth.py")
    command = [sys.executable, str(growth), "--one", str(source), str(out), SAMPLE]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads((out / "run.json").read_text())
    return found


def decode_bound(source: Path, folder: Path, rounds: int) -> list[dict[str, float]]:
    """Frames a second of runs without a network, and of decoding alone."""
    out = []
    for index in range(rounds):
        record = without_network(source, folder / f"out{index}")
        (plan,) = (folder / f"out{index}" / "plan").iterdir()
        alone = decode_only(plan, record["cluster"]["decode_tasks"])
        run = record["summary"]["frames_per_s"]
        out.append({"run": run, "decode": round(alone, 3), "ratio": round(run / alone, 3)})
        print(out[-1], flush=True)
    return out


def against_both(source: Path, folder: Path, options: argparse.Namespace) -> list[dict[str, float]]:
    """Frames a second of runs, and of each stage alone."""
    model, weights = options.model, options.weights or made_weights(options.model, folder)
    # A short run tells how runs share this machine, with a clip for each scorer that it may have.
    first = clips(folder / "first", cluster.local_cpus(), FPS)
    shares = whole(first, folder / "out", model, weights, options.scorers)["cluster"]
    alone = model, weights, shares["threads"], shares["score_actors"]
    before = score_only(*alone)
    out = []
    for index in range(options.rounds):
        record = whole(source, folder / f"out{index}", model, weights, options.scorers)
        after = score_only(*alone)
        (plan,) = (folder / f"out{index}" / "plan").iterdir()
        found = {
            "run": record["summary"]["frames_per_s"],
            "decode": decode_only(plan, record["cluster"]["decode_tasks"]),
            "score": (before + after) / 2,
        }
        before = after
        found["ratio"] = found["run"] / min(found["decode"], found["score"])
        both = 1 / (1 / found["decode"] + 1 / found["score"])
        found["ratio_to_harmonic_sum"] = found["run"] / both
        out.append({k: round(v, 3) for k, v in found.items()})
        print(out[-1], flush=True)
    return out


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--model", default="cfanet_lite_nr")
    parser.add_argument("--weights")
    parser.add_argument("--scorers", type=int, help="in place of what a run would have")
    parser.add_argument("--decode-bound", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = clips(folder / "clips", options.clips, options.seconds)
        if options.decode_bound:
            rounds, what = decode_bound(source, folder, options.rounds), "a mean of pixels"
        else:
            rounds, what = against_both(source, folder, options), options.model
    summarised(rounds, what, options.json)


if __name__ == "__main__":
    main()
