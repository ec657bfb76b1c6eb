"""Distortions are functions of picture, type, level and seed; a higher level is more of them."""

import itertools

import numpy as np
import pytest
from golden.parameters import picture
from scipy import ndimage

from topiq_core.training.distortions import KINDS, LEVELS, distort

RANDOM = {
    "motion_blur",
    "white_noise",
    "chroma_noise",
    "impulse_noise",
    "multiplicative_noise",
    "denoised",
    "noisy_jpeg",
    "colour_shift",
    "colour_cast",
    "displaced_blocks",
    "jitter",
}


@pytest.fixture(scope="module")
def image():
    """Coloured waves and patches, softened as a lens would, with room above and below."""
    soft = ndimage.gaussian_filter(picture(2, 128, 160).astype(float), (1.2, 1.2, 0))
    return np.rint(30 + soft * 0.75).astype(np.uint8)


def error(one, other):
    return float(np.mean((one.astype(float) - other) ** 2))


def test_there_are_at_least_25_types_and_5_levels():
    assert len(KINDS) >= 25
    assert LEVELS == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_level_departs_further_from_the_picture(image, kind):
    before = image.copy()
    copies = [distort(image, kind, level, seed=7) for level in LEVELS]
    assert np.array_equal(image, before)
    assert all(copy.shape == image.shape and copy.dtype == np.uint8 for copy in copies)
    errors = [error(copy, image) for copy in copies]
    assert errors[0] > 0
    assert all(a < b for a, b in itertools.pairwise(errors)), errors


@pytest.mark.parametrize("kind", KINDS)
def test_a_distortion_is_decided_by_its_seed(image, kind):
    first, again, other = (distort(image, kind, 3, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert np.array_equal(first, other) == (kind not in RANDOM)


@pytest.mark.parametrize("level", [0, 6])
def test_a_level_out_of_range_is_refused(image, level):
    with pytest.raises(ValueError, match=str(level)):
        distort(image, "jpeg", level, seed=1)


def test_an_odd_size_is_kept():
    small = picture(3, 47, 61)
    for kind in KINDS:
        assert distort(small, kind, 5, seed=1).shape == small.shape, kind


def test_chroma_noise_leaves_luma_alone(image):
    weights = np.array([0.299, 0.587, 0.114])
    noisy = distort(image, "chroma_noise", 1, seed=1)
    assert np.abs(noisy @ weights - image @ weights).mean() < 0.5
    assert error(noisy, image) > 10
