"""The training loop: the paper's recipe (section IV), seeded and resumable by the same command."""

import copy
import itertools
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import swa_utils
from torch.utils.data import DataLoader

from topiq_core import backbones
from topiq_core.cards import Architecture
from topiq_core.cfanet import CFANet, expected_score, initialise_head
from topiq_core.errors import TopiqError
from topiq_core.metrics import agreement
from topiq_core.training.losses import emd_loss, order_loss, plcc_loss, quality_loss
from topiq_core.training.pairs import IDENTICAL, Pair, PairGroups, rated_as
from topiq_core.training.ratings import RatedImages, Rating, RatingsError, read_rgb

log = logging.getLogger(__name__)


Loss = Literal["norm", "plcc", "emd"]


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
    loss: Loss = "norm"
    """norm: squared error and norm-in-norm; plcc: squared error and PLCC; emd: of votes."""
    norm_weight: float = 0.5
    """Of norm-in-norm or PLCC beside the squared error."""
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
    """Beside ratings: what a pair's labels 0 and 1 are worth on the scale of the ratings. A copy of
    a photo that is rated lower than the upper end has this rating in its place."""
    late: float = 0.0
    """This share of the epochs, the last ones, begins with the learning rate at its peak again and
    ends with another cosine (SGDR, Loshchilov and Hutter 2017); 0 for one cosine."""
    late_pair_crop: int = 256
    """Beside ratings: as `pair_crop`, in the late epochs."""
    late_pair_batch: int = 14
    """Beside ratings: as `pair_batch`, in the late epochs."""
    late_weight: float = 1.0
    """So far from the weights before the late epochs to those after them lies what is returned
    (WiSE-FT, Wortsman et al. 2022); 1 for the latter alone. With `patience`, no part."""
    average: float = 0.0
    """Decay of the exponential average of the weights, step by step; 0 for the last weights."""
    accumulate: int = 1
    """Batches whose gradients are summed up before each step."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: maps in bfloat16 (autocast), weights and losses in fp32. For GPUs."""
    patience: int = 0
    """Stop after so many epochs in a row without a better SROCC on what is watched; 0: never."""
    workers: int = 1
    """Processes that train together, each on batches of its own."""
    start: str = ""
    """What the training goes on from, a model or a backbone, by name and hash."""

    @property
    def first_late(self) -> int:
        """The first of the late epochs, counted from 0."""
        return self.epochs - round(self.late * self.epochs)


FR_RECIPE = Recipe(epochs=32, batch_size=16, crop=192, group=4, order_weight=1.0, frozen_stages=2)
"""For labelled pairs: an epoch is one group of every reference."""

MIXED_RECIPE = Recipe(
    epochs=18,
    late=1 / 3,
    late_weight=0.7,
    head_lr=6e-4,
    backbone_lr=2e-4,
    group=2,
    order_weight=1.0,
    frozen_stages=2,
    pair_batch=24,
    average=0.99,
)
"""For ratings with labelled pairs beside them: an epoch is every rated image once."""


def fit(
    architecture: Architecture,
    recipe: Recipe,
    ratings: Sequence[Rating] | Sequence[Pair],
    start: dict[str, torch.Tensor] | CFANet,
    checkpoint: Path,
    device: str = "cpu",
    beside: Sequence[Pair] = (),
    watched: Sequence[Rating] | Sequence[Pair] = (),
    events: Path | None = None,
) -> CFANet:
    """Train a network. Continues from `checkpoint` when it holds this same run.

    start: an ImageNet checkpoint of the backbone, or a network of this architecture to go on from,
    which the recipe should name.

    ratings: rated images, or labelled pairs for a full-reference architecture. An epoch shows every
    image once, or of every reference one group of pairs. beside: labelled pairs for a no-reference
    architecture, whose distorted pictures are learned from in every step beside the rated images.
    watched: held out; after each epoch its SROCC is taken, and with `patience` the weights of the
    best epoch are returned. events: a folder for TensorBoard.

    The checkpoint is replaced after every epoch and removed by nobody: a finished one returns at
    once. A checkpoint of another recipe, data or architecture is ignored, with a warning.

    With `workers`, each process of a torch.distributed group calls this alike, and gradients are
    averaged over them; the first one writes the checkpoint, which all must be able to read.
    """
    if recipe.patience and not watched:
        raise RatingsError("patience needs ratings to watch, and there are none.")
    grades = {len(r.votes) if isinstance(r, Rating) else 0 for r in ratings}
    if recipe.loss == "emd" and (architecture.outputs < 2 or grades != {architecture.outputs}):
        raise RatingsError(
            "loss emd needs columns votes_1, votes_2 .. with the votes of every image, for the "
            "same two grades or more."
        )
    samples = _samples(ratings, recipe)
    steps = _steps(samples, recipe.batch_size) // (recipe.accumulate * recipe.workers)
    if not steps:
        raise RatingsError(
            f"{len(samples)} samples are fewer than one step takes, with {recipe.workers} workers "
            f"and {recipe.accumulate} batches each: give more, or a smaller --batch-size."
        )
    pairs = None
    if beside:
        photos = [rating for rating in ratings if isinstance(rating, Rating)]
        beside = rated_as(beside, photos, *recipe.pair_range)
        pairs = PairGroups(beside, recipe.group, recipe.pair_crop, recipe.seed)
    identity = json.dumps(
        [
            asdict(architecture),
            asdict(recipe),
            [(r.path.name, r.mos) for r in [*ratings, *beside]],
            [r.votes for r in ratings if isinstance(r, Rating) and r.votes],
            [r.path.name for r in watched],
        ]
    )
    torch.manual_seed(recipe.seed)
    net = CFANet(architecture)
    if isinstance(start, CFANet):
        net.load_state_dict(start.state_dict())
    else:
        initialise_head(net)
        backbones.load_imagenet(net.semantic_model, start)
    for stage in net.semantic_model.stages()[: recipe.frozen_stages]:
        stage.requires_grad_(False)
    net.to(device)
    if architecture.mode == "nr":
        # On CPUs a tenth faster; with two sides it is not. Images follow by themselves.
        net.to(memory_format=torch.channels_last)

    optimiser = _optimiser(net, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        _WarmupCosine(recipe.warmup_steps, steps * recipe.epochs, steps * recipe.first_late),
    )
    moving = swa_utils.get_ema_multi_avg_fn(recipe.average)  # type: ignore[no-untyped-call]
    average = swa_utils.AveragedModel(net, multi_avg_fn=moving)
    averaged = average.module
    assert isinstance(averaged, CFANet)
    parts: dict[str, Any] = {
        "net": net,
        "average": average,
        "optimiser": optimiser,
        "schedule": schedule,
    }
    first_epoch, best = 0, _Best()
    early: dict[str, torch.Tensor] = {}
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        if saved["identity"] == identity:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            first_epoch, best = saved["epoch"], _Best(**saved["best"])
            early = saved["early"]
        else:
            log.warning("%s belongs to another run: starting afresh", checkpoint)

    def over(epoch: int) -> bool:
        """Whether nothing is left to do after so many epochs."""
        tired = recipe.patience and epoch - best.epoch >= recipe.patience
        return epoch >= recipe.epochs or (best.epoch > 0 and bool(tired))

    rank = 0 if over(first_epoch) else _joined(recipe)
    objective: nn.Module = _Objective(net, recipe, torch.device(device).type)
    if recipe.workers > 1 and not over(first_epoch):
        objective = DistributedDataParallel(
            objective, broadcast_buffers=False, find_unused_parameters=True
        )
    for epoch in range(first_epoch, recipe.epochs):
        if over(epoch):
            break
        started, total = time.monotonic(), 0.0
        if epoch == recipe.first_late:
            now = averaged.state_dict()
            early = {k: v.clone() for k, v in now.items() if v.is_floating_point()}
        torch.manual_seed(recipe.seed * 100_003 + epoch + 7_919 * rank)
        net.train()
        batches = _batches(samples, recipe.batch_size, recipe.seed, epoch)
        taken: Iterator[Any] = itertools.islice(batches, rank, None, recipe.workers)
        if pairs is not None:
            first = (epoch * steps * recipe.accumulate) * recipe.workers + rank
            late = epoch >= recipe.first_late
            pairs.crop = recipe.late_pair_crop if late else recipe.pair_crop
            pair_batch = recipe.late_pair_batch if late else recipe.pair_batch
            # Of a few photos there are no more groups at a time.
            pair_batch = min(pair_batch, len(pairs) * recipe.group)
            others = _endless(pairs, pair_batch, recipe.seed, first)
            taken = zip(taken, itertools.islice(others, 0, None, recipe.workers), strict=False)
        for _ in range(steps):
            optimiser.zero_grad()
            for batch in itertools.islice(taken, recipe.accumulate):
                loss = objective(_moved(batch, device)) / recipe.accumulate
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            average.update_parameters(net)
        scalars = {"loss": total / steps, "learning_rate": float(schedule.get_last_lr()[-1])}
        if watched:
            scalars["srocc"] = _srocc(averaged.eval(), watched, device)
            if scalars["srocc"] > best.srocc:
                weights = {k: v.clone() for k, v in averaged.state_dict().items()}
                best = _Best(epoch + 1, scalars["srocc"], weights if recipe.patience else {})
        if rank == 0:
            states: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
            states |= {"best": vars(best), "early": early}
            _save_checkpoint(checkpoint, {"identity": identity, "epoch": epoch + 1, **states})
            log.info(
                "epoch %d of %d: %s, %.0f s",
                epoch + 1,
                recipe.epochs,
                ", ".join(f"{name} {value:.4g}" for name, value in scalars.items()),
                time.monotonic() - started,
            )
            _log_events(events, scalars, epoch + 1)
    if best.weights:
        averaged.load_state_dict(best.weights)
    elif early:
        after = averaged.state_dict()
        between = {k: torch.lerp(v, after[k], recipe.late_weight) for k, v in early.items()}
        averaged.load_state_dict(after | between)
    return averaged.eval()


@dataclass
class _Best:
    """The epoch, counted from 1, with the best SROCC on what is watched, and its weights."""

    epoch: int = 0
    srocc: float = -math.inf
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def _joined(recipe: Recipe) -> int:
    """This process's place among those that train together."""
    together = distributed.is_available() and distributed.is_initialized()
    workers = distributed.get_world_size() if together else 1
    if workers != recipe.workers:
        raise TopiqError(
            f"{workers} processes train together, the recipe says {recipe.workers}. If the workers "
            "have finished, their checkpoint cannot be seen from here: give a shared --work folder."
        )
    return distributed.get_rank() if together else 0


def _moved(batch: Any, device: str) -> Any:
    """A batch of rated images, of pairs, or a tuple of both, on the device."""
    if isinstance(batch, tuple):
        return tuple(_moved(part, device) for part in batch)
    return [part.to(device) for part in batch]


def _log_events(folder: Path | None, scalars: dict[str, float], epoch: int) -> None:
    """Scalars for TensorBoard. A repeated epoch replaces what was there."""
    if folder is None:
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TopiqError("TensorBoard is not installed: pip install -e '.[train]'.") from error
    with SummaryWriter(str(folder), purge_step=epoch) as writer:
        for name, value in scalars.items():
            writer.add_scalar(name, value, epoch)


def _srocc(net: CFANet, rated: Sequence[Rating] | Sequence[Pair], device: str) -> float:
    pairs = [rating for rating in rated if isinstance(rating, Pair)]
    images = [rating for rating in rated if isinstance(rating, Rating)]
    scores = score_pairs(net, pairs, device) if pairs else score_images(net, images, device)
    return float(spearmanr(scores, [rating.mos for rating in rated]).statistic)


@torch.inference_mode()
def score_images(net: CFANet, ratings: Sequence[Rating], device: str = "cpu") -> list[float]:
    """Scores at native size, one image at a time."""
    return [
        float(net(read_rgb(rating.path).unsqueeze(0).to(device).float() / 255))
        for rating in ratings
    ]


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
    return RatedImages(images, recipe.crop, recipe.seed, votes=recipe.loss == "emd")


class _Objective(nn.Module):
    """The loss as a module, so that DistributedDataParallel sees one call a step."""

    def __init__(self, net: CFANet, recipe: Recipe, device_type: str) -> None:
        super().__init__()
        self.net, self.recipe, self.device_type = net, recipe, device_type

    def forward(self, batch: Any) -> torch.Tensor:
        """Of images [N,3,C,C] and ratings [N] or votes [N,K]; of pairs; or of a tuple of both."""
        if isinstance(batch, tuple):
            (images, rated), (distorted, _, mos) = batch
            of_images, of_pairs = self._outputs(images, distorted.flatten(0, 1))
            loss = self._of_pairs(of_pairs, mos)
            return self._of_images(of_images, rated) + self.recipe.pair_weight * loss
        if len(batch) == 3:
            distorted, reference, mos = batch
            return self._of_pairs(self._output(distorted.flatten(0, 1), reference), mos)
        images, rated = batch
        return self._of_images(self._output(images), rated)

    def _of_images(self, output: torch.Tensor, rated: torch.Tensor) -> torch.Tensor:
        if self.recipe.loss == "emd":
            return emd_loss(output, rated)
        return self._quality(expected_score(output), rated)

    def _of_pairs(self, output: torch.Tensor, mos: torch.Tensor) -> torch.Tensor:
        """Of outputs [G*K,...] for groups of pairs with mos [G,K]."""
        predicted = expected_score(output).view_as(mos)
        loss = self._quality(predicted.flatten(), mos.flatten())
        return loss + self.recipe.order_weight * order_loss(predicted, mos)

    def _outputs(self, *parts: torch.Tensor) -> Iterator[torch.Tensor]:
        """Outputs of batches of images; together where they are of one size, which is faster."""
        if len({part.shape[1:] for part in parts}) == 1:
            sizes = [len(part) for part in parts]
            yield from torch.split(self._output(torch.cat(parts)), sizes)
        else:
            yield from map(self._output, parts)

    def _output(self, *images: torch.Tensor) -> torch.Tensor:
        bf16 = self.recipe.precision == "bf16"
        with torch.autocast(self.device_type, torch.bfloat16, enabled=bf16):
            return self.net.distribution(*images).float()

    def _quality(self, predicted: torch.Tensor, rated: torch.Tensor) -> torch.Tensor:
        if self.recipe.loss == "plcc":
            mse = nn.functional.mse_loss(predicted, rated)
            return mse + self.recipe.norm_weight * plcc_loss(predicted, rated)
        return quality_loss(predicted, rated, self.recipe.norm_weight)


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


def _endless(
    pairs: PairGroups, batch_size: int, seed: int, first: int
) -> Iterator[list[torch.Tensor]]:
    """Batches of pairs from the step `first` of the training on, pass after pass."""
    done, start = divmod(first, _steps(pairs, batch_size))
    for number in itertools.count(done):
        batches = _batches(pairs, batch_size, seed, number)
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
    """Learning-rate factor by step: linear to 1, then a cosine to 0; all again from `restart`."""

    def __init__(self, warmup: int, total: int, restart: int) -> None:
        self.warmup, self.total, self.restart = warmup, total, restart

    def __call__(self, step: int) -> float:
        again = self.restart <= step < self.total
        begun, end = (self.restart, self.total) if again else (0, self.restart)
        step, steps = step - begun, end - begun
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _save_checkpoint(path: Path, state: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    partial.replace(path)
