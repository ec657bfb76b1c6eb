"""Training is resumable to the bit, leaves the backbone's statistics alone, and reads its ratings
strictly."""

import csv
import dataclasses
import logging

import numpy as np
import pytest
import torch
from golden.parameters import fill, picture
from PIL import Image
from torchvision.models import mobilenet_v2

from pipeline.media.image import decode
from topiq_core import weights
from topiq_core.cards import Architecture, Card
from topiq_core.cfanet import CFANet
from topiq_core.errors import TopiqError
from topiq_core.training import loop
from topiq_core.training.losses import emd_loss, norm_in_norm, plcc_loss, quality_loss
from topiq_core.training.ratings import RatedImages, Rating, RatingsError, read_ratings, split

ARCHITECTURE = Architecture("nr", "mobilenet_v2", inter_dim=32, heads=2, gate_dim=8)
RECIPE = loop.Recipe(epochs=2, batch_size=2, crop=64, warmup_steps=2)


@pytest.fixture(scope="module")
def ratings_csv(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    path = folder / "ratings.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "mos"])
        for number in range(8):
            name = f"{number}.jpg"
            Image.fromarray(picture(number, 96, 96)).save(folder / name, quality=90)
            table.writerow([name, 1 + number / 2])
    return path


@pytest.fixture(scope="module")
def ratings(ratings_csv):
    return read_ratings(ratings_csv, (1, 5))


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(5)
    return mobilenet_v2(weights=None).state_dict()


@pytest.fixture(scope="module")
def trained(ratings, backbone, tmp_path_factory):
    """A network trained without interruption, and its checkpoint."""
    checkpoint = tmp_path_factory.mktemp("trained") / "run.pt"
    return loop.fit(ARCHITECTURE, RECIPE, ratings, backbone, checkpoint), checkpoint


class Stopped(Exception):
    """Stands for the machine going away."""


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_training_pass_is_the_plain_networks_and_so_are_its_gradients(layout):
    """It folds frozen norms and takes 1x1 convolutions for matrix products."""
    net = fill(CFANet(ARCHITECTURE, dropout=0.0)).to(memory_format=layout)
    images = torch.stack(
        [torch.from_numpy(picture(seed, 64, 96)).permute(2, 0, 1) / 255 for seed in range(2)]
    )
    found = []
    for training in (True, False):
        net.train(training)
        net.zero_grad()
        output = net(images)
        output.square().sum().backward()
        gradients = {k: p.grad for k, p in net.named_parameters() if p.grad is not None}
        found.append((output.detach(), gradients))
    (learning, its), (plain, whole) = found
    torch.testing.assert_close(learning, plain, rtol=1e-4, atol=1e-4)
    assert its.keys() == whole.keys()
    assert any(name.startswith("semantic_model") for name in whole)
    for name, gradient in whole.items():
        assert float((its[name] - gradient).norm()) <= 1e-3 * float(gradient.norm()), name


def stop_after_a_checkpoint(monkeypatch):
    save = loop._save_checkpoint

    def save_and_stop(path, state):
        save(path, state)
        raise Stopped

    monkeypatch.setattr(loop, "_save_checkpoint", save_and_stop)


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def test_a_resumed_training_ends_exactly_as_an_uninterrupted_one(
    trained, ratings, backbone, tmp_path, monkeypatch, caplog
):
    checkpoint = tmp_path / "run.pt"
    with monkeypatch.context() as patch:
        stop_after_a_checkpoint(patch)
        with pytest.raises(Stopped):
            loop.fit(ARCHITECTURE, RECIPE, ratings, backbone, checkpoint)
    after_one_epoch = torch.load(checkpoint, weights_only=True)["net"]
    straight = trained[0].state_dict()
    assert not same(after_one_epoch, straight)

    torch.rand(1000)  # where the random generator stands when a run is resumed must not matter
    with caplog.at_level(logging.INFO, logger="topiq_core"):
        resumed = loop.fit(ARCHITECTURE, RECIPE, ratings, backbone, checkpoint)
    assert "epoch 2 of 2" in caplog.text
    assert "epoch 1 of 2" not in caplog.text
    assert same(resumed.state_dict(), straight)
    assert not resumed.training
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_a_finished_training_is_not_repeated(trained, ratings, backbone):
    net, checkpoint = trained
    gone = [dataclasses.replace(r, path=r.path.parent / "gone" / r.path.name) for r in ratings]
    again = loop.fit(ARCHITECTURE, RECIPE, gone, backbone, checkpoint)
    assert same(again.state_dict(), net.state_dict())


@pytest.mark.parametrize(
    "other",
    [
        {"recipe": dataclasses.replace(RECIPE, epochs=1)},
        {"recipe": dataclasses.replace(RECIPE, epochs=1, seed=2)},
        {"architecture": dataclasses.replace(ARCHITECTURE, gate_dim=4)},
        {"mos": 0.25},
    ],
    ids=["epochs", "seed", "architecture", "ratings"],
)
def test_a_checkpoint_of_another_run_is_ignored_with_a_warning(
    trained, ratings, backbone, tmp_path, caplog, other
):
    architecture = other.get("architecture", ARCHITECTURE)
    recipe = other.get("recipe", dataclasses.replace(RECIPE, epochs=1))
    if "mos" in other:
        recipe = RECIPE
        ratings = [dataclasses.replace(ratings[0], mos=other["mos"]), *ratings[1:]]
    checkpoint = tmp_path / "run.pt"
    checkpoint.write_bytes(trained[1].read_bytes())
    found = loop.fit(architecture, recipe, ratings, backbone, checkpoint)
    assert "another run" in caplog.text
    afresh = loop.fit(architecture, recipe, ratings, backbone, tmp_path / "afresh.pt")
    assert same(found.state_dict(), afresh.state_dict())
    assert not same(found.state_dict(), trained[0].state_dict())


def test_training_leaves_batch_norm_as_the_backbone_had_it(trained, backbone):
    after = trained[0].semantic_model.state_dict()
    norms = [key.rpartition(".")[0] for key in after if key.endswith("running_mean")]
    assert len(norms) == 52
    for key, value in after.items():
        if key.rpartition(".")[0] in norms:
            assert torch.equal(value, backbone[key]), key
    # Everything else of the backbone has learned.
    learned = [key for key in after if key.rpartition(".")[0] not in norms]
    assert learned
    assert not any(torch.equal(after[key], backbone[key]) for key in learned)


def test_the_network_as_stored_is_the_one_its_file_gives_back(trained, tmp_path):
    path = tmp_path / "mine.safetensors"
    before = {key: value.clone() for key, value in trained[0].state_dict().items()}
    weights.save(trained[0], Card("mine", ARCHITECTURE, path.name, "", "", ""), path)
    stored = loop.as_stored(trained[0])
    assert same(trained[0].state_dict(), before)
    loaded = weights.load(weights.resolve(path))
    assert same(stored.state_dict(), loaded.state_dict())
    image = torch.from_numpy(picture(3, 64, 64)).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        # Trained in channels-last memory, where sums may be taken in another order.
        torch.testing.assert_close(stored(image), loaded(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("slope", "offset"), [(1.0, 0.0), (3.0, -2.0), (0.1, 4.0)])
def test_norm_in_norm_is_zero_for_an_increasing_affine_relation(slope, offset):
    rated = torch.linspace(0, 1, 8) ** 2
    assert float(norm_in_norm(slope * rated + offset, rated)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    "relation",
    [lambda x: -x, lambda x: x.flip(0), lambda x: x**2, lambda x: x.roll(1), torch.zeros_like],
    ids=["negated", "reversed", "squared", "rolled", "constant"],
)
def test_norm_in_norm_is_above_zero_and_at_most_one_otherwise(relation):
    rated = torch.linspace(0, 1, 8)
    assert 0.01 < float(norm_in_norm(relation(rated), rated)) <= 1


def test_norm_in_norm_of_opposite_pairs_is_one():
    rated = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert float(norm_in_norm(1 - rated, rated)) == pytest.approx(1)


def test_constant_predictions_have_a_finite_gradient():
    predicted = torch.full((4,), 0.5, requires_grad=True)
    quality_loss(predicted, torch.linspace(0, 1, 4)).backward()
    assert torch.isfinite(predicted.grad).all()


def test_the_quality_loss_is_squared_error_and_weighted_norm_in_norm():
    predicted, rated = torch.tensor([0.0, 0.5, 0.5]), torch.tensor([0.0, 0.5, 1.0])
    assert float(quality_loss(rated + 0.5, rated, 7.0)) == pytest.approx(0.25, abs=1e-5)
    extra = quality_loss(predicted, rated, 3.0) - quality_loss(predicted, rated, 1.0)
    assert float(extra) == pytest.approx(2 * float(norm_in_norm(predicted, rated)), rel=1e-5)


def test_a_sample_is_a_function_of_seed_epoch_and_index(ratings):
    def samples(seed, epoch):
        images = RatedImages(ratings, crop=48, seed=seed)
        images.epoch = epoch
        return torch.stack([images[i][0] for i in reversed(range(len(images)))])

    assert torch.equal(samples(1, 0), samples(1, 0))
    assert not torch.equal(samples(1, 0), samples(1, 1))
    assert not torch.equal(samples(1, 0), samples(2, 0))


def test_a_sample_is_a_crop_of_its_image_with_its_rating(ratings):
    images = RatedImages(ratings, crop=48, seed=1)
    flips = set()
    for index, rating in enumerate(ratings):
        crop, mos = images[index]
        assert crop.shape == (3, 48, 48)
        assert float(mos) == pytest.approx(rating.mos)
        whole = loop.read_rgb(rating.path).float() / 255
        windows = whole.unfold(1, 48, 1).unfold(2, 48, 1).permute(1, 2, 0, 3, 4)
        for flip in (False, True):
            wanted = crop.flip(2) if flip else crop
            if (windows == wanted).flatten(2).all(2).any():
                flips.add(flip)
                break
        else:
            pytest.fail(f"image {index}: its sample is no part of it")
    assert flips == {False, True}


def test_an_unreadable_photo_is_named(tmp_path):
    path = tmp_path / "torn.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0 torn")
    with pytest.raises(RatingsError) as caught:
        RatedImages([Rating(path, 0.5)], crop=64, seed=1)[0]
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("column", ["image", "uri"])
def test_ratings_are_scaled_and_their_names_are_relative_to_the_csv(tmp_path, column):
    path = tmp_path / "ratings.csv"
    path.write_text(f"mos,note,{column}\n20,x,a.jpg\n70,,deep/b.jpg\n")
    found = read_ratings(path, (20, 120))
    assert found == [Rating(tmp_path / "a.jpg", 0.0), Rating(tmp_path / "deep" / "b.jpg", 0.5)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,score\na.jpg,1\n", "columns `image` and `mos`"),
        ("image,score\na.jpg,1\n", "columns `image` and `mos`"),
        ("image,mos\na.jpg,1\n,2\n", ":3: columns `image` and `mos`"),
        ("image,mos\na.jpg\n", "columns `image` and `mos`"),
        ("", "no ratings"),
        ("image,mos\n", "no ratings"),
        ("image,mos\na.jpg,good\n", "good"),
        ("image,mos\na.jpg,\n", "''"),
    ],
)
def test_a_ratings_file_that_cannot_be_used_is_named_with_the_reason(tmp_path, text, said):
    path = tmp_path / "ratings.csv"
    path.write_text(text)
    with pytest.raises(RatingsError) as caught:
        read_ratings(path, (0, 1))
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("mos", ["nan", "inf"])
def test_a_rating_that_is_not_finite_is_refused(tmp_path, mos):
    """One such rating would turn every weight into NaN without an error."""
    path = tmp_path / "ratings.csv"
    path.write_text(f"image,mos\na.jpg,{mos}\n")
    with pytest.raises(RatingsError, match=mos):
        read_ratings(path, (0, 1))


def test_an_absent_ratings_file_is_named(tmp_path):
    path = tmp_path / "absent.csv"
    with pytest.raises(RatingsError) as caught:
        read_ratings(path, (0, 1))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("scale", "refused"), [((1, 5), False), ((5, 1), False), ((1, 3), True)])
def test_a_rating_off_its_scale_is_refused_by_line(tmp_path, scale, refused):
    path = tmp_path / "r.csv"
    path.write_text("image,mos\na.png,2\nb.png,4.5\n")
    if not refused:
        assert [0 <= r.mos <= 1 for r in read_ratings(path, scale)] == [True, True]
        return
    with pytest.raises(RatingsError, match=r"r\.csv:3: 4\.5 is not .* 1 to 3.*--mos-high"):
        read_ratings(path, scale)


def test_an_empty_rating_scale_is_refused(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_text("image,mos\na.jpg,3\n")
    with pytest.raises(RatingsError):
        read_ratings(path, (5, 5))


def test_fewer_ratings_than_one_batch_are_refused(ratings, backbone, tmp_path):
    """Without a single step the network would be exported as it started."""
    recipe = dataclasses.replace(RECIPE, batch_size=9)
    with pytest.raises(RatingsError):
        loop.fit(ARCHITECTURE, recipe, ratings, backbone, tmp_path / "run.pt")


def test_a_photo_smaller_than_the_crop_among_larger_ones_is_named(ratings, backbone, tmp_path):
    small = tmp_path / "small.jpg"
    Image.fromarray(picture(1, 48, 80)).save(small)
    mixed = [Rating(small, 0.5), *ratings[:3]]
    with pytest.raises(RatingsError) as caught:
        loop.fit(ARCHITECTURE, RECIPE, mixed, backbone, tmp_path / "run.pt")
    assert str(small) in str(caught.value)


@pytest.mark.parametrize(("count", "held_out", "expected"), [(10, 0.2, 2), (11, 0.2, 2), (7, 0, 0)])
def test_a_split_is_disjoint_and_complete(tmp_path, count, held_out, expected):
    everything = [Rating(tmp_path / f"{i}.jpg", i / count) for i in range(count)]
    training, validation = split(everything, seed=3, held_out=held_out)
    assert len(validation) == expected
    assert not set(training) & set(validation)
    assert sorted(r.mos for r in training + validation) == [r.mos for r in everything]


def test_a_split_is_decided_by_its_seed(tmp_path):
    everything = [Rating(tmp_path / f"{i}.jpg", i / 40) for i in range(40)]
    parts = [split(everything, seed, 0.2) for seed in (1, 1, 2)]
    assert parts[0] == parts[1]
    assert set(parts[0][1]) != set(parts[2][1])
    # Not the head or the tail of the list: rating files are often sorted.
    assert not np.array_equal([r.mos for r in parts[0][1]], [r.mos for r in everything[-8:]])


@pytest.mark.parametrize("slope", [0.1, 1.0, 7.0])
def test_the_plcc_loss_is_half_of_one_minus_pearsons_correlation(slope):
    rated = torch.tensor([0.1, 0.4, 0.2, 0.9, 0.5])
    predicted = torch.tensor([0.3, 0.2, 0.1, 0.8, 0.6])
    r = np.corrcoef(predicted, rated)[0, 1]
    assert float(plcc_loss(slope * predicted + 2, rated)) == pytest.approx((1 - r) / 2, abs=1e-4)
    assert float(plcc_loss(rated, rated)) == pytest.approx(0, abs=1e-6)
    assert float(plcc_loss(-rated, rated)) == pytest.approx(1, abs=1e-6)


def test_moving_votes_by_more_grades_costs_more():
    """What a cross entropy would not see: all three miss entirely."""
    votes = torch.eye(5)[[0]]
    costs = [float(emd_loss(torch.eye(5)[[grade]], votes)) for grade in range(5)]
    assert costs == sorted(costs)
    # All votes d grades away: d cumulated shares of the 5 differ by one.
    assert costs == pytest.approx([(d / 5) ** 0.5 for d in range(5)], abs=1e-5)
    same = torch.full((2, 5), 0.2, requires_grad=True)
    emd_loss(same, torch.full((2, 5), 0.2)).backward()
    assert torch.isfinite(same.grad).all()


@pytest.fixture(scope="module")
def voted(ratings_csv):
    """The same photos, with votes for five grades beside the ratings."""
    path = ratings_csv.with_name("votes.csv")
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "mos", *(f"votes_{grade}" for grade in range(1, 6))])
        for number in range(8):
            votes = np.bincount([number * 5 // 8, min(4, number * 5 // 8 + 1)], minlength=5) * 10
            table.writerow([f"{number}.jpg", 1 + number / 2, *votes])
    return read_ratings(path, (1, 5))


def test_votes_are_read_as_shares(voted, ratings):
    assert voted[0].votes == (0.5, 0.5, 0, 0, 0)
    assert all(sum(rating.votes) == pytest.approx(1) for rating in voted)
    assert [rating.mos for rating in voted] == [rating.mos for rating in ratings]
    assert {rating.votes for rating in ratings} == {()}


@pytest.mark.parametrize("votes", ["0,0", "-1,2", "nan,1", "x,1"])
def test_votes_that_are_none_are_named_with_their_line(tmp_path, votes):
    path = tmp_path / "votes.csv"
    path.write_text(f"image,mos,votes_1,votes_2\na.jpg,1,1,1\nb.jpg,1,{votes}\n")
    with pytest.raises(RatingsError, match=":3: "):
        read_ratings(path, (0, 1))


def test_a_network_of_grades_learns_the_votes(voted, backbone, tmp_path):
    """All the same ones, which a backbone without training can tell as well."""
    voted = [dataclasses.replace(rating, votes=(0, 0, 0, 1, 0)) for rating in voted]
    architecture = dataclasses.replace(ARCHITECTURE, outputs=5)
    recipe = dataclasses.replace(RECIPE, loss="emd", epochs=8, head_lr=1e-2)
    net = loop.fit(architecture, recipe, voted, backbone, tmp_path / "run.pt")
    with torch.inference_mode():
        shares = torch.cat(
            [net.distribution(loop.read_rgb(r.path)[None].float() / 255) for r in voted]
        )
    assert (shares.argmax(dim=1) == 3).all()
    assert float(shares[:, 3].mean()) > 0.5


@pytest.mark.parametrize("outputs", [0, 1, 5])
def test_the_loss_of_votes_refuses_ratings_without_them(ratings, backbone, tmp_path, outputs):
    architecture = dataclasses.replace(ARCHITECTURE, outputs=outputs)
    recipe = dataclasses.replace(RECIPE, loss="emd")
    with pytest.raises(RatingsError, match="votes"):
        loop.fit(architecture, recipe, ratings, backbone, tmp_path / "run.pt")


@pytest.mark.parametrize(
    "change",
    [{"loss": "plcc"}, {"accumulate": 2}, {"precision": "bf16"}, {"average": 0.9}],
    ids=lambda change: next(iter(change)),
)
def test_every_way_of_training_learns_another_network_and_resumes(
    trained, ratings, backbone, tmp_path, monkeypatch, change
):
    recipe = dataclasses.replace(RECIPE, **change)
    straight = loop.fit(ARCHITECTURE, recipe, ratings, backbone, tmp_path / "straight.pt")
    assert not same(straight.state_dict(), trained[0].state_dict())
    assert all(torch.isfinite(value).all() for value in straight.state_dict().values())
    with monkeypatch.context() as patch:
        stop_after_a_checkpoint(patch)
        with pytest.raises(Stopped):
            loop.fit(ARCHITECTURE, recipe, ratings, backbone, tmp_path / "run.pt")
    resumed = loop.fit(ARCHITECTURE, recipe, ratings, backbone, tmp_path / "run.pt")
    assert same(resumed.state_dict(), straight.state_dict())


def test_two_batches_summed_up_are_one_of_twice_the_size(ratings, backbone, tmp_path):
    """With a loss that is a mean over images; without dropout the weights agree to rounding."""
    once = dataclasses.replace(RECIPE, epochs=1, batch_size=4, norm_weight=0.0, warmup_steps=0)
    twice = dataclasses.replace(once, batch_size=2, accumulate=2)
    nets = []
    with torch.random.fork_rng():
        for name, recipe in (("once", once), ("twice", twice)):

            class Sure(CFANet):
                def __init__(self, architecture):
                    super().__init__(architecture, dropout=0.0)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loop, "CFANet", Sure)
                nets.append(loop.fit(ARCHITECTURE, recipe, ratings, backbone, tmp_path / name))
    image = torch.from_numpy(picture(3, 64, 64)).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        one, other = (float(net(image)) for net in nets)
    assert one == pytest.approx(other, abs=2e-3)


@pytest.mark.parametrize("restart", [30, 60])
def test_the_learning_rate_rises_and_falls_to_nothing_and_does_so_again_where_it_is_to(restart):
    factor = loop._WarmupCosine(warmup=5, total=60, restart=restart)
    rates = [factor(step) for step in range(61)]
    for begun in {0, restart} - {60}:
        end = restart if begun < restart else 60
        assert rates[begun] == pytest.approx(1 / 5)
        assert rates[begun + 5] == 1
        assert np.all(np.diff(rates[begun + 5 : end]) < 0)
        assert rates[end - 1] < 0.02
    assert rates[60] == 0


def test_training_stops_when_the_watched_srocc_does_not_rise_and_returns_the_best(
    ratings, backbone, tmp_path, monkeypatch, caplog
):
    """What is watched is scripted: the second epoch is the best of those that are trained."""
    given = iter([0.1, 0.5, 0.3, 0.2, 0.9, 0.9])
    states = []

    def watched(net, *_):
        states.append({key: value.clone() for key, value in net.state_dict().items()})
        return next(given)

    monkeypatch.setattr(loop, "_srocc", watched)
    recipe = dataclasses.replace(RECIPE, epochs=6, patience=2)
    checkpoint = tmp_path / "run.pt"
    with caplog.at_level(logging.INFO, logger="topiq_core"):
        net = loop.fit(ARCHITECTURE, recipe, ratings[2:], backbone, checkpoint, watched=ratings[:2])
    assert len(states) == 4
    assert "epoch 4 of 6" in caplog.text
    assert same(net.state_dict(), states[1])
    again = loop.fit(ARCHITECTURE, recipe, ratings[2:], backbone, checkpoint, watched=ratings[:2])
    assert len(states) == 4
    assert same(again.state_dict(), states[1])


def test_patience_without_anything_to_watch_is_refused(ratings, backbone, tmp_path):
    with pytest.raises(RatingsError, match="patience"):
        loop.fit(
            ARCHITECTURE, dataclasses.replace(RECIPE, patience=1), ratings, backbone, tmp_path / "x"
        )


def test_tensorboard_sees_the_loss_and_the_watched_srocc_of_every_epoch(
    ratings, backbone, tmp_path
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = dataclasses.replace(RECIPE, epochs=2)
    events = tmp_path / "events"
    loop.fit(
        ARCHITECTURE, recipe, ratings[3:], backbone, tmp_path / "run.pt",
        watched=ratings[:3], events=events,
    )  # fmt: skip
    found = EventAccumulator(str(events)).Reload()
    assert set(found.Tags()["scalars"]) == {"loss", "learning_rate", "srocc"}
    assert [event.step for event in found.Scalars("loss")] == [1, 2]
    assert all(-1 <= event.value <= 1 for event in found.Scalars("srocc"))


def test_a_recipe_for_several_workers_does_not_train_alone(ratings, backbone, tmp_path):
    recipe = dataclasses.replace(RECIPE, workers=2)
    with pytest.raises(TopiqError, match="1 processes"):
        loop.fit(ARCHITECTURE, recipe, ratings, backbone, tmp_path / "run.pt")


def test_pictures_are_read_as_scoring_reads_them(tmp_path):
    rgb = np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=turned)
    alpha = np.broadcast_to(np.uint8(100), (40, 60, 1))
    Image.fromarray(np.concatenate([rgb, alpha], axis=2)).save(tmp_path / "thin.png")
    Image.fromarray(rgb).quantize(16).save(tmp_path / "palette.png", transparency=3)
    for path in tmp_path.iterdir():
        expected = decode(str(path), 1 << 20, "black")
        assert np.array_equal(loop.read_rgb(path).permute(1, 2, 0).numpy(), expected), path
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((40, 60), 30000, np.uint16)).save(deep)
    with pytest.raises(RatingsError, match=r"deep\.png.*8 bits"):
        loop.read_rgb(deep)
