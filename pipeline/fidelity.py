"""How far a frame departs from its reference, by the classic measures: PSNR, SSIM, MS-SSIM.

They stand beside the learned score, for a sanity check against other tools. All are of code values
as stored, so both frames must have one size, chroma format and range. Definitions:

- `psnr_y`: 10 log10(peak^2 / MSE) of luma, peak 2^bits - 1, at most 6 bits + 12 dB (60 dB for 8
  bits, where frames are all but equal), as in libvmaf.
- `psnr_weighted`: (6 Y + U + V) / 8 of the planes' PSNRs, as usual in codec comparisons.
- `ssim`: of luma (Wang et al. 2004), Gaussian window of 11 pixels and sigma 1.5, K 0.01 and 0.03,
  of all windows inside the picture the mean. Pictures are first averaged and thinned by
  round(min(H, W) / 256), as the authors advise and libvmaf does.
- `ms_ssim`: of luma (Wang et al. 2003), five scales halved by 2x2 averages, the same window.

Windows are separable, and are computed so: libraries that filter in two dimensions take ten times
as long and, in double precision, gigabytes for a large frame.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from pipeline.media.planes import Plane, Planes

Luma = npt.NDArray[np.float64]

MEASURES: dict[str, tuple[str, ...]] = {
    "psnr": ("psnr_y", "psnr_weighted"),
    "ssim": ("ssim",),
    "ms_ssim": ("ms_ssim",),
}
"""What can be asked for, and the numbers that come of it."""

# Five scales of an 11-pixel window: the coarsest is a sixteenth of the picture.
_MS_SSIM_LEAST = 161
_SSIM_LEAST = 11
_MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # fine to coarse
_WINDOW = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
_WINDOW /= _WINDOW.sum()
_C1, _C2 = 0.01**2, 0.03**2


def fidelity(
    distorted: Planes, reference: Planes, measures: Sequence[str]
) -> dict[str, float | None]:
    """The numbers of `measures` (keys of MEASURES) for one frame.

    A number is None where it is not defined: `psnr_weighted` of gray video, and (MS-)SSIM of
    pictures smaller than its windows. Raises ValueError when the frames differ in size, chroma
    format or depth: they cannot be compared sample by sample.
    """
    if _form(distorted) != _form(reference):
        raise ValueError(
            f"frames of {_form(distorted)} and {_form(reference)} (planes, bits) do not compare"
        )
    known: dict[str, Callable[[], dict[str, float | None]]] = {
        "psnr": lambda: _psnr(distorted, reference),
        "ssim": lambda: {"ssim": _ssim(distorted, reference)},
        "ms_ssim": lambda: {"ms_ssim": _ms_ssim(distorted, reference)},
    }
    out: dict[str, float | None] = {}
    for measure in measures:
        out |= known[measure]()
    return out


def _form(planes: Planes) -> tuple[object, ...]:
    parts = (planes.y, planes.u, planes.v)
    return (*(None if part is None else part.shape for part in parts), planes.bits)


def _psnr(distorted: Planes, reference: Planes) -> dict[str, float | None]:
    y = _plane_psnr(distorted.y, reference.y, reference.bits)
    pairs = ((distorted.u, reference.u), (distorted.v, reference.v))
    chroma = [
        _plane_psnr(d, r, reference.bits) for d, r in pairs if d is not None and r is not None
    ]
    return {"psnr_y": y, "psnr_weighted": (6 * y + sum(chroma)) / 8 if len(chroma) == 2 else None}


def _plane_psnr(distorted: Plane, reference: Plane, bits: int) -> float:
    error = distorted.astype(np.float64) - reference
    mse = float(np.vdot(error, error)) / error.size
    most = 6.0 * bits + 12
    return min(most, 10 * float(np.log10((2**bits - 1) ** 2 / mse))) if mse else most


def _ssim(distorted: Planes, reference: Planes) -> float | None:
    factor = max(1, round(min(reference.y.shape) / 256))
    if min(reference.y.shape) // factor < _SSIM_LEAST:
        return None
    similarity, _ = _similarity(*(_averaged(_luma(p), factor) for p in (distorted, reference)))
    return similarity


def _ms_ssim(distorted: Planes, reference: Planes) -> float | None:
    if min(reference.y.shape) < _MS_SSIM_LEAST:
        return None
    d, r = _luma(distorted), _luma(reference)
    product = 1.0
    for scale, weight in enumerate(_MS_SSIM_WEIGHTS):
        if scale:
            d, r = _halved(d), _halved(r)
        similarity, structure = _similarity(d, r)
        coarsest = scale == len(_MS_SSIM_WEIGHTS) - 1
        product *= max(0.0, similarity if coarsest else structure) ** weight
    return product


def _similarity(d: Luma, r: Luma) -> tuple[float, float]:
    """Means over all windows of SSIM, and of its product of contrast and structure alone."""
    mean_d, mean_r = _windowed(d), _windowed(r)
    means = mean_d * mean_r
    squares = mean_d**2 + mean_r**2
    structure = (2 * (_windowed(d * r) - means) + _C2) / (
        _windowed(d * d) + _windowed(r * r) - squares + _C2
    )
    luminance = (2 * means + _C1) / (squares + _C1)
    return float((luminance * structure).mean()), float(structure.mean())


def _windowed(image: Luma) -> Luma:
    """Gaussian means of all windows inside a picture: [H, W] -> [H-10, W-10]."""
    from scipy.ndimage import correlate1d  # a fifth of a second, and not for every process

    for axis in (0, 1):
        image = correlate1d(image, _WINDOW, axis)
        image = image[5:-5] if axis == 0 else image[:, 5:-5]
    return image


def _averaged(image: Luma, factor: int) -> Luma:
    """Means of squares of pixels; what is left over at the right and at the bottom is cut off."""
    h, w = (side // factor for side in image.shape)
    cut = image[: h * factor, : w * factor]
    means: Luma = cut.reshape(h, factor, w, factor).mean(axis=(1, 3))
    return means


def _halved(image: Luma) -> Luma:
    """Means of 2x2 pixels. When a side is odd, the first row and column are taken twice."""
    odd = max(side % 2 for side in image.shape)
    return _averaged(np.pad(image, ((odd, 0), (odd, 0)), mode="edge"), 2)


def _luma(planes: Planes) -> Luma:
    """Luma as float64 [H, W], 0 to 1: float32 errs by as much as neighbouring pixels differ.

    As in libvmaf, 1 is 255 steps of 8 bits. What deeper video has above that, less than one step,
    counts as 1.
    """
    luma: Luma = planes.y.astype(np.float64) / (255 * 2 ** (planes.bits - 8))
    return np.minimum(luma, 1.0, out=luma)
