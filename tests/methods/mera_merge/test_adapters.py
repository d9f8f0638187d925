"""An adapter is read whole from safe files, named, and written back bit for bit."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from methods.mera_merge.adapterhub import SEQ_BN, make_bottleneck, make_ia3, make_lora, write_json
from pomona.errors import DataError, MissingError, OutputError, PomonaError, UsageError
from pomona.io.manifest import file_digest
from pomona.methods.mera_merge.adapters import Adapter, Bottleneck, read, with_sites, write

MAKERS: dict[str, Callable[..., Path]] = {"bottleneck": make_bottleneck, "lora": make_lora, "ia3": make_ia3}
FIRST = "bert.encoder.layer.0.output.adapters.task"


def opened(folder: Path, *, allow_pickle: bool = False) -> Adapter:
    return read(str(folder), allow_pickle=allow_pickle)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def refused(folder: Path | str, kind: type[PomonaError], said: str, *, allow_pickle: bool = False) -> None:
    with pytest.raises(kind, match=said) as caught:
        read(str(folder), allow_pickle=allow_pickle)
    assert "\n" not in caught.value.message and len(caught.value.message) < 400


def edited(folder: Path, **changed: Any) -> Path:
    entries = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", entries | changed)
    return folder


def as_pickle(folder: Path) -> Path:
    """The same adapter as `adapters` writes it unless told otherwise."""
    for safe, unsafe in (("adapter", "pytorch_adapter"), ("model_head", "pytorch_model_head")):
        if (folder / f"{safe}.safetensors").is_file():
            torch.save(load_file(folder / f"{safe}.safetensors"), folder / f"{unsafe}.bin")
            (folder / f"{safe}.safetensors").unlink()
    return folder


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_read_is_written_back_byte_for_byte(kind: str, tmp_path: Path) -> None:
    source = MAKERS[kind](tmp_path / "source", seed=1)
    adapter = opened(source)
    assert adapter.kind == kind
    write(tmp_path / "copy", adapter)
    assert content(tmp_path / "copy") == content(source)
    assert opened(tmp_path / "copy").config == adapter.config


def test_a_configuration_is_written_the_same_way_whatever_its_order(tmp_path: Path) -> None:
    source = make_lora(tmp_path / "source", seed=1)
    sorted_way = (source / "adapter_config.json").read_bytes()
    entries = json.loads(sorted_way)
    (source / "adapter_config.json").write_text(json.dumps(dict(reversed(entries.items()))))
    adapter = opened(source)
    assert adapter.config == entries
    write(tmp_path / "copy", adapter)
    assert (tmp_path / "copy/adapter_config.json").read_bytes() == sorted_way


def test_a_head_is_kept_apart_and_written_back(tmp_path: Path) -> None:
    source = make_bottleneck(tmp_path / "source", seed=1, labels=3)
    adapter = opened(source)
    assert [tuple(tensor.shape) for tensor in adapter.head.values()] == [(3,), (3, 8)]
    assert adapter.head_config is not None and adapter.head_config["config"]["num_labels"] == 3
    assert not set(adapter.head) & set(adapter.tensors)
    write(tmp_path / "copy", adapter)
    assert content(tmp_path / "copy") == content(source)


def test_the_head_of_a_lora_is_kept_apart_and_written_back(tmp_path: Path) -> None:
    head = {"base_model.model.classifier.weight": torch.ones(2, 8), "base_model.model.classifier.bias": torch.ones(2)}
    whole = ["classifier", "score"]
    source = make_lora(tmp_path / "source", seed=1, tensors=head, task_type="SEQ_CLS", modules_to_save=whole)
    adapter = opened(source)
    assert adapter.head.keys() == head.keys() and not set(head) & set(adapter.tensors)
    write(tmp_path / "copy", adapter)
    assert content(tmp_path / "copy") == content(source)


def test_parameters_come_in_the_order_of_the_file_at_their_own_precision(tmp_path: Path) -> None:
    make_bottleneck(tmp_path, seed=1, layers=1)
    whole = load_file(tmp_path / "adapter.safetensors")
    half = {name: tensor.bfloat16() if "down" in name else tensor for name, tensor in whole.items()}
    save_file(half, tmp_path / "adapter.safetensors")
    adapter = opened(tmp_path)
    assert [tensor.dtype for tensor in adapter.tensors.values()] == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert list(adapter.tensors) != sorted(adapter.tensors)
    assert all(torch.equal(adapter.tensors[name], half[name]) for name in half)


def test_sites_are_the_published_equation(tmp_path: Path) -> None:
    """h + up relu(down h + down_bias) + up_bias, in float64 from the file itself."""
    make_bottleneck(tmp_path, seed=1, mh_adapter=True)
    sites = opened(tmp_path).sites()
    assert list(sites) == [f"encoder.layer.{layer}.{at}" for layer in (0, 1) for at in ("attention.output", "output")]
    raw = {name: tensor.double().numpy() for name, tensor in load_file(tmp_path / "adapter.safetensors").items()}
    hidden = torch.randn(5, 8, dtype=torch.float64)
    down, up = f"{FIRST}.adapter_down.0", f"{FIRST}.adapter_up"
    units = (hidden.numpy() @ raw[f"{down}.weight"].T + raw[f"{down}.bias"]).clip(0)
    expected = units @ raw[f"{up}.weight"].T + raw[f"{up}.bias"]
    site = sites["encoder.layer.0.output"]
    units_here = torch.relu(hidden @ site.down.double().T + site.down_bias)
    assert torch.allclose(units_here @ site.up.double().T + site.up_bias, torch.from_numpy(expected), atol=1e-12)


def test_sites_of_a_model_with_a_head_and_of_one_without_are_called_alike(tmp_path: Path) -> None:
    make_bottleneck(tmp_path / "with", seed=1, layers=12)
    shutil.copytree(tmp_path / "with", tmp_path / "without")
    tensors = {n.removeprefix("bert."): t for n, t in load_file(tmp_path / "with/adapter.safetensors").items()}
    save_file(tensors, tmp_path / "without/adapter.safetensors")
    sites = list(opened(tmp_path / "without").sites())
    assert sites == list(opened(tmp_path / "with").sites()) == [f"encoder.layer.{i}.output" for i in range(12)]


def test_a_layer_norm_of_its_own_comes_before_the_projection(tmp_path: Path) -> None:
    make_bottleneck(tmp_path, seed=1, layers=1, ln_before=True)
    raw = load_file(tmp_path / "adapter.safetensors")
    moved = {name.replace("down.0", "down.1"): tensor for name, tensor in raw.items()}
    norm = {f"{FIRST}.adapter_down.0.{part}": torch.ones(8) for part in ("weight", "bias")}
    save_file(moved | norm, tmp_path / "adapter.safetensors")
    site = opened(tmp_path).sites()["encoder.layer.0.output"]
    assert torch.equal(site.down, raw[f"{FIRST}.adapter_down.0.weight"])
    assert torch.equal(site.down_bias, raw[f"{FIRST}.adapter_down.0.bias"])


@pytest.mark.parametrize(
    ("prefix", "place"),
    [
        ("roberta.", "encoder.layer.0.output"),
        ("distilbert.", "transformer.layer.0.output_adapters"),
        ("transformer.", "h.0.output_adapters"),
        ("model.", "layers.0.output_adapters"),
        ("model.", "encoder.layers.0.output_adapters"),
        ("transformer.", "encoder.block.0.layer.1"),
    ],
)
def test_the_prefixes_of_all_families_are_cut(prefix: str, place: str, tmp_path: Path) -> None:
    """Names as `adapters` 1.3 writes them for RoBERTa, DistilBERT, GPT-2, Llama, BART and T5."""
    make_bottleneck(tmp_path, seed=1, layers=1)
    raw = load_file(tmp_path / "adapter.safetensors")
    for before in (prefix, ""):
        named = {name.replace("bert.encoder.layer.0.output", before + place): tensor for name, tensor in raw.items()}
        save_file(named, tmp_path / "adapter.safetensors")
        assert list(opened(tmp_path).sites()) == [place]


def test_towers_of_one_model_are_told_apart(tmp_path: Path) -> None:
    make_bottleneck(tmp_path, seed=1)
    tensors = load_file(tmp_path / "adapter.safetensors")
    towers = ("text_model", "vision_model")
    both = {name.replace("bert", tower, 1): tensor.clone() for name, tensor in tensors.items() for tower in towers}
    save_file(both, tmp_path / "adapter.safetensors")
    assert list(opened(tmp_path).sites()) == [f"{tower}.encoder.layer.{i}.output" for tower in towers for i in (0, 1)]


def test_names_of_older_files_are_understood(tmp_path: Path) -> None:
    """adapter-transformers 1 and 2 had other names of holders and of gelu, and fewer settings."""
    make_bottleneck(tmp_path, seed=1, mh_adapter=True, name="sst-2")
    old = {"attention.output.adapters": "attention.output.attention_text_task_adapters"}
    old |= {"output.adapters": "output.layer_text_task_adapters"}
    tensors = {}
    for name, tensor in load_file(tmp_path / "adapter.safetensors").items():
        here = next(key for key in old if key in name)
        tensors[name.replace(here, old[here])] = tensor
    save_file(tensors, tmp_path / "adapter.safetensors")
    inner = {key: SEQ_BN[key] for key in ("original_ln_before", "original_ln_after", "mh_adapter", "output_adapter")}
    entries = {"name": "sst-2", "model_name": "tiny/bert", "config": inner | {"non_linearity": "gelu"}}
    write_json(tmp_path / "adapter_config.json", entries)
    adapter = opened(tmp_path)
    assert len(adapter.sites()) == 4 and "encoder.layer.1.attention.output" in adapter.sites()
    assert adapter.settings["non_linearity"] == "gelu_new" and adapter.settings["scaling"] == 1.0
    assert adapter.config == entries
    edited(tmp_path, version="adapters.1.0.0")
    assert opened(tmp_path).settings["non_linearity"] == "gelu"


@given(seed=st.integers(0, 2**31), rank=st.integers(1, 5), layers=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_new_values_change_bottlenecks_alone(seed: int, rank: int, layers: int, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("site")
    beside = {f"{FIRST}.scaling": torch.ones(1)}
    adapter = opened(make_bottleneck(folder, seed=seed, rank=rank, layers=layers, tensors=beside, scaling="learned"))
    doubled = {
        site: Bottleneck(b.down * 2, b.down_bias * 3, b.up * 5, b.up_bias * 7) for site, b in adapter.sites().items()
    }
    changed = with_sites(adapter, doubled, "new")
    factor = {"adapter_down.0.weight": 2, "adapter_down.0.bias": 3, "adapter_up.weight": 5, "adapter_up.bias": 7}
    assert list(changed.tensors) == list(adapter.tensors) and changed.label == "new"
    for name, tensor in adapter.tensors.items():
        times = next((value for leaf, value in factor.items() if name.endswith(leaf)), 1)
        assert torch.equal(changed.tensors[name], tensor * times)


def test_new_values_take_the_number_format_of_the_old(tmp_path: Path) -> None:
    make_bottleneck(tmp_path, seed=1, layers=1)
    whole = load_file(tmp_path / "adapter.safetensors")
    save_file({name: tensor.half() for name, tensor in whole.items()}, tmp_path / "adapter.safetensors")
    adapter = opened(tmp_path)
    precise = {s: Bottleneck(b.down.double(), b.down_bias, b.up, b.up_bias) for s, b in adapter.sites().items()}
    assert {tensor.dtype for tensor in with_sites(adapter, precise, "x").tensors.values()} == {torch.float16}


def test_other_sites_or_shapes_are_a_mistake_of_the_caller(tmp_path: Path) -> None:
    adapter = opened(make_bottleneck(tmp_path, seed=1))
    sites = adapter.sites()
    with pytest.raises(ValueError, match=r"encoder.layer.1.output"):
        with_sites(adapter, {"encoder.layer.0.output": sites["encoder.layer.0.output"]}, "x")
    grown = Bottleneck(torch.ones(4, 8), torch.ones(4), torch.ones(8, 4), torch.ones(8))
    with pytest.raises(ValueError, match=r"\(4, 8\)"):
        with_sites(adapter, {**sites, "encoder.layer.0.output": grown}, "x")


def test_lora_and_ia3_have_no_bottlenecks(tmp_path: Path) -> None:
    assert opened(make_lora(tmp_path / "lora", seed=1)).sites() == {}
    assert opened(make_ia3(tmp_path / "ia3", seed=1)).sites() == {}


def test_a_head_that_was_dropped_leaves_no_promise_of_one(tmp_path: Path) -> None:
    head = {"base_model.model.classifier.weight": torch.ones(2, 8)}
    make_lora(tmp_path / "s", seed=1, tensors=head, task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    adapter = opened(tmp_path / "s")
    write(tmp_path / "out", Adapter(adapter.label, adapter.path, "lora", adapter.config, adapter.tensors))
    entries = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert entries["task_type"] is None and entries["modules_to_save"] is None
    assert set(load_file(tmp_path / "out/adapter_model.safetensors")) == set(adapter.tensors)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    adapter = opened(make_lora(tmp_path / "s", seed=1))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        write(tmp_path / "file", adapter)


# --- labels, inputs, licences ----------------------------------------------------------------------------------------


def test_the_label_is_the_name_given_or_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_bottleneck(tmp_path / "sst-2", seed=1)
    assert read(str(folder), allow_pickle=False).label == "sst-2"
    assert read(f"{folder}/", allow_pickle=False).label == "sst-2"
    assert read(f"sentiment={folder}", allow_pickle=False).label == "sentiment"
    monkeypatch.chdir(folder)
    assert read(".", allow_pickle=False).label == "sst-2"
    monkeypatch.chdir(make_bottleneck(tmp_path / "a=b", seed=1).parent)
    assert read("a=b", allow_pickle=False).label == "a=b"
    with pytest.raises(UsageError, match="name is empty"):
        read(f"={folder}", allow_pickle=False)


def test_every_file_read_is_an_input_with_its_digest(tmp_path: Path) -> None:
    folder = make_bottleneck(tmp_path / "sst", seed=1, labels=2)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Card\n")
    (folder / "unread.txt").write_text("x")
    inputs = {entry["name"]: entry for entry in read(f"a={folder}", allow_pickle=False).inputs}
    read_files = (
        "adapter_config.json",
        "adapter.safetensors",
        "head_config.json",
        "model_head.safetensors",
        "README.md",
    )
    assert inputs.keys() == {f"a/{name}" for name in read_files}
    for name in read_files:
        assert inputs[f"a/{name}"] == {"name": f"a/{name}", **file_digest(folder / name)}


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("---\ntags:\n- adapter\nlicense: apache-2.0\n---\ntext", "apache-2.0"),
        ("---\nlicense:\n- mit\n- other\n---\n", "mit"),
        ('---\nlicense: "cc-by-4.0"\n---\n', "cc-by-4.0"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense:\ntags:\n- x\n---\n", None),
        ("license: mit\n", None),
        ("---\ntags: []\n---\nlicense: mit\n", None),
        ("---\nlicense: <script>\n---\n", None),
        ("", None),
    ],
)
def test_the_licence_is_what_the_front_matter_says(card: str, said: str | None, tmp_path: Path) -> None:
    folder = make_lora(tmp_path, seed=1)
    (folder / "README.md").write_bytes(card.encode())
    assert opened(folder).licence == said


def test_the_licence_may_stand_in_the_configuration(tmp_path: Path) -> None:
    assert opened(make_lora(tmp_path, seed=1)).licence is None
    assert opened(edited(tmp_path, license="mit\n\n# x")).licence == "mit # x"


def test_the_base_model_is_what_the_configuration_calls_it(tmp_path: Path) -> None:
    assert opened(make_bottleneck(tmp_path / "a", seed=1)).base == "tiny/bert"
    assert opened(make_lora(tmp_path / "b", seed=1, base_model_name_or_path="x/y")).base == "x/y"
    assert opened(make_bottleneck(tmp_path / "c", seed=1, model_name="")).base is None


# --- what is refused -------------------------------------------------------------------------------------------------


def test_missing_files_are_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", MissingError, "no such directory")
    refused(f"x={tmp_path / 'nowhere'}", MissingError, "adapter x: .*no such directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", MissingError, r"adapter empty: adapter_config\.json is missing")
    for maker, name in ((make_bottleneck, "adapter.safetensors"), (make_lora, "adapter_model.safetensors")):
        folder = maker(tmp_path / name, seed=1)
        (folder / name).unlink()
        refused(folder, MissingError, f"{name} is missing")
    headless = make_bottleneck(tmp_path / "headless", seed=1, labels=2)
    (headless / "model_head.safetensors").unlink()
    refused(headless, MissingError, r"model_head\.safetensors is missing")
    unsaid = make_bottleneck(tmp_path / "unsaid", seed=1, labels=2)
    (unsaid / "head_config.json").unlink()
    refused(unsaid, MissingError, r"head_config\.json is missing")


def test_a_folder_of_adapters_is_told_from_an_adapter(tmp_path: Path) -> None:
    make_lora(tmp_path / "default", seed=1)
    make_lora(tmp_path / "other", seed=1)
    with pytest.raises(MissingError) as caught:
        read(str(tmp_path), allow_pickle=False)
    assert caught.value.hint == "its folders default, other are adapters"


def test_loops_of_links_are_missing_files(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "loop", MissingError, "no such directory")
    folder = make_bottleneck(tmp_path / "a", seed=1)
    for name in ("adapter.safetensors", "adapter_config.json"):
        (folder / name).unlink()
        (folder / name).symlink_to(folder / name)
        refused(folder, MissingError, name)


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"config": NaN'])
def test_a_damaged_configuration_is_said_in_one_line(damage: bytes, tmp_path: Path) -> None:
    folder = make_bottleneck(tmp_path / "a", seed=1)
    (folder / "adapter_config.json").write_bytes(damage)
    refused(folder, MissingError, r"adapter a: adapter_config\.json is damaged")


def test_configurations_of_something_else_are_refused(tmp_path: Path) -> None:
    folder = make_bottleneck(tmp_path / "a", seed=1)
    for other, said in (
        ([1], "holds no object"),
        ({"model_type": "bert"}, "neither AdapterHub's nor PEFT's"),
        ({"name": 3, "config": {}}, "neither AdapterHub's nor PEFT's"),
        ({"name": "task", "config": "pfeiffer"}, "not the settings of an adapter"),
        ({"name": "task", "config": {"architecture": "lora"}}, "architecture 'lora'"),
        ({"name": "task", "config": {"architecture": "prefix_tuning"}}, "architecture 'prefix_tuning'"),
        ({"name": "task", "config": {}}, "no non_linearity"),
        ({"peft_type": "ADALORA"}, "peft_type 'ADALORA'"),
        ({"peft_type": None}, "peft_type 'None'"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(other))
        refused(folder, DataError, said)


def test_settings_of_the_wrong_type_are_refused(tmp_path: Path) -> None:
    folder = make_bottleneck(tmp_path / "a", seed=1, leave_out="all")
    refused(folder, DataError, "leave_out")


@pytest.mark.parametrize("kind", MAKERS)
def test_truncated_and_garbled_tensors_are_damaged(kind: str, tmp_path: Path) -> None:
    folder = MAKERS[kind](tmp_path / "a", seed=1)
    path = next(folder.glob("*.safetensors"))
    whole = path.read_bytes()
    for damage in (
        b"",
        whole[:5],
        whole[:100],
        whole[:-1],
        whole + b"x",
        b"\xff" * 64,
        (2**63).to_bytes(8, "little") + b"{}",
    ):
        path.write_bytes(damage)
        refused(folder, MissingError, f"{path.name} is damaged")


def test_a_pickle_in_the_place_of_safetensors_is_damaged(tmp_path: Path) -> None:
    folder = make_bottleneck(tmp_path / "a", seed=1)
    torch.save(load_file(folder / "adapter.safetensors"), folder / "adapter.safetensors")
    refused(folder, MissingError, "damaged", allow_pickle=True)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    for maker, lost, said in (
        (make_bottleneck, f"{FIRST}.adapter_up.bias", r"encoder\.layer\.0\.output lacks up_bias"),
        (make_lora, "base_model.model.encoder.layer.1.attention.self.query.lora_B.weight", "query lacks lora_B"),
        (make_lora, "base_model.model.encoder.layer.1.attention.self.query.lora_A.weight", "query lacks lora_A"),
    ):
        folder = maker(tmp_path / lost, seed=1)
        path = next(folder.glob("*.safetensors"))
        save_file({name: tensor for name, tensor in load_file(path).items() if name != lost}, path)
        refused(folder, MissingError, said)


def test_a_missing_layer_is_named_unless_it_was_left_out(tmp_path: Path) -> None:
    folder = make_bottleneck(tmp_path / "a", seed=1, layers=4)
    path = folder / "adapter.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if ".layer.1." not in name}, path)
    refused(folder, MissingError, r"encoder\.layer\.1\.output is missing")
    edited(folder, config=SEQ_BN | {"leave_out": [1]})
    assert len(opened(folder).sites()) == 3


def test_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for name, tensor in (
        (f"{FIRST}.adapter_down.0.weight", torch.ones(4, 8)),
        (f"{FIRST}.adapter_down.0.weight", torch.ones(24)),
        (f"{FIRST}.adapter_down.0.bias", torch.ones(2)),
        (f"{FIRST}.adapter_up.weight", torch.ones(3, 8)),
        (f"{FIRST}.adapter_up.bias", torch.ones(3)),
    ):
        refused(make_bottleneck(tmp_path / "a", seed=1, tensors={name: tensor}), DataError, "do not fit each other")
    name = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"
    for tensor in (torch.ones(3, 8), torch.ones(16), torch.ones(0, 8)):
        refused(make_lora(tmp_path / "b", seed=1, tensors={name: tensor}), DataError, "do not fit each other")


def test_an_adapter_of_another_name_is_refused(tmp_path: Path) -> None:
    refused(edited(make_bottleneck(tmp_path, seed=1), name="other"), DataError, "an adapter called other")
    refused(edited(make_bottleneck(tmp_path, seed=1), name="t.sk"), DataError, r"an adapter called t\.sk")
    refused(make_lora_without_factors(tmp_path / "l"), DataError, "no tensor is one of a lora adapter")


def make_lora_without_factors(folder: Path) -> Path:
    make_lora(folder, seed=1)
    save_file({"weight": torch.ones(2)}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", MAKERS)
def test_numbers_that_are_not_finite_are_refused_by_name(kind: str, bad: float, tmp_path: Path) -> None:
    folder = MAKERS[kind](tmp_path / "a", seed=1)
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    name = list(tensors)[2]
    tensors[name].view(-1)[0] = bad
    save_file(tensors, path)
    refused(folder, DataError, f"{name} has numbers that are not finite")


def test_whole_numbers_are_no_parameters(tmp_path: Path) -> None:
    tensors = {f"{FIRST}.adapter_up.bias": torch.ones(8, dtype=torch.int64)}
    refused(make_bottleneck(tmp_path, seed=1, tensors=tensors), DataError, r"torch\.int64, not floating point")


# --- pickles ---------------------------------------------------------------------------------------------------------


def test_a_pickle_is_read_only_when_that_is_allowed(tmp_path: Path) -> None:
    source = opened(make_bottleneck(tmp_path / "a", seed=1, labels=2))
    as_pickle(tmp_path / "a")
    refused(tmp_path / "a", MissingError, r"pickle \(pytorch_adapter\.bin\), which can run code")
    adapter = opened(tmp_path / "a", allow_pickle=True)
    assert all(torch.equal(adapter.tensors[name], tensor) for name, tensor in source.tensors.items())
    assert all(torch.equal(adapter.head[name], tensor) for name, tensor in source.head.items())
    write(tmp_path / "copy", adapter)
    assert {path.suffix for path in (tmp_path / "copy").iterdir()} == {".json", ".safetensors"}


def test_pickles_of_peft_are_never_read(tmp_path: Path) -> None:
    folder = make_lora(tmp_path, seed=1)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, MissingError, r"pickle \(adapter_model\.bin\)", allow_pickle=True)


class Trap:
    """Unpickled by Python, it would write a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.write_text, (self.mark, "sprung")


@pytest.mark.parametrize("form", ["zip", "plain", "legacy"])
def test_a_hostile_pickle_runs_nothing(form: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    folder = make_bottleneck(tmp_path / "a", seed=1)
    (folder / "adapter.safetensors").unlink()
    path = folder / "pytorch_adapter.bin"
    if form == "zip":
        torch.save({"x": Trap(mark)}, path)
    elif form == "legacy":
        torch.save({"x": Trap(mark)}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps({"x": Trap(mark)}))
    assert not mark.exists()
    refused(folder, MissingError, "holds more than tensors, and was not loaded", allow_pickle=True)
    assert not mark.exists()


def test_a_zip_that_torch_did_not_write_is_damaged(tmp_path: Path) -> None:
    folder = make_bottleneck(tmp_path / "a", seed=1)
    (folder / "adapter.safetensors").unlink()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"x": Trap(tmp_path / "mark")}))
    (folder / "pytorch_adapter.bin").write_bytes(buffer.getvalue())
    refused(folder, MissingError, "damaged", allow_pickle=True)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("value", [torch.ones(2), {"x": 1}, {1: torch.ones(2)}, {"x": torch.ones(2).to_sparse()}, []])
def test_a_pickle_of_something_else_is_refused(value: Any, tmp_path: Path) -> None:
    folder = make_bottleneck(tmp_path / "a", seed=1)
    (folder / "adapter.safetensors").unlink()
    torch.save(value, folder / "pytorch_adapter.bin")
    refused(folder, DataError, "something else than named tensors", allow_pickle=True)
