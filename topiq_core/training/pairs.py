"""Labelled pairs: a CSV of distorted pictures and their references, read as training samples."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from topiq_core.training.ratings import Rating, RatingsError, Row, rated_rows, read_rgb

IDENTICAL = "identical"
"""The type of a pair whose sides are the same picture."""


@dataclass(frozen=True)
class Pair:
    """A distorted picture, its reference, and their quality, 0..1.

    kind and level: which distortion, and how much of it. source: the photo that it began with;
    pairs of one source go to the same side of a split.
    """

    path: Path
    reference: Path
    mos: float
    kind: str
    level: int
    source: str


def read_pairs(path: Path, mos_range: tuple[float, float] = (0.0, 1.0)) -> list[Pair]:
    """Read `uri,reference_uri,mos`, names relative to the CSV. Raises RatingsError.

    `type`, `level` and `source` may be left out: the source is then the reference.
    """
    return [
        Pair(
            path.parent / row["uri"],
            path.parent / row["reference_uri"],
            mos,
            row.get("type") or "",
            _level(row, place),
            row.get("source") or row["reference_uri"],
        )
        for place, row, mos in rated_rows(path, [("uri",), ("reference_uri",)], mos_range)
    ]


def _level(row: Row, place: str) -> int:
    try:
        return int(row.get("level") or 0)
    except ValueError as error:
        raise RatingsError(f"{place}: {error}.") from error


def split_by_source(pairs: list[Pair], seed: int, held_out: float) -> tuple[list[Pair], list[Pair]]:
    """Training and validation parts that share no source; `held_out` is of the sources."""
    sources = sorted({pair.source for pair in pairs})
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(sources))
    kept = {sources[i] for i in order[: round(len(sources) * (1 - held_out))]}
    return [p for p in pairs if p.source in kept], [p for p in pairs if p.source not in kept]


def source_name(photo: Path) -> str:
    """What the pairs made from a photo name as their source: its stem, and a hash of its name."""
    return f"{photo.stem}-{hashlib.sha256(photo.name.encode()).hexdigest()[:6]}"


def split_beside(
    pairs: list[Pair], held_out_photos: list[Rating], photos: list[Rating], seed: int, share: float
) -> tuple[list[Pair], list[Pair]]:
    """Split pairs that are learned from beside rated photos, which have been split already.

    Pairs made from one of the `photos` go where it went; the other sources are split at random,
    `share` of them held out. So no side has seen a photo of the other one, in any form.
    """
    rated = {source_name(photo.path) for photo in photos}
    if pairs and len(rated) < len({photo.path for photo in photos}):
        raise RatingsError(
            "rated photos of one name in different folders: pairs made from them cannot be told "
            "apart. Rename them, and make the pairs again."
        )
    held_out = {source_name(photo.path) for photo in held_out_photos}
    others = [pair for pair in pairs if pair.source not in rated]
    kept, apart = split_by_source(others, seed, share)
    return (
        kept + [p for p in pairs if p.source in rated - held_out],
        apart + [p for p in pairs if p.source in held_out],
    )


def rated_as(
    pairs: Sequence[Pair], photos: Sequence[Rating], low: float, high: float
) -> list[Pair]:
    """Pairs with their labels put on the scale of the `photos`' ratings.

    Label 0 becomes `low`, and label 1 what a photo is worth by itself: the rating of the one that a
    pair was made from, at most `high`, or `high` where nobody rated it. So a damaged copy of a poor
    photo is poorer than one of a good photo.
    """
    tops = {source_name(photo.path): min(photo.mos, high) for photo in photos}

    def rated(pair: Pair) -> Pair:
        top = tops.get(pair.source, high)
        bottom = min(low, top)
        return dataclasses.replace(pair, mos=bottom + (top - bottom) * pair.mos)

    return [rated(pair) for pair in pairs]


class PairGroups(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Samples for one epoch: a few distorted pictures of one reference, cropped and flipped alike.

    Members come two by two from one kind of distortion, so that most groups hold several levels of
    it; one time in `group` the reference itself is a member, rated as its IDENTICAL pair is. A
    sample is (distorted [K,3,C,C], reference [3,C,C], mos [K]), float RGB in 0..1, and a function
    of (seed, epoch, index) alone.
    """

    def __init__(self, pairs: list[Pair], group: int, crop: int, seed: int) -> None:
        self.group, self.crop, self.seed, self.epoch = group, crop, seed, 0
        self.ladders: dict[Path, dict[str, list[Pair]]] = {}
        for pair in pairs:
            if pair.kind != IDENTICAL:
                of_reference = self.ladders.setdefault(pair.reference, {})
                of_reference.setdefault(pair.kind, []).append(pair)
        self.references = list(self.ladders)
        self.identical = {pair.reference: pair.mos for pair in pairs if pair.kind == IDENTICAL}

    def __len__(self) -> int:
        return len(self.references)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        rng = np.random.Generator(np.random.PCG64([self.seed, self.epoch, index]))
        path = self.references[index]
        members = self._drawn(path, rng)
        reference = read_rgb(path)
        h, w = map(int, reference.shape[1:])
        size = self.crop
        if min(h, w) < size:
            raise RatingsError(
                f"{path}: {w}x{h} is smaller than the crop of {size} pixels. "
                "Leave it out, or give a smaller --crop."
            )
        top, left = int(rng.integers(0, h - size + 1)), int(rng.integers(0, w - size + 1))
        window = np.s_[:, top : top + size, left : left + size]
        flip = rng.random() < 0.5

        def cropped(image: Tensor) -> Tensor:
            image = image[window].float() / 255
            return image.flip(2) if flip else image

        distorted = [cropped(_same_size(read_rgb(m.path), reference, m)) for m in members]
        mos = [m.mos for m in members]
        if rng.random() * self.group < 1:
            distorted[0], mos[0] = cropped(reference), self.identical.get(path, 1.0)
        return torch.stack(distorted), cropped(reference), torch.tensor(mos, dtype=torch.float32)

    def _drawn(self, reference: Path, rng: np.random.Generator) -> list[Pair]:
        """`group` pairs of the reference, two of a kind at a time."""
        ladders = list(self.ladders[reference].values())
        members: list[Pair] = []
        while len(members) < self.group:
            ladder = ladders[int(rng.integers(len(ladders)))]
            some = rng.choice(len(ladder), min(2, len(ladder)), replace=False)
            members += [ladder[int(i)] for i in some]
        return members[: self.group]


def _same_size(image: Tensor, reference: Tensor, pair: Pair) -> Tensor:
    if image.shape != reference.shape:
        raise RatingsError(
            f"{pair.path}: {image.shape[2]}x{image.shape[1]}, but its reference has "
            f"{reference.shape[2]}x{reference.shape[1]} pixels. Bring both to one size."
        )
    return image
