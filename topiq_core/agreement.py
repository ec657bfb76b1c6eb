"""Does a lower precision still rank pictures as fp32 does? Measured before it is used.

The pictures are generated, so that the check needs no data and can be made for every model, also
one trained by the user, on the machine that will score.
"""

import numpy as np
import numpy.typing as npt

from topiq_core.errors import CardError

# Spearman correlation with fp32 under which a precision is refused.
LEAST_SROCC = 0.995

_SCENES, _HEIGHT, _WIDTH = 6, 128, 160

Picture = npt.NDArray[np.uint8]
Field = npt.NDArray[np.float64]


def require(precision: str, srocc: float, model: str) -> None:
    """Raises CardError when a precision's scores rank pictures otherwise than fp32 does."""
    if not srocc >= LEAST_SROCC:  # a score that is not a number makes it NaN
        raise CardError(
            f"{model} in {precision} ranks pictures otherwise than in fp32 (SROCC {srocc:.4f}, "
            f"{LEAST_SROCC} is needed): use another precision."
        )


def srocc(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> float:
    """Spearman's rank correlation of two lists of scores without ties; NaN if any score is NaN."""
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return float("nan")
    a, b = (np.argsort(np.argsort(scores)).astype(float) for scores in (left, right))
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def pictures() -> tuple[list[Picture], list[Picture]]:
    """Scenes and degraded forms of them, uint8 RGB [128,160,3], paired by position.

    Every scene comes as it is, noisy, in blocks, dark and pale, each to two degrees, and blurred to
    four: what blur leaves of texture is what few bits lose first.
    """
    scenes, degraded = [], []
    for seed in range(_SCENES):
        draw = np.random.default_rng(seed)
        scene = _scene(draw)
        grain = draw.standard_normal(scene.shape)
        forms = [scene, *(_blurred(scene, times) for times in (1, 4, 12, 32))]
        forms += [_blocks(scene, 4), _blocks(scene, 8), scene + 8 * grain, scene + 25 * grain]
        forms += [0.3 * scene, 0.6 * scene, 0.4 * scene + 130, 0.7 * scene + 60]
        scenes += [_pixels(scene)] * len(forms)
        degraded += [_pixels(form) for form in forms]
    return scenes, degraded


def _scene(draw: np.random.Generator) -> Field:
    """Texture with the spectrum of natural scenes (amplitude falls with frequency), and edges."""
    rows, columns = np.fft.fftfreq(_HEIGHT)[:, None], np.fft.fftfreq(_WIDTH)[None]
    amplitude = 1 / np.maximum(np.hypot(rows, columns), 1 / _WIDTH)
    texture = np.empty((_HEIGHT, _WIDTH, 3))
    for channel in range(3):
        phases = np.exp(2j * np.pi * draw.random((_HEIGHT, _WIDTH)))
        wave = np.fft.ifft2(amplitude * phases).real
        texture[..., channel] = wave / wave.std()
    grey = texture.mean(axis=2, keepdims=True)
    scene: Field = 120 + draw.uniform(20, 50) * (grey + 0.3 * texture)
    for _ in range(draw.integers(3, 12)):
        top, left = int(draw.integers(0, _HEIGHT - 32)), int(draw.integers(0, _WIDTH - 32))
        height, width = draw.integers(8, 96, 2)
        scene[top : top + height, left : left + width] += draw.uniform(-70, 70, 3)
    return scene


def _blurred(scene: Field, times: int) -> Field:
    """Averaged with its neighbours (1, 2, 1) in both directions, so many times."""
    for _ in range(times):
        for axis in (0, 1):
            scene = (np.roll(scene, 1, axis) + 2 * scene + np.roll(scene, -1, axis)) / 4
    return scene


def _blocks(scene: Field, side: int) -> Field:
    """Every square of so many pixels a side in its mean colour."""
    grid: Field = scene.reshape(_HEIGHT // side, side, _WIDTH // side, side, 3).mean(axis=(1, 3))
    return np.repeat(np.repeat(grid, side, axis=0), side, axis=1)


def _pixels(scene: Field) -> Picture:
    return np.rint(scene).clip(0, 255).astype(np.uint8)
