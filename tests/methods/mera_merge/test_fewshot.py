"""Few-shot tuning: what is drawn, what is tuned and what is not, one step against plain torch, rows that repeat."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from methods.mera_merge import bases
from methods.mera_merge.adapterhub import make_bottleneck, make_lora
from pomona.errors import CheckFailed, DataError, MissingError, UsageError
from pomona.io.journal import Journal
from pomona.methods.mera_merge.adapters import Adapter, read, with_sites
from pomona.methods.mera_merge.bottleneck import Place, attach
from pomona.methods.mera_merge.capture import capture
from pomona.methods.mera_merge.config import FewShotOptions
from pomona.methods.mera_merge.fewshot import arms, inputs, tuning
from pomona.methods.mera_merge.fewshot.inputs import Inputs, Prefix, pooled, resume
from pomona.methods.mera_merge.fewshot.sampling import draw
from pomona.methods.mera_merge.fewshot.study import Piece, Study, examples, run_few_shot
from pomona.methods.mera_merge.fewshot.summary import spread, summarise
from pomona.methods.mera_merge.fusion_layer import FusionLayer, attach_fused, regularisation
from pomona.runtime.progress import Quiet

CPU = torch.device("cpu")
TEXTS = [
    (f"{a} {b} {c} {d}",)
    for a in ("the", "a", "we")
    for b in ("film", "soup")
    for c in ("was", "was not")
    for d in bases.WORDS[9:13]
]
LABELS = [int(("not" in text) != (text.split()[-1] in ("bad", "awful"))) for (text,) in TEXTS]


def adapter(folder: Path, case: str = "seq_bn", seed: int = 1, name: str = "task") -> Adapter:
    return read(str(bases.adapter(folder / name, case, seed=seed, name=name)), allow_pickle=False)


def file(folder: Path, texts: Sequence[tuple[str, ...]] = TEXTS, labels: Sequence[int] = LABELS, **more: Any) -> Path:
    path = folder / "examples.jsonl"
    rows = [{"text": text[0], "label": ["no", "yes"][label], **more} for text, label in zip(texts, labels, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(folder: Path, **changed: Any) -> FewShotOptions:
    given: dict[str, Any] = {
        "few_shot": file(folder),
        "shots": 4,
        "epochs": 2,
        "seeds": 2,
        "baselines": True,
        "max_length": 16,
    }
    return FewShotOptions(**{**given, **changed})


def study(folder: Path, model: Any = None, **changed: Any) -> Study:
    config = options(folder, **changed)
    two = [adapter(folder, seed=1, name="one"), adapter(folder, seed=2, name="two")]
    return Study(
        config,
        examples(config, seed=3),
        model or bases.base("bert"),
        bases.tokenizer(),
        two,
        adapter(folder, seed=4, name="merged"),
        adapter(folder, seed=5, name="average"),
        seed=3,
        batch_size=4,
    )


class Kept(dict[str, Any]):
    """Rows in memory."""

    def append(self, key: str, value: Mapping[str, Any]) -> None:
        self[key] = value


def timeless(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "timing"} for row in rows]


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_shots_are_as_many_of_every_label_and_the_rest_is_the_rest() -> None:
    labels = [0] * 10 + [1] * 7 + [2] * 30
    for number in range(5):
        found = draw(labels, ["a", "b", "c"], 6, seed=1, number=number)
        assert [sum(labels[place] == label for place in found.shots) for label in range(3)] == [6, 6, 6]
        assert sorted(found.shots + found.rest) == list(range(47))
        assert found.shots == sorted(found.shots)


def test_draws_differ_by_number_and_seed_alone_and_more_shots_keep_the_fewer() -> None:
    labels = [0, 1] * 50
    drawn = {
        (seed, number): tuple(draw(labels, ["a", "b"], 8, seed, number).shots)
        for seed in range(3)
        for number in range(3)
    }
    assert len(set(drawn.values())) == 9
    assert tuple(draw(labels, ["a", "b"], 8, 1, 2).shots) == drawn[1, 2]
    assert set(draw(labels, ["a", "b"], 4, 1, 2).shots) < set(drawn[1, 2])


def test_every_example_is_as_likely_a_shot() -> None:
    labels = [0] * 8 + [1] * 8
    counts = np.zeros(16)
    for number in range(800):
        counts[draw(labels, ["a", "b"], 2, 0, number).shots] += 1
    assert counts.sum() == 3200
    assert stats.chisquare(counts).pvalue > 1e-3


def test_too_few_examples_and_a_single_label_are_refused() -> None:
    with pytest.raises(DataError, match='label "b" has 2 examples, fewer than the 3 shots') as caught:
        draw([0, 0, 0, 1, 1], ["a", "b"], 3, 0, 0)
    assert caught.value.hint == "--shots 2 at most"
    with pytest.raises(DataError, match='all examples are labelled "a"'):
        draw([0, 0], ["a"], 1, 0, 0)


def test_tests_are_what_the_shots_leave_or_the_file_for_them(tmp_path: Path) -> None:
    config = options(tmp_path)
    found = examples(config, seed=3)
    assert found.names == ["no", "yes"]
    assert all(set(one.shots).isdisjoint(one.rest) and len(one.rest) == len(TEXTS) - 8 for one in found.draws)
    other = tmp_path / "other"
    other.mkdir()
    apart = examples(options(tmp_path, test=file(other, TEXTS[:5], LABELS[:5])), seed=3)
    assert [one.shots for one in apart.draws] == [one.shots for one in found.draws]
    assert [apart.texts[place] for place in apart.draws[0].rest] == TEXTS[:5]
    with pytest.raises(DataError, match=r"all 8 examples are shots") as caught:
        examples(options(tmp_path, few_shot=file(other, TEXTS[:8], [0, 1] * 4)), seed=3)
    assert caught.value.hint == "lower --shots, or give --test"
    with pytest.raises(DataError, match='label "no" has'):
        examples(options(tmp_path), seed=3, limit=4)


# --- what the base computes once -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("case", ["seq_bn", "double_seq_bn", "par_bn", "attention alone", "roberta", "electra"])
def test_going_on_from_what_is_kept_gives_what_the_whole_model_gives(
    tmp_path: Path, case: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bases.base(bases.CASES[case][0])
    if not kept:
        monkeypatch.setattr(inputs, "KEPT_BYTES", 0)
    texts = Inputs(bases.tokenizer(), [*TEXTS, ("good",)], max_length=6, device=CPU)
    one = adapter(tmp_path, case)
    prefix = Prefix(model, min(map(Place.of, one.sites())), texts)
    assert bool(prefix._kept) == kept
    for places in ([len(TEXTS), 0, 9, 4], [3]):
        batch = texts.batch(places)
        with attach(model, one), torch.no_grad():
            halted = prefix.at(places)
            found = resume(model, prefix.place, halted)
            expected = model(**batch).last_hidden_state
        real = batch["attention_mask"].bool()
        assert torch.equal(halted.real, real)
        torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=0)


def test_texts_are_cut_padded_and_paired_as_the_tokenizer_does(tmp_path: Path) -> None:
    tokenizer = bases.tokenizer()
    pairs = [("the film", "was good"), ("it", "was not very good")]
    texts = Inputs(tokenizer, pairs, max_length=7, device=CPU)
    expected = tokenizer(*zip(*pairs, strict=True), truncation=True, max_length=7, padding=True, return_tensors="pt")
    found = texts.batch([0, 1])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    triple = Inputs(tokenizer, [("the film", "was", "good")], max_length=16, device=CPU).batch([0])
    ids = tokenizer.convert_ids_to_tokens(triple["input_ids"][0])
    assert ids == ["[CLS]", "the", "film", "[SEP]", "was", "[SEP]", "good", "[SEP]"]


def test_pooling_is_the_mean_of_real_tokens_or_the_first() -> None:
    states = torch.arange(24.0).view(2, 3, 4)
    real = torch.tensor([[True, True, True], [True, False, False]])
    assert torch.equal(pooled(states, real, "mean"), torch.stack([states[0].mean(0), states[1, 0]]))
    assert torch.equal(pooled(states, real, "first"), states[:, 0])


@pytest.mark.parametrize("act", ["pre", "post"])
def test_activations_are_those_of_the_formula_without_padding(tmp_path: Path, act: Any) -> None:
    """At the first site, where what comes in is that of the plain base."""
    model, one = bases.base("bert"), adapter(tmp_path, "par_bn")
    seen: list[Tensor] = []
    hook = model.encoder.layer[0].output.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    batch = {"input_ids": bases.TOKENS, "attention_mask": bases.MASK}
    with torch.no_grad():
        model(**batch)
    hook.remove()
    found = capture(model, one, [batch, batch], act=act)
    x = seen[0][bases.MASK.bool()].double().numpy()
    site = one.sites()["encoder.layer.0.output"]
    expected = x @ site.down.double().numpy().T + site.down_bias.double().numpy()
    if act == "post":
        expected = np.maximum(expected, 0)
    assert found["encoder.layer.0.output"].numpy() == pytest.approx(np.concatenate([expected] * 2), abs=1e-5)
    assert {site: values.shape for site, values in found.items()} == {
        f"encoder.layer.{layer}.output": (16, 3) for layer in range(2)
    }
    with pytest.raises(DataError, match="no text"):
        capture(model, one, [], act=act)


# --- tuning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["seq_bn", "double_seq_bn"])
def test_tuning_is_what_plain_torch_does_with_the_whole_model(tmp_path: Path, case: str) -> None:
    """Three steps of AdamW written out, on the outputs of the whole model, with clipping and falling rates."""
    one, head = adapter(tmp_path, case), arms.new_head(bases.WIDTH, 2, 0, 0)
    model = bases.base("bert")
    texts = Inputs(bases.tokenizer(), TEXTS, max_length=16, device=CPU)
    own = copy.deepcopy(head)
    with attach(model, one) as attached:
        prefix = Prefix(model, min(map(Place.of, one.sites())), texts)
        network = arms.network(model, attached, head, prefix, pooling="mean", rate=1e-2)
        order = np.random.default_rng(1)
        loss = tuning.tune(network, [0, 4, 9, 13, 21, 30], LABELS, epochs=1, batch_size=2, random=order)
        found = [parameter.detach() for parameter in network.parameters()]

    with attach(model, one) as attached:
        values = [*itertools.chain(*(change.parameters() for change in attached.changes.values())), *own.parameters()]
        first, second = [torch.zeros_like(v) for v in values], [torch.zeros_like(v) for v in values]
        chosen = [[0, 4, 9, 13, 21, 30][index] for index in np.random.default_rng(1).permutation(6)]
        losses = []
        for step in range(3):
            batch = bases.tokenizer()(
                [TEXTS[p][0] for p in chosen[2 * step : 2 * step + 2]], padding=True, return_tensors="pt"
            )
            states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            logits = own((states * mask).sum(1) / mask.sum(1))
            right = [LABELS[p] for p in chosen[2 * step : 2 * step + 2]]
            objective = -torch.stack(
                [row.log_softmax(0)[label] for row, label in zip(logits, right, strict=True)]
            ).mean()
            losses.append(objective.item())
            gradients = torch.autograd.grad(objective, values)
            length = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            rate = 1e-2 * (1 - step / 3)
            with torch.no_grad():
                for value, gradient, m, v in zip(values, gradients, first, second, strict=True):
                    gradient = gradient / max(length, 1.0)
                    m.mul_(0.9).add_(0.1 * gradient)
                    v.mul_(0.999).add_(0.001 * gradient**2)
                    value.mul_(1 - rate * 0.01)
                    unbiased = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
                    value.sub_(rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8))
        assert loss == pytest.approx(sum(losses) / 3, abs=1e-5)
        assert len(found) == len(values)
        for mine, theirs in zip(found, values, strict=True):
            torch.testing.assert_close(mine, theirs.detach(), atol=1e-5, rtol=0)


def test_tests_are_counted_in_accuracy_and_nats() -> None:
    texts = Inputs(bases.tokenizer(), TEXTS, max_length=16, device=CPU)
    random = np.random.default_rng(2)
    logits = random.normal(size=(len(TEXTS), 2)) * 3
    network = tuning.Network(lambda places: torch.from_numpy(logits[list(places)]).float(), [], None, [])
    places = [7, 3, 40, 11, 22]
    accuracy, nll = tuning.test(network, texts, places, LABELS)
    right = [logits[p].argmax() == LABELS[p] for p in places]
    expected = [np.log(np.exp(logits[p]).sum()) - logits[p, LABELS[p]] for p in places]
    assert (accuracy, nll) == (np.mean(right), pytest.approx(np.mean(expected), rel=1e-6))


def test_fusion_starts_near_the_mean_of_the_changes_and_is_pulled_to_the_identity(tmp_path: Path) -> None:
    model = bases.base("bert")
    two = [adapter(tmp_path, seed=seed, name=name) for seed, name in ((1, "one"), (2, "two"))]
    with attach_fused(model, two, torch.Generator().manual_seed(0)) as attached:
        layers = [layer for layer in attached.changes.values() if isinstance(layer, FusionLayer)]
        assert len(layers) == 2
        layer = layers[0].eval()
        x = torch.randn(5, bases.WIDTH, generator=torch.Generator().manual_seed(1)) * 0.1
        with torch.no_grad():
            layer.query.weight.zero_()
            mean = (layer.adapters[0](x) + layer.adapters[1](x)) / 2
            torch.testing.assert_close(layer(x), mean, atol=1e-4, rtol=0)
            off = 2 * bases.WIDTH * (bases.WIDTH - 1) * 1e-12
            assert float(regularisation(layers)) == pytest.approx(0.01 * off, rel=1e-4)
            layer.value.weight[0, 0] += 3
            assert float(regularisation(layers)) == pytest.approx(0.09, rel=1e-4)


def test_adapters_that_compute_differently_are_not_fused(tmp_path: Path) -> None:
    pair = [adapter(tmp_path, "seq_bn", name="one"), adapter(tmp_path, "leaky", name="two")]
    with pytest.raises(DataError, match="one and two differ"):
        attach_fused(bases.base("bert"), pair, torch.Generator())


# --- arms ------------------------------------------------------------------------------------------------------------

D, R, LAYERS, LABEL_COUNT = bases.WIDTH, 3, bases.LAYERS, 2
ADAPTER = LAYERS * (2 * D * R + D + R)
HEAD = LABEL_COUNT * (D + 1)
FUSION = LAYERS * (3 * D * D + 2 * D)


def test_every_arm_tunes_what_its_name_says(tmp_path: Path) -> None:
    model = bases.base("bert")
    before = copy.deepcopy(model.state_dict())
    rows = {row["arm"]: row for row in map(study(tmp_path, model, seeds=1).measure, study(tmp_path, seeds=1).pieces())}
    whole = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("pooler."))
    assert {arm: (row["trained_parameters"], row["added_parameters"]) for arm, row in rows.items()} == {
        "merged": (ADAPTER + HEAD, ADAPTER),
        "single:one": (ADAPTER + HEAD, ADAPTER),
        "single:two": (ADAPTER + HEAD, ADAPTER),
        "average": (ADAPTER + HEAD, ADAPTER),
        "fusion": (FUSION + HEAD, 2 * ADAPTER + FUSION),
        "fresh": (ADAPTER + HEAD, ADAPTER),
        "full": (whole + HEAD, 0),
    }
    assert all(row["status"] == "done" and row["tests"] == len(TEXTS) - 8 for row in rows.values())
    assert len({row["nll"] for row in rows.values()}) == len(rows)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_without_baselines_or_an_average_there_are_fewer_arms(tmp_path: Path) -> None:
    assert study(tmp_path, baselines=False).pieces() == [Piece("merged", 0), Piece("merged", 1)]
    some = study(tmp_path)
    del some._adapters["average"]
    assert "average" not in {piece.arm for piece in some.pieces()}


def test_arms_of_a_draw_begin_with_one_head_and_fusion_keeps_its_adapters(tmp_path: Path) -> None:
    assert torch.equal(arms.new_head(8, 2, 3, 1).weight, arms.new_head(8, 2, 3, 1).weight)
    assert not torch.equal(arms.new_head(8, 2, 3, 1).weight, arms.new_head(8, 2, 3, 2).weight)
    model, two = bases.base("bert"), [adapter(tmp_path, seed=s, name=f"n{s}") for s in (1, 2)]
    texts = Inputs(bases.tokenizer(), TEXTS, max_length=16, device=CPU)
    with attach_fused(model, two, torch.Generator().manual_seed(0)) as attached:
        network = arms.network(
            model, attached, arms.new_head(D, 2, 0, 0), Prefix(model, Place(0, 1), texts), pooling="first", rate=0.1
        )
        assert network.penalty is not None
        tuning.tune(network, [0, 1, 2, 3], LABELS, epochs=2, batch_size=2, random=np.random.default_rng(0))
        for site, layer in attached.changes.items():
            assert isinstance(layer, FusionLayer)
            for held, one in zip(layer.adapters, two, strict=True):
                assert torch.equal(held.site().down, one.sites()[site].down)  # type: ignore[operator]
            assert (layer.value.weight - torch.eye(D)).abs().max() > 0.01


def test_a_fresh_adapter_is_initialised_as_its_configuration_says(tmp_path: Path) -> None:
    bert = arms.fresh(adapter(tmp_path, "seq_bn"), torch.Generator().manual_seed(0)).sites()
    values = torch.cat([torch.cat([s.down.flatten(), s.up.flatten()]) for s in bert.values()])
    assert float(values.std()) == pytest.approx(0.02, rel=0.2)
    assert not any(site.down_bias.any() or site.up_bias.any() for site in bert.values())
    like = read(str(make_bottleneck(tmp_path / "mam", seed=0, init_weights="mam_adapter")), allow_pickle=False)
    silent = arms.fresh(like, torch.Generator().manual_seed(0)).sites()
    assert all(site.down.any() and not site.up.any() for site in silent.values())
    bound = 1 / math.sqrt(8)
    assert all(float(site.down.abs().max()) <= bound for site in silent.values())


def test_what_cannot_be_tuned_is_refused_before_any_work(tmp_path: Path) -> None:
    config, model, tokenizer = options(tmp_path), bases.base("bert"), bases.tokenizer()
    data, one = examples(config, seed=3), adapter(tmp_path)

    def start(merged: Adapter, tokenizer: Any = tokenizer, config: FewShotOptions = config) -> Study:
        return Study(config, data, model, tokenizer, [one], merged, None, seed=3)

    with pytest.raises(MissingError, match="no tokenizer"):
        start(one, tokenizer=None)
    with pytest.raises(UsageError, match="--max-length is 17; the base model reads 16 tokens"):
        start(one, config=options(tmp_path, max_length=17))
    with pytest.raises(DataError, match="of kind lora"):
        start(read(str(make_lora(tmp_path / "lora", seed=0)), allow_pickle=False))
    with pytest.raises(DataError, match="the base model has 2 layers"):
        start(read(str(make_bottleneck(tmp_path / "deep", seed=0, layers=3)), allow_pickle=False))


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_the_longest_text_is_the_longest_that_the_base_reads(family: str) -> None:
    model = bases.base(family)
    most = inputs.longest(model.config)
    model(input_ids=torch.full((1, most), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, most + 1), 5))


def test_adapters_follow_the_number_format_of_the_base(tmp_path: Path) -> None:
    model = bases.base("bert").bfloat16()
    row = study(tmp_path, model, baselines=False, seeds=1).measure(Piece("merged", 0))
    assert row["status"] == "done"


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_repeat_whatever_ran_before_and_whatever_torch_has_drawn(tmp_path: Path) -> None:
    whole = run_few_shot(study(tmp_path), Kept(), Quiet(), {})
    some = study(tmp_path)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    backwards = [some.measure(piece) for piece in reversed(some.pieces())][::-1]
    assert timeless(backwards) == timeless(whole)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_interrupted_study_goes_on_and_ends_with_the_same_rows(tmp_path: Path) -> None:
    expected = run_few_shot(study(tmp_path), Kept(), Quiet(), {})

    class Broken(Quiet):
        left = 5

        def advance(self, steps: int = 1) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    path = tmp_path / "journal"
    journal = Journal(path, {}, resume=False)
    with pytest.raises(KeyboardInterrupt):
        run_few_shot(study(tmp_path), journal, Broken(), {})
    journal.close()
    journal = Journal(path, {}, resume=True)
    assert len(journal) == 5
    measured = []
    some = study(tmp_path)
    measure = some.measure
    some.measure = lambda piece: measured.append(piece) or measure(piece)  # type: ignore
    seconds: dict[str, Any] = {}
    rows = run_few_shot(some, journal, Quiet(), seconds)
    journal.close()
    assert rows == expected
    assert len(measured) == len(seconds) == len(expected) - 5
    assert all(times["tuning_seconds"] > 0 for times in seconds.values())


def test_the_tuned_adapter_is_the_one_its_row_was_measured_on(tmp_path: Path) -> None:
    some = study(tmp_path)
    row, tuned = some.measure(Piece("merged", 1)), some.tuned(1)
    start = adapter(tmp_path, seed=4, name="merged")
    assert not torch.equal(tuned.sites["encoder.layer.0.output"].down, start.sites()["encoder.layer.0.output"].down)
    model = bases.base("bert")
    texts = Inputs(bases.tokenizer(), TEXTS, max_length=16, device=CPU)
    with attach(model, with_sites(start, tuned.sites, "tuned")) as attached:
        network = arms.network(model, attached, tuned.head, Prefix(model, Place(0, 1), texts), pooling="mean", rate=1)
        accuracy, nll = tuning.test(network, texts, some.data.draws[1].rest, LABELS)
    assert (accuracy, nll) == (row["accuracy"], pytest.approx(row["nll"], rel=1e-6))


@pytest.mark.filterwarnings("ignore")
def test_an_arm_that_diverges_says_so_and_has_no_numbers(tmp_path: Path) -> None:
    some = study(tmp_path, learning_rate=1e30, baselines=False, seeds=1)
    (row,) = run_few_shot(some, Kept(), Quiet(), {})
    assert (row["status"], row["accuracy"], row["nll"]) == ("failed", None, None)
    assert "not finite" in row["reason"]
    json.dumps(row, allow_nan=False)
    (entry,) = summarise([row])
    assert entry["accuracy"] is None and "not finite" in entry["reason"]
    with pytest.raises(CheckFailed, match="could not be tuned"):
        some.tuned()


def test_tuning_learns(tmp_path: Path) -> None:
    """The loss on the shots falls below that of guessing, ln 2."""
    rows = run_few_shot(study(tmp_path, epochs=60, seeds=1, learning_rate=1e-2), Kept(), Quiet(), {})
    for row in rows:
        assert row["loss"] < (0.693 if row["arm"] == "full" else 0.67), row["arm"]


# --- what they come to -----------------------------------------------------------------------------------------------


def test_spread_is_mean_deviation_and_students_interval() -> None:
    values = [0.5, 0.75, 0.625, 0.875, 0.7]
    found = spread(values)
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["deviation"] == pytest.approx(np.std(values, ddof=1))
    assert found["half_interval"] == pytest.approx((high - low) / 2)
    assert spread([0.5]) == {"mean": 0.5, "deviation": None, "half_interval": None}


def test_arms_are_compared_with_the_merged_adapter_draw_by_draw() -> None:
    common = {"status": "done", "trained_parameters": 1, "added_parameters": 1}
    rows = [
        {"arm": arm, "draw": number, "accuracy": accuracy, "nll": nll, **common}
        for arm, measured in (("merged", [(0.9, 0.2), (0.7, 0.4)]), ("fresh", [(0.8, 0.1), (0.5, 0.7)]))
        for number, (accuracy, nll) in enumerate(measured)
    ]
    merged, fresh = summarise(rows)
    assert "behind" not in merged
    assert fresh["behind"]["accuracy"] == {key: pytest.approx(v) for key, v in spread([0.1, 0.2]).items()}
    assert fresh["behind"]["nll"]["mean"] == pytest.approx((-0.1 + 0.3) / 2)
    rows[3] |= {"status": "failed", "reason": "lost", "accuracy": None, "nll": None}
    fresh = summarise(rows)[1]
    assert (fresh["accuracy"], fresh["behind"], fresh["reason"]) == (None, None, "fresh, draw 1: lost")
