"""Steps of training against formulas, the same whoever shares them, and what becomes of one that breaks off."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from methods.meo_convert.tinies import stir
from pomona.errors import CheckFailed, DataError, UsageError
from pomona.io.labelled import Labelled
from pomona.methods.meo_convert.config import TrainingOptions
from pomona.methods.meo_convert.data import Collator, Objective, encode, order
from pomona.methods.meo_convert.modeling_meo import NoisyTopK, imbalance, install
from pomona.methods.meo_convert.training import TrainingResult, evaluate, longest, train
from pomona.runtime.device import Runtime
from pomona.runtime.progress import Quiet
from small_bert import save_small_bert, sentences, tokenizer

CPU = torch.device("cpu")


def runtime(dtype: torch.dtype = torch.float32) -> Runtime:
    return Runtime(None, CPU, dtype, "a test", 1)


def options(**changed: Any) -> TrainingOptions:
    return TrainingOptions(**{"train": Path("x"), "label_field": "label", "steps": 5, "learning_rate": 1e-3, **changed})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_bert(
        tmp_path_factory.mktemp("bert"), "BertForSequenceClassification", num_labels=2, initializer_range=0.2
    )


def classifier(folder: Path, dropout: float = 0.0) -> Any:
    from transformers import BertForSequenceClassification

    sizes = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForSequenceClassification.from_pretrained(folder, num_labels=2, **sizes)


def with_experts(folder: Path, dropout: float = 0.0, **meo: Any) -> Any:
    """A classifier with four experts, of which two are selected, by gates that tell texts apart."""
    torch.manual_seed(0)
    model = install(classifier(folder, dropout), {"level": "sequence", "experts": 4, "selected": 2, **meo})
    stir(model)
    return model


def trained(model: Any, labelled: Labelled | None = None, **changed: Any) -> TrainingResult:
    labelled = labelled or sentences()
    seed, batch_size = changed.pop("seed", 0), changed.pop("batch_size", 16)
    test = Labelled(labelled.texts[::7], labelled.labels[::7], labelled.names)
    return train(
        model, tokenizer(), labelled, test, options(**changed), runtime(), Quiet(), seed=seed, batch_size=batch_size
    )


# --- steps -----------------------------------------------------------------------------------------------------------


def by_formula(model: Any, labelled: Labelled, steps: int, rate: float, weight: float) -> list[float]:
    """The whole batch at once in float64, gradients by autograd and everything after them written out."""
    model = model.double().train()
    words = tokenizer()
    values = dict(model.named_parameters())
    mean = {name: torch.zeros_like(value) for name, value in values.items()}
    square = {name: torch.zeros_like(value) for name, value in values.items()}
    places = order(len(labelled.texts), 0, steps * 16)
    losses = []
    for step in range(steps):
        chosen = places[step * 16 : step * 16 + 16]
        batch = words([labelled.texts[place][0] for place in chosen], padding=True, return_tensors="pt")
        model.zero_grad()
        loss = functional.cross_entropy(model(**batch).logits, torch.tensor([labelled.labels[p] for p in chosen]))
        losses.append(loss.item())
        for gate in (module for module in model.modules() if isinstance(module, NoisyTopK)):
            for tally in gate.balance:
                loss = loss + weight * ((tally - tally.mean()) ** 2).sum() / (len(tally) - 1) / tally.mean() ** 2
        loss.backward()
        gradients = {name: value.grad for name, value in values.items() if value.grad is not None}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        with torch.no_grad():
            for name, gradient in gradients.items():
                g = gradient * min(1.0, 1.0 / norm)
                mean[name] = 0.9 * mean[name] + 0.1 * g
                square[name] = 0.999 * square[name] + 0.001 * g**2
                decay = 0.0 if name.endswith("bias") or "LayerNorm" in name else 0.1
                eta = rate * (1 - step / steps)
                m, v = mean[name] / (1 - 0.9 ** (step + 1)), square[name] / (1 - 0.999 ** (step + 1))
                values[name].mul_(1 - eta * decay).sub_(eta * m / (v.sqrt() + 1e-8))
    return losses


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_steps_are_those_of_adamw_on_the_whole_batch_with_the_balance_of_its_sums(
    weight: float, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards, but CV² of the batch's sums is not the sum of the shards' CV². No noise, which would differ."""
    monkeypatch.setattr(NoisyTopK, "_normal", lambda gate, like: torch.zeros_like(like))
    model = with_experts(folder)
    reference = with_experts(folder)
    start = [value.detach().clone() for value in model.parameters()]
    result = trained(model, steps=4, balance=weight, learning_rate=3e-3)
    losses = by_formula(reference, sentences(), 4, 3e-3, weight)
    assert result.losses == pytest.approx(losses, abs=2e-6)
    expected = dict(reference.named_parameters())
    for (name, value), before in zip(model.named_parameters(), start, strict=True):
        if name.endswith("key.bias"):
            continue  # softmax does not see it: its gradient is rounding, of which Adam takes the sign
        moved, due = value.detach().double() - before, expected[name].detach() - before
        # Adam takes the sign of gradients near 0 as well, so a few numbers may go astray.
        assert (moved - due).norm() <= 0.01 * due.norm() + 1e-9, name
    assert len(result.balances) == (4 if weight else 0)


def test_the_imbalance_is_the_squared_coefficient_of_variation() -> None:
    tally = np.random.default_rng(0).random((2, 5))
    expected = sum(row.var(ddof=1) / (row.mean() ** 2 + 1e-10) for row in tally)
    assert float(imbalance(torch.tensor(tally))) == pytest.approx(expected, rel=1e-6)
    assert float(imbalance(torch.full((2, 4), 3.0))) == 0
    assert float(imbalance(torch.ones(2, 1))) == 0  # one expert has no variance


def test_the_balance_counts_in_training_alone(folder: Path) -> None:
    found = [trained(with_experts(folder), steps=1, balance=balance) for balance in (0.0, 50.0)]
    assert found[0].before == found[1].before and found[0].losses == found[1].losses
    assert found[0].balances == () and found[1].balances[0] > 0


def test_a_task_has_no_balance(folder: Path) -> None:
    result = trained(with_experts(folder, level="task", task_tokens=[5, 6, 9]), balance=1.0)
    assert result.balances == ()


@pytest.mark.parametrize("level", ["sequence", "task"])
def test_a_merge_and_a_mixture_of_linear_experts_take_the_same_steps(level: str, folder: Path) -> None:
    """Same data, same parameters to begin with, same noise: what differs is the order of sums."""
    found = [
        trained(with_experts(folder, run_as=run_as, level=level, task_tokens=[5, 6]), steps=8)
        for run_as in ("meo", "moe")
    ]
    assert found[0].losses == pytest.approx(found[1].losses, abs=1e-4)
    assert found[0].losses != found[1].losses


@pytest.mark.parametrize("level", ["sequence", "token", "task"])
def test_gates_experts_and_token_blocks_all_learn(level: str, folder: Path) -> None:
    model = with_experts(folder, level=level, task_tokens=[5, 6])
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trained(model, steps=3, balance=0.01)
    still = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    assert not still


def test_the_same_seed_gives_the_same_bits_and_another_others(folder: Path) -> None:
    found = []
    for seed in (1, 1, 2):
        model = with_experts(folder, dropout=0.1)
        torch.manual_seed(len(found))  # whatever came before
        result = trained(model, seed=seed)
        found.append((result.losses, [value.clone() for value in model.parameters()]))
    assert found[0][0] == found[1][0] and found[0][0] != found[2][0]
    assert all(torch.equal(one, two) for one, two in zip(found[0][1], found[1][1], strict=True))


def test_the_streams_of_others_are_left_alone(folder: Path) -> None:
    model = with_experts(folder, dropout=0.1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trained(model)
    assert torch.equal(torch.rand(3), expected)


def test_a_small_bert_learns_to_negate(folder: Path) -> None:
    result = trained(classifier(folder), steps=250, learning_rate=3e-3)
    assert result.before.accuracy < 0.7 and result.after.accuracy >= 0.95
    assert result.after.nll < result.before.nll / 3
    assert (result.names, result.texts, result.tested) == (("negative", "positive"), 144, 21)
    assert result.after.perplexity is None


# --- measuring -------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_each_text_alone(folder: Path) -> None:
    model, texts, words = classifier(folder), sentences(), tokenizer()
    examples = encode(texts, words, "classification", 64)
    found = evaluate(model.train(), examples, Collator.of("classification", words, CPU), runtime(), seed=0)
    losses, right = [], 0
    with torch.no_grad():
        for (text,), label in zip(texts.texts, texts.labels, strict=True):
            logits = model(**words(text, return_tensors="pt")).logits[0].double().numpy()
            losses.append(np.log(np.exp(logits).sum()) - logits[label])
            right += int(logits.argmax() == label)
    assert found.nll == pytest.approx(np.mean(losses), abs=1e-6)
    assert (found.accuracy, found.predicted, found.perplexity) == (right / 144, 144, None)


def test_the_perplexity_of_a_causal_model_is_that_of_its_tokens(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, words = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    texts = Labelled([("Rain fell.",), ("It fell on the hills and on the sea.",)], [], [])
    examples = encode(texts, words, "causal", 30)
    found = evaluate(model, examples, Collator.of("causal", words, CPU), runtime(), seed=0)
    losses: list[float] = []
    with torch.no_grad():
        for entry in examples.inputs:
            ids = entry["input_ids"]
            logits = model(torch.tensor([ids])).logits[0].double().numpy()
            losses.extend(np.log(np.exp(row).sum()) - row[after] for row, after in zip(logits, ids[1:], strict=False))
    assert found.predicted == len(losses) == 10 + 29  # "Rain fell." and its end; 30 of 36 characters, no end
    assert found.nll == pytest.approx(np.mean(losses), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_language_models_learn_the_texts(kind: Objective, tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    if kind == "causal":
        model, words = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    else:
        save_small_bert(tmp_path, "BertForMaskedLM", initializer_range=0.2)
        model, words = AutoModelForMaskedLM.from_pretrained(tmp_path), tokenizer()
    texts = Labelled(sentences().texts, [], [])
    test = Labelled(texts.texts[::5], [], [])
    chosen = options(steps=40, learning_rate=5e-3, label_field=None)
    found = train(model, words, texts, test, chosen, runtime(), Quiet(), seed=0)
    assert found.objective == kind and found.before.perplexity and found.after.perplexity
    assert found.after.perplexity < found.before.perplexity / 2
    assert model.config.use_cache is True


def test_no_text_is_longer_than_the_model_has_positions() -> None:
    from transformers import BertConfig, GPT2Config, RobertaConfig, T5Config

    words = tokenizer()
    words.model_max_length = 10**30
    assert longest(BertConfig(max_position_embeddings=40), words, 128) == 40
    assert longest(GPT2Config(n_positions=50), words, 128) == 50
    assert longest(RobertaConfig(max_position_embeddings=66, pad_token_id=1), words, 128) == 64
    assert longest(T5Config(), words, 128) == 128
    words.model_max_length = 12
    assert longest(T5Config(), words, 128) == 12


# --- faults ----------------------------------------------------------------------------------------------------------


class Poisoned(nn.Module):
    """Passes its input on, but for one call, and its gradient, but for another; remembers `watched` at every call."""

    def __init__(self, watched: Tensor, forward: int | None, backward: int | None = None) -> None:
        super().__init__()
        self.at, self.seen = (forward, backward), list[Tensor]()
        self.watched = (watched,)  # in a tuple, it is no parameter of this module

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        self.seen.append(self.watched[0].detach().clone())
        if len(self.seen) == self.at[0]:
            return x * math.nan
        if len(self.seen) == self.at[1]:
            x.register_hook(lambda gradient: gradient * math.inf)
        return x


@pytest.mark.parametrize(
    ("forward", "backward", "message", "kept"),
    [
        (13, None, "the loss was not finite at step 7; the last weights kept are those of step 4", 4),
        (None, 13, "the gradient was not finite at step 7; the last weights kept are those of step 6", 6),
        (1, None, "the loss was not finite at step 1; the last weights kept are those of step 0", 0),
    ],
)
def test_a_course_that_breaks_off_says_where_and_leaves_the_last_good_weights(
    forward: int | None, backward: int | None, message: str, kept: int, folder: Path
) -> None:
    """Two shards a step: the thirteenth pass is in the seventh step. Of 20 steps, those of every second are kept."""
    model = classifier(folder)
    model.dropout = Poisoned(model.classifier.weight, forward, backward)
    with pytest.raises(CheckFailed) as caught:
        trained(model, steps=20)
    assert caught.value.message == message and "--learning-rate" in (caught.value.hint or "")
    assert torch.equal(model.classifier.weight, model.dropout.seen[2 * kept])


def test_weights_that_overflow_are_caught(folder: Path) -> None:
    model = classifier(folder)
    with pytest.raises(CheckFailed, match="not finite"):
        trained(model, steps=6, learning_rate=1e38)
    assert all(value.isfinite().all() for value in model.parameters())


def test_labels_must_suit(folder: Path) -> None:
    model, texts = classifier(folder), sentences()
    one = Labelled(texts.texts[:4], [0] * 4, ["negative"])
    with pytest.raises(DataError, match="every text has the label negative"):
        trained(model, one)
    three = Labelled(texts.texts[:4], [0, 1, 2, 0], ["a", "b", "c"])
    with pytest.raises(DataError, match="tells 2 classes apart, the texts have 3"):
        trained(model, three)
    with pytest.raises(DataError, match="other labels"):
        test = Labelled(texts.texts, texts.labels, ["positive", "negative"])
        train(model, tokenizer(), texts, test, options(), runtime(), Quiet(), seed=0)


def test_float16_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="float16"):
        train(
            classifier(folder),
            tokenizer(),
            sentences(),
            sentences(),
            options(),
            runtime(torch.float16),
            Quiet(),
            seed=0,
        )


def test_bfloat16_products_still_train_float32_weights(folder: Path) -> None:
    model = classifier(folder)
    texts = sentences()
    found = train(model, tokenizer(), texts, texts, options(steps=3), runtime(torch.bfloat16), Quiet(), seed=0)
    exact = trained(classifier(folder), steps=3)
    assert found.losses == pytest.approx(exact.losses, rel=0.05) and found.losses != exact.losses
    assert {value.dtype for value in model.parameters()} == {torch.float32}
