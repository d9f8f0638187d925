"""Which adapters may become one: those whose parameters stand for the same thing.

A merge that is known to be wrong is refused by the name of the field that makes it so. One adapter alone is always
fit, as it is copied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pomona.errors import DataError, UsageError
from pomona.methods.mera_merge import adapterhub, peft_format
from pomona.methods.mera_merge.adapters import Adapter

_SHARED = (
    "mh_adapter",
    "output_adapter",
    "cross_adapter",
    "is_parallel",
    "non_linearity",
    "original_ln_before",
    "original_ln_after",
    "residual_before_ln",
    "adapter_residual_before_ln",
    "scaling",
)
"""Settings that bottlenecks must have in common."""

_OWN_PARAMETERS = {
    "phm_layer": "its projections are products of shared factors (Compacter)",
    "ln_before": "it has layer norms of its own",
    "ln_after": "it has layer norms of its own",
    "use_gating": "it has gates of its own",
}
"""Settings whose parameters no method merges."""

_PLAIN = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "feedforward_modules",
    "inference_mode",
    "init_ia3_weights",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "license",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "megatron_core",
    "alpha_pattern",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
"""Entries of PEFT that a merge takes into account, or need not; any other that is set changes what an adapter is."""

_FACTORS_ALONE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base model as it is."""


def check(adapters: Sequence[Adapter], *, allow_resize: bool) -> None:
    """Refuse adapters that cannot be merged.

    Args:
        allow_resize: bottlenecks may have unequal numbers of units.

    Raises:
        UsageError: two adapters have one label.
        DataError: an adapter has what no method merges, or two do not agree; the field and the labels are named.
    """
    labels = Counter(adapter.label for adapter in adapters)
    if twice := [label for label, count in labels.items() if count > 1]:
        raise UsageError(f"several adapters are called {twice[0]}", hint="tell them apart by NAME=PATH")
    if len(adapters) < 2:
        return
    first = adapters[0]
    for other in adapters[1:]:
        _same("kind", first, first.kind, other, other.kind)
    for adapter in adapters:
        check_plain(adapter)
    for other in adapters[1:]:
        if not _same_name(first.base, other.base):
            field = "model_name" if first.kind == "bottleneck" else "base_model_name_or_path"
            _same(field, first, first.base, other, other.base, hint="if they are one model, edit adapter_config.json")
        if first.kind == "bottleneck":
            _bottlenecks_agree(first, other, allow_resize=allow_resize)
        else:
            _peft_agree(first, other)


def check_plain(adapter: Adapter) -> None:
    """Refuse an adapter that has more than what the methods merge.

    Raises:
        DataError: it has; the field or the tensor is named.
    """
    (_bottleneck_fit if adapter.kind == "bottleneck" else _peft_fit)(adapter)


def _same(field: str, first: Adapter, one: Any, other: Adapter, another: Any, *, hint: str | None = None) -> None:
    if one != another:
        raise DataError(f"{field} differs: {one!r:.80} in {first.label}, {another!r:.80} in {other.label}", hint=hint)


def _same_name(one: str | None, other: str | None) -> bool:
    """Whether two names may be one model's: a hub id goes with or without its owner; None says nothing."""
    if not one or not other:
        return True
    if "/" in one and "/" in other:
        return one == other
    return one.rpartition("/")[2] == other.rpartition("/")[2]


def _same_if_known(field: str, first: Adapter, other: Adapter) -> None:
    one, another = first.config.get(field), other.config.get(field)
    if one is not None and another is not None:
        _same(field, first, one, other, another)


# --- bottlenecks -----------------------------------------------------------------------------------------------------


def _bottleneck_fit(adapter: Adapter) -> None:
    settings = adapter.settings
    for field, reason in _OWN_PARAMETERS.items():
        if settings.get(field):
            raise DataError(f"adapter {adapter.label}: {field} is set: {reason}, which no method merges")
    if not isinstance(settings["scaling"], int | float):
        raise DataError(f"adapter {adapter.label}: scaling is {settings['scaling']!r:.40}: learned, not a number")
    if beside := adapterhub.beside_sites(adapter.tensors, adapter.config):
        raise DataError(f"adapter {adapter.label}: {beside[0]} belongs to no bottleneck, and no method merges it")


def _bottlenecks_agree(first: Adapter, other: Adapter, *, allow_resize: bool) -> None:
    for field in ("model_type", "hidden_size"):
        _same_if_known(field, first, other)
    mine, theirs = first.settings, other.settings
    for field in _SHARED:
        _same(field, first, _settled(mine[field]), other, _settled(theirs[field]))
    sites, others = first.sites(), other.sites()
    if apart := sorted(sites.keys() ^ others.keys()):
        having, lacking = (first, other) if apart[0] in sites else (other, first)
        raise DataError(f"layers differ: {having.label} has {apart[0]}, {lacking.label} has not")
    for site, bottleneck in sites.items():
        (rank, width), (rank_there, width_there) = bottleneck.down.shape, others[site].down.shape
        _same(f"width of {site}", first, width, other, width_there)
        if not allow_resize:
            hint = "--allow-resize transports them to the reference's units"
            _same(f"reduction_factor (units of {site})", first, rank, other, rank_there, hint=hint)


def _settled(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


# --- LoRA and (IA)^3 -------------------------------------------------------------------------------------------------


def _peft_fit(adapter: Adapter) -> None:
    config = adapter.config
    if (bias := config.get("bias", "none")) != "none":
        raise DataError(f"adapter {adapter.label}: bias is {bias!r:.40}: it replaces biases of the base model")
    if (init := config.get("init_lora_weights")) not in _FACTORS_ALONE:
        raise DataError(
            f"adapter {adapter.label}: init_lora_weights is {init!r:.40}: it holds for a changed base model alone",
            hint="PEFT turns it into a plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    for field in sorted(config.keys() - _PLAIN - {"bias"}):
        if config[field]:
            raise DataError(
                f"adapter {adapter.label}: {field} is {config[field]!r:.40}, which no method merges exactly"
            )
    if beside := peft_format.beside_modules(adapter.tensors):
        raise DataError(f"adapter {adapter.label}: {beside[0]} is no low-rank factor, and no method merges it")


def _peft_agree(first: Adapter, other: Adapter) -> None:
    _same_if_known("revision", first, other)
    for field in ("task_type", "fan_in_fan_out"):
        _same(field, first, first.config.get(field) or None, other, other.config.get(field) or None)
    modules, others = peft_format.module_names(first.tensors), peft_format.module_names(other.tensors)
    if apart := sorted(modules.keys() ^ others.keys()):
        having, lacking = (first, other) if apart[0] in modules else (other, first)
        raise DataError(f"target_modules differ: {having.label} has {apart[0]}, {lacking.label} has not")
    for module, names in modules.items():
        shape, shape_there = _map(first.tensors, names), _map(other.tensors, others[module])
        _same(f"shape of {module}", first, shape, other, shape_there)


def _map(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> tuple[int, ...]:
    """The shape (out, in) of the map that an adapter adds to, or of the scale that it multiplies with."""
    if "scale" in names:
        return tuple(tensors[names["scale"]].shape)
    return (*tensors[names["up"]].shape[:1], *tensors[names["down"]].shape[1:])
