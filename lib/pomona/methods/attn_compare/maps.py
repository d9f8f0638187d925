"""Feature maps phi of linear attention, whose weight of key k for query q is phi(q) . phi(k).

A map gives its features as values times powers of two, phi = values * 2**exponents, where exponents are whole numbers,
one for each position, found from that position alone. Scaling by a power of two is exact, so sums over keys can be kept
in range by the largest exponent so far without a later key ever touching the bits of an earlier output.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Features(NamedTuple):
    """phi(x) = values * 2**exponents.

    Attributes:
        values: (..., n, r).
        exponents: (..., n, 1), whole numbers in the number format of `values`; None stands for zeros.
    """

    values: Tensor
    exponents: Tensor | None = None


class FeatureMap(nn.Module):
    """A map from x (..., n, d) to `Features` of r numbers for each position.

    Args:
        width: d, the width of a head.
        scale: what multiplies q . k in the softmax it stands for, 1 / sqrt(d) as a rule; maps that approximate the
            exponential see x * sqrt(scale), the others x.
        seed: of random projections; the maps of queries and keys must have the same.
        heads: how many heads have parameters of their own, in maps that learn; then x is (..., heads, n, d).
        length: the longest sequence there will be, for maps that must know.

    Attributes:
        count: r, the number of features.
        root: sqrt(scale).
    """

    def __init__(self, width: int, scale: float, seed: int = 0, heads: int = 1, length: int = 0) -> None:
        super().__init__()
        self.root = math.sqrt(scale)
        self.count = width

    def forward(self, x: Tensor, start: int = 0) -> Features:
        """Features of x, whose first position is number `start` of its sequence."""
        raise NotImplementedError


class Constant(FeatureMap):
    """phi(x) = 1: every visible key weighs the same."""

    def __init__(self, width: int, scale: float, seed: int = 0, heads: int = 1, length: int = 0) -> None:
        super().__init__(width, scale)
        self.count = 1

    def forward(self, x: Tensor, start: int = 0) -> Features:
        return Features(torch.ones_like(x[..., :1]))


class Identity(FeatureMap):
    """phi(x) = x; the weights are the raw inner products, of either sign."""

    def forward(self, x: Tensor, start: int = 0) -> Features:
        return Features(x * self.root)


class Elu(FeatureMap):
    """phi(x) = elu(x) + 1, without scaling (arXiv 2006.16236)."""

    def forward(self, x: Tensor, start: int = 0) -> Features:
        return Features(functional.elu(x) + 1)


class Relu(FeatureMap):
    """phi(x) = max(x, 0)."""

    def forward(self, x: Tensor, start: int = 0) -> Features:
        return Features(x.clamp_min(0))


class SquaredRelu(FeatureMap):
    """phi(x) = max(x, 0)**2."""

    def forward(self, x: Tensor, start: int = 0) -> Features:
        return Features(x.clamp_min(0).square())


class CosFormer(FeatureMap):
    """phi(x)_i = max(x, 0) (cos, sin)(pi i / 2M), a bias towards near keys (arXiv 2202.08791).

    M is the length of the longest sequence; a position beyond it is an error.
    """

    def __init__(self, width: int, scale: float, seed: int = 0, heads: int = 1, length: int = 0) -> None:
        super().__init__(width, scale)
        self.count = 2 * width
        self.length = length

    def forward(self, x: Tensor, start: int = 0) -> Features:
        end = start + x.shape[-2]
        if end > self.length:
            raise ValueError(f"position {end - 1} is beyond the length of {self.length}")
        angle = torch.arange(start, end, dtype=x.dtype, device=x.device)[:, None] * (math.pi / 2 / self.length)
        rectified = x.clamp_min(0)
        return Features(torch.cat((rectified * angle.cos(), rectified * angle.sin()), -1))


class Dpfp(FeatureMap):
    """Products of max([x, -x], 0) with itself rolled by 1 ... nu places (arXiv 2102.11174)."""

    def __init__(
        self, width: int, scale: float, seed: int = 0, heads: int = 1, length: int = 0, *, nu: int = 1
    ) -> None:
        super().__init__(width, scale)
        self.nu = nu
        self.count = 2 * width * nu

    def forward(self, x: Tensor, start: int = 0) -> Features:
        both = torch.cat((x, -x), -1).clamp_min(0)
        return Features(torch.cat([both * both.roll(by, -1) for by in range(1, self.nu + 1)], -1))


class Quadratic(FeatureMap):
    """The monomials of x up to degree two, such that phi(q) . phi(k) = c0 + c1 s + c2 s**2 with s = scale q . k.

    Each pair i < j stands once, with the factor sqrt(2): 1 + d + d (d + 1) / 2 features, fewer where c0 or c1 is 0.
    """

    def __init__(
        self,
        width: int,
        scale: float,
        seed: int = 0,
        heads: int = 1,
        length: int = 0,
        *,
        coefficients: tuple[float, float, float] = (1.0, 1.0, 0.5),
    ) -> None:
        super().__init__(width, scale)
        self.coefficients = coefficients
        rows, columns = torch.triu_indices(width, width)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.rows: Tensor
        self.columns: Tensor
        constant, linear, _ = coefficients
        self.count = (constant > 0) + (linear > 0) * width + len(rows)

    def forward(self, x: Tensor, start: int = 0) -> Features:
        constant, linear, square = self.coefficients
        x = x * self.root
        parts = []
        if constant:
            parts.append(torch.full_like(x[..., :1], math.sqrt(constant)))
        if linear:
            parts.append(x * math.sqrt(linear))
        twice = 2 - (self.rows == self.columns).to(x.dtype)
        factors = (twice * square).sqrt()
        parts.append(x[..., self.rows] * (x[..., self.columns] * factors))
        return Features(torch.cat(parts, -1))


class Favor(FeatureMap):
    """FAVOR+, positive orthogonal random features of exp (arXiv 2009.14794).

    phi(x) = exp(W x - |x|**2 / 2) / sqrt(m). The rows of W are orthogonal within blocks of d, and as long as those of a
    Gaussian matrix.
    """

    def __init__(
        self, width: int, scale: float, seed: int = 0, heads: int = 1, length: int = 0, *, count: int = 64
    ) -> None:
        super().__init__(width, scale)
        self.count = count
        self.register_buffer("projection", orthogonal(count, width, seed), persistent=False)
        self.projection: Tensor

    def forward(self, x: Tensor, start: int = 0) -> Features:
        x = x * self.root
        logarithm = x @ self.projection.to(x.dtype).mT - x.square().sum(-1, keepdim=True) / 2
        return exponential(logarithm - math.log(self.count) / 2)


class RandomFourier(FeatureMap):
    """RFA, the sines and cosines that give exp without bias (arXiv 2103.02143), without its normalisation.

    phi(x) = exp(|x|**2 / 2) (sin W x, cos W x) / sqrt(m / 2); the weights can be negative.
    """

    def __init__(
        self, width: int, scale: float, seed: int = 0, heads: int = 1, length: int = 0, *, count: int = 64
    ) -> None:
        super().__init__(width, scale)
        self.count = count
        self.register_buffer("projection", orthogonal(count // 2, width, seed), persistent=False)
        self.projection: Tensor

    def forward(self, x: Tensor, start: int = 0) -> Features:
        x = x * self.root
        angle = x @ self.projection.to(x.dtype).mT
        size, exponents = exponential(x.square().sum(-1, keepdim=True) / 2)
        waves = torch.cat((angle.sin(), angle.cos()), -1)
        return Features(waves * (size / math.sqrt(self.count / 2)), exponents)


class PolySketch(FeatureMap):
    """A random sketch of s**degree that is never negative (arXiv 2310.01655).

    A sketch of `size` numbers for the degree degree / 2, made by multiplying Gaussian sketches of half the degree,
    and its products with itself: size**2 features.
    """

    def __init__(
        self,
        width: int,
        scale: float,
        seed: int = 0,
        heads: int = 1,
        length: int = 0,
        *,
        degree: int = 4,
        size: int = 16,
    ) -> None:
        super().__init__(width, scale)
        self.count = size * size
        generator = torch.Generator().manual_seed(seed)
        self.levels, parts = 0, degree // 2
        while parts > 1:  # from the leaves, which see x, to the root
            seen = size if self.levels else width
            draw = torch.randn((parts, size, seen), generator=generator, dtype=torch.float64)
            self.register_buffer(f"projection{self.levels}", draw, persistent=False)
            self.levels, parts = self.levels + 1, parts // 2
        if not self.levels:
            self.count = width * width

    def forward(self, x: Tensor, start: int = 0) -> Features:
        sketch = (x * self.root)[..., None, :, :]
        for level in range(self.levels):
            projection = getattr(self, f"projection{level}").to(x.dtype)  # (parts, size, seen)
            both = sketch @ projection.mT
            sketch = both[..., 0::2, :, :] * both[..., 1::2, :, :] / math.sqrt(projection.shape[-2])
        sketch = sketch[..., 0, :, :]
        return Features((sketch[..., :, None] * sketch[..., None, :]).flatten(-2))


class Hedgehog(FeatureMap):
    """phi(x) = (softmax(W x), softmax(-W x)), W learned from the identity (arXiv 2402.04347).

    Each half is normalised, as its authors compute it, and x is not scaled: scaled, the identity begins as uniform.
    """

    def __init__(self, width: int, scale: float, seed: int = 0, heads: int = 1, length: int = 0) -> None:
        super().__init__(width, scale)
        self.count = 2 * width
        self.matrix = nn.Parameter(torch.eye(width).repeat(heads, 1, 1))

    def forward(self, x: Tensor, start: int = 0) -> Features:
        mixed = x @ own(self.matrix).to(x.dtype).mT
        return Features(torch.cat((mixed.softmax(-1), (-mixed).softmax(-1)), -1))


class Transformer2Rnn(FeatureMap):
    """phi(x) = max(W x + b, 0), W and b learned (arXiv 2103.13076)."""

    def __init__(self, width: int, scale: float, seed: int = 0, heads: int = 1, length: int = 0) -> None:
        super().__init__(width, scale)
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(width)
        draw = (torch.rand((heads, width, width), generator=generator) * 2 - 1) * bound
        self.matrix = nn.Parameter(draw)
        self.bias = nn.Parameter(torch.zeros(heads, 1, width))

    def forward(self, x: Tensor, start: int = 0) -> Features:
        mixed = (x * self.root) @ own(self.matrix).to(x.dtype).mT + own(self.bias).to(x.dtype)
        return Features(mixed.clamp_min(0))


def own(parameter: Tensor) -> Tensor:
    """A parameter (heads, ...) as it meets x (..., heads, n, d); one of a single head also meets x (n, d)."""
    return parameter[0] if len(parameter) == 1 else parameter


def exponential(logarithm: Tensor) -> Features:
    """exp of `logarithm` (..., n, r), with the largest of each position between 1 and 2 times a power of two."""
    exponents = (logarithm.detach().amax(-1, keepdim=True) / math.log(2)).floor()
    return Features((logarithm - exponents * math.log(2)).exp(), exponents)


def orthogonal(count: int, width: int, seed: int) -> Tensor:
    """A (count, width) matrix, Gaussian row by row, whose rows are orthogonal within blocks of `width`."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-count // width)
    gaussian = torch.randn((blocks, width, width), generator=generator, dtype=torch.float64)
    directions, triangle = torch.linalg.qr(gaussian)
    directions = directions * triangle.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]  # makes them uniform
    lengths = torch.randn((count, width), generator=generator, dtype=torch.float64).norm(dim=-1, keepdim=True)
    found: Tensor = directions.mT.reshape(-1, width)[:count] * lengths
    return found
