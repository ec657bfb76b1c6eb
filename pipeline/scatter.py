"""Scores against ratings as a picture."""

import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt

from topiq_core.metrics import Curve

Array = npt.NDArray[np.float64]


def available() -> bool:
    """Whether matplotlib is installed; it is an extra."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(path: Path, scores: Array, ratings: Array, curve: Curve, title: str) -> None:
    """A PNG of scores [N] against ratings [N] and the curve fitted to them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    opacity = float(np.clip(200 / len(scores), 0.1, 0.8))
    axes.scatter(scores, ratings, s=9, alpha=opacity, linewidths=0)
    x = np.linspace(scores.min(), scores.max(), 200)
    axes.plot(x, curve(x), color="black", linewidth=1.5)
    axes.set(xlabel="score", ylabel="mean opinion score", title=title)
    figure.savefig(path, format="png")
