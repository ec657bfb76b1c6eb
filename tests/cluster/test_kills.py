"""kill -9 of whoever takes part in a run, at any moment; then the same command again.

`make test` kills the driver of a run that started Ray itself, `make slow` a node of a cluster as
well; TOPIQ_KILLS=N in the environment (`make chaos`) makes N kills on the cluster.
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
from ray.cluster_utils import Cluster

from jobs.sample_media import encode, landscape, pan

REPOSITORY = Path(__file__).parents[2]
LONG_S = 240.0
KILLS = int(os.environ.get("TOPIQ_KILLS", "1"))
# Whom to kill, by what their command line begins with; a node and the driver are known otherwise.
VICTIMS = {
    "node": None,
    "driver": None,
    "scorer": "ray::MapWorker(MapBatches(ScoreUnits))",
    "decode worker": "ray::MapBatches(decode_units)",
    "decoder": f"{sys.executable} -m pipeline.media.child",
    "writer": "ray::Write",
}
# When: at a moment that the seed chooses, or as soon as the output shows a step of the protocol.
STEPS = {
    "any time": None,
    "ids pending": "_checkpoint/*.pending.parquet",
    "rows written": "frame_scores/*.parquet",
    "ids committed": "_checkpoint/*[0-9].parquet",
    "scores being replaced": "scores/*",
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


class Nodes:
    """A Ray cluster on this machine: a head for the driver and two nodes of two CPUs."""

    def __init__(self):
        head = {"num_cpus": 0, "object_store_memory": 150 << 20, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)
        self.workers = []
        self.add()
        self.add()

    def add(self):
        self.workers.append(
            self.cluster.add_node(num_cpus=2, object_store_memory=150 << 20, wait=False)
        )

    def kill(self, index):
        """All of a node's processes, as when its machine goes; another one comes in its place."""
        node = self.workers.pop(index)
        self.cluster.remove_node(node, allow_graceful=False)
        self.add()

    def processes(self, title):
        """Processes of the nodes whose command line begins with a title."""
        raylets = {p.process.pid for n in self.workers for p in n.all_processes["raylet"]}
        return titled(raylets, title)


@pytest.fixture(scope="module")
def nodes():
    nodes = Nodes()
    yield nodes
    nodes.cluster.shutdown()


def titled(ancestors, title):
    """Processes below given ones whose command line begins with a title; quick, for short ones."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = folder.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode()
            if command.startswith(title):
                process = psutil.Process(int(folder.name))
                if ancestors & {parent.pid for parent in process.parents()}:
                    found.append(process)
        except (OSError, UnicodeDecodeError, psutil.Error):
            continue
    return found


class Command:
    """`topiq score` in a process of its own, on the nodes or alone; its events as they come."""

    def __init__(self, catalog, out, nodes=None):
        self.log = out.with_suffix(".log").open("a")
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "jobs.score", str(catalog), "-o", str(out), "--json",
                "--sample", "all", "--set", "unit_frames=4", "--set", "units_per_commit=2",
            ],
            cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=self.log, text=True,
            start_new_session=True,
            env=os.environ | ({"RAY_ADDRESS": nodes.cluster.address} if nodes else {}),
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(KILLS))
def test_a_kill_at_any_moment_loses_and_repeats_nothing(
    catalog, nodes, undisturbed, tmp_path, seed
):
    expected, seconds = undisturbed
    chance = random.Random(seed)
    victim = list(VICTIMS)[seed % len(VICTIMS)]
    step = list(STEPS)[seed // len(VICTIMS) % len(STEPS)]
    out = tmp_path / "out"
    command = Command(catalog, out, nodes)
    try:
        assert command.planned.wait(LONG_S)
        if victim != "decode worker":  # those are done long before the rest
            await_step(command, out, step, chance, seconds)
        killed = kill(command, nodes, victim, chance, time.monotonic() + seconds)
        code = command.wait()
    finally:
        command.end()
    error = json.loads((out / "run.json").read_text()).get("error", "")
    print(f"seed {seed}: {victim}, {step}, killed {killed}, first run ended with {code} {error}")
    if victim == "driver" and killed:
        assert code == -signal.SIGKILL
    again = Command(catalog, out, nodes)
    assert again.wait() == 2
    assert command.prose == again.prose == [], "stdout is for events alone"
    assert_undisturbed(out, expected)
    # Whoever opened media or held a model is gone with the run that needed it.
    deadline = time.monotonic() + LONG_S
    while alive := [p for title in filter(None, VICTIMS.values()) for p in nodes.processes(title)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.2)


def test_a_killed_driver_takes_the_cluster_that_it_started_with_it(catalog, undisturbed, tmp_path):
    expected, seconds = undisturbed
    out = tmp_path / "out"
    command = Command(catalog, out)
    try:
        assert command.planned.wait(LONG_S)
        await_step(command, out, "rows written", random.Random(0), seconds)
        family = psutil.Process(command.process.pid).children(recursive=True)
        command.process.kill()
        assert command.wait() == -signal.SIGKILL
    finally:
        command.end()
    assert Command(catalog, out).wait() == 2
    assert_undisturbed(out, expected)
    # Ray's agents look for their raylet now and then, and end within a minute or two.
    _, alive = psutil.wait_procs(family, timeout=LONG_S)
    assert alive == []


def await_step(command, out, step, chance, seconds):
    """Until the moment that was chosen, or until the run has ended."""
    moment = time.monotonic() + chance.uniform(0, 0.8 * seconds)
    count = chance.randint(1, 2)
    seen = set()
    while command.process.poll() is None:
        if STEPS[step] is None:
            if time.monotonic() >= moment:
                return
        else:
            seen.update(out.glob(STEPS[step]))
            if len(seen) >= (1 if step == "scores being replaced" else count):
                return
        time.sleep(0.002)


def kill(command, nodes, victim, chance, until):
    """kill -9 one of that kind, as soon as there is one. Returns whether there was."""
    if victim == "driver":
        running = command.process.poll() is None
        command.process.kill()
        return running
    if victim == "node":
        nodes.kill(chance.randrange(len(nodes.workers)))
        return True
    spared = chance.randint(0, 4) if victim == "decode worker" else 0
    while time.monotonic() < until and command.process.poll() is None:
        for process in nodes.processes(VICTIMS[victim]):
            if spared:
                spared -= 1
                continue
            try:
                process.kill()
            except psutil.Error:
                continue
            return True
        time.sleep(0.005)
    return False


def flat(value):
    """All values in nested rows, in order."""
    if isinstance(value, list | tuple):
        return [inner for part in value for inner in flat(part)]
    return [value]


def assert_undisturbed(out, expected):
    """The tables are those of a run in peace, and nothing else is left."""
    found = tables(out)
    repeated = [u for u, n in Counter(u for u, *_ in found["units"]).items() if n > 1]
    assert not repeated
    # A scorer that has another number of threads may round another last digit.
    for name, rows in expected.items():
        assert flat(found[name]) == [
            pytest.approx(value, abs=1e-6) if isinstance(value, float) else value
            for value in flat(rows)
        ]
    left = [p.name for p in out.rglob("*") if "pending" in p.name or "partial" in p.name]
    assert left == []
    assert not (out / "_lease.json").exists()
