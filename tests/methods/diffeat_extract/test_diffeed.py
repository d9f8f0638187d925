"""DifFeed against full passes with hooks: what is fed back where, what learns, and what does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from methods.diffeat_extract import heads_reference as reference
from methods.diffeat_extract.hooked_unet import Hooked
from pomona.errors import UsageError
from pomona.methods.diffeat_extract.heads.diffeed import DifFeed, Feedback, feedback
from pomona.methods.diffeat_extract.heads.difformer import blocks_to_read
from pomona.methods.diffeat_extract.heads.learning import learn, predict
from pomona.models.unets.blocks import Block, blocks
from pomona.runtime.progress import Quiet
from small_unet import small_unet

TIME = 150
Array = NDArray[np.float64]


@pytest.fixture(scope="module")
def unet() -> Any:
    return small_unet(widths=(8, 16, 16), layers_per_block=2, dropout=0.3).double()


def noisy(count: int = 4) -> Tensor:
    return torch.from_numpy(np.random.default_rng(8).normal(size=(count, 1, 8, 8)))


def built(unet: Any, plan: Feedback | None = None, **changed: Any) -> DifFeed:
    table = blocks(unet, 8)
    chosen = plan or feedback(table)
    given = {"classes": 3, "time": TIME, "seed": 2, **changed}
    model = DifFeed(unet, table, chosen, **given)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if value.is_floating_point():
                change = torch.randn(value.shape, generator=random) * 0.1
                value.add_(change.abs() if "var" in name else change)
    return model.to(unet.dtype)


def expected(unet: Any, plan: Feedback, x: Tensor, p: reference.Parameters, *, training: bool) -> Array:
    """Logits by two whole passes of `unet`, with the rest in NumPy."""
    t = torch.full((len(x),), TIME)
    additions = {}
    for place, (source, goal) in enumerate(zip(plan.sources, plan.places, strict=True)):
        (maps,) = Hooked(unet, [source])(x, t)
        added = reference.feedback(maps.numpy(), reference.part(p, f"feedback.{place}"), training=training)
        (output,) = Hooked(unet, [goal])(x, t)
        if added.shape[-1] == 2 * output.shape[-1]:  # bilinear at cell centres: the mean of the four around each
            added = added.reshape(*added.shape[:2], output.shape[-1], 2, output.shape[-1], 2).mean((3, 5))
        additions[goal] = torch.from_numpy(added)
    (maps,) = Hooked(unet, [plan.head])(x, t, additions)
    return reference.attention(maps.numpy(), reference.part(p, "head"))


def named(levels: int, residual: int) -> list[Block]:
    """Blocks of a U-Net by the papers' order."""
    names = ["stem"]
    for level in range(levels):
        names += [f"d{level}r{place}" for place in range(residual)] + [f"d{level}down"] * (level + 1 < levels)
    names += ["mid", *(f"u{level}r{place}" for level in range(levels) for place in range(residual + 1))]
    return [Block(number, name, 0, 0, 0, 0, 0.0) for number, name in enumerate(names, start=1)]


# --- the choice of blocks --------------------------------------------------------------------------------------------


def test_of_adm_the_choices_are_those_of_the_paper() -> None:
    table = named(levels=6, residual=2)
    assert len(table) == 37
    plan = feedback(table)
    assert plan.sources == (21, 24, 27, 30, 33, 36)
    assert plan.places == (17, 14, 11, 8, 5, 2)
    assert plan.head == 24
    assert blocks_to_read(table) == [19, 24, 30]


@pytest.mark.parametrize(
    ("levels", "residual", "sources", "goals", "head", "read"),
    [
        pytest.param(2, 1, "u0r0 u1r0", "d1r0 d0r0", "u0r0", "mid u0r0 u1r0", id="digits"),
        pytest.param(4, 2, "u0r1 u1r1 u2r1 u3r1", "d3r0 d2r0 d1r0 d0r0", "u0r1", "mid u0r1 u2r1", id="CIFAR"),
        pytest.param(1, 2, "u0r1", "d0r0", "u0r1", "mid u0r1", id="one level"),
    ],
)
def test_of_other_models_every_level_feeds_its_mirror(
    levels: int, residual: int, sources: str, goals: str, head: str, read: str
) -> None:
    table = named(levels, residual)
    name = {block.number: block.name for block in table}
    plan = feedback(table)
    assert " ".join(name[number] for number in plan.sources) == sources
    assert " ".join(name[number] for number in plan.places) == goals
    assert name[plan.head] == head
    assert " ".join(name[number] for number in blocks_to_read(table)) == read


def test_blocks_that_feed_each_other_are_of_one_size(unet: Any) -> None:
    table = blocks(unet, 8)
    plan = feedback(table)
    for source, goal in zip(plan.sources, plan.places, strict=True):
        assert source + goal == len(table) + 1
        assert table[source - 1].side == table[goal - 1].side


def test_a_head_that_not_all_feedback_reaches_is_refused_and_another_block_is_taken() -> None:
    table = named(levels=2, residual=1)
    assert [feedback(table, head=head).head for head in (4, 5, 9)] == [4, 5, 9]
    with pytest.raises(UsageError, match="--block 3 comes before block 4"):
        feedback(table, head=3)


# --- two passes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_logits_are_those_of_two_whole_passes_with_hooks(unet: Any, training: bool) -> None:
    """Also in training the diffusion model drops nothing out, and batch statistics are the batch's."""
    model = built(unet).train(training)
    p, x = reference.parameters(model), noisy()
    assert (p["feedback.0.1.running_mean"] != 0).all()
    found = model(x)
    assert found.shape == (4, 3)
    np.testing.assert_allclose(found.detach().numpy(), expected(unet, model.plan, x, p, training=training), atol=1e-10)


def test_maps_of_another_size_are_resized_to_that_of_the_block_they_are_added_to(unet: Any) -> None:
    table = {block.name: block for block in blocks(unet, 8)}
    plan = Feedback((table["u0r2"].number,), (table["d1down"].number,), table["u1r0"].number)
    assert table["u0r2"].side == 2 * table["d1down"].side
    model = built(unet, plan).eval()
    p, x = reference.parameters(model), noisy()
    np.testing.assert_allclose(model(x).detach().numpy(), expected(unet, plan, x, p, training=False), atol=1e-10)


def test_gradients_of_the_feedback_layers_are_the_slopes_of_two_whole_passes(unet: Any) -> None:
    model = built(unet).train()
    x, random = noisy(), np.random.default_rng(1)
    at = reference.parameters(model)
    weights = random.normal(size=(4, 3))
    torch.autograd.backward((model(x) * torch.from_numpy(weights)).sum())
    own = dict(model.named_parameters())
    along = {name: random.normal(size=value.shape) * (name in own) for name, value in at.items()}
    slope = sum(float((value.grad.numpy() * along[name]).sum()) for name, value in own.items())

    def value(step: float) -> float:
        p = {name: value + step * along[name] for name, value in at.items()}
        return float((expected(unet, model.plan, x, p, training=True) * weights).sum())

    assert slope == pytest.approx((value(1e-6) - value(-1e-6)) / 2e-6, rel=1e-5)
    assert all(float(value.grad.abs().max()) > 0 for name, value in own.items() if "feedback" in name)


def test_what_the_first_pass_gives_may_be_kept(unet: Any) -> None:
    model = built(unet).eval()
    x = noisy()
    kept = model.first(x)
    assert not any(maps.requires_grad for maps in kept)
    assert torch.equal(model(x), model(x, *kept))
    other = model(x, *(maps + 1 for maps in kept))
    assert not torch.allclose(model(x), other)


def test_what_learns_is_where_the_diffusion_model_is(unet: Any) -> None:
    with torch.device("meta"):
        elsewhere = type(unet).from_config(unet.config)
    table = blocks(unet, 8)
    model = DifFeed(elsewhere, table, feedback(table), 3, time=TIME, seed=1)
    assert {value.device.type for value in model.state_dict().values()} == {"meta"}


def test_a_diffusion_model_in_bfloat16_has_a_head_in_float32(unet: Any) -> None:
    narrow = small_unet(widths=(8, 16, 16), layers_per_block=2).to(torch.bfloat16)
    model = built(narrow).float().eval()
    x = noisy()
    logits = model(x.to(torch.bfloat16))
    torch.autograd.backward(logits.sum())
    assert logits.dtype == torch.float32
    assert {value.grad.dtype for value in model.parameters()} == {torch.float32}


# --- learning --------------------------------------------------------------------------------------------------------


def test_learning_changes_the_feedback_and_the_head_and_not_a_byte_of_the_diffusion_model(unet: Any) -> None:
    frozen = small_unet(widths=(8, 16, 16), layers_per_block=2, dropout=0.3)
    frozen.requires_grad_(True)  # as a model that was not loaded for reading
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    model = built(frozen)
    started = {name: value.clone() for name, value in model.state_dict().items()}
    random = np.random.default_rng(4)
    labels = random.integers(0, 2, 40)
    images = random.normal(size=(40, 1, 8, 8)).astype(np.float32)
    images[labels == 1, :, :4] += 1.5

    def inputs(rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        return (torch.from_numpy(images[rows]),)

    losses = learn(model, inputs, labels, np.arange(40), epochs=16, batch=8, rate=0.05, seed=1, progress=Quiet())
    assert losses[-1] < 0.5 * losses[0]
    assert (predict(model, inputs, np.arange(40), batch=16) == labels).mean() >= 0.95
    for name, value in frozen.named_parameters():
        assert not value.requires_grad, name
        assert value.grad is None, name
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert not any(torch.equal(value, started[name]) for name, value in model.state_dict().items())
    assert {name.split(".")[0] for name in started} == {"feedback", "head"}


def test_feedback_and_head_have_as_many_parameters_as_the_formula_says(unet: Any) -> None:
    model = built(unet)
    shapes = {block.number: block.channels for block in blocks(unet, 8)}
    pairs = zip(model.plan.sources, model.plan.places, strict=True)
    layers = sum(shapes[source] * shapes[goal] + 2 * shapes[goal] for source, goal in pairs)
    assert sum(value.numel() for value in model.feedback.parameters()) == layers
