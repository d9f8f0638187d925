"""AdapterHub's format of bottleneck adapters, as `adapters` 1.x and its forerunner adapter-transformers write it.

A directory holds ``adapter_config.json`` and ``adapter.safetensors`` (or ``pytorch_adapter.bin``), and where there is
a prediction head ``head_config.json`` and ``model_head.safetensors`` (or ``pytorch_model_head.bin``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pomona.errors import DataError, MissingError
from pomona.methods.mera_merge.storage import Stored, encoded, read_json, read_tensors, write_files, write_json

_TENSORS, _PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
_HEAD_CONFIG, _HEAD, _HEAD_PICKLE = "head_config.json", "model_head.safetensors", "pytorch_model_head.bin"

DEFAULTS: dict[str, Any] = {
    "original_ln_before": False,
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "ln_before": False,
    "ln_after": False,
    "mh_adapter": False,
    "output_adapter": True,
    "cross_adapter": False,
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "phm_layer": False,
    "inv_adapter": None,
    "leave_out": [],
}
"""What decides where an adapter sits and how it computes, with the values of files that leave it out."""

_OLD_NAMES = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""Activations as files without a version called them, and as they have been called since."""

_HOLDERS = r"(?:adapters|(?:attention|layer)_text_(?:task|lang)_adapters)"
_PREFIX = re.compile(r"(?!(?:en|de)coder\.)\w+\.(?=(?:encoder|decoder|transformer)\.|(?:h|layers)\.\d)")
_LAYER = re.compile(r"\.(\d+)\.")


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inner settings of a configuration, those of `DEFAULTS` filled in and the activation by its present name."""
    inner = config["config"]
    found = {**DEFAULTS, **{key: value for key, value in inner.items() if value is not None}}
    if "version" not in config:
        found["non_linearity"] = _OLD_NAMES.get(found["non_linearity"], found["non_linearity"])
    return found


def read(folder: Path, config: Mapping[str, Any], label: str, *, allow_pickle: bool) -> Stored:
    """The tensors and the head of a bottleneck adapter.

    Raises:
        MissingError: a file or a tensor is missing, damaged or a pickle.
        DataError: it is another kind of adapter, or its tensors do not fit each other.
    """
    inner = config["config"]
    if not isinstance(inner, Mapping):
        raise DataError(f"adapter {label}: config is {inner!r:.60}, not the settings of an adapter")
    if (kind := inner.get("architecture")) is not None:
        raise DataError(
            f"adapter {label}: architecture {kind!r:.40}; of AdapterHub's, bottleneck adapters alone are merged",
            hint="LoRA and (IA)^3 are read as PEFT writes them",
        )
    if not isinstance(inner.get("non_linearity"), str):
        raise DataError(f"adapter {label}: config has no non_linearity")
    left_out = inner.get("leave_out") or []
    if not isinstance(left_out, list) or not all(isinstance(layer, int) for layer in left_out):
        raise DataError(f"adapter {label}: leave_out is {left_out!r:.40}, not a list of layers")
    path, pickle = folder / _TENSORS, folder / _PICKLE
    tensors = read_tensors(path, label, pickle=pickle, allow_pickle=allow_pickle)
    _complete(tensors, config, label)
    files = [path if path.is_file() else pickle]
    head: Mapping[str, Tensor] = {}
    head_config = None
    if (folder / _HEAD_CONFIG).is_file():
        head_config = read_json(folder / _HEAD_CONFIG, label)
        path, pickle = folder / _HEAD, folder / _HEAD_PICKLE
        head = read_tensors(path, label, pickle=pickle, allow_pickle=allow_pickle)
        files += [folder / _HEAD_CONFIG, path if path.is_file() else pickle]
    elif any((folder / name).exists() for name in (_HEAD, _HEAD_PICKLE)):
        raise MissingError(f"adapter {label}: {_HEAD_CONFIG} is missing, which says what its head is")
    base = config.get("model_name")
    return Stored("bottleneck", tensors, head, head_config, files, base if isinstance(base, str) and base else None)


def write(folder: Path, config: Mapping[str, Any], stored: Stored) -> None:
    """Write the files of an adapter into `folder`, always as safetensors.

    Raises:
        OutputError: a file cannot be written.
    """
    write_json(folder / "adapter_config.json", config)
    if stored.head and stored.head_config is not None:
        write_json(folder / _HEAD_CONFIG, stored.head_config)
    write_files(folder, weights(stored))


def weights(stored: Stored) -> dict[str, bytes]:
    """The files of tensors, by name."""
    files = {_TENSORS: encoded(stored.tensors)}
    if stored.head and stored.head_config is not None:
        files[_HEAD] = encoded(stored.head)
    return files


def site_names(tensors: Iterable[str], config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Names of the tensors of each site: ``down``, ``down_bias``, ``up`` and ``up_bias``, sites in their order.

    A layer norm of the adapter's own stands first in its down projection, where there is one.
    """
    first = 1 if config["config"].get("ln_before") else 0
    leaves = {
        f"adapter_down.{first}.weight": "down",
        f"adapter_down.{first}.bias": "down_bias",
        "adapter_up.weight": "up",
        "adapter_up.bias": "up_bias",
    }
    pattern = re.compile(rf"(.+)\.{_HOLDERS}\.{re.escape(config['name'])}\.(.+)")
    found: dict[str, dict[str, str]] = {}
    for name in tensors:
        match = pattern.fullmatch(name)
        if match and match[2] in leaves:
            found.setdefault(match[1], {})[leaves[match[2]]] = name
    prefixes = [_PREFIX.match(site) for site in found]
    shared = len({prefix[0] for prefix in prefixes if prefix}) == 1 and all(prefixes)
    cut = prefixes[0].end() if shared and prefixes[0] else 0
    ordered = sorted(found, key=lambda site: [(int(p), "") if p.isdigit() else (-1, p) for p in site.split(".")])
    return {
        site[cut:]: {part: found[site][part] for part in leaves.values() if part in found[site]} for site in ordered
    }


def beside_sites(tensors: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that belong to no site: layer norms, gates, scaling, invertible blocks."""
    used = {name for names in site_names(tensors, config).values() for name in names.values()}
    return [name for name in tensors if name not in used]


def _complete(tensors: Mapping[str, Tensor], config: Mapping[str, Any], label: str) -> None:
    """Refuse an adapter that lacks a tensor or a layer (MissingError), or whose shapes do not fit (DataError)."""
    if config["config"].get("phm_layer"):
        return  # a single one can be copied; more than one are refused
    sites = site_names(tensors, config)
    if not sites:
        raise DataError(f"adapter {label}: no tensor belongs to an adapter called {config['name']}")
    for site, names in sites.items():
        if lacking := {"down", "down_bias", "up", "up_bias"} - names.keys():
            raise MissingError(f"adapter {label}: {site} lacks {', '.join(sorted(lacking))}")
        down, down_bias, up, up_bias = (tensors[names[part]] for part in ("down", "down_bias", "up", "up_bias"))
        for name in names.values():
            if not tensors[name].is_floating_point():
                raise DataError(f"adapter {label}: {name} is {tensors[name].dtype}, not floating point")
        rank, width = down.shape if down.dim() == 2 else (0, 0)
        if not rank or (up.shape, down_bias.shape, up_bias.shape) != ((width, rank), (rank,), (width,)):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (down, down_bias, up, up_bias))
            raise DataError(f"adapter {label}: {site}: the shapes {shapes} do not fit each other")
    left_out = set(config["config"].get("leave_out") or [])
    layers: dict[str, set[int]] = {}
    for site in sites:
        if found := _LAYER.search(f".{site}."):
            layers.setdefault(_LAYER.sub(".*.", f".{site}.", count=1).strip("."), set()).add(int(found[1]))
    for pattern, present in layers.items():
        if gaps := set(range(max(present))) - present - left_out:
            raise MissingError(f"adapter {label}: {pattern.replace('*', str(min(gaps)))} is missing")
