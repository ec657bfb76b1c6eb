"""Feature pyramids: an image in, five feature maps out, fine to coarse.

Each backbone keeps torchvision's own parameter names, so that a checkpoint's `semantic_model.*`
entries are those of the torchvision model without its classifier.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topiq_core.blocks import InvertedResidual, bottlenecks, initialise, mobilenet_v2_features


def _freeze_batch_norm(module: nn.Module) -> None:
    """Keep running statistics and affine parameters fixed, also while training."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eval()
            child.weight.requires_grad_(False)
            child.bias.requires_grad_(False)


class ResNet50Pyramid(nn.Module):
    """ResNet-50: the stem and the four stages, at strides 2, 4, 8, 16 and 32."""

    channels: Sequence[int] = (64, 256, 512, 1024, 2048)
    exact_start = False

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = bottlenecks(64, 64, 3, stride=1)
        self.layer2 = bottlenecks(256, 128, 4, stride=2)
        self.layer3 = bottlenecks(512, 256, 6, stride=2)
        self.layer4 = bottlenecks(1024, 512, 3, stride=2)
        initialise(self)

    def train(self, mode: bool = True) -> "ResNet50Pyramid":
        super().train(mode)
        _freeze_batch_norm(self)
        return self

    def stages(self) -> list[nn.Sequential]:
        """The five parts, each from one level's map to the next one's."""
        return [
            nn.Sequential(self.conv1, self.bn1, self.relu),
            nn.Sequential(self.maxpool, self.layer1),
            self.layer2,
            self.layer3,
            self.layer4,
        ]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalised image [N,3,H,W] to five maps [N,C_l,H/2^(l+1),W/2^(l+1)]."""
        return _run(self.stages(), x)


class MobileNetV2Pyramid(nn.Module):
    """MobileNetV2, tapped after the last block at each of the strides 2, 4, 8, 16 and 32."""

    channels: Sequence[int] = (16, 24, 32, 96, 1280)
    taps = (1, 3, 6, 13, 18)
    exact_start = True
    """The first stage's maps are so thin that what blur leaves of texture is below a step of bf16
    or int8: it stays in fp32 there."""

    def __init__(self) -> None:
        super().__init__()
        self.features = mobilenet_v2_features()
        initialise(self)

    def train(self, mode: bool = True) -> "MobileNetV2Pyramid":
        super().train(mode)
        _freeze_batch_norm(self)
        return self

    def stages(self) -> list[nn.Sequential]:
        """The five parts, each from one level's map to the next one's."""
        ends = [tap + 1 for tap in self.taps]
        return [self.features[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalised image [N,3,H,W] to five maps [N,C_l,H/2^(l+1),W/2^(l+1)]."""
        return _run(self.stages(), x, _learning if self.training else nn.Module.__call__)


def _run(
    stages: Iterable[nn.Module],
    x: Tensor,
    through: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__,
) -> list[Tensor]:
    """The map after each stage, in turn."""
    maps = []
    for stage in stages:
        x = through(stage, x)
        maps.append(x)
    return maps


def _learning(part: nn.Module, x: Tensor) -> Tensor:
    """Run a part of MobileNetV2: as it is, but a fifth faster in training.

    Its norms never learn, so each is a factor and a shift of the convolution before it, and no
    pass over the map of its own.
    """
    match part:
        case InvertedResidual():
            out = _learning(part.conv, x)
            return x + out if part.use_res_connect else out
        case nn.Sequential():
            parts = iter(part)
            for inner in parts:
                if isinstance(inner, nn.Conv2d):
                    x = _normed(inner, next(parts), x)
                else:
                    x = _learning(inner, x)
            return x
        case nn.ReLU6():
            return F.relu6(x)  # in place, a view's gradient would take a copy
    raise TypeError(f"not a part of MobileNetV2: {part}")


def _normed(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """A convolution without bias, and the frozen norm after it."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    assert norm.running_mean is not None
    factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight = conv.weight * factor.view(-1, 1, 1, 1)
    bias = norm.bias - norm.running_mean * factor
    if conv.kernel_size == (1, 1):
        return pointwise(x, weight, bias)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, groups=conv.groups)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution [N,C,h,w] -> [N,K,h,w], weight [K,C,1,1], for training.

    In channels-last memory as a matrix product: on one thread PyTorch's convolutions take longer
    there and back.
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias)


Pyramid = ResNet50Pyramid | MobileNetV2Pyramid

_PYRAMIDS: dict[str, type[ResNet50Pyramid] | type[MobileNetV2Pyramid]] = {
    "resnet50": ResNet50Pyramid,
    "mobilenet_v2": MobileNetV2Pyramid,
}


def build(name: str) -> Pyramid:
    """A backbone with untrained weights. Raises KeyError for a name that is not one of ours."""
    return _PYRAMIDS[name]()


def load_imagenet(pyramid: Pyramid, state: dict[str, Tensor]) -> None:
    """Fill a pyramid from a torchvision classification checkpoint, leaving out its classifier."""
    kept = {k: v for k, v in state.items() if not k.startswith(("fc.", "classifier."))}
    pyramid.load_state_dict(kept, strict=True)


IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])
