"""Losses on a batch of predicted and rated quality, both [N]."""

import torch
from torch import Tensor


def norm_in_norm(predicted: Tensor, rated: Tensor) -> Tensor:
    """Norm-in-norm loss with p = 1, q = 2 (Li, Jiang and Jiang, ACM MM 2020): in 0..1.

    Both sides are centred and scaled to unit length, so only their relation is compared.
    """

    def unit(x: Tensor) -> Tensor:
        x = x - x.mean()
        out: Tensor = x / (torch.linalg.vector_norm(x) + 1e-8)
        return out

    scale = 2.0 * float(predicted.numel()) ** 0.5
    loss: Tensor = (unit(predicted) - unit(rated)).abs().sum() / scale
    return loss


def quality_loss(predicted: Tensor, rated: Tensor, norm_weight: float = 1.0) -> Tensor:
    """Mean squared error plus norm-in-norm, the paper's loss for KonIQ (section IV)."""
    mse = torch.nn.functional.mse_loss(predicted, rated)
    return mse + norm_weight * norm_in_norm(predicted, rated)


def order_loss(predicted: Tensor, rated: Tensor) -> Tensor:
    """How far predictions within a group fall short of the rated differences. Both [G,K].

    The mean over every two members of max(0, rated - predicted difference), the better one first.
    """
    wanted = rated.unsqueeze(2) - rated.unsqueeze(1)
    given = predicted.unsqueeze(2) - predicted.unsqueeze(1)
    better = (wanted > 0).to(predicted.dtype)
    short: Tensor = (wanted - given).clamp(min=0) * better
    return short.sum() / better.sum().clamp(min=1)
