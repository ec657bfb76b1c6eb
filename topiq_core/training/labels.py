"""Quality labels for distorted pictures without raters: where established metrics agree.

Each metric orders all pairs of a set; a pair's label is the mean of its fractional ranks, then made
non-increasing along every ladder (one reference, one kind of distortion, growing levels), where
the truth is known. Metrics disagree most between kinds of distortion, each in its own way, and a
mean of several agrees with people better than its parts do. The metrics are piq's (Apache-2.0).
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy import optimize, stats
from torch import Tensor

Array = npt.NDArray[np.float64]

IDENTICAL = 1.0
"""The label of a picture that equals its reference; every other label is lower."""

LEAST_SIDE = 161
"""Pictures must have this many pixels a side: MS-SSIM's coarsest scale is a sixteenth."""


def _metrics() -> dict[str, tuple[Callable[..., Tensor], int, bool]]:
    """Each metric, its sign (+1: higher is better), and whether it is of luma alone."""
    import piq

    return {
        "ms_ssim": (piq.multi_scale_ssim, 1, True),
        "vif": (piq.vif_p, 1, True),
        "ms_gmsd": (piq.multi_scale_gmsd, -1, True),
        "vsi": (piq.vsi, 1, False),
        "haarpsi": (piq.haarpsi, 1, False),
        "mdsi": (piq.mdsi, -1, False),
    }


@torch.inference_mode()
def measure(reference: Tensor, distorted: Tensor) -> dict[str, list[float]]:
    """Every metric, of uint8 [3,H,W] against each of uint8 [N,3,H,W]; higher is better."""
    x = distorted.float() / 255
    y = (reference.float() / 255).expand_as(x)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    luma = ((x * weights).sum(1, keepdim=True), (y * weights).sum(1, keepdim=True))
    out = {}
    for name, (metric, sign, of_luma) in _metrics().items():
        one, other = luma if of_luma else (x, y)
        # MS-SSIM of opposite structure is a root of a negative number; VIF of more contrast is
        # above 1, as if it were better than the reference.
        found = metric(one, other, data_range=1.0, reduction="none").nan_to_num(0.0).clamp(max=1)
        out[name] = [sign * float(value) for value in found.flatten()]
    return out


def labels(
    measured: Mapping[str, Sequence[float]], ladders: Sequence[str], levels: Sequence[int]
) -> Array:
    """A label within 0..1 for each of N pairs, higher is better.

    measured: each metric's N numbers, higher is better. ladders: the name of each pair's ladder.
    levels: its place on it; labels do not increase with it.
    """
    ranks = [(stats.rankdata(values) - 0.5) / len(levels) for values in measured.values()]
    mean: Array = np.mean(ranks, axis=0)
    names, order = np.asarray(ladders), np.asarray(levels)
    out: Array = mean.copy()
    for name in np.unique(names):
        members = np.flatnonzero(names == name)
        members = members[np.argsort(order[members], kind="stable")]
        out[members] = optimize.isotonic_regression(mean[members], increasing=False).x
    return out
