import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipeline.errors import ConfigError
from pipeline.pooling import DEFAULT_POOLING, Frames, check_names, columns, pool, worst_window

scores = st.lists(st.floats(0.01, 1, allow_nan=False), min_size=1, max_size=80)


def frames(values, gap=0.5, weights=None):
    values = np.asarray(values, float)
    times = np.arange(len(values)) * gap
    weights = np.full(len(values), gap) if weights is None else np.asarray(weights, float)
    return Frames(times, weights, values)


@given(values=scores)
def test_with_even_spacing_the_poolings_are_the_plain_statistics(values):
    found = pool(frames(values), DEFAULT_POOLING)
    assert found["score"] == pytest.approx(np.mean(values))
    assert found["score_hmean"] == pytest.approx(stats.hmean(values))
    assert found["score_std"] == pytest.approx(np.std(values), abs=1e-9)
    expected = stats.sem(values) if len(values) > 1 else None
    assert found["score_se"] == (expected and pytest.approx(expected, abs=1e-9))
    assert (found["score_min"], found["score_max"]) == (min(values), max(values))
    for percent in (1, 5, 10, 50):
        assert found[f"score_p{percent}"] == pytest.approx(np.percentile(values, percent))


@given(values=scores)
def test_poolings_are_ordered(values):
    found = pool(frames(values), DEFAULT_POOLING)
    names = ("score_min", "score_p1", "score_p5", "score_p10", "score_p50", "score_max")
    ordered = [found[name] for name in names]
    assert ordered == sorted(ordered)
    slack = 1e-9
    assert found["score_min"] - slack <= found["score_hmean"] <= found["score"] + slack
    assert found["score_min"] - slack <= found["score_worst_1s"] <= found["score_worst_5s"] + 0.5


@given(values=scores, data=st.data())
def test_a_weight_counts_like_that_many_equal_frames(values, data):
    counts = data.draw(st.lists(st.integers(1, 5), min_size=len(values), max_size=len(values)))
    weighted = pool(frames(values, weights=counts), ("mean", "hmean", "std", "min"))
    repeated = pool(frames(np.repeat(values, counts)), ("mean", "hmean", "std", "min"))
    for name, value in repeated.items():
        assert weighted[name] == pytest.approx(value, abs=1e-9)


def test_the_standard_error_covers_the_mean_of_a_video_that_was_sampled_at_random():
    rng = np.random.Generator(np.random.PCG64(1))
    every = rng.beta(2, 5, 100_000)
    inside = 0
    for _ in range(500):
        found = pool(frames(rng.choice(every, 16)), ("se",))
        inside += abs(found["score"] - every.mean()) < 2 * found["score_se"]
    assert 0.9 < inside / 500 < 0.97


def test_weighted_percentiles_follow_time_not_frames():
    held = frames([0.2, 0.9, 0.9, 0.9], weights=[7, 1, 1, 1])
    assert pool(held, ("p50",))["score_p50"] == 0.2


def test_the_harmonic_mean_of_a_zero_is_null_not_zero():
    assert pool(frames([0.5, 0.0]), ("hmean",))["score_hmean"] is None


def test_the_worst_second_is_found_with_its_time_and_count():
    values = [0.9] * 40
    values[20:24] = [0.1, 0.2, 0.1, 0.2]
    score, start, count = worst_window(frames(values, gap=0.25), 1.0)
    assert (score, start, count) == (pytest.approx(0.15), pytest.approx(5.0), 4)


def test_the_last_second_counts_where_frames_lie_a_little_before_their_times():
    found = Frames(np.array([0, 0.48, 1, 1.48]), np.full(4, 0.5), np.array([0.9, 0.9, 0.5, 0.5]))
    assert worst_window(found, 1.0) == (pytest.approx(0.5), 1.0, 2)


def test_an_item_shorter_than_the_window_is_one_window():
    score, start, count = worst_window(frames([0.4, 0.6]), 5.0)
    assert (score, start, count) == (pytest.approx(0.5), 0.0, 2)


def test_what_outlasts_a_window_counts_for_what_is_left_of_it():
    """Three seconds of a screen recording, and then a minute of one picture."""
    found = Frames(np.arange(4.0), np.array([1, 1, 1, 60.0]), np.array([0.1, 0.1, 0.1, 0.9]))
    assert worst_window(found, 5.0) == (pytest.approx((3 * 0.1 + 2 * 0.9) / 5), 0.0, 4)
    short = Frames(np.arange(4.0), np.array([1, 1, 1, 3.0]), np.array([0.9, 0.9, 0.9, 0.1]))
    assert worst_window(short, 5.0) == (pytest.approx((2 * 0.9 + 3 * 0.1) / 5), 1.0, 3)


@given(values=scores, gap=st.floats(0.01, 3))
def test_the_worst_window_is_never_better_than_the_mean_of_all_windows(values, gap):
    found = frames(values, gap=gap)
    score, start, count = worst_window(found, 1.0)
    begin = int(np.flatnonzero(found.times == start)[0])
    inside = slice(begin, begin + count)
    seconds = np.minimum(found.weights, start + 1.0 - found.times)[inside]
    assert score == pytest.approx(np.average(values[inside], weights=seconds))
    assert min(values) - 1e-12 <= score <= max(values) + 1e-12


@pytest.mark.parametrize("names", [("mean", "median"), ("p100",), ("worst_0s",), ("mean", "mean")])
def test_an_unknown_or_double_pooling_is_an_error(names):
    with pytest.raises(ConfigError):
        check_names(names)


@given(values=scores)
def test_pooled_columns_are_the_declared_ones(values):
    names = ("mean", "p25", "worst_2s", "max")
    assert set(pool(frames(values), names)) == set(columns(names))
