"""Train data/adapters: three adapters of MiniLM on one task that differ in their seeds and in what they saw.

Usage: python data/recipes/adapters.py [FOLDER]      data/adapters by default; about a minute for each on one core

Each begins with new parameters of its own and sees 256 of the 384 sentences for training, drawn by its seed. All share
one linear head on the first token, drawn once and never trained, so that only their units' order keeps them apart.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pomona.io.labelled import Labelled, read_labelled
from pomona.methods.mera_merge.adapters import Adapter, with_sites, write
from pomona.methods.mera_merge.bottleneck import Place, attach
from pomona.methods.mera_merge.fewshot.arms import fresh, network, new_head
from pomona.methods.mera_merge.fewshot.inputs import Inputs, Prefix
from pomona.methods.mera_merge.fewshot.tuning import test, tune
from pomona.models.loading import Loaded, load_model
from pomona.runtime.device import Runtime

DATA = Path(__file__).parents[1]
NAMES = {"first": 1, "second": 2, "third": 3}
TRAIN, SEEN = 384, 256
EPOCHS, RATE, BATCH, REDUCTION = 20, 2e-3, 16, 16
NAME = "sentiment"

# AdapterHub's seq_bn (Pfeiffer et al. 2020).
SETTINGS: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "init_weights": "bert",
    "inv_adapter": None,
    "is_parallel": False,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": False,
    "non_linearity": "relu",
    "original_ln_after": True,
    "original_ln_before": True,
    "output_adapter": True,
    "phm_layer": False,
    "reduction_factor": REDUCTION,
    "residual_before_ln": True,
    "scaling": 1.0,
    "use_gating": False,
}


def sentences() -> Labelled:
    """data/sentiment.jsonl: the first 384 to train on, the others to test on."""
    return read_labelled(DATA / "sentiment.jsonl", text_fields=["text"], label_field="label")


def described(settings: dict[str, Any], width: int) -> dict[str, Any]:
    """An AdapterHub configuration around `settings`."""
    return {
        "config": settings,
        "hidden_size": width,
        "model_class": "BertAdapterModel",
        "model_name": "sentence-transformers/all-MiniLM-L6-v2",
        "model_type": "bert",
        "name": NAME,
        "version": "adapters.1.3.0",
    }


def blank(base: Loaded, labels: list[str], head: nn.Linear) -> Adapter:
    """An adapter of zeros for every layer of `base`, with `head` as AdapterHub keeps one."""
    width = base.model.config.hidden_size
    inner = width // REDUCTION
    tensors = {}
    for layer in range(base.model.config.num_hidden_layers):
        at = f"bert.encoder.layer.{layer}.output.adapters.{NAME}"
        tensors[f"{at}.adapter_down.0.bias"] = torch.zeros(inner)
        tensors[f"{at}.adapter_down.0.weight"] = torch.zeros(inner, width)
        tensors[f"{at}.adapter_up.bias"] = torch.zeros(width)
        tensors[f"{at}.adapter_up.weight"] = torch.zeros(width, inner)
    head_settings = {
        "activation_function": None,
        "bias": True,
        "dropout_prob": None,
        "head_type": "classification",
        "label2id": {label: place for place, label in enumerate(labels)},
        "layers": 1,
        "num_labels": len(labels),
        "use_pooler": False,
    }
    return Adapter(
        NAME,
        Path(NAME),
        "bottleneck",
        described(SETTINGS, width),
        tensors,
        {f"heads.{NAME}.1.bias": head.bias, f"heads.{NAME}.1.weight": head.weight},
        described(head_settings, width),
    )


def train(base: Loaded, data: Labelled, like: Adapter, head: nn.Linear, seed: int) -> tuple[Adapter, float, float]:
    """An adapter like `like`, with its accuracy and negative log-likelihood in nats on the sentences for testing."""
    random = np.random.Generator(np.random.Philox(seed))
    seen = sorted(random.permutation(TRAIN)[:SEEN].tolist())
    inputs = Inputs(base.tokenizer, data.texts, max_length=64, device=base.model.device)
    start = fresh(like, torch.Generator().manual_seed(seed))
    with attach(base.model, start) as attached:
        learner = network(
            base.model, attached, head, Prefix(base.model, Place(0, 1), inputs), pooling="first", rate=RATE
        )
        tune(learner, seen, data.labels, epochs=EPOCHS, batch_size=BATCH, random=random)
        accuracy, nll = test(learner, inputs, range(TRAIN, len(data.texts)), data.labels)
        return with_sites(like, attached.sites(), start.label), accuracy, nll


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DATA / "adapters"
    base = load_model("minilm", Runtime.open("cpu", "float32"))
    data = sentences()
    head = new_head(base.model.config.hidden_size, len(data.names), seed=0, number=0).requires_grad_(False)
    like = blank(base, data.names, head)
    for name, seed in NAMES.items():
        adapter, accuracy, nll = train(base, data, like, head, seed)
        write(folder / name, adapter)
        (folder / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n\nSee data/README.md.\n")
        print(json.dumps({"adapter": name, "accuracy": accuracy, "nll": nll}))


if __name__ == "__main__":
    main()
