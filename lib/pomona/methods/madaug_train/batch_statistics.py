"""Batch norm by the statistics of the batch, with second derivatives that cost little more than first ones.

Over the n numbers of a channel let ``m`` be the mean, ``h = (x - m(x)) r`` with r one over the standard deviation, and
``P z = z - m(z) - h m(h z)``, a symmetric map. Then ``y = w h + b`` and, with a dot for a change,

    y.  =  w r P x.  +  w. h  +  b.
    gx  =  w r P gy,    gw = sum gy h,    gb = sum gy                       (reverse mode: g for a gradient)
    gx. =  w r P gy.  +  (w. / w - r m(h x.)) gx  -  w r^2 (m(h gy) P x.  +  m(gy P x.) h)

so torch's kernel for the gradient of batch norm, which is w r P, does all of them. torch itself goes through some
thirty elementary operations for the last line, which is most of what a hypergradient of a small network takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def batch_normalised(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Batch norm of (B, C, H, W) with affine parameters (C,), by the mean and the variance of the batch."""
    found: Tensor = _Normalised.apply(x, weight, bias, eps)[0]  # type: ignore[no-untyped-call]
    return found


class _Normalised(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, _, ctx.eps = inputs
        mean, scale = output[1:]
        ctx.mark_non_differentiable(mean, scale)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.save_for_forward(x, weight, mean, scale)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dweight: Tensor, dbias: Tensor, *_: None) -> tuple[Tensor, None, None]:
        x, weight, mean, scale = ctx.saved_tensors
        along = _projected(dx, x, weight, mean, scale, ctx.eps)[0]
        return along.add_(_affine(x, dweight * scale, dbias - dweight * scale * mean)), None, None

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        found: tuple[Tensor, Tensor, Tensor] = _Gradient.apply(gradient, *ctx.saved_tensors, ctx.eps)  # type: ignore[no-untyped-call]
        return *found, None


class _Gradient(Function):
    """The gradients of `_Normalised` in x, weight and bias."""

    @staticmethod
    def forward(
        gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _projected(gradient, x, weight, mean, scale, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *given, ctx.eps = inputs
        by_x, by_weight, _ = output
        ctx.save_for_backward(*given, by_x, by_weight)
        ctx.save_for_forward(*given, by_x, by_weight)

    @staticmethod
    def jvp(ctx: Any, dgradient: Tensor, dx: Tensor, dweight: Tensor, *_: None) -> tuple[Tensor, Tensor, Tensor]:
        gradient, x, weight, mean, scale, by_x, by_weight = ctx.saved_tensors
        weight, n = _divisor(weight), _count(x)
        found, dby_weight, dby_bias = _projected(dgradient, x, weight, mean, scale, ctx.eps)
        moved, turned = _projected(dx, x, weight, mean, scale, ctx.eps)[:2]  # w r P x., sum h x.
        across = _sum(gradient * moved)  # w r sum(gy P x.)
        at_x = -scale * scale * across / n
        dby_x = found.add_(_affine(x, at_x, -at_x * mean))
        dby_x.addcmul_(by_x, _each(dweight / weight - scale * turned / n)).addcmul_(
            moved, _each(-scale * by_weight / n)
        )
        return dby_x, dby_weight + across / weight, dby_bias

    @staticmethod
    def backward(ctx: Any, over_x: Tensor, over_weight: Tensor, over_bias: Tensor) -> tuple[Tensor | None, ...]:
        _, x, weight, mean, scale, by_x, by_weight = ctx.saved_tensors
        weight, n = _divisor(weight), _count(x)
        found, turned, _ = _projected(over_x, x, weight, mean, scale, ctx.eps)
        across = _sum(over_x * by_x)
        at_x = -scale * scale * across / n
        of_x = _affine(x, at_x, -at_x * mean)
        of_x.addcmul_(found, _each(-scale * by_weight / n)).addcmul_(
            by_x, _each(over_weight / weight - scale * turned / n)
        )
        of_gradient = found.add_(_affine(x, over_weight * scale, over_bias - over_weight * scale * mean))
        return of_gradient, of_x, across / weight, None, None, None


def _projected(
    z: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``w r P z``, ``sum h z`` and ``sum z``."""
    wanted = [True, True, True]
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        z, x, _divisor(weight), None, None, mean, scale, True, eps, wanted
    )
    return found


def _divisor(weight: Tensor) -> Tensor:
    """`weight`, by which products with it are divided again, and hardly anything where it is 0."""
    return weight.masked_fill(weight == 0, 1e-30)


def _affine(x: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
    return (x * _each(factor)).add_(_each(shift))


def _each(channels: Tensor) -> Tensor:
    return channels[:, None, None]


def _sum(x: Tensor) -> Tensor:
    return x.sum((0, 2, 3))


def _count(x: Tensor) -> int:
    return x.numel() // x.shape[1]
