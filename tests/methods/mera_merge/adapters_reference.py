"""What the package `adapters` computes; run in an environment that has it, which this project's cannot.

Usage: python adapters_reference.py WORK.json

The file holds a list of ``{"name", "model", "adapters", "fusion", "tokens", "mask"}``: directories of the base and of
the adapters, and a safetensors file with AdapterFusion's parameters by site, or null. Prints last hidden states by
name as JSON.
"""

import json
import sys
from pathlib import Path

import adapters
import torch
from adapters.composition import Fuse
from safetensors.torch import load_file
from transformers import AutoModel


@torch.no_grad()
def main() -> None:
    found = {}
    for work in json.loads(Path(sys.argv[1]).read_text()):
        model = AutoModel.from_pretrained(work["model"])
        adapters.init(model)
        names = [
            model.load_adapter(path, load_as=f"a{i}", use_safetensors=True) for i, path in enumerate(work["adapters"])
        ]
        if work["fusion"]:
            setup = Fuse(*names)
            model.add_adapter_fusion(setup)
            given = load_file(work["fusion"])
            state = model.state_dict()
            for key, value in given.items():
                site, part = key.rsplit(".", 2)[0], ".".join(key.rsplit(".", 2)[1:])
                state[f"{site}.adapter_fusion_layer.{','.join(names)}.{part}"].copy_(value)
            model.set_active_adapters(setup)
        else:
            model.set_active_adapters(names[0])
        model.eval()
        tokens, mask = torch.tensor(work["tokens"]), torch.tensor(work["mask"])
        states = model(input_ids=tokens, attention_mask=mask).last_hidden_state
        found[work["name"]] = states.double().tolist()
    json.dump(found, sys.stdout)


main()
