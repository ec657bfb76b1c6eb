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

SSIM and MS-SSIM are those of the library piq (Apache-2.0).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.media.planes import Plane, Planes

if TYPE_CHECKING:
    import torch

MEASURES: dict[str, tuple[str, ...]] = {
    "psnr": ("psnr_y", "psnr_weighted"),
    "ssim": ("ssim",),
    "ms_ssim": ("ms_ssim",),
}
"""What can be asked for, and the numbers that come of it."""

# Five scales of an 11-pixel window: the coarsest is a sixteenth of the picture.
_MS_SSIM_LEAST = 161
_SSIM_LEAST = 11


def fidelity(
    distorted: Planes, reference: Planes, measures: Sequence[str], device: str = "cpu"
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
        "ssim": lambda: {"ssim": _ssim(distorted, reference, device)},
        "ms_ssim": lambda: {"ms_ssim": _ms_ssim(distorted, reference, device)},
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


def _ssim(distorted: Planes, reference: Planes, device: str) -> float | None:
    thinned = min(reference.y.shape) // max(1, round(min(reference.y.shape) / 256))
    if thinned < _SSIM_LEAST:
        return None
    import piq  # takes seconds, and only those wait for it who want it

    return float(piq.ssim(_luma(distorted, device), _luma(reference, device), data_range=1.0))


def _ms_ssim(distorted: Planes, reference: Planes, device: str) -> float | None:
    if min(reference.y.shape) < _MS_SSIM_LEAST:
        return None
    import piq

    luma = _luma(distorted, device), _luma(reference, device)
    return float(piq.multi_scale_ssim(*luma, data_range=1.0))


def _luma(planes: Planes, device: str) -> "torch.Tensor":
    """Luma as float64 [1, 1, H, W], 0 to 1: float32 errs by as much as neighbouring pixels differ.

    As in libvmaf, 1 is 255 steps of 8 bits. What deeper video has above that, less than one step,
    counts as 1.
    """
    import torch

    y = torch.from_numpy(planes.y.astype(np.float64)).to(device)
    return torch.clamp(y[None, None] / (255 * 2 ** (planes.bits - 8)), max=1.0)
