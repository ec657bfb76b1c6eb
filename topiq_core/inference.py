"""CFANet for inference: the same function as `cfanet.CFANet`, in bounded memory and less work.

Exact in real arithmetic; fp32 scores agree with the plain module within 2e-5:

- BatchNorm is folded into the convolution before it, and the evidence half of the no-reference
  gate into the 1x1 convolution that follows it: C -> gate_dim instead of C -> C -> gate_dim.
- Activations and residual sums are part of the convolution before them (`convolution.FusedConv`).
- Backbone stages and gates run over strips of rows. A strip is computed with enough rows around
  it that its own are right, and these are kept. Only a level's map is ever held whole; everything
  wider than it, such as an expanded bottleneck, lives for one strip.
- Full-reference features are pooled one by one instead of being concatenated first. A reference's
  maps can be computed once for many distorted images.
- Position embeddings are kept by grid.

In fewer bits it is another function. Tokens are in fp32, but for their products of matrices on
hardware that has 16-bit ones and little else (`narrow_products`), and so is the first stage of a
backbone that says so.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topiq_core.blocks import Bottleneck, InvertedResidual
from topiq_core.cfanet import (
    LEVELS,
    Attention,
    CFANet,
    GatedPoolingFR,
    GatedPoolingNR,
    expected_score,
    token_grid,
)
from topiq_core.convolution import Activation, FusedConv, Residual

Precision = Literal["fp32", "fp16", "bf16", "int8"]
# Of the maps. Tokens are fp32: rounding them costs most of the accuracy.
MAP_TYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float32,  # what is not in 8 bits; see int8.py
}


@dataclass(frozen=True)
class Strips:
    """Positions of a map that are worked on at once, over all images of a batch.

    On a CPU small strips are also faster: they stay in its caches, and in memory that the process
    has touched before. A GPU wants enough of them to fill it.
    """

    stage: int
    gate: int


ON_CPU = Strips(1 << 17, 1 << 15)
NARROW_ON_CPU = Strips(1 << 19, 1 << 17)  # of maps in 16 or 8 bits
ON_GPU = Strips(1 << 23, 1 << 23)
_GATE_MARGIN = 2  # two 3x3 convolutions
_CACHED = 1 << 18  # numbers that a CPU's caches hold through several steps
_POSITION_GRIDS = 16  # position embeddings kept, by grid


class InferenceNet(nn.Module):
    """Scores images as `net` does. Takes `net` over: what it replaces is removed from it."""

    def __init__(
        self, net: CFANet, precision: Precision = "fp32", strips: Strips | None = None
    ) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.map_type = MAP_TYPES[precision]
        stages = net.semantic_model.stages()
        # ResNet's pooling is run by itself: its small result then stands for the finest map, which
        # would be held besides the next one. In 8 bits maps are small enough.
        self.pool: nn.Module | None = None
        if isinstance(stages[1][0], nn.MaxPool2d) and precision != "int8":
            self.pool, stages[1] = stages[1][0], stages[1][1:]
        self.strides = [1 if level == 1 and self.pool else 2 for level in range(LEVELS)]
        self.margins = [_margin(stage) for stage in stages]
        self.stages = nn.ModuleList(_fused(stage) for stage in stages)
        self.exact_start = net.semantic_model.exact_start and precision in ("bf16", "int8")
        for stage in self.stages[self.exact_start :]:
            stage.to(self.map_type)
        if self.exact_start:
            self.stages[0] = nn.Sequential(self.stages[0], _As(self.map_type))
        entry_type = torch.float32 if self.exact_start else self.map_type
        self.entry: nn.Module = Normalised(net.mean, net.std, entry_type)
        self.gates = nn.ModuleList(_gate(pool) for pool in net.weight_pool).to(self.map_type)
        self.reduce = nn.ModuleList(
            FusedConv.of(next(r.children()), None, "gelu") for r in net.dim_reduce
        )
        self.channels = tuple(net.semantic_model.channels)
        # What maps are kept in, where that is known before there is one.
        self.stored = None if precision == "int8" else self.map_type
        del net.semantic_model, net.weight_pool, net.dim_reduce
        self.strips = strips
        self.narrow = precision != "fp32"
        self._positions: dict[tuple[int, int], Tensor] = {}

    def narrow_products(self, kind: torch.dtype) -> None:
        """Compute products of matrices in attention blocks in 16 bits.

        A GPU has no tensor cores for fp32: there they would take as long as the rest of a network
        in 16 bits. A LayerNorm comes before all of them, so that fp16 has the range for them.
        """
        judge = self.net
        judge.attn_pool = ProductsIn(kind, judge.attn_pool)  # type: ignore[assignment]
        for blocks in (judge.sa_attn_blks, judge.attn_blks):
            for i, block in enumerate(blocks):
                blocks[i] = ProductsIn(kind, block)

    def forward(self, image: Tensor, reference: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """Score images.

        image: RGB [N,3,H,W], uint8 or float in 0..1. reference, for a full-reference network
        only: the same, or its maps as `levels` gives them; one reference serves a whole batch.
        Returns [N] float: one score each, higher is better.
        """
        sides = [self.levels(image)]
        if reference is not None:
            given = isinstance(reference, Tensor)
            sides.append(self.levels(reference) if given else iter(reference))  # type: ignore[arg-type]
        grid = token_grid(*_coarsest(*image.shape[2:]), self.net.architecture.grid)
        positions = self._strips_on(image).gate
        tokens = []
        for level in range(LEVELS):
            # Not by zip(), which holds its first maps, the largest ones, until the third.
            pooled = self.gates[level]([next(side) for side in sides], grid, positions)
            tokens.append(self._tokens(level, self.reduce[level](pooled.float())))
        return expected_score(self.net.judge(tokens))

    def levels(self, image: Tensor) -> Iterator[Tensor]:
        """The maps of images [N,3,H,W], fine to coarse, each made when it is asked for."""
        positions = self._strips_on(image).stage
        x = image
        for level in range(LEVELS):
            if level == 1 and self.pool is not None:
                x = self.pool(x)
            x = self._stage(level, x, positions)
            yield x

    def _strips_on(self, x: Tensor) -> Strips:
        if self.strips is not None:
            return self.strips
        if not x.is_cpu:
            return ON_GPU
        return NARROW_ON_CPU if self.narrow else ON_CPU

    def _tokens(self, level: int, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if (height, width) not in self._positions:
            if len(self._positions) == _POSITION_GRIDS:
                del self._positions[next(iter(self._positions))]
            self._positions[height, width] = self.net.positions(height, width)
        return self.net.tokens(level, x, self._positions[height, width])

    def _stage(self, level: int, x: Tensor, positions: int) -> Tensor:
        """Run one backbone stage in strips."""
        margin, stride = self.margins[level], self.strides[level]
        n, _, height, width = x.shape
        size = n, self.channels[level], -(-height // stride), -(-width // stride)
        strips = list(_strips(x, positions * stride**2 // 4, 4 * margin))
        whole: Tensor | None = None
        if len(strips) > 1 and self.stored is not None:
            # Filled strip by strip: joining strips at the end would hold them twice. Taken before
            # any strip is: where a finer map was, there may be just as much room.
            whole = torch.empty(
                size, dtype=self.stored, device=x.device, memory_format=torch.channels_last
            )
        for start, end in strips:
            top = max(0, start - margin)
            part = _rows(x, top, end + margin)
            out: Tensor = self.stages[level](self.entry(part) if level == 0 else part)
            out = out[:, :, (start - top) // stride : -((top - end) // stride)]
            if len(strips) == 1:
                return out
            if whole is None:
                whole = torch.empty(
                    size, dtype=out.dtype, device=out.device, memory_format=torch.channels_last
                )
            whole[:, :, start // stride : -(-end // stride)] = out
        assert whole is not None
        return whole


class Normalised(nn.Module):
    """Pixels as the backbone wants them."""

    def __init__(self, mean: Tensor, std: Tensor, map_type: torch.dtype) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.map_type = map_type

    def forward(self, x: Tensor) -> Tensor:
        """RGB [N,3,h,w], uint8 or float in 0..1, to zero mean and unit deviation."""
        peak = 255 if x.dtype == torch.uint8 else 1
        return (x - peak * self.mean).mul_(1 / (peak * self.std)).to(self.map_type)


class ProductsIn(nn.Module):
    """A block of attention with its matrix products in 16 bits; its norms and sums stay in fp32."""

    def __init__(self, kind: torch.dtype, block: nn.Module) -> None:
        super().__init__()
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.to(kind)
            elif isinstance(module, Attention):
                for weight in (module.in_proj_weight, module.in_proj_bias):
                    weight.data = weight.data.to(kind)
        self.kind = kind
        self.block = block

    def forward(self, *tokens: Tensor) -> Tensor:
        """[N,T,D] each -> [N,T,D], fp32."""
        with torch.autocast(tokens[0].device.type, self.kind, cache_enabled=False):
            out: Tensor = self.block(*tokens)
        return out


class _As(nn.Module):
    """Maps in another type."""

    def __init__(self, map_type: torch.dtype) -> None:
        super().__init__()
        self.map_type = map_type

    def forward(self, x: Tensor) -> Tensor:
        """The same map."""
        return x.to(self.map_type)


def _fused(module: nn.Module) -> nn.Module:
    """A part of a backbone, its norms folded and its activations and sums fused."""
    match module:
        case Bottleneck():
            down = module.downsample
            body: list[nn.Module] = [
                FusedConv.of(module.conv1, module.bn1, "relu"),
                FusedConv.of(module.conv2, module.bn2, "relu"),
                FusedConv.of(module.conv3, module.bn3, "relu"),
            ]
            return Residual(body, None if down is None else FusedConv.of(down[0], down[1]))
        case InvertedResidual():
            body = list(_sequence(module.conv))
            return Residual(body, None) if module.use_res_connect else nn.Sequential(*body)
        case nn.Sequential():
            return nn.Sequential(*_sequence(module))
    return module


_ACTIVATIONS: dict[type[nn.Module], Activation] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}


def _sequence(parts: nn.Sequential) -> Iterator[nn.Module]:
    """The parts in turn; a convolution takes the norm and the activation after it along."""
    waiting = list(parts)
    while waiting:
        part = waiting.pop(0)
        if not isinstance(part, nn.Conv2d):
            yield _fused(part)
            continue
        norm = waiting.pop(0) if waiting and isinstance(waiting[0], nn.BatchNorm2d) else None
        activation = _ACTIVATIONS.get(type(waiting[0])) if waiting else None
        if activation is not None:
            del waiting[0]
        yield FusedConv.of(part, norm, activation or "none")


def _margin(stage: nn.Module) -> int:
    """Rows of input on either side that a row of a stage's output depends on; even, as strips are.

    A stage's modules are registered in the order they run, and its shortcuts are 1x1.
    """
    rows = 0
    for module in reversed(list(stage.modules())):
        if isinstance(module, nn.Conv2d | nn.MaxPool2d):
            kernel, stride = _of_rows(module.kernel_size), _of_rows(module.stride)
            if kernel > 1:
                rows = rows * stride + kernel // 2
    return rows + rows % 2


def _of_rows(size: int | tuple[int, ...]) -> int:
    return size if isinstance(size, int) else size[0]


class GateNR(nn.Module):
    """A no-reference gate and the mean over its cells."""

    def __init__(self, pool: GatedPoolingNR) -> None:
        super().__init__()
        split, first = pool.splitconv, pool.weight_blk[0]
        assert isinstance(first, nn.Conv2d)
        channels = split.in_channels
        bias = _of(split.bias)
        self.content: nn.Module = FusedConv(split.weight[:channels], bias[:channels], split, "gelu")
        mix = first.weight.flatten(1).double()
        weight = mix @ split.weight[channels:].flatten(1).double()
        shift = mix @ bias[channels:].double() + _of(first.bias).double()
        evidence = FusedConv(weight.float()[:, :, None, None], shift.float(), first, "gelu")
        self.gate = nn.Sequential(evidence, *_gate_tail(pool.weight_blk))

    def forward(self, sides: Sequence[Tensor], grid: tuple[int, int], positions: int) -> Tensor:
        """The maps of a level, one for each image given, to one pooled map."""

        def gated(x: Tensor, inside: slice) -> tuple[Tensor, list[Tensor]]:
            return self.gate(x)[:, :, inside], [self.content(x[:, :, inside])]

        return _pooled(gated, sides, grid, positions)


class _GateFR(nn.Module):
    def __init__(self, pool: GatedPoolingFR) -> None:
        super().__init__()
        self.gate = nn.Sequential(FusedConv.of(pool[0], None, "gelu"), *_gate_tail(pool))

    def forward(self, sides: Sequence[Tensor], grid: tuple[int, int], positions: int) -> Tensor:
        """The maps of a level, one for each image given, to one pooled map."""

        def gated(d: Tensor, r: Tensor, inside: slice) -> tuple[Tensor, list[Tensor]]:
            error = _error(d, r)
            return self.gate(error)[:, :, inside], [x[:, :, inside] for x in (d, r, error)]

        return _pooled(gated, sides, grid, positions)


def _error(d: Tensor, r: Tensor) -> Tensor:
    """|d - r|, never zero, [N,C,h,w]: the root of its square and 1e-12."""
    if d.dtype != torch.float32:  # 16 bits do not hold the square; this is the same to 4e-7
        return (d - r).abs_().clamp_(min=1e-6)
    if not d.is_cpu:
        return (d - r).square_().add_(1e-12).sqrt_()
    error = torch.empty_like(d)
    for start, end in _strips(d, _CACHED // d.shape[1], 1):
        part = error[:, :, start:end]
        torch.sub(d[:, :, start:end], r[:, :, start:end], out=part)
        part.square_().add_(1e-12).sqrt_()
    return error


def _gate_tail(gate: nn.Sequential) -> tuple[FusedConv, FusedConv]:
    return FusedConv.of(gate[2], None, "gelu"), FusedConv.of(gate[4], None, "sigmoid")


def _gate(pool: nn.Module) -> nn.Module:
    return _GateFR(pool) if isinstance(pool, GatedPoolingFR) else GateNR(pool)  # type: ignore[arg-type]


def _pooled(
    gated: Callable[..., tuple[Tensor, list[Tensor]]],
    sides: Sequence[Tensor],
    grid: tuple[int, int],
    positions: int,
) -> Tensor:
    """Gate maps [N,C,h,w] strip by strip and average them to `grid`, if both sides are larger.

    gated: makes the gate [N,1,h,w] of a strip, and the maps that it is for. The mean over a
    rectangle is the mean over rows of the mean over columns: columns are averaged within a strip,
    rows at the end, whatever the strips were.
    """
    height, width = sides[0].shape[2:]
    shrinks = height > grid[0] and width > grid[1]
    strips: list[list[Tensor]] = []
    for start, end in _strips(sides[0], positions, 4 * _GATE_MARGIN):
        top = max(0, start - _GATE_MARGIN)
        parts = [_rows(x, top, end + _GATE_MARGIN) for x in sides]
        gate, maps = gated(*parts, slice(start - top, end - top))
        strips.append([_by_columns(x, gate, grid[1]) if shrinks else x * gate for x in maps])
    whole = [
        torch.cat(parts, dim=2) if len(strips) > 1 else parts[0]
        for parts in zip(*strips, strict=True)
    ]
    if shrinks:
        # In fp32: these are what tokens are made of, and few.
        whole = [F.adaptive_avg_pool2d(x.float(), grid) for x in whole]
    return torch.cat(whole, dim=1)


def _by_columns(x: Tensor, gate: Tensor, columns: int) -> Tensor:
    """Gate a map, [N,C,h,w] or [1,C,h,w], and average along its rows to [N,C,h,columns]."""
    channels, height, width = x.shape[1:]
    if width % columns or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.adaptive_avg_pool2d(x * gate, (height, columns))
    # Cells of one width: the gate holds the weights of each cell's sum, and no gated map is made.
    weights = (gate * (columns / width)).reshape(-1, height, columns, 1, width // columns)
    cells = x.permute(0, 2, 3, 1).reshape(-1, height, columns, width // columns, channels)
    return (weights @ cells).squeeze(3).permute(0, 3, 1, 2)


def _coarsest(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the last level: every stage halves and rounds up."""
    return -(-height // 2**LEVELS), -(-width // 2**LEVELS)


def _strips(x: Tensor, positions: int, least: int) -> Iterator[tuple[int, int]]:
    """First row and end of each strip of a map [N,C,h,w].

    They begin at even rows, as stages have stride 2, and are never so low that the margins
    would dominate.
    """
    n, _, height, width = x.shape
    rows = max(least, positions // (n * width) // 2 * 2)
    for start in range(0, height, rows):
        yield start, min(start + rows, height)


def _rows(x: Tensor, start: int, end: int) -> Tensor:
    """Rows of a map [N,C,h,w]. Dense on a GPU, where every convolution would make its own copy."""
    part = x[:, :, start:end]
    return part if x.is_cpu else part.contiguous(memory_format=torch.channels_last)


def _of(bias: Tensor | None) -> Tensor:
    assert bias is not None
    return bias
