"""The network in 8 bits, for CPUs with VNNI: maps of uint8, weights of int8, by oneDNN.

Static and affine, without further training (Jacob et al., CVPR 2018): what is stored stands for
scale * (stored - zero). A convolution's weights have a scale for each output channel; a map has
one, which is chosen from the range that calibration pictures give it. What the rounding of the
weights does to an output's mean is taken off its bias (Nagel et al., ICCV 2019), and a kernel is
rounded so that its sum, which is what smooth areas see of it, stays. The backbone and
the gates run this way but for the gates' last convolution, of 64 channels to one, and for the
first stage of a backbone that says so; these stay in fp32, and the map of such a stage is stored
with a range for each channel. So do tokens, but for their matrix products on a CPU with AMX, which
are in bf16 there: by then the products of 8 bits take less time than theirs would.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from topiq_core.convolution import HAS_AMX, POST_OPS, FusedConv, Residual
from topiq_core.inference import GateNR, InferenceNet, Normalised

_LARGEST = 255
# How far ResNet's channels are brought to one range, 1 being wholly, and the least share of it that
# counts. The wider a channel is made, the coarser are the weights that it shares a kernel with.
_LEVELLED, _LEAST_REACH = 0.75, 0.02


@dataclass(frozen=True)
class Affine:
    """What numbers 0..255 stand for: scale * (number - zero)."""

    scale: float
    zero: int

    @classmethod
    def covering(cls, low: float, high: float) -> "Affine":
        """For values from `low` to `high`, and 0, which is stored exactly."""
        low, high = min(0.0, low), max(0.0, high)
        scale = max((high - low) / _LARGEST, 1e-12)
        return cls(scale, round(-low / scale))


_PIXELS = Affine(1.0, 0)


class _Seen:
    """What went through a convolution, by channel: its input's means, its output's range."""

    def __init__(self) -> None:
        self.sum, self.count = torch.zeros(()), 0
        self.low, self.high = torch.tensor(torch.inf), torch.tensor(-torch.inf)

    def add(self, x: Tensor, out: Tensor) -> None:
        """Maps [N,C,h,w]."""
        self.sum, self.count = self.sum + x.mean((0, 2, 3)), self.count + 1
        self.low = torch.minimum(self.low, out.amin((0, 2, 3)))
        self.high = torch.maximum(self.high, out.amax((0, 2, 3)))


@dataclass(frozen=True)
class _Known:
    """A convolution before it is replaced: weight [O,C/groups,k,k], bias [O], input means [C]."""

    weight: Tensor
    bias: Tensor
    means: Tensor


class Int8Conv(nn.Module):
    """activation(conv(x) + added) of stored maps."""

    def __init__(
        self,
        like: FusedConv,
        known: _Known,
        taken: Affine,
        given: Affine | None,
        added: Affine | None = None,
    ) -> None:
        """taken, given, added: how the input, the output and the map that is added are stored.

        given None: the output is in fp32. `like` gives geometry and activation.
        """
        super().__init__()
        self.taken, self.given, self.added = taken, given, added
        self.activation = like.activation
        self.geometry = (like.stride, like.padding, [1, 1], like.groups)
        scale = known.weight.abs().amax((1, 2, 3)).clamp(min=1e-12) / 127
        stored = _rounded(known.weight / scale[:, None, None, None])
        error = (stored * scale[:, None, None, None] - known.weight).sum((2, 3))
        by_group = error.view(like.groups, -1, error.shape[1])
        shift = (by_group * known.means.view(like.groups, 1, -1)).sum(2).flatten()
        self.register_buffer("weight", stored.to(torch.int8))
        self.register_buffer("bias", known.bias - shift)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros(len(scale), dtype=torch.int32))
        self.weight: Tensor
        self._packed: Tensor | None = None
        # oneDNN ends a product of matrices with a GELU, but no convolution of 8 bits, and adds to a
        # map a tenth to a third faster.
        self._is_product = known.weight.shape[2:] == (1, 1) and like.stride == [1, 1]

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """x uint8 [N,C,h,w] -> uint8 or fp32 [N,O,h',w']; `added` may be overwritten."""
        if self._is_product:
            return self._product(x, added)
        assert added is None  # blocks end in a 1x1 convolution
        taken, given, kind = self._stored_as()
        weight = (self._packed_for(x), self.scale, self.zero)
        post = POST_OPS[self.activation if self.activation != "gelu" else "none"]
        out: Tensor = torch.ops.onednn.qconv2d_pointwise(
            x, *taken, *weight, self.bias, *self.geometry, *given, kind, *post
        )
        return torch.ops.aten.gelu_(out) if self.activation == "gelu" else out

    def _product(self, x: Tensor, added: Tensor | None) -> Tensor:
        """A 1x1 convolution as a product of matrices."""
        taken, given, kind = self._stored_as()
        n, _, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).flatten(0, 2)
        if self._packed is None:
            flat = self.weight.flatten(1)
            self._packed = torch.ops.onednn.qlinear_prepack(flat, list(rows.shape))
            self.weight = self.weight.new_empty(0)  # not held twice
        weight = (self._packed, self.scale, self.zero)
        post = POST_OPS[self.activation]
        out: Tensor
        if added is None:
            out = torch.ops.onednn.qlinear_pointwise(
                rows, *taken, *weight, self.bias, *given, kind, *post
            )
        else:
            assert self.added is not None
            others = added.permute(0, 2, 3, 1).flatten(0, 2)
            plus = (self.added.scale, self.added.zero, "sum", 1.0)
            out = torch.ops.onednn.qlinear_pointwise.binary(
                rows, *taken, *weight, others, self.bias, *given, kind, *plus, *post
            )
        return out.view(n, height, width, -1).permute(0, 3, 1, 2)

    def _stored_as(self) -> tuple[tuple[float, int], tuple[float, int], torch.dtype]:
        """Scale and zero of the input and of the output, and the type of the latter."""
        taken = (self.taken.scale, self.taken.zero)
        if self.given is None:
            return taken, (1.0, 0), torch.float32
        return taken, (self.given.scale, self.given.zero), torch.uint8

    def _packed_for(self, x: Tensor) -> Tensor:
        """The weights as this CPU wants them for maps like `x`: laid out at the first call.

        For another shape oneDNN may lay them out again at every call: slower, not wrong.
        """
        if self._packed is None:
            taken = (self.taken.scale, self.taken.zero)
            self._packed = torch.ops.onednn.qconv_prepack(
                self.weight, self.scale, *taken, *self.geometry, list(x.shape)
            )
            self.weight = self.weight.new_empty(0)  # not held twice
        assert self._packed is not None
        return self._packed


def _rounded(weight: Tensor) -> Tensor:
    """Weights [O,C,k,k] in -127..127 to whole numbers; the sum of a kernel moves by 1/2 at most.

    Each goes to the nearest number, but for those that were nearly half way: as many of them as it
    takes go the other way.
    """
    kernels = weight.flatten(2)
    nearest = kernels.round()
    left = kernels - nearest
    missing = left.sum(2, keepdim=True).round()
    rank = left.argsort(dim=2, descending=True).argsort(dim=2)  # 0 for what lost most
    up = rank < missing
    down = rank >= kernels.shape[2] + missing
    return (nearest + up.float() - down.float()).clamp(-127, 127).view_as(weight)


class _Stored(nn.Module):
    """Real values to uint8."""

    def __init__(self, affine: Affine) -> None:
        super().__init__()
        self.affine = affine

    def forward(self, x: Tensor) -> Tensor:
        """Rounds ties up. Overwrites `x`."""
        scale, zero = self.affine.scale, self.affine.zero
        return x.mul_(1 / scale).add_(zero + 0.5).clamp_(0, _LARGEST).to(torch.uint8)


class _Framed(nn.Module):
    """Pixels with a border in the mean colour, which is zero to the backbone.

    So the normalisation can be part of the first convolution, which then pads no more.
    """

    def __init__(self, mean: Tensor, width: int) -> None:
        super().__init__()
        self.colour: Tensor
        self.register_buffer("colour", (_LARGEST * mean).round().to(torch.uint8))
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """RGB [N,3,h,w], uint8 or float in 0..1, to uint8 [N,3,h+2*width,w+2*width]."""
        if x.dtype != torch.uint8:
            x = (_LARGEST * x).round_().to(torch.uint8)
        n, channels, height, width = x.shape
        edge = self.width
        shape = (n, channels, height + 2 * edge, width + 2 * edge)
        out = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
        for border in (out[:, :, :edge], out[:, :, -edge:], out[..., :edge], out[..., -edge:]):
            border.copy_(self.colour)
        out[:, :, edge:-edge, edge:-edge] = x
        return out


class _MaxPool(nn.Module):
    """Maxima of 3x3 at every second row and column: PyTorch 2.14 has none for uint8 maps."""

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,h,w] -> [N,C,(h+1)/2,(w+1)/2], uint8."""
        for side in (2, 3):
            even, odd = x.movedim(side, 0)[::2], x.movedim(side, 0)[1::2]
            out = even.clone()
            torch.maximum(out[: len(odd)], odd, out=out[: len(odd)])
            torch.maximum(out[1:], odd[: len(out) - 1], out=out[1:])
            x = out.movedim(0, side)
        return x


def quantise(net: InferenceNet, pictures: Iterable[Tensor]) -> None:
    """Turn a no-reference network, made for int8 and not run yet, into an 8-bit one.

    pictures: RGB [1,3,H,W] each, uint8 or float in 0..1, that ranges are taken from.
    """
    known, seen = _observed(net, pictures)
    if net.exact_start:
        _equalise_bottlenecks(net, known, seen)
    else:
        _equalise(net, known, seen)
    ranges = {
        conv: Affine.covering(float(s.low.min()), float(s.high.max())) for conv, s in seen.items()
    }

    def quantised(module: nn.Module, taken: Affine) -> tuple[nn.Module, Affine]:
        """The 8-bit form of a part whose input is stored as `taken`, and how its output is."""
        match module:
            case FusedConv():
                given = ranges[module]
                return Int8Conv(module, known[module], taken, given), given
            case Residual():
                shortcut, added = None, taken
                if module.shortcut is not None:
                    shortcut, added = quantised(module.shortcut, taken)
                body, inner = quantised(module.body, taken)
                last = module.last
                assert isinstance(body, nn.Sequential)
                assert isinstance(last, FusedConv)
                given = ranges[last]
                summing = Int8Conv(last, known[last], inner, given, added)
                return Residual([*body, summing], shortcut), given
            case nn.Sequential():
                parts = []
                for part in module:
                    made, taken = quantised(part, taken)
                    parts.append(made)
                return nn.Sequential(*parts), taken
            case nn.MaxPool2d():
                return _MaxPool(), taken
        raise TypeError(f"{type(module).__name__} has no 8-bit form.")

    if HAS_AMX:
        net.narrow_products(torch.bfloat16)

    taken = _PIXELS
    if net.exact_start:
        _level_channels(net, known, seen)
    else:
        _take_pixels(net, known)
    for level, (stage, gate) in enumerate(zip(net.stages, net.gates, strict=True)):
        if level == 0 and net.exact_start:
            taken = Affine.covering(0.0, 1.0)
            net.stages[level] = nn.Sequential(stage, _Stored(taken))
        else:
            net.stages[level], taken = quantised(stage, taken)
        assert isinstance(gate, GateNR)
        evidence, mixing, last = gate.gate
        assert isinstance(gate.content, FusedConv)
        assert isinstance(evidence, FusedConv)
        assert isinstance(mixing, FusedConv)
        between = ranges[evidence]
        gate.content = Int8Conv(gate.content, known[gate.content], taken, None)
        gate.gate = nn.Sequential(
            Int8Conv(evidence, known[evidence], taken, between),
            Int8Conv(mixing, known[mixing], between, None),
            last,
        )


def _level_channels(
    net: InferenceNet, known: dict[FusedConv, _Known], seen: dict[FusedConv, _Seen]
) -> None:
    """Bring every channel of the first stage's map to the range 0..1 of the calibration pictures.

    Exact in real arithmetic: the stage ends in a convolution without activation, which takes scale
    and shift, and the 1x1 convolutions that its map goes to take them back (cross-layer range
    equalisation, Nagel et al., ICCV 2019).
    """
    last = _convolutions(net.stages[0])[-1]
    gate = net.gates[0]
    assert isinstance(gate, GateNR)
    assert last.activation == "none"
    low, span = seen[last].low, (seen[last].high - seen[last].low).clamp(min=1e-12)
    of = known[last]
    last.replace(of.weight / span.view(-1, 1, 1, 1), (of.bias - low) / span)
    for after in (_convolutions(net.stages[1])[0], gate.content, gate.gate[0]):
        assert isinstance(after, FusedConv)
        of = known[after]
        assert of.weight.shape[2:] == (1, 1)
        known[after] = _Known(
            of.weight * span.view(1, -1, 1, 1),
            of.bias + of.weight.flatten(1) @ low,
            (of.means - low) / span,
        )


def _equalise(
    net: InferenceNet, known: dict[FusedConv, _Known], seen: dict[FusedConv, _Seen]
) -> None:
    """Bring the channels of ResNet's maps nearer to one range, for they are stored with one.

    Exact in real arithmetic, as ReLU and maxima keep positive factors: what makes a map divides its
    channels by them, what takes it multiplies (cross-layer range equalisation, Nagel et al., ICCV
    2019). A stage's blocks add to one map, and so share its factors.
    """

    stages = [[b for b in stage.modules() if isinstance(b, Residual)] for stage in net.stages]
    for number, (blocks, later) in enumerate(pairwise([*stages, []])):
        for block in blocks:
            for conv, after in pairwise(_convolutions(nn.Sequential(block.body, block.last))):
                _level(known, seen, [conv], [after])
        made = [conv for block in blocks for conv in (block.shortcut, block.last)]
        gate = net.gates[number]
        assert isinstance(gate, GateNR)
        taking: list[nn.Module | None] = [gate.content, gate.gate[0]]
        for block in (*blocks[1:], *later[:1]):
            taking += [block.body[0], block.shortcut]
        _level(
            known,
            seen,
            [c for c in made if isinstance(c, FusedConv)] or _convolutions(net.stages[number]),
            [c for c in taking if isinstance(c, FusedConv)],
        )


def _equalise_bottlenecks(
    net: InferenceNet, known: dict[FusedConv, _Known], seen: dict[FusedConv, _Seen]
) -> None:
    """As `_equalise`, of MobileNet's maps between blocks, which have no activation.

    ReLU6, within the blocks, keeps no factors. Blocks that add to one map share its factors. The
    first stage is not in 8 bits.
    """
    adding = {b.last for stage in net.stages for b in stage.modules() if isinstance(b, Residual)}
    maps: list[tuple[list[FusedConv], list[FusedConv]]] = []  # what makes each, and what takes it
    before: FusedConv | None = None
    for stage, gate in zip(list(net.stages)[1:], list(net.gates)[1:], strict=True):
        for conv in _convolutions(stage):
            if before is not None and before.activation == "none":
                maps[-1][1].append(conv)
            if conv in adding:
                maps[-1][0].append(conv)
            elif conv.activation == "none":
                maps.append(([conv], []))
            before = conv
        assert isinstance(gate, GateNR)
        if before is not None and before.activation == "none":
            maps[-1][1].extend(_convolutions(nn.ModuleList([gate.content, gate.gate[0]])))
    for making, taking in maps:
        _level(known, seen, making, taking, exponent=1.0)


def _level(
    known: dict[FusedConv, _Known],
    seen: dict[FusedConv, _Seen],
    making: Sequence[FusedConv],
    taking: Sequence[FusedConv],
    exponent: float = _LEVELLED,
) -> None:
    """Divide the channels of a map by factors, and multiply them where it is taken."""
    reach = torch.stack([torch.maximum(-seen[c].low, seen[c].high) for c in making]).amax(0)
    factor = (reach / reach.max()).clamp(min=_LEAST_REACH) ** exponent
    for conv in making:
        of, was = known[conv], seen[conv]
        known[conv] = _Known(of.weight / factor.view(-1, 1, 1, 1), of.bias / factor, of.means)
        was.low, was.high = was.low / factor, was.high / factor
    for conv in taking:
        of = known[conv]
        known[conv] = _Known(of.weight * factor.view(1, -1, 1, 1), of.bias, of.means / factor)


def _convolutions(module: nn.Module) -> list[FusedConv]:
    """In the order they run."""
    return [part for part in module.modules() if isinstance(part, FusedConv)]


def _observed(
    net: InferenceNet, pictures: Iterable[Tensor]
) -> tuple[dict[FusedConv, _Known], dict[FusedConv, _Seen]]:
    """Every convolution of backbone and gates, and what went through it."""
    seen: dict[FusedConv, _Seen] = {}
    first: dict[FusedConv, tuple[Tensor, Tensor]] = {}
    hooks = []
    for module in _convolutions(nn.ModuleList([*net.stages, *net.gates])):
        seen[module], first[module] = _Seen(), (module.weight, module.bias)
        hooks.append(module.register_forward_hook(lambda conv, x, out: seen[conv].add(x[0], out)))
    with torch.inference_mode():
        for picture in pictures:
            net(picture)
    for hook in hooks:
        hook.remove()
    known = {conv: _Known(*of, seen[conv].sum / seen[conv].count) for conv, of in first.items()}
    return known, seen


def _take_pixels(net: InferenceNet, known: dict[FusedConv, _Known]) -> None:
    """Have the first convolution, which comes first in `known`, take pixels as they are stored."""
    stem, entry = next(iter(known)), net.entry
    assert isinstance(entry, Normalised)
    mean, std = entry.mean.view(3, 1, 1), entry.std.view(3, 1, 1)
    of = known[stem]
    known[stem] = _Known(
        of.weight / (_LARGEST * std),
        of.bias - (of.weight * (mean / std)).sum((1, 2, 3)),
        _LARGEST * (mean + std * of.means.view(3, 1, 1)).flatten(),
    )
    net.entry = _Framed(entry.mean, stem.padding[0])
    stem.padding = [0, 0]
