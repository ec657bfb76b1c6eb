"""Whole runs with a model that compares: real files, a real Ray."""

import json
from collections import Counter

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner
from web import serving

from jobs import cli
from jobs.sample_media import encode, landscape, pan
from pipeline import plan, run, schemas, score_pairs
from pipeline.catalog import read_pairs
from pipeline.config import Config
from pipeline.errors import CatalogError, ConfigError
from pipeline.media import guard
from topiq_core import weights
from topiq_core.cards import Architecture, Card
from topiq_core.cfanet import CFANet, initialise_head
from topiq_core.scorer import Scorer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A full-reference model that has learned nothing: its scores are numbers all the same."""
    torch.manual_seed(1)
    architecture = Architecture("fr", "mobilenet_v2", inter_dim=32, heads=2, gate_dim=8)
    net = CFANet(architecture)
    initialise_head(net)
    path = tmp_path_factory.mktemp("model") / "untrained_fr.safetensors"
    card = Card(
        name="untrained_fr", architecture=architecture, filename=path.name, sha256="",
        licence="Apache-2.0", trained_on="nothing", accuracy={}, recipe={},
    )  # fmt: skip
    weights.save(net, card, path)
    return str(path)


FRAMES = list(pan(96, 160, 50, seed=3))


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    """A ladder, pictures, and pairs that cannot be compared."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "ref").mkdir()
    (folder / "out").mkdir()
    encode(folder / "ref/a.mp4", FRAMES, options={"crf": "8"})
    for crf in ("20", "32", "38"):
        encode(folder / f"out/a_{crf}.mkv", FRAMES, options={"crf": crf})
    small = [np.asarray(Image.fromarray(f).resize((80, 48))) for f in FRAMES]
    encode(folder / "out/a_small.mp4", small, options={"crf": "20"})
    encode(folder / "out/a_late.mp4", FRAMES[5:], options={"crf": "20"})
    whole = (folder / "out/a_20.mkv").read_bytes()
    (folder / "out/a_cut.mkv").write_bytes(whole[: len(whole) // 2])
    (folder / "out/a_bad.mp4").write_bytes(b"not a video")
    encode(folder / "out/still.mp4", [landscape(96, 160, 1)] * 50)
    Image.fromarray(FRAMES[0]).save(folder / "ref/p.png")
    Image.fromarray(FRAMES[9]).save(folder / "out/p.png")
    ladder = ["a_20.mkv", "a_32.mkv", "a_38.mkv", "a_small.mp4", "a_late.mp4", "a_cut.mkv"]
    pairs = [(f"out/{name}", "ref/a.mp4") for name in (*ladder, "a_bad.mp4", "still.mp4")]
    pairs += [
        ("ref/a.mp4", "ref/a.mp4"),
        ("out/p.png", "ref/p.png"),
        ("out/p.png", None),
        ("out/p.png", "ref/a.mp4"),
        ("out/a_20.mkv", "ref/gone.mp4"),
    ]
    uris, references = zip(*pairs, strict=True)
    table = pa.table({"uri": uris, "reference_uri": references, "row": range(len(uris))})
    pa.parquet.write_table(table, folder / "pairs.parquet")
    return folder


def score(source, out, **options):
    """A run with one scorer, as each must load PyTorch first."""
    config = Config(**{"score_actors": 1} | options)
    return run.score_catalog(str(source), str(out), config, lambda *_, **__: None)


def rows(out, table):
    return duckdb.sql(f"SELECT * FROM '{out}/{table}/*.parquet'").to_arrow_table().to_pylist()


def name(uri):
    return uri.rsplit("/", 1)[-1]


@pytest.fixture(scope="module")
def scored(catalog, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "out"
    summary = score(
        catalog / "pairs.parquet", out, model=model, sample="uniform:5", align="auto",
        measures=("psnr", "ssim"), unit_frames=3,
    )  # fmt: skip
    return out, summary


def by_name(out):
    return {name(row["uri"]): row for row in rows(out, "scores")}


def test_every_pair_is_scored_or_fails_with_its_reason(scored, catalog):
    out, summary = scored
    assert set(by_name(out)) == {
        "a_20.mkv", "a_32.mkv", "a_38.mkv", "a_small.mp4", "a_late.mp4", "a_cut.mkv", "a.mp4",
        "p.png",
    }  # fmt: skip
    failed = {(name(r["uri"]), name(r["reference_uri"] or "")): r for r in rows(out, "failures")}
    codes = {pair: row["code"] for pair, row in failed.items()}
    assert codes == {
        ("a_bad.mp4", "a.mp4"): "not_media",
        ("still.mp4", "a.mp4"): "misaligned",
        ("p.png", ""): "unpaired",
        ("p.png", "a.mp4"): "unpaired",
        ("a_20.mkv", "gone.mp4"): "not_found",
    }
    assert "gone.mp4" in failed["a_20.mkv", "gone.mp4"]["message"]
    assert f'reference="{catalog}/ref/gone.mp4"' in failed["a_20.mkv", "gone.mp4"]["replay"]
    assert (summary.scored, summary.failed) == (8, 5)


def test_offsets_and_unmatched_frames_are_on_record(scored):
    found = by_name(scored[0])
    assert found["a_late.mp4"]["offset_s"] == pytest.approx(0.2, abs=0.02)
    assert found["a_late.mp4"]["confidence"] > 0.2
    for row in found.values():
        assert row["n_unmatched"] == 0
    assert found["a_20.mkv"]["n_matched"] == 50
    assert found["a_late.mp4"]["n_matched"] == 45
    for row in rows(scored[0], "frame_scores"):
        if name(row["uri"]) == "a_late.mp4":
            apart = np.array(row["reference_pts_s"]) - np.array(row["pts_s"])
            assert apart == pytest.approx(0.2, abs=1e-6)


def test_classic_measures_follow_the_quality(scored):
    found = by_name(scored[0])
    for measure in ("psnr_y", "psnr_weighted", "ssim"):
        order = [found[n][measure] for n in ("a.mp4", "a_20.mkv", "a_32.mkv", "a_38.mkv")]
        assert order == sorted(order, reverse=True)
    assert found["a.mp4"]["psnr_y"] == 60
    assert found["p.png"]["psnr_y"] > 5
    assert {row["ms_ssim"] for row in found.values()} == {None}


def test_what_was_scaled_and_what_was_cut_short_says_so(scored):
    found = by_name(scored[0])
    assert found["a_small.mp4"]["scaled_from"] == "80x48"
    assert (found["a_small.mp4"]["width"], found["a_small.mp4"]["height"]) == (160, 96)
    assert found["a_20.mkv"]["scaled_from"] is None
    assert [n for n, row in found.items() if row["partial"]] in ([], ["a_cut.mkv"])
    assert found["a_cut.mkv"]["n_frames"] < 5


def test_columns_of_the_manifest_are_carried_along(scored):
    table = rows(scored[0], "scores")
    assert {(name(r["uri"]), r["row"]) for r in table} >= {("a_20.mkv", 0), ("p.png", 9)}


def test_a_score_is_that_of_the_scorer_on_the_same_pictures(scored, model):
    expected = Scorer.load(model, device="cpu").score_pairs([FRAMES[9]], [FRAMES[0]])
    assert by_name(scored[0])["p.png"]["score"] == pytest.approx(float(expected[0]), abs=1e-6)


def test_company_does_not_change_a_score(scored, catalog, model, tmp_path):
    alone = tmp_path / "out"
    score(
        catalog / "out/a_32.mkv", alone, model=model, sample="uniform:5", align="auto",
        unit_frames=3, reference=str(catalog / "ref/a.mp4"),
    )  # fmt: skip
    (row,) = rows(alone, "scores")
    assert row["score"] == pytest.approx(by_name(scored[0])["a_32.mkv"]["score"], abs=1e-6)


def test_the_same_command_again_scores_nothing_and_a_new_reference_everything(
    catalog, model, tmp_path
):
    (tmp_path / "ref").mkdir()
    reference = encode(tmp_path / "ref/a_32.mp4", FRAMES, options={"crf": "8"})
    options = {"model": model, "sample": "uniform:2", "reference_root": str(tmp_path / "ref")}
    out = tmp_path / "out"
    source = catalog / "out/a_32.mkv"
    assert score(source, out, **options).frames_scored == 2
    assert score(source, out, **options).frames_scored == 0
    encode(reference, FRAMES[:40], options={"crf": "12"})
    assert score(source, out, **options).frames_scored == 2
    assert json.loads((out / "run.json").read_text())["config"]["reference_root"] == str(
        tmp_path / "ref"
    )


def test_a_reference_that_cannot_be_decoded_counts_as_a_try(catalog):
    unit = dict.fromkeys(schemas.PLAN.names) | {
        "unit_id": "1", "item_id": "1", "uri": str(catalog / "out/p.png"), "kind": "image",
        "model": "m", "unit_index": 0, "n_units": 1, "times_s": [0.0], "weights_s": [0.0],
        "reference_times_s": [0.0], "ladder_id": "l", "reference_uri": str(catalog / "gone.png"),
    }  # fmt: skip
    table = pa.Table.from_pylist([unit], schemas.PLAN).select(score_pairs.LADDERS.columns)
    ladders = score_pairs.as_ladders(table)
    (row,) = score_pairs.decode_ladders(ladders, Config(), "run", {}, {"1": 2}, None)
    (outcome,) = row["outcomes"][0].as_py()
    assert (outcome["code"], outcome["attempt"]) == ("not_found", 3)


def test_a_reference_that_is_damaged_is_opened_once_for_all_its_renditions(catalog, monkeypatch):
    asked = Counter()
    probe = guard.Guard.probe

    def counting(self, url, *args, **options):
        asked[name(url)] += 1
        return probe(self, url, *args, **options)

    monkeypatch.setattr(guard.Guard, "probe", counting)
    reference = catalog / "out/a_bad.mp4"
    listed = [f"{catalog}/out/{n}.mkv,{reference}" for n in ("a_20", "a_32", "a_38")]
    (catalog / "bad.csv").write_text("uri,reference_uri\n" + "\n".join(listed) + "\n")
    found = read_pairs(str(catalog / "bad.csv"), Config().references).table
    (catalog / "bad.csv").unlink()
    rows = plan._Planner(Config(), "m", "", True)(found, schemas.PLAN, None).to_pylist()
    assert [row["code"] for row in rows] == ["not_media"] * 3
    assert all(f"{row['uri']}: its reference cannot be used" in row["message"] for row in rows)
    assert asked["a_bad.mp4"] == 1


def test_a_ladder_of_five_decodes_each_reference_frame_once(catalog, monkeypatch):
    """Counted in the decoder itself: frames asked of the reference's file."""
    asked = Counter()
    decode_video = guard.Guard.decode_video

    def counting(self, url, times, *args, **options):
        asked.update((name(url), t) for t in times)
        return decode_video(self, url, times, *args, **options)

    monkeypatch.setattr(guard.Guard, "decode_video", counting)
    times = [0.2, 0.8, 1.4]
    common = dict.fromkeys(schemas.PLAN.names) | {
        "kind": "video", "model": "m", "unit_index": 0, "n_units": 1, "times_s": times,
        "weights_s": [0.6] * 3, "reference_times_s": times, "fps": 25.0, "ladder_id": "l",
        "reference_uri": str(catalog / "ref/a.mp4"),
    }  # fmt: skip
    renditions = ["a_20.mkv", "a_32.mkv", "a_38.mkv", "a_small.mp4", "a_20.mkv"]
    units = [
        common | {"unit_id": str(i), "item_id": str(i), "uri": str(catalog / "out" / n)}
        for i, n in enumerate(renditions)
    ]
    columns = score_pairs.LADDERS.columns
    ladders = score_pairs.as_ladders(pa.Table.from_pylist(units, schemas.PLAN).select(columns))
    assert ladders.num_rows == 1
    (row,) = score_pairs.decode_ladders(ladders, Config(), "run", {}, {}, None)
    assert [outcome["code"] for outcome in row["outcomes"][0].as_py()] == [None] * 5
    assert {asked["a.mp4", t] for t in times} == {1}
    assert len(row["frames"][0]) == 6 * 3


@pytest.mark.parametrize("scale_to", ["reference", "distorted"])
def test_either_side_can_give_the_size(catalog, model, tmp_path, scale_to):
    out = tmp_path / "out"
    score(
        catalog / "out/a_small.mp4", out, model=model, sample="uniform:2", scale_to=scale_to,
        reference=str(catalog / "ref/a.mp4"), measures=("psnr",),
    )  # fmt: skip
    (row,) = rows(out, "scores")
    expected = {"reference": (160, 96, "80x48"), "distorted": (80, 48, None)}[scale_to]
    assert (row["width"], row["height"], row["scaled_from"]) == expected
    assert row["psnr_y"] > 20


@pytest.mark.parametrize("scale_to", ["reference", "distorted"])
def test_a_stream_that_changes_its_size_is_brought_to_the_first_one(model, tmp_path, scale_to):
    small = [np.asarray(Image.fromarray(f).resize((128, 96))) for f in FRAMES]
    parts = [
        encode(tmp_path / f"{start}.ts", frames, times_s=[start + i / 25 for i in range(25)])
        for start, frames in enumerate((FRAMES[:25], small[25:]))
    ]
    for name in ("ref.ts", "dis.ts"):
        (tmp_path / name).write_bytes(b"".join(part.read_bytes() for part in parts))
    summary = score(
        tmp_path / "dis.ts", tmp_path / "out", model=model, reference=str(tmp_path / "ref.ts"),
        sample="uniform:4", measures=("psnr",), scale_to=scale_to,
    )  # fmt: skip
    assert (summary.scored, summary.frames) == (1, 4)
    (row,) = rows(tmp_path / "out", "frame_scores")
    assert row["psnr_y"] == [60, 60, 60, 60]  # the cap: the same pictures on both sides


def test_a_damaged_reference_fails_a_pair_when_that_is_asked_for(catalog, tmp_path):
    damaged = bytearray((catalog / "ref/a.mp4").read_bytes())
    begin, end = len(damaged) // 3, len(damaged) // 2
    damaged[begin:end] = bytes(end - begin)
    (tmp_path / "damaged.mp4").write_bytes(damaged)
    config = Config(sample="all", reference=str(tmp_path / "damaged.mp4"))
    found = read_pairs(str(catalog / "out/a_20.mkv"), config.references).table
    planned = plan._Planner(config, "m", "", True)(found, schemas.PLAN, None)
    ladders = score_pairs.as_ladders(planned.select(score_pairs.LADDERS.columns))
    for on_partial, code, partial in (("score", None, True), ("fail", "decode_error", False)):
        strict = config.model_copy(update={"on_partial": on_partial})
        (row,) = score_pairs.decode_ladders(ladders, strict, "run", {}, {}, None)
        (outcome,) = row["outcomes"][0].as_py()
        assert (outcome["code"], outcome["partial"]) == (code, partial)


def test_a_model_that_compares_asks_for_references(catalog, model, tmp_path):
    with pytest.raises(CatalogError, match="reference_uri"):
        score(catalog / "out", tmp_path / "out", model=model)
    with pytest.raises(ConfigError, match="takes no reference"):
        score(catalog / "out", tmp_path / "out", reference=str(catalog / "ref/a.mp4"))
    assert not (tmp_path / "out").exists()


def test_the_ladder_of_a_reference_is_printed_drawn_and_written(scored, tmp_path):
    out, _ = scored
    result = CliRunner().invoke(cli.application(), ["ladder", str(out), "--plots", str(tmp_path)])
    assert result.exit_code == 0, result.output
    printed = [line.split()[-1] for line in result.output.splitlines() if ".m" in line]
    table = rows(out, "ladders")
    assert [name(r["uri"]) for r in table] == printed[1:]
    assert [r["bit_rate"] for r in table] == sorted(r["bit_rate"] for r in table)
    assert "a.mp4" not in {name(r["uri"]) for r in table}
    assert {(r["width"], r["height"]) for r in table if "small" in r["uri"]} == {(80, 48)}
    (plot,) = tmp_path.iterdir()
    with Image.open(plot) as image:
        assert image.size[0] > 500


def test_two_models_score_the_same_frames_of_one_decode(catalog, model, tmp_path):
    out = tmp_path / "out"
    source = catalog / "out/a_32.mkv"
    options = {"sample": "uniform:4", "reference": str(catalog / "ref/a.mp4"), "unit_frames": 2}
    summary = score(source, out, model=f"cfanet_lite_nr,{model}", **options)
    assert (summary.model, summary.items) == ("untrained_fr,cfanet_lite_nr", 1)
    assert summary.frames_scored == 4
    found = {row["model"]: row for row in rows(out, "scores")}
    assert set(found) == {"untrained_fr", "cfanet_lite_nr"}
    log = rows(out, "frame_scores")
    assert Counter(row["model"] for row in log) == {"untrained_fr": 2, "cfanet_lite_nr": 2}
    assert len({row["unit_id"] for row in log}) == 4
    assert sum(row["decode_s"] is not None for row in log) == 2
    # The no-reference scores are those of a run without a reference, on the same frames.
    alone = tmp_path / "alone"
    score(source, alone, sample="uniform:4")
    (row,) = rows(alone, "scores")
    assert found["cfanet_lite_nr"]["score"] == pytest.approx(row["score"], abs=1e-6)
    assert score(source, out, model=f"{model},cfanet_lite_nr", **options).frames_scored == 0


def test_what_one_of_two_models_cannot_score_neither_scores(model, tmp_path):
    Image.fromarray(FRAMES[0][:20, :20]).save(tmp_path / "tiny.png")
    out = tmp_path / "out"
    summary = score(
        tmp_path / "tiny.png", out, model=f"{model},cfanet_lite_nr",
        reference=str(tmp_path / "tiny.png"),
    )  # fmt: skip
    assert (summary.scored, summary.failed_by_code) == (0, {"too_small": 1})
    failed = rows(out, "failures")
    assert {(r["model"], r["code"]) for r in failed} == {
        ("untrained_fr", "too_small"),
        ("cfanet_lite_nr", "too_small"),
    }
    for row in failed:
        assert [row[column] for column in schemas.NULL_WHEN_FAILED] == [None] * 7
    assert run.retry(str(out), ["too_small"], lambda *_, **__: None).failed == 1


def test_what_is_scaled_to_its_reference_is_planned_for_with_its_pixels(scored):
    out, _ = scored
    pixels = {name(r["uri"]): r["scored_pixels"] for r in rows(out, "plan") if r["code"] is None}
    assert pixels["a_small.mp4"] == pixels["a_20.mkv"] == 160 * 96


def test_a_signed_reference_is_not_recorded_and_must_be_given_to_a_retry_again(model, tmp_path):
    tiny, out, secret = tmp_path / "tiny.png", tmp_path / "out", "s3cr3t-s1gnature"
    Image.fromarray(FRAMES[0][:20, :20]).save(tiny)
    with serving(tmp_path) as base:
        signed = f"{base}/tiny.png?X-Amz-Signature={secret}"
        assert score(tiny, out, model=model, reference=signed).failed_by_code == {"too_small": 1}
    assert secret not in (out / "run.json").read_text()
    with pytest.raises(ConfigError, match=r"reference http.*REDACTED.*--set reference="):
        run.retry(str(out), [], lambda *_, **__: None)
    mended = run.retry(str(out), [], lambda *_, **__: None, settings=[f"reference={tiny}"])
    assert mended.failed_by_code == {"too_small": 1}
