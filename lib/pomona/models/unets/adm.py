"""ADM-256, the unconditional model of Dhariwal & Nichol 2021 at 256x256, as diffusers' `UNet2DModel` writes it.

Its public checkpoint, guided-diffusion's ``256x256_diffusion_uncond.pt``, is a pickle with names of its own. It is
converted once, one tensor at a time. Both are the same network up to names and one permutation: guided-diffusion has
query, key and value of an attention in one matrix, whose rows stand head by head (the query's, then the key's, then the
value's of the first head, and so on), diffusers has a matrix of each. The models of LSUN that were released with it are
of the same form.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pomona.errors import DataError, MissingError
from pomona.io.atomic import writing
from pomona.models.checkpoint import TensorSpec, parameters, required, write_config, write_shards
from pomona.models.unets.layout import LINEAR, WEIGHTS, write_scheduler
from pomona.runtime.progress import Progress

"""What diffusers calls the file of weights."""

CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "sample_size": 256,
    "in_channels": 3,
    "out_channels": 6,  # the noise, then what interpolates between the two bounds of its variance
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "block_out_channels": [256, 256, 512, 512, 1024, 1024],
    "layers_per_block": 2,
    "down_block_types": [*["ResnetDownsampleBlock2D"] * 3, *["AttnDownBlock2D"] * 3],  # attention at 32, 16 and 8
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": [*["AttnUpBlock2D"] * 3, *["ResnetUpsampleBlock2D"] * 3],
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attention_head_dim": 64,
    "add_attention": True,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "attn_norm_num_groups": 32,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "scale_shift",
    "dropout": 0.0,
}
"""config.json of the converted checkpoint."""

SCHEDULER: dict[str, Any] = {**LINEAR, "variance_type": "learned_range"}
"""scheduler_config.json of the converted checkpoint."""

_HINT = "guided-diffusion's 256x256_diffusion_uncond.pt is what is converted, or one of its LSUN models"
_CUT = "was the download cut short?"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a tensor of `UNet2DModel` comes from.

    Attributes:
        name: of the tensor in guided-diffusion.
        shape: of it there.
        part: 0, 1 or 2 for the query, key or value in it; None for the whole of it.
    """

    name: str
    shape: tuple[int, ...]
    part: int | None = None

    @property
    def converted(self) -> tuple[int, ...]:
        """The shape in diffusers, where the 1x1 convolutions of attentions are linear maps."""
        if len(self.shape) == 3:
            return (self.shape[1], self.shape[1])
        return self.shape if self.part is None else (self.shape[0] // 3,)


@dataclass(frozen=True)
class Conversion:
    """A checkpoint of guided-diffusion, read as a model of diffusers.

    Attributes:
        config: config.json.
        specs: what tensors the model has, float32, in the order of its layers.
    """

    config: Mapping[str, Any]
    specs: tuple[TensorSpec, ...]
    _origins: Mapping[str, Origin]
    _state: Mapping[str, Tensor]

    def tensor(self, name: str) -> Tensor:
        """The tensor that diffusers calls `name`; memory-mapped, unless rows had to be picked out."""
        origin = self._origins[name]
        found = self._state[origin.name].detach()
        if origin.part is not None:
            found = found.reshape(-1, 3, self.config["attention_head_dim"], *found.shape[1:])[:, origin.part]
        return found.reshape(origin.converted).float()


def convert(checkpoint: Path, config: Mapping[str, Any] = CONFIG) -> Conversion:
    """Open `checkpoint` and check that it is ADM-256, or the same architecture in the sizes of `config`.

    Nothing in it is run, and no weight is read yet.

    Raises:
        MissingError: it is absent or damaged, or holds anything but tensors.
        DataError: its tensors are not those of the model.
    """
    state = _tensors(checkpoint)
    origins = layout(config)
    wanted = {origin.name: origin.shape for origin in origins.values()}
    if lacking := [name for name in wanted if name not in state]:
        raise DataError(
            f"{checkpoint}: {len(lacking)} of {len(wanted)} tensors of ADM-256 are missing, among them {lacking[0]}",
            hint=_HINT,
        )
    if extra := [name for name in state if name not in wanted]:
        classes = "; it is a model of classes" if any(name.startswith("label_emb.") for name in extra) else ""
        raise DataError(
            f"{checkpoint}: tensors that ADM-256 does not have, among them {_shown(extra[0])}{classes}", hint=_HINT
        )
    for name, shape in wanted.items():
        if tuple(state[name].shape) != shape:
            raise DataError(f"{checkpoint}: {name} has the shape {tuple(state[name].shape)}, not {shape}", hint=_HINT)
    specs = tuple(TensorSpec(name, "F32", origin.converted) for name, origin in origins.items())
    return Conversion(config, specs, origins, state)


def predict(checkpoint: Path, config: Mapping[str, Any] = CONFIG) -> dict[str, Any]:
    """What `write` would write, after the same checks.

    Raises:
        PomonaError: as `convert`.
    """
    return _facts(checkpoint, convert(checkpoint, config))


def write(checkpoint: Path, folder: Path, progress: Progress, config: Mapping[str, Any] = CONFIG) -> dict[str, Any]:
    """Write the model that `checkpoint` holds into `folder`, in the layout of diffusers, one tensor at a time.

    Returns:
        The name of the checkpoint, and how many tensors, parameters and bytes of weights were written.

    Raises:
        PomonaError: as `convert`.
        CheckFailed: a weight is not finite.
        OutputError: the disk is full, or the folder cannot be written.
    """
    conversion = convert(checkpoint, config)
    _check_sums(checkpoint)
    progress.start("converting", len(conversion.specs))
    facts = _facts(checkpoint, conversion)
    [name] = write_shards(folder, conversion.specs, conversion.tensor, shard_bytes=facts["bytes"], progress=progress)
    with writing(folder):
        (folder / name).rename(folder / WEIGHTS)
    write_scheduler(folder, SCHEDULER)
    write_config(folder, conversion.config)
    return facts


def layout(config: Mapping[str, Any]) -> dict[str, Origin]:
    """The tensors of ADM by the names that `UNet2DModel` has for them, in the order of the layers.

    Args:
        config: of a `UNet2DModel` with residual blocks that scale and shift, and resize.
    """
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    attends = [kind.startswith("Attn") for kind in config["down_block_types"]]
    time = 4 * widths[0]
    found: dict[str, Origin] = {}

    def layer(ours: str, theirs: str, *shape: int) -> None:
        found[f"{ours}.weight"] = Origin(f"{theirs}.weight", shape)
        found[f"{ours}.bias"] = Origin(f"{theirs}.bias", shape[:1])

    def residual(ours: str, theirs: str, before: int, after: int) -> None:
        layer(f"{ours}.norm1", f"{theirs}.in_layers.0", before)
        layer(f"{ours}.conv1", f"{theirs}.in_layers.2", after, before, 3, 3)
        layer(f"{ours}.time_emb_proj", f"{theirs}.emb_layers.1", 2 * after, time)
        layer(f"{ours}.norm2", f"{theirs}.out_layers.0", after)
        layer(f"{ours}.conv2", f"{theirs}.out_layers.3", after, after, 3, 3)
        if before != after:
            layer(f"{ours}.conv_shortcut", f"{theirs}.skip_connection", after, before, 1, 1)

    def attention(ours: str, theirs: str, width: int) -> None:
        layer(f"{ours}.group_norm", f"{theirs}.norm", width)
        for part, name in enumerate(("to_q", "to_k", "to_v")):
            found[f"{ours}.{name}.weight"] = Origin(f"{theirs}.qkv.weight", (3 * width, width, 1), part)
            found[f"{ours}.{name}.bias"] = Origin(f"{theirs}.qkv.bias", (3 * width,), part)
        layer(f"{ours}.to_out.0", f"{theirs}.proj_out", width, width, 1)

    layer("time_embedding.linear_1", "time_embed.0", time, widths[0])
    layer("time_embedding.linear_2", "time_embed.2", time, time)
    layer("conv_in", "input_blocks.0.0", widths[0], config["in_channels"], 3, 3)
    channels = widths[0]
    skipped = [channels]
    for level, width in enumerate(widths):
        ours = f"down_blocks.{level}"
        for place in range(layers):
            theirs = f"input_blocks.{len(skipped)}"
            residual(f"{ours}.resnets.{place}", f"{theirs}.0", channels, width)
            if attends[level]:
                attention(f"{ours}.attentions.{place}", f"{theirs}.1", width)
            channels = width
            skipped.append(channels)
        if level < len(widths) - 1:
            residual(f"{ours}.downsamplers.0", f"input_blocks.{len(skipped)}.0", width, width)
            skipped.append(channels)
    residual("mid_block.resnets.0", "middle_block.0", channels, channels)
    attention("mid_block.attentions.0", "middle_block.1", channels)
    residual("mid_block.resnets.1", "middle_block.2", channels, channels)
    blocks = len(skipped)
    for level, width in reversed(list(enumerate(widths))):
        ours = f"up_blocks.{len(widths) - 1 - level}"
        for place in range(layers + 1):
            theirs = f"output_blocks.{blocks - len(skipped)}"
            residual(f"{ours}.resnets.{place}", f"{theirs}.0", channels + skipped.pop(), width)
            if attends[level]:
                attention(f"{ours}.attentions.{place}", f"{theirs}.1", width)
            channels = width
        if level > 0:
            residual(f"{ours}.upsamplers.0", f"{theirs}.{1 + attends[level]}", width, width)
    layer("conv_norm_out", "out.0", channels)
    layer("conv_out", "out.2", config["out_channels"], channels, 3, 3)
    return found


def _facts(checkpoint: Path, conversion: Conversion) -> dict[str, Any]:
    return {
        "checkpoint": checkpoint.name,
        "tensors": len(conversion.specs),
        "parameters": parameters(conversion.specs),
        "bytes": required(conversion.specs, shard_bytes=sum(spec.bytes for spec in conversion.specs)),
    }


def _tensors(checkpoint: Path) -> dict[str, Tensor]:
    """What is in `checkpoint`, memory-mapped where its format allows it (that of torch 1.6 and later does)."""
    if not checkpoint.is_file():
        raise MissingError(f"{checkpoint}: no such file")
    with _reading(checkpoint), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch finds odd about a file is refused below, or is harmless
        mapped = zipfile.is_zipfile(checkpoint)
        if mapped:
            _refuse_compressed(checkpoint)
        loaded = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=mapped)
    if not isinstance(loaded, dict):
        raise DataError(f"{checkpoint}: holds no tensors by name", hint=_HINT)
    for name, value in loaded.items():
        if not isinstance(name, str) or type(value) not in (Tensor, nn.Parameter):
            raise DataError(f"{checkpoint}: {_shown(name)} is no tensor", hint=_HINT)
        plain = value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise DataError(f"{checkpoint}: {_shown(name)} is no array of floating-point numbers", hint=_HINT)
    return loaded


def _refuse_compressed(checkpoint: Path) -> None:
    """torch would map the compressed bytes as if they were the weights."""
    with zipfile.ZipFile(checkpoint) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise MissingError(
                f"{checkpoint}: an archive that was compressed, which torch.save never does",
                hint="take the file as it was released, or unpack it and pack it with zip -0",
            )


def _check_sums(checkpoint: Path) -> None:
    """torch looks at no checksum of what it maps, so damaged weights would pass."""
    with _reading(checkpoint):
        if not zipfile.is_zipfile(checkpoint):
            return
        with zipfile.ZipFile(checkpoint) as archive:
            damaged = archive.testzip()
    if damaged is not None:
        raise MissingError(f"{checkpoint}: {_shown(damaged)} in it is damaged", hint=_CUT)


@contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    """Turn whatever torch, pickle and zipfile raise about a file into one line: a damaged one fails anywhere."""
    try:
        yield
    except MissingError:
        raise
    except pickle.UnpicklingError as error:
        raise MissingError(
            f"{checkpoint}: not a pickle of tensors alone; the rest of it could run code, so nothing was loaded",
            hint=_HINT,
        ) from error
    except Exception as error:
        raise MissingError(
            f"{checkpoint}: cannot be read: {_shown(error) or type(error).__name__}", hint=_CUT
        ) from error


def _shown(told: object) -> str:
    """The first line of `told`, without what would harm a terminal, at most 80 characters."""
    line = next(iter(str(told).splitlines()), "")
    return "".join(sign for sign in line if sign.isprintable())[:80]
