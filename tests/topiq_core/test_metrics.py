"""Agreement of scores with ratings, on data whose answer is known."""

import warnings
from dataclasses import astuple

import numpy as np
import pytest

from topiq_core.metrics import agreement, bounds, fit_calibration, fit_curve, logistic

SCORES = np.linspace(-2, 3, 41)


def test_a_monotone_relation_agrees_completely_in_rank():
    found = agreement(SCORES, np.exp(3 * SCORES))
    assert found.srocc == pytest.approx(1)
    assert found.krocc == pytest.approx(1)


def test_a_reversed_relation_is_minus_one_in_rank():
    found = agreement(SCORES, -np.exp(3 * SCORES))
    assert found.srocc == pytest.approx(-1)
    assert found.krocc == pytest.approx(-1)


@pytest.mark.parametrize("shift", [0.0, 500.0])
@pytest.mark.parametrize("stretch", [0.01, 1.0, 1000.0])
def test_a_logistic_relation_is_linear_and_without_error_after_the_fit(shift, stretch):
    ratings = 10 + 80 / (1 + np.exp(-(SCORES - 0.4) / 0.3))
    assert np.corrcoef(SCORES, ratings)[0, 1] < 0.97
    found = agreement(shift + stretch * SCORES, ratings)
    assert found.plcc == pytest.approx(1, abs=1e-6)
    assert found.rmse == pytest.approx(0, abs=0.01)


def test_a_falling_logistic_relation_is_fitted_too():
    ratings = 90 - 80 / (1 + np.exp(-(SCORES - 0.4) / 0.3))
    found = agreement(SCORES, ratings)
    assert found.srocc == pytest.approx(-1)
    assert found.plcc == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("stretch", [0.01, 1.0, 1000.0])
def test_a_straight_line_is_fitted_to_a_thousandth(stretch):
    found = agreement(stretch * SCORES, 20 + 10 * SCORES)
    assert found.plcc == pytest.approx(1, abs=1e-3)


def test_the_curve_runs_from_bottom_to_top_and_is_half_way_at_the_middle():
    x = np.array([-1e9, 2.0, 1e9])
    assert logistic(x, 5.0, 1.0, 2.0, 0.5) == pytest.approx([1, 3, 5])
    assert logistic(x, 5.0, 1.0, 2.0, -0.5) == pytest.approx([1, 3, 5])


def test_two_neighbours_out_of_order_among_five():
    found = agreement([1, 2, 3, 4, 5], [1, 2, 3, 5, 4])
    assert found.srocc == pytest.approx(1 - 6 * 2 / (5 * 24))
    assert found.krocc == pytest.approx((9 - 1) / 10)


def test_ties_take_mean_ranks_and_tau_b():
    found = agreement([1, 2, 2, 3, 4], [1, 2, 3, 4, 5])
    assert found.srocc == pytest.approx(9.5 / np.sqrt(9.5 * 10))
    assert found.krocc == pytest.approx(9 / np.sqrt(9 * 10))


def test_rmse_and_plcc_of_ratings_that_scatter_evenly_about_a_logistic():
    """Each score twice, rated `scatter` above and below the curve: that is all that is left."""
    curve, scatter = 10 + 80 / (1 + np.exp(-(SCORES - 0.4) / 0.5)), 7.0
    ratings = np.concatenate([curve + scatter, curve - scatter])
    found = agreement(np.concatenate([SCORES, SCORES]), ratings)
    assert found.rmse == pytest.approx(scatter, rel=1e-4)
    explained = curve.var() / (curve.var() + scatter**2)
    assert found.plcc == pytest.approx(np.sqrt(explained), rel=1e-4)


def test_rank_agreement_does_not_depend_on_a_monotone_change_of_the_scores():
    ratings = np.random.default_rng(1).normal(size=len(SCORES)) + SCORES
    plain, changed = agreement(SCORES, ratings), agreement(np.exp(SCORES), ratings)
    assert 0 < plain.srocc < 1
    assert plain.srocc == changed.srocc
    assert plain.krocc == changed.krocc


@pytest.mark.parametrize(
    ("scores", "ratings"),
    [
        ([], []),
        ([1, 2, 3, 4], [1, 2, 3, 4]),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]),
        (np.ones((5, 1)), np.ones((5, 1))),
        (3.0, 4.0),
    ],
)
def test_anything_but_two_lists_of_five_or_more_is_refused(scores, ratings):
    with pytest.raises(ValueError, match="5 or more"):
        agreement(scores, ratings)


def noisy(n, seed=0):
    """Scores, and ratings that follow them with scatter."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=n)
    return scores, 3 + np.tanh(scores) + rng.normal(scale=0.5, size=n)


def test_the_fitted_curve_gives_the_ratings_of_a_logistic_relation():
    ratings = 10 + 80 / (1 + np.exp(-(SCORES - 0.4) / 0.3))
    curve = fit_curve(SCORES, ratings)
    assert curve(SCORES) == pytest.approx(ratings, abs=0.01)
    assert len(curve.parameters) == 4


def test_the_curve_is_never_further_from_the_ratings_than_a_straight_line():
    for seed in range(20):
        scores, ratings = noisy(12, seed)
        line = np.polyval(np.polyfit(scores, ratings, 1), scores)
        error = np.square(fit_curve(scores, ratings)(scores) - ratings).sum()
        assert error <= np.square(line - ratings).sum()


def test_a_good_guess_leads_to_the_same_curve():
    scores, ratings = noisy(200)
    found = fit_curve(scores, ratings)
    again = fit_curve(scores, ratings, start=found)
    assert again(scores) == pytest.approx(found(scores), abs=1e-4)


def test_every_interval_covers_its_estimate():
    scores, ratings = noisy(60)
    low, high = bounds(scores, ratings, resamples=200)
    for below, value, above in zip(
        astuple(low), astuple(agreement(scores, ratings)), astuple(high), strict=True
    ):
        assert below < value < above


def test_intervals_are_a_function_of_the_seed():
    scores, ratings = noisy(40)
    first = bounds(scores, ratings, resamples=50, seed=1)
    assert first == bounds(scores, ratings, resamples=50, seed=1)
    assert first != bounds(scores, ratings, resamples=50, seed=2)


def test_intervals_narrow_with_the_number_of_items_as_its_root():
    widths = []
    for n in (50, 800):
        low, high = bounds(*noisy(n), resamples=200)
        widths.append(np.subtract(astuple(high), astuple(low)))
    assert np.all(widths[0] / widths[1] == pytest.approx(4, rel=0.5))


def test_intervals_widen_with_the_confidence():
    scores, ratings = noisy(60)
    narrow, wide = (bounds(scores, ratings, c, resamples=200) for c in (0.5, 0.95))
    assert wide[0].srocc < narrow[0].srocc < narrow[1].srocc < wide[1].srocc


def test_an_interval_misses_the_truth_about_as_often_as_it_says():
    """SROCC of a bivariate normal of correlation r is 6 / pi * asin(r / 2)."""
    r, n, tries = 0.7, 60, 30
    rng = np.random.default_rng(7)
    truth = 6 / np.pi * np.arcsin(r / 2)
    missed = 0
    for _ in range(tries):
        x, y = rng.multivariate_normal([0, 0], [[1, r], [r, 1]], size=n).T
        low, high = bounds(x, y, confidence=0.8, resamples=40)
        missed += not low.srocc <= truth <= high.srocc
    assert 0.05 <= missed / tries <= 0.4


def test_where_a_resample_has_no_correlation_the_interval_is_nan_and_nothing_is_said():
    scores, ratings = [0.1, 0.1, 0.1, 0.1, 0.9], [1, 2, 3, 2, 5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, high = bounds(scores, ratings, resamples=50)
    assert np.isnan([low.srocc, high.srocc]).all()


def test_bounds_refuse_what_agreement_refuses():
    with pytest.raises(ValueError, match="5 or more"):
        bounds([1, 2, 3], [1, 2, 3])


def test_a_calibration_gives_back_the_ratings_of_a_logistic_relation_and_rises():
    outputs = np.linspace(-0.4, 1.6, 60)
    ratings = logistic(outputs, 1.0, 0.0, 0.45, 0.2)
    found = fit_calibration(outputs, ratings, "0 is bad")
    assert (found.middle, found.width) == pytest.approx((0.45, 0.2), abs=1e-4)
    assert (found.meaning, found.n) == ("0 is bad", 60)
    assert found.rmse == pytest.approx(0, abs=1e-4)
    scatter = np.where(np.arange(60) % 2, 0.05, -0.05)
    assert fit_calibration(outputs, ratings + scatter, "").rmse == pytest.approx(0.05, rel=0.02)


@pytest.mark.parametrize("ratings", [np.linspace(1, 0, 9), np.full(9, 0.5)], ids=["falls", "flat"])
def test_outputs_that_do_not_rise_with_ratings_are_not_calibrated(ratings):
    with pytest.raises(ValueError, match="rise"):
        fit_calibration(np.linspace(0, 1, 9), ratings, "")
