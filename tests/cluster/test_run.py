"""Whole runs on real media, with a real Ray."""

import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import av
import duckdb
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from web import serving

from jobs.sample_media import encode, landscape, pan
from pipeline import aggregate, catalog, cluster, lease, plan, run, schemas, score, stages
from pipeline.config import Config
from pipeline.errors import (
    CatalogError,
    ConfigError,
    LostUnits,
    OutputError,
    RunError,
    TooManyFailures,
)
from pipeline.output import Output
from pipeline.pooling import DEFAULT_POOLING
from topiq_core import cards, weights

MODEL = "cfanet_lite_nr"


class Recorder:
    """Keeps the events of a run."""

    def __init__(self):
        self.events = []

    def __call__(self, name, **fields):
        json.dumps(fields)  # every event must survive --json
        self.events.append((name, fields))

    def names(self):
        return [name for name, _ in self.events]


def score_into(source, out, **options):
    """A run with one scorer unless told otherwise, as each must load PyTorch first."""
    events = Recorder()
    config = Config(**{"score_actors": 1} | options)
    summary = run.score_catalog(str(source), str(out), config, events)
    return summary, events


def rows(out, table):
    return duckdb.sql(f"SELECT * FROM '{out}/{table}/*.parquet'").to_arrow_table().to_pylist()


FASTSTART = {"movflags": "faststart"}  # of an MP4: the index comes first, as on web servers


def silent_audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clips):
    """A catalog with something of everything; six items in it cannot be scored."""
    folder = tmp_path_factory.mktemp("catalog")
    for path in clips.values():
        shutil.copy(path, folder)
    photo = Image.fromarray(landscape(120, 160, seed=2))
    photo.save(folder / "photo.jpg", quality=90)
    photo.save(folder / "photo.dat", format="PNG")
    photo.rotate(90, expand=True).save(folder / "tall.webp")
    (folder / "notes.txt").write_text("not media, and nobody said that it was\n")
    (folder / "text.mp4").write_text("not a video\n")
    (folder / "empty.mp4").touch()
    whole = clips["h264.mp4"].read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "half.jpg").write_bytes((folder / "photo.jpg").read_bytes()[:1500])
    silent_audio(folder / "audio.mp4")
    Image.new("1", (9000, 6000)).save(folder / "huge.png")
    return folder


FAILURES = {
    "text.mp4": ("plan", "not_media"),
    "empty.mp4": ("plan", "not_media"),
    "truncated.mp4": ("plan", "decode_error"),
    "audio.mp4": ("plan", "no_video_stream"),
    "huge.png": ("plan", "too_large"),
    "half.jpg": ("decode", "decode_error"),
}


@pytest.fixture(scope="module")
def scored(tmp_path_factory, folder):
    out = tmp_path_factory.mktemp("outputs") / "out"
    summary, events = score_into(folder, out, sample="uniform:3", score_actors=0)
    return out, summary, events


def name_of(row):
    return row["uri"].rsplit("/", 1)[1]


def test_every_item_is_scored_or_failed_and_none_is_both(scored, folder):
    out, summary, _ = scored
    good = {name_of(r) for r in rows(out, "scores")}
    bad = {name_of(r) for r in rows(out, "failures")}
    media = {p.name for p in folder.iterdir()} - {"notes.txt"}
    assert good | bad == media
    assert not good & bad
    assert (summary.items, summary.scored, summary.failed) == (len(media), len(good), len(bad))
    assert summary.skipped == 1
    planned = {r["unit_id"] for r in rows(out, "plan")}
    done = [r["unit_id"] for t in ("frame_scores", "failures") for r in rows(out, t)]
    assert sorted(done) == sorted(planned)


def test_failures_have_a_stage_a_code_and_a_message_that_names_the_file(scored):
    out, summary, _ = scored
    found = {name_of(r): (r["stage"], r["code"]) for r in rows(out, "failures")}
    assert found == FAILURES
    for row in rows(out, "failures"):
        assert row["uri"] in row["message"]
        assert shlex.split(row["replay"]) == [
            "topiq", "score", row["uri"], "-o", "replay", '--set=sample="uniform:3"',
        ]  # fmt: skip
        assert row["score"] is None
        assert row["attempt"] == 1
    assert summary.failed_by_code == {
        code: sum(c == code for _, c in FAILURES.values())
        for code in dict.fromkeys(summary.failed_by_code)
    }


def test_an_item_score_is_the_mean_of_its_frames(scored):
    out, _, _ = scored
    frames = {r["item_id"]: r for r in rows(out, "frame_scores")}
    for row in rows(out, "scores"):
        unit = frames[row["item_id"]]
        assert row["n_frames"] == len(unit["score"]) == len(unit["pts_s"])
        assert row["score"] == pytest.approx(np.mean(unit["score"]), abs=1e-6)
        assert row["score_min"] == pytest.approx(min(unit["score"]))
        assert np.isfinite(row["score"])


def test_scores_carry_what_the_model_errs_by_also_when_they_are_pooled_anew(scored, tmp_path):
    curve = cards.find(MODEL)[0].calibration
    assert curve.rmse > 0
    assert {row["score_model_se"] for row in rows(scored[0], "scores")} == {curve.rmse}
    again = shutil.copytree(scored[0], tmp_path / "again")
    (again / "run.json").unlink()  # runs/ knows of all runs
    aggregate.run(Output(str(again)), MODEL, ("mean",))
    assert {row["score_model_se"] for row in rows(again, "scores")} == {curve.rmse}


def test_scores_carry_the_facts_of_the_media(scored, folder):
    out, _, _ = scored
    by_name = {name_of(r): r for r in rows(out, "scores")}
    clip = by_name["h264.mp4"]
    assert (clip["kind"], clip["codec"], clip["container"]) == ("video", "h264", "mov")
    assert (clip["width"], clip["height"], clip["fps"]) == (96, 64, 25.0)
    assert clip["duration_s"] == pytest.approx(1.6, abs=0.05)
    assert clip["size_bytes"] == (folder / "h264.mp4").stat().st_size
    assert (clip["matrix"], clip["matrix_tagged"], clip["model"]) == ("bt601", False, MODEL)
    tall = by_name["tall.webp"]
    assert (tall["kind"], tall["codec"], tall["width"], tall["height"]) == (
        "image", "webp", 120, 160,
    )  # fmt: skip
    assert by_name["photo.dat"]["codec"] == "png"


def test_the_tables_have_the_declared_schemas(scored):
    out, _, _ = scored
    expected = {
        "plan": schemas.PLAN,
        "frame_scores": schemas.OUTCOME,
        "failures": schemas.OUTCOME,
        "scores": schemas.scores(DEFAULT_POOLING, []),
    }
    for name, schema in expected.items():
        for path in (out / name).glob("*.parquet"):
            found = pq.read_schema(path)
            assert found.names == schema.names, path
            assert found.types == schema.types, path
            assert found.metadata[b"topiq_schema_version"] == b"1", path


def test_the_record_of_the_run_says_what_was_done(scored):
    out, summary, events = scored
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["summary"]["scored"] == summary.scored
    assert record["config"]["sample"] == "uniform:3"
    assert len(record["weights"]["sha256"]) == 64
    assert record["summary"]["bottleneck"] in ("decode", "score", "io", "overhead")
    assert record["stages"]["decode"]["frames_per_s"] > 0
    assert events.names()[0] == "run_started"
    assert events.names()[-1] == "finished"
    failed = [fields["uri"] for name, fields in events.events if name == "item_failed"]
    assert sorted(u.rsplit("/", 1)[1] for u in failed) == sorted(FAILURES)


def test_plan_and_stages_count_pixels_as_the_model_sees_them(scored):
    out, *_ = scored
    planned = {row["unit_id"]: row["scored_pixels"] for row in rows(out, "plan")}
    found = rows(out, "frame_scores")
    form = {row["unit_id"]: (row["frame"]["width"], row["frame"]["height"]) for row in found}
    assert all(planned[unit_id] == w * h for unit_id, (w, h) in form.items())

    def pixels(short_side):
        card = replace(weights.resolve(MODEL).card, short_side=short_side)
        (run_id,) = {row["run_id"] for row in found}
        shares = cluster.Shares(1, 1.0, 1, 1.0, 0.0, 1, 0.25, 2)
        score = stages.of_run(Output(str(out)), run_id, card, shares, 1.0).score
        return score.pixels_per_s * score.seconds

    exact = sum(len(row["score"]) * math.prod(form[row["unit_id"]]) for row in found)
    assert pixels(None) == pytest.approx(exact, rel=0.01)
    enlarged = sum(
        len(row["score"]) * math.prod(form[row["unit_id"]]) * (384 / min(form[row["unit_id"]])) ** 2
        for row in found
    )
    assert pixels(384) == pytest.approx(enlarged, rel=0.01)


def test_nothing_but_the_output_is_left_behind(scored):
    out, _, _ = scored
    names = {p.name for p in out.iterdir()}
    tables = {"plan", "frame_scores", "failures", "scores"}
    assert names == tables | {"run.json", "runs", "_checkpoint"}
    assert not [p for p in out.rglob("*") if "partial" in p.name or "pending" in p.name]


def actors_of_runs():
    """Processes of a run's own actors: its monitor and its scorers."""
    family = psutil.Process().children(recursive=True)
    return [p for p in family if re.match(r"ray::(Monitor|.*ScoreUnits)", title_of(p))]


def title_of(process):
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def test_no_process_of_a_run_outlives_it(scored):
    assert scored[1].frames_scored
    deadline = time.monotonic() + 30
    while left := actors_of_runs():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_the_same_command_again_decodes_and_changes_nothing(scored, folder):
    out, first, _ = scored
    before = {p: p.stat().st_mtime_ns for p in (out / "frame_scores").iterdir()}
    scores = rows(out, "scores")
    again, _ = score_into(folder, out, sample="uniform:3")
    assert again.frames_scored == 0
    assert (again.scored, again.failed) == (first.scored, first.failed)
    assert {p: p.stat().st_mtime_ns for p in (out / "frame_scores").iterdir()} == before
    assert rows(out, "scores") == scores


def test_a_second_run_opens_no_file_that_is_as_it_was(tmp_path, clips):
    """Files that would fail now, but have the size and time that they had, are not looked at."""
    folder = tmp_path / "catalog"
    folder.mkdir()
    for name in ("h264.mp4", "vp9.webm"):
        shutil.copy(clips[name], folder)
    out = tmp_path / "out"
    score_into(folder, out, sample="uniform:2")
    for path in folder.iterdir():
        state = path.stat()
        path.write_bytes(bytes(state.st_size))
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    manifest = tmp_path / "list.csv"
    for split in ("train", "test"):
        manifest.write_text(f"uri,split\ncatalog/h264.mp4,{split}\ncatalog/vp9.webm,train\n")
        again, _ = score_into(manifest, out, sample="uniform:2")
        assert (again.scored, again.failed, again.frames_scored) == (2, 0, 0)
        found = {name_of(r): r["split"] for r in rows(out, "scores")}
        assert found == {"h264.mp4": split, "vp9.webm": "train"}
    other, _ = score_into(folder, out, sample="uniform:3")
    assert other.failed == 2


def test_new_and_changed_files_are_scored_and_the_rest_is_not(tmp_path, clips):
    folder = tmp_path / "catalog"
    folder.mkdir()
    for name in ("h264.mp4", "vp9.webm"):
        shutil.copy(clips[name], folder)
    score_into(folder, tmp_path / "out", sample="uniform:2")
    before = {name_of(r): r["score"] for r in rows(tmp_path / "out", "scores")}
    encode(folder / "h264.mp4", pan(64, 96, 20, seed=9))
    shutil.copy(clips["av1.mp4"], folder)
    summary, events = score_into(folder, tmp_path / "out", sample="uniform:2")
    after = {name_of(r): r["score"] for r in rows(tmp_path / "out", "scores")}
    assert summary.frames_scored == 4
    assert set(after) == {"h264.mp4", "vp9.webm", "av1.mp4"}
    assert after["vp9.webm"] == before["vp9.webm"]
    assert after["h264.mp4"] != before["h264.mp4"]
    assert dict(events.events)["planned"]["gone"] == 0
    (folder / "vp9.webm").unlink()
    summary, events = score_into(folder, tmp_path / "out", sample="uniform:2")
    assert (summary.frames_scored, dict(events.events)["planned"]["gone"]) == (0, 1)
    assert {name_of(r) for r in rows(tmp_path / "out", "scores")} == {"h264.mp4", "av1.mp4"}


def test_other_sampling_replaces_scores_without_mixing(tmp_path, clips):
    path = clips["h264.mp4"]
    score_into(path, tmp_path / "out", sample="uniform:2")
    summary, _ = score_into(path, tmp_path / "out", sample="every:10")
    (row,) = rows(tmp_path / "out", "scores")
    assert (summary.frames_scored, row["n_frames"]) == (4, 4)


def test_another_policy_is_scored_anew_and_on_record(tmp_path):
    scene = np.pad(landscape(64, 96, seed=1), ((16, 16), (0, 0), (0, 0)))
    path = encode(tmp_path / "film.mp4", [scene] * 25, options={"crf": "8"})
    score_into(path, tmp_path / "out", sample="uniform:2")
    (whole,) = rows(tmp_path / "out", "scores")
    summary, _ = score_into(path, tmp_path / "out", sample="uniform:2", crop="auto")
    (cut,) = rows(tmp_path / "out", "scores")
    assert summary.frames_scored == 2
    assert (whole["crop"], whole["height"]) == (None, 96)
    assert (cut["crop"], cut["height"]) == ("96:64:0:16", 64)
    assert cut["score"] != whole["score"]


@pytest.fixture(scope="module")
def all_frames(tmp_path_factory, clips):
    """Every frame of one clip, scored alone."""
    out = tmp_path_factory.mktemp("alone")
    score_into(clips["h264.mp4"], out / "out", sample="all")
    (row,) = rows(out / "out", "frame_scores")
    return row


def test_scores_do_not_depend_on_neighbours_or_on_batches(tmp_path, clips, all_frames):
    folder = tmp_path / "fifty"
    folder.mkdir()
    for index in range(49):
        picture = landscape(48 + 16 * (index % 3), 64, seed=index)
        Image.fromarray(picture).save(folder / f"{index}.png")
    shutil.copy(clips["h264.mp4"], folder / "clip.mp4")
    options = {"sample": "all", "unit_frames": 7, "units_per_commit": 2}
    score_into(folder, tmp_path / "out", **options)
    units = [r for r in rows(tmp_path / "out", "frame_scores") if name_of(r) == "clip.mp4"]
    assert len(units) >= 6
    found = dict(pair for unit in units for pair in zip(unit["pts_s"], unit["score"], strict=True))
    assert sorted(found) == all_frames["pts_s"]
    for pts, value in zip(all_frames["pts_s"], all_frames["score"], strict=True):
        assert found[pts] == pytest.approx(value, abs=1e-6)


def test_units_of_one_item_are_pooled_together(tmp_path, clips, all_frames):
    score_into(clips["h264.mp4"], tmp_path / "out", sample="all", unit_frames=7)
    (row,) = rows(tmp_path / "out", "scores")
    assert row["n_units"] >= 6
    assert row["n_frames"] == 40
    assert row["score"] == pytest.approx(np.mean(all_frames["score"]), abs=1e-6)


def test_columns_of_the_manifest_come_out_beside_the_scores(tmp_path, clips):
    manifest = tmp_path / "list.csv"
    manifest.write_text(
        f",uri,split,score,O,p\n7,{clips['h264.mp4']},train,5,6,\n8,{tmp_path}/gone.mp4,test,1,2,\n"
    )
    for _ in range(2):  # once more with what is known by then
        summary, _ = score_into(manifest, tmp_path / "out", sample="uniform:1")
        (row,) = rows(tmp_path / "out", "scores")
        assert (row["split"], row["manifest_score"], row["unnamed"]) == ("train", 5, 7)
        assert (row["O"], row["p"]) == (6, None)
        assert summary.failed_by_code == {"not_found": 1}


@pytest.mark.parametrize(("name", "sample"), [("a.mkv", "uniform:10"), ("a.mp4", "keyframes")])
def test_a_video_that_breaks_off_is_scored_in_part_and_says_so(tmp_path, name, sample):
    whole = encode(tmp_path / "whole.mkv", pan(128, 192, 100), options={"crf": "10"}, gop=10)
    cut = tmp_path / name
    with av.open(str(whole)) as source, av.open(str(cut), "w", options=FASTSTART) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    os.truncate(cut, cut.stat().st_size // 2)
    summary, _ = score_into(cut, tmp_path / "out", sample=sample)
    (row,) = rows(tmp_path / "out", "scores")
    assert row["partial"]
    assert 0 < row["n_frames"] < 10
    # Samples less than half a second after the last frame are of that one.
    assert 8 <= row["n_frames"] + row["n_missing"] <= 10
    assert "missing" in row["message"]
    assert (summary.scored, summary.partial, summary.failed) == (1, 1, 0)


def test_more_failures_than_allowed_stop_the_run(tmp_path, folder):
    pictures = [folder / "half.jpg", *(tmp_path / f"{index}.jpg" for index in range(11))]
    for path in pictures[1:]:
        shutil.copy(folder / "photo.jpg", path)
    (tmp_path / "list.csv").write_text("uri\n" + "\n".join(map(str, pictures)) + "\n")
    out = tmp_path / "out"
    options = {"decode_tasks": 1, "units_per_commit": 1}
    with pytest.raises(TooManyFailures, match="more work units failed than the 0"):
        score_into(tmp_path / "list.csv", out, fail_on_error=True, **options)
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    # What stopped it is on record, and what was not begun is open.
    (failed,) = rows(out, "failures")
    assert (name_of(failed), failed["stage"]) == ("half.jpg", "decode")
    summary, _ = score_into(tmp_path / "list.csv", out, fail_on_error=True, **options)
    assert (summary.scored, summary.failed) == (11, 1)
    assert 0 < summary.frames_scored <= 11
    assert len(rows(out, "failures")) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_an_error_not_a_slow_night(tmp_path, clips):
    with pytest.raises(RunError, match="no GPU"):
        score_into(clips["h264.mp4"], tmp_path / "out", device="cuda")


@pytest.mark.parametrize("option", [{"measures": ("psnr",)}, {"align": "auto"}])
def test_what_needs_a_reference_is_refused_for_a_model_that_takes_none(tmp_path, clips, option):
    with pytest.raises(ConfigError, match=f"{MODEL} takes no reference"):
        score_into(clips["h264.mp4"], tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


def test_what_a_model_would_enlarge_over_the_limit_is_too_large(tmp_path):
    Image.new("RGB", (8000, 32)).save(tmp_path / "strip.png")
    table = catalog.read(str(tmp_path / "strip.png")).table
    for name in schemas.STATS:
        table = table.append_column(f"known_{name}", pa.nulls(1))
    for sides, code in (((), None), ((384,), "too_large")):
        planner = plan._Planner(Config(), MODEL, "", False, sides)
        assert planner(table, schemas.PLAN, None)["code"].to_pylist() == [code]
    planner = plan._Planner(Config(), MODEL, "", False, (16,), 16)
    assert planner(table, schemas.PLAN, None)["scored_pixels"].to_pylist() == [4000 * 16]


def test_what_is_gone_before_it_is_looked_at_leaves_a_row_only_if_its_name_says_media(tmp_path):
    for name in ("a.mp4", "b.mp4.part"):
        (tmp_path / name).touch()
    table = catalog.read(str(tmp_path)).table
    for name in schemas.STATS:
        table = table.append_column(f"known_{name}", pa.nulls(2))
    shutil.rmtree(tmp_path)
    planned = plan._Planner(Config(), MODEL, "", False)(table, schemas.PLAN, None)
    found = planned.select(["code", "unit_index"]).to_pylist()
    assert [tuple(row.values()) for row in found] == [("not_found", 0), (None, plan._SKIPPED)]


def a_scorer(gpus):
    shares = cluster.Shares(1, 1.0, 1, 1.0, gpus, 1, 0.25, 2)
    return score.ScoreUnits(Config(), [weights.resolve(MODEL)], shares, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU works here")
def test_a_gpu_that_does_not_work_is_the_reason_that_a_scorer_gives():
    with pytest.raises(RunError, match=rf"on node {socket.gethostname()}: .*no GPU.*(CUDA|NVIDIA)"):
        _ = a_scorer(1.0).scorers


_ON_BOOKED_GPUS = """
import dataclasses, sys
import numpy as np
import ray
from pipeline import run, score
from pipeline.config import Config


class CountingUnits(score.ScoreUnits):
    def __init__(self, config, weights, shares, monitor):
        class Counting:
            def score(self, frames):
                return np.full(len(frames), len(frames), np.float32)

        self._scorers, self._refused = [Counting()], None
        self.weights, self.config, self.monitor = weights, config, monitor


ray.init(
    address="local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False,
    object_store_memory=256 << 20,
)
config = Config(device="cuda", decode_tasks=1)
units = score.UNITS
score.UNITS = dataclasses.replace(units, score=CountingUnits)
run.score_catalog(sys.argv[1], sys.argv[2] + "/counted", config, lambda *_, **__: None)
score.UNITS = units
run.score_catalog(sys.argv[1], sys.argv[2] + "/own", config, lambda *_, **__: None)
"""


@pytest.fixture(scope="module")
def on_a_booked_gpu(tmp_path_factory):
    """Pictures scored where a GPU is one in Ray's ledger only: with a stub that counts frames, and
    as users do it.
    """
    folder, out = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("booked")
    for seed in range(48):
        Image.fromarray(landscape(32, 48, seed=seed)).save(folder / f"{seed}.png")
    command = [sys.executable, "-c", _ON_BOOKED_GPUS, str(folder), str(out)]
    return out, subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_scorer_with_a_gpu_has_pictures_of_many_items_at_once(on_a_booked_gpu):
    out, done = on_a_booked_gpu
    assert (out / "counted/scores").exists(), done.stderr
    at_once = [row["score"][0] for row in rows(out / "counted", "frame_scores")]
    assert len(at_once) == 48
    assert min(at_once) == 12  # of a fourth of the catalog, at least four parts for each decoder


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_run_says_why_a_booked_gpu_cannot_be_used(on_a_booked_gpu):
    out, done = on_a_booked_gpu
    assert done.returncode == 1
    assert re.search(r"RunError: on node .*device 'cuda': there is no GPU", done.stderr)
    assert rows(out / "own", "plan")


class LostGPU:
    """A scorer's network after its GPU has failed."""

    def score(self, _):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def score_on_a_lost_gpu():
    try:
        a_scorer(0.0)._score_rows(LostGPU(), [[np.zeros((64, 64, 3), np.uint8)]])
    finally:
        os._exit(7)


def test_a_scorer_whose_gpu_is_lost_ends_instead_of_failing_units():
    process = multiprocessing.get_context("spawn").Process(target=score_on_a_lost_gpu)
    process.start()
    process.join(60)
    assert process.exitcode == 1


def test_models_live_side_by_side_in_one_output(tmp_path, clips):
    from topiq_core import cards, weights
    from topiq_core.cfanet import CFANet

    shape = cards.Architecture("nr", "mobilenet_v2", inter_dim=8, heads=2, gate_dim=4)
    card = cards.Card("tiny", shape, "tiny.safetensors", "", "none", "nothing")
    weights.save(CFANet(shape), card, tmp_path / "tiny.safetensors")
    out = tmp_path / "out"
    score_into(clips["h264.mp4"], out, sample="uniform:2")
    score_into(clips["h264.mp4"], out, sample="uniform:2", model=str(tmp_path / "tiny.safetensors"))
    assert sorted(r["model"] for r in rows(out, "scores")) == [MODEL, "tiny"]
    assert sorted(r["model"] for r in rows(out, "frame_scores")) == [MODEL, "tiny"]


def test_a_catalog_without_media_is_an_error(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("nothing to see")
    with pytest.raises(CatalogError, match="no image and no video"):
        score_into(tmp_path / "notes", tmp_path / "out")


def test_a_half_written_file_of_a_killed_run_is_cleaned_up(tmp_path, clips):
    out = tmp_path / "out"
    score_into(clips["h264.mp4"], out, sample="uniform:2")
    scores = rows(out, "scores")
    (written,) = (out / "frame_scores").iterdir()
    (committed,) = (out / "_checkpoint").iterdir()
    # As a kill between the beginning of a write and its commit leaves them.
    written.write_bytes(written.read_bytes()[:100])
    committed.rename(committed.with_name(committed.stem + ".pending.parquet"))
    summary, _ = score_into(clips["h264.mp4"], out, sample="uniform:2")
    assert summary.frames_scored == 2
    assert [r["score"] for r in rows(out, "scores")] == [r["score"] for r in scores]
    assert not [p for p in out.rglob("*") if "pending" in p.name]


def test_a_damaged_table_is_named_and_what_was_in_it_is_made_again(tmp_path):
    """As a power failure leaves files."""
    folder, out = tmp_path / "catalog", tmp_path / "out"
    folder.mkdir()
    for index in range(3):
        Image.fromarray(landscape(64, 64, seed=index)).save(folder / f"{index}.png")
    first, _ = score_into(folder, out)
    scores = {name_of(r): r["score"] for r in rows(out, "scores")}
    table, *others = sorted((out / "frame_scores").iterdir())
    lost = pq.read_table(table, columns=["unit_id"])
    (out / "run.json").write_text("")
    for damaged in (out / f"plan/{MODEL}.parquet", table):
        os.truncate(damaged, 100)
        with pytest.raises(OutputError, match=damaged.name):
            score_into(folder, out)
        damaged.unlink()
    # As when its rows had been written, and committed, together with others that are still there.
    committed = out / "_checkpoint" / others[0].name.replace("-0.parquet", ".parquet")
    ids = pq.read_table(committed)
    pq.write_table(pa.concat_tables([ids, lost.cast(ids.schema)]), committed)
    with pytest.raises(LostUnits, match=f"^{lost.num_rows} planned work units"):
        score_into(folder, out)
    again, _ = score_into(folder, out)
    assert (first.scored, again.scored, again.frames_scored) == (3, 3, lost.num_rows)
    assert {name_of(r): r["score"] for r in rows(out, "scores")} == scores


def test_a_damaged_record_of_a_run_is_named_and_can_be_removed(scored, tmp_path):
    out = shutil.copytree(scored[0], tmp_path / "out")
    for record in (out / "runs").iterdir():
        record.write_text("{")
        with pytest.raises(OutputError, match=rf"{record.name}: .* Remove it"):
            aggregate.run(Output(str(out)), MODEL, DEFAULT_POOLING)
        record.unlink()
    aggregate.run(Output(str(out)), MODEL, DEFAULT_POOLING)
    assert {row["score_model_se"] for row in rows(out, "scores")} == {None}


def test_retry_tries_what_failed_again_and_leaves_the_rest(tmp_path, clips, monkeypatch):
    folder, out = tmp_path / "catalog", tmp_path / "out"
    folder.mkdir()
    shutil.copy(clips["h264.mp4"], folder)
    broken = folder / "photo.png"
    Image.fromarray(landscape(120, 160, seed=2)).save(broken)
    whole, state = broken.read_bytes(), broken.stat()

    def put(content):
        broken.write_bytes(content)
        os.utime(broken, ns=(state.st_atime_ns, state.st_mtime_ns))

    put(whole[:400] + bytes(len(whole) - 400))
    monkeypatch.chdir(tmp_path)
    first, _ = score_into(folder.name, out, sample="uniform:2")
    assert (first.scored, first.failed_by_code) == (1, {"decode_error": 1})
    monkeypatch.chdir("/")  # what is tried again is the folder that was meant
    put(whole)
    again, _ = score_into(folder, out, sample="uniform:2")
    assert (again.frames_scored, again.failed) == (0, 1)
    other = run.retry(str(out), ["decode_timeout"], Recorder())
    assert (other.frames_scored, other.failed) == (0, 1)
    events = Recorder()
    mended = run.retry(str(out), ["decode_error", "throttled"], events)
    assert ("reopened", {"units": 1}) in events.events
    assert (mended.scored, mended.failed, mended.frames_scored) == (2, 0, 1)
    assert {name_of(r): r["attempt"] for r in rows(out, "frame_scores")} == {
        "h264.mp4": 1, "photo.png": 2,
    }  # fmt: skip
    assert [(r["code"], r["attempt"]) for r in rows(out, "failures")] == [("decode_error", 1)]
    with pytest.raises(ConfigError, match="decode_eror"):
        run.retry(str(out), ["decode_eror"], Recorder())


def test_credentials_of_signed_addresses_are_nowhere_in_what_a_run_leaves(tmp_path, clips, capfd):
    secret = "s3cr3t-s1gnature"
    with serving(clips["h264.mp4"].parent) as base:
        names = ("h264.mp4", "vp9.webm", "gone.mp4")
        lines = [f"{base}/{name}?v=1&X-Amz-Signature={secret},ref.mp4" for name in names]
        (tmp_path / "list.csv").write_text("\n".join(["uri,reference_uri", *lines]) + "\n")
        summary, events = score_into(tmp_path / "list.csv", tmp_path / "out", sample="uniform:1")
    assert (summary.scored, summary.failed_by_code) == (2, {"not_found": 1})
    (failed,) = rows(tmp_path / "out", "failures")
    assert "ref.mp4" not in failed["replay"]  # the model takes none
    assert {r["uri"] for r in rows(tmp_path / "out", "scores")} == {
        f"{base}/{name}?v=1&X-Amz-Signature=REDACTED" for name in names[:2]
    }
    told = [repr(rows(tmp_path / "out", t)) for t in ("plan", "scores", "failures", "frame_scores")]
    told += [p.read_text() for p in (tmp_path / "out").rglob("*.json")]
    told += [repr(events.events), *capfd.readouterr()]
    assert len(told) >= 8
    for text in told:
        assert secret not in text


def test_material_that_is_only_partly_there_fails_when_that_is_asked_for(tmp_path):
    whole = encode(tmp_path / "whole.mkv", pan(128, 192, 100), options={"crf": "10"}, gop=10)
    (tmp_path / "cut.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    summary, _ = score_into(
        tmp_path / "cut.mkv", tmp_path / "out", sample="uniform:10", on_partial="fail"
    )
    assert (summary.scored, summary.failed_by_code) == (0, {"decode_error": 1})


@contextmanager
def scorers_killed(title):
    """Every scoring process whose title ends so is killed as soon as it is seen."""
    stopped = threading.Event()

    def kill():
        while not stopped.wait(0.02):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error, IndexError):
                    if process.cmdline()[0] == f"ray::MapWorker(MapBatches(ScoreUnits)){title}":
                        process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        stopped.set()
        killer.join()


@pytest.mark.slow
def test_a_scorer_that_keeps_dying_ends_the_run_with_a_reason(tmp_path, clips):
    """As when it is killed for want of memory each time; Ray alone would go on for ever."""
    options = {"sample": "all", "unit_frames": 4}
    with scorers_killed(".submit"), pytest.raises(RunError, match="ran out of memory"):
        score_into(clips["h264.mp4"], tmp_path / "out", **options)
    with scorers_killed(".__init__"), pytest.raises(RunError, match=r"nothing moved.*ScoreUnits"):
        score_into(clips["h264.mp4"], tmp_path / "out", no_progress_timeout_s=8, **options)
    summary, _ = score_into(clips["h264.mp4"], tmp_path / "out", **options)
    assert (summary.scored, summary.frames) == (1, 40)
    units = [r["unit_id"] for r in rows(tmp_path / "out", "frame_scores")]
    assert len(units) == len(set(units)) == 10


def test_files_that_hang_one_after_the_other_do_not_end_the_run(tmp_path):
    """A task gives up each of them in time; together they take longer than nothing may move."""
    hanging = [tmp_path / f"{index}.mp4" for index in range(6)]
    for path in hanging:
        os.mkfifo(path)
    pictures = [tmp_path / f"{index}.png" for index in range(18)]
    for path in pictures:
        Image.fromarray(landscape(64, 64)).save(path)
    listed = "\n".join(map(str, [*hanging, *pictures]))
    (tmp_path / "list.csv").write_text(f"uri\n{listed}\n")
    options = {"decode_timeout_s": 3, "decode_tasks": 1, "no_progress_timeout_s": 12}
    summary, _ = score_into(tmp_path / "list.csv", tmp_path / "out", **options)
    assert summary.failed_by_code == {"decode_timeout": 6}
    assert summary.scored == 18


def test_a_precision_that_a_node_refuses_is_the_reason_that_the_run_gives(tmp_path, clips):
    with pytest.raises(RunError, match=r"on node .*: precision 'fp16' is for GPUs"):
        score_into(clips["h264.mp4"], tmp_path / "out", precision="fp16", device="cpu")


def test_a_second_run_on_an_output_is_refused_and_the_first_goes_on(tmp_path, clips):
    out = tmp_path / "out"
    refused = []

    def second_run(name, **_):
        if name == "planned":
            with pytest.raises(OutputError, match="is writing to it") as caught:
                run.score_catalog(str(clips["vp9.webm"]), str(out), Config(), Recorder())
            refused.append(caught.value)

    summary = run.score_catalog(
        str(clips["h264.mp4"]), str(out), Config(sample="uniform:1"), second_run
    )
    assert refused
    assert summary.scored == 1
    assert not (out / "_lease.json").exists()


def test_a_folder_with_something_else_in_it_is_not_written_to(tmp_path, clips):
    (tmp_path / "thesis.doc").write_text("precious")
    with pytest.raises(OutputError, match=r"thesis\.doc"):
        score_into(clips["h264.mp4"], tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.doc"]


def test_lost_units_are_a_run_error_not_a_smaller_table(tmp_path, clips):
    score_into(clips["h264.mp4"], tmp_path / "out", sample="all", unit_frames=10)
    before = (tmp_path / "out/scores" / f"{MODEL}.parquet").read_bytes()
    lost = sorted((tmp_path / "out/frame_scores").iterdir())[0]
    lost.unlink()
    with pytest.raises(RunError, match="neither scored nor failed"):
        aggregate.run(Output(str(tmp_path / "out")), MODEL, DEFAULT_POOLING)
    assert (tmp_path / "out/scores" / f"{MODEL}.parquet").read_bytes() == before


def test_real_clips_are_scored_or_failed_for_a_reason(tmp_path, data_dir):
    """Every real clip is scored; every corrupt one fails for a reason or is partly scored."""
    summary, _ = score_into(data_dir / "clips", tmp_path / "clips", sample="uniform:1")
    assert (summary.scored, summary.failed, summary.partial) == (47, 0, 0)
    summary, _ = score_into(data_dir / "corrupt", tmp_path / "corrupt", sample="uniform:2")
    assert summary.items == 20
    codes = {r["code"] for r in rows(tmp_path / "corrupt", "failures")}
    assert codes <= {
        "decode_error", "encrypted", "no_frames", "no_video_stream", "unsupported_codec",
    }  # fmt: skip
    for row in rows(tmp_path / "corrupt", "scores"):
        assert name_of(row).split("__")[-1] in ("sample_with_invalid_nalu.mp4", "corrupted.mp4")


def test_a_run_that_lost_its_output_leaves_the_new_owners_record(tmp_path, clips, monkeypatch):
    """The other run takes over while this one starts Ray."""
    for name, seconds in (("PERIOD_S", 0.1), ("_SETTLE_S", 0.05), ("_SIGNAL_EVERY_S", 0.1)):
        monkeypatch.setattr(lease, name, seconds)
    theirs = json.dumps({"schema_version": schemas.SCHEMA_VERSION, "run_id": "theirs"})

    def taken_over(_):
        (tmp_path / "out/run.json").write_text(theirs)
        (tmp_path / "out" / lease.FILE).write_text(json.dumps({"owner": "they"}))
        threading.Event().wait(60)

    monkeypatch.setattr(cluster, "connect", taken_over)
    with pytest.raises(RunError, match="took this output over"):
        score_into(clips["h264.mp4"], tmp_path / "out")
    assert (tmp_path / "out/run.json").read_text() == theirs
