"""What a directory holds is what is loaded: whole, with the head it has or is to have, and without running its code."""

from __future__ import annotations

import json
import logging
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from methods.meo_convert import mixtures
from methods.meo_convert.tinies import DENSE
from methods.meo_convert.upcycled import convert, outputs, save_dense
from pomona.errors import DataError, MissingError, OutputError, UsageError
from pomona.methods.meo_convert.loading import load, save
from pomona.methods.meo_convert.modeling_meo import MergedExperts, MergedLinear
from small_bert import save_small_bert

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 11, 3, 18, 7], [4, 4, 12, 6, 8, 20]])


def loaded(folder: Path, **options: Any) -> Any:
    return load(folder, dtype=torch.float32, device=CPU, **options)[0]


def configured(folder: Path, **changed: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def without(folder: Path, *names: str, **more: torch.Tensor) -> None:
    held = load_file(folder / "model.safetensors")
    for name in names:
        del held[name]
    save_file(held | more, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def meo(tmp_path: Path) -> Path:
    convert(save_dense(tmp_path / "dense", "bert"), tmp_path / "meo", level="token", init="noise:0.1")
    return tmp_path / "meo"


# --- what is loaded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "llama"])
def test_a_dense_model_is_what_transformers_loads(family: str, tmp_path: Path) -> None:
    import transformers

    save_dense(tmp_path, family)
    found = loaded(tmp_path)
    reference = getattr(transformers, DENSE[family][0]).from_pretrained(tmp_path)
    assert type(found) is type(reference) and not found.training
    assert torch.equal(outputs(found, IDS), outputs(reference, IDS))


def test_a_mixture_and_one_whose_experts_are_merged_are_told_apart(tmp_path: Path) -> None:
    source = mixtures.save(mixtures.make("mixtral"), tmp_path / "in")
    convert(source, tmp_path / "out")
    kinds = [any(isinstance(m, MergedExperts) for m in loaded(tmp_path / name).modules()) for name in ("in", "out")]
    assert kinds == [False, True]
    assert not torch.equal(outputs(loaded(tmp_path / "in"), IDS), outputs(loaded(tmp_path / "out"), IDS))


def test_without_an_architecture_it_is_the_model_without_a_head(tmp_path: Path) -> None:
    save_small_bert(tmp_path, "BertModel")
    configured(tmp_path, architectures=None)
    assert type(loaded(tmp_path)).__name__ == "BertModel"


def test_weights_have_the_number_format_asked_for(meo: Path) -> None:
    model, _ = load(meo, dtype=torch.bfloat16, device=CPU)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


def test_there_may_be_no_tokenizer(meo: Path) -> None:
    assert load(meo, dtype=torch.float32, device=CPU)[1]("the film")["input_ids"]
    for file in meo.glob("token*"):
        file.unlink()
    assert load(meo, dtype=torch.float32, device=CPU)[1] is None


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "qwen3_moe", "mixtral"])
def test_saved_loaded_and_saved_again_is_the_same_to_the_byte(family: str, tmp_path: Path) -> None:
    if family in DENSE:
        source = save_dense(tmp_path / "in", family)
    else:
        source = mixtures.save(mixtures.make(family), tmp_path / "in")
    convert(source, tmp_path / "meo", level="token", **({"init": "noise:0.1"} if family in DENSE else {}))
    for before, after in (("meo", "one"), ("one", "two")):
        model, tokenizer = load(tmp_path / before, dtype=torch.float32, device=CPU)
        (tmp_path / after).mkdir()
        save(model, tokenizer, tmp_path / after, dtype=torch.float32)
    assert torch.equal(outputs(loaded(tmp_path / "two"), IDS), outputs(loaded(tmp_path / "meo"), IDS))
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and "modeling_meo.py" in one
    tensors, again = (load_file(tmp_path / name / "model.safetensors") for name in ("meo", "one"))
    assert tensors.keys() == again.keys() and all(torch.equal(tensors[name], again[name]) for name in tensors)


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "bart", "t5"])
def test_labels_give_a_head_that_the_seed_draws_on_the_same_body(family: str, tmp_path: Path) -> None:
    convert(save_dense(tmp_path / "dense", family), tmp_path / "meo", init="noise:0.1")
    body = dict(loaded(tmp_path / "meo").named_parameters())
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(99 + len(heads))
        model = loaded(tmp_path / "meo", labels=["no", "perhaps", "yes"], seed=seed)
        assert model.config.num_labels == 3 and model.config.id2label == {0: "no", 1: "perhaps", 2: "yes"}
        assert any(isinstance(module, MergedLinear) for module in model.modules())
        named = {
            name.removeprefix("transformer.") if family == "t5" else name: v for name, v in model.named_parameters()
        }
        shared = {name: value for name, value in named.items() if name in body}
        assert shared and all(torch.equal(value, body[name]) for name, value in shared.items())
        heads.append(torch.cat([value.flatten() for name, value in named.items() if name not in body]))
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_decoders_head_finds_the_end_of_a_padded_text(tmp_path: Path) -> None:
    convert(save_dense(tmp_path / "dense", "llama", pad_token_id=None), tmp_path / "meo")
    model, tokenizer = load(tmp_path / "meo", dtype=torch.float32, device=CPU, labels=["no", "yes"])
    both = tokenizer(["the film", "the film was not very good"], padding=True, return_tensors="pt")
    alone = tokenizer(["the film"], return_tensors="pt")
    for batch in (both, alone):
        batch.pop("token_type_ids")
    with torch.no_grad():
        found, expected = model(**both).logits[0], model(**alone).logits[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_head_for_these_labels_is_kept_and_one_for_others_drawn_anew(meo: Path, tmp_path: Path) -> None:
    model, tokenizer = load(meo, dtype=torch.float32, device=CPU, labels=["no", "yes"], seed=1)
    (tmp_path / "trained").mkdir()
    save(model, tokenizer, tmp_path / "trained", dtype=torch.float32)
    again = loaded(tmp_path / "trained")
    assert type(again).__name__ == "BertForSequenceClassification"
    assert torch.equal(
        loaded(tmp_path / "trained", labels=["no", "yes"], seed=2).classifier.weight, model.classifier.weight
    )
    other = loaded(tmp_path / "trained", labels=["a", "b", "c"], seed=2)
    assert other.classifier.weight.shape == (3, 16)


def test_a_mixture_without_a_classification_head_says_so(tmp_path: Path) -> None:
    source = mixtures.save(mixtures.make("olmoe"), tmp_path)
    with pytest.raises(UsageError, match="no classification head for olmoe"):
        loaded(source, labels=["no", "yes"])


# --- what is refused -------------------------------------------------------------------------------------------------


def test_code_in_the_directory_is_not_run(meo: Path, tmp_path: Path) -> None:
    (meo / "modeling_meo.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (meo / "configuration.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    configured(meo, auto_map={"AutoConfig": "configuration.Config", "AutoModelForMaskedLM": "modeling_meo.Any"})
    assert type(loaded(meo)).__name__ == "BertForMaskedLM"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "pipeline", "Trainer", "BertTokenizer", "__name__", 7])
def test_an_architecture_that_is_none_of_the_familys_is_refused(name: Any, meo: Path) -> None:
    configured(meo, architectures=[name])
    with pytest.raises(DataError, match=f"the architecture {name}, which is none of bert"):
        loaded(meo)


@pytest.mark.parametrize("block", [7, [], {"level": "word"}, {"experts": "many"}, {"experts": 2, "selected": 3}])
def test_a_block_that_makes_no_sense_is_refused(block: Any, meo: Path) -> None:
    configured(meo, meo=block)
    with pytest.raises(DataError, match=r"config\.json"):
        loaded(meo)


PLACE = "bert.encoder.layer.1.output.dense"


@pytest.mark.parametrize("labels", [(), ("no", "yes")])
@pytest.mark.parametrize("name", [f"{PLACE}.gate.weight", f"{PLACE}.weight", "bert.embeddings.LayerNorm.weight"])
def test_a_missing_weight_is_named_and_not_left_random(name: str, labels: tuple[str, ...], meo: Path) -> None:
    without(meo, name)
    with pytest.raises(MissingError, match="missing"):
        loaded(meo, labels=labels)


@pytest.mark.parametrize("labels", [(), ("no", "yes")])
def test_experts_are_not_passed_over_where_config_json_does_not_tell_of_them(
    labels: tuple[str, ...], meo: Path
) -> None:
    configured(meo, meo=None)
    with pytest.raises(MissingError, match="weights are missing or have another shape, among them"):
        loaded(meo, labels=labels)


@pytest.mark.parametrize("labels", [(), ("no", "yes")])
def test_weights_of_experts_that_nothing_takes_are_refused(labels: tuple[str, ...], tmp_path: Path) -> None:
    source = mixtures.save(mixtures.make("mixtral"), tmp_path)
    without(source, **{"model.layers.1.block_sparse_moe.experts.9.w1.weight_scale": torch.ones(3)})
    with pytest.raises(MissingError, match="1 weights of experts would be passed over, among them"):
        loaded(source, labels=labels)


def test_other_weights_that_nothing_takes_are_the_sources_own_affair(meo: Path) -> None:
    without(meo, **{"cls.seq_relationship.weight": torch.ones(2, 16)})
    loaded(meo)


@pytest.mark.parametrize("damage", ["cut", "pickle", "no config", "no weights"])
def test_a_damaged_directory_is_one_line(damage: str, meo: Path) -> None:
    weights = meo / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no config":
        (meo / "config.json").unlink()
    else:
        weights.unlink()
        if damage == "pickle":
            (meo / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(MissingError) as caught:
        loaded(meo)
    assert "\n" not in caught.value.message and str(meo) in caught.value.message


def test_a_file_that_does_not_fit_is_no_internal_error(meo: Path, tmp_path: Path) -> None:
    model, tokenizer = load(meo, dtype=torch.float32, device=CPU)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError):
        save(model, tokenizer, tmp_path / "file" / "folder", dtype=torch.float32)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*too large"):
            save(model, tokenizer, tmp_path / "small", dtype=torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_transformers_does_not_speak_of_a_new_head(meo: Path, caplog: Any) -> None:
    from transformers.utils import logging as ours

    ours.enable_propagation()
    before = ours.get_verbosity()
    with caplog.at_level(logging.WARNING):
        loaded(meo, labels=["no", "yes"])
    ours.disable_propagation()
    assert not caplog.records and ours.get_verbosity() == before
