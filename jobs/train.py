"""`topiq train`: a model from rated photos or labelled pairs, its measured accuracy in its card."""

import dataclasses
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from enum import StrEnum
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import cli

if TYPE_CHECKING:
    from topiq_core.cards import Architecture
    from topiq_core.cfanet import CFANet
    from topiq_core.training.loop import Recipe
    from topiq_core.training.pairs import Pair
    from topiq_core.training.ratings import Rating
    from topiq_core.weights import Weights

Ratings = Annotated[
    Path,
    typer.Argument(help="CSV: `image,mos`, or for fr `uri,reference_uri,mos`; names relative."),
]
_HELD_OUT = 0.2
_LEAST_HELD_OUT = 5
"""Agreement of fewer has no meaning."""
_NARROW = 0.2
"""Ratings within so little of their scale make one wonder about the scale."""
_WATCHED = 0.1


class Mode(StrEnum):
    """What the model is given."""

    NR = "nr"
    FR = "fr"


class Loss(StrEnum):
    """What is made small."""

    NORM = "norm"
    PLCC = "plcc"
    EMD = "emd"


class Precision(StrEnum):
    """Of the maps in training."""

    FP32 = "fp32"
    BF16 = "bf16"


@dataclasses.dataclass(frozen=True)
class _Task:
    """One training: of the part that a split leaves, or of everything when `split` is None."""

    architecture: "Architecture"
    recipe: "Recipe"
    ratings: "Sequence[Rating] | Sequence[Pair]"
    start: "Path | Weights"
    checkpoint: Path
    device: str
    threads: int | None
    split: int | None
    beside: "Sequence[Pair]" = ()
    events: Path | None = None

    @property
    def name(self) -> str:
        """As the log and TensorBoard call it."""
        return "final" if self.split is None else f"split{self.split}"


@dataclasses.dataclass(frozen=True)
class _Found:
    """Of what a split held out: agreement, and outputs and ratings of the images."""

    accuracy: dict[str, float]
    outputs: list[float]
    ratings: list[float]


def train(
    ratings: Ratings,
    output: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    work: Annotated[Path, typer.Option(help="Checkpoints; the same command resumes.")],
    trained_on: Annotated[str, typer.Option(help="What the card says it was trained on.")],
    licence: Annotated[str, typer.Option(help="What the card says of its licence.")] = "Apache-2.0",
    backbone: Annotated[
        Path | None, typer.Option(help="MobileNetV2 ImageNet weights, in torchvision's layout.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(help="In place of a backbone: the model to go on from, by name or file."),
    ] = None,
    mode: Annotated[Mode, typer.Option(help="nr: no reference; fr: pairs.")] = Mode.NR,
    pairs: Annotated[
        Path | None,
        typer.Option(help="nr: CSV of `topiq distort`, to learn from beside the ratings."),
    ] = None,
    mos_low: Annotated[float, typer.Option(help="Worst end of the rating scale.")] = 0.0,
    mos_high: Annotated[
        float | None, typer.Option(help="Best end of the rating scale (nr: 100, fr: 1).")
    ] = None,
    splits: Annotated[int, typer.Option(help="Random 80/20 splits to validate on.")] = 3,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Passes over the photos or references (nr: 10, nr with --pairs: 18, fr: 32)."
        ),
    ] = None,
    crop: Annotated[
        int | None, typer.Option(help="Side of the random crops, in pixels (nr: 256, fr: 192).")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Crops per step (nr: 8, fr: 16).")] = None,
    seed: Annotated[int, typer.Option(help="Seeds the splits, the crops and the weights.")] = 1,
    device: Annotated[str, typer.Option(help="Any torch device.")] = "cpu",
    processes: Annotated[int, typer.Option(help="Trainings side by side, one thread each.")] = 1,
    workers: Annotated[
        int, typer.Option(help="Ray Train workers for each training, on one machine or a cluster.")
    ] = 1,
    loss: Annotated[
        Loss, typer.Option(help="norm: norm-in-norm; plcc; emd: of columns votes_1, votes_2 ..")
    ] = Loss.NORM,
    accumulate: Annotated[int, typer.Option(help="Batches summed up for a step.")] = 1,
    precision: Annotated[Precision, typer.Option(help="bf16 is for GPUs.")] = Precision.FP32,
    patience: Annotated[
        int, typer.Option(help="Stop after so many epochs without a better SROCC; 0: never.")
    ] = 0,
    tensorboard: Annotated[bool, typer.Option(help="Write events to WORK/events.")] = False,
    scale: Annotated[
        str, typer.Option(help="What the card says that the ends of the rating scale mean.")
    ] = "0 is the worst and 1 the best end of the rating scale",
) -> None:
    """Train a bundled-size model: validate on random splits, then train on all and export.

    The card's accuracy is the mean over the splits, each trained from scratch with the recipe of
    the exported model and measured on its fp16-rounded weights. Splits of pairs are by source.
    What the held-out ratings say of its outputs calibrates a no-reference model.

    Of pairs beside ratings, changes of tone and colour are not learned from: only the original
    tells them. With --patience a tenth of the training part is watched, and kept out of training.
    """
    import logging

    from topiq_core import metrics, weights
    from topiq_core.cards import Architecture, Card
    from topiq_core.cfanet import LEVELS
    from topiq_core.training import loop
    from topiq_core.training.pairs import read_pairs
    from topiq_core.training.ratings import read_ratings

    if processes > 1 and workers > 1:
        raise typer.BadParameter("--processes and --workers exclude each other.")
    recipe = loop.FR_RECIPE if mode is Mode.FR else loop.Recipe()
    beside: list[Pair] = []
    if pairs is not None:
        if mode is Mode.FR:
            raise typer.BadParameter("--pairs is for --mode nr: fr trains on pairs alone.")
        recipe, beside = loop.MIXED_RECIPE, read_pairs(pairs)
    asked: dict[str, Any] = {
        "epochs": epochs,
        "crop": crop,
        "pair_crop": crop,
        "late_pair_crop": crop,
        "batch_size": batch_size,
        "seed": seed,
        "loss": loss.value,
        "accumulate": accumulate,
        "precision": precision.value,
        "patience": patience,
        "workers": workers,
    }
    recipe = dataclasses.replace(recipe, **{k: v for k, v in asked.items() if v is not None})
    rated: list[Rating] | list[Pair]
    outputs = 1
    if mode is Mode.FR:
        rated = read_pairs(ratings, (mos_low, 1.0 if mos_high is None else mos_high))
    else:
        rated = read_ratings(ratings, (mos_low, 100.0 if mos_high is None else mos_high))
        outputs = len(rated[0].votes) if loss is Loss.EMD else 1
    low, high = min(r.mos for r in rated), max(r.mos for r in rated)
    if high - low < _NARROW:
        cli.say(
            f"ratings take up {low:.2f} to {high:.2f} of their scale, 0 to 1, alone: are --mos-low "
            "and --mos-high right?"
        )
    if splits and round(_HELD_OUT * len(rated)) < _LEAST_HELD_OUT:
        raise typer.BadParameter(
            f"{len(rated)} ratings are too few to hold out a fifth and measure on it: rate "
            f"{math.ceil(_LEAST_HELD_OUT / _HELD_OUT)} or more, or give --splits 0."
        )
    _require_device(device)
    if mode is Mode.FR:
        architecture = Architecture("fr", "mobilenet_v2", 128, heads=4, gate_dim=32)
    else:
        architecture = Architecture(
            "nr", "mobilenet_v2", 128, 2, 16, outputs, grid=recipe.crop // 2**LEVELS
        )
    if (backbone is None) == (start is None):
        raise typer.BadParameter("give either --backbone, or --start with a model to go on from.")
    origin: Path | Weights
    if start is not None:
        origin = weights.resolve(start)
        known = origin.card.architecture
        if (known.mode, known.outputs) != (architecture.mode, outputs):
            raise typer.BadParameter(
                f"--start {start}: a model of mode {known.mode} with {known.outputs} outputs; "
                f"{architecture.mode} with {outputs} is trained here."
            )
        architecture = known
        recipe = dataclasses.replace(recipe, start=f"{origin.card.name} {origin.sha256}")
    else:
        assert backbone is not None
        origin = backbone.absolute()
        recipe = dataclasses.replace(recipe, start=f"{backbone.name} {weights.sha256_of(origin)}")

    template = _Task(
        architecture,
        recipe,
        rated,
        origin,
        (work / "final.pt").absolute(),
        device,
        threads=1 if processes > 1 else None,
        split=None,
        beside=beside,
        events=(work / "events").absolute() if tensorboard else None,
    )
    tasks = [
        dataclasses.replace(template, split=n, checkpoint=(work / f"split{n}.pt").absolute())
        for n in range(splits)
    ]
    logging.getLogger("topiq_core").setLevel(logging.INFO)
    found: list[_Found] = []
    tasks.append(template)
    for task, measured in zip(tasks, _all_run(tasks, processes), strict=True):
        if measured is not None:
            found.append(measured)
            figures = ", ".join(f"{name} {value:.4f}" for name, value in measured.accuracy.items())
            cli.say(f"{task.name}: {figures}")

    calibration = None
    if mode is Mode.NR and loss is not Loss.EMD and found:
        try:
            calibration = metrics.fit_calibration(
                [output for one in found for output in one.outputs],
                [rating for one in found for rating in one.ratings],
                scale,
            )
        except ValueError as error:
            cli.say(f"not calibrated: {error}")
    net = _fit(template, _parts(template), _here(template))  # from its finished checkpoint
    names = found[0].accuracy if found else {}
    card = Card(
        name=output.stem,
        architecture=architecture,
        filename=output.name,
        sha256="",
        licence=licence,
        trained_on=trained_on,
        score_range=(0.0, 1.0) if outputs == 1 else (1.0, float(outputs)),
        accuracy={name: fmean(one.accuracy[name] for one in found) for name in names},
        recipe={**dataclasses.asdict(recipe), "splits": splits, "held_out": _HELD_OUT},
        calibration=calibration,
    )
    weights.save(net, card, output)
    cli.say(f"{output}: {output.stat().st_size / 1e6:.1f} MB, {card.accuracy}")


def _require_device(device: str) -> None:
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"--device {device}: cannot be used ({reason}).") from error


def _all_run(tasks: Sequence[_Task], processes: int) -> "Iterator[_Found | None]":
    """What each task measured, in turn."""
    if processes == 1:
        yield from map(_run, tasks)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn) as pool:
        yield from pool.map(_run, tasks)


def _run(task: _Task) -> _Found | None:
    """Train, and measure on what was held out. The final training measures nothing."""
    import logging

    import torch

    from topiq_core.metrics import agreement
    from topiq_core.training import loop
    from topiq_core.training.distortions import GRADING
    from topiq_core.training.pairs import Pair, source_name
    from topiq_core.training.ratings import Rating

    if task.threads is not None:
        named = f"%(asctime)s {task.name}: %(message)s"
        # Forced: a process runs one task after another.
        logging.basicConfig(level=logging.WARNING, format=named, force=True)
        logging.getLogger("topiq_core").setLevel(logging.INFO)
        torch.set_num_threads(task.threads)
    parts = _parts(task)
    net = loop.as_stored(_fitted(task, parts))
    images = [rating for rating in parts.held_out if isinstance(rating, Rating)]
    pairs = [rating for rating in parts.held_out if isinstance(rating, Pair)]
    if not parts.held_out:
        return None
    accuracy: dict[str, float] = {}
    outputs = loop.score_images(net, images, _here(task))
    if images:
        # Only what began undistorted: labels say how far a copy is from the photo it was made of.
        poor = {source_name(r.path) for r in task.ratings if r.mos < task.recipe.pair_range[1]}
        pairs = [pair for pair in pairs if pair.source not in poor]
        rated = [rating.mos for rating in images]
        accuracy = dataclasses.asdict(agreement(outputs, rated))
    if pairs:
        scores = loop.score_pairs(net, pairs, _here(task))
        if not images:
            accuracy |= dataclasses.asdict(loop.pair_agreement(scores, pairs))
        else:
            every = loop.pair_agreement(scores, pairs)
            accuracy |= {"all_pairs_srocc": every.srocc, "all_pairs_plcc": every.plcc}
            learnt = [i for i, pair in enumerate(pairs) if pair.kind not in GRADING]
            of_pairs = loop.pair_agreement([scores[i] for i in learnt], [pairs[i] for i in learnt])
            accuracy |= {f"pairs_{k}": v for k, v in dataclasses.asdict(of_pairs).items()}
    return _Found(accuracy, outputs, [rating.mos for rating in images])


def _parts(task: _Task) -> "_Parts":
    """What a task learns from, watches and holds out: never the same photo, in any form."""
    from topiq_core.training.distortions import GRADING
    from topiq_core.training.pairs import Pair, split_beside, split_by_source
    from topiq_core.training.ratings import Rating, split

    images = [rating for rating in task.ratings if isinstance(rating, Rating)]
    pairs = [rating for rating in task.ratings if isinstance(rating, Pair)]
    beside, seed = list(task.beside), task.recipe.seed + (task.split or 0)
    held_out: list[Rating | Pair] = []
    watched: list[Rating] | list[Pair] = []
    if task.split is not None:
        whole = images
        images, apart = split(images, seed, _HELD_OUT)
        beside, beside_apart = split_beside(beside, apart, whole, seed, _HELD_OUT)
        pairs, pairs_apart = split_by_source(pairs, seed, _HELD_OUT)
        held_out = [*apart, *beside_apart, *pairs_apart]
    if task.recipe.patience:
        if pairs:
            pairs, watched = split_by_source(pairs, seed, _WATCHED)
        else:
            whole = images
            images, watched = split(images, seed, _WATCHED)
            beside, _ = split_beside(beside, watched, whole, seed, 0.0)
    beside = [pair for pair in beside if pair.kind not in GRADING]
    return _Parts(pairs or images, beside, watched, held_out)


@dataclasses.dataclass(frozen=True)
class _Parts:
    ratings: "Sequence[Rating] | Sequence[Pair]"
    beside: "Sequence[Pair]"
    watched: "Sequence[Rating] | Sequence[Pair]"
    held_out: "Sequence[Rating | Pair]"


def _fitted(task: _Task, parts: _Parts) -> "CFANet":
    """Train, by Ray Train when there are several workers; or only load what is finished."""
    if task.recipe.workers > 1:
        import ray.train
        from ray.train.torch import TorchTrainer

        from pipeline import cluster
        from pipeline.config import Config

        cluster.connect(Config())

        def on_a_worker() -> None:
            _fit(task, parts, str(ray.train.torch.get_device()))

        TorchTrainer(
            on_a_worker,
            scaling_config=ray.train.ScalingConfig(
                num_workers=task.recipe.workers, use_gpu=task.device.startswith("cuda")
            ),
            run_config=ray.train.RunConfig(
                name=task.name, storage_path=str(task.checkpoint.parent / "ray_train")
            ),
        ).fit()
    return _fit(task, parts, _here(task))


def _here(task: _Task) -> str:
    """The device for what this process does itself: beside workers it may be on a bare head."""
    import torch

    beside_workers = task.recipe.workers > 1 and not torch.cuda.is_available()
    return "cpu" if beside_workers else task.device


def _fit(task: _Task, parts: _Parts, device: str) -> "CFANet":
    import torch

    from topiq_core import weights
    from topiq_core.training import loop

    start: dict[str, torch.Tensor] | CFANet
    if isinstance(task.start, Path):
        start = torch.load(task.start, map_location="cpu", weights_only=True)
    else:
        start = weights.load(task.start)
    return loop.fit(
        task.architecture,
        task.recipe,
        parts.ratings,
        start,
        task.checkpoint,
        device,
        parts.beside,
        parts.watched,
        task.events and task.events / task.name,
    )


if __name__ == "__main__":
    cli.main("train")
