"""`topiq train`: a no-reference model from rated photos, with its measured accuracy in its card."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from jobs import cli

Ratings = Annotated[Path, typer.Argument(help="CSV with `image,mos`; names relative to the CSV.")]


def train(
    ratings: Ratings,
    backbone: Annotated[
        Path, typer.Option(help="MobileNetV2 ImageNet weights, in torchvision's layout.")
    ],
    output: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    work: Annotated[Path, typer.Option(help="Checkpoints; the same command resumes.")],
    trained_on: Annotated[str, typer.Option(help="What the card says it was trained on.")],
    licence: Annotated[str, typer.Option(help="What the card says of its licence.")] = "Apache-2.0",
    mos_low: Annotated[float, typer.Option(help="Worst end of the rating scale.")] = 0.0,
    mos_high: Annotated[float, typer.Option(help="Best end of the rating scale.")] = 100.0,
    splits: Annotated[int, typer.Option(help="Random 80/20 splits to validate on.")] = 3,
    epochs: Annotated[int, typer.Option(help="Passes over the training photos.")] = 10,
    crop: Annotated[int, typer.Option(help="Side of the random crops, in pixels.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Crops per step.")] = 8,
    seed: Annotated[int, typer.Option(help="Seeds the splits, the crops and the weights.")] = 1,
    device: Annotated[str, typer.Option(help="Any torch device.")] = "cpu",
) -> None:
    """Train a bundled-size model: validate on random splits, then train on all and export.

    The card's accuracy is the mean over the splits, each trained from scratch with the recipe of
    the exported model and measured on its fp16-rounded weights.
    """
    import logging

    import torch

    from topiq_core import weights
    from topiq_core.cards import Architecture, Card
    from topiq_core.training import loop
    from topiq_core.training.ratings import read_ratings, split

    logging.getLogger("topiq_core").setLevel(logging.INFO)
    architecture = Architecture("nr", "mobilenet_v2", inter_dim=128, heads=4, gate_dim=32)
    recipe = loop.Recipe(epochs=epochs, batch_size=batch_size, crop=crop, seed=seed)
    rated = read_ratings(ratings, (mos_low, mos_high))
    imagenet = torch.load(backbone, map_location="cpu", weights_only=True)

    found = []
    for number in range(splits):
        training, validation = split(rated, seed=seed + number, held_out=0.2)
        checkpoint = work / f"split{number}.pt"
        net = loop.fit(architecture, recipe, training, imagenet, checkpoint, device)
        found.append(loop.validate(loop.as_stored(net), validation, device))
        cli.say(f"split {number}: SROCC {found[-1].srocc:.4f}, PLCC {found[-1].plcc:.4f}")

    net = loop.fit(architecture, recipe, rated, imagenet, work / "final.pt", device)
    names = [f.name for f in dataclasses.fields(found[0])] if found else []
    card = Card(
        name=output.stem,
        architecture=architecture,
        filename=output.name,
        sha256="",
        licence=licence,
        trained_on=trained_on,
        accuracy={n: sum(getattr(a, n) for a in found) / len(found) for n in names},
        recipe={**dataclasses.asdict(recipe), "splits": splits, "held_out": 0.2},
    )
    weights.save(net, card, output)
    cli.say(f"{output}: {output.stat().st_size / 1e6:.1f} MB, {card.accuracy}")


if __name__ == "__main__":
    cli.main("train")
