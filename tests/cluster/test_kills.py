"""kill -9 of whoever takes part in a run, at a random moment; then the same command again.

`make test` runs one seed, which kills the driver; TOPIQ_KILLS=N in the environment (`make chaos`)
runs N of them.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import duckdb
import psutil
import pytest
from PIL import Image

from jobs.sample_media import encode, landscape, pan

REPOSITORY = Path(__file__).parents[2]
LONG_S = 240.0
KILLS = int(os.environ.get("TOPIQ_KILLS", "1"))
# Whom to kill, by what their command line begins with; the driver is the command itself.
VICTIMS = {
    "driver": None,
    "scorer": "ray::MapWorker(MapBatches(ScoreUnits))",
    "decode worker": "ray::MapBatches(decode_units)",
    "decoder": f"{sys.executable} -m pipeline.media.child",
    "writer": "ray::Write",
}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    """Two clips, three photos, and one file that cannot be scored: 24 units of 4 frames."""
    folder = tmp_path_factory.mktemp("catalog")
    encode(folder / "one.mp4", pan(64, 96, 40, seed=1))
    encode(folder / "two.mkv", pan(64, 96, 40, seed=2))
    for seed in range(3):
        Image.fromarray(landscape(64, 96, seed=seed)).save(folder / f"{seed}.png")
    (folder / "bad.jpg").write_bytes((folder / "0.png").read_bytes()[:300])
    return folder


class Command:
    """`topiq score` in a process of its own; its events as they come."""

    def __init__(self, catalog, out):
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "jobs.score", str(catalog), "-o", str(out), "--json",
                "--sample", "all", "--set", "unit_frames=4", "--set", "units_per_commit=2",
            ],
            cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.planned = threading.Event()
        self.prose = []
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self):
        for line in self.process.stdout:
            try:
                if json.loads(line)["event"] == "planned":
                    self.planned.set()
            except ValueError:
                self.prose.append(line)
        self.planned.set()

    def wait(self):
        code = self.process.wait(LONG_S)
        self.reader.join()
        return code

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def family(self, title):
        """Processes below the command whose command line begins with a title."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
            except psutil.Error:
                pass
        return found


def tables(out):
    """What must not depend on what happened on the way."""
    units = duckdb.sql(
        f"SELECT unit_id, pts_s, score, weight_s, partial FROM '{out}/frame_scores/*.parquet' "
        "ORDER BY ALL"
    ).fetchall()
    items = duckdb.sql(
        f"SELECT * EXCLUDE (run_id) FROM '{out}/scores/*.parquet' ORDER BY uri"
    ).fetchall()
    failed = duckdb.sql(
        f"SELECT unit_id, code FROM '{out}/failures/*.parquet' ORDER BY ALL"
    ).fetchall()
    return {"units": units, "items": items, "failed": failed}


@pytest.fixture(scope="module")
def undisturbed(catalog, tmp_path_factory):
    """The tables of a run in peace, and how long it took after planning."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    command = Command(catalog, out)
    assert command.planned.wait(LONG_S)
    started = time.monotonic()
    assert command.wait() == 2  # the bad one
    return tables(out), time.monotonic() - started


@pytest.mark.parametrize("seed", range(KILLS))
def test_a_kill_at_any_moment_loses_and_repeats_nothing(catalog, undisturbed, tmp_path, seed):
    expected, seconds = undisturbed
    chance = random.Random(seed)
    victim = list(VICTIMS)[seed % len(VICTIMS)]
    out = tmp_path / "out"
    command = Command(catalog, out)
    family = []
    try:
        assert command.planned.wait(LONG_S)
        moment = time.monotonic() + chance.uniform(0, seconds)
        while time.monotonic() < moment and command.process.poll() is None:
            time.sleep(0.005)
        if command.process.poll() is None:
            family = psutil.Process(command.process.pid).children(recursive=True)
        killed = kill(command, victim, moment + seconds)
        code = command.wait()
    finally:
        command.end()
    if victim == "driver" and killed:
        assert code == -signal.SIGKILL
    again = Command(catalog, out)
    assert again.wait() == 2, f"{victim} killed: {killed}; first run ended with {code}"
    assert command.prose == again.prose == [], "stdout is for events alone"
    found = tables(out)
    repeated = [u for u, n in Counter(u for u, *_ in found["units"]).items() if n > 1]
    assert not repeated
    assert found == expected
    left = [p.name for p in out.rglob("*") if "pending" in p.name or "partial" in p.name]
    assert left == []
    assert not (out / "_lease.json").exists()
    # Ray's agents look for their raylet now and then, and end within a minute or two.
    _, alive = psutil.wait_procs(family, timeout=LONG_S)
    assert alive == []


def kill(command, victim, until):
    """kill -9 one of that kind, as soon as there is one. Returns whether there was."""
    if VICTIMS[victim] is None:
        command.process.kill()
        return True
    while time.monotonic() < until and command.process.poll() is None:
        for process in command.family(VICTIMS[victim]):
            try:
                process.kill()
            except psutil.Error:
                continue
            return True
        time.sleep(0.005)
    return False
