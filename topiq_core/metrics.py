"""Agreement of scores with human ratings: SROCC, PLCC, KROCC and RMSE.

PLCC and RMSE are taken after the monotone four-parameter logistic fit that the field uses
(VQEG, "Final report on the validation of objective models of video quality assessment", 2000).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

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


def fit_logistic(scores: Array, ratings: Array) -> Array:
    """The scores on the scale of the ratings, by the least-squares logistic.

    Falls back to the straight line when the curve does not converge.
    """
    start = [ratings.max(), ratings.min(), float(np.median(scores)), float(scores.std()) or 1.0]
    try:
        found, _ = optimize.curve_fit(logistic, scores, ratings, p0=start, maxfev=20_000)
        return logistic(scores, *found)
    except RuntimeError:
        slope, offset = np.polyfit(scores, ratings, 1)
        line: Array = slope * scores + offset
        return line


def agreement(scores: npt.ArrayLike, ratings: npt.ArrayLike) -> Agreement:
    """Compare scores [N] with ratings [N], N >= 5. Raises ValueError on other shapes."""
    x = np.asarray(scores, dtype=np.float64)
    y = np.asarray(ratings, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or len(x) < 5:
        raise ValueError(f"scores {x.shape} and ratings {y.shape}: two lists of 5 or more needed")
    fitted = fit_logistic(x, y)
    return Agreement(
        srocc=float(stats.spearmanr(x, y).statistic),
        krocc=float(stats.kendalltau(x, y).statistic),
        plcc=float(stats.pearsonr(fitted, y).statistic),
        rmse=float(np.sqrt(np.mean((fitted - y) ** 2))),
    )
