"""What a cluster that we start exposes."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
import ray

from pipeline import cluster
from pipeline.config import Config
from topiq_core.environment import CPU_SCORER

REPOSITORY = Path(__file__).parents[2]
TOO_LARGE = """
import ray
from pipeline import cluster
from pipeline.config import Config
from pipeline.errors import RunError
try:
    cluster.connect(Config(object_store_bytes=1 << 50))
except RunError as error:
    print(ray.is_initialized(), error)
"""


HANGING = """
import atexit, os, time
import ray
from pipeline import cluster
from pipeline.config import Config

class Actor:
    def hang(self):
        atexit.register(time.sleep, 600)
        return os.getpid()

cluster.connect(Config(object_store_bytes=100 << 20))
actor = ray.remote(num_cpus=0)(Actor).remote()
print(ray.get(actor.hang.remote()))
del actor
while any(found["State"] != "DEAD" for found in ray._private.state.actors().values()):
    time.sleep(0.1)
"""


NOBODY = """
from pipeline import cluster
from pipeline.config import Config
from pipeline.errors import RunError
cluster._HEAD_PATIENCE_S = 1
try:
    cluster.connect(Config())
except RunError as error:
    print(error)
"""


SCORER = """
import json, os, sys
from contextlib import suppress
from pipeline import cluster  # before Ray, as commands do
from pipeline.config import Config
import psutil
import ray

class Actor:
    def environment(self):
        return dict(os.environ)

    def policies(self):
        before = policy()
        cluster.take_precedence()
        return before, policy()

def policy(pid=0):
    return os.sched_getscheduler(pid) if hasattr(os, "sched_getscheduler") else None

def looked_at():
    family = {"policies": [], "listeners": []}
    for process in (me := psutil.Process()).children(recursive=True) + [me]:
        with suppress(psutil.NoSuchProcess, ProcessLookupError):  # it has ended since
            command = process.cmdline() or [process.name()]
            script = next((part for part in command if part.endswith(".py")), command[0])
            if process != me:
                family["policies"].append((os.path.basename(script), policy(process.pid)))
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    family["listeners"].append((process.name(), connection.laddr.ip))
    return family

if sys.argv[1] == "started by others":
    ray.init(address="local", include_dashboard=False, object_store_memory=100 << 20, num_cpus=1)
before = policy()
cluster.connect(Config(object_store_bytes=100 << 20))
after = policy()
options = {"num_cpus": 0, "runtime_env": cluster.for_cpu_scorers()}
actor = ray.remote(Actor).options(**options).remote()
print(json.dumps({
    "driver": [before, after], "actor": ray.get(actor.policies.remote()),
    "environments": [dict(os.environ), ray.get(actor.environment.remote())], **looked_at(),
}))
"""

MINE = {"OMP_WAIT_POLICY": "ACTIVE", "MALLOC_TRIM_THRESHOLD_": "1000000"}


@pytest.fixture(scope="module")
def started_here():
    """What a process says that has started a cluster, and an actor in it."""
    return json.loads(run(SCORER, "started here", **MINE))


@pytest.fixture(scope="module")
def started_by_others():
    return json.loads(run(SCORER, "started by others", **MINE))


def run(program, *arguments, **variables):
    """What a program prints in a process that has started no Ray, as the tests' own may have."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | variables
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout


def test_a_cluster_started_here_listens_on_loopback_only(started_here):
    assert any("gcs_server" in name for name, _ in started_here["listeners"])
    assert [ip for _, ip in started_here["listeners"] if not is_loopback(ip)] == []


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="Linux has these policies")
def test_a_cluster_started_here_leaves_the_cpus_to_the_scorers(started_here):
    assert started_here["driver"] == [os.SCHED_OTHER, os.SCHED_OTHER]
    assert started_here["actor"] == [os.SCHED_BATCH, os.SCHED_OTHER]
    family = started_here["policies"]
    names = {name for name, _ in family}
    assert "raylet" in names
    assert not names & {"log_monitor.py", "monitor.py", "dashboard.py"}
    giving_way = {name for name, policy in family if policy == os.SCHED_BATCH}
    assert names - giving_way == {"ray::Actor"}


@pytest.mark.parametrize("ray_was", ["started_here", "started_by_others"])
def test_scorers_on_cpus_have_their_environment_and_the_driver_keeps_its_own(ray_was, request):
    driver, scorer = request.getfixturevalue(ray_was)["environments"]
    assert {name: driver.get(name) for name in CPU_SCORER} == {
        name: MINE.get(name, os.environ.get(name)) for name in CPU_SCORER
    }
    assert {name: scorer[name] for name in CPU_SCORER} == CPU_SCORER


def test_a_worker_that_hangs_as_it_exits_does_not_outlive_the_cluster():
    pid, deadline = int(run(HANGING)), time.monotonic() + 10
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_an_object_store_larger_than_the_memory_is_refused_before_anything_starts():
    started, message = run(TOO_LARGE).split(maxsplit=1)
    assert started == "False"
    assert "Lower object_store_bytes" in message


def test_an_address_where_no_cluster_listens_is_said_soon():
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    message = run(NOBODY, RAY_ADDRESS=address)
    assert message.startswith(f"RAY_ADDRESS {address}: this cluster cannot be joined")
    assert "unset RAY_ADDRESS" in message


def is_loopback(text):
    address = ip_address(text)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def ledger(monkeypatch, *nodes):
    """Ray's ledger as given: what is tested is the arithmetic on it."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    resources = [
        {"CPU": float(cpus), "memory": float(memory_gb << 30), "GPU": float(gpus)}
        for cpus, memory_gb, gpus in nodes
    ]
    total = {name: sum(node[name] for node in resources) for name in ("CPU", "memory", "GPU")}
    # Ray leaves out what a node has none of.
    kept = [{name: value for name, value in node.items() if value} for node in resources]
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": n} for n in kept])


def assert_decoders_have_room(found, nodes):
    """Wherever Ray places the scorers, some node can still take a decoder and a light task."""
    need = found.decode_cpus + found.light_cpus
    places = [cpus for cpus, *_ in nodes if cpus >= need]
    left = sum(places) - found.score_actors * found.actor_cpus
    # With less than `need` left on each of them, they would have less than this together.
    assert left >= need * len(places)
    assert 0 < found.actor_cpus <= max(places)


@pytest.mark.parametrize(
    ("cpus", "memory_gb", "pixels", "scorers", "threads"),
    [
        (2, 16, 1280 * 720, 2, 1),
        (2, 16, 25_000_000, 1, 2),
        (2, 3, 1920 * 1080, 1, 2),
        (16, 64, 1920 * 1080, 16, 1),
        (16, 64, None, 5, 3),
        (16, 4, 25_000_000, 4, 4),
    ],
)
def test_scorers_on_cpus_are_as_many_as_have_room_for_a_frame(
    monkeypatch, cpus, memory_gb, pixels, scorers, threads
):
    ledger(monkeypatch, (cpus, memory_gb, 0))
    found = cluster.shares(Config(), pixels)
    assert (found.score_actors, found.threads) == (scorers, threads)
    assert_decoders_have_room(found, [(cpus,)])


@pytest.mark.parametrize(
    ("nodes", "scorers"),
    [
        ([(4, 16, 0)] * 4, 16),
        ([(16, 64, 0)] * 8, 128),
        ([(1, 4, 0)] * 6, 6),
        ([(1, 4, 0)] * 2, 2),
        ([(2, 8, 0)] * 3, 6),
        ([(1, 4, 0), (1, 4, 0), (2, 8, 0)], 4),
        ([(1, 4, 0)] * 5 + [(2, 8, 0)], 7),
        ([(0, 32, 0), (16, 20, 0)], 8),  # of a head without CPUs memory is no room
        ([(8, 64, 0), (32, 8, 0)], 16),  # nor is that of another node
    ],
)
def test_scorers_of_a_cluster_are_counted_by_node_and_leave_room_to_decode(
    monkeypatch, nodes, scorers
):
    ledger(monkeypatch, *nodes)
    found = cluster.shares(Config(), 1920 * 1080)
    assert found.score_actors == scorers
    assert_decoders_have_room(found, nodes)


@pytest.mark.parametrize(
    ("nodes", "units", "scorers", "threads"),
    [
        ([(2, 16, 0)], 1, 1, 2),
        ([(16, 64, 0)], 3, 3, 4),
        ([(16, 64, 0)], 1000, 16, 1),
        ([(1, 4, 0)] * 6, 1, 1, 1),  # no node has a second CPU
        ([(8, 32, 4)], 2, 2, 1),
        ([(8, 32, 4)], 0, 1, 1),
    ],
)
def test_there_are_no_more_scorers_than_units(monkeypatch, nodes, units, scorers, threads):
    ledger(monkeypatch, *nodes)
    found = cluster.shares(Config(), 1920 * 1080, units)
    assert (found.score_actors, found.threads) == (scorers, threads)
    assert_decoders_have_room(found, nodes)


@pytest.mark.parametrize(
    ("nodes", "share"),
    [
        ([(2, 8, 1)], 0.5),
        ([(4, 16, 1)], 0.25),
        ([(8, 32, 8)], 1.0),
        ([(2, 8, 1)] * 4, 0.5),
        ([(0, 32, 0), (4, 16, 1), (4, 16, 1)], 0.25),
        ([(1, 4, 1)] * 8, 1.0),
        ([(8, 32, 4)], 0.75),  # one on each: no scorer has parts of two
    ],
)
def test_scorers_on_gpus_leave_cpus_to_decode_with(monkeypatch, nodes, share):
    ledger(monkeypatch, *nodes)
    found = cluster.shares(Config(gpus_per_actor=share))
    assert found.score_actors == sum(gpus for *_, gpus in nodes) * int(1 / share)
    assert_decoders_have_room(found, nodes)
