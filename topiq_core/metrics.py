"""Agreement of scores with human ratings: SROCC, PLCC, KROCC and RMSE, with bootstrap intervals.

PLCC and RMSE are taken after the monotone four-parameter logistic fit that the field uses
(VQEG, "Final report on the validation of objective models of video quality assessment", 2000).
"""

import warnings
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from topiq_core.cards import Calibration

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """How well scores agree with ratings. `rmse` is in the unit of the ratings."""

    srocc: float
    krocc: float
    plcc: float
    rmse: float


def logistic(x: Array, top: float, bottom: float, middle: float, width: float) -> Array:
    """The VQEG curve: (top - bottom) / (1 + exp(-(x - middle) / |width|)) + bottom."""
    z = np.clip(-(x - middle) / (abs(width) + 1e-12), -60, 60)
    out: Array = (top - bottom) / (1 + np.exp(z)) + bottom
    return out


@dataclass(frozen=True)
class Curve:
    """Scores to the scale of the ratings: the four parameters of `logistic`, or a straight line.

    A line is two parameters, slope and offset.
    """

    parameters: tuple[float, ...]

    def __call__(self, scores: Array) -> Array:
        """Where scores [N] lie on the scale of the ratings: [N]."""
        if len(self.parameters) == 4:
            return logistic(scores, *self.parameters)
        slope, offset = self.parameters
        return slope * scores + offset


def fit_curve(scores: Array, ratings: Array, start: Curve | None = None) -> Curve:
    """The least-squares logistic, or the line where that does better or nothing is found.

    start: the curve of much the same data, which saves most of the search.
    """
    if start is not None and len(start.parameters) == 4:
        first, evaluations = start.parameters, 100
    else:
        middle, width = float(np.median(scores)), float(scores.std()) or 1.0
        first, evaluations = (float(ratings.max()), float(ratings.min()), middle, width), 20_000

    def errors(parameters: Array) -> Array:
        return logistic(scores, *parameters) - ratings

    # The best so far when evaluations run out: for so few points that do not fix the curve.
    found = optimize.leastsq(errors, first, maxfev=evaluations, full_output=True)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", np.exceptions.RankWarning)  # of scores that are all one
        line = np.polyfit(scores, ratings, 1)
    curves = [Curve(tuple(parameters.tolist())) for parameters in (found, line)]
    return min(curves, key=lambda curve: float(np.square(curve(scores) - ratings).sum()))


def fit_calibration(scores: npt.ArrayLike, ratings: npt.ArrayLike, meaning: str) -> Calibration:
    """The least-squares `Calibration` of outputs [N] to ratings [N] on a scale from 0 to 1, N >= 5.

    Raises ValueError on other shapes, and when ratings do not rise with the outputs.
    """
    x, y = _paired(scores, ratings)
    if not np.vdot(x - x.mean(), y - y.mean()) > 0:
        raise ValueError("ratings do not rise with the outputs: there is nothing to calibrate")

    def errors(parameters: Array) -> Array:
        return logistic(x, 1.0, 0.0, parameters[0], np.exp(parameters[1])) - y

    start = (float(x.mean()), float(np.log(x.std() or 1.0)))
    fitted = optimize.least_squares(errors, start)
    middle, log_width = fitted.x
    rmse = float(np.sqrt(np.mean(fitted.fun**2)))
    return Calibration(float(middle), float(np.exp(log_width)), meaning, len(x), rmse)


def agreement(scores: npt.ArrayLike, ratings: npt.ArrayLike) -> Agreement:
    """Compare scores [N] with ratings [N], N >= 5. Raises ValueError on other shapes."""
    x, y = _paired(scores, ratings)
    return _agreement(x, y, fit_curve(x, y))


def bounds(
    scores: npt.ArrayLike,
    ratings: npt.ArrayLike,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[Agreement, Agreement]:
    """Lower and upper ends of the confidence intervals of `agreement`. Raises ValueError.

    The percentile bootstrap over items, with the curve fitted anew in every resample. NaN where a
    resample leaves a correlation undefined.
    """
    x, y = _paired(scores, ratings)
    start = fit_curve(x, y)

    def measures(x: Array, y: Array) -> Array:
        return np.array(astuple(_agreement(x, y, fit_curve(x, y, start))))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (x, y),
            measures,
            paired=True,
            vectorized=False,
            n_resamples=resamples,
            batch=1,  # a resample at a time: all of them at once are gigabytes for large sets
            confidence_level=confidence,
            method="percentile",
            rng=np.random.Generator(np.random.PCG64(seed)),
        ).confidence_interval
    low, high = (np.asarray(end, dtype=np.float64).tolist() for end in (found.low, found.high))
    return Agreement(*low), Agreement(*high)


def _paired(scores: npt.ArrayLike, ratings: npt.ArrayLike) -> tuple[Array, Array]:
    x = np.asarray(scores, dtype=np.float64)
    y = np.asarray(ratings, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or len(x) < 5:
        raise ValueError(f"scores {x.shape} and ratings {y.shape}: two lists of 5 or more needed")
    return x, y


def _agreement(x: Array, y: Array, curve: Curve) -> Agreement:
    fitted = curve(x)
    return Agreement(
        srocc=float(stats.spearmanr(x, y).statistic),
        krocc=float(stats.kendalltau(x, y).statistic),
        plcc=float(stats.pearsonr(fitted, y).statistic),
        rmse=float(np.sqrt(np.mean((fitted - y) ** 2))),
    )
