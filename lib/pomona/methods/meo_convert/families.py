"""Which model a checkpoint holds: a mixture of experts, a dense model to upcycle, or a model converted before."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pomona.errors import DataError, MissingError
from pomona.methods.meo_convert.layouts import ExpertLayer, Layout, Naming, Role, Slice, find
from pomona.models.checkpoint import FLOATS, Checkpoint, TensorSpec

_DECODER = r"(?P<stem>(?:.*\.)?layers\.(?P<index>\d+))\.(?P<block>block_sparse_moe|mlp)(?=\.)"
_STACKS = r"(?P<stem>(?:.*\.)?(?P<side>encoder|decoder)\.block\.(?P<index>\d+)\.layer\.\d+)\.(?P<block>mlp)(?=\.)"
_GATED: dict[Role, str] = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_LLAMA_LIKE = Naming(re.compile(_DECODER), "mlp", "experts.{}", _GATED, "gate")

MIXTURES = {
    "mixtral": Naming(
        re.compile(_DECODER), "block_sparse_moe", "experts.{}", {"gate": "w1", "up": "w3", "down": "w2"}, "gate"
    ),
    "olmoe": _LLAMA_LIKE,
    "qwen2_moe": _LLAMA_LIKE,
    "qwen3_moe": _LLAMA_LIKE,
    "switch_transformers": Naming(
        re.compile(_STACKS), "mlp", "experts.expert_{}", {"up": "wi", "down": "wo"}, "router.classifier"
    ),
}
"""Names of the tensors of each family of mixtures, by its model_type."""

_BERT = r"encoder\.layer\.\d+\.(?:intermediate|output)\.dense"
_LLAMA = r"layers\.\d+\.mlp\.(?:gate|up|down)_proj"
DENSE = {
    "bert": _BERT,
    "roberta": _BERT,
    "gpt2": r"h\.\d+\.mlp\.(?:c_fc|c_proj)",
    "t5": r"(?:encoder|decoder)\.block\.\d+\.layer\.\d+\.DenseReluDense\.(?:wi|wi_0|wi_1|wo)",
    "bart": r"(?:encoder|decoder)\.layers\.\d+\.(?:fc1|fc2)",
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}
"""The linear maps of the feed-forward networks of each dense family, by its model_type (paper: an expert each)."""
TRANSPOSED = ("gpt2",)
"""Families that store a linear map as (d, f)."""
BIASED = ("bert", "roberta", "gpt2", "bart")
"""Families whose feed-forward maps have biases."""


@dataclass(frozen=True)
class Linear:
    """A linear map of a feed-forward network.

    Attributes:
        name: of the module, as the checkpoint has it.
        bias: whether it has one.
        transposed: whether its weight is stored as (d, f).
    """

    name: str
    bias: bool
    transposed: bool


@dataclass(frozen=True)
class Family:
    """What a checkpoint holds.

    Attributes:
        name: its model_type.
        kind: "meo" is a model of a dense family whose linear maps were made into experts by this program.
        layers: of a mixture or a converted model, in the model's order.
        experts: of a layer; 1 of a dense model.
        selected: of a token or a text; 1 of a dense model.
        normalised: whether the gates of the selected experts sum to 1.
        layout: of the experts of a mixture.
        linears: of a dense model.
        converted: whether this program has converted it before, to experts that are merged for each input.
    """

    name: str
    kind: Literal["mixture", "dense", "meo"]
    layers: tuple[ExpertLayer, ...] = ()
    experts: int = 1
    selected: int = 1
    normalised: bool = True
    layout: Layout | None = None
    linears: tuple[Linear, ...] = ()
    converted: bool = False

    @property
    def naming(self) -> Naming:
        """Of a mixture."""
        return MIXTURES[self.name]


def recognise(checkpoint: Checkpoint) -> Family:
    """The family of `checkpoint`, with its experts or its linear maps found and counted.

    Raises:
        MissingError: a tensor is missing, or some experts are packed and others are not; the message names them.
        DataError: the family is not known, the weights are quantised, or they and config.json disagree.
    """
    config = checkpoint.config
    name = config.get("model_type")
    if config.get("quantization_config") is not None:
        raise DataError(
            f"model {checkpoint.folder}: it is quantised", hint="load it, dequantise it and save it in bfloat16"
        )
    if name in DENSE and "meo" in config:
        return _converted(checkpoint, str(name))
    if name in DENSE:
        return Family(str(name), "dense", linears=_linears(checkpoint, str(name)))
    if name in MIXTURES:
        return _mixture(checkpoint, str(name))
    raise DataError(
        f"model {checkpoint.folder}: model_type is {name!r}, which is not known here",
        hint=f"mixtures: {', '.join(MIXTURES)}; dense models: {', '.join(DENSE)}",
    )


def resolved(config: Mapping[str, Any]) -> Any:
    """`config` as transformers understands it, with what it leaves unsaid.

    Raises:
        DataError: transformers refuses it.
    """
    from transformers import AutoConfig

    known = {key: value for key, value in config.items() if key not in ("meo", "auto_map")}
    try:
        return AutoConfig.for_model(**known)
    except Exception as error:
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(f"config.json is not one of {config.get('model_type')}: {line}") from error


# --- mixtures --------------------------------------------------------------------------------------------------------


def _mixture(checkpoint: Checkpoint, name: str) -> Family:
    config = resolved(checkpoint.config)
    experts = int(config.num_experts)
    selected = 1 if name == "switch_transformers" else int(config.num_experts_per_tok)
    if not 1 <= selected <= experts:
        raise DataError(f"model {checkpoint.folder}: config.json selects {selected} of {experts} experts")
    layers, layout = find(checkpoint.specs, MIXTURES[name], _sparse(config), experts)
    if not layers:
        raise DataError(f"model {checkpoint.folder}: config.json gives experts to no layer")
    normalised = name == "mixtral" or bool(getattr(config, "norm_topk_prob", False))
    converted = "meo" in checkpoint.config
    return Family(name, "mixture", layers, experts, selected, normalised, layout, converted=converted)


def _sparse(config: Any) -> list[str]:
    """Names of the layers with experts, as the model classes of transformers decide them."""
    if config.model_type == "switch_transformers":
        depths = {"encoder": config.num_layers, "decoder": config.num_decoder_layers}
        steps = {"encoder": config.encoder_sparse_step, "decoder": config.decoder_sparse_step}
        return [
            f"{side}.{n}"
            for side, depth in depths.items()
            for n in range(depth)
            if steps[side] == 1 or (steps[side] > 0 and n % steps[side] == 1)
        ]
    dense = set(getattr(config, "mlp_only_layers", None) or ())
    step = getattr(config, "decoder_sparse_step", 1)
    return [str(n) for n in range(config.num_hidden_layers) if n not in dense and (n + 1) % step == 0]


# --- dense models and those converted from them ----------------------------------------------------------------------


def _linears(checkpoint: Checkpoint, name: str) -> tuple[Linear, ...]:
    found = _maps(checkpoint, name)
    for spec in found.values():
        if len(spec.shape) != 2:
            raise DataError(
                f"tensor {spec.name} has {len(spec.shape)} axes, as experts have, but config.json does not say how "
                "they were made",
                hint="it should have an object called meo",
            )
    return tuple(Linear(linear, f"{linear}.bias" in checkpoint.specs, name in TRANSPOSED) for linear in found)


def _maps(checkpoint: Checkpoint, name: str) -> dict[str, TensorSpec]:
    """The weights of all feed-forward maps, by the names of the modules, in the model's order."""
    pattern = re.compile(rf"((?:.*\.)?{DENSE[name]})\.weight")
    found = {match[1]: spec for spec in checkpoint.specs.values() if (match := pattern.fullmatch(spec.name))}
    if not found:
        raise MissingError(
            f"model {checkpoint.folder}: it has no feed-forward weights of {name}",
            hint="are config.json and the weights of one model?",
        )
    for spec in found.values():
        _summable(spec)
    return dict(sorted(found.items(), key=lambda item: natural(item[0])))


def _converted(checkpoint: Checkpoint, name: str) -> Family:
    meo = checkpoint.config["meo"]
    experts, selected = (meo.get(key) if isinstance(meo, dict) else None for key in ("experts", "selected"))
    if not (isinstance(experts, int) and isinstance(selected, int) and 1 <= selected <= experts):
        raise DataError(
            f"model {checkpoint.folder}: config.json does not say how many experts are selected of how many"
        )
    layers = tuple(
        _linear_experts(checkpoint.specs, linear, spec, experts, name in TRANSPOSED)
        for linear, spec in _maps(checkpoint, name).items()
    )
    return Family(name, "meo", layers, experts, selected, converted=True)


def _linear_experts(
    specs: Mapping[str, TensorSpec], linear: str, stack: TensorSpec, experts: int, transposed: bool
) -> ExpertLayer:
    if len(stack.shape) != 3 or stack.shape[0] != experts:
        raise DataError(
            f"tensor {stack.name} has the shape {list(stack.shape)}, but config.json counts {experts} experts"
        )
    _, rows, columns = stack.shape
    maps: dict[Role, tuple[Slice, ...]] = {
        "weight": tuple(Slice(stack.name, n * rows * columns, (rows, columns)) for n in range(experts))
    }
    if (bias := specs.get(f"{linear}.bias")) is not None:
        if bias.shape != (experts, rows):
            raise DataError(f"tensor {bias.name} has the shape {list(bias.shape)}, not {[experts, rows]}")
        _summable(bias)
        maps["bias"] = tuple(Slice(bias.name, n * rows, (rows,)) for n in range(experts))
    gate = tuple(name for name in specs if name.startswith((f"{linear}.gate.", f"{linear}.task.")))
    token = tuple(name for name in specs if name.startswith(f"{linear}.token."))
    return ExpertLayer(linear, linear, maps, gate, token, transposed)


def _summable(spec: TensorSpec) -> None:
    if spec.dtype not in FLOATS:
        raise DataError(f"tensor {spec.name} has the number format {spec.dtype}, which cannot be averaged")


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts names with their numbers as numbers, so that layer 10 follows layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]
