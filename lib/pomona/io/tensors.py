"""The beginning of a safetensors file whose tensors are written afterwards, so that they need not be in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of a number, by the names that safetensors has for number formats."""


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """What a tensor takes in the file."""
    return math.prod(shape) * ITEM_BYTES[dtype]


def header(tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """All that stands before the first byte of the first tensor, padded so that it is a multiple of 8.

    Args:
        tensors: name, number format and shape of each, in the order in which their bytes follow, without gaps.
        metadata: texts for ``__metadata__``.
    """
    entry: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + tensor_bytes(dtype, shape)
        entry[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(entry, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded
