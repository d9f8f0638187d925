"""Small base models with parameters that depend on nothing but this file, and adapters for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel

from methods.mera_merge.adapterhub import make_bottleneck

LAYERS, WIDTH = 2, 8
TOKENS = torch.tensor([[5, 17, 3, 22, 9], [7, 11, 4, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])

DOUBLE: dict[str, Any] = {"mh_adapter": True, "original_ln_before": False, "non_linearity": "swish"}
PARALLEL: dict[str, Any] = {"is_parallel": True, "original_ln_before": False, "scaling": 4.0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "seq_bn": ("bert", {}),
    "double_seq_bn": ("bert", DOUBLE),
    "par_bn": ("bert", PARALLEL),
    "parallel at both places": ("bert", {**PARALLEL, "mh_adapter": True}),
    "residual after the norm": ("bert", {"residual_before_ln": False}),
    "residual after the sum": ("bert", {"residual_before_ln": "post_add"}),
    "no norm after": ("bert", {"residual_before_ln": False, "original_ln_after": False}),
    "attention alone": ("bert", {"mh_adapter": True, "output_adapter": False}),
    "gelu, scaled": ("bert", {"non_linearity": "gelu", "scaling": 0.5}),
    "leaky": ("bert", {"non_linearity": "leakyrelu"}),
    "first layer left out": ("bert", {"leave_out": [0]}),
    "roberta": ("roberta", {}),
    "roberta, double": ("roberta", DOUBLE),
    "xlm-roberta": ("xlm-roberta", {}),
    "electra": ("electra", {}),
}


def base(family: str) -> Any:
    """A BERT-like model of `LAYERS` layers and width `WIDTH`, in evaluation mode."""
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "vocab_size": 32, "max_position_embeddings": 16, "pad_token_id": 1}
    if family == "electra":
        sizes["embedding_size"] = 4
    model = AutoModel.from_config(AutoConfig.for_model(family, **sizes)).eval().requires_grad_(False)
    random = np.random.Generator(np.random.Philox(7))
    for name, parameter in sorted(model.named_parameters()):
        values = random.normal(size=tuple(parameter.shape)) * 0.3
        parameter.copy_(torch.from_numpy(values + (name.endswith("LayerNorm.weight"))))
    return model


def adapter(folder: Path, case: str, *, seed: int = 1, name: str = "task") -> Path:
    """The directory of an adapter as `CASES` says."""
    family, settings = CASES[case]
    made = make_bottleneck(folder, seed=seed, layers=LAYERS, width=WIDTH, rank=3, name=name, **settings)
    prefix = {"xlm-roberta": "roberta"}.get(family, family)
    tensors = {
        key.replace("bert.", f"{prefix}.", 1): value for key, value in load_file(made / "adapter.safetensors").items()
    }
    left_out = settings.get("leave_out", [])
    tensors = {key: value for key, value in tensors.items() if not any(f"layer.{n}." in key for n in left_out)}
    save_file(tensors, made / "adapter.safetensors")
    return made


def fusion(sites: Sequence[str]) -> dict[str, Tensor]:
    """Queries, keys and values of an AdapterFusion, by site and AdapterHub's names of them."""
    random = np.random.Generator(np.random.Philox(11))
    found = {}
    for site in sites:
        for part, shape in (("query", (WIDTH, WIDTH)), ("key", (WIDTH, WIDTH)), ("value", (WIDTH, WIDTH))):
            found[f"{site}.{part}.weight"] = torch.from_numpy(random.normal(size=shape)).float()
        for part in ("query", "key"):
            found[f"{site}.{part}.bias"] = torch.from_numpy(random.normal(size=WIDTH)).float()
    return found


def golden() -> dict[str, Any]:
    """Last hidden states by case, from `adapters` 1.3.0; see ``adapters_reference.py``."""
    found: dict[str, Any] = json.loads((Path(__file__).parent / "golden_bottleneck.json").read_text())
    return found


WORDS = "the a film room soup was is not never good bad great awful we found it very quite and but".split()


def tokenizer() -> Any:
    """One that knows `WORDS`, pairs, and the special tokens of the BERT family."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["[CLS]", "[PAD]", "[SEP]", "[UNK]", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        cls_token="[CLS]",
        pad_token="[PAD]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
