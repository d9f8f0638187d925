"""The table of blocks against the published table of ADM-256, and against products counted by formula."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from pomona.errors import DataError, UsageError
from pomona.models.unets.adm import CONFIG
from pomona.models.unets.blocks import Block, blocks, resolve
from small_unet import config, small_unet

_PUBLISHED = {  # block of ADM-256: channels, side, percent of the cost of a whole pass
    7: (256, 64, 19.5), 13: (512, 16, 24.3), 15: (1024, 16, 25.3), 18: (1024, 8, 25.7), 19: (1024, 8, 25.9),
    22: (1024, 16, 27.0), 24: (1024, 16, 28.6), 27: (512, 32, 33.0), 30: (512, 64, 41.2), 33: (256, 128, 56.9),
    37: (256, 256, 100.0),
}  # fmt: skip


@pytest.fixture(scope="module")
def adm() -> tuple[Any, list[Block]]:
    from diffusers.models.unets.unet_2d import UNet2DModel

    with torch.device("meta"):
        module = UNet2DModel.from_config(CONFIG)
    return module, blocks(module, 256)


def test_the_blocks_of_adm_are_those_of_the_papers(adm: tuple[Any, list[Block]]) -> None:
    module, table = adm
    assert sum(p.numel() for p in module.parameters()) == 552_814_086
    assert [block.number for block in table] == list(range(1, 38))
    for number, (channels, side, percent) in _PUBLISHED.items():
        block = table[number - 1]
        assert (block.channels, block.side) == (channels, side)
        assert 100 * block.share == pytest.approx(percent, abs=0.1), number
    assert table[18].name == "mid" and table[23].name == "u1r1"
    assert sum(block.flops for block in table[:24]) == pytest.approx(639e9, rel=1e-3)
    assert sum(block.parameters for block in table[:24]) == pytest.approx(415e6, rel=2e-3)
    head = sum(p.numel() for part in (module.conv_norm_out, module.conv_out) for p in part.parameters())
    assert sum(block.parameters for block in table) == 552_814_086 - head


def test_names_tell_levels_residual_blocks_and_down_samplers() -> None:
    names = [block.name for block in blocks(small_unet(widths=(16, 16, 24), layers_per_block=2), 8)]
    assert names == (
        "stem d0r0 d0r1 d0down d1r0 d1r1 d1down d2r0 d2r1 mid u0r0 u0r1 u0r2 u1r0 u1r1 u1r2 u2r0 u2r1 u2r2".split()
    )
    without = [block.name for block in blocks(small_unet(mid_block_type=None), 8)]
    assert without == "stem d0r0 d0down d1r0 u0r0 u0r1 u1r0 u1r1".split()


def test_costs_are_the_products_of_the_convolutions_and_maps() -> None:
    """Of a U-Net of widths 16 and 32 on 8 x 8: two for each multiply and add."""

    def convolution(inner: int, outer: int, side: int, kernel: int = 3) -> int:
        return 2 * kernel**2 * inner * outer * side**2

    def residual(inner: int, outer: int, side: int) -> int:
        shortcut = convolution(inner, outer, side, kernel=1) if inner != outer else 0
        return convolution(inner, outer, side) + convolution(outer, outer, side) + shortcut + 2 * 64 * outer

    expected = [
        convolution(1, 16, 8),
        residual(16, 16, 8) + 2 * (16 * 64 + 64 * 64),  # and what embeds the time
        convolution(16, 16, 4),
        residual(16, 32, 4),
        2 * residual(32, 32, 4),
        residual(32 + 32, 32, 4),
        residual(32 + 16, 32, 4) + convolution(32, 32, 8),
        residual(32 + 16, 16, 8),
        residual(16 + 16, 16, 8),
    ]
    table = blocks(small_unet(), 8)
    assert [block.flops for block in table] == expected
    whole = sum(expected) + convolution(16, 1, 8)
    shares = [sum(expected[:number]) / whole for number in range(1, 10)]
    assert [block.share for block in table] == pytest.approx(shares, rel=1e-12)
    assert [(block.channels, block.side) for block in table] == [
        (16, 8), (16, 8), (16, 4), (32, 4), (32, 4), (32, 4), (32, 8), (16, 8), (16, 8),
    ]  # fmt: skip


def test_self_attention_costs_the_products_of_queries_keys_and_values() -> None:
    attending = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "attention_head_dim": 8}
    with_, without = (blocks(small_unet(**changed), 8) for changed in (attending, {}))
    tokens, width = 4 * 4, 32
    maps, products = 4 * 2 * tokens * width**2, 2 * 2 * tokens**2 * width
    assert with_[3].flops - without[3].flops == maps + products
    assert [a.flops == b.flops for a, b in zip(with_, without, strict=True)] == [True] * 3 + [False] + [True] * 5


def test_models_with_classes_and_conditions_are_counted_without() -> None:
    assert blocks(small_unet(num_class_embeds=5), 8) == blocks(small_unet(), 8)
    cross = {
        "conditional": True, "cross_attention_dim": 8, "attention_head_dim": 2,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }  # fmt: skip
    table = blocks(small_unet(**cross), 8)
    assert len(table) == 9
    assert all(before.share < after.share for before, after in pairwise(table)) and table[-1].share < 1


def test_the_skip_blocks_of_score_models_are_counted() -> None:
    fields = {"channels": 3, "time_embedding_type": "fourier", "up_block_types": ["SkipUpBlock2D"] * 2}
    table = blocks(small_unet(**fields, down_block_types=["SkipDownBlock2D"] * 2), 8)
    assert [(block.name, block.side) for block in table[:4]] == [("stem", 8), ("d0r0", 8), ("d0down", 4), ("d1r0", 4)]


def test_counting_leaves_the_model_and_the_generator_as_they_are() -> None:
    module = small_unet(num_class_embeds=5)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    blocks(module, 16)
    assert torch.equal(torch.get_rng_state(), state)
    assert module.class_embedding is not None
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(("size", "nearest"), [(9, 8), (6, 8), (1, 4), (30, 32)])
def test_sides_that_cannot_be_halved_are_refused_with_the_nearest(size: int, nearest: int) -> None:
    with pytest.raises(UsageError, match=f"side {size}: .* down to 1/4, .* multiple of 4") as caught:
        blocks(small_unet(widths=(16, 16, 16)), size)
    assert caught.value.hint is not None and f"--image-size {nearest} " in caught.value.hint


@pytest.mark.parametrize("changed", [{"norm_eps": "x"}, {"downsample_padding": 3}, {"freq_shift": None}])
def test_a_configuration_that_cannot_run_is_refused_in_one_line(changed: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="the U-Net cannot run: ") as caught:
        blocks(small_unet(**changed), 8)
    assert "\n" not in caught.value.message


@pytest.fixture(scope="module")
def table() -> list[Block]:
    return blocks(small_unet(), 8)


@pytest.mark.parametrize(
    ("wanted", "numbers"),
    [
        (["4"], [4]),
        (["u0r0", "stem"], [6, 1]),
        (["mid"], [5]),
        (["mid+1", "mid-2"], [6, 3]),
        (["3", "d0down", "3"], [3]),
        (["9", "all"], [9, 1, 2, 3, 4, 5, 6, 7, 8]),
        ([], []),
    ],
)
def test_blocks_are_named_by_number_name_and_place(wanted: list[str], numbers: list[int], table: list[Block]) -> None:
    assert [block.number for block in resolve(wanted, table)] == numbers


@pytest.mark.parametrize(
    ("name", "hint"),
    [("u0r5", "near: u0r"), ("middle", "near: mid"), ("0", ""), ("10", ""), ("mid+5", ""), ("mid-5", ""), ("mid+", ""),
     ("", ""), ("٤", ""), ("-1", ""), ("9" * 5000, "")],
)  # fmt: skip
def test_blocks_that_are_not_there_are_refused_with_those_that_are_near(
    name: str, hint: str, table: list[Block]
) -> None:
    with pytest.raises(UsageError, match="--block") as caught:
        resolve(["1", name], table)
    assert caught.value.hint is not None and hint in caught.value.hint and "--list-blocks" in caught.value.hint


def test_a_model_without_a_middle_has_no_places_from_it() -> None:
    with pytest.raises(UsageError, match="--block mid"):
        resolve(["mid+1"], blocks(small_unet(**{**config(), "mid_block_type": None}), 8))
