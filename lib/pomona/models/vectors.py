"""Tensors of a module as one vector, so that a step for all of them is one operation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Module


def weights_of(module: Module) -> Tensor:
    """All parameters of `module` in one vector, (P,), into which they look from now on."""
    return _as_one(list(module.parameters()))


def statistics_of(module: Module) -> Tensor:
    """All buffers of `module` likewise."""
    return _as_one(list(module.buffers()))


def parts(vector: Tensor, like: Iterable[Tensor]) -> list[Tensor]:
    """`vector` cut into tensors of the shapes of `like`, which share its memory."""
    shapes = [tensor.shape for tensor in like]
    pieces = torch.split(vector, [shape.numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _as_one(tensors: Sequence[Tensor]) -> Tensor:
    vector = torch.cat([tensor.detach().flatten() for tensor in tensors])
    for tensor, part in zip(tensors, parts(vector, tensors), strict=True):
        tensor.data = part
    return vector
