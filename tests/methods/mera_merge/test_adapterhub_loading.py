"""The package `adapters`, in its own environment, loads what we write and computes the same with it (B3)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from methods.mera_merge import elsewhere
from methods.mera_merge.adapterhub import make_bottleneck
from pomona.methods.mera_merge.adapters import Bottleneck, read, with_sites, write

pytestmark = pytest.mark.slow

MODEL = """
import json, sys, torch
from pathlib import Path
from transformers import BertConfig
from adapters import BertAdapterModel
def model():
    torch.manual_seed(0)
    size = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return BertAdapterModel(BertConfig(**size)).eval()
def out(folder):
    made, told = model(), {}
    name = made.load_adapter(str(folder), use_safetensors=True, loading_info=told, set_active=True)
    assert not told["missing_keys"] and not told["unexpected_keys"], told
    with torch.no_grad():
        found = made.bert(torch.tensor([[5, 9, 13, 7]])).last_hidden_state
        logits = made(torch.tensor([[5, 9, 13, 7]])).logits if name in made.heads else torch.zeros(1)
    return found.flatten().tolist() + logits.flatten().tolist()
folder = Path(sys.argv[1])
"""
MAKE = """
for kind in ("seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn"):
    for safe in (True, False):
        made = model()
        made.add_adapter("task", config=kind)
        made.add_classification_head("task", num_labels=3)
        torch.manual_seed(1)
        for name, parameter in made.named_parameters():
            if ".adapters.task." in name:
                parameter.data = torch.randn_like(parameter) * 0.3
        made.save_adapter(str(folder / f"{kind}-{safe}"), "task", use_safetensors=safe)
print(json.dumps(sorted(path.name for path in folder.iterdir())))
"""
COMPARE = """
print(json.dumps({path.name: out(path) for path in sorted(folder.iterdir())}))
"""


@pytest.mark.timeout(600)
def test_adapters_of_the_package_are_written_back_for_the_package(tmp_path: Path) -> None:
    made, copies = tmp_path / "made", tmp_path / "copies"
    made.mkdir()
    copies.mkdir()
    names = elsewhere.run(MODEL + MAKE, made)
    assert len(names) == 8
    for name in names:
        adapter = read(str(made / name), allow_pickle=name.endswith("False"))
        write(copies / name, adapter)
        if name.endswith("True"):
            for path in (made / name).iterdir():
                assert (copies / name / path.name).read_bytes() == path.read_bytes()
    assert elsewhere.run(MODEL + COMPARE, copies) == elsewhere.run(MODEL + COMPARE, made)


@pytest.mark.timeout(600)
def test_changed_bottlenecks_load_and_compute_what_they_should(tmp_path: Path) -> None:
    """Units in another order give the same outputs, up-projections of zero those of the model alone."""
    for rank in (3, 4):
        made = make_bottleneck(tmp_path / "all" / f"{rank}", seed=1, width=16, rank=rank)
        adapter = read(str(made), allow_pickle=False)
        turned, silent = {}, {}
        for site, b in adapter.sites().items():
            order = torch.randperm(rank, generator=torch.Generator().manual_seed(2))
            turned[site] = Bottleneck(b.down[order], b.down_bias[order], b.up[:, order], b.up_bias)
            silent[site] = Bottleneck(b.down, b.down_bias, b.up * 0, b.up_bias * 0)
        write(tmp_path / "all" / f"{rank} turned", with_sites(adapter, turned, "turned"))
        write(tmp_path / "all" / f"{rank} silent", with_sites(adapter, silent, "silent"))
    found = {name: torch.tensor(values) for name, values in elsewhere.run(MODEL + COMPARE, tmp_path / "all").items()}
    for rank in ("3", "4"):
        assert (found[rank] - found[f"{rank} turned"]).abs().max() < 2e-6
        assert (found[rank] - found[f"{rank} silent"]).abs().max() > 0.1
    assert torch.equal(found["3 silent"], found["4 silent"])
