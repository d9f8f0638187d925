"""Every head against float64 NumPy: what it gives, its gradients, its parameters by the formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methods.diffeat_extract import heads_reference as reference
from pomona.methods.diffeat_extract.heads.difformer import DifFormer
from pomona.methods.diffeat_extract.heads.modules import Attention, Transformer, linear, mlp, width_for

RANDOM = np.random.default_rng(3)


def maps(count: int, channels: int, side: int) -> Tensor:
    return torch.from_numpy(RANDOM.normal(size=(count, channels, side, side))).float()


def stirred(module: nn.Module) -> nn.Module:
    """`module` with nothing left at zero or one, where mistakes would not show."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.1)
    return module


def close(found: Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found.detach().double().numpy(), expected, rtol=1e-4, atol=1e-5)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_linear_head_is_a_linear_map_of_features_as_they_come() -> None:
    x = maps(5, 3, 2) * 100 + 7
    head = linear(12, 4, seed=1)
    p = reference.parameters(head)
    expected = x.double().numpy().reshape(5, 12) @ p["1.weight"].T + p["1.bias"]
    close(head(x), expected)
    close(head(x.flatten(1)), expected)


def test_the_mlp_has_relu_between_its_layers_and_none_behind() -> None:
    x = maps(6, 5, 2).flatten(1)
    head = mlp(20, (9, 7), 4, seed=1)
    p = reference.parameters(head)
    state = x.double().numpy()
    for place in (1, 3):
        state = np.maximum(state @ p[f"{place}.weight"].T + p[f"{place}.bias"], 0)
    expected = state @ p["5.weight"].T + p["5.bias"]
    close(head(x), expected)
    assert (expected < 0).any()


@pytest.mark.parametrize(
    ("channels", "side", "width"),
    [pytest.param(16, 4, None, id="small"), pytest.param(5, 20, 24, id="pooled"), pytest.param(8, 16, None, id="16")],
)
def test_the_attention_head_is_the_formula(channels: int, side: int, width: int | None) -> None:
    x = maps(3, channels, side) * 3 + 1
    head = stirred(Attention(channels, side, 7, seed=2, width=width))
    close(head(x), reference.attention(x.double().numpy(), reference.parameters(head)))


def test_maps_that_were_pooled_before_give_what_pooling_inside_gives() -> None:
    x = maps(2, 8, 32)
    head = Attention(8, 32, 3, seed=2)
    assert torch.equal(head(x), head(nn.functional.adaptive_avg_pool2d(x, 16)))


def test_the_class_token_begins_at_zero_and_tokens_have_no_position() -> None:
    transformer = Transformer(16)
    assert not transformer.token.any()
    tokens = maps(1, 2, 16)[0]
    shuffled = tokens[:, torch.randperm(16, generator=torch.Generator().manual_seed(1))]
    torch.testing.assert_close(transformer(tokens), transformer(shuffled))


def test_difformer_shares_tokenizers_and_transformer_over_times_and_keeps_blocks_apart() -> None:
    shapes = [(16, 4), (8, 8), (12, 20)]
    given = [[maps(2, channels, side) for channels, side in shapes] for _ in range(3)]
    head = stirred(DifFormer(shapes, 3, 5, seed=4))
    expected = reference.difformer([[x.double().numpy() for x in row] for row in given], reference.parameters(head))
    close(head(*(x for row in given for x in row)), expected)


@pytest.mark.parametrize("kind", ["attention", "difformer"])
def test_gradients_are_the_slopes_of_the_formula(kind: str) -> None:
    x = [maps(2, 8, 3) for _ in range(4)]
    head = stirred(Attention(8, 3, 4, seed=1) if kind == "attention" else DifFormer([(8, 3)] * 2, 2, 4, seed=1))
    head.double()
    given = [each.double() for each in (x[:1] if kind == "attention" else x)]
    weights = RANDOM.normal(size=(2, 4))
    torch.autograd.backward((head(*given) * torch.from_numpy(weights)).sum())
    at = reference.parameters(head)
    along = {name: RANDOM.normal(size=value.shape) for name, value in at.items()}
    slope = sum(
        float((p.grad.numpy() * along[name]).sum()) for name, p in head.named_parameters() if p.grad is not None
    )

    def value(step: float) -> float:
        p = {name: value + step * along[name] for name, value in at.items()}
        arrays = [each.numpy() for each in given]
        out = (
            reference.attention(arrays[0], p)
            if kind == "attention"
            else reference.difformer([arrays[:2], arrays[2:]], p)
        )
        return float((out * weights).sum())

    assert all(p.grad is not None for p in head.parameters())
    assert slope == pytest.approx((value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-6)


def test_parameters_at_the_size_of_adm_are_as_many_as_the_formula_says() -> None:
    width, classes = 1024, 1000
    tokenizer = {side: 2 * 1024 * side**2 + 1024 * width + width for side in (8, 16)}
    third = 2 * 512 * 16**2 + 512 * width + width  # block 30: 512 channels, 64 a side, pooled
    block = 2 * width + 3 * width**2 + width**2 + width + 2 * width + 2 * 4 * width**2 + 5 * width
    with torch.device("meta"):
        attention = Attention(1024, 16, classes, seed=0)
        former = DifFormer([(1024, 8), (1024, 16), (512, 64)], 3, classes, seed=0)
        probe = linear(4096, classes, seed=0)
    assert parameters(attention) == tokenizer[16] + width + 2 * block + width * classes + classes
    several = tokenizer[8] + tokenizer[16] + third
    assert parameters(former) == several + width + 2 * block + 3 * width * classes + classes
    assert parameters(probe) == 4096 * classes + classes
    assert all("bias" not in name for name, _ in attention.named_parameters() if "queries" in name)


def test_tokens_are_as_wide_as_the_widest_block_and_divide_among_the_heads() -> None:
    assert width_for([1024, 1024, 512]) == 1024
    assert width_for([33, 20]) == 40
    assert width_for([3]) == 8


def test_the_same_seed_gives_the_same_head_and_leaves_torch_as_it_was() -> None:
    torch.manual_seed(9)
    before = torch.get_rng_state()
    first, second, other = (Attention(8, 2, 3, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_weights_begin_as_those_of_torch_do() -> None:
    """Uniform within 1 / sqrt(inputs), for linear maps and for convolutions of one cell."""
    head = Attention(64, 2, 100, seed=1)
    for weight, inputs in ((head.classifier.weight.detach(), 64), (head.tokens.convolution.weight.detach(), 64)):
        bound = 1 / math.sqrt(inputs)
        assert 0.98 * bound < float(weight.abs().max()) <= bound
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
