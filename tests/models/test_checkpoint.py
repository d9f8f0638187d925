"""Tensors are read one at a time from whole files alone, and written as safetensors and transformers read them."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from pomona.errors import CheckFailed, DataError, MissingError, OutputError, PomonaError
from pomona.models.checkpoint import DTYPES, Checkpoint, TensorSpec, dtype_name, required, write_config, write_shards


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(5, 3),
        "b.odd": torch.arange(7, dtype=torch.uint8),
        "c.half": torch.randn(3, 3).bfloat16(),
        "d.scalar": torch.tensor(2.5),
        "e.empty": torch.empty(0, 4),
        "f.flags": torch.tensor([True, False, True]),
        "g.wide": torch.randn(2, 2, 2, dtype=torch.float64),
    }


def specs(values: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, dtype_name(value.dtype), tuple(value.shape)) for name, value in values.items()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model directory written by safetensors itself."""
    path = tmp_path / "model"
    path.mkdir()
    save_file(tensors(), path / "model.safetensors", metadata={"format": "pt"})
    write_config(path, {"model_type": "none"})
    return path


def sharded(folder: Path, shard_bytes: int = 64) -> list[str]:
    """The same model in several files."""
    checkpoint = Checkpoint.open(folder)
    kept = {name: checkpoint.read(name).clone() for name in checkpoint.specs}
    (folder / "model.safetensors").unlink()
    return write_shards(folder, specs(kept), kept.__getitem__, shard_bytes=shard_bytes)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [False, True])
def test_every_tensor_reads_as_safetensors_reads_it(folder: Path, shards: bool) -> None:
    if shards:
        assert len(sharded(folder)) == 4
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config == {"model_type": "none"} and checkpoint.specs.keys() == tensors().keys()
    for name, expected in tensors().items():
        found = checkpoint.read(name)
        assert found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(found, expected)


def test_a_single_file_with_its_configuration_is_a_model(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    checkpoint = Checkpoint.open(folder / "other.safetensors")
    assert checkpoint.folder == folder and torch.equal(checkpoint.read("a.weight"), tensors()["a.weight"])
    assert [entry["name"] for entry in checkpoint.inputs()] == ["config.json", "other.safetensors"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("stored")
    save_file(tensors(), path / "model.safetensors")
    write_config(path, {})
    return Checkpoint.open(path)


@given(st.integers(0, 15), st.data())
def test_a_span_is_a_part_of_the_flattened_tensor(stored: Checkpoint, start: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 15 - start))
    assert torch.equal(stored.span("a.weight", start, count), tensors()["a.weight"].flatten()[start : start + count])


def test_a_span_past_the_end_is_an_error(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    for start, count in ((0, 16), (15, 1), (-1, 2)):
        with pytest.raises(ValueError, match="15 elements"):
            checkpoint.span("a.weight", start, count)


def test_changing_what_was_read_leaves_the_file_alone(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    Checkpoint.open(folder).read("a.weight").zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_numbers_that_begin_at_an_odd_byte_are_read(tmp_path: Path) -> None:
    """A file of another writer, which did not sort by width."""
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    encoded = json.dumps(header).encode()
    values = torch.tensor([1.5, -2.0])
    content = len(encoded).to_bytes(8, "little") + encoded + b"\x07" + values.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    assert torch.equal(Checkpoint.open(tmp_path).read("b"), values)


def test_the_inputs_are_all_that_decides_the_output(folder: Path) -> None:
    files = sharded(folder)
    for name in ("tokenizer.json", "generation_config.json"):
        (folder / name).write_text("{}")
    (folder / "README.md").write_text("a note")
    inputs = {entry["name"]: entry for entry in Checkpoint.open(folder).inputs()}
    assert set(inputs) == {*files, "config.json", "tokenizer.json", "generation_config.json"}
    for name, entry in inputs.items():
        content = (folder / name).read_bytes()
        assert entry["bytes"] == len(content) and entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert [path.name for path in Checkpoint.open(folder).companions()] == ["generation_config.json", "tokenizer.json"]


# --- what is refused -------------------------------------------------------------------------------------------------


def rewritten(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def shard_missing(folder: Path) -> None:
    (folder / sharded(folder)[1]).unlink()


def index_damaged(folder: Path) -> None:
    sharded(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [')


def index_of_other_shapes(folder: Path) -> None:
    sharded(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a.weight": 3}}')


def index_with_more(folder: Path) -> None:
    sharded(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_bytes())
    index["weight_map"]["ghost.weight"] = index["weight_map"]["a.weight"]
    path.write_text(json.dumps(index))


def index_with_less(folder: Path) -> None:
    sharded(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_bytes())
    del index["weight_map"]["b.odd"]
    path.write_text(json.dumps(index))


def index_leading_out(folder: Path) -> None:
    sharded(folder)
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder.parent / "outside.safetensors")
    index = {"weight_map": {"a.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def unknown_format(folder: Path) -> None:
    header = b'{"a":{"dtype":"U64","shape":[1],"data_offsets":[0,8]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), MissingError, "config.json is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), MissingError, "model.safetensors is missing"),
        (rewritten("config.json", lambda text: text[:-5]), MissingError, "config.json is damaged"),
        (rewritten("config.json", lambda text: b"[" * 100_000), MissingError, "config.json is damaged"),
        (rewritten("config.json", lambda text: b"[1]"), MissingError, "no JSON object"),
        (rewritten("model.safetensors", lambda text: text[:-1]), MissingError, "not a whole safetensors file"),
        (rewritten("model.safetensors", lambda text: text + b"x"), MissingError, "not a whole safetensors file"),
        (rewritten("model.safetensors", lambda text: b""), MissingError, "not a whole safetensors file"),
        (rewritten("model.safetensors", lambda text: b"\xff" * 64), MissingError, "not a whole safetensors file"),
        (shard_missing, MissingError, "shards missing: model-00002-of"),
        (index_damaged, MissingError, "index.json is damaged"),
        (index_of_other_shapes, MissingError, "index.json is damaged"),
        (index_with_more, MissingError, "ghost.weight"),
        (index_with_less, MissingError, "disagree on b.odd"),
        (index_leading_out, MissingError, "index.json is damaged"),
        (pickled, MissingError, r"a pickle \(pytorch_model.bin\)"),
        (unknown_format, DataError, "tensor a has the number format U64"),
    ],
)
def test_a_damaged_model_is_refused_in_one_line(
    damage: Callable[[Path], None], kind: type[PomonaError], message: str, folder: Path
) -> None:
    damage(folder)
    with pytest.raises(kind, match=message) as caught:
        Checkpoint.open(folder)
    assert str(folder) in caught.value.message and "\n" not in caught.value.message


def test_what_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(MissingError, match=r"tensor z\.weight is missing"):
        Checkpoint.open(folder).read("z.weight")
    with pytest.raises(MissingError, match="no such directory"):
        Checkpoint.open(folder / "none")


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [1, 64, 10_000])
def test_what_is_written_is_what_safetensors_and_the_prediction_say(tmp_path: Path, shard_bytes: int) -> None:
    values = tensors()
    names = write_shards(tmp_path, specs(values), values.__getitem__, shard_bytes=shard_bytes)
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    files = [tmp_path / name for name in names if name.endswith(".safetensors")]
    assert len(files) == {1: 7, 64: 3, 10_000: 1}[shard_bytes]
    found: dict[str, Tensor] = {}
    for file in files:
        held = load_file(file)
        assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= shard_bytes
        found |= held
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], values[name]) for name in values)
    assert required(specs(values), shard_bytes) == sum((tmp_path / name).stat().st_size for name in names)
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in values.values())
        assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}


def test_a_tensor_is_asked_for_once_and_numbers_are_aligned(tmp_path: Path) -> None:
    values, asked = tensors(), list[str]()

    def give(name: str) -> Tensor:
        asked.append(name)
        return values[name]

    write_shards(tmp_path, specs(values), give)
    assert sorted(asked) == sorted(values)
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    for entry in json.loads(content[8 : 8 + length]).values():
        if "dtype" in entry:
            assert entry["data_offsets"][0] % DTYPES[entry["dtype"]].itemsize == 0


def test_the_same_tensors_give_the_same_bytes_through_a_round_trip(tmp_path: Path) -> None:
    values = tensors()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    write_shards(tmp_path / "one", specs(values), values.__getitem__)
    write_config(tmp_path / "one", {"b": 1, "a": None})
    first = Checkpoint.open(tmp_path / "one")
    write_shards(tmp_path / "two", list(first.specs.values()), first.read)
    write_config(tmp_path / "two", first.config)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_not_finite_are_never_written(tmp_path: Path, wrong: float, dtype: torch.dtype) -> None:
    values = {"a": torch.ones(3, dtype=dtype), "b": torch.tensor([1.0, wrong, 2.0], dtype=dtype)}
    with pytest.raises(CheckFailed, match="tensor b holds numbers that are not finite"):
        write_shards(tmp_path, specs(values), values.__getitem__)


def test_a_tensor_other_than_announced_is_an_error(tmp_path: Path) -> None:
    for value in (torch.ones(3), torch.ones(2, 2).half()):
        with pytest.raises(ValueError, match="instead of F32"):
            write_shards(tmp_path, [TensorSpec("a", "F32", (2, 2))], lambda name, value=value: value)


def test_a_full_disk_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    values = {"a": torch.ones(1 << 20)}
    with pytest.raises(OutputError, match="no space left on the device") as caught:
        write_shards(tmp_path, specs(values), values.__getitem__)
    assert caught.value.exit_code == 6


def test_a_read_only_folder_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        write_shards(tmp_path / "absent", [], {}.__getitem__)
