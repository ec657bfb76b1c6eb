"""Losses on a batch of predicted and rated quality, both [N] where nothing else is said."""

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


def plcc_loss(predicted: Tensor, rated: Tensor) -> Tensor:
    """(1 - r) / 2 with Pearson's r: 0 for an increasing linear relation, 1 for a falling one."""
    x, y = predicted - predicted.mean(), rated - rated.mean()
    r = (x * y).sum() / (torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y) + 1e-8)
    loss: Tensor = (1 - r) / 2
    return loss


def emd_loss(predicted: Tensor, votes: Tensor) -> Tensor:
    """Squared earth mover's distance of two distributions over K ordered grades, both [N,K].

    The root of the mean squared difference of the cumulated shares, as NIMA has it (Talebi and
    Milanfar, IEEE TIP 2018), averaged over the batch.
    """
    apart = predicted.cumsum(dim=1) - votes.cumsum(dim=1)
    # The small term keeps the gradient finite where both agree.
    loss: Tensor = (apart.square().mean(dim=1) + 1e-12).sqrt().mean()
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
