"""Predicted FLOPs against torch's own counter, predicted bytes against the tensors and against the process."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, baddbmm_flop

from pomona.methods.attn_compare import kernels, linear
from pomona.methods.attn_compare.maps import Features
from pomona.methods.attn_compare.speed import costs, memory
from pomona.methods.attn_compare.speed.costs import Shape
from pomona.methods.attn_compare.speed.implementations import Implementation, shape

HEADS, N, D = 3, 1024, 24


def counted(form: str, kernel: str, way: str) -> int:
    """FLOPs that torch counts in a pass over features that are given."""
    implementation = Implementation(form, kernels.find(kernel))
    r = implementation.features(D)
    widths = (D, D, D) if not r else (r, r, D)
    x, y, v = (torch.rand(1, HEADS, N, width, requires_grad=way == "train") for width in widths)
    in_place = {torch.ops.aten.baddbmm_: lambda *shapes, out_shape: baddbmm_flop(*shapes)}  # which torch leaves out
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        out = implementation.mix(Features(x), Features(y), v, 64) if r else implementation.attend(x, y, v, None, 64)
        if way == "train":
            torch.autograd.grad(out, (x, y, v), torch.ones_like(out))
    return counter.get_total_flops()


@pytest.mark.parametrize("way", ("fwd", "train"))
@pytest.mark.parametrize(
    ("form", "kernel"),
    [
        ("eager", "exp"),
        ("chunked", "elu1"),
        ("chunked", "dpfp:1"),
        ("batched", "elu1"),
        ("quadratic", "elu1"),
    ],
)
def test_flops_are_what_torch_counts(form: str, kernel: str, way: str) -> None:
    implementation = Implementation(form, kernels.find(kernel))
    predicted = costs.flops(form, way, shape(implementation, N, D, HEADS, 4))
    if form == "chunked":  # the first chunk reads no state and the last leaves none: together, one chunk's worth
        r, e = implementation.features(D), D + 1
        predicted -= HEADS * 64 * (4 if way == "fwd" else 14) * r * e
    assert counted(form, kernel, way) == predicted


def test_a_prefix_sum_multiplies_and_reads_a_state_for_every_position() -> None:
    predicted = costs.flops("prefix-sum", "fwd", Shape(HEADS, N, D, D))
    assert predicted == HEADS * 4 * N * D * (D + 1)
    assert counted("prefix-sum", "elu1", "fwd") == predicted / 2  # the outer products are no matrix product


def test_a_fused_causal_softmax_takes_half_the_flops_of_an_eager_one() -> None:
    whole = Shape(HEADS, N, D, 0, causal=False)
    assert costs.flops("sdpa", "fwd", whole) == costs.flops("eager", "fwd", whole) == HEADS * 4 * N * N * D
    assert costs.flops("sdpa", "fwd", Shape(HEADS, N, D, 0)) == HEADS * 2 * N * N * D


@pytest.mark.parametrize(
    ("width", "features", "crossover", "break_even"),
    [(64, 64, 259, 32.5), (64, 2145, 6567, 1089), (16, 153, None, None), (64, 814_385, None, 4.1e5)],
)
def test_the_closed_forms_give_the_figures_of_the_specification(
    width: int, features: int, crossover: float | None, break_even: float | None
) -> None:
    if crossover is not None:
        assert costs.flop_crossover(width, features) == pytest.approx(crossover, rel=0.01)
    if break_even is not None:
        assert costs.decode_break_even(width, features) == pytest.approx(break_even, rel=0.01)


def test_flops_of_both_forms_are_equal_where_they_are_said_to_cross() -> None:
    n = costs.flop_crossover(64, 153)
    softmax, chunked = (
        costs.flops(form, "fwd", Shape(8, round(n * 1000), 64, features))
        for form, features in (("sdpa", 0), ("chunked", 153))
    )
    assert softmax / 1000 == pytest.approx(chunked, rel=1e-5)  # n² against n


def test_the_state_and_the_cache_take_the_bytes_of_their_tensors() -> None:
    k, v = torch.rand(1, HEADS, 77, 24), torch.rand(1, HEADS, 77, 12)
    state = linear.State.of(Features(k), v)
    assert HEADS * costs.decode_state(24, 12) == state.nbytes
    assert HEADS * costs.decode_cache(77, 24) == 2 * k.nbytes
    even = costs.decode_break_even(12, 24)
    assert costs.decode_state(24, 12) == pytest.approx(costs.decode_cache(1000, 12) * even / 1000)


@pytest.mark.parametrize("way", ("fwd", "train"))
def test_predicted_bytes_lie_within_a_third_of_the_peak_of_a_process(way: str) -> None:
    forms = [
        ("sdpa", "exp"),
        ("eager", "exp"),
        ("chunked", "elu1"),
        ("chunked", "favor:256"),
        ("batched", "elu1"),
        ("quadratic", "relu"),
        ("prefix-sum", "elu1"),
    ]
    common = {"pass": way, "causal": True, "length": 2048, "dim": 32, "heads": 4, "dtype": "float32"}
    passes = [{**common, "form": form, "kernel": k, "seed": 0, "chunk": 64, "device": "cpu"} for form, k in forms]
    peaks = memory.in_fresh_process(passes)
    if None in peaks:
        pytest.skip("this system does not tell the peak of a process's memory")
    for (form, kernel), peak in zip(forms, peaks, strict=True):
        predicted = costs.nbytes(form, way, shape(Implementation(form, kernels.find(kernel)), 2048, 32, 4, 4))
        assert peak == pytest.approx(predicted, rel=1 / 3), form


def test_what_a_process_cannot_tell_is_unknown() -> None:
    assert memory.in_fresh_process([{"form": "no such form"}]) == [None]
