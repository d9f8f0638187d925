"""Where the matrices of experts are in a checkpoint: each in a tensor of its own, or all of a layer packed in one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from pomona.errors import DataError, MissingError
from pomona.models.checkpoint import FLOATS, TensorSpec

Role = Literal["gate", "up", "down", "weight", "bias"]
"""Maps of a feed-forward expert, or the two parts of an expert that is one linear map."""
Layout = Literal["per-expert", "packed"]

GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
"""Packed: (n, 2f, d), gate above up, and (n, d, f), as transformers 5 holds experts in memory."""


@dataclass(frozen=True)
class Slice:
    """A matrix or a vector inside a stored tensor: contiguous numbers, from the flattened element `start` on."""

    tensor: str
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ExpertLayer:
    """The experts that share a router.

    Attributes:
        name: "3", "encoder.1" where there are two stacks; of a converted model the name of the linear map.
        block: the module that holds them, as the checkpoint's names have it.
        maps: of each role one slice an expert, in the order of the experts.
        router: tensors that do nothing but choose among experts.
        token: tensors of a token-level block, which rewrites what the experts see.
        transposed: whether the dense model stores these maps as (d, f).
    """

    name: str
    block: str
    maps: Mapping[Role, tuple[Slice, ...]]
    router: tuple[str, ...]
    token: tuple[str, ...] = ()
    transposed: bool = False

    @property
    def experts(self) -> int:
        return len(next(iter(self.maps.values())))

    def tensors(self) -> set[str]:
        """Names of the tensors that hold the experts, their router or their token-level block."""
        return {part.tensor for parts in self.maps.values() for part in parts} | {*self.router, *self.token}


@dataclass(frozen=True)
class Naming:
    """How a family of mixtures names its tensors.

    Attributes:
        place: matches a tensor's name up to and with its block: groups stem, block and index, and side if stacks are
            two.
        block: the block's name where the experts are tensors of their own.
        expert: an expert within its block, by its number.
        leaves: the name of each map.
        router: the router within its block.
    """

    place: re.Pattern[str]
    block: str
    expert: str
    leaves: Mapping[Role, str]
    router: str

    def within(self, expert: int, role: Role) -> str:
        """An expert's map, within its block."""
        return f"{self.expert.format(expert)}.{self.leaves[role]}.weight"

    def canonical(self, block: str) -> str:
        """`block` under the name it has where the experts are tensors of their own."""
        return f"{block.rpartition('.')[0]}.{self.block}"


def find(
    specs: Mapping[str, TensorSpec], naming: Naming, expected: Iterable[str], experts: int
) -> tuple[tuple[ExpertLayer, ...], Layout]:
    """The experts of every layer in `expected`, `experts` of them in each.

    Raises:
        MissingError: an expert's tensor or a router is missing, or some experts are packed and others are not.
        DataError: there are tensors of experts that nothing explains, or their shapes or formats do not fit.
    """
    blocks: dict[str, dict[str, TensorSpec]] = {}
    names: dict[str, str] = {}
    for spec in specs.values():
        if found := naming.place.match(spec.name):
            layer = ".".join(part for part in (found.groupdict().get("side"), found["index"]) if part)
            rest = spec.name[found.end() + 1 :]
            if rest.startswith(("experts.", "token.", f"{naming.router}.")):
                names[layer] = found[0]
                blocks.setdefault(layer, {})[rest] = spec
    expected = list(expected)
    if stray := sorted(blocks.keys() - set(expected)):
        raise DataError(
            f"layer {stray[0]} has experts, but config.json makes it a dense one",
            hint="are config.json and the weights of one model?",
        )
    packed = {layer for layer, held in blocks.items() if GATE_UP in held or DOWN in held}
    apart = {layer for layer, held in blocks.items() if any(re.match(r"experts\.\D*\d", rest) for rest in held)}
    if packed and apart:
        raise MissingError(
            f"layouts are mixed: the experts of layer {min(packed)} are packed in one tensor, those of layer "
            f"{min(apart)} have tensors of their own",
            hint="loading would leave some of them random; save the model anew with save_pretrained",
        )
    layout: Layout = "packed" if packed else "per-expert"
    layers = []
    for layer in expected:
        held = blocks.get(layer, {})
        block = names.get(layer, _guess(names, layer))
        maps = _packed(held, block, experts) if packed else _apart(held, block, naming, experts)
        router = tuple(spec.name for rest, spec in held.items() if rest.startswith(f"{naming.router}."))
        if not router:
            raise _missing(f"{block}.{naming.router}.weight")
        token = tuple(spec.name for rest, spec in held.items() if rest.startswith("token."))
        found_layer = ExpertLayer(layer, block, maps, router, token)
        if left := sorted({spec.name for spec in held.values()} - found_layer.tensors()):
            raise DataError(
                f"tensor {left[0]} belongs to no expert that config.json counts", hint="is the model quantised?"
            )
        _check(found_layer, specs)
        layers.append(found_layer)
    return tuple(layers), layout


def _guess(names: Mapping[str, str], layer: str) -> str:
    """The block of a layer that has no tensor, after the pattern of another layer's."""
    side, _, index = layer.rpartition(".")
    like = next((block for name, block in names.items() if name.rpartition(".")[0] == side), f"layers.{index}.mlp")
    return re.sub(r"(layers|block)\.\d+", rf"\g<1>.{index}", like)


def _missing(name: str) -> MissingError:
    return MissingError(f"tensor {name} is missing", hint="is the checkpoint complete, and is config.json its own?")


def _apart(held: Mapping[str, TensorSpec], block: str, naming: Naming, experts: int) -> dict[Role, tuple[Slice, ...]]:
    maps: dict[Role, tuple[Slice, ...]] = {}
    for role in naming.leaves:
        parts = []
        for expert in range(experts):
            spec = held.get(naming.within(expert, role))
            if spec is None:
                raise _missing(f"{block}.{naming.within(expert, role)}")
            parts.append(Slice(spec.name, 0, spec.shape))
        maps[role] = tuple(parts)
    return maps


def _packed(held: Mapping[str, TensorSpec], block: str, experts: int) -> dict[Role, tuple[Slice, ...]]:
    for rest in (GATE_UP, DOWN):
        if rest not in held:
            raise _missing(f"{block}.{rest}")
        if len(held[rest].shape) != 3 or held[rest].shape[0] != experts:
            raise DataError(
                f"tensor {held[rest].name} has the shape {list(held[rest].shape)}, but config.json counts {experts} "
                "experts"
            )
    _, width, size = held[GATE_UP].shape
    if width % 2:
        raise DataError(f"tensor {held[GATE_UP].name} has an odd number of rows, {width}; it packs two maps")
    half = width // 2 * size
    down = held[DOWN].shape[1:]
    return {
        "gate": tuple(Slice(held[GATE_UP].name, 2 * n * half, (width // 2, size)) for n in range(experts)),
        "up": tuple(Slice(held[GATE_UP].name, (2 * n + 1) * half, (width // 2, size)) for n in range(experts)),
        "down": tuple(Slice(held[DOWN].name, n * down[0] * down[1], down) for n in range(experts)),
    }


def _check(layer: ExpertLayer, specs: Mapping[str, TensorSpec]) -> None:
    """All experts of `layer` have one shape and one number format, in which sums can be taken (DataError)."""
    first = layer.maps["up"][0]
    shapes = {"gate": first.shape, "up": first.shape, "down": first.shape[::-1]}
    for role, parts in layer.maps.items():
        for part in parts:
            if part.shape != shapes[role] or len(part.shape) != 2:
                raise DataError(
                    f"tensor {part.tensor} has the shape {list(part.shape)}, not {list(shapes[role])} as the others"
                )
            held = specs[part.tensor].dtype
            if held not in FLOATS:
                raise DataError(
                    f"tensor {part.tensor} has the number format {held}, which cannot be averaged",
                    hint="dequantise the model first: load it and save it in bfloat16",
                )
