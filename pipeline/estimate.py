"""How long a plan would take: its pixels over a measured speed."""

import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.plan import PlanCounts
from topiq_core.cards import pixels_seen

if TYPE_CHECKING:
    from topiq_core.scorer import Scorer, Scores

_TRIAL_HEIGHT, _TRIAL_WIDTH = 720, 1280
_TRIAL_S = 3.0


@dataclass(frozen=True)
class Speed:
    """Pixels, as the first model sees them, that one device scores in a second with all models.

    source: where the number comes from.
    """

    pixels_per_s: float
    source: str


def measured_speed(config: Config) -> Speed:
    """Score synthetic 720p frames on this machine for a few seconds."""
    from topiq_core.scorer import Scorer

    scorers = [
        Scorer.load(name, place, config.device, config.precision, config.verify_weights)
        for name, place in config.models
    ]
    scorers.sort(key=lambda scorer: scorer.card.architecture.mode != "fr")  # as runs have it
    first = scorers[0]
    pixels = pixels_seen(_TRIAL_HEIGHT, _TRIAL_WIDTH, first.card.short_side)
    seconds = sum(_seconds_a_frame(scorer) for scorer in scorers)
    return Speed(pixels / seconds, f"measured on this machine ({first.device})")


def _seconds_a_frame(scorer: "Scorer") -> float:
    import numpy as np

    shape = (4, _TRIAL_HEIGHT, _TRIAL_WIDTH, 3)
    frames = np.random.Generator(np.random.PCG64(0)).integers(0, 256, shape, dtype=np.uint8)
    score: Callable[..., Scores] = scorer.score
    if scorer.card.architecture.mode == "fr":
        score = functools.partial(scorer.score_renditions, reference=frames[0])
    score(frames)
    scored, started = 0, time.perf_counter()
    while time.perf_counter() - started < _TRIAL_S:
        scored += len(score(frames))
    return (time.perf_counter() - started) / scored


def speed_of_run(file: Path) -> Speed:
    """The speed of one GPU's scorer in an earlier run, or of all its scorers on CPUs.

    From its run.json. Raises ConfigError.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        stage = record["stages"]["score"]
        if not record["cluster"]["actor_gpus"]:
            return Speed(float(stage["pixels_per_s"]), f"of all CPU scorers in {file}")
        per_worker = stage["pixels_per_s"] / stage["workers"]
        return Speed(float(per_worker), f"of a scorer in {file}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file}: not the run.json of a run that scored anything. Those of an output's earlier "
            "runs are in its runs/."
        ) from error


def describe(planned: PlanCounts, left: tuple[int, int], speed: Speed, devices: int) -> str:
    """The estimate in words. left: frames and pixels that are not scored yet."""
    frames, pixels = left
    seconds = pixels / speed.pixels_per_s / devices
    hours, minutes = int(seconds // 3600), seconds % 3600 / 60
    done = planned.frames - frames
    already = f", {done} of them scored already or failed" if done else ""
    return (
        f"{planned.items - planned.failed_items} items, {planned.frames} frames{already}; "
        f"{pixels / 1e9:.3f} gigapixels to score\n"
        f"{speed.pixels_per_s / 1e6:.1f} megapixels a second and device, {speed.source}\n"
        f"about {hours} h {minutes:.1f} min of scoring on {devices} device{'s' * (devices > 1)}; "
        "decoding, start-up and empty time come on top"
    )
