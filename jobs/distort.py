"""`topiq distort`: labelled pairs for training, made from pristine photos and no raters."""

import hashlib
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import cli

if TYPE_CHECKING:
    import numpy as np

    from topiq_core.training.distortions import RGB

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_LARGE_SIDE = 640
"""A photo with this shorter side gives a close crop beside the wide one."""

Photos = Annotated[
    list[Path], typer.Argument(help="Photos, folders of them, or CSVs with `image` and `mos`.")
]


@dataclass(frozen=True)
class Settings:
    """What decides the pixels of the set."""

    seed: int = 1
    side: int = 320
    coded: int = 4
    compressed: int = 2
    others: int = 4


def distort(
    photos: Photos,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the new set.")],
    seed: Annotated[int, typer.Option(help="Seeds crops, choice of types, and noise.")] = 1,
    side: Annotated[int, typer.Option(help="Side of the crops, in pixels; even.")] = 320,
    coded: Annotated[int, typer.Option(help="Video-coding types for each crop.")] = 4,
    compressed: Annotated[int, typer.Option(help="Picture-coding types for each crop.")] = 2,
    others: Annotated[int, typer.Option(help="Other types for each crop.")] = 4,
    best: Annotated[int, typer.Option(help="Of a CSV: so many photos of the highest MOS.")] = 40,
    processes: Annotated[int, typer.Option(help="Pictures made side by side.")] = 2,
) -> None:
    """Distort photos and label the pairs by the agreement of established metrics.

    Writes lossless crops and `pairs.csv` (`uri,reference_uri,mos,type,level,source`; 1 is the best
    MOS), which `topiq train` reads in both modes. The same command goes on where it was stopped.
    """
    from topiq_core.errors import TopiqError

    if side % 2:
        raise typer.BadParameter(f"--side {side}: it must be even, as video is.")
    settings = Settings(seed, side, coded, compressed, others)
    files = _files(photos, best)
    if not files:
        raise TopiqError("no photos there. Name pictures, a folder of them, or a CSV.")
    _refuse_namesakes(files)
    output.mkdir(parents=True, exist_ok=True)
    tasks = [(file, output, settings) for file in files]
    made: list[dict[str, Any]] = []
    for number, rows in enumerate(_all_made(tasks, processes), start=1):
        made += rows
        cli.say(f"{number} of {len(tasks)} photos, {len(made)} pairs")
    _write_csv(output, made)
    cli.say(f"{output / 'pairs.csv'}: {len(made)} pairs")


def _files(photos: Sequence[Path], best: int) -> list[Path]:
    """The photos, in a fixed order."""
    from topiq_core.errors import TopiqError
    from topiq_core.training.ratings import read_ratings

    out: list[Path] = []
    for path in photos:
        if path.is_dir():
            out += sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        elif path.suffix == ".csv":
            rated = sorted(read_ratings(path, None), key=lambda r: (-r.mos, r.path.name))
            out += [rating.path for rating in rated[:best]]
        elif path.is_file():
            out.append(path)
        else:
            raise TopiqError(f"{path}: no such picture, folder or CSV.")
    return out


def _refuse_namesakes(files: Sequence[Path]) -> None:
    """Pairs are named after the file that they were made from, and training tells photos by it."""
    from topiq_core.errors import TopiqError

    places: dict[str, Path] = {}
    for file in files:
        other = places.setdefault(file.name, file)
        if other is not file:
            raise TopiqError(f"{file}: called the same as {other}. Name it once, or rename one.")


def _all_made(
    tasks: Sequence[tuple[Path, Path, Settings]], processes: int
) -> Iterator[list[dict[str, Any]]]:
    """The pairs of each photo, in turn."""
    if processes == 1:
        yield from map(_photo, tasks)
        return
    # Not forked: the parent may hold threads.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(_photo, tasks)


def _photo(task: tuple[Path, Path, Settings]) -> list[dict[str, Any]]:
    """Every pair of one photo: a row each, with its metrics. Kept, so that it is made once."""
    import torch

    from topiq_core.training.pairs import source_name

    photo, output, settings = task
    torch.set_num_threads(1)
    name = source_name(photo)
    done = output / name / "measured.json"
    made_of = {
        "settings": asdict(settings),
        "photo": hashlib.sha256(photo.read_bytes()).hexdigest(),
    }
    if done.exists():
        kept = json.loads(done.read_text())
        rows = kept.pop("rows")
        if kept == made_of:
            return list(rows)
    done.parent.mkdir(exist_ok=True)
    rows = list(_rows(photo, done.parent, settings))
    partial = done.with_suffix(".partial")
    partial.write_text(json.dumps({**made_of, "rows": rows}))
    partial.replace(done)
    return rows


def _rows(photo: Path, folder: Path, settings: Settings) -> Iterator[dict[str, Any]]:
    import numpy as np
    import torch
    from PIL import Image

    from pipeline.media import coded
    from topiq_core.training import distortions, labels
    from topiq_core.training.ratings import read_rgb

    def written(image: "RGB", name: str) -> torch.Tensor:
        Image.fromarray(image).save(folder / f"{name}.png", compress_level=4)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    entropy = int.from_bytes(hashlib.sha256(photo.name.encode()).digest()[:8])
    rng = np.random.Generator(np.random.PCG64([settings.seed, entropy]))
    whole = np.ascontiguousarray(read_rgb(photo).permute(1, 2, 0).numpy())
    for number, reference in enumerate(_crops(whole, settings.side, rng)):
        original = f"{number}-reference"
        picture = written(reference, original)
        row = {"uri": original, "reference_uri": original, "source": folder.name}
        yield {**row, "type": "identical", "level": 0, "metrics": None}
        seed = int(rng.integers(2**32))
        chosen = [
            str(kind)
            for kinds, count in (
                (coded.KINDS, settings.coded),
                (tuple(distortions.COMPRESSIONS), settings.compressed),
                (tuple(distortions.OTHERS), settings.others),
            )
            for kind in rng.choice(kinds, min(count, len(kinds)), replace=False)
        ]
        for kind in chosen:
            copies = []
            for level in distortions.LEVELS:
                if kind in distortions.KINDS:
                    image = distortions.distort(reference, kind, level, seed)
                else:
                    image = coded.coded(reference, kind, level)
                copies.append(written(image, f"{number}-{kind}-{level}"))
            measured = labels.measure(picture, torch.stack(copies))
            for place, level in enumerate(distortions.LEVELS):
                metrics = {metric: values[place] for metric, values in measured.items()}
                uri = f"{number}-{kind}-{level}"
                yield {**row, "uri": uri, "type": kind, "level": level, "metrics": metrics}


def _crops(whole: "RGB", side: int, rng: "np.random.Generator") -> Iterator["RGB"]:
    """Squares of a photo: of much of it, shrunken; and of a large one a closer look besides."""
    from PIL import Image

    from topiq_core.training.distortions import resized

    height, width = whole.shape[:2]
    shorter = min(height, width)
    ranges = [(side, 1.5 * side)]
    if shorter >= _LARGE_SIDE:
        ranges.append((2 * side, 3 * side))
    for low, high in ranges:
        target = rng.uniform(low, max(low, min(high, shorter)))
        factor = target / shorter
        size = (max(side, round(width * factor)), max(side, round(height * factor)))
        shrunken = resized(whole, *size, Image.Resampling.LANCZOS)
        yield _busiest(shrunken, side, rng)


def _busiest(image: "RGB", side: int, rng: "np.random.Generator") -> "RGB":
    """Of three random squares the one with most detail: a clear sky shows few distortions."""
    import numpy as np

    height, width = image.shape[:2]
    squares = []
    for _ in range(3):
        top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
        squares.append(image[top : top + side, left : left + side])
    return np.ascontiguousarray(
        max(squares, key=lambda square: float(np.abs(np.diff(square.astype(float), axis=1)).mean()))
    )


def _write_csv(output: Path, rows: Sequence[dict[str, Any]]) -> None:
    import csv

    from topiq_core.training import labels

    distorted = [row for row in rows if row["metrics"] is not None]
    found = labels.labels(
        {m: [row["metrics"][m] for row in distorted] for m in distorted[0]["metrics"]},
        [f"{row['source']}/{row['reference_uri']}/{row['type']}" for row in distorted],
        [row["level"] for row in distorted],
    )
    label = iter(found)
    partial = output / "pairs.csv.partial"
    with partial.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["uri", "reference_uri", "mos", "type", "level", "source"])
        for row in rows:
            mos = labels.IDENTICAL if row["metrics"] is None else float(next(label))
            folder = row["source"]
            table.writerow(
                [
                    f"{folder}/{row['uri']}.png",
                    f"{folder}/{row['reference_uri']}.png",
                    f"{mos:.5f}",
                    row["type"],
                    row["level"],
                    folder,
                ]
            )
    partial.replace(output / "pairs.csv")


if __name__ == "__main__":
    cli.main("distort")
