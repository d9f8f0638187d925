"""Any model of this method, dense, a mixture or converted, loaded without running code of its directory."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pomona.errors import DataError, MissingError, OutputError, UsageError
from pomona.io.atomic import writing
from pomona.methods.meo_convert.modeling_meo import DENSE, MIXTURES, Settings, converted_class
from pomona.models.checkpoint import SHARD, Checkpoint
from pomona.runtime.seeds import derive


def load(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    labels: Sequence[str] = (),
    seed: int = 0,
    plain: bool = False,
) -> tuple[Any, Any]:
    """The model in `folder`, in evaluation mode on `device`, and its tokenizer, None where there is none.

    Args:
        labels: names of classes to tell apart: the model gets a classification head, drawn by `seed` where the
            directory has none for these.
        plain: run a mixture that was kept for merging as the mixture it was, without token-level blocks.

    Raises:
        MissingError: a file or a weight is missing or damaged, or a weight of an expert would be passed over.
        DataError: config.json names no model of transformers, or its block "meo" makes no sense.
        UsageError: transformers has no classification head for this model.
    """
    checkpoint = Checkpoint.open(folder)
    config, tokenizer = _configuration(checkpoint), tokenizer_of(checkpoint)
    kind = _architecture(checkpoint, config)
    if labels:
        if list(config.id2label.values()) != list(labels) or not kind.__name__.endswith("ForSequenceClassification"):
            kind = _classifier(config)
            config.id2label = dict(enumerate(labels))  # which sets num_labels too
            config.label2id = {name: place for place, name in enumerate(labels)}
        if config.pad_token_id is None and tokenizer is not None:  # how a head finds the last token of a text
            padding = tokenizer.pad_token_id
            config.pad_token_id = padding if padding is not None else tokenizer.eos_token_id
        if config.eos_token_id is None and tokenizer is not None:  # and how one behind an encoder does
            config.eos_token_id = tokenizer.eos_token_id
    if "meo" in checkpoint.config:
        _check_block(checkpoint.config["meo"], checkpoint)
        kind = kind if plain else converted_class(kind)
    options = {"config": config, "dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    with _explained(checkpoint), _without_reports(), torch.random.fork_rng(()):
        torch.manual_seed(derive(seed, "head"))
        model, report = kind.from_pretrained(
            checkpoint.folder, **options, ignore_mismatched_sizes=True, output_loading_info=True
        )
    _check_weights(checkpoint, model, report, bool(labels), plain)
    return model.to(device).eval(), tokenizer


def save(model: Any, tokenizer: Any, folder: Path, *, dtype: torch.dtype, shard_bytes: int = SHARD) -> None:
    """Write a trained `model` and its tokenizer into `folder`, in the number format `dtype`; `model` takes it on.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    from safetensors import SafetensorError

    model.to(dtype)
    try:
        with writing(folder):
            model.save_pretrained(folder, max_shard_size=shard_bytes)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # which tells of a full disk in words alone
        raise OutputError(f"cannot write {folder}: {_first_line(error)}") from error


def _configuration(checkpoint: Checkpoint) -> Any:
    from transformers import AutoConfig

    with _explained(checkpoint):
        return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)


def tokenizer_of(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a model, None where it has none.

    Raises:
        MissingError: it cannot be read.
    """
    from transformers import AutoTokenizer

    if not any(file.name.startswith(("token", "vocab", "spiece", "sentence")) for file in checkpoint.companions()):
        return None
    with _explained(checkpoint):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes of settings without their files
        raise MissingError(f"model {checkpoint.folder}: its tokenizer has no vocabulary", hint="is the model complete?")
    return tokenizer


def _architecture(checkpoint: Checkpoint, config: Any) -> Any:
    """The class of transformers that config.json names; the model without a head where it names none."""
    import transformers

    names = checkpoint.config.get("architectures") or []
    if not names:
        return _of(transformers.AutoModel, config)
    kind: Any = getattr(transformers, str(names[0]), None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not known or kind.config_class is not type(config):
        raise DataError(
            f"model {checkpoint.folder}: config.json names the architecture {names[0]}, which is none of "
            f"{config.model_type} in transformers"
        )
    return kind


def _classifier(config: Any) -> Any:
    from transformers import AutoModelForSequenceClassification

    kind = _of(AutoModelForSequenceClassification, config)
    if kind is None:
        raise UsageError(f"transformers has no classification head for {config.model_type}", hint="leave out labels")
    return kind


def _of(auto: Any, config: Any) -> Any:
    return auto._model_mapping.get(type(config), None)


def _check_block(meo: Any, checkpoint: Checkpoint) -> None:
    try:
        Settings.read(meo if isinstance(meo, Mapping) else {"level": meo})
    except (TypeError, ValueError) as error:
        raise DataError(f"model {checkpoint.folder}: config.json: {_first_line(error)}") from error


def check(checkpoint: Checkpoint) -> None:
    """See that transformers can make the model of config.json, before any weight is read.

    Raises:
        MissingError: it cannot.
        DataError: config.json names no model of transformers.
    """
    config = _configuration(checkpoint)
    kind = _architecture(checkpoint, config)
    with _explained(checkpoint), torch.device("meta"):
        kind._from_config(config)


def _check_weights(checkpoint: Checkpoint, model: Any, report: Mapping[str, Any], new_head: bool, plain: bool) -> None:
    base = f"{model.base_model_prefix}."
    lacking = sorted(report["missing_keys"]) + sorted(str(entry[0]) for entry in report["mismatched_keys"])
    if new_head:  # and the pooler, which a model with another head did without
        lacking = [name for name in lacking if name.startswith(base) and ".pooler." not in name]
    if lacking:  # transformers would leave them random
        raise MissingError(
            f"model {checkpoint.folder}: {len(lacking)} weights are missing or have another shape, among them "
            f"{lacking[0]}",
            hint="are its files complete, and do they belong to its config.json?",
        )
    pattern = (DENSE | MIXTURES).get(model.config.model_type)
    ignored = [name for name in sorted(report["unexpected_keys"]) if pattern and _of_experts(pattern, name)]
    if plain:
        ignored = [name for name in ignored if ".token." not in name]
    if ignored:
        raise MissingError(
            f"model {checkpoint.folder}: {len(ignored)} weights of experts would be passed over, among them "
            f"{ignored[0]}",
            hint="do the files and config.json belong to one model?",
        )


def _of_experts(pattern: str, name: str) -> bool:
    return re.match(rf"(?:.*\.)?{pattern}\.", name.replace("block_sparse_moe", "mlp")) is not None


@contextlib.contextmanager
def _explained(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what transformers raises while loading into one line."""
    try:
        yield
    except Exception as error:
        raise MissingError(f"model {checkpoint.folder}: cannot be loaded: {_first_line(error)}") from error


@contextlib.contextmanager
def _without_reports() -> Iterator[None]:
    """Weights that are missing or left over are looked at here, and need no table."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _first_line(error: BaseException) -> str:
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not said:
        return type(error).__name__
    return " ".join(said) if said[0].endswith(":") else said[0]
