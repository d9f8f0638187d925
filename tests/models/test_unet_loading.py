"""U-Nets from directories as diffusers writes them, and from ones that something is wrong with."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pomona.errors import DataError, MissingError, PomonaError, UnavailableError
from pomona.models.unets import loading
from pomona.models.unets.loading import UNet, load_unet, random_weights
from small_unet import SCHEDULER, save_small_unet, small_unet

_WEIGHTS = "diffusion_pytorch_model.safetensors"
ATTENTION = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "attention_head_dim": 8}


def _load(name: Path | str, dtype: torch.dtype = torch.float32) -> UNet:
    return load_unet(str(name), dtype=dtype, device="cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_unet(tmp_path_factory.mktemp("unet"), channels=3, size=16, **ATTENTION)


@pytest.fixture
def folder(tmp_path: Path, saved: Path) -> Path:
    """A copy to break."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def _same_weights(first: Any, second: Any) -> bool:
    theirs = second.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in first.state_dict().items())


def test_a_directory_is_loaded_frozen_with_what_its_files_say(saved: Path) -> None:
    unet = _load(saved)
    assert _same_weights(unet.module, small_unet(channels=3, size=16, **ATTENTION))
    assert not unet.module.training and not any(p.requires_grad for p in unet.module.parameters())
    assert (unet.name, unet.channels, unet.size) == (str(saved), 3, 16)
    assert unet.scheduler == SCHEDULER
    assert unet.config == json.loads((saved / "config.json").read_text())
    assert [each["name"] for each in unet.sources] == ["config.json", _WEIGHTS, "scheduler_config.json"]
    for each in unet.sources:
        content = (saved / each["name"]).read_bytes()
        assert (each["bytes"], each["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_are_converted_to_the_format_asked_for(saved: Path, dtype: torch.dtype) -> None:
    unet = _load(saved, dtype)
    assert _same_weights(unet.module, small_unet(channels=3, size=16, **ATTENTION).type(dtype))


def test_a_pipeline_is_entered_and_its_scheduler_found(tmp_path: Path, folder: Path) -> None:
    pipeline = tmp_path / "pipeline"
    (pipeline / "scheduler").mkdir(parents=True)
    (pipeline / "unet").mkdir()
    (pipeline / "model_index.json").write_text("{}")
    (pipeline / "scheduler/scheduler_config.json").write_text(json.dumps({**SCHEDULER, "beta_end": 0.03}))
    for name in ("config.json", _WEIGHTS):
        (folder / name).rename(pipeline / "unet" / name)
    for name in (pipeline, pipeline / "unet"):
        found = _load(name)
        assert found.scheduler is not None and found.scheduler["beta_end"] == 0.03


def test_without_a_scheduler_there_is_none_and_without_a_square_no_size(folder: Path) -> None:
    (folder / "scheduler_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    for told, size in (([16, 16], 16), ([16, 8], None), (None, None), (0, None), ("16", None), ({}, None), ([], None)):
        (folder / "config.json").write_text(json.dumps({**config, "sample_size": told}))
        unet = _load(folder)
        assert (unet.scheduler, unet.size) == (None, size)


def test_a_conditional_model_is_loaded(tmp_path: Path) -> None:
    fields = {"conditional": True, "cross_attention_dim": 8, "attention_head_dim": 2}
    cross = {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    assert type(_load(save_small_unet(tmp_path, **fields, **cross)).module).__name__ == "UNet2DConditionModel"


def test_weights_in_shards_and_of_a_variant_are_loaded(folder: Path) -> None:
    whole = _load(folder).module
    tensors = load_file(folder / _WEIGHTS)
    (folder / _WEIGHTS).unlink()
    save_file({name: tensor.half() for name, tensor in tensors.items()},
              folder / "diffusion_pytorch_model.fp16.safetensors")  # fmt: skip
    assert _same_weights(_load(folder, torch.float16).module, whole.type(torch.float16))
    names = sorted(tensors)
    files = {f"diffusion_pytorch_model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, inside in files.items():
        save_file({name: tensors[name] for name in inside}, folder / file)
    placed = {name: file for file, inside in files.items() for name in inside}
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    unet = _load(folder)
    assert _same_weights(unet.module, small_unet(channels=3, size=16, **ATTENTION))
    assert [each["name"] for each in unet.sources[1:-1]] == [index.name, *files]


def test_attention_under_the_names_of_old_checkpoints_is_loaded(folder: Path) -> None:
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    tensors = load_file(folder / _WEIGHTS)
    renamed = dict(tensors)
    for name in tensors:
        for new, before in old.items():
            if new in name:
                renamed[name.replace(new, before)] = renamed.pop(name)
    assert set(renamed) != set(tensors)
    save_file(renamed, folder / _WEIGHTS)
    assert _same_weights(_load(folder).module, small_unet(channels=3, size=16, **ATTENTION))


def test_a_hub_id_is_loaded_from_the_cache_and_nothing_is_fetched(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    asked: list[Any] = []
    for name in ("getaddrinfo", "socket"):
        monkeypatch.setattr(socket, name, lambda *given, **_: asked.append(given))
    snapshot = tmp_path / "models--someone--unet/snapshots/0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--someone--unet/refs").mkdir()
    (tmp_path / "models--someone--unet/refs/main").write_text("0123")
    for file in saved.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert _load("someone/unet").size == 16
    with pytest.raises(MissingError, match=r"someone/other: .* cache") as caught:
        _load("someone/other")
    assert caught.value.hint is not None and "hf download someone/other" in caught.value.hint
    assert asked == []


def _edit_config(**changed: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))

    return edit


def _edit_weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edited(folder: Path) -> None:
        tensors = load_file(folder / _WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / _WEIGHTS)

    return edited


def _cut(folder: Path) -> None:
    os.truncate(folder / _WEIGHTS, 5000)


def _pickled(folder: Path) -> None:
    (folder / _WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


def _lost_shard(folder: Path) -> None:
    index = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00001.safetensors"}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def _outside(folder: Path) -> None:
    index = {"weight_map": {"conv_in.weight": "../elsewhere.safetensors"}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


BROKEN: dict[str, tuple[Callable[[Path], Any], type[PomonaError], str]] = {
    "no configuration": (lambda f: (f / "config.json").unlink(), MissingError, "config.json is missing"),
    "half a configuration": (lambda f: os.truncate(f / "config.json", 40), MissingError, "config.json is damaged"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), MissingError, "no JSON object"),
    "another class": (_edit_config(_class_name="VQModel"), DataError, "config.json is of 'VQModel'"),
    "no class": (_edit_config(_class_name=None), DataError, "config.json is of None"),
    "a class that is no text": (_edit_config(_class_name=["UNet2DModel"]), DataError, "config.json is of"),
    "quantized": (_edit_config(quantization_config={"quant_method": "gguf"}), DataError, "quantized"),
    "a level unheard of": (_edit_config(down_block_types=["DownBlock2D", "X"]), MissingError, "X does not exist"),
    "levels of no features": (
        _edit_config(down_block_types=["DownBlock2D", "DownEncoderBlock2D"]), PomonaError, "DownEncoderBlock2D|disagree"
    ),
    "no weights": (lambda f: (f / _WEIGHTS).unlink(), MissingError, f"{_WEIGHTS} is missing"),
    "a pickle": (_pickled, MissingError, r"are a pickle \(diffusion_pytorch_model.bin\)"),
    "half the weights": (_cut, MissingError, "not a whole safetensors file"),
    "text for weights": (lambda f: (f / _WEIGHTS).write_text("version"), MissingError, "not a whole safetensors"),
    "a tensor less": (_edit_weights(lambda t: t.pop("conv_in.bias")), MissingError, "missing, among them conv_in.bias"),
    "a tensor more": (
        _edit_weights(lambda t: t.update(more=torch.zeros(1))), MissingError, "unexpected, among them more"
    ),
    "layers without end": (_edit_config(layers_per_block=10**9), MissingError, "layers_per_block is 1000000000"),
    "another width": (_edit_config(block_out_channels=[16, 40]), MissingError, "expected shape"),
    "a lost shard": (_lost_shard, MissingError, "1 of 1 shards missing"),
    "a shard elsewhere": (_outside, MissingError, "index.json is damaged"),
    "half a scheduler": (lambda f: (f / "scheduler_config.json").write_text("{"), MissingError, "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_wrong_with_a_directory_is_said_in_one_line(
    how: str, folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    break_, kind, said = BROKEN[how]
    break_(folder)
    with pytest.raises(kind, match=said) as caught:
        _load(folder)
    assert "\n" not in caught.value.message and len(caught.value.message) < 400
    told = capfd.readouterr()
    assert (told.out, told.err, caplog.records) == ("", "", [])


def test_a_place_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for name in (tmp_path / "nowhere", "nowhere", "./a/b", "a/b/c"):
        with pytest.raises(MissingError, match="no such directory"):
            _load(name)


def test_without_the_embedded_model_or_diffusers_it_says_what_to_install(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "EMBEDDED", "absent")
    with pytest.raises(MissingError, match="embedded model absent is not in this installation"):
        _load("absent")
    monkeypatch.setitem(sys.modules, "diffusers.models.unets.unet_2d", None)
    with pytest.raises(UnavailableError, match="diffusers") as caught:
        _load(saved)
    assert caught.value.hint == "pip install 'pomona[vision]'"


def test_loading_says_nothing_and_leaves_the_log_as_it_was(
    saved: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    from diffusers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    random_weights(_load(saved, torch.bfloat16), 0)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    told = capfd.readouterr()
    assert (told.out, told.err, caplog.records) == ("", "", [])


def test_random_weights_are_torchs_own_by_the_seed_alone(saved: Path) -> None:
    unet = _load(saved)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    first, again, other = (random_weights(unet, seed).module for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert _same_weights(first, again)
    assert not torch.equal(first.conv_in.weight, other.conv_in.weight)
    assert not torch.equal(first.conv_in.weight, unet.module.conv_in.weight)
    bound = (3 * 9) ** -0.5  # of a convolution of 3 x 3 over 3 channels: U(-1, 1) / sqrt(fan-in)
    weight = first.conv_in.weight
    assert 0.9 * bound < float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not first.training and not any(p.requires_grad for p in first.parameters())
    half = random_weights(_load(saved, torch.bfloat16), 4)
    assert _same_weights(half.module, first.type(torch.bfloat16))
    assert half.sources == []
