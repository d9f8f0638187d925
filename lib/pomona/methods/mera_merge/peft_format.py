"""PEFT's format of LoRA and (IA)^3 adapters: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pomona.errors import DataError, MissingError
from pomona.methods.mera_merge.storage import Stored, encoded, read_tensors, write_files, write_json

_TENSORS, _PICKLE = "adapter_model.safetensors", "adapter_model.bin"
_KINDS = {"LORA": "lora", "IA3": "ia3"}
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that PEFT trains whole, and saves, with a task type."""

_PREFIX = "base_model.model."
_PARTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "bias",
    "lora_embedding_A": "down",
    "lora_embedding_B": "up",
    "ia3_l": "scale",
}
_LEAF = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _PARTS))})")


def read(folder: Path, config: Mapping[str, Any], label: str, *, allow_pickle: bool) -> Stored:
    """The tensors and the head of a LoRA or (IA)^3 adapter. Pickles are refused, whatever `allow_pickle` says.

    Raises:
        MissingError: a file or a tensor is missing, damaged or a pickle.
        DataError: it is another kind of adapter, or its tensors do not fit each other.
    """
    kind = _KINDS.get(str(config["peft_type"]))
    if kind is None:
        raise DataError(f"adapter {label}: peft_type {str(config['peft_type'])!r:.40}; LORA and IA3 alone are merged")
    path = folder / _TENSORS
    if not path.is_file() and (folder / _PICKLE).is_file():
        raise MissingError(
            f"adapter {label}: its weights are a pickle ({_PICKLE}), which can run code when loaded",
            hint="convert it to safetensors on a machine where you trust it: model.save_pretrained(FOLDER)",
        )
    tensors = read_tensors(path, label)
    heads = _HEADS.get(str(config.get("task_type")), ())
    head = {name: tensors.pop(name) for name in list(tensors) if _LEAF.fullmatch(name) is None and _of(name, heads)}
    _complete(tensors, kind, label)
    base = config.get("base_model_name_or_path")
    return Stored(kind, tensors, head, None, [path], base if isinstance(base, str) and base else None)


def write(folder: Path, config: Mapping[str, Any], stored: Stored) -> None:
    """Write the files of an adapter into `folder`.

    Where the head that its task type stands for was dropped, the task type goes too: PEFT would not load the rest.

    Raises:
        OutputError: a file cannot be written.
    """
    entries = dict(config)
    heads = _HEADS.get(str(config.get("task_type")), ())
    if heads and not stored.head:
        kept = [name for name in entries.get("modules_to_save") or [] if name not in heads]
        entries |= {"task_type": None, "modules_to_save": kept or None}
    write_json(folder / "adapter_config.json", entries)
    write_files(folder, weights(stored))


def weights(stored: Stored) -> dict[str, bytes]:
    """The file of tensors, by its name."""
    return {_TENSORS: encoded({**stored.tensors, **stored.head}, {"format": "pt"})}


def module_names(tensors: Iterable[str]) -> dict[str, dict[str, str]]:
    """Names of the tensors of each module: ``down`` (A), ``up`` (B) and ``bias`` of LoRA, ``scale`` of (IA)^3."""
    found: dict[str, dict[str, str]] = {}
    for name in tensors:
        if match := _LEAF.fullmatch(name):
            found.setdefault(match[1].removeprefix(_PREFIX), {})[_PARTS[match[2]]] = name
    return found


def beside_modules(tensors: Iterable[str]) -> list[str]:
    """Names of the tensors that belong to no low-rank pair or scale: magnitudes, biases of the base, embeddings."""
    return [name for name in tensors if _LEAF.fullmatch(name) is None]


def _of(name: str, modules: Iterable[str]) -> bool:
    return any(module in name.split(".") for module in modules)


def _complete(tensors: Mapping[str, Tensor], kind: str, label: str) -> None:
    """Refuse an adapter that lacks a tensor (MissingError), or whose shapes do not fit (DataError)."""
    modules = module_names(tensors)
    needed = {"down", "up"} if kind == "lora" else {"scale"}
    if not any(needed & names.keys() for names in modules.values()):
        raise DataError(f"adapter {label}: no tensor is one of a {kind} adapter")
    for module, names in modules.items():
        if lacking := needed - names.keys():
            raise MissingError(f"adapter {label}: {module} lacks lora_{'A' if 'down' in lacking else 'B'}")
        for name in names.values():
            if not tensors[name].is_floating_point():
                raise DataError(f"adapter {label}: {name} is {tensors[name].dtype}, not floating point")
        if kind == "lora" and tensors[names["down"]].shape[0] != tensors[names["up"]].shape[1]:
            shapes = f"{tuple(tensors[names['down']].shape)} and {tuple(tensors[names['up']].shape)}"
            raise DataError(f"adapter {label}: {module}: the shapes {shapes} do not fit each other")
