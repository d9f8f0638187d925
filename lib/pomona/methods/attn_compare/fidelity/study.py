"""The study `fidelity`: every kernel beside softmax at the heads of a real model, a file, or chance."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pomona.errors import DataError, MissingError, UsageError
from pomona.methods.attn_compare.config import Config
from pomona.methods.attn_compare.fidelity.findings import draw, section, summary
from pomona.methods.attn_compare.kernels import Kernel, chosen, find
from pomona.methods.attn_compare.rows import Point, Workshop
from pomona.models import texts
from pomona.runtime.progress import Progress
from pomona.runtime.settings import Settings

__all__ = ["draw", "measure", "plan", "prepare", "section", "sources", "summary"]

KERNELS = "uniform,elu1,relu,cosformer,taylor2,euler:2,euler:4,euler:8,favor:64,favor:256,favor:1024,hedgehog,t2r"
ALWAYS = ("exp", "uniform")
"""Softmax itself, and the baseline without which nobody can tell that a kernel looks at nothing."""

_JUDGED, _FITTED = "judged", "fitted"
_TEXTS = {_JUDGED: "documentation.txt", _FITTED: "narrative.txt"}
_CELLS = 1 << 20  # numbers of an attention matrix held at once for several heads


def plan(config: Config, settings: Settings) -> list[Point]:
    """One point for each layer, all kernels.

    Raises:
        UsageError: the model has no such layer, or no room for so many tokens.
        MissingError: the model, a text or the file is not there.
        DataError: a text is not UTF-8, or the file does not hold queries, keys and values.
    """
    kernels = [kernel.name for kernel in _kernels(config)]
    common = {
        "kernels": kernels,
        "seed": settings.seed,
        "learn_steps": config.learn_steps,
        "full": config.full,
        "heatmap": config.heatmap,
        "source": _source(config, settings),
        "tokens": config.tokens,
        "dtype": settings.dtype,
    }
    return [Point("fidelity", f"layer {layer}", {"layer": layer, **common}) for layer in _layers(config, settings)]


def sources(config: Config, settings: Settings) -> dict[str, Any]:
    """Digests of the model and both texts, or of the file; nothing of chance."""
    if config.qkv is not None:
        return {"qkv": _sha256(_read(config.qkv))}
    if config.synthetic is not None:
        return {}
    from pomona.models.loading import identity

    digests = {f"text {name}": _sha256(_bytes(config, name)) for name in _TEXTS}
    return {**identity(settings.model), **digests}


def prepare(config: Config, settings: Settings, shop: Workshop, progress: Progress) -> None:
    """Leave the heads of every layer in the scratch folder, of the text judged and of the text learned from.

    Raises:
        DataError: a text has fewer tokens than asked for, or the model's attention cannot be caught.
        MissingError: the model cannot be loaded.
    """
    from pomona.methods.attn_compare.fidelity import capture

    if config.qkv is not None:
        held = capture.read_arrays(config.qkv)
        for layer in _selected(config, settings, len(held)):
            held[layer].save(_place(shop, _JUDGED, layer))
        return
    if config.synthetic is not None:
        for name in _TEXTS:
            capture.gaussian(config.synthetic, config.tokens, settings.seed, name).save(_place(shop, name, 0))
        return
    from pomona.models.loading import load_causal_lm
    from pomona.runtime.device import Runtime

    # What is compared with softmax is the model, not the rounding of a short number format: auto means float32 here.
    wanted = set(_layers(config, settings))
    dtype = "float32" if settings.dtype == "auto" else settings.dtype
    scorer = load_causal_lm(settings.model, Runtime.open(settings.device, dtype, settings.seed))
    learns = config.learn_steps and any(kernel.learnable for kernel in _kernels(config))
    for name in _TEXTS if learns else (_JUDGED,):
        progress.note(f"fidelity: catching queries, keys and values of the text {name}")
        ids = scorer.tokenizer(_text(config, name))["input_ids"]
        if len(ids) < config.tokens:
            raise DataError(
                f"{_shown(config, name)}: it has {len(ids)} tokens of the {config.tokens} asked for",
                hint="give a longer text" + (f", or --tokens {len(ids)}" if len(ids) >= 16 else ""),
            )

        def keep(layer: int, heads: capture.Heads, name: str = name) -> None:
            if layer in wanted:
                heads.save(_place(shop, name, layer))

        capture.capture(scorer.model, ids[: config.tokens], keep)


def measure(point: Point, shop: Workshop) -> list[dict[str, Any]]:
    """One row for each kernel and head of the layer, kernels first."""
    import torch

    from pomona.methods.attn_compare.fidelity.capture import Heads

    told, layer = point.settings, point.settings["layer"]
    kernels = [find(name) for name in told["kernels"]]
    what = {name: told[name] for name in ("source", "full", "heatmap")}
    if not _place(shop, _JUDGED, layer).exists():
        return [
            {
                "study": "fidelity",
                "kernel": kernel.name,
                "point": {"layer": layer, "head": None, **what},
                "status": "skipped",
                "reason": "the layer has no softmax attention",
                "values": {},
            }
            for kernel in kernels
        ]
    device = "cpu" if shop.device.startswith("mps") else shop.device  # Metal has no float64
    judged = Heads.load(_place(shop, _JUDGED, layer)).to(device, torch.float64)
    fitted = None
    if _place(shop, _FITTED, layer).exists():
        fitted = Heads.load(_place(shop, _FITTED, layer)).to(device, torch.float64)
    total, tokens = judged.q.shape[:2]
    what |= {"tokens": tokens, "width": judged.q.shape[-1], "scale": judged.scale, "masked": judged.masked}
    each = max(1, _CELLS // tokens**2)
    found: dict[str, list[dict[str, Any]]] = {kernel.name: [] for kernel in kernels}
    with torch.no_grad():
        for start in range(0, total, each):
            end = min(total, start + each)
            for kernel, rows in _judged(
                kernels, judged.part(start, end), fitted and fitted.part(start, end), told, f"{layer}/{start}"
            ):
                found[kernel] += rows
    return [
        {
            "study": "fidelity",
            "kernel": kernel,
            "point": {"layer": layer, "head": head, **what, **row.pop("fit")},
            **row,
        }
        for kernel, rows in found.items()
        for head, row in enumerate(rows)
    ]


def _judged(
    kernels: Sequence[Kernel], heads: Any, fitted: Any, told: Any, name: str
) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    from pomona.methods.attn_compare.fidelity import judging, learning
    from pomona.runtime.seeds import derive

    truth = judging.Truth.of(heads, full=told["full"])
    example = judging.Truth.of(fitted, full=told["full"]) if fitted is not None else None
    for kernel in kernels:
        # The projections of a layer are the same for all its heads, however many are judged at once.
        seed = derive(told["seed"], f"fidelity/{kernel.name}/{name if kernel.learnable else told['layer']}")
        if kernel.map is None or (kernel.weight is not None and not kernel.learnable):
            rows = judging.judge(kernel, truth, None)
        elif not (kernel.learnable and example and told["learn_steps"]):
            rows = judging.judge(kernel, truth, learning.fit(kernel, heads, 0, seed=seed))
        else:
            fresh = learning.fit(kernel, example.heads, 0, seed=seed)
            learned = learning.fit(kernel, example.heads, told["learn_steps"], seed=seed, full=told["full"])
            rows = judging.judge(kernel, truth, learned)
            for column, values in (
                ("kl_before", judging.divergence(kernel, truth, fresh)),
                ("kl_fitted_before", judging.divergence(kernel, example, fresh)),
                ("kl_fitted", judging.divergence(kernel, example, learned)),
            ):
                for row, value in zip(rows, values, strict=True):
                    row["values"][column] = value
        steps = told["learn_steps"] if kernel.learnable and example else 0
        yield kernel.name, [{**row, "fit": {"learn_steps": steps} if kernel.learnable else {}} for row in rows]


# --- what is judged --------------------------------------------------------------------------------------------------


def _kernels(config: Config) -> list[Kernel]:
    asked = chosen(config.kernels or KERNELS)
    return [*(find(name) for name in ALWAYS), *(kernel for kernel in asked if kernel.name not in ALWAYS)]


def _source(config: Config, settings: Settings) -> str:
    if config.qkv is not None or config.synthetic is not None:
        if settings.model is not None:
            flag = "--qkv" if config.qkv is not None else "--synthetic"
            raise UsageError(f"--model and {flag} exclude each other", hint="judge a model, or a file, or chance")
        if config.qkv is not None:
            return config.qkv.name
        return f"Gaussian queries and keys, scores of standard deviation {config.synthetic:g}"
    from pomona.models.embedded import NAME

    return settings.model or NAME


def _layers(config: Config, settings: Settings) -> list[int]:
    """Numbers of the layers to judge; whatever is to be read must be there."""
    source = _source(config, settings)
    if config.synthetic is not None:
        count = 1
    elif config.qkv is not None:
        from pomona.methods.attn_compare.fidelity.capture import read_arrays

        count = len(read_arrays(config.qkv))
    else:
        from pomona.models.loading import load_config

        shape = load_config(settings.model).get_text_config()
        count = shape.num_hidden_layers
        most = getattr(shape, "max_position_embeddings", None)
        if most is not None and config.tokens > most:
            raise UsageError(f"--tokens is {config.tokens}; {source} attends to {most} at most")
        for name in _TEXTS:
            _text(config, name)
    return _selected(config, settings, count)


def _selected(config: Config, settings: Settings, count: int) -> list[int]:
    """Those of `count` layers that are asked for."""
    if config.layers == "all":
        return list(range(count))
    found = sorted({int(part) for part in config.layers.split(",")})
    if found[-1] >= count:
        source = _source(config, settings)
        raise UsageError(f"--layers {config.layers}: {source} has layers 0 to {count - 1}")
    return found


def _path(config: Config, name: str) -> Path | None:
    return config.eval_text if name == _JUDGED else config.text


def _shown(config: Config, name: str) -> str:
    return str(_path(config, name) or f"our own {_TEXTS[name]}")


def _bytes(config: Config, name: str) -> bytes:
    path = _path(config, name)
    return texts.own(_TEXTS[name]) if path is None else _read(path)


def _text(config: Config, name: str) -> str:
    try:
        return _bytes(config, name).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{_shown(config, name)}: not UTF-8 text: {error.reason} at byte {error.start}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MissingError(f"{path}: {error.strerror or error}") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _place(shop: Workshop, name: str, layer: int) -> Path:
    return shop.scratch / f"fidelity-{name}-{layer:03}.safetensors"
