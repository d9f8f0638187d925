"""The blocks of a U-Net: numbers, names, shapes and costs, as `stages` counts them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pomona.errors import DataError, UsageError
from pomona.models.unets.stages import Stage, stages, token_width
from pomona.models.unets.truncated import Truncated


@dataclass(frozen=True)
class Block:
    """One block; what embeds the time counts to the first that needs it, 2.

    Attributes:
        number: from 1, in running order.
        name: stem, d0r0, d0r1, d0down, ..., mid, u0r0, ...
        channels: of its output.
        side: height and width of its output.
        parameters: its own.
        flops: its own, of products, two for a multiply and add, for one image.
        share: cost of a pass that ends here over that of the whole pass, output layers included.
    """

    number: int
    name: str
    channels: int
    side: int
    parameters: int
    flops: int
    share: float


def blocks(module: Any, size: int) -> list[Block]:
    """All blocks of `module` on images of `size` x `size`, counted on a copy without storage.

    Raises:
        DataError: the U-Net cannot be taken apart into blocks, or cannot run.
        UsageError: it cannot halve images of that size as often as it does.
    """
    with torch.device("meta"):
        twin = type(module).from_config(module.config).eval()
        x = torch.empty(1, twin.config.in_channels, size, size)
        t = torch.zeros(1, dtype=torch.long)
    twin.class_embedding = None  # which would ask for a class
    found = stages(twin)
    _check_size(found, size)
    truncated = Truncated(twin, range(1, len(found) + 1))
    width = token_width(twin)
    tokens = [] if width is None else [torch.empty(1, 1, width, device="meta")]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            maps = truncated(x, t)
        with torch.no_grad(), FlopCounterMode(display=False) as whole:
            twin(x, t, *tokens)
    except Exception as error:  # a configuration that diffusers takes need not be one that it can run
        said = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"the U-Net cannot run: {said:.200}", hint="is its config.json as it was written?") from error
    spent = {name: sum(each.values()) for name, each in counter.get_flop_counts().items()}
    table: list[Block] = []
    total = 0
    for number, (stage, shape) in enumerate(zip(found, (each.shape for each in maps), strict=True), start=1):
        parts: list[nn.Module] = [stage]
        flops = spent.get(f"Truncated.stages.{number - 1}", 0)
        if number == 2 and truncated.embedding is not None:
            parts.append(truncated.embedding)
            flops += spent.get("Truncated.embedding", 0)
        total += flops
        parameters = sum(parameter.numel() for part in parts for parameter in part.parameters())
        share = total / whole.get_total_flops()
        table.append(Block(number, stage.name, shape[1], shape[-1], parameters, flops, share))
    return table


def resolve(wanted: Sequence[str], table: Sequence[Block]) -> list[Block]:
    """The blocks that `wanted` names, each once, in the order of their first mention.

    Names are numbers, names of `table`, mid+N and mid-N that many blocks after and before the middle, and all.

    Raises:
        UsageError: there is no such block.
    """
    found: dict[int, Block] = {}
    for name in wanted:
        for block in table if name == "all" else [_block(name, table)]:
            found.setdefault(block.number, block)
    return list(found.values())


def _block(name: str, table: Sequence[Block]) -> Block:
    named = {block.name: block for block in table}
    if name in named:
        return named[name]
    if re.fullmatch("[0-9]{1,9}", name):
        number = int(name)
    elif (offset := re.fullmatch("mid([+-][0-9]{1,9})", name)) and "mid" in named:
        number = named["mid"].number + int(offset[1])
    else:
        near = difflib.get_close_matches(name, named, n=3) or list(named)[-3:]
        raise UsageError(f"--block {name:.60}: the model has no such block", hint=f"near: {', '.join(near)}; {_LIST}")
    if not 1 <= number <= len(table):
        raise UsageError(f"--block {name:.60}: the model's blocks are 1 to {len(table)}", hint=_LIST)
    return table[number - 1]


_LIST = "--list-blocks prints them all"


def _check_size(found: Sequence[Stage], size: int) -> None:
    halvings = sum(stage.name.endswith("down") for stage in found)
    step = 2**halvings
    if size % step:
        nearest = max(1, round(size / step)) * step
        raise UsageError(
            f"images of side {size}: the model halves them down to 1/{step}, so the side must be a multiple of {step}",
            hint=f"--image-size {nearest} scales them",
        )
