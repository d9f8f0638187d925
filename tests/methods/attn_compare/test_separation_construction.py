"""Both ways through the network against loops over its definition; its data against theirs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from methods.attn_compare.separation_loops import WEIGHTS, attended, data, network
from pomona.methods.attn_compare.kernels import find, registered
from pomona.methods.attn_compare.separation.constants import Constants
from pomona.methods.attn_compare.separation.construction import (
    Outputs,
    dataset,
    dense_difference,
    dense_outputs,
    feature_maps,
    final,
    fires,
    outputs,
    shares,
)
from pomona.methods.attn_compare.separation.signs import Signs, drawn

SMALL = Constants(n=24, d=8, m=5, a0=0.05, a1=0.9, c=0.6)
CROSS = Constants(n=24, d=8, m=5, a0=0.05, a1=0.9, c=0.6, variant="cross", g=1.5)
WIDE = Constants(n=600, d=62, m=20, a0=0.05, a1=1.0, c=0.9)

OTHERS = [kernel.name for kernel in registered()]
DEFAULTS = ["exp", "linear", "pow:2", "pow:4", "pow:6", "pow:8", "pow:16", "taylor2", "elu1", "favor:16", "favor:256"]


def some(constants: Constants, content: str = "test") -> Signs:
    (signs,) = drawn(content, 1, constants.m, constants.d)
    return Signs(signs.words[0], constants.d)


def test_the_data_sets_are_those_of_the_definition() -> None:
    queries, keys = dataset(SMALL, 0.9)
    assert queries is keys
    np.testing.assert_allclose(keys.numpy(), data(24, 8, 0.9, 0.4, 0.6), rtol=1e-15)
    unit = math.sqrt(math.log(24))
    np.testing.assert_allclose(keys.sum(1).numpy(), [1.9 * unit, *[unit] * 23])


def test_queries_of_the_cross_variant_all_have_the_declared_row_sum() -> None:
    queries, keys = dataset(CROSS, 0.9)
    np.testing.assert_allclose(queries.sum(1).numpy(), 1.5 * math.sqrt(math.log(24)))
    np.testing.assert_allclose(keys.numpy(), data(24, 8, 0.9, 0.4, 0.6), rtol=1e-15)


@pytest.mark.parametrize("constants", [SMALL, CROSS], ids=["self", "cross"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_both_ways_are_the_network_of_the_definition(name: str, constants: Constants) -> None:
    kernel, signs = find(name), some(constants)
    for a in (constants.a0, constants.a1):
        keys = data(24, 8, a, 0.4, 0.6)
        queries = (
            keys if constants.variant == "self" else np.full((24, 1), 1.5 * math.sqrt(math.log(24))) * np.eye(8)[7]
        )
        truth = attended(WEIGHTS[name], queries, keys)
        np.testing.assert_allclose(dense_outputs(kernel, dataset(constants, a), None).numpy(), truth, atol=1e-13)
        # A low threshold, so that F is more than 0.
        inner, of_all = network(truth, signs.each(), 0.3)
        quick = outputs(kernel, constants, a, None)
        found = quick.pre_activations(signs)
        np.testing.assert_allclose(found[:, 0], inner[:, 0], atol=1e-13)
        np.testing.assert_allclose(quick.largest(signs), inner.max(1), atol=1e-13)
        assert of_all > 1
        assert final(found, quick.counts, 0.3) == pytest.approx(of_all, rel=1e-12)


@pytest.mark.parametrize("variant", ["self", "cross"])
@pytest.mark.parametrize("name", sorted({*DEFAULTS, *OTHERS}))
def test_token_by_token_and_distinct_rows_agree(name: str, variant: str) -> None:
    kernel = find(name)
    constants = Constants(WIDE.n, WIDE.d, WIDE.m, WIDE.a0, WIDE.a1, WIDE.c, variant)
    maps = feature_maps(kernel, constants.n, 7)
    # Weights of inline are differences of sums of scores: roundings are larger, and F has 12 000 of them.
    bound = 1e-8 if name == "inline" else 1e-12
    for a in (constants.a0, constants.a1):
        assert dense_difference(kernel, constants, a, maps, some(constants)) <= bound


def test_a_difference_between_the_two_ways_would_show() -> None:
    """Two constructions that differ in one amplitude differ in their tokens, so the check can fail."""
    kernel, signs = find("exp"), some(WIDE)
    dense = dense_outputs(kernel, dataset(WIDE, 1.0), None).numpy() @ signs.each().T
    quick = outputs(kernel, WIDE, 1.0 + 1e-9, None).pre_activations(signs)
    assert np.abs(dense[0] - quick[:, 0]).max() > 1e-10


def test_where_the_special_token_stands_matters_to_no_kernel_without_positions() -> None:
    moved, (_, keys) = data(24, 8, 0.9, 0.4, 0.6, special=11), dataset(SMALL, 0.9)
    there = attended(WEIGHTS["exp"], moved, moved)[11]
    here = dense_outputs(find("exp"), (keys, keys), None).numpy()[0]
    np.testing.assert_allclose(np.sort(here), np.sort(there), atol=1e-13)


def test_a_kernel_with_positions_is_evaluated_on_every_token() -> None:
    kernel = find("cosformer")
    maps = feature_maps(kernel, SMALL.n, 0)
    quick = outputs(kernel, SMALL, 0.9, maps)
    assert not isinstance(quick, Outputs) and quick.rows.shape == (24, 8)
    keys = data(24, 8, 0.9, 0.4, 0.6)
    sums = keys.sum(1)
    places = np.arange(24)
    cosine = np.cos(np.pi * (places[:, None] - places) / 48)
    raw = np.maximum(sums, 0)[:, None] * np.maximum(sums, 0) * cosine
    np.testing.assert_allclose(quick.rows, raw / raw.sum(1, keepdims=True) @ keys, atol=1e-13)


@pytest.mark.parametrize("name", ["exp", "linear", "pow:16", "taylor2", "elu1", "favor:256"])
def test_float32_is_finite_and_close_where_exp_alone_would_overflow(name: str) -> None:
    constants = Constants(n=2000, d=102, m=20, a0=0.05, a1=2.5, c=0.9)
    assert (1 + 2.5) ** 2 * math.log(2000) > 88  # beyond float32's exp
    kernel, signs = find(name), some(constants)
    maps = feature_maps(kernel, constants.n, 0)
    single, double = (outputs(kernel, constants, 2.5, maps, dtype) for dtype in (torch.float32, torch.float64))
    assert single.rows.dtype == np.float32
    found = single.pre_activations(signs)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, double.pre_activations(signs), atol=1e-4)
    by_token = dense_outputs(kernel, dataset(constants, 2.5, torch.float32), maps)
    assert torch.isfinite(by_token).all()
    np.testing.assert_allclose(by_token[0, 0], double.rows[0, 0], atol=1e-4)


def test_attention_of_the_distinct_queries_is_whole() -> None:
    for variant in ("self", "cross"):
        constants = Constants(24, 8, 5, 0.05, 0.9, 0.6, variant)
        rows = shares(find("exp"), constants, 0.9, None)
        assert rows.shape == ((2, 2) if variant == "self" else (1, 2))
        np.testing.assert_allclose(rows.sum(-1), 1)


def test_a_value_equal_to_the_threshold_does_not_fire() -> None:
    tau = SMALL.tau
    found = fires(np.array([tau, tau * (1 + 1e-15), tau * (1 + 1e-9), tau * (1 - 1e-9)]), SMALL)
    assert found.tolist() == [False, False, True, False]
