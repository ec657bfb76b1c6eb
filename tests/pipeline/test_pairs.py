import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import pairs
from pipeline.errors import Misaligned
from pipeline.media.probe import Facts
from pipeline.media.sample import SampleSpec, Timeline


def timeline(n, fps, start=0.0, without=()):
    times = tuple(start + i / fps for i in range(n) if i not in without)
    return Timeline(start, n / fps, times, times[:1])


SPECS = st.sampled_from(["uniform:7", "fps:3", "every:3", "all", "keyframes"])


@given(
    spec=SPECS,
    n=st.integers(20, 90),
    cut=st.integers(-12, 12),
    fps=st.sampled_from([23.976, 25.0, 60.0]),
    start=st.sampled_from([0.0, 1.4]),
)
def test_every_frame_is_paired_with_the_same_frame_of_its_reference(spec, n, cut, fps, start):
    """The rendition begins `cut` frames into the reference, or before it, on a clock of its own."""
    reference, distorted = timeline(n, fps), timeline(n, fps, start)
    offset = cut / fps - start
    found = pairs.pair_frames("x", SampleSpec.parse(spec), distorted, reference, offset)
    for ours, theirs in zip(found.samples.times, found.reference_times, strict=True):
        assert round((ours - start) * fps) + cut == round(theirs * fps)
    assert found.n_matched == n - abs(cut)
    assert found.n_matched + found.n_unmatched == n


@given(spec=SPECS, dropped=st.sets(st.integers(1, 39), max_size=20))
def test_dropped_frames_shift_nothing_and_no_frame_is_compared_twice(spec, dropped):
    reference, distorted = timeline(40, 25.0), timeline(40, 25.0, without=dropped)
    found = pairs.pair_frames("x", SampleSpec.parse(spec), distorted, reference, 0.0)
    assert found.samples.times == pytest.approx(found.reference_times)
    assert len(set(found.samples.times)) == len(found.samples.times)
    assert found.n_unmatched == 0


@given(spec=st.sampled_from(["uniform:9", "fps:4"]), jitter=st.floats(-0.0005, 0.0005))
def test_renditions_are_compared_at_the_same_frames_of_their_reference(spec, jitter):
    """Millisecond clocks of other containers move no moment to another reference frame."""
    reference = timeline(75, 25.0)
    rounded = tuple(round(t + jitter, 3) for t in reference.frame_times)
    other = Timeline(rounded[0], 3.0, rounded)
    parsed = SampleSpec.parse(spec)
    exact = pairs.pair_frames("x", parsed, reference, reference, 0.0)
    assert pairs.pair_frames("x", parsed, other, reference, 0.0).reference_times == (
        exact.reference_times
    )


@pytest.mark.parametrize("spec", ["uniform:16", "fps:2"])
def test_a_rendition_that_ends_early_is_judged_by_what_it_has_alike(spec):
    reference, distorted = timeline(240, 24.0), timeline(120, 24.0)
    found = pairs.pair_frames("x", SampleSpec.parse(spec), distorted, reference, 0.0)
    assert len(set(np.round(found.samples.weights, 6))) == 1
    assert sum(found.samples.weights) == pytest.approx(5.0)
    assert found.reference_times == found.samples.times


@pytest.mark.parametrize("rates", [(30.0, 60.0), (60.0, 30.0), (25.0, 24.0)])
def test_other_frame_rates_are_paired_by_what_is_on_screen(rates):
    ours, theirs = rates
    distorted, reference = timeline(int(2 * ours), ours), timeline(int(2 * theirs), theirs)
    found = pairs.pair_frames("x", SampleSpec("all"), distorted, reference, 0.0)
    apart = np.array(found.samples.times) - np.array(found.reference_times)
    assert len(apart) >= 0.95 * 2 * ours
    assert np.abs(apart).max() <= 1 / min(rates)


def test_by_number_the_nth_goes_with_the_nth_whatever_their_times():
    distorted, reference = timeline(10, 30.0, start=3.0), timeline(8, 25.0)
    found = pairs.pair_frames("x", SampleSpec("all"), distorted, reference, 0.0, "number")
    assert found.reference_times == reference.frame_times
    assert (found.n_matched, found.n_unmatched) == (8, 2)


@pytest.mark.parametrize("spec", ["uniform:16", "fps:1", "all", "keyframes"])
def test_two_videos_of_one_frame_are_one_pair(spec):
    parsed = SampleSpec.parse(spec)
    found = pairs.pair_frames("x", parsed, timeline(1, 25, start=1.0), timeline(1, 25), -1.0)
    assert (found.samples.times, found.reference_times) == ((1.0,), (0.0,))


def test_files_that_show_nothing_together_are_refused():
    with pytest.raises(Misaligned, match=r"x: no frame of it .*\+9\.000 s"):
        pairs.pair_frames("x", SampleSpec("all"), timeline(10, 25), timeline(10, 25), 9.0)


def facts(width, height, crop):
    known = {"kind": "video", "coded_width": width, "coded_height": height, "crop": crop}
    names = [field.name for field in dataclasses.fields(Facts)]
    return Facts(**(dict.fromkeys(names) | known))


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("320:134:0:23", "320:132:0:24"),  # blurred bars
        ("320:180:0:0", "320:180:0:0"),  # another cut: the rendition's bars hold something
        (None, None),
    ],
)
def test_a_small_rendition_is_cut_where_its_reference_is(own, expected):
    reference = facts(960, 540, "960:398:0:71")
    assert pairs.common_crop(facts(320, 180, own), reference) == expected


def test_bars_that_are_too_thin_to_be_seen_in_a_rendition_are_cut_off_all_the_same():
    """1.85:1 in 16:9: 21 lines of 1080, and three and a half of 180."""
    reference = facts(1920, 1080, "1920:1038:0:21")
    assert pairs.common_crop(facts(320, 180, None), reference) == "320:172:0:4"
    assert pairs.common_crop(facts(640, 360, None), reference) is None  # they would be seen
    for width, height in ((320, 172), (1920, 1038)):  # cut off already
        assert pairs.common_crop(facts(width, height, None), reference) is None
    thin = facts(1920, 1080, "1920:1072:0:4")
    assert pairs.common_crop(facts(1920, 1072, None), thin) is None
    assert pairs.common_crop(facts(1920, 1080, None), thin) == "1920:1072:0:4"
