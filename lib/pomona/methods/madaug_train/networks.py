"""The networks that learn: a small one, wide residual networks, and ResNet-18.

Each is a feature extractor f that ends in global average pooling, and a linear classifier g; the policy reads f(x).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from pomona.methods.madaug_train.config import network
from pomona.methods.madaug_train.normalisation import BatchNorm
from pomona.runtime.seeds import derive

_PHOTO = 96  # pixels from which ResNet-18 has the stem that it was published with


class Network(nn.Module):
    """f and g: images (B, C, H, W), normalised, to logits (B, classes).

    Attributes:
        width: F, numbers that f makes of an image.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.width = width
        self.classifier = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        """f(x), (B, F)."""
        return self.maps(x).mean((2, 3))

    def maps(self, x: Tensor) -> Tensor:
        """What is averaged to f(x), (B, F, h, w)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x))
        return logits


def build(name: str, channels: int, classes: int, side: int, seed: int) -> Network:
    """The network that `name` says; its weights depend on the arguments and on nothing else.

    Args:
        channels: of the images.
        side: the shorter one of the images, in pixels.

    Raises:
        UsageError: there is no such network.
    """
    kind, depth, width = network(name)
    with torch.random.fork_rng([]):
        torch.manual_seed(derive(seed, "weights"))
        if kind == "wrn":
            return WideResNet(depth, width, channels, classes)
        return SmallNet(channels, classes) if kind == "cnn-small" else ResNet18(channels, classes, side)


class SmallNet(Network):
    """Three 3x3 convolutions, each with batch norm and ReLU, the second with stride 2; 32,050 weights on the digits."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(48, classes)
        widths = (channels, 24, 48, 48)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
            for inside, outside, stride in zip(widths, widths[1:], (1, 2, 1), strict=False)
        )
        self.norms = nn.ModuleList(BatchNorm(width) for width in widths[1:])

    def maps(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = relu(norm(convolution(x)))
        return x


class WideResNet(Network):
    """WRN-`depth`-`width` (Zagoruyko & Komodakis 2016, table 1) without dropout, batch norm and ReLU first."""

    def __init__(self, depth: int, width: int, channels: int, classes: int) -> None:
        super().__init__(64 * width, classes)
        self.conv1 = _conv3x3(channels, 16)
        blocks, inside = [], 16
        for outside, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            for number in range((depth - 4) // 6):
                blocks.append(_PreActivated(inside, outside, stride if number == 0 else 1))
                inside = outside
        self.blocks = nn.Sequential(*blocks)
        self.bn = BatchNorm(inside)
        _initialise(self)

    def maps(self, x: Tensor) -> Tensor:
        return relu(self.bn(self.blocks(self.conv1(x))))


class ResNet18(Network):
    """ResNet-18 (He et al. 2015, table 1), its tensors named as torchvision's but for the classifier.

    Images with a `side` below 96 pixels meet a 3x3 convolution with stride 1 and no pooling, as in section 4.2 there.
    """

    def __init__(self, channels: int, classes: int, side: int) -> None:
        super().__init__(512, classes)
        self._pooled = side >= _PHOTO
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False) if self._pooled else _conv3x3(channels, 64)
        self.bn1 = BatchNorm(64)
        self.layer1 = nn.Sequential(_Residual(64, 64, 1), _Residual(64, 64, 1))
        self.layer2 = nn.Sequential(_Residual(64, 128, 2), _Residual(128, 128, 1))
        self.layer3 = nn.Sequential(_Residual(128, 256, 2), _Residual(256, 256, 1))
        self.layer4 = nn.Sequential(_Residual(256, 512, 2), _Residual(512, 512, 1))
        _initialise(self)

    def maps(self, x: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(x)))
        if self._pooled:
            x = max_pool2d(x, 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x


class _PreActivated(nn.Module):
    """``x + conv(relu(bn(conv(relu(bn(x))))))``; where the width changes, the activated x goes through a 1x1."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = BatchNorm(inside), _conv3x3(inside, outside, stride)
        self.bn2, self.conv2 = BatchNorm(outside), _conv3x3(outside, outside)
        self.shortcut = None if inside == outside else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = relu(self.bn1(x))
        added: Tensor = self.conv2(relu(self.bn2(self.conv1(active))))
        return added + (x if self.shortcut is None else self.shortcut(active))


class _Residual(nn.Module):
    """``relu(x + bn(conv(relu(bn(conv(x))))))``; where shapes change, x goes through a 1x1 and batch norm."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3x3(inside, outside, stride), BatchNorm(outside)
        self.conv2, self.bn2 = _conv3x3(outside, outside), BatchNorm(outside)
        self.downsample = (
            None
            if inside == outside
            else nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), BatchNorm(outside))
        )

    def forward(self, x: Tensor) -> Tensor:
        added = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(added + (x if self.downsample is None else self.downsample(x)))


def _conv3x3(inside: int, outside: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, stride, 1, bias=False)


def _initialise(module: Network) -> None:
    """Convolutions with variance 2 / (9 x outputs), as both papers' code; nothing in the classifier's bias."""
    for each in module.modules():
        if isinstance(each, nn.Conv2d):
            nn.init.normal_(each.weight, 0, math.sqrt(2 / (each.kernel_size[0] ** 2 * each.out_channels)))
    nn.init.zeros_(module.classifier.bias)
