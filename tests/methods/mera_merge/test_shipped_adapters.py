"""Real adapters of a real base: what transport gives back, and what it saves where the plain average does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from conftest import ROOT
from methods.mera_merge import shipped
from methods.mera_merge.elsewhere import run
from pomona.methods.mera_merge.adapters import Adapter, Bottleneck, with_sites
from pomona.methods.mera_merge.bottleneck import attach
from pomona.methods.mera_merge.fusion import fuse

METHODS = ("wts", "acts", "assign")


def shuffled(adapter: Adapter, seed: int) -> tuple[Adapter, dict[str, Tensor]]:
    """`adapter` with its units in another order, and by site where each of its own units has gone."""
    random = torch.Generator().manual_seed(seed)
    sites, back = {}, {}
    for name, site in adapter.sites().items():
        order = torch.randperm(len(site.down), generator=random)
        sites[name] = Bottleneck(site.down[order], site.down_bias[order], site.up[:, order].contiguous(), site.up_bias)
        back[name] = order.argsort()
    return with_sites(adapter, sites, "shuffled"), back


def states(adapter: Adapter) -> Tensor:
    """Of the first sentences for testing, real tokens alone."""
    batch = shipped.inputs().batch(range(16))
    with attach(shipped.base().model, adapter), torch.no_grad():
        found: Tensor = shipped.base().model(**batch).last_hidden_state
    return found[batch["attention_mask"].bool()]


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_and_its_shuffled_copy_give_the_adapter_back(method: str) -> None:
    """Check B1: with equal weights of a power of two every bit."""
    original = shipped.adapters()[0]
    copy, back = shuffled(original, seed=5)
    before = states(original)
    torch.testing.assert_close(states(copy), before, atol=1e-5, rtol=0)
    fused = fuse(
        [original, copy],
        method=method,
        weights=[0.5, 0.5],
        reference=0,
        features="down+bias",
        metric="euclidean",
        solver=None,
        activations=shipped.activations(original, copy) if method == "acts" else None,
    )
    assert len(back) == 6
    for site, order in back.items():
        found = fused.sites["shuffled"][site].permutation
        assert found is not None and torch.equal(found, order), site
    assert torch.equal(states(fused.adapter), before)
    assert (states(shipped.merged("avg", original, copy)) - before).abs().max() > 0.1


def test_transport_keeps_what_the_plain_average_of_three_adapters_loses() -> None:
    """Check B5."""
    singles = [shipped.judge(adapter) for adapter in shipped.adapters()]
    assert all(accuracy >= 0.98 for accuracy, _ in singles)
    average = shipped.judge(shipped.merged("avg", *shipped.adapters()))
    for method in METHODS:
        accuracy, nll = shipped.judge(shipped.merged(method, *shipped.adapters()))
        assert accuracy >= 0.98, method
        assert nll * 10 < average[1], method
    assert average[0] < min(accuracy for accuracy, _ in singles)


def test_the_sentences_are_those_of_the_recipe() -> None:
    done = subprocess.run([sys.executable, ROOT / "data/recipes/sentiment.py"], capture_output=True, check=True)
    assert done.stdout == (ROOT / "data/sentiment.jsonl").read_bytes()
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["split"] for record in records] == ["train"] * 384 + ["test"] * 256
    assert len({record["text"] for record in records}) == len(records)


def test_the_head_is_one_and_all_say_their_licence() -> None:
    first, *others = shipped.adapters()
    for other in others:
        assert all(torch.equal(other.head[name], value) for name, value in first.head.items())
    assert {adapter.licence for adapter in shipped.adapters()} == {"apache-2.0"}


REFERENCE = """
import json, sys
import torch
from adapters import AutoAdapterModel
from safetensors.torch import load_file
model = AutoAdapterModel.from_pretrained(sys.argv[1])
name = model.load_adapter(sys.argv[2], use_safetensors=True, set_active=True)
model.active_head = name
with torch.no_grad():
    logits = model.eval()(**load_file(sys.argv[3])).logits
print(json.dumps(logits.double().tolist()))
"""


@pytest.mark.slow
def test_adapters_gives_the_same_logits(tmp_path: Path) -> None:
    from pomona.models.embedded import minilm

    batch = shipped.inputs().batch(range(32))
    save_file(batch, tmp_path / "batch.safetensors")
    expected = torch.tensor(run(REFERENCE, minilm(), ROOT / "data/adapters/second", tmp_path / "batch.safetensors"))
    with attach(shipped.base().model, shipped.adapters()[1]), torch.no_grad():
        found = shipped.head()(shipped.base().model(**batch).last_hidden_state[:, 0])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found.argmax(-1).tolist() == shipped.sentences().labels[shipped.TRAIN :][:32]
