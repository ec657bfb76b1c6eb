"""What the backbones are built of, with torchvision's parameter names.

ResNet-50: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, with the stride in
the 3x3 convolution, as in torchvision's weights. MobileNetV2: Sandler et al., "MobileNetV2:
Inverted Residuals and Linear Bottlenecks", CVPR 2018.

Not torchvision's own classes, because importing torchvision imports PyTorch's compiler as well:
a third of the time in which a scorer is there.
"""

from torch import Tensor, nn


class Bottleneck(nn.Module):
    """ResNet's block: 1x1, 3x3 and 1x1 convolutions, and the input added before the last ReLU."""

    widening = 4

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out = self.widening * width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,h,w] -> [N,4*width,h/stride,w/stride], sizes rounded up."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        added: Tensor = self.relu(out + (x if self.downsample is None else self.downsample(x)))
        return added


def bottlenecks(channels: int, width: int, count: int, stride: int) -> nn.Sequential:
    """A stage of ResNet; its first block changes size and channels."""
    out = Bottleneck.widening * width
    first = Bottleneck(channels, width, stride)
    return nn.Sequential(first, *(Bottleneck(out, width) for _ in range(count - 1)))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: widened, filtered channel by channel, and projected linearly."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = expansion * channels
        widened = [normed_conv(channels, width, 1)] if expansion > 1 else []
        self.conv = nn.Sequential(
            *widened,
            normed_conv(width, width, 3, stride, groups=width),
            nn.Conv2d(width, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.use_res_connect = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,h,w] -> [N,out,h/stride,w/stride], sizes rounded up."""
        out: Tensor = self.conv(x)
        return x + out if self.use_res_connect else out


def normed_conv(
    channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """A convolution, its norm, and ReLU6."""
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU6(inplace=True))


# MobileNetV2's blocks (table 2 of its paper): expansion, channels, how many, stride of the first.
_MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet_v2_features() -> nn.Sequential:
    """All of MobileNetV2 but its classifier."""
    channels = 32
    parts: list[nn.Module] = [normed_conv(3, channels, 3, 2)]
    for expansion, out, count, stride in _MOBILENET_V2:
        for index in range(count):
            parts.append(InvertedResidual(channels, out, stride if index == 0 else 1, expansion))
            channels = out
    return nn.Sequential(*parts, normed_conv(channels, 1280, 1))


def initialise(module: nn.Module) -> None:
    """Untrained weights: convolutions as He et al. (ICCV 2015) have it, norms at one and zero."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")
