"""Which of the two ways to augment, in batches or by Pillow, a run takes: pixels are the same."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from pomona.errors import UnavailableError
from pomona.methods.madaug_train.operations import batched, by_pillow
from pomona.methods.madaug_train.operations.batched import Chain
from pomona.methods.madaug_train.operations.table import Operation

# Pixels of a grey image from which on Pillow is faster on one thread of a CPU; in colour it is not at any size measured
# (tests/bench/madaug_augment.py).
_GREY_FOR_PILLOW = 224 * 224


class Backend(Protocol):
    """What `batched` and `by_pillow` both are."""

    def augmented(self, images: Tensor, operations: Sequence[Operation], chain: Chain) -> Tensor: ...

    def every(
        self, images: Tensor, operations: Sequence[Operation], magnitudes: Tensor, mirrored: Tensor, centres: Tensor
    ) -> Tensor: ...


def backend(wanted: str, device: torch.device, channels: int, height: int, width: int) -> Backend:
    """The module to augment images of this size with.

    Args:
        wanted: "batched", "pillow", or "auto" for the faster one, which is not timed: a run takes the same everywhere.

    Raises:
        UnavailableError: Pillow is wanted, or the device has no double precision, and it is not installed.
    """
    if wanted == "batched" and device.type == "mps":
        raise UnavailableError("--backend batched needs double precision, which mps has not", hint="--backend pillow")
    faster = device.type == "cpu" and channels == 1 and height * width >= _GREY_FOR_PILLOW
    installed = find_spec("PIL") is not None
    if wanted == "pillow" or device.type == "mps" or (wanted == "auto" and faster and installed):
        if not installed:
            raise UnavailableError(
                "augmenting images one by one needs the package Pillow", hint="pip install 'pomona[vision]'"
            )
        return by_pillow
    return batched
