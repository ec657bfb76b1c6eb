"""The training loop: the paper's recipe (section IV), seeded and resumable by the same command."""

import copy
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from topiq_core import backbones
from topiq_core.cards import Architecture
from topiq_core.cfanet import CFANet, initialise_head
from topiq_core.metrics import Agreement, agreement
from topiq_core.training.losses import quality_loss
from topiq_core.training.ratings import RatedImages, Rating, RatingsError, read_rgb

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. Learning rates are AdamW's, at the start of the cosine."""

    epochs: int = 10
    batch_size: int = 8
    crop: int = 256
    head_lr: float = 3e-4
    backbone_lr: float = 1e-4
    weight_decay: float = 1e-4
    warmup_steps: int = 100
    norm_weight: float = 0.5
    seed: int = 1


def fit(
    architecture: Architecture,
    recipe: Recipe,
    ratings: list[Rating],
    backbone_state: dict[str, torch.Tensor],
    checkpoint: Path,
    device: str = "cpu",
) -> CFANet:
    """Train from an ImageNet backbone. Continues from `checkpoint` when it holds this same run.

    The checkpoint is replaced after every epoch and removed by nobody: a finished one returns at
    once. A checkpoint of another recipe, data or architecture is ignored, with a warning.
    """
    if len(ratings) < recipe.batch_size:
        raise RatingsError(
            f"{len(ratings)} ratings do not fill a batch of {recipe.batch_size}: "
            "give more, or a smaller --batch-size."
        )
    identity = json.dumps(
        [asdict(architecture), asdict(recipe), [(r.path.name, r.mos) for r in ratings]]
    )
    torch.manual_seed(recipe.seed)
    net = CFANet(architecture)
    initialise_head(net)
    backbones.load_imagenet(net.semantic_model, backbone_state)
    net.to(device)

    samples = RatedImages(ratings, recipe.crop, recipe.seed)
    steps_per_epoch = len(ratings) // recipe.batch_size
    optimiser = _optimiser(net, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, _WarmupCosine(recipe.warmup_steps, steps_per_epoch * recipe.epochs)
    )
    first_epoch = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        if saved["identity"] == identity:
            net.load_state_dict(saved["net"])
            optimiser.load_state_dict(saved["optimiser"])
            schedule.load_state_dict(saved["schedule"])
            first_epoch = saved["epoch"]
        else:
            log.warning("%s belongs to another run: starting afresh", checkpoint)

    for epoch in range(first_epoch, recipe.epochs):
        started, total = time.monotonic(), 0.0
        torch.manual_seed(recipe.seed * 100_003 + epoch)
        samples.epoch = epoch
        net.train()
        for images, mos in _batches(samples, recipe, epoch):
            loss = quality_loss(net(images.to(device)), mos.to(device), recipe.norm_weight)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += loss.item()
        _save_checkpoint(
            checkpoint,
            {
                "identity": identity,
                "epoch": epoch + 1,
                "net": net.state_dict(),
                "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
            },
        )
        log.info(
            "epoch %d of %d: loss %.4f, %.0f s",
            epoch + 1,
            recipe.epochs,
            total / max(1, steps_per_epoch),
            time.monotonic() - started,
        )
    return net.eval()


@torch.inference_mode()
def validate(net: CFANet, ratings: list[Rating], device: str = "cpu") -> Agreement:
    """Agreement at native resolution, one image at a time."""
    scores = []
    for rating in ratings:
        image = read_rgb(rating.path).unsqueeze(0).to(device).float() / 255
        scores.append(float(net(image)))
    return agreement(scores, [r.mos for r in ratings])


def as_stored(net: CFANet) -> CFANet:
    """The network as its file will give it back: weights rounded to fp16, computed in fp32."""
    stored = copy.deepcopy(net)
    # By the state dict, as the file is: .half() would round the input normalisation too.
    stored.load_state_dict(
        {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    )
    return stored


def _batches(
    samples: RatedImages, recipe: Recipe, epoch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Shuffled by (seed, epoch). A last, smaller batch is left out: the losses need full ones."""
    order = np.random.Generator(np.random.PCG64([recipe.seed, epoch])).permutation(len(samples))
    yield from DataLoader(
        torch.utils.data.Subset(samples, [int(i) for i in order]),
        batch_size=recipe.batch_size,
        drop_last=True,
    )


def _optimiser(net: CFANet, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with a smaller step for the pretrained backbone."""
    backbone = [p for p in net.semantic_model.parameters() if p.requires_grad]
    inside = {id(p) for p in net.semantic_model.parameters()}
    head = [p for p in net.parameters() if p.requires_grad and id(p) not in inside]
    return torch.optim.AdamW(
        [
            {"params": backbone, "lr": recipe.backbone_lr},
            {"params": head, "lr": recipe.head_lr},
        ],
        weight_decay=recipe.weight_decay,
    )


class _WarmupCosine:
    """Learning-rate factor by step: linear to 1, then a cosine to 0."""

    def __init__(self, warmup: int, total: int) -> None:
        self.warmup, self.total = warmup, total

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _save_checkpoint(path: Path, state: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    partial.replace(path)
