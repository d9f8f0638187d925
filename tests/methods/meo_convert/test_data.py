"""What is to be predicted of each text, and nothing else, reaches the loss."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pomona.errors import DataError, UsageError
from pomona.io.labelled import Labelled
from pomona.methods.meo_convert.data import IGNORED, Collator, Objective, encode, objective, order, split
from small_bert import WORDS, sentences, tokenizer

CPU = torch.device("cpu")
PAD, CLS, SEP, MASK = (WORDS.index(name) for name in ("[PAD]", "[CLS]", "[SEP]", "[MASK]"))


def labelled(*texts: str) -> Labelled:
    return Labelled([(text,) for text in texts], [], [])


def words(*texts: str) -> list[list[int]]:
    return [[CLS, *(WORDS.index(word) for word in text.split()), SEP] for text in texts]


def collator(kind: Objective) -> Collator:
    return Collator.of(kind, tokenizer(), CPU)


def test_a_batch_of_classes_is_padded_behind_and_attention_ends_with_the_text() -> None:
    texts = Labelled([("the film was good",), ("the play",)], [1, 0], ["no", "yes"])
    examples = encode(texts, tokenizer(), "classification", 64)
    batch = collator("classification").batch(examples, [1, 0], [0, 0])
    short, long = words("the play", "the film was good")
    assert batch.inputs["input_ids"].tolist() == [short + [PAD] * 2, long]
    assert batch.inputs["attention_mask"].tolist() == [[1] * 4 + [0] * 2, [1] * 6]
    assert batch.labels.tolist() == [0, 1] and batch.predicted == 2


def test_the_second_of_two_segments_is_told_from_the_first() -> None:
    texts = Labelled([("the film", "not good")], [0], ["no", "yes"])
    batch = collator("classification").batch(encode(texts, tokenizer(), "classification", 64), [0], [0])
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]


def test_a_long_text_is_cut_with_its_last_token_kept_and_counted() -> None:
    examples = encode(labelled("the film was very good", "the film"), tokenizer(), "classification", 5)
    assert examples.inputs[0]["input_ids"] == [*words("the film was")[0]]
    assert (examples.truncated, examples.length(0), examples.length(1)) == (1, 5, 4)


def ending() -> Any:
    """A tokenizer whose texts begin with nothing and end with "[SEP]", as those of causal models."""
    from tokenizers import processors

    made = tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    made.eos_token = "[SEP]"
    made.pad_token = None
    return made


def test_a_causal_model_predicts_every_token_but_the_first_and_the_end_where_it_is_seen() -> None:
    examples = encode(labelled("the film was good", "the play"), ending(), "causal", 4)
    batch = Collator.of("causal", ending(), CPU).batch(examples, [0, 1], [0, 0])
    the, film, was, good, play = (WORDS.index(word) for word in ("the", "film", "was", "good", "play"))
    assert batch.inputs["input_ids"].tolist() == [[the, film, was, good], [the, play, SEP, SEP]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.labels.tolist() == [[IGNORED, film, was, good], [IGNORED, play, SEP, IGNORED]]
    assert batch.predicted == 5


def test_hidden_tokens_are_predicted_and_no_others() -> None:
    text = " ".join(["the film was very good"] * 12)
    examples = encode(labelled(text, "the film"), tokenizer(), "masked", 64)
    batch = collator("masked").batch(examples, [0, 1], [7, 8])
    clean = [examples.inputs[0]["input_ids"], examples.inputs[1]["input_ids"] + [PAD] * 58]
    for seen, label, original in zip(batch.inputs["input_ids"].tolist(), batch.labels.tolist(), clean, strict=True):
        for token, target, true in zip(seen, label, original, strict=True):
            assert token == true if target == IGNORED else target == true not in (CLS, SEP, PAD)
    # 15 % of 60 words; of the two words of the short one, one
    assert [(row != IGNORED).sum().item() for row in batch.labels] == [9, 1]


def test_of_the_hidden_tokens_80_percent_are_masked_and_10_percent_random() -> None:
    examples = encode(labelled(" ".join(["film"] * 60)), tokenizer(), "masked", 64)
    fates: Counter[str] = Counter()
    for seed in range(400):
        batch = collator("masked").batch(examples, [0], [seed])
        for token in batch.inputs["input_ids"][batch.labels != IGNORED].tolist():
            fates["mask" if token == MASK else "same" if token == WORDS.index("film") else "random"] += 1
    total = sum(fates.values())
    assert total == 400 * 9
    # A random token is the same or the mask twice in 21; five standard deviations are 0.034.
    assert fates["mask"] / total == pytest.approx(0.8 + 0.1 / len(WORDS), abs=0.034)
    assert fates["random"] / total == pytest.approx(0.1 * (1 - 2 / len(WORDS)), abs=0.026)


def test_what_is_hidden_depends_on_the_texts_own_seed_alone() -> None:
    examples = encode(sentences(), tokenizer(), "masked", 64)
    both = collator("masked").batch(examples, [3, 90], [5, 6])
    alone = collator("masked").batch(examples, [90], [6])
    width = alone.labels.shape[1]
    assert both.labels[1, :width].tolist() == alone.labels[0].tolist()
    assert both.inputs["input_ids"][1, :width].tolist() == alone.inputs["input_ids"][0].tolist()


@pytest.mark.parametrize(("kind", "text"), [("causal", "film"), ("masked", "")])
def test_a_text_with_nothing_to_predict_is_named(kind: Objective, text: str) -> None:
    made = ending() if kind == "causal" else tokenizer()
    made.eos_token = None
    with pytest.raises(DataError, match=r"text 2 has \d tokens?: there is nothing to predict"):
        encode(labelled("the film", text), made, kind, 64)


def test_a_tokenizer_that_cannot_pad_or_hide_is_refused() -> None:
    bare = ending()
    bare.eos_token = None
    with pytest.raises(DataError, match="neither a padding token nor an end token"):
        Collator.of("causal", bare, CPU)
    blind = tokenizer()
    blind.mask_token = None
    with pytest.raises(DataError, match="no mask token"):
        Collator.of("masked", blind, CPU)


class _Model:
    def __init__(self, encoder_decoder: bool = False) -> None:
        self.config = SimpleNamespace(is_encoder_decoder=encoder_decoder, model_type="some")


class SomeForCausalLM(_Model):
    pass


class SomeLMHeadModel(_Model):
    pass


class SomeForMaskedLM(_Model):
    pass


class Derived(SomeForMaskedLM):
    pass


def test_labels_decide_what_is_learnt_then_the_head() -> None:
    assert objective(_Model(True), sentences()) == "classification"
    assert [objective(kind(), labelled("a")) for kind in (SomeForCausalLM, SomeLMHeadModel)] == ["causal"] * 2
    assert [objective(kind(), labelled("a")) for kind in (SomeForMaskedLM, Derived)] == ["masked"] * 2
    with pytest.raises(UsageError, match="no language-modelling head"):
        objective(_Model(), labelled("a"))
    with pytest.raises(UsageError, match="turns a text into another"):
        objective(SomeForCausalLM(True), labelled("a"))


@given(count=st.integers(2, 60), seed=st.integers(0, 9))
def test_a_tenth_is_held_out_and_nothing_is_lost(count: int, seed: int) -> None:
    texts = Labelled([(str(place),) for place in range(count)], [place % 3 for place in range(count)], ["a", "b", "c"])
    learned, held = split(texts, seed)
    assert len(held.texts) == max(1, count // 10)
    assert sorted(int(text) for (text,) in learned.texts + held.texts) == list(range(count))
    assert all(
        label == int(text) % 3
        for part in (learned, held)
        for (text,), label in zip(part.texts, part.labels, strict=True)
    )
    assert learned.names == held.names == texts.names


def test_one_text_cannot_be_split() -> None:
    with pytest.raises(DataError, match="one text cannot") as caught:
        split(labelled("the film"), 0)
    assert caught.value.hint == "give a file with --test"


@given(count=st.integers(1, 20), seed=st.integers(0, 9), needed=st.integers(1, 70))
def test_every_text_comes_once_before_any_comes_again(count: int, seed: int, needed: int) -> None:
    places = order(count, seed, needed)
    assert len(places) == needed
    for start in range(0, needed, count):
        passed = places[start : start + count]
        assert len(set(passed)) == len(passed) and set(passed) <= set(range(count))


def test_the_order_is_the_seeds() -> None:
    assert order(50, 1, 50) == order(50, 1, 60)[:50] != order(50, 2, 50)


def test_a_saved_tokenizer_pads_as_before(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer().save_pretrained(tmp_path)
    assert Collator.of("masked", AutoTokenizer.from_pretrained(tmp_path), CPU) == collator("masked")
