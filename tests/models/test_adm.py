"""ADM converted: the same network, block by block; and files that are no such checkpoint."""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pomona.errors import CheckFailed, DataError, MissingError, OutputError
from pomona.models.unets.adm import CONFIG, convert, layout, predict, write
from pomona.runtime.progress import Quiet
from small_adm import Sizes, adm, weights

unet_2d = pytest.importorskip("diffusers.models.unets.unet_2d")
SIZES = Sizes()
SMALL = SIZES.config(CONFIG)


@pytest.fixture(scope="module")
def reference() -> tuple[dict[str, Tensor], Tensor, Tensor, list[Tensor], Tensor]:
    """A state in guided-diffusion's names, images, times, and what the float64 reference makes of them."""
    made = weights()
    x = torch.randn(2, 3, SIZES.side, SIZES.side, generator=torch.Generator().manual_seed(1)).double()
    t = torch.tensor([3.0, 90.0]).double()
    blocks, out = adm(made, x, t, SIZES)
    return made.state, x, t, blocks, out


@pytest.fixture(scope="module")
def checkpoint(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adm") / "small_uncond.pt"
    torch.save(reference[0], path)
    return path


def converted(checkpoint: Path, folder: Path) -> Path:
    folder.mkdir()
    write(checkpoint, folder, Quiet(), SMALL)
    return folder


def test_converted_model_computes_what_the_original_does_at_every_block(
    reference: Any, checkpoint: Path, tmp_path: Path
) -> None:
    _, x, t, blocks, out = reference
    folder = converted(checkpoint, tmp_path / "adm")
    module, said = unet_2d.UNet2DModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not any(said.values()), said
    module = module.double().eval()
    seen: list[Tensor] = []
    for place in executed(module):
        place.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        theirs = module(x, t).sample
    assert len(seen) == len(blocks) == 2 + 4 * 2 + 3 + 4 * 3
    for number, (one, other) in enumerate(zip(blocks, seen, strict=True), start=1):
        assert one.shape == other.shape, number
        assert (one - other).abs().max() <= 1e-5 * one.abs().max(), f"block {number}"
    assert (out - theirs).abs().max() <= 1e-5


def executed(module: nn.Module) -> list[nn.Module]:
    """The module of diffusers whose output is that of each block of ADM."""
    found: list[nn.Module] = [module.conv_in]
    for level in module.down_blocks:
        found += getattr(level, "attentions", level.resnets)
        found += level.downsamplers or []
    found.append(module.mid_block)
    for level in module.up_blocks:
        ends = list(getattr(level, "attentions", level.resnets))
        if level.upsamplers:
            ends[-1] = level.upsamplers[0]
        found += ends
    return found


def attentions(module: nn.Module) -> list[Any]:
    """In the order in which they run."""
    levels = [*module.down_blocks, module.mid_block, *module.up_blocks]
    return [place for level in levels for place in getattr(level, "attentions", [])]


def test_layout_at_full_size_is_that_of_diffusers_and_has_all_parameters_of_the_release() -> None:
    with torch.device("meta"):
        module = unet_2d.UNet2DModel.from_config(CONFIG)
    assert [(place.heads, place.to_q.out_features) for place in attentions(module)] == [
        *[(8, 512)] * 2,
        *[(16, 1024)] * 11,
        *[(8, 512)] * 3,
    ]  # 64 channels a head
    origins = layout(CONFIG)
    assert {name: origin.converted for name, origin in origins.items()} == {
        name: tuple(tensor.shape) for name, tensor in module.state_dict().items()
    }
    shapes = {origin.name: origin.shape for origin in origins.values()}
    assert sum(map(math.prod, shapes.values())) == 552_814_086
    assert shapes["input_blocks.17.1.qkv.weight"] == (3072, 1024, 1)
    assert shapes["output_blocks.2.2.emb_layers.1.weight"] == (2048, 1024)
    assert shapes["output_blocks.17.0.skip_connection.weight"] == (256, 512, 1, 1)


def test_every_tensor_of_a_checkpoint_goes_into_the_model(reference: Any, checkpoint: Path) -> None:
    state = reference[0]
    assert {origin.name for origin in layout(SMALL).values()} == set(state)
    conversion = convert(checkpoint, SMALL)
    total = sum(conversion.tensor(spec.name).double().square().sum().item() for spec in conversion.specs)
    assert total == pytest.approx(sum(tensor.double().square().sum().item() for tensor in state.values()), rel=1e-12)


def test_prediction_is_what_is_written_and_the_bytes_are_the_same_each_time(checkpoint: Path, tmp_path: Path) -> None:
    folders = [converted(checkpoint, tmp_path / name) for name in ("one", "two")]
    files = [{path.name: path.read_bytes() for path in sorted(folder.iterdir())} for folder in folders]
    assert files[0] == files[1]
    assert list(files[0]) == ["config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json"]
    tensors = load_file(folders[0] / "diffusion_pytorch_model.safetensors")
    assert predict(checkpoint, SMALL) == {
        "checkpoint": "small_uncond.pt",
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": len(files[0]["diffusion_pytorch_model.safetensors"]),
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert json.loads(files[0]["config.json"]) == SMALL


def test_schedule_beside_the_model_is_the_linear_one_of_the_release(checkpoint: Path, tmp_path: Path) -> None:
    ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    folder = converted(checkpoint, tmp_path / "adm")
    scheduler = ddpm.DDPMScheduler.from_pretrained(folder, local_files_only=True)
    wanted = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), wanted, rtol=1e-4, atol=0)
    assert scheduler.config.variance_type == "learned_range"  # six channels are noise and variance


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_older_files_and_narrower_numbers_convert_too(
    reference: Any, tmp_path: Path, legacy: bool, dtype: torch.dtype
) -> None:
    state = {name: nn.Parameter(tensor.to(dtype)) for name, tensor in reference[0].items()}
    torch.save(state, tmp_path / "half.pt", _use_new_zipfile_serialization=not legacy)
    found = convert(tmp_path / "half.pt", SMALL).tensor("conv_in.weight")
    assert torch.equal(found, state["input_blocks.0.0.weight"].detach().float())
    assert not found.requires_grad


class Harmful:
    """Pickled, it is a call of ``os.mkdir``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("form", ["plain", "zip", "legacy", "among tensors"])
def test_a_hostile_pickle_runs_nothing(tmp_path: Path, form: str) -> None:
    harm = Harmful(tmp_path / "harmed")
    path = tmp_path / "hostile.pt"
    if form == "plain":
        path.write_bytes(pickle.dumps(harm))
    else:
        content: Any = {"time_embed.0.weight": torch.zeros(2), "more": harm} if form == "among tensors" else harm
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(MissingError, match="could run code, so nothing was loaded") as caught:
        convert(path)
    assert "\n" not in caught.value.message
    assert not harm.folder.exists()
    pickle.loads(pickle.dumps(harm))  # it would have
    assert harm.folder.exists()


def changed(name: str, change: Callable[[Tensor], Any] | None) -> Callable[[dict[str, Any]], Any]:
    def apply(state: dict[str, Any]) -> dict[str, Any]:
        rest = {other: tensor for other, tensor in state.items() if other != name}
        return rest if change is None else rest | {name: change(state.get(name, torch.zeros(3)))}

    return apply


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed("out.2.bias", None), "1 of 382 tensors of ADM-256 are missing, among them out.2.bias"),
        (changed("label_emb.weight", torch.clone), "label_emb.weight; it is a model of classes"),
        (changed("evil\x1b[31m\nname", torch.clone), "does not have, among them evil[31m"),
        (changed("out.2.bias", lambda bias: bias[:3]), "out.2.bias has the shape (3,), not (6,)"),
        (changed("out.2.bias", torch.Tensor.double), "out.2.bias is no array of floating-point numbers"),
        (changed("out.2.bias", torch.Tensor.to_sparse), "out.2.bias is no array of floating-point numbers"),
        (changed("out.2.bias", lambda bias: bias.to("meta")), "out.2.bias is no array of floating-point numbers"),
        (changed("out.2.bias", torch.Tensor.tolist), "out.2.bias is no tensor"),
        (lambda state: {"state_dict": state}, "state_dict is no tensor"),
        (lambda state: list(state.values()), "holds no tensors by name"),
    ],
)
def test_what_is_not_adm_is_refused_in_one_line(
    reference: Any, tmp_path: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    torch.save(change(reference[0]), tmp_path / "other.pt")
    with pytest.raises(DataError) as caught:
        convert(tmp_path / "other.pt", SMALL)
    assert said in caught.value.message
    assert caught.value.message.isprintable()
    assert "256x256_diffusion_uncond.pt" in (caught.value.hint or "")


def test_damaged_and_missing_files_are_named(checkpoint: Path, tmp_path: Path) -> None:
    whole = checkpoint.read_bytes()
    damaged = {
        "empty": b"",
        "text": b"<html>not found</html>\n",
        "cut": whole[: len(whole) // 2],
        "short": whole[:-100],
        "beginning": whole[100:],
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MissingError) as caught:
            convert(tmp_path / name, SMALL)
        assert caught.value.message.startswith(str(tmp_path / name))
        assert caught.value.message.isprintable()
    for absent in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(MissingError, match="no such file"):
            convert(absent, SMALL)


def test_an_archive_that_torch_did_not_write_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """torch maps compressed bytes as if they were the weights, without a word."""
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("photos/1.txt", "1")
    with pytest.raises(MissingError, match="cannot be read"):
        convert(tmp_path / "photos.zip", SMALL)
    with (
        zipfile.ZipFile(checkpoint) as archive,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for part in archive.infolist():
            packed.writestr(part.filename, archive.read(part))
    with pytest.raises(MissingError, match="compressed"):
        convert(tmp_path / "packed.pt", SMALL)


def test_one_flipped_bit_among_the_weights_is_found(checkpoint: Path, tmp_path: Path) -> None:
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    (tmp_path / "adm").mkdir()
    with pytest.raises(MissingError, match="is damaged"):
        write(tmp_path / "flipped.pt", tmp_path / "adm", Quiet(), SMALL)
    assert not list((tmp_path / "adm").iterdir())


def test_weights_that_are_not_finite_are_no_model(reference: Any, tmp_path: Path) -> None:
    state = reference[0] | {"out.0.bias": torch.full((32,), math.nan)}
    torch.save(state, tmp_path / "diverged.pt")
    (tmp_path / "adm").mkdir()
    with pytest.raises(CheckFailed, match=r"conv_norm_out\.bias"):
        write(tmp_path / "diverged.pt", tmp_path / "adm", Quiet(), SMALL)


def test_a_folder_that_cannot_be_written_is_told(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the folder does not exist"):
        write(checkpoint, tmp_path / "absent", Quiet(), SMALL)
