"""Scorer: uint8 frames in, scores out."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from topiq_core import weights as weights_file
from topiq_core.cards import DEFAULT_CARD, Card
from topiq_core.cfanet import CFANet
from topiq_core.errors import CardError, FrameError
from topiq_core.inference import InferenceNet

Frames = npt.NDArray[np.uint8] | Tensor | Sequence[npt.NDArray[np.uint8]] | Sequence[Tensor]
Scores = npt.NDArray[np.float32]
Precision = Literal["fp32"]

# One forward pass takes at most this many pixels on a GPU. On a CPU frames go one by one: larger
# batches are not faster there, and a score then cannot depend on its neighbours even by rounding.
GPU_BATCH_PIXELS = 16 * 1920 * 1080
MIN_SIDE = 32


class Scorer:
    """A loaded model.

    >>> scorer = Scorer.load("cfanet_lite_nr")
    >>> scorer.score(frames)  # uint8 RGB [N,H,W,3] -> float32 [N], higher is better
    """

    def __init__(self, net: CFANet, card: Card, device: torch.device, sha256: str = "") -> None:
        self.net = InferenceNet(net).to(device)
        self.card = card
        self.device = device
        self.sha256 = sha256

    @classmethod
    def load(
        cls,
        card: str | Path = DEFAULT_CARD,
        weights: str | Path | None = None,
        device: str = "auto",
        precision: Precision = "fp32",
        verify: bool = True,
    ) -> "Scorer":
        """Load a model by its card's name, or from a .safetensors file exported by training.

        weights: a local path or fsspec URL, for models that are not bundled. device: "auto"
        (a CUDA GPU when there is one, else the CPU) or any torch device. verify: check the
        sha256 of the weights. Raises CardError and WeightsError.
        """
        if precision != "fp32":
            raise CardError(f"precision '{precision}' is not available: use 'fp32'.")
        found = weights_file.resolve(card, weights, verify)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(weights_file.load(found), found.card, torch.device(device), found.sha256)

    def score(self, frames: Frames) -> Scores:
        """No-reference scores.

        frames: uint8 RGB [N,H,W,3], or a sequence of [H,W,3] of any sizes. Returns float32 [N]
        in the order given. A frame's score does not depend on the other frames.
        Raises FrameError (not uint8 RGB, or a side under 32 pixels) and CardError (an FR card).
        """
        if self.card.architecture.mode != "nr":
            raise CardError(f"{self.card.name} compares with a reference: use score_pairs().")
        images = _as_list(frames)
        return self._run([(image,) for image in images])

    def score_pairs(self, distorted: Frames, reference: Frames) -> Scores:
        """Full-reference scores.

        distorted, reference: as for `score`, paired by position, each pair of one size.
        Returns float32 [N]. Raises FrameError and CardError.
        """
        if self.card.architecture.mode != "fr":
            raise CardError(f"{self.card.name} takes no reference: use score().")
        left, right = _as_list(distorted), _as_list(reference)
        if len(left) != len(right):
            raise FrameError(f"{len(left)} distorted frames, {len(right)} reference frames.")
        for index, (d, r) in enumerate(zip(left, right, strict=True)):
            if d.shape != r.shape:
                raise FrameError(
                    f"pair {index}: distorted is {d.shape[1]}x{d.shape[0]}, reference is "
                    f"{r.shape[1]}x{r.shape[0]}. Bring them to one size first."
                )
        return self._run(list(zip(left, right, strict=True)))

    def _run(self, items: list[tuple[Tensor, ...]]) -> Scores:
        """Score items of one or two images each: same sizes together, results in order."""
        out = np.empty(len(items), dtype=np.float32)
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, images in enumerate(items):
            h, w = images[0].shape[:2]
            by_size.setdefault((int(h), int(w)), []).append(index)
        for (h, w), indices in by_size.items():
            for batch in _batches(indices, self._batch_size(h, w)):
                scores = _halving_on_oom(lambda part: self._forward(items, part), batch)
                out[batch] = scores
        return out

    def _batch_size(self, h: int, w: int) -> int:
        if self.device.type == "cpu":
            return 1
        return max(1, GPU_BATCH_PIXELS // (h * w))

    @torch.inference_mode()
    def _forward(self, items: list[tuple[Tensor, ...]], indices: list[int]) -> Scores:
        sides = len(items[indices[0]])
        # TF32 would change fp32 scores in the third digit on recent GPUs.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            images = [
                self._prepare(torch.stack([items[i][side] for i in indices]))
                for side in range(sides)
            ]
            scores: Tensor = self.net(*images)
        return scores.float().cpu().numpy()

    def _prepare(self, frames: Tensor) -> Tensor:
        """uint8 [N,H,W,3] -> uint8 [N,3,H,W] on the device; float in 0..1 if the card resizes."""
        x = frames.to(self.device).permute(0, 3, 1, 2)
        short_side = self.card.short_side
        if short_side is None:
            return x
        size = resized(int(x.shape[2]), int(x.shape[3]), short_side)
        return F.interpolate(
            x.float() / 255, size=size, mode="bilinear", antialias=True, align_corners=False
        )


def resized(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width with the shorter side at `short_side`, the longer one truncated."""
    if height <= width:
        return short_side, int(short_side * width / height)
    return int(short_side * height / width), short_side


def _as_list(frames: Frames) -> list[Tensor]:
    images = [f if isinstance(f, Tensor) else _from_numpy(i, f) for i, f in enumerate(frames)]
    for index, image in enumerate(images):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != torch.uint8:
            raise FrameError(
                f"frame {index} is {image.dtype} {tuple(image.shape)}; uint8 [H,W,3] is needed."
            )
        h, w = image.shape[:2]
        if min(h, w) < MIN_SIDE:
            raise FrameError(
                f"frame {index} is {w}x{h}; the network needs at least {MIN_SIDE} pixels a side."
            )
    return images


def _from_numpy(index: int, frame: npt.NDArray[np.uint8]) -> Tensor:
    with warnings.catch_warnings():
        # Frames often arrive as read-only views of shared memory; the network never writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        try:
            return torch.from_numpy(np.ascontiguousarray(frame))
        except (TypeError, ValueError) as error:
            raise FrameError(f"frame {index}: uint8 [H,W,3] is needed ({error}).") from error


def _batches(indices: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _halving_on_oom(run: Callable[[list[int]], Scores], batch: list[int]) -> Scores:
    """Run a batch; when the GPU is out of memory, run its halves; one frame alone raises."""
    try:
        return run(batch)
    except torch.cuda.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()
    middle = len(batch) // 2
    first = _halving_on_oom(run, batch[:middle])
    return np.concatenate([first, _halving_on_oom(run, batch[middle:])])
