"""Catalogs and outputs in an object store: a real server, and one that often fails."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import s3fs
from cluster.s3_server import ACCESS_KEY, LISTING, SECRET_KEY, FaultyProxy, environment, swift
from PIL import Image

from jobs.sample_media import encode, landscape, pan
from pipeline import catalog, storage

REPOSITORY = Path(__file__).parents[2]
LONG_S = 300


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with swift(tmp_path_factory.mktemp("swift")) as address:
        yield address


@pytest.fixture(scope="module")
def store(server):
    fs = s3fs.S3FileSystem(key=ACCESS_KEY, secret=SECRET_KEY, endpoint_url=server)
    fs.mkdir("bucket")
    return fs


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Two clips and two photos, by name."""
    folder = tmp_path_factory.mktemp("media")
    encode(folder / "one.mp4", pan(64, 96, 30, seed=1))
    encode(folder / "two.mkv", pan(64, 96, 30, seed=2))
    for seed in range(2):
        Image.fromarray(landscape(64, 96, seed=seed)).save(folder / f"{seed}.png")
    return folder


def score(address, source, out):
    """Run the command; returns its exit code and the last event."""
    done = subprocess.run(
        [
            sys.executable, "-m", "jobs.score", source, "-o", out, "--json", "--sample", "all",
            "--set", "unit_frames=15", "--set", "units_per_commit=2",
        ],
        cwd=REPOSITORY, env={**os.environ, **environment(address)},
        capture_output=True, text=True, timeout=LONG_S,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines, done.stderr[-3000:]
    last = json.loads(lines[-1])
    assert last["event"] == "finished", done.stderr[-3000:]
    assert SECRET_KEY not in done.stdout + done.stderr
    return done.returncode, last


def table(store, path):
    rows = []
    for file in store.glob(f"{path}/*.parquet"):
        rows += pq.read_table(io.BytesIO(store.cat_file(file))).to_pylist()
    return rows


def scores(store, out):
    """What must be the same wherever the media lay: scores by file name."""
    return {
        row["uri"].rsplit("/", 1)[1]: (row["n_frames"], row["score"], row["score_min"])
        for row in table(store, f"{out}/scores")
    }


def units(store, out):
    return sorted(
        (r["unit_id"], r["pts_s"], r["score"]) for r in table(store, f"{out}/frame_scores")
    )


def upload(store, media, prefix):
    for path in sorted(media.iterdir()):
        store.put_file(str(path), f"{prefix}/{path.name}")


def test_a_prefix_with_more_keys_than_a_listing_holds_is_listed_whole(store, server, monkeypatch):
    for name, value in environment(server).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    count = 2 * LISTING + 10
    store.pipe({f"bucket/many/{n:04}.png": b"x" for n in range(count)})
    found = catalog.read("s3://bucket/many/")
    assert found.table.num_rows == count
    assert found.table["uri"][count - 1].as_py() == f"s3://bucket/many/{count - 1:04}.png"


ODD = (
    "a b.png", "x#y.png", "q?z=1.png", "p%20c.png", "é.png", "s::1.png", "st*r[1].png", "d//e.png",
    "x&st=1.png", "x&st=2.png", "plus+.png",
)  # fmt: skip


def test_keys_with_odd_characters_are_listed_and_read_as_what_they_are(store, server, monkeypatch):
    for name, value in environment(server).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    for key in (*ODD, "folder/"):
        store.pipe_file(f"bucket/odd/{key}", key.encode())
    addresses = catalog.read("s3://bucket/odd").table["address"].to_pylist()
    found = {}
    for address in map(catalog.from_bytes, addresses):
        with storage.open_media(address) as file:
            found[address] = file.read().decode()
    assert found == {f"s3://bucket/odd/{key}": key for key in ODD}


@pytest.fixture(scope="module")
def calm(store, server, media):
    """A bucket scored into a bucket in peace, one object in it that is forbidden by the proxy."""
    upload(store, media, "bucket/media")
    store.put_file(str(media / "0.png"), "bucket/media/forbidden.png")
    code, last = score(server, "s3://bucket/media/", "s3://bucket/out")
    assert (code, last["scored"], last["frames_scored"]) == (0, 5, 63)
    return {"units": units(store, "bucket/out"), "scores": scores(store, "bucket/out")}


@pytest.mark.slow
def test_a_store_that_often_fails_gives_the_same_output(store, server, calm):
    """But for the one object that may not be read, which becomes a row in failures/."""
    with FaultyProxy(server, rate=0.05, seed=1).running() as proxy:
        code, last = score(proxy.address, "s3://bucket/media/", "s3://bucket/stormy")
    assert sum(proxy.faults[kind] for kind in proxy.kinds) >= 5, proxy.faults
    assert (code, last["scored"], last["partial"]) == (2, 4, 0)
    assert last["failed_by_code"] == {"access_denied": 1}
    (row,) = table(store, "bucket/stormy/failures")
    assert "forbidden.png" in row["message"]
    expected = {name: found for name, found in calm["scores"].items() if name != "forbidden.png"}
    assert scores(store, "bucket/stormy") == expected
    found = units(store, "bucket/stormy")
    assert len(found) == len(calm["units"]) - 1
    assert [unit for unit in calm["units"] if unit in found] == found


def test_new_and_changed_objects_are_scored_and_the_rest_is_not(store, server, media, calm):
    store.put_file(str(media / "1.png"), "bucket/media/0.png")  # changed
    store.put_file(str(media / "1.png"), "bucket/media/new.png")
    code, last = score(server, "s3://bucket/media/", "s3://bucket/out")
    assert (code, last["scored"], last["frames_scored"]) == (0, 6, 2)
    after = scores(store, "bucket/out")
    assert after["0.png"] == after["1.png"] == after["new.png"]
    for name in ("one.mp4", "two.mkv"):
        assert after[name] == calm["scores"][name]
    assert not [p for p in store.find("bucket/out") if "pending" in p or "_lease" in p]
