"""The command line as people run it: processes, exit codes, what is printed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.sample_media import landscape

MODEL = "cfanet_lite_nr"


def topiq(*args, module=None, **environment):
    command = [sys.executable, "-m", f"jobs.{module}" if module else "jobs", *map(str, args)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "COLUMNS": "100", **environment},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("catalog")
    for index in range(3):
        Image.fromarray(landscape(64, 96, seed=index)).save(folder / f"{index}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff but no more")
    return folder


@pytest.fixture(scope="module")
def scored(tmp_path_factory, folder):
    out = tmp_path_factory.mktemp("cli") / "out"
    return out, topiq("score", folder, "--output", out, "--json")


def test_some_failed_items_exit_with_2_and_are_counted(scored):
    out, done = scored
    assert done.returncode == 2, done.stderr
    record = json.loads((out / "run.json").read_text())
    assert (record["summary"]["scored"], record["summary"]["failed"]) == (3, 1)


def test_json_is_one_object_per_event_and_nothing_else_on_stdout(scored):
    _, done = scored
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[0]["event"] == "run_started"
    assert events[-1]["event"] == "finished"
    assert events[-1]["failed_by_code"] == {"decode_error": 1}
    assert all(isinstance(e["time"], float) for e in events)
    documented = (Path(__file__).parents[2] / "docs/events.md").read_text()
    for event in events:
        assert f"`{event['event']}`" in documented
        for field in event:
            assert f"`{field}`" in documented, f"{event['event']}.{field} is not documented"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["score", "/no/such/folder", "-o", "OUT"], "/no/such/folder"),
        (["score", "HERE", "-o", "OUT", "--sample", "fps:0"], "fps:0"),
        (["score", "HERE", "-o", "OUT", "--model", "topiq_xl"], "topiq_xl"),
        (["score", "HERE", "-o", "OUT", "--set", "colour=red"], "colour"),
        (["score", "HERE", "-o", "OUT", "--model", "topiq_nr", "--weights", "/gone.pth"], "gone"),
        (["score", "foo://bar", "-o", "OUT"], "foo://bar"),
        (["score", "HERE", "-o", "foo://bar"], "foo://bar"),
        (["filter", "OUT", "--where", "true", "--to", "OUT/keep.txt"], "keep.txt"),
        (["aggregate", "OUT"], "topiq score"),
        (["score", "HERE", "-o", "OUT", "--set", "a=["], "YAML"),
    ],
)
def test_a_user_error_is_one_clear_line_and_exit_code_1(tmp_path, folder, arguments, said):
    places = {"HERE": str(folder), "OUT": str(tmp_path / "out")}
    done = topiq(
        *[a.replace("OUT", places["OUT"]).replace("HERE", places["HERE"]) for a in arguments]
    )
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_filter_does_not_write_among_the_tables(scored):
    out, _ = scored
    done = topiq("filter", out, "--where", "true", "--to", out / "scores/keep.parquet")
    assert done.returncode == 1
    assert "lies among the output's own tables" in done.stderr
    assert not (out / "scores/keep.parquet").exists()


def test_filter_keeps_what_the_condition_says_and_counts_it(scored, tmp_path):
    out, _ = scored
    best = duckdb.sql(f"SELECT max(score) FROM '{out}/scores/*.parquet'").fetchall()[0][0]
    for suffix in ("parquet", "csv", "jsonl"):
        keep = tmp_path / f"keep.{suffix}"
        done = topiq("filter", out, "--where", f"score >= {best!r} and width = 96", "--to", keep)
        assert done.returncode == 0, done.stderr
        assert "kept 1 of 3" in done.stderr
        assert duckdb.sql(f"SELECT count(uri) FROM '{keep}'").fetchall() == [(1,)]


def test_a_wrong_condition_is_one_line_and_leaves_no_file(scored, tmp_path):
    out, _ = scored
    done = topiq("filter", out, "--where", "sharpness > 1", "--to", tmp_path / "keep.csv")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "sharpness" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_condition_cannot_read_or_write_other_files(scored, tmp_path):
    out, _ = scored
    (tmp_path / "secret.csv").write_text("a\n1\n")
    where = f"score > (SELECT max(a) FROM read_csv('{tmp_path}/secret.csv')) - 5"
    done = topiq("filter", out, "--where", where, "--to", tmp_path / "keep.csv")
    assert done.returncode == 1
    assert not (tmp_path / "keep.csv").exists()


def test_a_kept_manifest_is_scored_again_with_exit_code_0_and_its_scores_are_printed(
    scored, tmp_path
):
    keep, out = tmp_path / "keep.parquet", tmp_path / "out"
    topiq("filter", scored[0], "--where", "true", "--to", keep)
    done = topiq(keep, "--output", out, module="score")
    assert done.returncode == 0, done.stderr
    again = pq.read_table(out / "scores" / f"{MODEL}.parquet")
    assert again.num_rows == 3
    assert again["manifest_score"].to_pylist() == again["score"].to_pylist()
    lines = [f"{row['score']:.3f}  {row['uri']}" for row in again.to_pylist()]
    assert sorted(done.stdout.splitlines()) == sorted(lines)
    assert f"scores/{MODEL}.parquet" in done.stderr
    assert "Traceback" not in done.stderr


def test_aggregate_pools_anew_without_scoring(scored, tmp_path):
    out, _ = scored
    shutil.copytree(out, tmp_path / "copy")
    done = topiq("aggregate", tmp_path / "copy", "--set", "pooling=[mean,p25]")
    assert done.returncode == 0, done.stderr
    names = pq.read_schema(tmp_path / "copy/scores" / f"{MODEL}.parquet").names
    assert "score_p25" in names
    assert "score_p5" not in names


def test_plan_estimates_without_scoring(tmp_path, folder):
    done = topiq("plan", folder, "-o", tmp_path / "out", "--estimate", "--gpus", 2)
    assert done.returncode == 0, done.stderr
    assert "3 items, 3 frames" in done.stdout
    assert "megapixels a second" in done.stdout
    assert "on 2 devices" in done.stdout
    assert not (tmp_path / "out/frame_scores").exists()


def test_an_estimate_takes_the_speed_of_an_earlier_run_and_leaves_out_what_is_scored(
    scored, tmp_path, folder
):
    out, _ = scored
    copy = shutil.copytree(out, tmp_path / "copy")
    done = topiq("plan", folder, "-o", copy, "--estimate", "--speed-from", out / "run.json")
    assert done.returncode == 0, done.stderr
    assert f"of all CPU scorers in {out / 'run.json'}" in done.stdout
    stage = json.loads((out / "run.json").read_text())["stages"]["score"]
    assert f"{stage['pixels_per_s'] / 1e6:.1f} megapixels a second" in done.stdout
    assert "3 of them scored already" in done.stdout
    assert "0.000 gigapixels to score" in done.stdout


def test_a_wrong_command_line_is_not_mistaken_for_failed_items():
    done = topiq("score", "--no-such-option")
    assert done.returncode == 1
    assert "no-such-option" in done.stderr


def test_the_address_that_jobs_are_submitted_to_is_told_from_that_of_a_cluster(tmp_path, folder):
    done = topiq("score", folder, "-o", tmp_path / "out", RAY_ADDRESS="http://127.0.0.1:8265")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "ray job submit --address" in done.stderr


def test_credentials_in_an_address_are_not_in_the_error(tmp_path):
    address = "http://127.0.0.1:1/list.csv?X-Amz-Signature=s3cr3t"
    done = topiq("score", address, "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "X-Amz-Signature=REDACTED" in done.stderr
    assert "s3cr3t" not in done.stderr


def test_help_lists_every_verb():
    done = topiq("--help")
    assert done.returncode == 0
    for verb in ("score", "plan", "aggregate", "filter", "distort", "train"):
        assert verb in done.stdout
