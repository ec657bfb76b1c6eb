"""What each model is: its file, hash, licence, mode, preprocessing, range and measured accuracy.

Published checkpoints are listed here. A model trained with this project carries its card inside
its safetensors file, so the file alone says what it is; the bundled ones are read the same way.
This module does not import torch: planning and the command line need cards, not networks.
"""

import json
import math
import re
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from topiq_core.errors import CardError, WeightsError

BUNDLED_DIR = Path(__file__).parent / "models"
DEFAULT_CARD = "cfanet_lite_nr"
METADATA_KEY = "topiq_card"
HUB_REPO = "chaofengc/IQA-PyTorch-Weights"
_HUB_LICENCE = (
    "CC BY-NC-SA 4.0: non-commercial use only (published by the authors of TOPIQ on the "
    f"Hugging Face hub, {HUB_REPO})"
)


@dataclass(frozen=True)
class Architecture:
    """Everything that fixes what the network computes, but for its weights.

    `grid`: tokens along the shorter side of an image, at most: what the coarsest level has more of
    is averaged, as finer levels are, so a large image is judged by as many tokens as the network
    learned from. 0: one token for every position of the coarsest level, as in the paper.
    """

    mode: Literal["nr", "fr"]
    backbone: str
    inter_dim: int = 256
    heads: int = 4
    gate_dim: int = 64
    outputs: int = 1
    grid: int = 0


@dataclass(frozen=True)
class Calibration:
    """From what the network puts out to the scale of the ratings that it was trained for.

    A logistic from 0 to 1, so it rises everywhere: 1 / (1 + exp(-(output - middle) / width)).
    `meaning` says what 0 and 1 stand for. `n` ratings of pictures that were held out, with the
    outputs of networks that had not seen them, fixed it; `rmse` is the root of the mean squared
    error that it leaves on them, None in files that do not say.
    """

    middle: float
    width: float
    meaning: str
    n: int
    rmse: float | None = None


@dataclass(frozen=True)
class Card:
    """One model.

    `sha256` is the start (or the whole) of the weights file's hash; empty for a card that came
    out of the file itself. `short_side`: the shorter side of the image is brought to this many
    pixels before scoring; None means native resolution. `score_range` is what scores nearly
    always fall into. `accuracy` maps a measure, such as `srocc`, to its value. `calibration` is
    applied to what the network puts out.
    """

    name: str
    architecture: Architecture
    filename: str
    sha256: str
    licence: str
    trained_on: str
    short_side: int | None = None
    score_range: tuple[float, float] = (0.0, 1.0)
    hub_repo: str | None = None
    accuracy: dict[str, float] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None

    def to_json(self) -> str:
        """The card as it is stored in the metadata of a safetensors file."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Card":
        """Inverse of `to_json`. Raises WeightsError when the text is not a card."""
        try:
            raw = json.loads(text)
            raw["architecture"] = Architecture(**raw["architecture"])
            if raw.get("calibration") is not None:
                raw["calibration"] = Calibration(**raw["calibration"])
                if not raw["calibration"].width > 0:
                    raise ValueError("its calibration does not rise")
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", raw["name"]):
                raise ValueError(f"its name {raw['name']!r} cannot be a file name")
            low, high = raw["score_range"]
            raw["score_range"] = (low, high)
            return cls(**raw)
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(
                f"the card inside the weights file is unreadable: {error}"
            ) from error


def resized(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width with the shorter side at `short_side`, the longer one truncated."""
    if height <= width:
        return short_side, int(short_side * width / height)
    return int(short_side * height / width), short_side


def pixels_seen(height: int, width: int, short_side: int | None) -> int:
    """Pixels of a frame as a network sees it. short_side: of its card."""
    return math.prod(resized(height, width, short_side) if short_side else (height, width))


def _published(
    name: str,
    filename: str,
    trained_on: str,
    mode: Any = "nr",
    short_side: int | None = None,
    **shape: int,
) -> Card:
    outputs = shape.get("outputs", 1)
    return Card(
        name=name,
        architecture=Architecture(mode=mode, backbone="resnet50", **shape),
        filename=filename,
        sha256=filename.removesuffix(".pth").rsplit("-", 1)[1],
        licence=_HUB_LICENCE,
        trained_on=trained_on,
        short_side=short_side,
        score_range=(0.0, 1.0) if outputs == 1 else (1.0, float(outputs)),
        hub_repo=HUB_REPO,
    )


PUBLISHED: dict[str, Card] = {
    card.name: card
    for card in (
        _published("topiq_nr", "cfanet_nr_koniq_res50-9a73138b.pth", "KonIQ-10k"),
        _published("topiq_nr-flive", "cfanet_nr_flive_res50-ded1c74e.pth", "FLIVE", short_side=384),
        _published("topiq_nr-spaq", "cfanet_nr_spaq_res50-a7f799ac.pth", "SPAQ"),
        _published("topiq_nr-face", "topiq_nr_cgfiqa_res50-0a8b8e4f.pth", "CGFIQA", short_side=512),
        _published("topiq_fr", "cfanet_fr_kadid_res50-2c4cc61d.pth", "KADID-10k", mode="fr"),
        _published("topiq_fr-pipal", "cfanet_fr_pipal_res50-69bbe5ba.pth", "PIPAL", mode="fr"),
        _published(
            "topiq_iaa_res50",
            "cfanet_iaa_ava_res50-3cd62bb3.pth",
            "AVA",
            short_side=384,
            inter_dim=512,
            heads=8,
            outputs=10,
        ),
    )
}


def read_embedded(path: Path) -> Card:
    """The card inside a safetensors file, read from its header alone.

    Raises WeightsError when the file is not safetensors or holds no card.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 16 << 20)))
        text = header["__metadata__"][METADATA_KEY]
    except (OSError, struct.error, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{path}: no model card inside. Give a safetensors file exported by `topiq train`, "
            "or name a card with --model and pass this file as --weights."
        ) from error
    return Card.from_json(text)


def names() -> list[str]:
    """Every card that can be given by name, bundled ones first."""
    return [p.stem for p in sorted(BUNDLED_DIR.glob("*.safetensors"))] + list(PUBLISHED)


def find(name: str | Path) -> tuple[Card, Path | None]:
    """A card by name, or from a safetensors file exported by training.

    Returns the card and, when the weights lie on this machine already, their path.
    Raises CardError for an unknown name.
    """
    text = str(name)
    if text in PUBLISHED:
        return PUBLISHED[text], None
    bundled = BUNDLED_DIR / f"{text}.safetensors"
    path = bundled if bundled.is_file() else Path(text)
    if path.suffix == ".safetensors" and path.is_file():
        return read_embedded(path), path
    raise CardError(
        f"unknown model '{text}'. Known: {', '.join(names())}; "
        "or the path of a .safetensors file exported by `topiq train`."
    )
