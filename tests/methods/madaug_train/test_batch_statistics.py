"""Batch norm by the statistics of the batch: torch's own, to the last digits, in every derivative."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vjp
from torch.nn.functional import batch_norm

from pomona.methods.madaug_train.batch_statistics import batch_normalised

EPS = 1e-5


def drawn(weight: float | None = None, layout: torch.memory_format = torch.contiguous_format) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(5, 4, 3, 2, generator=generator, dtype=torch.float64)
    weights = torch.randn(4, generator=generator, dtype=torch.float64)
    if weight is not None:
        weights[1] = weight
    return [x.contiguous(memory_format=layout), weights, torch.randn(4, generator=generator, dtype=torch.float64)]


def derivatives(normalise: Callable[[Tensor, Tensor, Tensor], Tensor], point: list[Tensor]) -> dict[str, list[Tensor]]:
    """Values, first and second derivatives of `normalise`, forward and in reverse, of a loss that is not linear."""
    generator = torch.Generator().manual_seed(1)
    along = tuple(torch.randn(each.shape, generator=generator, dtype=each.dtype) for each in point)
    loss = grad(lambda *given: (normalise(*given).sin() * along[0]).sum(), argnums=(0, 1, 2))
    value, tangent = jvp(normalise, tuple(point), along)
    gradients, over = jvp(loss, tuple(point), along)
    _, back = vjp(loss, *point)
    return {
        "value": [value],
        "forward": [tangent],
        "reverse": list(gradients),
        "forward over reverse": list(over),
        "reverse over reverse": list(back(along)),
    }


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weight", [None, 0.0, -1e-9])
def test_every_derivative_is_that_of_torch(weight: float | None, layout: torch.memory_format) -> None:
    point = drawn(weight, layout)
    found = derivatives(lambda x, w, b: batch_normalised(x, w, b, EPS), point)
    expected = derivatives(lambda x, w, b: batch_norm(x, None, None, w, b, True, 0.0, EPS), point)
    for name, values in expected.items():
        for one, other in zip(found[name], values, strict=True):
            torch.testing.assert_close(
                one, other, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_what_does_not_move_has_no_tangent() -> None:
    x, weight, bias = drawn()
    moved = torch.ones_like(x[:, :, :1])
    found = jvp(lambda x: batch_normalised(x, weight, bias, EPS), (x,), (moved.expand_as(x).contiguous(),))[1]
    assert found.abs().max() < 1e-12  # a shift of all is what batch norm takes away
