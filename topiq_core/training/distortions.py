"""Synthetic distortions of a photo: thirty-odd kinds in five levels, from visible to severe.

The kinds are those that the field's databases agree on (TID2013, CSIQ, KADID-10k: blur, noise,
still-picture coding, colour, tone, spatial damage) and mixtures of them; levels 1..5 grow. Every
result is a function of (picture, kind, level, seed). A kind's random field depends on the seed
alone and only its strength on the level, so a higher level is always more of the same.
"""

import io
import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage, signal

RGB = npt.NDArray[np.uint8]
Real = npt.NDArray[np.float64]
Kind = Callable[[Real, int, np.random.Generator], Real]

LEVELS = (1, 2, 3, 4, 5)

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def distort(image: RGB, kind: str, level: int, seed: int) -> RGB:
    """A distorted copy of uint8 RGB [H,W,3]. kind: a key of KINDS; level: 1..5.

    Raises KeyError for another kind and ValueError for another level.
    """
    if level not in LEVELS:
        raise ValueError(f"level {level}: 1 to {len(LEVELS)} is needed")
    rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(kind.encode())]))
    return _as_uint8(KINDS[kind](image / 255.0, level - 1, rng))


def resized(image: RGB, width: int, height: int, filter_: Image.Resampling) -> RGB:
    """Another size, with Pillow's filters (which widen when shrinking, so nothing aliases)."""
    return np.asarray(Image.fromarray(image).resize((width, height), filter_))


def scaled_through(image: RGB, factor: float, change: Callable[[RGB], RGB]) -> RGB:
    """Shrink by `factor`, change, and enlarge to the old size: what a small rendition goes through.

    The small size is even, as 4:2:0 coding needs.
    """
    height, width = image.shape[:2]
    small = (max(16, 2 * round(width * factor / 2)), max(16, 2 * round(height * factor / 2)))
    changed = change(resized(image, *small, Image.Resampling.BICUBIC))
    return resized(changed, width, height, Image.Resampling.BICUBIC)


def _luma(x: Real) -> Real:
    """[H,W,3] -> [H,W,1]."""
    luma: Real = x @ _LUMA
    return luma[..., None]


def _as_uint8(x: Real) -> RGB:
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)


def _gaussian_blur(x: Real, level: int, _: np.random.Generator) -> Real:
    return _blurred(x, (0.7, 1.1, 1.8, 3.0, 5.0)[level])


def _blurred(x: Real, sigma: float) -> Real:
    return np.asarray(ndimage.gaussian_filter(x, (sigma, sigma, 0)))


def _lens_blur(x: Real, level: int, _: np.random.Generator) -> Real:
    """A disc, as of a lens out of focus."""
    radius = (1.0, 1.8, 3.0, 5.0, 8.0)[level]
    reach = math.ceil(radius)
    i, j = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return _convolved(x, np.clip(radius + 0.5 - np.hypot(i, j), 0, 1))


def _motion_blur(x: Real, level: int, rng: np.random.Generator) -> Real:
    """A straight stroke in a random direction."""
    length = (2.5, 5.0, 9.0, 15.0, 24.0)[level]
    angle = rng.uniform(0, math.pi)
    reach = math.ceil(length / 2) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    for t in np.linspace(-length / 2, length / 2, 16 * reach):
        i, j = reach + t * math.sin(angle), reach + t * math.cos(angle)
        kernel[round(i), round(j)] += 1
    return _convolved(x, kernel)


def _convolved(x: Real, kernel: Real) -> Real:
    reach = kernel.shape[0] // 2
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    kernel = kernel[..., None] / kernel.sum()
    return np.asarray(signal.fftconvolve(padded, kernel, mode="valid", axes=(0, 1)))


def _white_noise(x: Real, level: int, rng: np.random.Generator) -> Real:
    return x + (0.015, 0.03, 0.06, 0.11, 0.2)[level] * rng.standard_normal(x.shape)


def _chroma_noise(x: Real, level: int, rng: np.random.Generator) -> Real:
    """Noise that leaves luma alone."""
    noise = rng.standard_normal(x.shape)
    noise -= _luma(noise)
    return x + (0.03, 0.06, 0.1, 0.17, 0.28)[level] * noise


def _impulse_noise(x: Real, level: int, rng: np.random.Generator) -> Real:
    """Pixels that are black or white."""
    chance, white = rng.random(x.shape[:2]), rng.integers(0, 2, x.shape[:2])
    hit = chance < (0.003, 0.01, 0.03, 0.08, 0.18)[level]
    return np.where(hit[..., None], white[..., None], x)


def _multiplicative_noise(x: Real, level: int, rng: np.random.Generator) -> Real:
    return x * (1 + (0.04, 0.08, 0.15, 0.28, 0.5)[level] * rng.standard_normal(x.shape))


def _denoised(x: Real, level: int, rng: np.random.Generator) -> Real:
    """Noise, and what a Wiener filter leaves of it and of the texture."""
    sigma = (0.025, 0.05, 0.08, 0.12, 0.18)[level]
    noisy = np.clip(x + sigma * rng.standard_normal(x.shape), 0, 1)
    return np.stack([signal.wiener(noisy[..., c], 5, sigma**2) for c in range(3)], -1)


def _stored(x: Real, form: str, **options: Any) -> Real:
    """Through Pillow's encoder and back."""
    file = io.BytesIO()
    Image.fromarray(_as_uint8(x)).save(file, form, **options)
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")) / 255.0


def _jpeg(x: Real, level: int, _: np.random.Generator) -> Real:
    return _stored(x, "JPEG", quality=(70, 40, 22, 12, 6)[level])


def _jpeg2000(x: Real, level: int, _: np.random.Generator) -> Real:
    rate = (12, 30, 60, 110, 220)[level]
    return _stored(x, "JPEG2000", quality_mode="rates", quality_layers=[rate], irreversible=True)


def _webp(x: Real, level: int, _: np.random.Generator) -> Real:
    return _stored(x, "WEBP", quality=(65, 35, 15, 5, 0)[level], method=2)


def _avif(x: Real, level: int, _: np.random.Generator) -> Real:
    return _stored(x, "AVIF", quality=(60, 42, 28, 15, 3)[level], speed=8, max_threads=1)


def _banding(x: Real, level: int, _: np.random.Generator) -> Real:
    """Few code values, without dither."""
    steps = (31, 19, 11, 6, 3)[level]
    return np.rint(x * steps) / steps


def _colour_shift(x: Real, level: int, rng: np.random.Generator) -> Real:
    """Chroma beside its luma."""
    distance, angle = (1.0, 2.5, 5.0, 9.0, 15.0)[level], rng.uniform(0, 2 * math.pi)
    offset = (distance * math.sin(angle), distance * math.cos(angle), 0.0)
    luma = _luma(x)
    return luma + np.asarray(ndimage.shift(x - luma, offset, order=1, mode="reflect"))


def _colour_cast(x: Real, level: int, rng: np.random.Generator) -> Real:
    """A wrong white balance."""
    direction = rng.standard_normal(3)
    direction -= direction @ _LUMA
    direction /= np.abs(direction).max()
    return x * (1 + (0.05, 0.1, 0.18, 0.3, 0.5)[level] * direction)


def _saturation(x: Real, factor: float) -> Real:
    luma = _luma(x)
    return luma + factor * (x - luma)


def _desaturated(x: Real, level: int, _: np.random.Generator) -> Real:
    return _saturation(x, (0.75, 0.5, 0.3, 0.12, 0.0)[level])


def _oversaturated(x: Real, level: int, _: np.random.Generator) -> Real:
    return _saturation(x, (1.3, 1.7, 2.3, 3.3, 5.0)[level])


def _contrast(x: Real, factor: float) -> Real:
    middle = float(x.mean())
    return middle + factor * (x - middle)


def _less_contrast(x: Real, level: int, _: np.random.Generator) -> Real:
    return _contrast(x, (0.87, 0.72, 0.56, 0.4, 0.25)[level])


def _more_contrast(x: Real, level: int, _: np.random.Generator) -> Real:
    return _contrast(x, (1.15, 1.35, 1.65, 2.2, 3.2)[level])


def _brighter(x: Real, level: int, _: np.random.Generator) -> Real:
    return np.asarray(x ** (0.87, 0.74, 0.6, 0.46, 0.33)[level])


def _darker(x: Real, level: int, _: np.random.Generator) -> Real:
    return np.asarray(x ** (1.15, 1.4, 1.8, 2.4, 3.3)[level])


def _oversharpened(x: Real, level: int, _: np.random.Generator) -> Real:
    return x + (0.6, 1.2, 2.2, 4.0, 7.0)[level] * (x - _blurred(x, 1.5))


def _blocking(x: Real, level: int, _: np.random.Generator) -> Real:
    """Blocks of 8x8 pixels drawn towards their means."""
    share = (0.15, 0.3, 0.5, 0.7, 0.9)[level]
    return (1 - share) * x + share * _block_means(x, 8)


def _pixelated(x: Real, level: int, _: np.random.Generator) -> Real:
    return _block_means(x, (2, 3, 4, 6, 10)[level])


def _block_means(x: Real, size: int) -> Real:
    height, width = x.shape[:2]
    padded = np.pad(x, ((0, -height % size), (0, -width % size), (0, 0)), mode="edge")
    rows, columns = padded.shape[0] // size, padded.shape[1] // size
    means: Real = padded.reshape(rows, size, columns, size, 3).mean((1, 3))
    return means.repeat(size, 0).repeat(size, 1)[:height, :width]


def _resampled(x: Real, factor: float, filter_: Image.Resampling) -> Real:
    height, width = x.shape[:2]
    small = resized(
        _as_uint8(x), max(2, round(width * factor)), max(2, round(height * factor)), filter_
    )
    return resized(small, width, height, filter_) / 255.0


def _scaled_bilinear(x: Real, level: int, _: np.random.Generator) -> Real:
    return _resampled(x, (0.75, 0.5, 0.35, 0.23, 0.14)[level], Image.Resampling.BILINEAR)


def _scaled_bicubic(x: Real, level: int, _: np.random.Generator) -> Real:
    return _resampled(x, (0.67, 0.47, 0.33, 0.22, 0.13)[level], Image.Resampling.BICUBIC)


def _scaled_nearest(x: Real, level: int, _: np.random.Generator) -> Real:
    return _resampled(x, (0.8, 0.5, 0.34, 0.22, 0.14)[level], Image.Resampling.NEAREST)


def _displaced_blocks(x: Real, level: int, rng: np.random.Generator) -> Real:
    """Runs of 16x16 blocks that show another part of the picture, as after a lost packet."""
    size, run = 16, 3
    rows, columns = x.shape[0] // size, x.shape[1] // size
    spots = rng.permutation(rows * columns)
    shifts = rng.integers(size, 3 * size, (len(spots), 2))
    runs = math.ceil((0.01, 0.04, 0.09, 0.17, 0.3)[level] * len(spots) / run)
    out = x.copy()
    for spot, (down, right) in zip(spots[:runs], shifts[:runs], strict=True):
        top, left = size * (spot // columns), size * (spot % columns)
        moved = np.roll(x, (-down, -right), (0, 1))
        window = np.s_[top : top + size, left : left + run * size]
        out[window] = moved[window]
    return out


def _jitter(x: Real, level: int, rng: np.random.Generator) -> Real:
    """Every pixel taken from a little beside its place."""
    reach = (0.4, 0.8, 1.4, 2.4, 4.0)[level]
    grid = np.mgrid[0 : x.shape[0], 0 : x.shape[1]] + reach * rng.uniform(-1, 1, (2, *x.shape[:2]))
    return np.stack(
        [ndimage.map_coordinates(x[..., c], grid, order=1, mode="reflect") for c in range(3)], -1
    )


def _noisy_jpeg(x: Real, level: int, rng: np.random.Generator) -> Real:
    noisy = x + (0.015, 0.03, 0.05, 0.08, 0.13)[level] * rng.standard_normal(x.shape)
    return _stored(noisy, "JPEG", quality=(75, 50, 30, 18, 9)[level])


def _blurred_jpeg(x: Real, level: int, _: np.random.Generator) -> Real:
    blurred = _blurred(x, (0.5, 0.8, 1.3, 2.0, 3.2)[level])
    return _stored(blurred, "JPEG", quality=(75, 50, 30, 18, 9)[level])


def _scaled_jpeg(x: Real, level: int, _: np.random.Generator) -> Real:
    factor, quality = ((0.8, 75), (0.67, 55), (0.5, 38), (0.4, 22), (0.3, 11))[level]
    return (
        scaled_through(
            _as_uint8(x),
            factor,
            lambda small: _as_uint8(_stored(small / 255.0, "JPEG", quality=quality)),
        )
        / 255.0
    )


COMPRESSIONS: dict[str, Kind] = {
    "jpeg": _jpeg,
    "jpeg2000": _jpeg2000,
    "webp": _webp,
    "avif": _avif,
    "noisy_jpeg": _noisy_jpeg,
    "blurred_jpeg": _blurred_jpeg,
    "scaled_jpeg": _scaled_jpeg,
}
"""Still-picture coding, alone and after something else."""

OTHERS: dict[str, Kind] = {
    "gaussian_blur": _gaussian_blur,
    "lens_blur": _lens_blur,
    "motion_blur": _motion_blur,
    "white_noise": _white_noise,
    "chroma_noise": _chroma_noise,
    "impulse_noise": _impulse_noise,
    "multiplicative_noise": _multiplicative_noise,
    "denoised": _denoised,
    "banding": _banding,
    "colour_shift": _colour_shift,
    "colour_cast": _colour_cast,
    "desaturated": _desaturated,
    "oversaturated": _oversaturated,
    "less_contrast": _less_contrast,
    "more_contrast": _more_contrast,
    "brighter": _brighter,
    "darker": _darker,
    "oversharpened": _oversharpened,
    "blocking": _blocking,
    "pixelated": _pixelated,
    "scaled_bilinear": _scaled_bilinear,
    "scaled_bicubic": _scaled_bicubic,
    "scaled_nearest": _scaled_nearest,
    "displaced_blocks": _displaced_blocks,
    "jitter": _jitter,
}

KINDS: dict[str, Kind] = {**COMPRESSIONS, **OTHERS}

GRADING = frozenset(
    {
        "colour_cast",
        "desaturated",
        "oversaturated",
        "brighter",
        "darker",
        "more_contrast",
        "less_contrast",
    }
)
"""Changes of tone and colour: a fault beside the original, and without it perhaps what was wanted.

Their labels say how far from the original a picture is, which it does not show by itself, so
no-reference models do not learn from them.
"""
