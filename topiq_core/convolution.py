"""One convolution with all that surrounds it: the norm folded in, sum and activation fused.

On a CPU, oneDNN runs it as one pass over the map, with weights that are laid out for it once. What
PyTorch does layer by layer (a sum, a ReLU, above all an erf-GELU) costs a third of the network's
time there. On a GPU cuDNN does the same for ReLU in 16 bits, where PyTorch's steps for bias, sum
and ReLU would each read and write the map again. Elsewhere it is the same function in PyTorch's own
steps, in place.
"""

import os
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from topiq_core import winograd

_HAS_ONEDNN = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

# Without AMX, bf16 is slower than fp32. oneDNN can be told to leave it alone, as on a CPU without.
_ONEDNN_MOST = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
HAS_AMX = torch.cpu._is_amx_tile_supported() and (
    _ONEDNN_MOST in ("DEFAULT", "ALL") or "AMX" in _ONEDNN_MOST
)
HAS_VNNI = torch.cpu._is_vnni_supported()
_CUDNN_TYPES = torch.float16, torch.bfloat16
_ONEDNN_TYPES = (torch.float32, torch.bfloat16) if HAS_AMX else (torch.float32,)

Activation = Literal["none", "relu", "relu6", "gelu", "sigmoid"]

# How oneDNN's post-operations are called: name, scalars, algorithm (GELU by its error function).
POST_OPS: dict[Activation, tuple[str, list[float], str]] = {
    "none": ("none", [], "none"),
    "relu": ("relu", [], "none"),
    "relu6": ("hardtanh", [0.0, 6.0], "none"),
    "gelu": ("gelu", [], "none"),
    "sigmoid": ("sigmoid", [], "none"),
}


class FusedConv(nn.Module):
    """activation(conv(x) + added). Weights are fixed: for inference only."""

    def __init__(
        self, weight: Tensor, bias: Tensor, like: nn.Conv2d, activation: Activation
    ) -> None:
        """weight, bias: of the convolution; `like` gives its stride, padding and groups."""
        super().__init__()
        weight = weight.detach().contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias.detach().clone())
        self.weight: Tensor
        self.bias: Tensor
        self._packed: dict[bool, Tensor] = {}
        plain_3x3 = (
            like.kernel_size == (3, 3)
            and like.stride == like.padding == like.dilation == (1, 1)
            and like.groups == 1
        )
        self._wide_3x3 = plain_3x3 and min(weight.shape[:2]) >= winograd.LEAST_CHANNELS
        self._to_one = plain_3x3 and weight.shape[0] == 1
        self.stride = list(like.stride)
        self.padding = [int(p) for p in like.padding]
        self.groups = like.groups
        self.activation = activation
        # Tensor cores take channels by eight: for the three of an image, PyTorch's way is faster.
        self.by_cudnn = activation == "relu" and like.groups == 1 and weight.shape[1] % 8 == 0

    @classmethod
    def of(
        cls, conv: nn.Module, norm: nn.Module | None = None, activation: Activation = "none"
    ) -> "FusedConv":
        """Fold a convolution and the norm after it, in double precision."""
        assert isinstance(conv, nn.Conv2d)
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias
        if norm is None:
            return cls(conv.weight, bias, conv, activation)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
        folded = conv.weight.double() * scale[:, None, None, None]
        shift = norm.bias.double() + (bias.double() - norm.running_mean.double()) * scale
        return cls(folded.float(), shift.float(), conv, activation)

    def replace(self, weight: Tensor, bias: Tensor) -> None:
        """Take other weights, of the same shape."""
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias = bias
        self._packed.clear()

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """x [N,C,h,w]; `added`, of the output's shape, may be overwritten."""
        if x.device.type == "cpu" and x.dtype in _ONEDNN_TYPES and _HAS_ONEDNN:
            if self._to_one and x.dtype == torch.float32:
                out = self._summed(x)
            elif self._winograd_of(x):
                out = winograd.conv3x3(x, self._packed_for(x), self.bias)
            else:
                return self._onednn(x, added)
        elif (whole := self._cudnn(x, added)) is not None:
            return whole
        else:
            out = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, 1, self.groups)
        if added is not None:
            out = added.add_(out)
        match self.activation:
            case "relu":
                return out.relu_()
            case "relu6":
                return out.clamp_(0, 6)
            case "gelu":
                return F.gelu(out)
            case "sigmoid":
                return out.sigmoid_()
        return out

    def _summed(self, x: Tensor) -> Tensor:
        """A 3x3 convolution to one channel: oneDNN computes 16, to keep the one.

        So every position is multiplied by the nine weights first, nine channels, and every
        product is then summed up where it belongs.
        """
        height, width = x.shape[2:]
        if not self._packed:
            self._packed[False] = self.weight.flip(2, 3)[0].flatten(1).t().contiguous()
        products = self._packed[False] @ x.permute(0, 2, 3, 1).flatten(1, 2).transpose(1, 2)
        return F.fold(products, (height, width), 3, padding=1).add_(self.bias)

    def _onednn(self, x: Tensor, added: Tensor | None) -> Tensor:
        name, scalars, algorithm = POST_OPS[self.activation]
        weight, geometry = self._packed_for(x), (self.padding, self.stride, [1, 1], self.groups)
        out: Tensor
        if added is None:
            post = (name, scalars, algorithm)
            out = torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *geometry, *post)
        else:
            sum_and = ("add", 1.0, None if name == "none" else name, scalars, algorithm)
            run = torch.ops.mkldnn._convolution_pointwise_.binary
            out = run(added, x, weight, self.bias, *geometry, *sum_and)
        return out

    def _cudnn(self, x: Tensor, added: Tensor | None) -> Tensor | None:
        """All of it in one kernel of cuDNN's, or None where there is no such kernel.

        The kernel may read what it is to add even when it adds none of it, and what has not been
        written may be NaN: so it is given the map that it convolves, which is larger.
        """
        if not (self.by_cudnn and x.is_cuda and x.dtype in _CUDNN_TYPES) or is_compiling():
            return None
        part, geometry = 1.0, (self.stride, self.padding, [1, 1], self.groups)
        if added is None:
            part, added = 0.0, self._beside(x)
            if added is None:
                return None
        run = torch.cudnn_convolution_add_relu
        try:
            out: Tensor = run(x, self.weight, added, part, self.bias, *geometry)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:
            # cuDNN has no such kernel, or no memory for it. Only in the first case is there memory
            # for the plain convolution; then this is not tried again.
            F.conv2d(x, self.weight, self.bias, *geometry)
            self.by_cudnn = False
            return None
        return out

    def _beside(self, x: Tensor) -> Tensor | None:
        """The memory of x as a map of the output's shape, where it is enough."""
        n, _, height, width = x.shape
        (kernel, _), (stride, _), (padding, _) = self.weight.shape[2:], self.stride, self.padding
        rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        channels = self.weight.shape[0]
        dense = x.is_contiguous(memory_format=torch.channels_last)
        if not dense or n * channels * rows * columns > x.numel():
            return None
        of_row = columns * channels
        strides = (rows * of_row, 1, of_row, channels)
        return x.as_strided((n, channels, rows, columns), strides)

    def _winograd_of(self, x: Tensor) -> bool:
        return self._wide_3x3 and x.dtype == torch.float32 and winograd.pays(x)

    def _packed_for(self, x: Tensor) -> Tensor:
        """The weights as a CPU wants them for maps like `x`: laid out at the first call.

        Should another shape need another layout, oneDNN makes it at that call: slower, not wrong.
        """
        wide = self._winograd_of(x)
        if wide not in self._packed:
            self._packed[wide] = self._laid_out(x, wide)
            if not self._wide_3x3:
                self.weight = self.weight.new_empty(0)  # not held twice
        return self._packed[wide]

    def _laid_out(self, x: Tensor, wide: bool) -> Tensor:
        if wide:
            return winograd.transformed(self.weight)
        geometry = (self.padding, self.stride, [1, 1], self.groups)
        pack = torch._C._nn.mkldnn_reorder_conv2d_weight
        packed: Tensor = pack(self.weight.to_mkldnn(), *geometry, list(x.shape))  # type: ignore[call-arg]
        return packed


class Residual(nn.Module):
    """A residual block. The sum is written over the block's input, or over its shortcut."""

    def __init__(self, body: list[nn.Module], shortcut: nn.Module | None) -> None:
        super().__init__()
        self.body = nn.Sequential(*body[:-1])
        self.last = body[-1]
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,h,w] -> [N,C',h',w']."""
        added = x if self.shortcut is None else self.shortcut(x)
        out: Tensor = self.last(self.body(x), added)
        return out
