"""Full-reference training: split by source, resumable to the bit, exported and read back."""

import csv
import dataclasses

import numpy as np
import pytest
import torch
from golden.parameters import picture
from PIL import Image
from torchvision.models import mobilenet_v2

from topiq_core import weights
from topiq_core.cards import Architecture, Card
from topiq_core.cfanet import CFANet
from topiq_core.training import loop
from topiq_core.training.distortions import distort
from topiq_core.training.losses import order_loss
from topiq_core.training.pairs import (
    Pair,
    PairGroups,
    rated_as,
    read_pairs,
    source_name,
    split_beside,
    split_by_source,
)
from topiq_core.training.ratings import Rating, RatingsError, read_ratings, read_rgb

ARCHITECTURE = Architecture("fr", "mobilenet_v2", inter_dim=32, heads=2, gate_dim=8)
RECIPE = loop.Recipe(
    epochs=2, batch_size=8, crop=64, warmup_steps=1, group=4, order_weight=1.0, frozen_stages=2
)
KINDS, STEPS = ("jpeg", "white_noise"), (1, 3, 5)


@pytest.fixture(scope="module")
def pairs_csv(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    path = folder / "pairs.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["uri", "reference_uri", "mos", "type", "level", "source"])
        for number in range(4):
            image, name = picture(number, 80, 96), f"{number}.png"
            Image.fromarray(image).save(folder / name)
            table.writerow([name, name, 1, "identical", 0, f"photo {number}"])
            for kind in KINDS:
                for level in STEPS:
                    changed = f"{number}-{kind}-{level}.png"
                    Image.fromarray(distort(image, kind, level, 1)).save(folder / changed)
                    mos = 0.9 - 0.15 * level
                    table.writerow([changed, name, mos, kind, level, f"photo {number}"])
    return path


@pytest.fixture(scope="module")
def pairs(pairs_csv):
    return read_pairs(pairs_csv)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(5)
    return mobilenet_v2(weights=None).state_dict()


@pytest.fixture(scope="module")
def trained(pairs, backbone, tmp_path_factory):
    checkpoint = tmp_path_factory.mktemp("trained") / "run.pt"
    return loop.fit(ARCHITECTURE, RECIPE, pairs, backbone, checkpoint)


class Stopped(Exception):
    """Stands for the machine going away."""


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def test_a_resumed_training_of_pairs_ends_exactly_as_an_uninterrupted_one(
    trained, pairs, backbone, tmp_path, monkeypatch
):
    save = loop._save_checkpoint

    def save_and_stop(path, state):
        save(path, state)
        raise Stopped

    checkpoint = tmp_path / "run.pt"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_save_checkpoint", save_and_stop)
        with pytest.raises(Stopped):
            loop.fit(ARCHITECTURE, RECIPE, pairs, backbone, checkpoint)
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1
    torch.rand(1000)
    resumed = loop.fit(ARCHITECTURE, RECIPE, pairs, backbone, checkpoint)
    assert same(resumed.state_dict(), trained.state_dict())


def test_a_checkpoint_of_pairs_with_another_label_is_ignored(pairs, backbone, tmp_path, caplog):
    checkpoint = tmp_path / "run.pt"
    recipe = dataclasses.replace(RECIPE, epochs=1)
    loop.fit(ARCHITECTURE, recipe, pairs, backbone, checkpoint)
    other = [*pairs[:-1], dataclasses.replace(pairs[-1], mos=0.01)]
    loop.fit(ARCHITECTURE, recipe, other, backbone, checkpoint)
    assert "another run" in caplog.text


def test_frozen_stages_stay_and_the_others_learn(trained, backbone):
    after = trained.semantic_model.state_dict()
    changed = {
        int(key.split(".")[1]) for key in after if not torch.equal(after[key], backbone[key])
    }
    assert changed
    assert min(changed) == 4  # the two stages at strides 2 and 4 are features 0 to 3


def test_a_full_reference_model_is_exported_and_read_back(trained, pairs, tmp_path):
    path = tmp_path / "mine.safetensors"
    weights.save(trained, Card("mine", ARCHITECTURE, path.name, "", "", ""), path)
    loaded = weights.load(weights.resolve(path))
    scores = loop.score_pairs(loaded, pairs)
    assert scores == loop.score_pairs(loop.as_stored(trained), pairs)
    assert len(set(scores)) == len(scores)


def test_a_reference_shared_by_several_images_is_looked_at_as_if_repeated():
    torch.manual_seed(1)
    net = CFANet(ARCHITECTURE).eval()
    images, references = torch.rand(6, 3, 64, 64), torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        shared = net(images, references)
        repeated = net(images, references.repeat_interleave(3, 0))
    assert torch.allclose(shared, repeated, atol=1e-5)


def test_scores_of_pairs_come_in_the_order_of_the_pairs(trained, pairs):
    mixed = pairs[::-1]
    scores = loop.score_pairs(trained, mixed)
    for pair, score in list(zip(mixed, scores, strict=True))[::5]:
        image, reference = (read_rgb(p)[None].float() / 255 for p in (pair.path, pair.reference))
        with torch.inference_mode():
            assert float(trained(image, reference)) == pytest.approx(score, abs=1e-5)


def test_both_sides_of_a_pair_are_cropped_and_flipped_alike(tmp_path):
    """The distorted side is the reference plus one everywhere, so any other window would show."""
    one = np.random.default_rng(1).integers(0, 250, (80, 90, 3), dtype=np.uint8)
    Image.fromarray(one).save(tmp_path / "r.png")
    Image.fromarray(one + 1).save(tmp_path / "d.png")
    pair = Pair(tmp_path / "d.png", tmp_path / "r.png", 0.5, "jpeg", 1, "r")
    groups = PairGroups([pair], group=2, crop=48, seed=1)
    seen = set()
    for groups.epoch in range(12):
        distorted, reference, mos = groups[0]
        for image, label in zip(distorted, mos, strict=True):
            assert float((image - reference).mean() * 255) == pytest.approx(
                0 if label == 1 else 1, abs=1e-3
            )
            assert float((image - reference).std()) < 1e-6
            seen.add(float(label))
    assert seen == {0.5, 1.0}


def test_a_group_is_a_function_of_seed_epoch_and_index(pairs):
    def sample(seed, epoch):
        groups = PairGroups(pairs, 4, 48, seed)
        groups.epoch = epoch
        return groups[1][0]

    assert torch.equal(sample(1, 0), sample(1, 0))
    assert not torch.equal(sample(1, 0), sample(1, 1))
    assert not torch.equal(sample(1, 0), sample(2, 0))


def test_splits_share_no_source_and_are_complete(pairs):
    training, validation = split_by_source(pairs, seed=1, held_out=0.25)
    assert {p.source for p in training}.isdisjoint(p.source for p in validation)
    assert len({p.source for p in validation}) == 1
    assert sorted(map(str, training + validation)) == sorted(map(str, pairs))


def test_the_same_csv_serves_training_without_references(pairs_csv, pairs):
    rated = read_ratings(pairs_csv, (0, 1))
    assert [(r.path, r.mos) for r in rated] == [(p.path, p.mos) for p in pairs]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("uri,mos\na.png,1\n", "reference_uri"),
        ("uri,reference_uri,mos\na.png,,1\n", ":2:"),
        ("uri,reference_uri,mos\na.png,b.png,nan\n", "nan"),
        ("uri,reference_uri,mos\na.png,b.png,good\n", "good"),
        ("uri,reference_uri,mos\n", "no ratings"),
    ],
)
def test_a_pairs_file_that_cannot_be_used_is_named_with_the_reason(tmp_path, text, said):
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    with pytest.raises(RatingsError) as caught:
        read_pairs(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_sides_of_different_size_are_refused_by_name(tmp_path):
    Image.fromarray(picture(1, 80, 80)).save(tmp_path / "r.png")
    Image.fromarray(picture(1, 80, 82)).save(tmp_path / "d.png")
    pair = Pair(tmp_path / "d.png", tmp_path / "r.png", 0.5, "jpeg", 1, "r")
    with pytest.raises(RatingsError, match="d.png"):
        PairGroups([pair], group=1, crop=64, seed=1)[0]


def test_agreement_of_pairs_counts_ladders_and_references(tmp_path):
    def pair(kind, level, mos):
        return Pair(tmp_path / f"{kind}{level}", tmp_path / "r", mos, kind, level, "s")

    steps = (1, 2, 3, 4, 5)
    pairs = [pair("identical", 0, 1.0)]
    pairs += [pair(kind, level, 0.9 - level / 10) for kind in ("a", "b") for level in steps]
    good = [p.mos for p in pairs]
    found = loop.pair_agreement(good, pairs)
    assert found.srocc == pytest.approx(1)
    assert found.srocc_within_type == pytest.approx(1)
    assert (found.ladder_srocc, found.ladders_ordered) == (pytest.approx(1), 1)
    assert found.identical_on_top == 1
    swapped = [good[0] - 0.5, good[2], good[1], *good[3:]]
    found = loop.pair_agreement(swapped, pairs)
    assert found.srocc_within_type == pytest.approx(0.95)  # the mean of 0.9 and 1
    assert found.ladder_srocc == pytest.approx(0.95)
    assert found.ladders_ordered == 0.5
    assert found.identical_on_top == 0


def test_the_order_loss_is_zero_once_the_differences_are_reached():
    rated = torch.tensor([[1.0, 0.5, 0.2], [0.3, 0.3, 0.9]])
    assert float(order_loss(rated + 3, rated)) == pytest.approx(0, abs=1e-6)
    assert float(order_loss(2 * rated, rated)) == pytest.approx(0, abs=1e-6)
    assert float(order_loss(torch.zeros_like(rated), rated)) == pytest.approx(
        (0.5 + 0.8 + 0.3 + 0.6 + 0.6) / 5
    )
    assert float(order_loss(rated, torch.ones_like(rated))) == 0


NR = dataclasses.replace(ARCHITECTURE, mode="nr")
BESIDE = loop.Recipe(
    epochs=2, batch_size=2, crop=64, warmup_steps=1, group=4, order_weight=1.0, pair_batch=4,
    pair_crop=64, average=0.5, late=0.5, late_pair_crop=80, late_pair_batch=8,
    late_weight=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    ratings = []
    for number in range(6):
        path = folder / f"{number}.png"
        Image.fromarray(picture(number + 20, 96, 96)).save(path)
        ratings.append(Rating(path, number / 5))
    return ratings


def test_pairs_beside_ratings_change_what_is_learned_and_a_resumed_training_is_the_same(
    photos, pairs, backbone, tmp_path, monkeypatch
):
    alone = loop.fit(NR, BESIDE, photos, backbone, tmp_path / "alone.pt")
    straight = loop.fit(NR, BESIDE, photos, backbone, tmp_path / "both.pt", beside=pairs)
    assert not same(alone.state_dict(), straight.state_dict())
    save = loop._save_checkpoint

    def save_and_stop(path, state):
        save(path, state)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_save_checkpoint", save_and_stop)
        with pytest.raises(Stopped):
            loop.fit(NR, BESIDE, photos, backbone, tmp_path / "run.pt", beside=pairs)
    resumed = loop.fit(NR, BESIDE, photos, backbone, tmp_path / "run.pt", beside=pairs)
    assert same(resumed.state_dict(), straight.state_dict())


def test_what_is_returned_lies_between_the_weights_before_and_after_the_late_epochs(
    photos, pairs, backbone, tmp_path
):
    before, after, between = (
        loop.fit(NR, recipe, photos, backbone, tmp_path / f"{name}.pt", beside=pairs).state_dict()
        for name, recipe in (
            ("before", dataclasses.replace(BESIDE, epochs=1, late=0.0)),
            ("after", dataclasses.replace(BESIDE, late_weight=1.0)),
            ("between", dataclasses.replace(BESIDE, late_weight=0.25)),
        )
    )
    assert not same(before, after)
    for name, value in between.items():
        if value.is_floating_point():
            expected = 0.75 * before[name] + 0.25 * after[name]
            assert torch.allclose(value, expected, atol=1e-6), name


def test_other_pairs_beside_the_same_ratings_are_another_run(
    photos, pairs, backbone, tmp_path, caplog
):
    recipe = dataclasses.replace(BESIDE, epochs=1)
    loop.fit(NR, recipe, photos, backbone, tmp_path / "run.pt", beside=pairs)
    loop.fit(NR, recipe, photos, backbone, tmp_path / "run.pt", beside=pairs[7:])
    assert "another run" in caplog.text


def test_a_network_without_references_scores_pairs_by_their_distorted_pictures(pairs):
    net = CFANet(NR).eval()
    scores = loop.score_pairs(net, pairs[:4])
    with torch.inference_mode():
        alone = [float(net(read_rgb(p.path)[None].float() / 255)) for p in pairs[:4]]
    assert scores == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_no_photo_is_on_both_sides_of_a_split_in_any_form(tmp_path, seed):
    photos = [Rating(tmp_path / f"{number}.jpg", 0.5) for number in range(10)]
    held_out = photos[seed : seed + 2]
    sources = [source_name(photo.path) for photo in photos[:6]] + [
        f"pristine {n}" for n in range(8)
    ]
    pairs = [
        Pair(tmp_path / f"{source}-{level}", tmp_path / source, 0.5, "jpeg", level, source)
        for source in sources
        for level in (1, 2)
    ]
    kept, apart = split_beside(pairs, held_out, photos, seed, 0.25)
    assert sorted(kept + apart, key=str) == sorted(pairs, key=str)
    theirs, ours = ({pair.source for pair in side} for side in (apart, kept))
    assert not theirs & ours
    rated = {source_name(photo.path) for photo in held_out} & set(sources)
    assert {source for source in theirs if not source.startswith("pristine")} == rated
    assert sum(source.startswith("pristine") for source in theirs) == 2


def test_a_copy_of_a_rated_photo_is_worth_less_than_the_photo(pairs, tmp_path):
    poor, fine = Rating(tmp_path / "poor.jpg", 0.5), Rating(tmp_path / "fine.jpg", 0.95)
    identical, damaged = pairs[0], next(pair for pair in pairs if pair.level == 5)
    sources = [source_name(poor.path), source_name(fine.path), "nobody rated"]
    given = [
        dataclasses.replace(pair, source=source)
        for pair in (identical, damaged)
        for source in sources
    ]
    found = [pair.mos for pair in rated_as(given, [poor, fine], 0.1, 0.8)]
    below = 0.1 + 0.7 * damaged.mos
    assert found == pytest.approx([0.5, 0.8, 0.8, 0.1 + 0.4 * damaged.mos, below, below])
    worst = Rating(poor.path, 0.05)
    assert {p.mos for p in rated_as([given[0], given[3]], [worst], 0.1, 0.8)} == {0.05}


def test_a_group_rates_the_reference_itself_as_its_identical_pair_is(pairs):
    rated = [dataclasses.replace(pair, mos=pair.mos * 0.6) for pair in pairs]
    groups = PairGroups(rated, group=4, crop=64, seed=3)
    seen = set()
    for groups.epoch in range(8):
        for distorted, reference, mos in (groups[i] for i in range(len(groups))):
            same = [m for d, m in zip(distorted, mos.tolist(), strict=True) if d.equal(reference)]
            seen |= {round(m, 4) for m in same}
    assert seen == {0.6}
