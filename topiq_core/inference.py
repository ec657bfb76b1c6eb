"""CFANet for inference: the same function as `cfanet.CFANet`, in bounded memory and less work.

Exact in real arithmetic; scores agree with the plain module within 2e-5:

- BatchNorm is folded into the convolution before it, and the evidence half of the no-reference
  gate into the 1x1 convolution that follows it: C -> gate_dim instead of C -> C -> gate_dim.
- Backbone stages and gates run over strips of rows. A strip is computed with enough rows around
  it that its own are right, and these are kept. Only a level's map is ever held whole; everything
  wider than it, such as an expanded bottleneck, lives for one strip.
- Full-reference features are pooled one by one instead of being concatenated first.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from topiq_core.cfanet import LEVELS, CFANet, GatedPoolingFR, GatedPoolingNR, expected_score

# Positions of a map that are worked on at once, over all images of a batch. On a CPU small strips
# are also faster, because they stay in its caches; a GPU wants enough of them to fill it.
STRIP_POSITIONS = {"cpu": 1 << 17, "cuda": 1 << 23}
# Rows of input that a stage's strip needs on either side; the deepest stage (MobileNetV2's
# fourth: seven 3x3 convolutions, the first with stride 2) reaches 13. Even, as the stride is 2.
_STAGE_MARGIN = 16
_GATE_MARGIN = 2  # two 3x3 convolutions


class InferenceNet(nn.Module):
    """Scores images as `net` does. Takes `net` over: what it replaces is removed from it."""

    def __init__(self, net: CFANet, strip_positions: int | None = None) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.stages = nn.ModuleList(fuse(s.eval()) for s in net.semantic_model.stages())
        self.gates = nn.ModuleList(_gate(pool) for pool in net.weight_pool)
        del net.semantic_model, net.weight_pool
        self.strip_positions = strip_positions
        self.to(memory_format=torch.channels_last)

    def forward(self, image: Tensor, reference: Tensor | None = None) -> Tensor:
        """Score images.

        image: RGB [N,3,H,W], uint8 or float in 0..1; reference: the same, for a full-reference
        network only. Returns [N] float: one score each, higher is better.
        """
        sides = [image] if reference is None else [image, reference]
        grid = _coarsest_grid(*image.shape[2:])
        positions = self.strip_positions or STRIP_POSITIONS[image.device.type]
        tokens = []
        for level in range(LEVELS):
            sides = [self._stage(level, x, positions) for x in sides]
            pooled = self.gates[level](sides, grid, positions)
            tokens.append(self.net.tokens(level, self.net.dim_reduce[level](pooled)))
            del pooled
        return expected_score(self.net.judge(tokens))

    def _stage(self, level: int, x: Tensor, positions: int) -> Tensor:
        """Run one backbone stage, which halves both sides, in strips."""
        whole: Tensor | None = None
        for start, end in _strips(x, positions):
            top = max(0, start - _STAGE_MARGIN)
            part = x[:, :, top : end + _STAGE_MARGIN]
            out = self.stages[level](self._normalised(part) if level == 0 else part)
            out = out[:, :, (start - top) // 2 : (end + 1 - top) // 2]
            if whole is None:
                n, channels, _, width = out.shape
                size = (n, channels, (x.shape[2] + 1) // 2, width)
                # Filled strip by strip: joining strips at the end would hold them twice.
                whole = torch.empty(
                    size, dtype=out.dtype, device=out.device, memory_format=torch.channels_last
                )
            whole[:, :, start // 2 : (end + 1) // 2] = out
        assert whole is not None
        return whole

    def _normalised(self, x: Tensor) -> Tensor:
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        return (x - self.net.mean) / self.net.std


class _GateNR(nn.Module):
    def __init__(self, pool: GatedPoolingNR) -> None:
        super().__init__()
        split, first = pool.splitconv, pool.weight_blk[0]
        assert isinstance(first, nn.Conv2d)
        channels = split.in_channels
        self.content = nn.Conv2d(channels, channels, 1)
        self.content.weight = nn.Parameter(split.weight[:channels], requires_grad=False)
        self.content.bias = nn.Parameter(_of(split.bias)[:channels], requires_grad=False)
        folded = nn.Conv2d(channels, first.out_channels, 1)
        mix = first.weight.flatten(1).double()
        weight = mix @ split.weight[channels:].flatten(1).double()
        bias = mix @ _of(split.bias)[channels:].double() + _of(first.bias).double()
        folded.weight = nn.Parameter(weight.float()[:, :, None, None], requires_grad=False)
        folded.bias = nn.Parameter(bias.float(), requires_grad=False)
        self.gate = nn.Sequential(folded, *pool.weight_blk[1:])

    def forward(self, sides: list[Tensor], grid: tuple[int, int], positions: int) -> Tensor:
        """The maps of a level, one for each image given, to one pooled map."""

        def gated(x: Tensor, inside: slice) -> tuple[Tensor, ...]:
            return (F.gelu(self.content(x[:, :, inside])) * self.gate(x)[:, :, inside],)

        return _pooled(gated, sides, grid, positions)


class _GateFR(nn.Module):
    def __init__(self, pool: GatedPoolingFR) -> None:
        super().__init__()
        self.gate = nn.Sequential(*pool)

    def forward(self, sides: list[Tensor], grid: tuple[int, int], positions: int) -> Tensor:
        """The maps of a level, one for each image given, to one pooled map."""

        def gated(d: Tensor, r: Tensor, inside: slice) -> tuple[Tensor, ...]:
            error = torch.sqrt((d - r) ** 2 + 1e-12)
            gate = self.gate(error)[:, :, inside]
            return tuple(x[:, :, inside] * gate for x in (d, r, error))

        return _pooled(gated, sides, grid, positions)


def _gate(pool: nn.Module) -> nn.Module:
    return _GateFR(pool) if isinstance(pool, GatedPoolingFR) else _GateNR(pool)  # type: ignore[arg-type]


def _pooled(
    gated: Callable[..., tuple[Tensor, ...]],
    sides: list[Tensor],
    grid: tuple[int, int],
    positions: int,
) -> Tensor:
    """Gate maps [N,C,h,w] strip by strip and average them to `grid`, if both sides are larger.

    The mean over a rectangle is the mean over rows of the mean over columns: columns are averaged
    within a strip, rows at the end, whatever the strips were.
    """
    height, width = sides[0].shape[2:]
    shrinks = height > grid[0] and width > grid[1]
    strips: list[list[Tensor]] = []
    for start, end in _strips(sides[0], positions):
        top = max(0, start - _GATE_MARGIN)
        parts = [x[:, :, top : end + _GATE_MARGIN] for x in sides]
        maps = gated(*parts, slice(start - top, end - top))
        if shrinks:
            maps = tuple(F.adaptive_avg_pool2d(x, (end - start, grid[1])) for x in maps)
        strips.append(list(maps))
    whole = [torch.cat(parts, dim=2) for parts in zip(*strips, strict=True)]
    if shrinks:
        whole = [F.adaptive_avg_pool2d(x, grid) for x in whole]
    return torch.cat(whole, dim=1)


def _coarsest_grid(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the last level: every stage halves and rounds up."""
    return -(-height // 2**LEVELS), -(-width // 2**LEVELS)


def _strips(x: Tensor, positions: int) -> Iterator[tuple[int, int]]:
    """First row and end of each strip of a map [N,C,h,w].

    They begin at even rows, as the stages have stride 2, and are never so low that the margins
    would dominate.
    """
    n, _, height, width = x.shape
    rows = max(4 * _STAGE_MARGIN, positions // (n * width) // 2 * 2)
    for start in range(0, height, rows):
        yield start, min(start + rows, height)


def _of(bias: Tensor | None) -> Tensor:
    assert bias is not None
    return bias
