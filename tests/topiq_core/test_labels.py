"""Labels made of metrics: the best for an unchanged picture, never rising with the level."""

import numpy as np
import pytest
import torch
from golden.parameters import picture

from topiq_core.training.distortions import LEVELS, distort
from topiq_core.training.labels import IDENTICAL, LEAST_SIDE, labels, measure

BEST = {"ms_ssim": 1, "vif": 1, "ms_gmsd": 0, "vsi": 1, "haarpsi": 1, "mdsi": 0}


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.fixture(scope="module")
def image():
    return picture(4, LEAST_SIDE, LEAST_SIDE + 15)


def test_an_unchanged_picture_has_the_best_value_of_every_metric(image):
    same = measure(tensor(image), tensor(image)[None])
    assert {name: pytest.approx(value, abs=1e-4) for name, value in BEST.items()} == {
        name: values[0] for name, values in same.items()
    }


def test_metrics_do_not_call_a_picture_of_more_contrast_better_than_its_reference(image):
    enhanced = distort(image, "more_contrast", 1, seed=1)
    measured = measure(tensor(image), tensor(enhanced)[None])
    assert all(measured[name][0] <= best + 1e-4 for name, best in BEST.items())


def test_labels_fall_with_the_level_and_stay_below_an_identical_pair(image):
    kinds = ("gaussian_blur", "white_noise", "jpeg")
    measured = {name: [] for name in BEST}
    for kind in kinds:
        copies = [tensor(distort(image, kind, level, seed=1)) for level in LEVELS]
        for name, values in measure(tensor(image), torch.stack(copies)).items():
            measured[name] += values
    ladders = [kind for kind in kinds for _ in LEVELS]
    found = labels(measured, ladders, [*LEVELS] * len(kinds))
    assert ((found > 0) & (found < IDENTICAL)).all()
    by_kind = found.reshape(len(kinds), len(LEVELS))
    assert (np.diff(by_kind, axis=1) <= 0).all()
    assert (by_kind[:, 0] > by_kind[:, -1] + 0.2).all()


def test_a_metric_that_errs_within_a_ladder_is_overruled_by_the_level():
    found = labels({"one": [0.9, 0.2, 0.5, 0.8]}, ["a", "a", "a", "b"], [1, 2, 3, 1])
    assert found[1] == pytest.approx(found[2])
    assert found[0] > found[1]


def test_the_order_of_the_pairs_does_not_matter():
    values, ladders, levels = [0.9, 0.4, 0.5, 0.8, 0.3, 0.2], list("aaabbb"), [1, 2, 3, 1, 2, 3]
    found = labels({"one": values}, ladders, levels)
    order = [4, 0, 3, 5, 2, 1]
    shuffled = labels(
        {"one": [values[i] for i in order]}, [ladders[i] for i in order], [levels[i] for i in order]
    )
    assert shuffled == pytest.approx(found[order])


def test_labels_do_not_depend_on_the_scale_of_a_metric():
    one, levels = np.array([0.9, 0.4, 0.5, 0.8]), [1, 2, 1, 2]
    plain = labels({"m": list(one)}, list("aabb"), levels)
    assert labels({"m": list(np.exp(9 * one))}, list("aabb"), levels) == pytest.approx(plain)
