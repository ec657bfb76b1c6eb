"""`topiq evaluate` as people run it: on rated pictures, with failures, again, and with a split."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter
from scipy import stats

from jobs import cli
from jobs.sample_media import landscape
from pipeline import evaluation, scatter
from pipeline.evaluation import Evaluation, Failed, Group, Measure
from pipeline.output import Output
from topiq_core import metrics

MODEL = "cfanet_lite_nr"
DOCS = Path(__file__).parents[2] / "docs"


def topiq(*args):
    return subprocess.run(
        [sys.executable, "-m", "jobs", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, "COLUMNS": "100"},
    )


def write_ratings(path, rows, header=("uri", "mos", "type", "split")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    """Ever stronger blur and noise of one picture, rated accordingly; two that cannot be scored."""
    folder = tmp_path_factory.mktemp("rated")
    clean = landscape(64, 96, seed=3)
    rng = np.random.default_rng(0)
    rows = []
    for level in range(6):
        blurred = Image.fromarray(clean).filter(ImageFilter.GaussianBlur(level))
        blurred.save(folder / f"blur{level}.png")
        noise = rng.normal(scale=12 * level, size=clean.shape)
        Image.fromarray(np.clip(clean + noise, 0, 255).astype(np.uint8)).save(
            folder / f"noise{level}.png"
        )
        split = "train" if level == 5 else "test"
        rows.append([f"blur{level}.png", 90 - 15 * level, "blur", split])
        rows.append([f"noise{level}.png", 88 - 14 * level, "noise", split])
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff but no more")
    rows += [["broken.jpg", 50, "blur", "train"], ["gone.png", 40, "other", "train"]]
    write_ratings(folder / "ratings.csv", rows)
    return folder


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, rated):
    out = tmp_path_factory.mktemp("evaluated") / "out"
    done = topiq("evaluate", rated / "ratings.csv", "-o", out, "--resamples", 50, "--json")
    assert done.returncode == 2, done.stderr
    return out, done


@pytest.fixture(scope="module")
def report(evaluated):
    return json.loads((evaluated[0] / "evaluation.json").read_text())


def test_failed_items_are_listed_and_counted_and_make_the_exit_code_2(report):
    assert (report["n_rated"], report["n_scored"], report["n_failed"]) == (14, 12, 2)
    found = {f["uri"].rsplit("/", 1)[1]: f["code"] for f in report["failed"]}
    assert found == {"broken.jpg": "decode_error", "gone.png": "not_found"}
    assert all(f["uri"] in f["message"] for f in report["failed"])


def test_the_numbers_are_those_of_the_scores_in_the_run_and_the_ratings(evaluated, report):
    table = pq.read_table(evaluated[0] / "run/scores" / f"{MODEL}.parquet")
    assert table.num_rows == 12
    scores, mos = (table[name].to_numpy() for name in ("score", "mos"))
    overall = report["overall"]
    assert overall["n"] == 12
    assert overall["srocc"]["value"] == pytest.approx(stats.spearmanr(scores, mos).statistic)
    assert overall["krocc"]["value"] == pytest.approx(stats.kendalltau(scores, mos).statistic)
    fitted = metrics.Curve(tuple(report["curve"]))(scores)
    assert overall["plcc"]["value"] == pytest.approx(stats.pearsonr(fitted, mos).statistic)
    assert overall["rmse"]["value"] == pytest.approx(np.sqrt(np.mean((fitted - mos) ** 2)))
    for measure in ("srocc", "krocc"):
        assert overall[measure]["low"] <= overall[measure]["value"] <= overall[measure]["high"]


def test_each_type_has_its_own_numbers_from_its_own_items(report):
    assert {name: group["n"] for name, group in report["by_type"].items()} == {
        "blur": 6,
        "noise": 6,
    }


def test_the_report_says_which_model_weights_and_run_it_is_of(evaluated, report):
    record = json.loads((evaluated[0] / "run/run.json").read_text())
    assert report["model"] == MODEL
    assert report["weights_sha256"] == record["weights"]["sha256"]
    assert len(report["weights_sha256"]) == 64
    assert report["run_id"] == record["run_id"]
    assert (report["resamples"], report["confidence"]) == (50, 0.95)


def test_the_report_for_people_holds_the_same_numbers(evaluated, report):
    text = (evaluated[0] / "evaluation.md").read_text()
    assert f"| all | 12 | {report['overall']['srocc']['value']:.4f} (" in text
    assert "| blur | 6 |" in text
    assert "`not_found`" in text
    assert report["weights_sha256"] in text
    assert ("scatter.png" in text) == (evaluated[0] / "scatter.png").exists()


def test_json_is_one_object_per_event_and_the_last_one_has_the_measures(evaluated, report):
    events = [json.loads(line) for line in evaluated[1].stdout.splitlines()]
    last = events[-1]
    assert last["event"] == "evaluated"
    assert last["srocc"] == report["overall"]["srocc"]
    documented = (DOCS / "events.md").read_text()
    for name in [*last, "evaluated"]:
        assert f"`{name}`" in documented or f"## {name}" in documented, name


def test_a_split_of_the_same_ratings_scores_nothing_again(evaluated, rated, report):
    out, _ = evaluated
    assert report["split"] is None
    done = topiq(
        "evaluate", rated / "ratings.csv", "-o", out, "--split", "split=test", "--resamples", 0
    )
    assert done.returncode == 0, done.stderr
    assert "nothing new to score" in done.stderr
    again = json.loads((out / "evaluation.json").read_text())
    assert (again["n_scored"], again["n_failed"], again["split"]) == (10, 0, "split=test")
    assert again["overall"]["srocc"]["low"] is None
    assert "| all | 10 |" in done.stdout


def test_every_field_of_the_report_is_documented():
    text = (DOCS / "accuracy.md").read_text()
    for kind in (Evaluation, Group, Measure, Failed):
        for name in kind.__dataclass_fields__:
            assert f"`{name}`" in text, name


def test_every_layout_is_documented():
    text = (DOCS / "accuracy.md").read_text()
    for name in evaluation.datasets.LAYOUTS:
        assert f"`{name}`" in text, name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["HERE/none.csv", "-o", "OUT"], "none.csv"),
        (["HERE", "-o", "OUT"], "--layout"),
        (["HERE", "-o", "OUT", "--layout", "koniq10k"], "koniq10k_distributions_sets.csv"),
        (["HERE", "-o", "OUT", "--layout", "koniq"], "koniq10k"),
        (["HERE/ratings.csv", "-o", "OUT", "--split", "split=val"], "test, train"),
        (["HERE/ratings.csv", "-o", "OUT", "--split", "type=other"], "5 or more"),
        (["HERE/ratings.csv", "-o", "HERE"], "Name a new or empty folder"),
        (["HERE/ratings.csv", "-o", "OUT", "--model", "topiq_xl"], "topiq_xl"),
        (["HERE/ratings.csv", "-o", "OUT", "--model", "topiq_nr,topiq_fr"], "one model at a time"),
    ],
)
def test_a_user_error_is_one_clear_line_and_exit_code_1(
    tmp_path, rated, monkeypatch, capsys, arguments, said
):
    places = {"HERE": str(rated), "OUT": str(tmp_path / "out")}
    given = [a.replace("OUT", places["OUT"]).replace("HERE", places["HERE"]) for a in arguments]
    monkeypatch.setattr(sys, "argv", ["topiq", *given])
    with pytest.raises(SystemExit) as ended:
        cli.main("evaluate")
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def example(**changes):
    group = Group(6, *[Measure(0.5, 0.25, 0.75)] * 4)
    fields = {
        "ratings": "r.csv", "layout": None, "split": None, "mos_range": None, "inverted": False,
        "model": MODEL, "weights_sha256": "0" * 64, "run_id": "r", "n_rated": 7, "n_scored": 6,
        "n_partial": 0, "n_failed": 1, "confidence": 0.95, "resamples": 1000, "seed": 0,
        "curve": (1.0, 0.0), "overall": group, "by_type": {}, "scatter": None,
        "failed": [Failed("a|b.png", "decode_error", "two\nlines")],
    }  # fmt: skip
    return Evaluation(**{**fields, **changes})


def test_names_and_messages_cannot_break_the_tables_of_the_report():
    text = evaluation.markdown(example())
    assert "| a\\|b.png | `decode_error` | two lines |" in text


def test_intervals_are_mentioned_only_where_there_are_any():
    assert "95% intervals, 1000 bootstrap" in evaluation.markdown(example())
    assert "intervals" not in evaluation.markdown(example(resamples=0))


def test_a_measure_that_is_not_defined_is_said_to_be_and_no_number():
    text = evaluation.markdown(example(overall=Group(3, *[Measure(None)] * 4)))
    assert "| all | 3 | undefined | undefined | undefined | undefined |" in text


@pytest.mark.skipif(not scatter.available(), reason="matplotlib is not installed")
def test_the_scatter_plot_is_a_picture_of_the_points_and_the_curve(tmp_path):
    scores = np.linspace(0, 1, 50)
    output = Output(str(tmp_path))
    for name, ratings in (("up.png", scores), ("down.png", 1 - scores)):
        with output.publish(name) as path:
            scatter.draw(path, scores, ratings, metrics.fit_curve(scores, ratings), MODEL)
    up, down = (np.asarray(Image.open(tmp_path / n).convert("L")) for n in ("up.png", "down.png"))
    assert min(up.shape) > 400
    assert up.shape == down.shape
    assert not np.array_equal(up, down)


def test_matplotlib_is_found_or_missed_without_importing_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert not scatter.available()
