"""A BERT small enough to train in a test, its word tokenizer, and sentences whose sentiment a negation turns."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from pomona.io.labelled import Labelled

SUBJECTS = ("film", "play", "book", "song", "meal", "game")
GOOD, BAD = ("good", "great", "lovely"), ("bad", "awful", "dull")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "was", "not", "very", *SUBJECTS, *GOOD, *BAD)


def sentences() -> Labelled:
    """144 sentences, half of them "positive": the adjective decides, and "not" turns it."""
    texts, labels = [], []
    for subject, middle, word in itertools.product(
        SUBJECTS, ("was", "was very", "was not", "was not very"), GOOD + BAD
    ):
        texts.append((f"the {subject} {middle} {word}",))
        labels.append(int((word in GOOD) != ("not" in middle)))
    return Labelled(texts, labels, ["negative", "positive"])


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    places = {word: place for place, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(places, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", places["[CLS]"]), ("[SEP]", places["[SEP]"])],
    )
    special = {
        name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    }
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, model_input_names=inputs, **special)


def save_small_bert(folder: Path, head: str = "BertModel", seed: int = 0, **changed: Any) -> Path:
    """Write the model, as `head`, and its tokenizer to `folder` and return it."""
    import torch
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    model = getattr(transformers, head)(transformers.BertConfig(**{**sizes, **changed}))
    for name, parameter in model.named_parameters():  # as in a trained model, where no bias is zero
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
