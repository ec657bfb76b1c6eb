"""Scorer: uint8 frames in, scores out."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from topiq_core import agreement
from topiq_core import weights as weights_file
from topiq_core.cards import DEFAULT_CARD, Card, pixels_seen, resized
from topiq_core.cfanet import CFANet
from topiq_core.convolution import HAS_AMX, HAS_VNNI
from topiq_core.errors import CardError, FrameError
from topiq_core.inference import MAP_TYPES, InferenceNet, Precision
from topiq_core.int8 import quantise

Frames = npt.NDArray[np.uint8] | Tensor | Sequence[npt.NDArray[np.uint8]] | Sequence[Tensor]
Scores = npt.NDArray[np.float32]

# One forward pass takes at most this many pixels on a GPU, or as many as it turns out to hold:
# memory and tokens both grow with them. On a CPU frames go one by one: larger batches are not
# faster there, and a score then cannot depend on its neighbours even by rounding.
GPU_BATCH_PIXELS = 16 * 1920 * 1080
MIN_SIDE = 32


class Scorer:
    """A loaded model.

    >>> scorer = Scorer.load("cfanet_lite_nr")
    >>> scorer.score(frames)  # uint8 RGB [N,H,W,3] -> float32 [N], higher is better
    """

    def __init__(
        self,
        net: CFANet,
        card: Card,
        device: torch.device,
        sha256: str = "",
        precision: Precision = "fp32",
    ) -> None:
        self.card = card
        self.device = device
        self.sha256 = sha256
        self.net = InferenceNet(net, precision)
        self._uploads: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._uploads = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if precision != "fp32":
                self.net.narrow_products(torch.float16)
        self.net.to(device)
        if precision == "int8":
            quantise(self.net, (self._prepare(_as_list([p])) for p in agreement.pictures()[1]))
        self.batch_pixels = self.most_pixels = GPU_BATCH_PIXELS

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
        (a CUDA GPU when there is one, else the CPU) or any torch device. precision: "fp32"; "fp16"
        on GPUs; "bf16" on GPUs and on CPUs with AMX; "int8" for no-reference models on CPUs with
        VNNI. A model in fewer bits is compared with itself in fp32 on generated pictures first,
        and refused when it would rank them otherwise. Whoever wants it all the same builds a
        Scorer from its parts. verify: check the sha256 of the weights.
        Raises CardError and WeightsError.
        """
        if precision not in MAP_TYPES:
            raise CardError(f"precision '{precision}' is not one of {', '.join(MAP_TYPES)}.")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        place = torch.device(device)
        if place.type == "cuda":
            _require_gpu(device)
        found = weights_file.resolve(card, weights, verify)
        _require_fit(precision, place.type, found.card)
        scorer = cls(weights_file.load(found), found.card, place, found.sha256, precision)
        if precision != "fp32":
            exact = cls(weights_file.load(found), found.card, place)
            agreement.require(precision, scorer.agreement_with(exact), found.card.name)
        return scorer

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
        return self._run(self._pairs(_as_list(distorted), _as_list(reference)))

    def score_renditions(
        self, distorted: Frames, reference: npt.NDArray[np.uint8] | Tensor
    ) -> Scores:
        """Full-reference scores of many renditions of one frame, as `score_pairs` gives them.

        distorted: as for `score`, each of the reference's size; reference: uint8 RGB [H,W,3]. What
        the network sees in the reference is computed once, and held meanwhile: with ResNet-50 in
        fp32 190 MB a megapixel. Returns float32 [N]. Raises FrameError and CardError.
        """
        renditions, original = _as_list(distorted), _as_list([reference])  # type: ignore[arg-type]
        self._pairs(renditions, original * len(renditions))
        with torch.inference_mode(), _full_fp32():
            maps = list(self.net.levels(self._prepare(original)))
        return self._run([(image,) for image in renditions], maps)

    def _pairs(self, distorted: list[Tensor], reference: list[Tensor]) -> list[tuple[Tensor, ...]]:
        if self.card.architecture.mode != "fr":
            raise CardError(f"{self.card.name} takes no reference: use score().")
        if len(distorted) != len(reference):
            raise FrameError(
                f"{len(distorted)} distorted frames, {len(reference)} reference frames."
            )
        pairs: list[tuple[Tensor, ...]] = list(zip(distorted, reference, strict=True))
        for index, (d, r) in enumerate(pairs):
            if d.shape != r.shape:
                raise FrameError(
                    f"pair {index}: distorted is {d.shape[1]}x{d.shape[0]}, reference is "
                    f"{r.shape[1]}x{r.shape[0]}. Bring them to one size first."
                )
        return pairs

    def agreement_with(self, exact: "Scorer") -> float:
        """SROCC of this model's scores with those of `exact`, over generated pictures."""
        scenes, degraded = agreement.pictures()
        if self.card.architecture.mode == "fr":
            ours, theirs = (s.score_pairs(degraded, scenes) for s in (self, exact))
        else:
            ours, theirs = (s.score(degraded) for s in (self, exact))
        return agreement.srocc(ours, theirs)

    def _run(
        self, items: list[tuple[Tensor, ...]], against: Sequence[Tensor] | None = None
    ) -> Scores:
        """Score items of one or two images each: same sizes together, results in order.

        against: the maps of one reference for all. A GPU works on one batch while the next one is
        put together: results are fetched one batch late.
        """
        out = np.empty(len(items), dtype=np.float32)
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, images in enumerate(items):
            h, w = images[0].shape[:2]
            by_size.setdefault((int(h), int(w)), []).append(index)
        waiting: list[tuple[list[int], Tensor, torch.cuda.Event | None]] = []
        for (h, w), indices in by_size.items():
            while indices:
                size = self._batch_size(h, w)
                batch, indices = indices[:size], indices[size:]
                parts = _halving_on_oom(lambda part: self._forward(items, part, against), batch)
                if len(parts) > 1:
                    self.batch_pixels = self._pixels(h, w) * max(len(part) for part in parts)
                elif len(batch) == size:
                    # What was short of memory may have been another process: find out slowly.
                    self.batch_pixels = min(self.most_pixels, self.batch_pixels * 9 // 8)
                waiting.append((batch, *self._sent(torch.cat(parts))))
                if len(waiting) > 1:
                    _fetch(waiting.pop(0), out)
        for done in waiting:
            _fetch(done, out)
        curve = self.card.calibration
        if curve is not None:
            out = 1 / (1 + np.exp(-(out - np.float32(curve.middle)) / np.float32(curve.width)))
        return out

    def _sent(self, scores: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """Scores on their way to the CPU, and their arrival: before what the GPU is given next."""
        if self._uploads is None:
            return scores.cpu(), None
        there = scores.to("cpu", non_blocking=True)
        arrival = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        arrival.record(torch.cuda.current_stream(self.device))
        return there, arrival

    def _batch_size(self, h: int, w: int) -> int:
        if self.device.type == "cpu":
            return 1
        return max(1, self.batch_pixels // self._pixels(h, w))

    def _pixels(self, h: int, w: int) -> int:
        """Pixels of a frame, as it is or as the network sees it: the more of both."""
        return max(h * w, pixels_seen(h, w, self.card.short_side))

    @torch.inference_mode()
    def _forward(
        self,
        items: list[tuple[Tensor, ...]],
        indices: list[int],
        against: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Scores [N] on the device, where they may still be in the making."""
        sides = len(items[indices[0]])
        with _full_fp32():
            images = [self._prepare([items[i][side] for i in indices]) for side in range(sides)]
            scores: Tensor = self.net(*images) if against is None else self.net(*images, against)
        return scores.float()

    def _prepare(self, frames: list[Tensor]) -> Tensor:
        """uint8 [H,W,3] each -> uint8 [N,3,H,W] on the device; if the card resizes, float 0..1."""
        if self._uploads is not None and frames[0].device.type == "cpu":
            x = self._uploaded(frames, self._uploads)
        else:
            stacked = frames[0].contiguous()[None] if len(frames) == 1 else torch.stack(frames)
            x = stacked.to(self.device)
        x = x.permute(0, 3, 1, 2)
        short_side = self.card.short_side
        if short_side is None:
            return x
        size = resized(int(x.shape[2]), int(x.shape[3]), short_side)
        return F.interpolate(
            x.float() / 255, size=size, mode="bilinear", antialias=True, align_corners=False
        )

    def _uploaded(self, frames: list[Tensor], stream: torch.cuda.Stream) -> Tensor:
        """uint8 [H,W,3] each -> uint8 [N,H,W,3] on the GPU, copied while it is still at work.

        From pinned memory, so that the copy does not hold up the host, and on a stream of its own,
        so that it does not wait for the batch before.
        """
        shape = (len(frames), *frames[0].shape)
        room = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        stacked = torch.stack(frames, out=room)
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(stream):
            x = stacked.to(self.device, non_blocking=True)
        computing.wait_stream(stream)
        x.record_stream(computing)
        return x


def _require_gpu(device: str) -> None:
    """Raises CardError when PyTorch has no GPU that it can use, with its reason."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # the latter: PyTorch was built without CUDA
        raise CardError(
            f"device '{device}': there is no GPU that PyTorch can use ({error}). "
            "Check its driver and CUDA_VISIBLE_DEVICES, or take device cpu."
        ) from error


def _require_fit(precision: Precision, device: str, card: Card) -> None:
    """Raises CardError when a precision gains nothing on a device, or is not for such a model."""
    said = f"precision '{precision}' "
    if precision == "int8":
        if card.architecture.mode != "nr":
            raise CardError(
                f"{said}is for no-reference models: the small differences that {card.name} "
                "compares would be lost."
            )
        if device != "cpu":
            raise CardError(f"{said}is for CPUs: on a GPU take fp16.")
        if not HAS_VNNI:
            raise CardError(
                f"{said}needs a CPU with AVX-512 VNNI, which this one has not: take fp32."
            )
    if precision == "fp16" and device == "cpu":
        raise CardError(f"{said}is for GPUs: on a CPU take fp32, int8, or bf16 if it has AMX.")
    if precision == "bf16" and device == "cpu" and not HAS_AMX:
        raise CardError(f"{said}needs a GPU, or a CPU with AMX, which this one has not: take fp32.")


@contextmanager
def _full_fp32() -> Iterator[None]:
    """What is computed in fp32 is: TF32, or bf16 in its place, changes scores in the third digit.

    Convolutions on recent GPUs take TF32 unless they are told not to, products of matrices when
    the process asked for it (`torch.set_float32_matmul_precision`), on CPUs with AMX too. PyTorch
    keeps an older and a newer setting of each, and refuses to compute on a GPU while they differ.
    """
    gpu, cudnn, onednn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    kinds = [gpu.matmul, cudnn.conv, cudnn.rnn, onednn.conv, onednn.matmul]  # type: ignore[attr-defined]
    before = [kind.fp32_precision for kind in kinds]
    products, convolutions = "highest", True  # as PyTorch has them by default
    with suppress(RuntimeError):  # they differ from the newer ones, which were set alone
        products = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        convolutions = cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        cudnn.allow_tf32 = convolutions
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision


def _fetch(done: tuple[list[int], Tensor, torch.cuda.Event | None], out: Scores) -> None:
    batch, scores, arrival = done
    if arrival is not None:
        arrival.synchronize()
    out[batch] = scores.numpy()


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


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory does not suffice.

    Not all of them are of a class of its own: cuDNN then finds no engine, cuBLAS cannot allocate.
    """
    said = str(error).lower()
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or any(
        sign in said for sign in _NO_MEMORY
    )


_NO_MEMORY = (
    "out of memory",
    "allocate memory",
    "alloc_failed",
    "allocation_failed",
    "unable to find an engine",
)


def _halving_on_oom(run: Callable[[list[int]], Tensor], batch: list[int]) -> list[Tensor]:
    """Run a batch; when the GPU is out of memory, run its halves; one frame alone raises.

    Returns the scores of each part that was run, in order.
    """
    try:
        return [run(batch)]
    except RuntimeError as error:
        if len(batch) == 1 or not out_of_memory(error):
            raise
    torch.cuda.empty_cache()
    middle = len(batch) // 2
    return _halving_on_oom(run, batch[:middle]) + _halving_on_oom(run, batch[middle:])
