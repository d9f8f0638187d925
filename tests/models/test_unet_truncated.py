"""The truncated pass against forward hooks on the full pass of diffusers."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pomona.errors import DataError
from pomona.models.unets.truncated import Truncated
from small_unet import small_unet

_ATTENTION: dict[str, Any] = {"add_attention": True, "attention_head_dim": 8}
_SKIP: dict[str, Any] = {"channels": 3, "layers_per_block": 2, "time_embedding_type": "fourier"}
_CROSS: dict[str, Any] = {
    "conditional": True, "channels": 4, "layers_per_block": 2, "cross_attention_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
_SIMPLE: dict[str, Any] = {
    "conditional": True, "cross_attention_dim": 8, "attention_head_dim": 8,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "resnet_time_scale_shift": "scale_shift",
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "three-levels": {"widths": (16, 16, 24), "layers_per_block": 2},
    "attention": {
        **_ATTENTION,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    },
    "attention-sampling": {
        **_ATTENTION,
        "down_block_types": ["AttnDownBlock2D"] * 2,
        "up_block_types": ["AttnUpBlock2D"] * 2,
    },
    "adm": {
        **_ATTENTION,
        "layers_per_block": 2,
        "down_block_types": ["AttnDownBlock2D", "ResnetDownsampleBlock2D"],
        "up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D"],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 8,
    },
    "skip": {**_SKIP, "down_block_types": ["SkipDownBlock2D"] * 2, "up_block_types": ["SkipUpBlock2D"] * 2},
    "attention-skip": {
        **_SKIP, "widths": (32, 32),
        "down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D"],
        "up_block_types": ["AttnSkipUpBlock2D", "SkipUpBlock2D"],
    },
    "learned-times": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "classes": {"num_class_embeds": 10},
    "no-middle": {"mid_block_type": None},
    "centred": {"center_input_sample": True},
    "cross": {**_CROSS, "attention_head_dim": 2},
    "cross-linear": {**_CROSS, "attention_head_dim": [2, 4], "use_linear_projection": True, "encoder_hid_dim": 6,
                     "addition_embed_type": "text", "addition_embed_type_num_heads": 2,
                     "time_embedding_act_fn": "silu"},
    "cross-simple": _SIMPLE,
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return small_unet(**MODELS[name]).type(dtype)


def _inputs(module: Any, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, module.config.in_channels, 8, 8, generator=generator)
    return x, torch.tensor([50, 431, 7])[:batch]


def full(module: Any, x: Tensor, t: Tensor) -> Tensor:
    """The whole pass; without a class, and with a text of one token of zeros."""
    dtype = next(module.parameters()).dtype
    tokens = []
    if "cross_attention_dim" in module.config:
        width = module.config.encoder_hid_dim or module.config.cross_attention_dim
        tokens = [torch.zeros(len(x), 1, width, dtype=dtype)]
    classes, module.class_embedding = module.class_embedding, None
    output = module(x.to(dtype), t, *tokens).sample
    module.class_embedding = classes
    return output  # type: ignore[no-any-return]


def hooked(module: Any, x: Tensor, t: Tensor, additions: Mapping[int, Tensor] | None = None) -> list[Tensor]:
    """The output of every block in running order, caught by hooks on the full pass, and added to where it is made.

    Of the encoder what its levels keep for the decoder is caught, which is every block of theirs.
    """
    makers = [module.conv_in]
    for level in module.down_blocks:
        makers += [*_residuals(level), *(level.downsamplers or [])]
    encoder = len(makers)
    makers += [module.mid_block] if module.mid_block is not None else []
    for level in module.up_blocks:
        makers += [*_residuals(level)[:-1], level]
    kept: list[Tensor] = []
    made: dict[int, Tensor] = {}

    def hook(number: int, output: Any) -> Any:
        """The output with its addition, put back as it came."""
        map_ = output[0] if isinstance(output, tuple) else output
        map_ = map_ + additions[number] if additions and number in additions else map_
        made[number] = map_
        return (map_, *output[1:]) if isinstance(output, tuple) else map_

    handles = [
        maker.register_forward_hook(lambda _, __, output, number=number: hook(number, output))
        for number, maker in enumerate(makers, start=1)
    ]
    for level in module.down_blocks:
        handles.append(level.register_forward_hook(lambda _, __, output: kept.extend(output[1])))
    full(module, x, t)
    for handle in handles:
        handle.remove()
    return [made[1], *kept, *(made[number] for number in range(encoder + 1, len(makers) + 1))]


def _residuals(level: Any) -> list[Any]:
    """What makes the output of each residual block: its attention, where each has one."""
    attentions = getattr(level, "attentions", ())
    return list(attentions if len(attentions) == len(level.resnets) else level.resnets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_block_is_bit_equal_to_what_hooks_catch_in_the_full_pass(name: str, dtype: torch.dtype) -> None:
    module = _model(name, dtype)
    x, t = _inputs(module)
    with torch.no_grad():
        expected = hooked(module, x, t)
        found = Truncated(module, range(1, len(expected) + 1))(x, t)
    assert len(found) == len(expected)
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True), start=1):
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs), number


@pytest.mark.parametrize("name", ["plain", "attention-skip", "cross"])
def test_a_pass_that_ends_at_a_block_gives_what_a_longer_one_gives(name: str) -> None:
    module = _model(name)
    x, t = _inputs(module)
    with torch.no_grad():
        expected = hooked(module, x, t)
        for number, theirs in enumerate(expected, start=1):
            assert torch.equal(Truncated(module, [number])(x, t)[0], theirs), number


def test_maps_come_in_the_order_of_the_blocks_named_and_one_may_be_named_twice() -> None:
    module = _model("three-levels")
    x, t = _inputs(module)
    with torch.no_grad():
        expected = hooked(module, x, t)
        found = Truncated(module, [12, 3, 12, 7])(x, t)
    assert all(torch.equal(ours, expected[n - 1]) for ours, n in zip(found, [12, 3, 12, 7], strict=True))


def test_nothing_after_the_last_block_is_computed_and_the_stem_needs_no_time() -> None:
    module = _model("adm")
    x, t = _inputs(module)
    ran: list[str] = []
    for name, part in module.named_modules():
        if not list(part.children()):
            part.register_forward_hook(lambda _, __, ___, name=name: ran.append(name))
    with torch.no_grad():
        Truncated(module, [1])(x, t)
        assert ran == ["conv_in"]
        ran.clear()
        Truncated(module, [4, 8])(x, t)  # 8 is the middle's follower: the first block of the decoder
    levels = {".".join(name.split(".")[:4]) for name in ran if name.startswith("up_blocks")}
    assert levels == {"up_blocks.0.resnets.0"}
    assert "conv_out" not in ran


def test_parameters_are_those_of_the_blocks_that_run() -> None:
    module = _model("plain")
    alone = Truncated(module, [2])
    own = {id(p) for part in (module.conv_in, module.time_embedding, module.down_blocks[0].resnets[0])
           for p in part.parameters()}  # fmt: skip
    assert {id(p) for p in alone.parameters()} == own


def test_maps_that_no_later_block_takes_up_are_not_held() -> None:
    module = _model("three-levels")  # an encoder of 9 blocks
    x, t = _inputs(module)
    outputs: dict[int, weakref.ref[Tensor]] = {}

    def alive_when(last: int, at: int) -> set[int]:
        truncated = Truncated(module, [last])
        alive: set[int] = set()
        for number, stage in enumerate(truncated.stages, start=1):
            stage.register_forward_hook(lambda _, __, out, n=number: outputs.__setitem__(n, weakref.ref(out[0])))
        truncated.stages[at - 1].register_forward_pre_hook(
            lambda *_: alive.update(n for n, map_ in outputs.items() if map_() is not None)
        )
        with torch.no_grad():
            truncated(x, t)
        return alive

    assert alive_when(10, 10) == {9}  # what goes in
    assert alive_when(12, 10) == {8, 9}  # the two that the decoder's first two blocks take up
    assert alive_when(12, 12) == set()  # both have been taken up


@pytest.mark.parametrize("name", ["adm", "cross"])
def test_what_is_added_to_a_block_is_passed_on_and_kept_for_the_decoder(name: str) -> None:
    module = _model(name)
    x, t = _inputs(module)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        plain = hooked(module, x, t)
        numbers = [1, 3, 4, 6, 7, 8]  # stem, residual block, down-sampler, residual block, middle, decoder
        additions = {n: torch.randn(plain[n - 1].shape, generator=generator) for n in numbers}
        expected = hooked(module, x, t, additions)
        found = Truncated(module, range(1, len(plain) + 1))(x, t, additions)
        again = Truncated(module, range(1, len(plain) + 1))(x, t)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(found, plain, strict=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, plain, strict=True))


def test_gradients_reach_additions_and_no_parameter() -> None:
    module = _model("attention", torch.float64)
    x, t = _inputs(module)
    truncated = Truncated(module, [7])
    addition = torch.zeros(2, 16, 8, 8, dtype=torch.float64, requires_grad=True)
    truncated(x, t, {2: addition})[0].sum().backward()  # type: ignore[no-untyped-call]
    assert addition.grad is not None
    step = 1e-4
    with torch.no_grad():  # the slope along one direction, by differences
        way = torch.randn(addition.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        up, down = (truncated(x, t, {2: sign * step * way})[0].sum() for sign in (1, -1))
    assert float((addition.grad * way).sum()) == pytest.approx(float(up - down) / (2 * step), rel=1e-5)
    assert all(p.grad is None and not p.requires_grad for p in truncated.parameters())


def test_it_stays_in_evaluation_mode_within_a_module_that_trains() -> None:
    module = small_unet(dropout=0.5)
    x, t = _inputs(module)
    head = nn.ModuleDict({"unet": Truncated(module, [5])})
    head.train()
    assert head.training and not any(part.training for part in head["unet"].modules())
    assert torch.equal(head["unet"](x, t)[0], head["unet"](x, t)[0])


def test_images_are_converted_to_the_format_of_the_network() -> None:
    module = _model("plain", torch.bfloat16)
    x, t = _inputs(module)
    truncated = Truncated(module, [3])
    assert torch.equal(truncated(x, t)[0], truncated(x.bfloat16(), t)[0])


@pytest.mark.parametrize(
    "name",
    ["adm", pytest.param("attention-skip", marks=pytest.mark.slow), pytest.param("cross", marks=pytest.mark.slow)],
)
def test_compiling_makes_one_graph(name: str) -> None:
    module = _model(name)
    x, t = _inputs(module)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    truncated = Truncated(module, [2, 6, 8])
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        found = torch.compile(truncated, backend=backend, fullgraph=True)(x, t)
        assert all(torch.equal(*pair) for pair in zip(found, truncated(x, t), strict=True))
    assert len(graphs) == 1


@pytest.mark.slow
def test_the_compiled_pass_agrees_with_the_plain_one() -> None:
    module = _model("adm")
    x, t = _inputs(module)
    truncated = Truncated(module, [8])
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(truncated, fullgraph=True)(x, t), truncated(x, t))


@pytest.mark.parametrize("numbers", [[], [0], [10], [3, -1]])
def test_blocks_that_are_not_there_are_refused(numbers: list[int]) -> None:
    with pytest.raises(ValueError, match="of a U-Net with 9"):
        Truncated(_model("plain"), numbers)


def test_additions_to_blocks_that_are_not_computed_are_refused() -> None:
    module = _model("plain")
    with pytest.raises(ValueError, match="block 4 is not among the 3"):
        Truncated(module, [3])(*_inputs(module), {4: torch.zeros(1)})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"down_block_types": ["DownBlock2D", "DownEncoderBlock2D"]}, "DownEncoderBlock2D"),
        ({**_CROSS, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
          "projection_class_embeddings_input_dim": 32}, "addition_embed_type text_time"),
        ({**_CROSS, "encoder_hid_dim": 6, "encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type image_proj"),
        ({**_CROSS, "dual_cross_attention": True, "attention_head_dim": 2}, "dual_cross_attention True"),
    ],
)  # fmt: skip
def test_networks_that_cannot_be_read_are_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        Truncated(small_unet(**fields), [1])


def test_another_class_is_refused() -> None:
    with pytest.raises(DataError, match="Linear is no UNet2DModel"):
        Truncated(nn.Linear(1, 1), [1])
