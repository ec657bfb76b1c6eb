"""What a cluster that we start exposes."""

import os
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import pytest
import ray

from pipeline import cluster
from pipeline.config import Config

REPOSITORY = Path(__file__).parents[2]
PROGRAM = """
from pipeline import cluster
from pipeline.config import Config
cluster.connect(Config(object_store_bytes=100 << 20))
import psutil
family = [psutil.Process(), *psutil.Process().children(recursive=True)]
for process in family:
    for connection in process.net_connections("inet"):
        if connection.status == psutil.CONN_LISTEN:
            print(process.name(), connection.laddr.ip, connection.laddr.port)
"""


def test_a_cluster_started_here_listens_on_loopback_only():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    lines = [line.split() for line in done.stdout.splitlines()]
    listeners = [(name, ip) for name, ip, *port in lines if port]
    assert any("gcs_server" in name for name, _ in listeners)
    assert [ip for _, ip in listeners if not is_loopback(ip)] == []


def is_loopback(text):
    address = ip_address(text)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


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
    """Ray's ledger is given: this is the arithmetic on it."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus, "memory": memory_gb << 30})
    node = {"Alive": True, "Resources": {"CPU": cpus}}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    found = cluster.shares(Config(), pixels)
    assert (found.score_actors, found.threads) == (scorers, threads)
    booked = scorers * found.actor_cpus
    assert booked + found.decode_cpus + found.light_cpus <= cpus


@pytest.mark.parametrize(("cpus", "gpus", "share"), [(2, 1, 0.5), (4, 1, 0.25), (8, 8, 1.0)])
def test_scorers_on_gpus_leave_cpus_to_decode_with(monkeypatch, cpus, gpus, share):
    """Ray's ledger is given: this is the arithmetic on it."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus, "GPU": gpus})
    found = cluster.shares(Config(gpus_per_actor=share))
    assert found.score_actors == gpus / share
    left = cpus - found.score_actors * found.actor_cpus
    assert left >= found.decode_cpus + found.light_cpus
