"""From photos to a full-reference model: `topiq distort`, then `topiq train --mode fr`."""

import csv
import os
import subprocess
import sys

import pytest
import torch
import typer
from golden.parameters import picture
from PIL import Image
from torchvision.models import mobilenet_v2

from jobs.distort import distort
from jobs.train import Mode, train
from topiq_core import cards, weights
from topiq_core.errors import TopiqError

SIDE = 176
CHOICE = {"seed": 3, "side": SIDE, "coded": 1, "compressed": 1, "others": 1, "best": 1}


def make(photos, output):
    distort(photos, output, processes=1, **CHOICE)
    with (output / "pairs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(3):
        Image.fromarray(picture(number, 200, 240)).save(folder / f"{number}.png")
    (folder / "mos.csv").write_text("image,mos\n0.png,20\n1.png,90\n2.png,50\n")
    return folder


@pytest.fixture(scope="module")
def made(photos, tmp_path_factory):
    output = tmp_path_factory.mktemp("made")
    return output, make([photos], output)


def test_photos_of_one_name_are_refused_before_any_is_made(photos, tmp_path):
    twin = tmp_path / "b" / "1.png"
    twin.parent.mkdir()
    Image.fromarray(picture(9, 200, 240)).save(twin)
    with pytest.raises(TopiqError, match=r"b/1\.png: called the same as .*1\.png"):
        make([photos, twin.parent], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_photo_becomes_ladders_and_an_identical_pair(made):
    output, rows = made
    assert len(rows) == 3 * (1 + 3 * 5)
    assert len({row["source"] for row in rows}) == 3
    for row in rows:
        for column in ("uri", "reference_uri"):
            with Image.open(output / row[column]) as image:
                assert (image.size, image.format) == ((SIDE, SIDE), "PNG")
        same = row["uri"] == row["reference_uri"]
        assert same == (row["type"] == "identical") == (float(row["mos"]) == 1)
    ladders = {}
    for row in rows:
        ladders.setdefault((row["reference_uri"], row["type"]), []).append(row)
    for (_, kind), ladder in ladders.items():
        levels = [int(row["level"]) for row in ladder]
        assert levels == ([0] if kind == "identical" else [1, 2, 3, 4, 5])
        labels = [float(row["mos"]) for row in ladder]
        assert labels == sorted(labels, reverse=True)


def test_the_set_is_decided_by_its_seed_and_made_once(made, photos, tmp_path):
    output, rows = made
    assert make([photos], tmp_path) == rows
    for row in rows[::7]:
        assert (tmp_path / row["uri"]).read_bytes() == (output / row["uri"]).read_bytes()
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    assert make([photos], tmp_path) == rows
    assert not list(tmp_path.rglob("*.png"))


def test_of_a_csv_the_best_photos_are_taken(photos, tmp_path):
    rows = make([photos / "mos.csv"], tmp_path)
    assert {row["source"].rpartition("-")[0] for row in rows} == {"1"}


def test_a_path_that_leads_nowhere_and_an_odd_side_are_refused(photos, tmp_path):
    with pytest.raises(TopiqError, match=r"gone\.png: no such picture"):
        make([tmp_path / "gone.png"], tmp_path / "out")
    with pytest.raises(typer.BadParameter, match="even"):
        distort([photos], tmp_path / "out", **(CHOICE | {"side": SIDE + 1}))
    assert not (tmp_path / "out").exists()


def test_no_photos_are_said_to_be_none(tmp_path):
    with pytest.raises(TopiqError, match="no photos"):
        make([tmp_path], tmp_path / "out")


@pytest.mark.parametrize("processes", [1, 2])
def test_pairs_become_a_full_reference_model_with_its_accuracy(made, tmp_path, processes):
    torch.manual_seed(5)
    torch.save(mobilenet_v2(weights=None).state_dict(), tmp_path / "imagenet.pth")
    model = tmp_path / "mine.safetensors"
    train(
        made[0] / "pairs.csv",
        model,
        tmp_path / "work",
        "three pictures",
        backbone=tmp_path / "imagenet.pth",
        mode=Mode.FR,
        splits=1,
        epochs=1,
        crop=64,
        batch_size=4,
        processes=processes,
    )
    card = cards.read_embedded(model)
    assert card.architecture.mode == "fr"
    assert {"srocc", "plcc", "srocc_within_type", "ladder_srocc"} <= set(card.accuracy)
    assert (card.recipe["splits"], card.recipe["crop"], card.recipe["group"]) == (1, 64, 4)
    assert card.recipe["start"].startswith("imagenet.pth ")
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"split0.pt", "final.pt"}


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rated")
    lines = ["image,mos"]
    for number in range(30):
        Image.fromarray(picture(number, 72, 72)).save(folder / f"rated {number}.png")
        lines.append(f"rated {number}.png,{3 * number}")
    (folder / "mos.csv").write_text("\n".join(lines) + "\n")
    torch.manual_seed(5)
    torch.save(mobilenet_v2(weights=None).state_dict(), folder / "imagenet.pth")
    return folder


def trained_on_ratings(rated, folder, **options):
    model = folder / "mine.safetensors"
    train(
        rated / "mos.csv",
        model,
        folder / "work",
        "thirty pictures",
        crop=64,
        **({"backbone": rated / "imagenet.pth", "splits": 1, "epochs": 1} | options),
    )
    return cards.read_embedded(model)


@pytest.mark.slow
def test_workers_of_ray_train_make_one_model(rated, tmp_path):
    model, work = tmp_path / "mine.safetensors", tmp_path / "work"
    done = subprocess.run(
        [
            sys.executable, "-m", "jobs.train", rated / "mos.csv",
            "--output", model, "--work", work, "--trained-on", "thirty pictures",
            "--backbone", rated / "imagenet.pth", "--splits", "0", "--epochs", "1",
            "--crop", "64", "--batch-size", "4", "--workers", "2",
        ],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert cards.read_embedded(model).recipe["workers"] == 2
    state = torch.load(work / "final.pt", weights_only=True)
    assert state["epoch"] == 1
    # Three steps each: 30 pictures in batches of 4 are 7, of which each worker takes its share.
    assert state["schedule"]["last_epoch"] == 3


def test_pairs_beside_ratings_are_measured_apart(made, rated, tmp_path):
    card = trained_on_ratings(rated, tmp_path, pairs=made[0] / "pairs.csv")
    assert {"srocc", "plcc", "pairs_srocc", "pairs_ladder_srocc"} <= set(card.accuracy)
    assert card.recipe["pair_batch"] > 0


def test_what_cannot_work_is_said_before_the_training(rated, tmp_path):
    few = tmp_path / "few.csv"
    few.write_text("image,mos\n" + "".join(f"{n}.png,{10 * n}\n" for n in range(9)))
    options = {"backbone": rated / "imagenet.pth", "crop": 64}
    with pytest.raises(typer.BadParameter, match="9 ratings are too few.*25 or more"):
        train(few, tmp_path / "m.safetensors", tmp_path / "w", "nine", **options)
    with pytest.raises(typer.BadParameter, match="--device gpu: cannot be used"):
        trained_on_ratings(rated, tmp_path, device="gpu")
    assert not (tmp_path / "w").exists()


def test_namesakes_are_refused_only_where_pairs_are_told_by_name(made, rated, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number in range(15):
            Image.fromarray(picture(number, 72, 72)).save(tmp_path / folder / f"{number}.png")
    lines = [f"{folder}/{n}.png,{5 * n}" for folder in "ab" for n in range(15)]
    (tmp_path / "mos.csv").write_text("\n".join(["image,mos", *lines]) + "\n")
    (tmp_path / "imagenet.pth").symlink_to(rated / "imagenet.pth")
    assert trained_on_ratings(tmp_path, tmp_path).accuracy
    with pytest.raises(TopiqError, match="one name in different folders"):
        trained_on_ratings(tmp_path, tmp_path / "work2", pairs=made[0] / "pairs.csv")


def test_the_same_seed_gives_the_same_accuracy(rated, tmp_path):
    one, other = (
        trained_on_ratings(rated, tmp_path / name, seed=4, patience=1, epochs=2) for name in "ab"
    )
    assert one.accuracy == other.accuracy
    assert one.recipe["patience"] == 1


def test_a_bundled_model_is_gone_on_from_without_a_backbone(rated, tmp_path):
    card = trained_on_ratings(rated, tmp_path, backbone=None, start="cfanet_lite_nr", splits=0)
    bundled, path = cards.find("cfanet_lite_nr")
    assert card.architecture == bundled.architecture
    assert card.recipe["start"].startswith("cfanet_lite_nr ")
    ours, theirs = (weights.load(weights.resolve(p)) for p in (tmp_path / "mine.safetensors", path))
    moved = [
        float((a - b).detach().abs().max())
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    ]
    assert 0 < max(moved) < 0.05  # three steps of warm-up away


def test_a_model_of_the_other_mode_is_not_gone_on_from(rated, tmp_path):
    with pytest.raises(typer.BadParameter, match="fr"):
        trained_on_ratings(rated, tmp_path, backbone=None, start="cfanet_lite_fr")
    with pytest.raises(typer.BadParameter, match="either"):
        trained_on_ratings(rated, tmp_path, start="cfanet_lite_nr")
