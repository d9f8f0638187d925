"""The registry: every kernel that can stand where softmax stands, with what is known about it.

All four studies take their kernels from here. A new kernel is one entry of `_FAMILIES`: a function of the scores, a
feature map, or both. Scores are s = scale q . k.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pomona.errors import UsageError
from pomona.methods.attn_compare import maps
from pomona.methods.attn_compare.maps import FeatureMap, Features

Device = torch.device | str


@dataclass(frozen=True)
class Kernel:
    """One kernel; its weights are a function of the scores (`weight`), inner products of features (`map`), or both.

    Attributes:
        name: what ``--kernels`` calls it, with its parameter.
        formula: for people.
        reference: where it comes from.
        positive: no weight is ever negative.
        monotone: a key with a larger score never weighs less.
        injective: queries that differ have attention rows that differ (arXiv 2412.06590), for keys in general position.
        features: numbers of phi for heads d wide; None when no finite map is exact, or none of a size to speak of.
        map: makes phi, for linear time; None where it would have too many features to be of use.
        weight: of scores, exactly; None when only `map` is known.
        learnable: phi has parameters.
        exact: softmax itself.
        subtractive: rows are made to sum to one by w - mean(w) + 1/N, not by division.
        positional: weights depend on where keys stand.
        homogeneous: scores times a positive number give weights times another.
    """

    name: str
    formula: str
    reference: str
    positive: bool
    monotone: bool
    injective: bool
    features: Callable[[int], int | None]
    map: Callable[..., FeatureMap] | None = None
    weight: Callable[[Tensor], Tensor] | None = None
    learnable: bool = False
    exact: bool = False
    subtractive: bool = False
    positional: bool = False
    homogeneous: bool = False

    def build(
        self, width: int, scale: float, *, length: int, seed: int = 0, heads: int = 1, device: Device = "cpu"
    ) -> tuple[FeatureMap, FeatureMap]:
        """phi of queries and of keys: one map for both, two where maps learn.

        Raises:
            ValueError: the kernel has no map.
        """
        if self.map is None:
            raise ValueError(f"{self.name} has no feature map")
        first = self.map(width, scale, seed, heads, length).to(device)
        return first, (self.map(width, scale, seed, heads, length).to(device) if self.learnable else first)

    def entry(self, width: int = 64) -> dict[str, Any]:
        """What is known, for ``--list-kernels``: with the number of features for heads `width` wide."""
        return {
            "kernel": self.name,
            "formula": self.formula,
            "features": self.features(width),
            "linear_time": self.map is not None,
            "positive": self.positive,
            "monotone": self.monotone,
            "injective": self.injective,
            "learnable": self.learnable,
            "reference": self.reference,
        }


def attention(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    scale: float,
    *,
    visible: Tensor | None = None,
    counts: Tensor | None = None,
    maps: tuple[FeatureMap, FeatureMap] | None = None,
) -> Tensor:
    """The attention matrix, in the quadratic form that every other form is checked against.

    Args:
        q: (..., n, d) queries.
        k: (..., m, d) keys.
        scale: multiplies q . k.
        visible: (n, m), True where a query sees a key; None: it sees them all.
        counts: (m,) how many identical keys each key stands for; their weights come as one sum.
        maps: phi of queries and keys, for kernels that need one; by default made anew from seed 0.

    Returns:
        (..., n, m): rows that sum to one, or are zero where the weights sum to zero.
    """
    raw = weights(kernel, q, k, scale, visible=visible, maps=maps)
    if counts is not None:
        raw = raw * counts
    return normalised(kernel, raw, visible=visible, counts=counts)


def weights(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    scale: float,
    *,
    visible: Tensor | None = None,
    maps: tuple[FeatureMap, FeatureMap] | None = None,
) -> Tensor:
    """Weights (..., n, m) up to a positive factor for each row, 0 where a key is not visible; see `attention`."""
    if kernel.weight is not None:
        scores = q @ k.mT * scale
        if visible is not None:  # before the weights: one that overflows where nobody looks has no gradient but NaN
            scores = scores.masked_fill(~visible, -torch.inf if kernel.exact else 0)
        if kernel.exact:  # a shift of a row's scores is such a factor
            scores = scores - scores.detach().amax(-1, keepdim=True)
        if kernel.homogeneous:  # so is this one; the largest power is then 1, whatever number format holds it
            largest = scores.detach().abs().amax(-1, keepdim=True)
            scores = scores / torch.where(largest == 0, 1, largest)
        found = kernel.weight(scores)
        return found if visible is None else found.masked_fill(~visible, 0)
    length = max(q.shape[-2], k.shape[-2])
    of_queries, of_keys = maps or kernel.build(q.shape[-1], scale, length=length, device=q.device)
    return inner_products(of_queries(q), of_keys(k), visible)


def inner_products(queries: Features, keys: Features, visible: Tensor | None = None) -> Tensor:
    """phi(q) . phi(k), (..., n, m), up to a power of two for each row, 0 where a key is not visible."""
    found = queries.values @ keys.values.mT
    if keys.exponents is not None:
        exponents = keys.exponents.mT.expand(found.shape)
        seen = exponents if visible is None else exponents.masked_fill(~visible, -torch.inf)
        found = found * torch.exp2(seen - seen.amax(-1, keepdim=True))
    return found if visible is None else found.masked_fill(~visible, 0)


def normalised(kernel: Kernel, raw: Tensor, *, visible: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
    """`raw` weights (..., n, m) as rows that sum to one; rows of sum zero stay zero."""
    total = raw.sum(-1, keepdim=True)
    if not kernel.subtractive:
        return raw / total.masked_fill(total == 0, torch.inf)  # unlike torch.where, with gradients of zero there
    per_key = torch.ones_like(raw) if counts is None else counts.expand(raw.shape)
    per_key = per_key if visible is None else per_key * visible
    return raw + per_key * (1 - total) / per_key.sum(-1, keepdim=True)


def find(name: str) -> Kernel:
    """The kernel called `name`, as ``elu1`` or ``favor:256``.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    family, _, parameter = name.partition(":")
    if family not in _FAMILIES:
        import difflib

        near = difflib.get_close_matches(family, _FAMILIES, n=1)
        hint = f"did you mean {near[0]}?" if near else "--list-kernels prints them"
        raise UsageError(f"--kernels {name}: there is no such kernel", hint=hint)
    default, make = _FAMILIES[family]
    if default is None:
        if parameter:
            raise UsageError(f"--kernels {name}: {family} takes no parameter")
        return make(0)
    if parameter and not (re.fullmatch("[0-9]{1,5}", parameter) and int(parameter) > 0):
        raise UsageError(f"--kernels {name}: the part after the colon must be a whole number from 1")
    return make(int(parameter) if parameter else default)


def chosen(text: str) -> list[Kernel]:
    """The kernels of a list by comma, each once; ``pow:2..16`` stands for the even numbers from 2 to 16.

    Raises:
        UsageError: a name is unknown, or the list is empty.
    """
    found: dict[str, Kernel] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        family, colon, parameter = part.partition(":")
        low, dots, high = parameter.partition("..")
        each = [part]
        if dots:
            numbers = all(re.fullmatch("[0-9]{1,4}", number) for number in (low, high))
            if not (numbers and 0 < int(low) <= int(high)):
                raise UsageError(f"--kernels {part}: a range is FAMILY:LOW..HIGH")
            each = [f"{family}{colon}{number}" for number in range(int(low), int(high) + 1, 2)]
        for name in each:
            kernel = find(name)
            found.setdefault(kernel.name, kernel)
    if not found:
        raise UsageError("--kernels names no kernel", hint="--list-kernels prints them")
    return list(found.values())


def registered() -> list[Kernel]:
    """Every kernel, those of a family with its default parameter."""
    return [make(default or 0) for default, make in _FAMILIES.values()]


# --- the entries -----------------------------------------------------------------------------------------------------


def _monomials(variables: int, degree: int) -> int | None:
    """How many there are; None where costs in proportion to it would be beyond float64."""
    count = math.comb(variables + degree - 1, degree)
    return count if count < 2**512 else None


def _power(p: int) -> Kernel:
    """s**p, the polynomial attention of arXiv 2310.20051."""
    if p % 2 and p != 1:
        raise UsageError(f"--kernels pow:{p}: odd powers are negative for negative scores; give an even one")
    return Kernel(
        f"pow:{p}",
        f"s^{p}",
        "arXiv 2310.20051",
        positive=p % 2 == 0,
        monotone=False,
        injective=False,  # q and 2q have the same row
        features=lambda d: _monomials(d, p),
        map=functools.partial(maps.Quadratic, coefficients=(0.0, 0.0, 1.0)) if p == 2 else None,
        weight=lambda s: s**p,
        homogeneous=True,
    )


def _euler(p: int) -> Kernel:
    """(1 + s/p)**p, which tends to exp s."""
    if p % 2:
        raise UsageError(f"--kernels euler:{p}: odd powers are negative for scores below -{p}; give an even one")
    return Kernel(
        f"euler:{p}",
        f"(1 + s/{p})^{p}",
        "the limit that defines exp; cf. arXiv 2310.01655",
        positive=True,
        monotone=False,  # below s = -p
        injective=True,
        features=lambda d: _monomials(d + 1, p),
        map=functools.partial(maps.Quadratic, coefficients=(1.0, 1.0, 0.25)) if p == 2 else None,
        weight=lambda s: (1 + s / p) ** p,
    )


def _favor(m: int) -> Kernel:
    return Kernel(
        f"favor:{m}",
        f"exp(Wx - |x|²/2)/√m, W orthogonal, m = {m}",
        "FAVOR+, arXiv 2009.14794",
        positive=True,
        monotone=False,
        injective=True,  # for m > d
        features=lambda d: m,
        map=functools.partial(maps.Favor, count=m),
    )


def _rfa(m: int) -> Kernel:
    if m % 2:
        raise UsageError(f"--kernels rfa:{m}: sines and cosines come in pairs; give an even number")
    return Kernel(
        f"rfa:{m}",
        f"exp(|x|²/2)(sin Wx, cos Wx)/√(m/2), m = {m}",
        "arXiv 2103.02143",
        positive=False,
        monotone=False,
        injective=True,
        features=lambda d: m,
        map=functools.partial(maps.RandomFourier, count=m),
    )


def _polysketch(p: int) -> Kernel:
    if p < 2 or p & (p - 1):
        raise UsageError(f"--kernels polysketch:{p}: the degree must be a power of two, from 2")
    size = 16
    return Kernel(
        f"polysketch:{p}",
        f"sketch of s^{p}, squared, {size}² features",
        "PolySketchFormer, arXiv 2310.01655",
        positive=True,
        monotone=False,
        injective=False,
        features=lambda d: d * d if p == 2 else size * size,
        map=functools.partial(maps.PolySketch, degree=p, size=size),
    )


def _dpfp(nu: int) -> Kernel:
    return Kernel(
        f"dpfp:{nu}",
        f"max([x, -x], 0) times itself rolled by 1..{nu}",
        "arXiv 2102.11174",
        positive=True,
        monotone=False,
        injective=False,
        features=lambda d: 2 * d * nu,
        map=functools.partial(maps.Dpfp, nu=nu),
    )


def _one(kernel: Kernel) -> tuple[None, Callable[[int], Kernel]]:
    return None, lambda _: kernel


# Under each family's name: its default parameter, None for a kernel that stands alone, and what makes the kernel.
_FAMILIES: Mapping[str, tuple[int | None, Callable[[int], Kernel]]] = {
    "exp": _one(
        Kernel(
            "exp",
            "exp(s)",
            "softmax, arXiv 1706.03762",
            positive=True,
            monotone=True,
            injective=True,
            features=lambda d: None,
            weight=torch.exp,
            exact=True,
        )
    ),
    "uniform": _one(
        Kernel(
            "uniform",
            "1",
            "the baseline that looks at nothing",
            positive=True,
            monotone=True,
            injective=False,
            features=lambda d: 1,
            map=maps.Constant,
            weight=torch.ones_like,
        )
    ),
    "linear": _one(
        Kernel(
            "linear",
            "s",
            "the linear attention of arXiv 2310.11685",
            positive=False,
            monotone=False,  # where the weights sum to less than zero
            injective=False,
            features=lambda d: d,
            map=maps.Identity,
            weight=lambda s: s,
        )
    ),
    "elu1": _one(
        Kernel(
            "elu1",
            "φ(x) = elu(x) + 1",
            "arXiv 2006.16236",
            positive=True,
            monotone=False,
            injective=False,  # 2 phi(q) is the phi of another query
            features=lambda d: d,
            map=maps.Elu,
        )
    ),
    "relu": _one(
        Kernel(
            "relu",
            "φ(x) = max(x, 0)",
            "arXiv 2103.13076, 2412.06590",
            positive=True,
            monotone=False,
            injective=False,
            features=lambda d: d,
            map=maps.Relu,
        )
    ),
    "relu2": _one(
        Kernel(
            "relu2",
            "φ(x) = max(x, 0)²",
            "arXiv 2109.08668",
            positive=True,
            monotone=False,
            injective=False,
            features=lambda d: d,
            map=maps.SquaredRelu,
        )
    ),
    "cosformer": _one(
        Kernel(
            "cosformer",
            "max(x, 0)(cos, sin)(πi/2M)",
            "arXiv 2202.08791",
            positive=True,
            monotone=False,
            injective=False,
            features=lambda d: 2 * d,
            map=maps.CosFormer,
            positional=True,
        )
    ),
    "taylor2": _one(
        Kernel(
            "taylor2",
            "1 + s + s²/2",
            "Based, arXiv 2402.18668",
            positive=True,
            monotone=False,  # falls up to s = -1
            injective=True,
            features=lambda d: 1 + d + d * (d + 1) // 2,
            map=maps.Quadratic,
            weight=lambda s: 1 + s + s**2 / 2,
        )
    ),
    "pow": (4, _power),
    "euler": (8, _euler),
    "favor": (256, _favor),
    "rfa": (256, _rfa),
    "polysketch": (4, _polysketch),
    "dpfp": (1, _dpfp),
    "hedgehog": _one(
        Kernel(
            "hedgehog",
            "φ(x) = (softmax Wx, softmax -Wx), W from the identity",
            "arXiv 2402.04347",
            positive=True,
            monotone=False,
            injective=False,  # adding one number to all of W q changes nothing
            features=lambda d: 2 * d,
            map=maps.Hedgehog,
            learnable=True,
        )
    ),
    "t2r": _one(
        Kernel(
            "t2r",
            "φ(x) = max(Wx + b, 0)",
            "arXiv 2103.13076",
            positive=True,
            monotone=False,
            injective=False,
            features=lambda d: d,
            map=maps.Transformer2Rnn,
            learnable=True,
        )
    ),
    "inline": _one(
        Kernel(
            "inline",
            "s - mean(s) + 1/N",
            "InLine, arXiv 2412.06590",
            positive=False,
            monotone=True,
            injective=True,
            features=lambda d: d,
            map=maps.Identity,
            weight=lambda s: s,
            subtractive=True,
        )
    ),
}
