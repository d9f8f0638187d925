"""Networks: as many weights as their papers say, where each is, and what they begin from."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, batch_norm, conv2d, linear, max_pool2d, relu

from pomona.errors import UsageError
from pomona.methods.madaug_train.networks import Network, build
from pomona.methods.madaug_train.normalisation import BatchNorm, statistics


def wide(depth: int, k: int, channels: int, classes: int) -> int:
    """Weights of WRN-depth-k: Zagoruyko & Komodakis 2016, table 1, counted layer by layer."""
    blocks, inside, total = (depth - 4) // 6, 16, 9 * channels * 16
    for outside in (16 * k, 32 * k, 64 * k):
        for _ in range(blocks):
            total += 2 * inside + 9 * inside * outside + 2 * outside + 9 * outside**2
            total += inside * outside if inside != outside else 0
            inside = outside
    return total + 2 * inside + (inside + 1) * classes


def residual(channels: int, stem: int, classes: int) -> int:
    """Weights of ResNet-18: He et al. 2015, table 1."""
    inside, total = 64, stem**2 * channels * 64 + 2 * 64
    for outside in (64, 128, 256, 512):
        for _ in range(2):
            total += 9 * inside * outside + 9 * outside**2 + 4 * outside
            total += inside * outside + 2 * outside if inside != outside else 0
            inside = outside
    return total + (inside + 1) * classes


def weights(network: nn.Module) -> int:
    return sum(each.numel() for each in network.parameters())


@pytest.mark.parametrize(
    ("name", "formula", "published"),
    [
        ("wrn-28-10", wide(28, 10, 3, 10), 36.5e6),
        ("wrn-40-2", wide(40, 2, 3, 10), 2.2e6),
        ("wrn-16-1", wide(16, 1, 3, 10), 0.2e6),
        ("resnet-18", residual(3, 3, 10), 11.2e6),
    ],
)
def test_networks_for_cifar_have_the_weights_that_were_published(name: str, formula: int, published: float) -> None:
    with torch.device("meta"):
        found = weights(build(name, 3, 10, 32, 0))
    assert found == formula
    assert round(found / 1e6, 1) == published / 1e6


def test_resnet_18_for_photos_is_torchvisions() -> None:
    network = build("resnet-18", 3, 1000, 224, 0)
    assert weights(network) == residual(3, 7, 1000) == 11_689_512  # as torchvision documents
    names = dict(network.named_parameters())
    assert names["conv1.weight"].shape == (64, 3, 7, 7)
    assert names["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert names["layer4.1.bn2.weight"].shape == (512,)
    assert build("resnet-18", 3, 5, 95, 0).state_dict()["conv1.weight"].shape == (64, 3, 3, 3)
    assert build("resnet-18", 3, 5, 96, 0).state_dict()["conv1.weight"].shape == (64, 3, 7, 7)


def test_the_small_network_has_32_thousand_weights() -> None:
    assert weights(build("cnn-small", 1, 10, 8, 0)) == 9 * (24 + 24 * 48 + 48 * 48) + 2 * (24 + 48 + 48) + 490 == 32_050


@pytest.mark.parametrize(
    ("name", "side", "width", "map_side"),
    [("cnn-small", 8, 48, 4), ("wrn-10-2", 32, 128, 8), ("resnet-18", 32, 512, 4), ("resnet-18", 96, 512, 3)],
)
def test_logits_are_the_classifier_of_pooled_maps(name: str, side: int, width: int, map_side: int) -> None:
    network = build(name, 3, 7, side, 0)
    x = torch.randn(2, 3, side, side)
    with torch.no_grad(), statistics(network, "eval"):
        maps = network.maps(x)
        assert maps.shape == (2, width, map_side, map_side) and network.width == width
        pooled = avg_pool2d(maps, map_side).flatten(1)
        torch.testing.assert_close(network.features(x), pooled)
        torch.testing.assert_close(
            network(x), linear(pooled, network.classifier.weight, network.classifier.bias), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("name", ["cnn-small", "wrn-10-1", "resnet-18"])
def test_images_of_a_single_pixel_go_through(name: str) -> None:
    network = build(name, 1, 2, 1, 0)
    assert network(torch.randn(4, 1, 1, 1)).isfinite().all()


def norm(x: torch.Tensor, at: BatchNorm) -> torch.Tensor:
    return relu(batch_norm(x, at.running_mean, at.running_var, at.weight, at.bias))


def test_a_wide_network_activates_before_it_convolves() -> None:
    """Figure 1 (b) there; the 1x1 convolution takes what is activated, as in their code."""
    network = build("wrn-10-2", 3, 4, 8, 0)
    for module in network.modules():
        if isinstance(module, BatchNorm):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.weight)
    found = x = torch.randn(2, 3, 8, 8)
    t = dict(network.named_modules())
    with torch.no_grad(), statistics(network, "eval"):
        found = conv2d(x, t["conv1"].weight, padding=1)
        for each, stride in enumerate((1, 2, 2)):
            block = t[f"blocks.{each}"]
            first = norm(found, block.bn1)
            second = norm(conv2d(first, block.conv1.weight, None, stride, 1), block.bn2)
            found = conv2d(second, block.conv2.weight, None, 1, 1) + conv2d(first, block.shortcut.weight, None, stride)
        torch.testing.assert_close(network.maps(x), norm(found, t["bn"]))


def test_a_residual_network_activates_after_it_adds() -> None:
    network = build("resnet-18", 3, 4, 96, 0)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad(), statistics(network, "eval"):
        found = max_pool2d(norm(conv2d(x, network.get_submodule("conv1").weight, None, 2, 3), network.bn1), 3, 2, 1)
        for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
            for block in layer:
                plain = conv2d(
                    norm(conv2d(found, block.conv1.weight, None, block.conv1.stride, 1), block.bn1),
                    block.conv2.weight,
                    padding=1,
                )
                added = batch_norm(
                    plain, block.bn2.running_mean, block.bn2.running_var, block.bn2.weight, block.bn2.bias
                )
                found = relu(added + (found if block.downsample is None else block.downsample(found)))
        torch.testing.assert_close(network.maps(x), found)


def test_weights_begin_as_the_seed_says_whatever_was_drawn_before() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = build("cnn-small", 1, 10, 8, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = build("cnn-small", 1, 10, 8, 3), build("cnn-small", 1, 10, 8, 4)
    for name, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
        assert not name.startswith("conv") or not torch.equal(other.state_dict()[name], value)


@pytest.mark.parametrize("name", ["wrn-16-4", "resnet-18"])
def test_convolutions_begin_with_variance_two_over_fan_out(name: str) -> None:
    network: Network = build(name, 3, 10, 32, 0)
    seen = Counter[str]()
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.06)
            seen["convolutions"] += 1
        assert not isinstance(module, nn.Conv2d) or module.bias is None
    assert seen["convolutions"] > 5 and not network.classifier.bias.any()


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(UsageError, match="expected cnn-small"):
        build("vgg", 3, 10, 32, 0)
