import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.media.sample import (
    Samples,
    SampleSpec,
    Timeline,
    plan_samples,
    slice_units,
    spacing_weights,
)

moments = st.lists(st.floats(0, 1e5, allow_nan=False), min_size=1, max_size=300, unique=True).map(
    lambda values: tuple(sorted(values))
)


@pytest.mark.parametrize(
    "text", ["", "uniform", "uniform:0", "fps:0", "fps:-1", "every:1.5", "ALL", "all:2", "fps:nan"]
)
def test_a_wrong_spec_is_refused_with_the_right_ones(text):
    with pytest.raises(ConfigError, match="uniform:N"):
        SampleSpec.parse(text)


@given(n=st.integers(1, 500), start=st.floats(-10, 1e4), duration=st.floats(0.01, 1e5))
def test_uniform_is_n_moments_inside_the_video_that_share_its_duration(n, start, duration):
    samples = plan_samples(SampleSpec("uniform", n), Timeline(start, duration))
    assert len(samples.times) == n
    assert all(start <= t <= start + duration for t in samples.times)
    assert sum(samples.weights) == pytest.approx(duration)


@given(rate=st.floats(0.01, 120), duration=st.floats(0.01, 1e3))
def test_fps_never_leaves_the_video_and_has_one_moment_at_least(rate, duration):
    samples = plan_samples(SampleSpec("fps", rate), Timeline(0.0, duration))
    assert samples.times[0] == 0.0
    assert samples.times[-1] <= duration
    assert len(samples.times) == max(1, int(duration * rate + 1e-6))


@given(times=moments, stride=st.integers(1, 40))
def test_every_takes_each_kth_frame(times, stride):
    timeline = Timeline(times[0], times[-1] - times[0] + 0.04, times, times[:1])
    assert plan_samples(SampleSpec("every", stride), timeline).times == times[::stride]


@given(times=moments)
def test_weights_are_positive_one_per_frame(times):
    weights = spacing_weights(times, times[-1] + 0.04)
    assert len(weights) == len(times)
    assert all(w > 0 for w in weights)


def test_rounded_time_bases_do_not_make_a_constant_rate_variable():
    milliseconds = tuple(round(i / 30, 3) for i in range(100))
    assert len(set(spacing_weights(milliseconds, 100 / 30))) == 1


def test_the_last_of_even_samples_counts_to_the_end_and_no_further():
    times = tuple(i / 25 for i in range(100))
    ends = Timeline(0.0, 4.0, times, times[::75])
    found = plan_samples(SampleSpec("every", 30), ends).weights
    assert found == pytest.approx((1.2, 1.2, 1.2, 0.4))
    assert plan_samples(SampleSpec("keyframes"), ends).weights == pytest.approx((3.0, 1.0))
    early = Timeline(0.0, 3.985, times, times[:1])  # as some headers say
    assert len(set(plan_samples(SampleSpec("all"), early).weights)) == 1


def test_a_long_frame_counts_for_as_long_as_it_is_on_screen():
    assert spacing_weights((0.0, 0.1, 2.0), 2.5) == pytest.approx((0.1, 1.9, 0.5))


@given(times=moments, most=st.integers(1, 64), data=st.data())
def test_units_hold_every_sample_once_in_order_and_none_is_too_long(times, most, data):
    keys = tuple(t for t in times if data.draw(st.booleans()))
    weights = tuple(float(i) for i in range(len(times)))
    units = slice_units(Samples(times, weights), keys, most)
    assert tuple(t for u in units for t in u.times) == times
    assert tuple(w for u in units for w in u.weights) == weights
    assert all(1 <= len(u.times) <= most for u in units)


def test_cuts_fall_on_keyframes_where_that_costs_little():
    times = tuple(float(i) for i in range(100))
    units = slice_units(Samples(times, times), tuple(float(i) for i in range(0, 100, 12)), 30)
    assert [u.times[0] for u in units] == [0, 24, 48, 72]
