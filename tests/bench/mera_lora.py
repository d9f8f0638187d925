"""LoRA adapters merged where they act, in ΔW, and by PEFT's `add_weighted_adapter`.

Four unrelated adapters of queries and values, r = 16, and cases with known traps: one ΔW by two pairs of factors, whose
sum is no sum of factors, and rsLoRA. The truth is Σ wᵢ sᵢ BᵢAᵢ in float64, from the files. Both merge adapters that are
in memory, in turns in one process: ours to an adapter, PEFT within a model, into which it puts a new one. An svd has an
error of its own: the least of any map of that rank stands beside it.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from processes import target

from methods.mera_merge.adapterhub import make_lora
from pomona.methods.mera_merge import lowrank
from pomona.methods.mera_merge.adapters import Adapter, read

WEIGHTS = [0.4, 0.3, 0.2, 0.1]
SIZES = {False: {"layers": 12, "width": 768, "rank": 16}, True: {"layers": 2, "width": 64, "rank": 4}}

Matrix = NDArray[np.float64]


def merges(rounds: int, *, quick: bool) -> dict[str, Any]:
    """Errors and seconds of ours and of PEFT's, case by case."""
    size = SIZES[quick]
    cases = {}
    with tempfile.TemporaryDirectory(prefix="mera-") as name:
        for case, (folders, weights) in _cases(Path(name), size).items():
            cases[case] = _lora(folders, weights, size, rounds if case == "unrelated" else 1)
            print(f"lora, {case}: {json.dumps(cases[case])}", file=sys.stderr)
    svd = cases["unrelated"]["contenders"]["delta-svd"]
    return {
        "size": size,
        "rounds": rounds,
        "cases": cases,
        "targets": {
            "delta-cat is the sum, in every case": target(
                max(case["contenders"]["delta-cat"]["error"] for case in cases.values()), 1e-6
            ),
            "delta-svd over the least error at its rank": target(svd["error"] / svd["least"], 1.0001),
        },
    }


def _cases(folder: Path, size: Mapping[str, Any]) -> dict[str, tuple[list[Path], list[float]]]:
    """Directories of adapters and their weights."""
    unrelated = [make_lora(folder / f"unrelated-{seed}", seed=seed, **size) for seed in range(len(WEIGHTS))]
    first = make_lora(folder / "turned-0", seed=0, **size)
    random = torch.Generator().manual_seed(2)
    turned = {}
    for name, value in read(str(first), allow_pickle=False).tensors.items():
        if "lora_A" in name:  # of which the B follows
            rotation = torch.linalg.qr(torch.randn(len(value), len(value), generator=random, dtype=torch.float64)).Q
            turned[name] = (rotation.T @ value.double()).float()
            up = name.replace("lora_A", "lora_B")
            turned[up] = (read(str(first), allow_pickle=False).tensors[up].double() @ rotation).float()
    second = make_lora(folder / "turned-1", seed=0, tensors=turned, **size)
    scaled = [make_lora(folder / f"rslora-{seed}", seed=seed, use_rslora=True, **size) for seed in range(2)]
    return {
        "unrelated": (unrelated, WEIGHTS),
        "one map, turned factors": ([first, second], [0.5, 0.5]),
        "rsLoRA": (scaled, [0.5, 0.5]),
        "one rsLoRA, weight 1": (scaled[:1], [1.0]),
    }


def _lora(folders: Sequence[Path], weights: list[float], size: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    from peft import PeftModel
    from transformers import BertConfig, BertModel

    adapters = [read(f"a{number}={folder}", allow_pickle=False) for number, folder in enumerate(folders)]
    truth = _sums(adapters, weights)
    width = size["width"]
    config = BertConfig(
        vocab_size=100,
        hidden_size=width,
        num_hidden_layers=size["layers"],
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
    )
    model = PeftModel.from_pretrained(BertModel(config).eval(), str(folders[0]), adapter_name="0")
    for number, folder in enumerate(folders[1:], start=1):
        model.load_adapter(str(folder), adapter_name=str(number))
    names = list(map(str, range(len(folders))))

    ours: dict[str, Callable[[], Any]] = {
        "delta-cat": lambda: lowrank.delta_cat(adapters, weights),
        "delta-svd": lambda: lowrank.delta_svd(adapters, weights)[0],
        "linear": lambda: lowrank.linear(adapters, weights),
    }

    def peft(kind: str) -> Callable[[], Any]:
        return lambda: model.add_weighted_adapter(names, weights, kind, combination_type=kind)

    work = ours | {f"PEFT {kind}": peft(kind) for kind in ("cat", "svd", "linear")}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    errors: dict[str, float] = {}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name, merge in work.items():
                started = time.perf_counter()
                merged = merge()
                passed = time.perf_counter() - started
                if turn:
                    seconds[name].append(passed)
                elif name in ours:
                    errors[name] = _worst(_sums([merged], [1.0]), truth)
                else:
                    errors[name] = _worst(_in_model(model, name.removeprefix("PEFT ")), truth)
                if name not in ours:
                    model.delete_adapter(name.removeprefix("PEFT "))
    told: dict[str, dict[str, Any]] = {
        name: {
            "seconds": round(statistics.median(each), 4),
            "seconds_range": [round(f(each), 4) for f in (min, max)],
            "error": float(f"{errors[name]:.3e}"),
        }
        for name, each in seconds.items()
    }
    least = float(f"{_least(adapters, weights):.3e}")
    for name in ("delta-svd", "PEFT svd"):
        told[name]["least"] = least
    return {"adapters": len(folders), "weights": weights, "contenders": told}


def _factors(adapter: Adapter) -> dict[str, tuple[Matrix, Matrix]]:
    """A and s B of each module, by the formulas: s = α / r, and α / √r with rsLoRA."""
    rank, alpha = adapter.config["r"], adapter.config["lora_alpha"]
    scale = alpha / (np.sqrt(rank) if adapter.config["use_rslora"] else rank)
    found = {}
    for name, value in adapter.tensors.items():
        if match := re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", name):
            up = adapter.tensors[name.replace("lora_A", "lora_B")]
            found[match[1]] = np.asarray(value, np.float64), scale * np.asarray(up, np.float64)
    return found


def _sums(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Matrix]:
    every = [_factors(adapter) for adapter in adapters]
    return {
        module: sum((w * own[module][1] @ own[module][0] for w, own in zip(weights, every, strict=True)), start=0.0)
        for module in every[0]
    }


def _in_model(model: Any, name: str) -> dict[str, Matrix]:
    """What PEFT adds to each map, in float64."""
    found = {}
    for module, layer in model.base_model.model.named_modules():
        if name in getattr(layer, "lora_A", {}):
            down, up = (np.asarray(getattr(layer, part)[name].weight, np.float64) for part in ("lora_A", "lora_B"))
            found[module] = layer.scaling[name] * up @ down
    return found


def _worst(found: Mapping[str, Matrix], truth: Mapping[str, Matrix]) -> float:
    assert found.keys() == truth.keys()
    return float(max(np.linalg.norm(found[name] - value) / np.linalg.norm(value) for name, value in truth.items()))


def _least(adapters: Sequence[Adapter], weights: Sequence[float]) -> float:
    """The least relative error at the adapters' own rank of any matrix, at the worst module (Eckart and Young)."""
    every, errors = [_factors(adapter) for adapter in adapters], []
    for module, (first, _) in every[0].items():
        down = np.concatenate([own[module][0] for own in every])
        up = np.concatenate([w * own[module][1] for w, own in zip(weights, every, strict=True)], axis=1)
        values = np.linalg.svd(np.linalg.qr(up)[1] @ np.linalg.qr(down.T)[1].T, compute_uv=False)
        errors.append(np.linalg.norm(values[len(first) :]) / np.linalg.norm(values))
    return float(max(errors))


def show(found: Mapping[str, Any]) -> None:
    """The table, in Markdown."""
    print("\n| case | merge | s | error | least at its rank |\n|" + "---|" * 5)
    for case, about in found["cases"].items():
        for name, each in about["contenders"].items():
            least = f"{each['least']:.3g}" if "least" in each else ""
            print(f"| {case} | {name} | {each['seconds']:.3f} | {each['error']:.3g} | {least} |")
