"""`topiq train`: a model from rated photos or labelled pairs, its measured accuracy in its card."""

import dataclasses
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

Ratings = Annotated[
    Path,
    typer.Argument(help="CSV: `image,mos`, or for fr `uri,reference_uri,mos`; names relative."),
]
_HELD_OUT = 0.2


class Mode(StrEnum):
    """What the model is given."""

    NR = "nr"
    FR = "fr"


@dataclasses.dataclass(frozen=True)
class _Task:
    """One training: of the part that a split leaves, or of everything when `split` is None."""

    architecture: "Architecture"
    recipe: "Recipe"
    ratings: "Sequence[Rating] | Sequence[Pair]"
    backbone: Path
    checkpoint: Path
    device: str
    threads: int | None
    split: int | None
    beside: "Sequence[Pair]" = ()


def train(
    ratings: Ratings,
    backbone: Annotated[
        Path, typer.Option(help="MobileNetV2 ImageNet weights, in torchvision's layout.")
    ],
    output: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    work: Annotated[Path, typer.Option(help="Checkpoints; the same command resumes.")],
    trained_on: Annotated[str, typer.Option(help="What the card says it was trained on.")],
    licence: Annotated[str, typer.Option(help="What the card says of its licence.")] = "Apache-2.0",
    mode: Annotated[Mode, typer.Option(help="nr: no reference; fr: pairs.")] = Mode.NR,
    pairs: Annotated[
        Path | None,
        typer.Option(help="nr: CSV of `topiq distort`, to learn from beside the ratings."),
    ] = None,
    mos_low: Annotated[float, typer.Option(help="Worst end of the rating scale.")] = 0.0,
    mos_high: Annotated[
        float | None, typer.Option(help="Best end of the rating scale. [nr: 100, fr: 1]")
    ] = None,
    splits: Annotated[int, typer.Option(help="Random 80/20 splits to validate on.")] = 3,
    epochs: Annotated[
        int | None,
        typer.Option(help="Passes over the photos or references. [nr: 10, fr: 32]"),
    ] = None,
    crop: Annotated[
        int | None, typer.Option(help="Side of the random crops, in pixels. [nr: 256, fr: 192]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Crops per step. [nr: 8, fr: 16]")] = None,
    seed: Annotated[int, typer.Option(help="Seeds the splits, the crops and the weights.")] = 1,
    device: Annotated[str, typer.Option(help="Any torch device.")] = "cpu",
    processes: Annotated[int, typer.Option(help="Trainings side by side, one thread each.")] = 1,
) -> None:
    """Train a bundled-size model: validate on random splits, then train on all and export.

    The card's accuracy is the mean over the splits, each trained from scratch with the recipe of
    the exported model and measured on its fp16-rounded weights. Splits of pairs are by source.
    """
    import logging

    from topiq_core import weights
    from topiq_core.cards import Architecture, Card
    from topiq_core.training import loop
    from topiq_core.training.pairs import read_pairs
    from topiq_core.training.ratings import read_ratings

    gate_dim = 32 if mode is Mode.FR else 16
    architecture = Architecture(mode.value, "mobilenet_v2", 128, 4, gate_dim)
    recipe = loop.FR_RECIPE if mode is Mode.FR else loop.Recipe()
    beside: list[Pair] = []
    if pairs is not None:
        if mode is Mode.FR:
            raise typer.BadParameter("--pairs is for --mode nr: fr trains on pairs alone.")
        recipe, beside = loop.MIXED_RECIPE, read_pairs(pairs)
    asked: dict[str, Any] = {"epochs": epochs, "crop": crop, "batch_size": batch_size, "seed": seed}
    recipe = dataclasses.replace(recipe, **{k: v for k, v in asked.items() if v is not None})
    rated: list[Rating] | list[Pair]
    if mode is Mode.FR:
        rated = read_pairs(ratings, (mos_low, 1.0 if mos_high is None else mos_high))
    else:
        rated = read_ratings(ratings, (mos_low, 100.0 if mos_high is None else mos_high))

    threads = 1 if processes > 1 else None
    numbers: list[int | None] = [*range(splits), None]
    tasks = [
        _Task(
            architecture,
            recipe,
            rated,
            backbone,
            work / ("final.pt" if number is None else f"split{number}.pt"),
            device,
            threads,
            number,
            beside,
        )
        for number in numbers
    ]
    logging.getLogger("topiq_core").setLevel(logging.INFO)
    found: list[dict[str, float]] = []
    for task, measured in zip(tasks, _all_run(tasks, processes), strict=True):
        if measured is not None:
            found.append(measured)
            cli.say(
                f"split {task.split}: " + ", ".join(f"{k} {v:.4f}" for k, v in measured.items())
            )

    net = _fitted(tasks[-1], rated, beside)  # from its finished checkpoint
    card = Card(
        name=output.stem,
        architecture=architecture,
        filename=output.name,
        sha256="",
        licence=licence,
        trained_on=trained_on,
        accuracy={name: fmean(one[name] for one in found) for name in (found[0] if found else [])},
        recipe={**dataclasses.asdict(recipe), "splits": splits, "held_out": _HELD_OUT},
    )
    weights.save(net, card, output)
    cli.say(f"{output}: {output.stat().st_size / 1e6:.1f} MB, {card.accuracy}")


def _all_run(tasks: Sequence[_Task], processes: int) -> "Iterator[dict[str, float] | None]":
    """What each task measured, in turn."""
    if processes == 1:
        yield from map(_run, tasks)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn) as pool:
        yield from pool.map(_run, tasks)


def _run(task: _Task) -> dict[str, float] | None:
    """Train, and measure on what was held out. The final training measures nothing."""
    import logging

    import torch

    from topiq_core.training import loop
    from topiq_core.training.pairs import Pair, split_beside, split_by_source
    from topiq_core.training.ratings import Rating, split

    if task.threads is not None:
        name = "final" if task.split is None else f"split {task.split}"
        logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s {name}: %(message)s")
        logging.getLogger("topiq_core").setLevel(logging.INFO)
        torch.set_num_threads(task.threads)
    if task.split is None:
        _fitted(task, task.ratings, task.beside)
        return None
    seed = task.recipe.seed + task.split
    pairs = [rating for rating in task.ratings if isinstance(rating, Pair)]
    if pairs:
        kept, held_out = split_by_source(pairs, seed, _HELD_OUT)
        net = loop.as_stored(_fitted(task, kept))
        return dataclasses.asdict(loop.validate_pairs(net, held_out, task.device))
    images = [rating for rating in task.ratings if isinstance(rating, Rating)]
    training, validation = split(images, seed, _HELD_OUT)
    beside, apart = split_beside(list(task.beside), validation, images, seed, _HELD_OUT)
    net = loop.as_stored(_fitted(task, training, beside))
    measured = dataclasses.asdict(loop.validate(net, validation, task.device))
    if apart:
        of_pairs = dataclasses.asdict(loop.validate_pairs(net, apart, task.device))
        measured |= {f"pairs_{name}": value for name, value in of_pairs.items()}
    return measured


def _fitted(
    task: _Task, ratings: "Sequence[Rating] | Sequence[Pair]", beside: "Sequence[Pair]" = ()
) -> "CFANet":
    import torch

    from topiq_core.training import loop

    imagenet = torch.load(task.backbone, map_location="cpu", weights_only=True)
    return loop.fit(
        task.architecture,
        task.recipe,
        ratings,
        imagenet,
        task.checkpoint,
        task.device,
        beside,
    )


if __name__ == "__main__":
    cli.main("train")
