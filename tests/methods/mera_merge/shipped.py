"""The adapters in data/, the base they were trained on, and how well an adapter does on their sentences."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from conftest import ROOT
from pomona.io.labelled import Labelled, read_labelled
from pomona.methods.mera_merge.adapters import Adapter, read
from pomona.methods.mera_merge.bottleneck import Place, attach
from pomona.methods.mera_merge.capture import capture
from pomona.methods.mera_merge.fewshot.arms import network
from pomona.methods.mera_merge.fewshot.inputs import Inputs, Prefix
from pomona.methods.mera_merge.fewshot.tuning import test
from pomona.methods.mera_merge.fusion import fuse
from pomona.models.loading import Loaded, load_model
from pomona.runtime.device import Runtime

NAMES = ("first", "second", "third")
TRAIN = 384


@functools.cache
def base() -> Loaded:
    return load_model("minilm", Runtime.open("cpu", "float32"))


@functools.cache
def adapters() -> tuple[Adapter, ...]:
    return tuple(read(str(ROOT / "data/adapters" / name), allow_pickle=False) for name in NAMES)


@functools.cache
def sentences() -> Labelled:
    return read_labelled(ROOT / "data/sentiment.jsonl", text_fields=["text"], label_field="label")


@functools.cache
def inputs() -> Inputs:
    return Inputs(base().tokenizer, sentences().texts[TRAIN:], max_length=64, device=torch.device("cpu"))


@functools.cache
def prefix() -> Prefix:
    return Prefix(base().model, Place(0, 1), inputs())


def head() -> nn.Linear:
    """The one all share."""
    found = nn.Linear(base().model.config.hidden_size, len(sentences().names))
    given = adapters()[0].head
    with torch.no_grad():
        found.weight.copy_(given["heads.sentiment.1.weight"])
        found.bias.copy_(given["heads.sentiment.1.bias"])
    return found


def judge(adapter: Adapter) -> tuple[float, float]:
    """Accuracy and negative log-likelihood in nats of `adapter` with that head on the sentences for testing."""
    with attach(base().model, adapter) as attached:
        judged = network(base().model, attached, head(), prefix(), pooling="first", rate=1.0)
        return test(judged, inputs(), range(len(inputs())), sentences().labels[TRAIN:])


def activations(*some: Adapter, act: str = "pre") -> Mapping[str, Mapping[str, Tensor]]:
    """Of every adapter on 200 of the sentences for training."""
    texts = Inputs(base().tokenizer, sentences().texts[:200], max_length=64, device=torch.device("cpu"))
    batches = [texts.batch(places) for places in texts.by_length(range(200))]
    return {one.label: capture(base().model, one, batches, act=act) for one in some}  # type: ignore[arg-type]


def merged(method: str, *some: Adapter, act: str = "pre") -> Adapter:
    return fuse(
        some,
        method=method,
        weights=[1 / len(some)] * len(some),
        reference=0,
        features="down+bias",
        metric="euclidean",
        solver=None,
        activations=activations(*some, act=act) if method == "acts" else None,
    ).adapter
