"""Rated images: a CSV of file names and mean opinion scores, read as training samples."""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from topiq_core.errors import TopiqError


class RatingsError(TopiqError):
    """The ratings file cannot be used."""

    code = "bad_ratings"


@dataclass(frozen=True)
class Rating:
    """One image and its mean opinion score, scaled to 0..1.

    votes: shares of the grades from 1 up, when the file has them.
    """

    path: Path
    mos: float
    votes: tuple[float, ...] = ()


def read_ratings(path: Path, mos_range: tuple[float, float] | None) -> list[Rating]:
    """Read `image,mos` (or `uri,mos`), file names relative to the CSV. Raises RatingsError.

    Columns `votes_1` .. `votes_K`, if there are any, say how many people gave each grade.
    mos_range: the ends of the rating scale, mapped to 0 and 1; None where the order is all that
    counts.
    """
    return [
        Rating(path.parent / (row.get("image") or row["uri"]), mos, _shares(row, place))
        for place, row, mos in rated_rows(path, [("image", "uri")], mos_range)
    ]


Row = dict[str, str]


def rated_rows(
    path: Path, columns: Sequence[tuple[str, ...]], mos_range: tuple[float, float] | None
) -> Iterator[tuple[str, Row, float]]:
    """The rows of a CSV that has a column of each of `columns`, by any of its names, and `mos`.

    With each row where it stands, for messages, and its `mos` with the ends of `mos_range` mapped
    to 0 and 1. Raises RatingsError, also where there are no rows.
    """
    low, high = mos_range or (0.0, 1.0)
    if low == high:
        raise RatingsError(f"a rating scale from {low} to {high} is empty.")
    needed = " and ".join(f"`{names[0]}`" for names in [*columns, ("mos",)])
    found = False
    try:
        with path.open(newline="") as file:
            for line, row in enumerate(csv.DictReader(file, restkey=_REST), start=2):
                found, place = True, f"{path}:{line}"
                if row.get("mos") is None or not all(any(map(row.get, of)) for of in columns):
                    raise RatingsError(f"{place}: columns {needed} are needed.")
                mos = float(row["mos"])
                if not math.isfinite(mos):
                    raise RatingsError(f"{place}: {mos} is no rating.")
                if mos_range and not min(low, high) <= mos <= max(low, high):
                    raise RatingsError(
                        f"{place}: {mos:g} is not on the rating scale from {low:g} to {high:g}. "
                        "Say which one it is on with --mos-low and --mos-high."
                    )
                yield place, row, (mos - low) / (high - low)
    except (OSError, ValueError) as error:
        raise RatingsError(f"{path}: {error}") from error
    if not found:
        raise RatingsError(f"{path}: no ratings in it.")


_REST = "more cells than columns"


def _shares(row: Row, place: str) -> tuple[float, ...]:
    """The votes of a row as shares of all of them."""
    count = sum(name.startswith("votes_") for name in row)
    try:
        votes = [float(row[f"votes_{grade}"]) for grade in range(1, count + 1)]
    except (KeyError, TypeError, ValueError) as error:
        raise RatingsError(
            f"{place}: columns votes_1 to votes_{count} with numbers are needed ({error})."
        ) from error
    total = sum(votes)
    if votes and not (min(votes) >= 0 and 0 < total < math.inf):
        raise RatingsError(f"{place}: its votes are none, or negative.")
    return tuple(vote / total for vote in votes)


def split(ratings: list[Rating], seed: int, held_out: float) -> tuple[list[Rating], list[Rating]]:
    """Random training and validation parts; `held_out` is the share of the latter."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(ratings))
    cut = round(len(ratings) * (1 - held_out))
    return [ratings[i] for i in order[:cut]], [ratings[i] for i in order[cut:]]


class RatedImages(Dataset[tuple[Tensor, Tensor]]):
    """Samples for one epoch: a random crop and flip of each image, as float RGB in 0..1.

    Beside it its rating [], or with `votes` their shares [K]. The randomness is a function of
    (seed, epoch, index) alone, so a resumed run sees what an uninterrupted one would have seen.
    """

    group = 1

    def __init__(self, ratings: list[Rating], crop: int, seed: int, *, votes: bool = False) -> None:
        self.ratings, self.crop, self.seed, self.epoch = ratings, crop, seed, 0
        self.votes = votes

    def __len__(self) -> int:
        return len(self.ratings)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rating = self.ratings[index]
        rng = np.random.Generator(np.random.PCG64([self.seed, self.epoch, index]))
        image = read_rgb(rating.path)
        h, w = image.shape[1:]
        size = self.crop
        if min(h, w) < size:
            raise RatingsError(
                f"{rating.path}: {w}x{h} is smaller than the crop of {size} pixels. "
                "Leave it out, or give a smaller --crop."
            )
        top, left = int(rng.integers(0, h - size + 1)), int(rng.integers(0, w - size + 1))
        image = image[:, top : top + size, left : left + size]
        if rng.random() < 0.5:
            image = image.flip(2)
        target = rating.votes if self.votes else rating.mos
        return image.float() / 255, torch.tensor(target, dtype=torch.float32)


def read_rgb(path: Path) -> Tensor:
    """An image file as uint8 [3,H,W], as scoring sees it: upright, and over black where it is
    transparent. Raises RatingsError, also for more than 8 bits: what scoring makes of those is not
    Pillow's conversion.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in _EIGHT_BITS:
                raise RatingsError(f"{path}: {image.mode} is not of 8 bits. Convert it to 8 bits.")
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                rgba = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
            return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError) as error:
        raise RatingsError(f"{path}: cannot be read as an image ({error}).") from error


_EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
