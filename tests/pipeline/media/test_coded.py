"""Stills through video encoders: the same every time, and worse at every level."""

import itertools
import os

import numpy as np
import pytest
from golden.parameters import picture
from scipy import ndimage

from pipeline.media.coded import KINDS, coded
from topiq_core.training.distortions import KINDS as OTHERS
from topiq_core.training.distortions import LEVELS


@pytest.fixture(scope="module")
def image():
    soft = ndimage.gaussian_filter(picture(2, 128, 160).astype(float), (1.0, 1.0, 0))
    return np.rint(soft).astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_every_level_costs_more_quality(image, kind):
    copies = [coded(image, kind, level) for level in LEVELS]
    assert all(copy.shape == image.shape and copy.dtype == np.uint8 for copy in copies)
    errors = [float(np.mean((copy.astype(float) - image) ** 2)) for copy in copies]
    assert errors[0] > 0
    assert all(a < b for a, b in itertools.pairwise(errors)), errors
    assert np.array_equal(coded(image, kind, 3), copies[2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_coded_picture_stays_where_it_was(image, kind):
    """A moving camera ends on the picture: any other place would look less like it."""
    found = coded(image, kind, 1).astype(float)
    still = float(np.mean((found - image) ** 2))
    for shift in ((3, 3), (-3, -3), (0, 1), (1, 0)):
        assert still < np.mean((found - np.roll(image, shift, (0, 1))) ** 2)


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="only Linux tells priorities")
@pytest.mark.parametrize("kind", KINDS)
def test_encoding_leaves_the_priority_of_its_thread_alone(image, kind):
    """SVT-AV1 makes the thread of a root user a real-time one."""
    before = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
    coded(image, kind, 3)
    assert (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority) == before


def test_names_do_not_collide_with_the_other_distortions():
    assert not set(KINDS) & set(OTHERS)


@pytest.mark.parametrize(("kind", "level"), [("h264", 0), ("h264", 6)])
def test_a_level_out_of_range_is_refused(image, kind, level):
    with pytest.raises(ValueError, match=str(level)):
        coded(image, kind, level)
