"""A U-Net of diffusers taken apart into the blocks that the papers count, in the order in which they run.

The stem is the first; each residual block of the encoder with its attention is one, and each down-sampler; then the
middle; then each residual block of the decoder with its attention, an up-sampler being part of the last one of its
level. The released code of arXiv 2307.08702 counts ADM-256 so: 37 blocks, the middle is 19.

No condition is given to models that take one: none is added of a class, and the text of a `UNet2DConditionModel` is one
token of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pomona.errors import DataError

_LEVELS = (
    "DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D",
    "CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D",
    "UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D",
    "CrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D",
)  # fmt: skip

Call = Callable[[Any, Tensor, Tensor | None, Tensor | None], Tensor]


class Stage(nn.Module):
    """One block, whose modules are applied in turn.

    Attributes:
        name: stem, d0r0, d0r1, d0down, d1r0, ..., mid, u0r0, ...: level and residual block from 0 in running order.
        side: "encoder", "middle" or "decoder"; the stem is of the encoder.
    """

    def __init__(self, name: str, side: str, parts: Sequence[nn.Module], image: _ImageSkip | None = None) -> None:
        super().__init__()
        self.name = name
        self.side = side
        self.parts = nn.ModuleList(parts)
        self.image = image
        self._calls = [_call(part) for part in parts]

    def forward(self, x: Tensor, image: Tensor, time: Tensor | None, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """The block's output, and the input image at the size of the level below if this is where it is shrunk."""
        for part, call in zip(self.parts, self._calls, strict=True):
            x = call(part, x, time, condition)
        return (x, image) if self.image is None else self.image(x, image)


class _ImageSkip(nn.Module):
    """What the Skip blocks of score-based models (Song et al. 2021) add: the input image, shrunk, by a 1x1 map."""

    def __init__(self, shrink: nn.Module, convolution: nn.Module) -> None:
        super().__init__()
        self.shrink = shrink
        self.convolution = convolution

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        image = self.shrink(image)
        return self.convolution(image) + x, image


class Embedding(nn.Module):
    """What the residual blocks know of time, and what their attention knows of the empty condition."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.projection = module.time_proj
        self.time = module.time_embedding
        self.addition = getattr(module, "add_embedding", None)
        self.activation = getattr(module, "time_embed_act", None)
        self.tokens = getattr(module, "encoder_hid_proj", None)
        self._width = token_width(module)

    def forward(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Times (B,) as (B, width), and the condition (B, 1, width) of models that take one."""
        time = self.time(self.projection(t).to(dtype))
        if self._width is None:
            return time, None
        condition = torch.zeros(len(t), 1, self._width, dtype=dtype, device=t.device)
        if self.addition is not None:
            time = time + self.addition(condition)
        if self.activation is not None:
            time = self.activation(time)
        return time, condition if self.tokens is None else self.tokens(condition)


def stages(module: Any) -> list[Stage]:
    """The blocks of `module`, a `UNet2DModel` or `UNet2DConditionModel`; its own modules, not copies.

    Raises:
        DataError: it has levels of a kind that no such model is known to have, or needs more than an empty condition.
    """
    _check(module)
    return list(_stages(module))


def token_width(module: Any) -> int | None:
    """Numbers of one token of the condition; None if the model takes no condition."""
    if type(module).__name__ != "UNet2DConditionModel":
        return None
    width = module.config.encoder_hid_dim if module.encoder_hid_proj is not None else module.config.cross_attention_dim
    return int(width if isinstance(width, int) else width[0])


def _stages(module: Any) -> Iterator[Stage]:
    yield Stage("stem", "encoder", [module.conv_in])
    for number, level in enumerate(module.down_blocks):
        for place, residual in enumerate(level.resnets):
            yield Stage(f"d{number}r{place}", "encoder", [residual, *_attention(level, place)])
        if getattr(level, "resnet_down", None) is not None:
            skip = _ImageSkip(level.downsamplers[0], level.skip_conv)
            yield Stage(f"d{number}down", "encoder", [level.resnet_down], skip)
        elif level.downsamplers is not None:
            yield Stage(f"d{number}down", "encoder", list(level.downsamplers))
    if module.mid_block is not None:
        yield Stage("mid", "middle", [module.mid_block])
    for number, level in enumerate(module.up_blocks):
        last = len(level.resnets) - 1
        for place, residual in enumerate(level.resnets):
            above = _upsamplers(level) if place == last else []
            yield Stage(f"u{number}r{place}", "decoder", [residual, *_attention(level, place), *above])


def _attention(level: Any, place: int) -> list[nn.Module]:
    """What attends after the residual block at `place`; `AttnSkipUpBlock2D` has one attention, after the last."""
    found = getattr(level, "attentions", None)
    if found is None:
        return []
    if type(level).__name__ == "AttnSkipUpBlock2D":
        return [found[0]] if place == len(level.resnets) - 1 else []
    return [found[place]]


def _upsamplers(level: Any) -> list[nn.Module]:
    if hasattr(level, "resnet_up"):  # a Skip block: what it draws of the image beside is no feature of a block
        return [] if level.resnet_up is None else [level.resnet_up]
    return [] if level.upsamplers is None else list(level.upsamplers)


# --- how diffusers' modules are called -------------------------------------------------------------------------------


def _plain(part: Any, x: Tensor, time: Tensor | None, condition: Tensor | None) -> Tensor:
    return part(x)  # type: ignore[no-any-return]


def _timed(part: Any, x: Tensor, time: Tensor | None, condition: Tensor | None) -> Tensor:
    return part(x, time)  # type: ignore[no-any-return]


def _conditioned(part: Any, x: Tensor, time: Tensor | None, condition: Tensor | None) -> Tensor:
    return part(x, encoder_hidden_states=condition)  # type: ignore[no-any-return]


def _both(part: Any, x: Tensor, time: Tensor | None, condition: Tensor | None) -> Tensor:
    return part(x, time, encoder_hidden_states=condition)  # type: ignore[no-any-return]


def _transformer(part: Any, x: Tensor, time: Tensor | None, condition: Tensor | None) -> Tensor:
    return part(x, encoder_hidden_states=condition, return_dict=False)[0]  # type: ignore[no-any-return]


_CALLS: dict[str, Call] = {
    "Conv2d": _plain,
    "Downsample2D": _plain,
    "Upsample2D": _plain,
    "Attention": _plain,
    "ResnetBlock2D": _timed,
    "UNetMidBlock2D": _timed,
    "Transformer2DModel": _transformer,
    "UNetMidBlock2DCrossAttn": _both,
    "UNetMidBlock2DSimpleCrossAttn": _both,
}


def _call(part: Any) -> Call:
    if getattr(part, "added_kv_proj_dim", None) is not None:  # the attention of SimpleCrossAttn blocks
        return _conditioned
    return _CALLS[type(part).__name__]


# --- what is refused -------------------------------------------------------------------------------------------------


def _check(module: Any) -> None:
    if type(module).__name__ not in ("UNet2DModel", "UNet2DConditionModel"):
        raise DataError(f"{type(module).__name__} is no UNet2DModel or UNet2DConditionModel")
    for level in (*module.down_blocks, *module.up_blocks):
        if type(level).__name__ not in _LEVELS:
            raise DataError(
                f"the U-Net has a level of the kind {type(level).__name__}, whose blocks cannot be told apart",
                hint=f"known: {', '.join(_LEVELS)}",
            )
    if type(module).__name__ == "UNet2DModel":
        return
    config = module.config
    needs = {
        "addition_embed_type": config.addition_embed_type not in (None, "text"),
        "encoder_hid_dim_type": config.encoder_hid_dim_type not in (None, "text_proj"),
        "class_embeddings_concat": bool(config.class_embeddings_concat),
        "dual_cross_attention": bool(config.dual_cross_attention),
    }
    if named := [f"{name} {config[name]}" for name, need in needs.items() if need]:
        raise DataError(
            f"the U-Net needs more than an empty condition: {named[0]}",
            hint="models without a condition can be read, and those of text alone",
        )
