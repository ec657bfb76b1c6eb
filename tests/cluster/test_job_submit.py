"""The job as a cluster runs it: `ray job submit` to a head with two CPUs and token auth."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duckdb
import pytest
from PIL import Image

from jobs.sample_media import landscape

REPOSITORY = Path(__file__).parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head():
    """A Ray head of its own, on loopback, ended with everything that it started."""
    folder = Path(tempfile.mkdtemp(prefix="topiq-ray-"))  # socket paths must be short
    (folder / "token").write_text(secrets.token_hex(32))
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    port = free_port()
    process = subprocess.Popen(
        [
            "ray", "start", "--head", "--block", "--num-cpus=2", f"--port={free_port()}",
            f"--dashboard-port={port}", f"--temp-dir={folder}/ray",
            f"--dashboard-agent-listen-port={free_port()}",  # another Ray may have the usual one
            f"--object-store-memory={300 << 20}",
        ],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            assert process.poll() is None, "ray start ended by itself"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", environment
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)  # the node drains first
        shutil.rmtree(folder, ignore_errors=True)


def submitted(address, environment, folder):
    """`ray job submit`, as soon as the head takes jobs: its agent comes up after its dashboard."""
    deadline = time.monotonic() + 90
    while True:
        done = subprocess.run(
            [
                "ray", "job", "submit", "--address", address, "--working-dir", ".", "--",
                "python", "-m", "jobs.score", str(folder / "catalog"),
                "--output", str(folder / "out"),
            ],
            env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=180,
            check=False,
        )  # fmt: skip
        text = done.stdout + done.stderr
        if "No available agent" not in text or time.monotonic() > deadline:
            return done
        time.sleep(1)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_submitted_job_scores_and_resumes_on_a_cluster_of_two_cpus(head, tmp_path):
    """Twice: on the second run Ray Data's checkpoint filter books one of the two CPUs."""
    address, environment = head
    (tmp_path / "catalog").mkdir()
    summaries = []
    for index in range(2):
        picture = landscape(64, 96, seed=index)
        Image.fromarray(picture).save(tmp_path / "catalog" / f"{index}.png")
        done = submitted(address, environment, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        summaries.append(json.loads((tmp_path / "out/run.json").read_text())["summary"])
    assert [s["frames_scored"] for s in summaries] == [1, 1]
    assert [s["scored"] for s in summaries] == [1, 2]
    scored = duckdb.sql(f"SELECT count(*) FROM '{tmp_path}/out/scores/*.parquet'").fetchall()
    assert scored == [(2,)]
