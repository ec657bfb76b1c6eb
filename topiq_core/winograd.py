"""3x3 convolutions by Winograd's minimal filtering, F(4x4, 3x3): 36 products where 144 were.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016. The same sums in
another order: exact in real arithmetic, in fp32 off by some 4e-5 of the output's deviation.
"""

import torch
from torch import Tensor

# Where a 3x3 convolution of this many channels, on so many tiles, is worth transforming its maps.
LEAST_CHANNELS, _LEAST_TILES = 256, 16

_OUT, _IN = 4, 6  # side of an output tile, and of the input tile that it depends on
_INPUT = torch.tensor(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    dtype=torch.float32,
)
_KERNEL = torch.tensor(
    [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64
).div(24)
_OUTPUT = torch.tensor(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    dtype=torch.float32,
)
# For both directions at once: [36,36] and [16,36].
_INPUTS, _OUTPUTS = torch.kron(_INPUT, _INPUT), torch.kron(_OUTPUT, _OUTPUT)
# Numbers of transformed input that are worked on at once: they stay in a CPU's cache.
_BLOCK = 1 << 21


def pays(x: Tensor) -> bool:
    """Whether maps [N,C,h,w] have tiles enough for `conv3x3` to be faster than the plain way."""
    n, _, height, width = x.shape
    return n * -(-height // _OUT) * -(-width // _OUT) >= _LEAST_TILES


def transformed(weight: Tensor) -> Tensor:
    """A kernel [O,C,3,3] as `conv3x3` wants it: [36,C,O], computed in double precision."""
    kernel = _KERNEL.to(weight.device)
    both = torch.einsum("ik,ockl,jl->ijco", kernel, weight.double(), kernel)
    return both.flatten(0, 1).to(weight.dtype).contiguous()


def conv3x3(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """Stride 1, padding 1: [N,C,h,w] to [N,O,h,w] in channels-last memory. fp32.

    kernel: [36,C,O] of `transformed`. bias: [O].
    """
    n, channels, height, width = x.shape
    rows, columns = -(-height // _OUT), -(-width // _OUT)
    right, bottom = 1 + _OUT * columns - width, 1 + _OUT * rows - height
    padded = _padded(x.permute(0, 2, 3, 1), right, bottom)
    image, row, column, _ = padded.stride()
    tiles = padded.as_strided(
        (_IN, _IN, n, rows, columns, channels), (row, column, image, _OUT * row, _OUT * column, 1)
    )
    out = x.new_empty(n, rows, _OUT, columns, _OUT, len(bias))
    at_once = max(1, _BLOCK // (_IN * _IN * n * columns * channels))
    for start in range(0, rows, at_once):
        part = tiles[:, :, :, start : start + at_once]
        at = part.shape[2:5]
        spread = (_INPUTS @ part.reshape(_IN * _IN, -1)).view(_IN * _IN, -1, channels)
        summed = torch.bmm(spread, kernel).view(_IN * _IN, -1)
        made = (_OUTPUTS @ summed).view(_OUT, _OUT, *at, -1)
        target = out[:, start : start + at_once]
        torch.add(made.permute(2, 3, 0, 4, 1, 5), bias, out=target)
    whole = out.view(n, rows * _OUT, columns * _OUT, -1)
    return whole[:, :height, :width].contiguous().permute(0, 3, 1, 2)


def _padded(x: Tensor, right: int, bottom: int) -> Tensor:
    """Zeros around [N,h,w,C]: one above and to the left. Unlike F.pad, nothing is written twice."""
    n, height, width, channels = x.shape
    out = x.new_empty(n, 1 + height + bottom, 1 + width + right, channels)
    out[:, 1 : 1 + height, 1 : 1 + width] = x
    for edge in (out[:, 0], out[:, 1 + height :], out[:, :, 0], out[:, :, 1 + width :]):
        edge.zero_()
    return out
