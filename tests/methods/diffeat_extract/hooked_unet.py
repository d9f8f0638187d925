"""A U-Net of diffusers read, and changed, by hooks while it runs as a whole: slow, and known to be right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


class Hooked(nn.Module):
    """What `pomona.models.unets.truncated.Truncated` promises, of a `UNet2DModel` without attention."""

    def __init__(self, module: Any, numbers: Sequence[int]) -> None:
        super().__init__()
        self.module, self.numbers = module, numbers

    def forward(self, x: Tensor, t: Tensor, additions: Mapping[int, Tensor] | None = None) -> tuple[Tensor, ...]:
        seen: dict[int, Tensor] = {}

        def watch(number: int) -> Any:
            def hook(module: Any, arguments: Any, output: Tensor) -> Tensor:
                seen[number] = output if number not in (additions or {}) else output + additions[number]
                return seen[number]

            return hook

        hooks = [
            part.register_forward_hook(watch(number)) for number, (_, part) in enumerate(parts(self.module), start=1)
        ]
        try:
            self.module(x, t)
        finally:
            for hook in hooks:
                hook.remove()
        return tuple(seen[number] for number in self.numbers)


def parts(module: Any) -> list[tuple[str, nn.Module]]:
    """Name and module of every block, in running order."""
    found = [("stem", module.conv_in)]
    for level, stage in enumerate(module.down_blocks):
        found += [(f"d{level}r{place}", part) for place, part in enumerate(stage.resnets)]
        found += [(f"d{level}down", part) for part in stage.downsamplers or ()]
    found.append(("mid", module.mid_block))
    for level, stage in enumerate(module.up_blocks):
        own = [*stage.resnets[:-1], stage if stage.upsamplers else stage.resnets[-1]]
        found += [(f"u{level}r{place}", part) for place, part in enumerate(own)]
    return found
