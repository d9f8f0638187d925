"""Averages and sums against those of the package `adapters`, in its own environment (B4)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from methods.mera_merge import elsewhere
from methods.mera_merge.adapterhub import make_bottleneck
from pomona.methods.mera_merge.adapters import read, write
from pomona.methods.mera_merge.fusion import fuse, shares

pytestmark = pytest.mark.slow

AVERAGE = """
import json, sys, torch
from pathlib import Path
from transformers import BertConfig
from adapters import BertAdapterModel
folder, work = Path(sys.argv[1]), json.loads(sys.argv[2])
size = dict(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
model = BertAdapterModel(BertConfig(**size)).eval()
names = [model.load_adapter(str(path), use_safetensors=True) for path in sorted(folder.glob("a*"))]
for name, (weights, normalize) in work.items():
    model.average_adapter(name, names, weights=weights, normalize_weights=normalize)
model.load_adapter(str(folder / "merged"), load_as="ours", use_safetensors=True)
found = {
    name: {key.replace(f".{name}.", ".*."): value.tolist() for key, value in model.state_dict().items()
           if f".adapters.{name}." in key}
    for name in (*work, "ours")
}
print(json.dumps(found))
"""
CASES: dict[str, tuple[list[float], bool, str]] = {
    "alike": ([1.0, 1.0, 1.0], True, "avg"),
    "weighted": ([3.0, 1.0, 2.0], True, "avg"),
    "negative": ([1.5, -0.25, 0.5], False, "avg"),
    "summed": ([1.0, 1.0, 1.0], False, "sum"),
}


@pytest.mark.parametrize("mh_adapter", (False, True))
def test_averages_and_sums_are_those_of_adapters(tmp_path: Path, mh_adapter: bool) -> None:
    made = [
        make_bottleneck(
            tmp_path / f"a{seed}", seed=seed, layers=3, width=32, rank=4, name=f"a{seed}", mh_adapter=mh_adapter
        )
        for seed in range(3)
    ]
    three = [read(str(folder), allow_pickle=False) for folder in made]
    given: dict[str, Any] = {"features": "down", "metric": "euclidean", "solver": None, "activations": None}
    ours = {}
    for name, (weights, normalize, method) in CASES.items():
        normalised = shares(weights, 3, method=method, normalize=normalize)
        ours[name] = fuse(three, method=method, weights=normalised, reference=0, **given).adapter
    write(tmp_path / "merged", ours["weighted"])
    asked = {name: (weights, normalize) for name, (weights, normalize, _) in CASES.items()}
    found = elsewhere.run(AVERAGE, tmp_path, json.dumps(asked))
    for name, adapter in {**ours, "ours": ours["weighted"]}.items():
        wanted = {key.replace(".a0.", ".*."): value for key, value in adapter.tensors.items()}
        assert found[name].keys() == wanted.keys()
        for key, value in wanted.items():
            normalised = name in CASES and CASES[name][1]
            bound = 0 if name == "ours" else 1e-7 if normalised else 3e-7  # which sums in float32, of larger numbers
            np.testing.assert_allclose(value.numpy(), np.float32(found[name][key]), rtol=0, atol=bound)
