"""The training loop: the paper's recipe (section IV), seeded and resumable by the same command."""

import copy
import itertools
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch.optim import swa_utils
from torch.utils.data import DataLoader

from topiq_core import backbones
from topiq_core.cards import Architecture
from topiq_core.cfanet import CFANet, initialise_head
from topiq_core.metrics import Agreement, agreement
from topiq_core.training.losses import order_loss, quality_loss
from topiq_core.training.pairs import IDENTICAL, Pair, PairGroups
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
    group: int = 1
    """Of pairs: members of a batch that share a reference and a crop."""
    order_weight: float = 0.0
    """Of pairs: weight of the loss on the order within a group."""
    frozen_stages: int = 0
    """So many of the backbone's five stages stay as they were; the first ones cost the most."""
    pair_batch: int = 0
    """Beside ratings: distorted pictures in a step, in groups; 0 for none."""
    pair_crop: int = 192
    """Beside ratings: side of the crops of distorted pictures, in pixels."""
    pair_weight: float = 1.0
    """Beside ratings: weight of the loss on the distorted pictures."""
    pair_range: tuple[float, float] = (0.15, 0.85)
    """Beside ratings: what a pair's labels 0 and 1 are worth on the scale of the ratings."""
    average: float = 0.0
    """Decay of the exponential average of the weights, step by step; 0 for the last weights."""


FR_RECIPE = Recipe(epochs=32, batch_size=16, crop=192, group=4, order_weight=1.0, frozen_stages=2)
"""For labelled pairs: an epoch is one group of every reference."""

MIXED_RECIPE = Recipe(group=4, order_weight=1.0, frozen_stages=2, pair_batch=8, average=0.995)
"""For ratings with labelled pairs beside them: an epoch is every rated image once."""


def fit(
    architecture: Architecture,
    recipe: Recipe,
    ratings: Sequence[Rating] | Sequence[Pair],
    backbone_state: dict[str, torch.Tensor],
    checkpoint: Path,
    device: str = "cpu",
    beside: Sequence[Pair] = (),
) -> CFANet:
    """Train from an ImageNet backbone. Continues from `checkpoint` when it holds this same run.

    ratings: rated images, or labelled pairs for a full-reference architecture. An epoch shows every
    image once, or of every reference one group of pairs. beside: labelled pairs for a no-reference
    architecture, whose distorted pictures are learned from in every step beside the rated images.

    The checkpoint is replaced after every epoch and removed by nobody: a finished one returns at
    once. A checkpoint of another recipe, data or architecture is ignored, with a warning.
    """
    samples = _samples(ratings, recipe)
    pairs = (
        PairGroups(list(beside), recipe.group, recipe.pair_crop, recipe.seed) if beside else None
    )
    steps = _steps(samples, recipe.batch_size)
    if pairs is not None:
        _steps(pairs, recipe.pair_batch)
    identity = json.dumps(
        [
            asdict(architecture),
            asdict(recipe),
            [(r.path.name, r.mos) for r in [*ratings, *beside]],
        ]
    )
    torch.manual_seed(recipe.seed)
    net = CFANet(architecture)
    initialise_head(net)
    backbones.load_imagenet(net.semantic_model, backbone_state)
    for stage in net.semantic_model.stages()[: recipe.frozen_stages]:
        stage.requires_grad_(False)
    net.to(device)

    optimiser = _optimiser(net, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, _WarmupCosine(recipe.warmup_steps, steps * recipe.epochs)
    )
    moving = swa_utils.get_ema_multi_avg_fn(recipe.average)  # type: ignore[no-untyped-call]
    average = swa_utils.AveragedModel(net, multi_avg_fn=moving)
    parts: dict[str, Any] = {
        "net": net,
        "average": average,
        "optimiser": optimiser,
        "schedule": schedule,
    }
    first_epoch = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        if saved["identity"] == identity:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            first_epoch = saved["epoch"]
        else:
            log.warning("%s belongs to another run: starting afresh", checkpoint)

    for epoch in range(first_epoch, recipe.epochs):
        started, total = time.monotonic(), 0.0
        torch.manual_seed(recipe.seed * 100_003 + epoch)
        net.train()
        batches: Iterator[Any] = _batches(samples, recipe.batch_size, recipe.seed, epoch)
        if pairs is not None:
            batches = zip(batches, _endless(pairs, recipe, epoch * steps), strict=False)
        for batch in batches:
            loss = _loss(net, batch, recipe, device)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            average.update_parameters(net)
            total += loss.item()
        states = {name: part.state_dict() for name, part in parts.items()}
        _save_checkpoint(checkpoint, {"identity": identity, "epoch": epoch + 1, **states})
        log.info(
            "epoch %d of %d: loss %.4f, %.0f s",
            epoch + 1,
            recipe.epochs,
            total / steps,
            time.monotonic() - started,
        )
    averaged = average.module
    assert isinstance(averaged, CFANet)
    return averaged.eval()


@torch.inference_mode()
def validate(net: CFANet, ratings: list[Rating], device: str = "cpu") -> Agreement:
    """Agreement at native resolution, one image at a time."""
    scores = []
    for rating in ratings:
        image = read_rgb(rating.path).unsqueeze(0).to(device).float() / 255
        scores.append(float(net(image)))
    return agreement(scores, [r.mos for r in ratings])


@dataclass(frozen=True)
class PairAgreement:
    """How well scores of pairs agree with their labels.

    srocc, plcc: of all pairs together. srocc_within_type: of the pairs of one kind of distortion,
    the median over kinds. ladder_srocc: of one reference under one kind at growing levels, against
    the level, the median over ladders. ladders_ordered: the share of ladders without any two levels
    swapped. identical_on_top: the share of references that score above all of their distorted
    copies.
    """

    srocc: float
    plcc: float
    srocc_within_type: float
    ladder_srocc: float
    ladders_ordered: float
    identical_on_top: float


@torch.inference_mode()
def score_pairs(net: CFANet, pairs: Sequence[Pair], device: str = "cpu") -> list[float]:
    """Scores at native size, in the order of `pairs`, reading every reference once.

    A no-reference network is given the distorted pictures alone.
    """
    found: dict[Pair, float] = {}
    for path, group in itertools.groupby(
        sorted(pairs, key=lambda p: str(p.reference)), lambda p: p.reference
    ):
        reference = read_rgb(path).unsqueeze(0).to(device).float() / 255
        while some := tuple(itertools.islice(group, 5)):
            images = torch.stack([read_rgb(pair.path) for pair in some]).to(device).float() / 255
            scores = net(images) if net.architecture.mode == "nr" else net(images, reference)
            found.update(zip(some, scores.tolist(), strict=True))
    return [found[pair] for pair in pairs]


def validate_pairs(net: CFANet, pairs: Sequence[Pair], device: str = "cpu") -> PairAgreement:
    """Score pairs at native size and compare with their labels."""
    return pair_agreement(score_pairs(net, pairs, device), pairs)


def pair_agreement(scores: Sequence[float], pairs: Sequence[Pair]) -> PairAgreement:
    """Compare scores with the labels and levels of their pairs. Raises ValueError for under 5."""
    x, rated = np.asarray(scores), np.asarray([pair.mos for pair in pairs])
    whole = agreement(x, rated)
    by_kind: dict[str, list[int]] = {}
    by_ladder: dict[tuple[Path, str], list[int]] = {}
    best: dict[Path, float] = {}
    for number, pair in enumerate(pairs):
        if pair.kind == IDENTICAL:
            continue
        by_kind.setdefault(pair.kind, []).append(number)
        by_ladder.setdefault((pair.reference, pair.kind), []).append(number)
        best[pair.reference] = max(best.get(pair.reference, -math.inf), x[number])
    within = [spearmanr(x[of], rated[of]).statistic for of in by_kind.values() if len(of) > 4]
    steps = [
        spearmanr(x[of], [-pairs[i].level for i in of]).statistic
        for of in by_ladder.values()
        # A distortion may do nothing to a picture, as desaturation to a gray one.
        if len(of) > 2 and np.ptp(x[of]) > 0
    ]
    tops = [
        x[number] > best[pair.reference]
        for number, pair in enumerate(pairs)
        if pair.kind == IDENTICAL and pair.reference in best
    ]
    return PairAgreement(
        srocc=whole.srocc,
        plcc=whole.plcc,
        srocc_within_type=_median(within),
        ladder_srocc=_median(steps),
        ladders_ordered=float(np.mean([step > 1 - 1e-9 for step in steps])) if steps else math.nan,
        identical_on_top=float(np.mean(tops)) if tops else math.nan,
    )


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else math.nan


def as_stored(net: CFANet) -> CFANet:
    """The network as its file will give it back: weights rounded to fp16, computed in fp32."""
    stored = copy.deepcopy(net)
    # By the state dict, as the file is: .half() would round the input normalisation too.
    stored.load_state_dict(
        {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    )
    return stored


def _samples(
    ratings: Sequence[Rating] | Sequence[Pair], recipe: Recipe
) -> RatedImages | PairGroups:
    pairs = [rating for rating in ratings if isinstance(rating, Pair)]
    if pairs:
        return PairGroups(pairs, recipe.group, recipe.crop, recipe.seed)
    images = [rating for rating in ratings if isinstance(rating, Rating)]
    return RatedImages(images, recipe.crop, recipe.seed)


def _loss(net: CFANet, batch: Any, recipe: Recipe, device: str) -> torch.Tensor:
    """Of images [N,3,C,C] and mos [N]; of pairs, as `_pair_loss` takes them; or of both."""
    if isinstance(batch, tuple):
        rated, distorted = batch
        of_pairs = _pair_loss(net, [part.to(device) for part in distorted], recipe)
        return _loss(net, rated, recipe, device) + recipe.pair_weight * of_pairs
    parts = [part.to(device) for part in batch]
    if len(parts) == 3:
        return _pair_loss(net, parts, recipe)
    images, mos = parts
    return quality_loss(net(images), mos, recipe.norm_weight)


def _pair_loss(net: CFANet, batch: Sequence[torch.Tensor], recipe: Recipe) -> torch.Tensor:
    """Of distorted pictures [G,K,3,C,C], their references [G,3,C,C] and mos [G,K]."""
    distorted, reference, mos = batch
    if net.architecture.mode == "fr":
        predicted = net(distorted.flatten(0, 1), reference)
    else:
        low, high = recipe.pair_range
        predicted, mos = net(distorted.flatten(0, 1)), low + (high - low) * mos
    predicted = predicted.view_as(mos)
    loss = quality_loss(predicted.flatten(), mos.flatten(), recipe.norm_weight)
    return loss + recipe.order_weight * order_loss(predicted, mos)


def _steps(samples: RatedImages | PairGroups, batch_size: int) -> int:
    """Full batches in one pass. Raises RatingsError where there is not even one."""
    per_batch = batch_size // samples.group
    if not 0 < per_batch <= len(samples):
        raise RatingsError(
            f"{len(samples)} samples of {samples.group} do not fill a batch of {batch_size}: "
            "give more, or a smaller --batch-size."
        )
    return len(samples) // per_batch


def _batches(
    samples: RatedImages | PairGroups, batch_size: int, seed: int, epoch: int
) -> Iterator[list[torch.Tensor]]:
    """Shuffled by (seed, epoch). A last, smaller batch is left out: the losses need full ones."""
    samples.epoch = epoch
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(samples))
    yield from DataLoader(
        torch.utils.data.Subset[Any](samples, [int(i) for i in order]),
        batch_size=batch_size // samples.group,
        drop_last=True,
    )


def _endless(pairs: PairGroups, recipe: Recipe, first: int) -> Iterator[list[torch.Tensor]]:
    """Batches of pairs from the step `first` of the training on, pass after pass."""
    done, start = divmod(first, _steps(pairs, recipe.pair_batch))
    for number in itertools.count(done):
        batches = _batches(pairs, recipe.pair_batch, recipe.seed, number)
        yield from itertools.islice(batches, start if number == done else 0, None)


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
