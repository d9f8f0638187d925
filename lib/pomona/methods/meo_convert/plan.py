"""What a static merge writes: every tensor of the output, and what it is made from. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pomona.errors import CheckFailed, DataError
from pomona.methods.meo_convert import architectures
from pomona.methods.meo_convert.architectures import Arch
from pomona.methods.meo_convert.families import BIASED, Family, natural
from pomona.methods.meo_convert.layouts import ExpertLayer, Role
from pomona.models.checkpoint import FLOATS, Checkpoint, TensorSpec

FORMATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Copied:
    """A tensor of the source as it is."""

    spec: TensorSpec
    source: str


@dataclass(frozen=True)
class Merged:
    """The maps `role` of the experts of `layer` in one."""

    spec: TensorSpec
    layer: ExpertLayer
    role: Role


@dataclass(frozen=True)
class Zeros:
    """A tensor that the architecture has and the merge leaves nothing for."""

    spec: TensorSpec
    why: str


Output = Copied | Merged | Zeros


@dataclass(frozen=True)
class Plan:
    """The output of a static merge.

    Attributes:
        outputs: in the order in which they are written: by name, numbers as numbers, so that the layout of the source
            decides nothing.
        config: config.json.
    """

    arch: Arch
    outputs: Sequence[Output]
    config: dict[str, Any]

    @property
    def specs(self) -> list[TensorSpec]:
        return [output.spec for output in self.outputs]


def plan(checkpoint: Checkpoint, family: Family, *, arch: str, dtype: str) -> Plan:
    """The output of merging the experts of `family`.

    Args:
        arch: auto, single-expert or dense-twin.
        dtype: source, float32, bfloat16 or float16.

    Raises:
        UsageError: there is no such architecture.
        DataError: the merge would drop something that is not idle.
    """
    chosen = architectures.choose(checkpoint, family, arch)
    outputs: list[Output] = []
    taken: set[str] = set()
    for layer in family.layers:
        taken |= layer.tensors()
        outputs += _merged(checkpoint, family, layer, chosen, dtype)
        _refuse_token_block(checkpoint, layer)
        if chosen == "single-expert":
            outputs += _routers(checkpoint, family, layer, dtype)
    for spec in checkpoint.specs.values():
        if spec.name not in taken:
            name = architectures.renamed(family, spec.name, chosen)
            outputs.append(Copied(TensorSpec(name, format_of(spec.dtype, dtype), spec.shape), spec.name))
    outputs.sort(key=lambda output: natural(output.spec.name))
    names = {output.spec.name for output in outputs}
    if len(names) < len(outputs):
        raise DataError(f"model {checkpoint.folder}: it holds a merged tensor beside the experts it would be made from")
    return Plan(chosen, outputs, architectures.configuration(checkpoint, family, chosen, dtype))


def _merged(checkpoint: Checkpoint, family: Family, layer: ExpertLayer, arch: Arch, dtype: str) -> list[Output]:
    outputs: list[Output] = []
    for role, parts in layer.maps.items():
        shape = parts[0].shape[::-1] if layer.transposed else parts[0].shape
        held = checkpoint.specs[parts[0].tensor].dtype
        name = architectures.name(family, layer, role, arch)
        outputs.append(Merged(TensorSpec(name, format_of(held, dtype), shape), layer, role))
    if family.kind == "meo" and family.name in BIASED and "bias" not in layer.maps:
        weight = layer.maps["weight"][0]
        spec = TensorSpec(
            f"{layer.name}.bias", format_of(checkpoint.specs[weight.tensor].dtype, dtype), weight.shape[:1]
        )
        outputs.append(Zeros(spec, "the experts have no biases"))
    return outputs


def _routers(checkpoint: Checkpoint, family: Family, layer: ExpertLayer, dtype: str) -> list[Output]:
    outputs: list[Output] = []
    for tensor in layer.router:
        spec = checkpoint.specs[tensor]
        name = architectures.router_name(family, layer, tensor)
        # The softmax over one expert is 1 whatever its logit.
        shape = (1, *spec.shape[1:])
        outputs.append(
            Zeros(TensorSpec(name, format_of(spec.dtype, dtype), shape), "a router with one expert to choose")
        )
    return outputs


def _refuse_token_block(checkpoint: Checkpoint, layer: ExpertLayer) -> None:
    """A token-level block adds up(relu(down x)) to what the experts see; unless it adds nothing, it cannot go."""
    for tensor in layer.token:
        if ".token.up." in tensor and bool(checkpoint.read(tensor).any()):
            raise CheckFailed(
                f"{layer.name}: its token-level block changes the input of the experts, and a static merge would "
                "drop it",
                hint="a model of --level token cannot be merged once it is trained",
            )


def format_of(held: str, dtype: str) -> str:
    """The number format in which a tensor of format `held` is written: `dtype`, where it can be summed."""
    return FORMATS[dtype] if dtype != "source" and held in FLOATS else held
