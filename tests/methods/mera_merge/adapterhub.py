"""Small adapter directories, as `adapters` and PEFT write them, from random or given tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SEQ_BN: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "learn_phm": True,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": False,
    "non_linearity": "relu",
    "original_ln_after": True,
    "original_ln_before": True,
    "output_adapter": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_layer": False,
    "phm_rank": 1,
    "residual_before_ln": True,
    "scaling": 1.0,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
_OUTER = {"hidden_size", "model_class", "model_name", "model_type", "version"}

LORA: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "tiny/bert",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "rank_pattern": {},
    "revision": None,
    "task_type": None,
    "use_dora": False,
    "use_rslora": False,
}


def make_bottleneck(
    folder: Path,
    *,
    seed: int,
    layers: int = 2,
    width: int = 8,
    rank: int = 3,
    name: str = "task",
    labels: int | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """An AdapterHub directory of a BERT of `layers` layers, with normal parameters of standard deviation 0.3.

    Args:
        labels: classes of its prediction head; None for no head.
        tensors: what takes the place of tensors of these names, or stands beside them.
        config: settings that differ from seq_bn's, or entries of the file around them (model_name, ...).
    """
    random = torch.Generator().manual_seed(seed)
    inner = {**SEQ_BN, "reduction_factor": width // rank if width % rank == 0 else width / (rank + 0.5)}
    outer = {"model_class": "BertAdapterModel", "model_name": "tiny/bert", "model_type": "bert", "hidden_size": width}
    outer |= {"name": name, "version": "adapters.1.3.0"}
    for key, value in config.items():
        (outer if key in _OUTER else inner)[key] = value
    places = [
        place for flag, place in (("mh_adapter", "attention.output"), ("output_adapter", "output")) if inner[flag]
    ]
    made = {}
    for layer in range(layers):
        for place in places:
            at = f"bert.encoder.layer.{layer}.{place}.adapters.{name}"
            made[f"{at}.adapter_down.0.weight"] = _normal(random, rank, width)
            made[f"{at}.adapter_down.0.bias"] = _normal(random, rank)
            made[f"{at}.adapter_up.weight"] = _normal(random, width, rank)
            made[f"{at}.adapter_up.bias"] = _normal(random, width)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({**made, **(tensors or {})}, folder / "adapter.safetensors")
    write_json(folder / "adapter_config.json", {**outer, "config": inner})
    if labels is not None:
        head = {
            f"heads.{name}.1.weight": _normal(random, labels, width),
            f"heads.{name}.1.bias": _normal(random, labels),
        }
        save_file(head, folder / "model_head.safetensors")
        described = {"head_type": "classification", "layers": 1, "num_labels": labels, "activation_function": "tanh"}
        described |= {"bias": True, "use_pooler": False, "label2id": {str(label): label for label in range(labels)}}
        described |= {"dropout_prob": None}
        write_json(folder / "head_config.json", {**outer, "config": described})
    return folder


def make_lora(
    folder: Path,
    *,
    seed: int,
    layers: int = 2,
    width: int = 8,
    rank: int = 2,
    targets: Sequence[str] = ("query", "value"),
    tensors: Mapping[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """A PEFT LoRA directory of a BERT of `layers` layers; with ``rank_pattern``, ranks are those it gives.

    Args:
        tensors: what takes the place of tensors of these names, or stands beside them.
        config: entries of its configuration that differ from `LORA`'s; ``lora_alpha`` is 2 r unless given.
    """
    random = torch.Generator().manual_seed(seed)
    ranks = config.get("rank_pattern", {})
    made = {}
    for layer in range(layers):
        for target in targets:
            own = ranks.get(target, rank)
            at = f"base_model.model.encoder.layer.{layer}.attention.self.{target}"
            made[f"{at}.lora_A.weight"] = _normal(random, own, width)
            made[f"{at}.lora_B.weight"] = _normal(random, width, own)
            if config.get("lora_bias"):
                made[f"{at}.lora_B.bias"] = _normal(random, width)
            if config.get("use_dora"):
                made[f"{at}.lora_magnitude_vector"] = _normal(random, width).abs()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({**made, **(tensors or {})}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    entries = {**LORA, "r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets), **config}
    write_json(folder / "adapter_config.json", entries)
    return folder


def make_ia3(folder: Path, *, seed: int, layers: int = 2, width: int = 8, **config: Any) -> Path:
    """A PEFT (IA)^3 directory of a BERT of `layers` layers: keys and values scaled, and the input of the output map."""
    random = torch.Generator().manual_seed(seed)
    made = {}
    for layer in range(layers):
        at = f"base_model.model.encoder.layer.{layer}"
        for target in ("key", "value"):
            made[f"{at}.attention.self.{target}.ia3_l"] = 1 + _normal(random, width, 1)
        made[f"{at}.output.dense.ia3_l"] = 1 + _normal(random, 1, 2 * width)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(made, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    entries: dict[str, Any] = {
        "base_model_name_or_path": "tiny/bert",
        "fan_in_fan_out": False,
        "feedforward_modules": ["output.dense"],
        "inference_mode": True,
        "init_ia3_weights": True,
        "modules_to_save": None,
        "peft_type": "IA3",
        "target_modules": ["key", "value", "output.dense"],
        "task_type": None,
    }
    write_json(folder / "adapter_config.json", entries | config)
    return folder


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True))


def _normal(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=random) * 0.3
