"""Agreement of scores with ratings, on data whose answer is known."""

import numpy as np
import pytest

from topiq_core.metrics import agreement, logistic

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
