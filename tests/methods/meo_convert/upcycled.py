"""Small models on disk, dense and given experts, of every family."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from methods.meo_convert.tinies import inputs, tiny
from pomona.methods.meo_convert.config import Config
from pomona.methods.meo_convert.families import recognise
from pomona.methods.meo_convert.upcycling import Upcycled, block, plan, upcycle
from pomona.models.checkpoint import SHARD, Checkpoint
from pomona.runtime.progress import Quiet
from small_bert import tokenizer


def save_dense(folder: Path, family: str, *, dtype: torch.dtype = torch.float32, **changed: Any) -> Path:
    """Write a small random model of `family` with a word tokenizer to `folder` and return it."""
    tiny(family, **changed).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def outputs(model: Any, ids: Tensor) -> Tensor:
    """Logits, or what a model without a head ends with."""
    with torch.no_grad():
        found = model.eval()(**inputs(model, ids))
    result: Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return result


def convert(source: Path, folder: Path, *, seed: int = 0, shard_bytes: int = SHARD, **options: Any) -> Upcycled:
    """Give the model in `source` experts, in `folder`, with its tokenizer if it has one."""
    checkpoint = Checkpoint.open(source)
    family = recognise(checkpoint)
    config = Config(**options)
    meo = block(family, config, tokenizer())
    folder.mkdir(parents=True, exist_ok=True)
    planned = plan(checkpoint, family, meo, init=config.init, dtype=config.save_dtype, seed=seed)
    done = upcycle(planned, folder, shard_bytes=shard_bytes, progress=Quiet())
    for file in checkpoint.companions():
        shutil.copy(file, folder)
    return done
