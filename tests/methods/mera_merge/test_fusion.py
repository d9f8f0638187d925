"""Fused adapters against NumPy sums in float64, and against copies whose units were permuted."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from methods.mera_merge.adapterhub import make_bottleneck
from pomona.errors import CheckFailed, DataError, UsageError
from pomona.methods.mera_merge.adapters import Adapter, Bottleneck, read, with_sites
from pomona.methods.mera_merge.config import Config
from pomona.methods.mera_merge.fusion import Fused, fuse, medoid, shares

METHODS = ("avg", "sum", "wts", "acts", "assign")
ALIGNING = ("wts", "acts", "assign")
PARTS = ("down", "down_bias", "up", "up_bias")


def adapter(folder: Path, seed: int, **made: Any) -> Adapter:
    return read(f"a{seed}={make_bottleneck(folder / f'adapter{seed}', seed=seed, **made)}", allow_pickle=False)


def permuted(original: Adapter, label: str, seed: int) -> tuple[Adapter, dict[str, Tensor]]:
    """A copy whose units are in another order at every site, with the orders: unit i is the original's order[i]."""
    random = torch.Generator().manual_seed(seed)
    orders = {name: torch.randperm(len(site.down), generator=random) for name, site in original.sites().items()}
    sites = {
        name: Bottleneck(site.down[orders[name]], site.down_bias[orders[name]], site.up[:, orders[name]], site.up_bias)
        for name, site in original.sites().items()
    }
    return with_sites(original, sites, label), orders


def activations(adapters: Sequence[Adapter], tokens: int = 200, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """What the units of each adapter are before the nonlinearity, on the same hidden states."""
    width = next(iter(adapters[0].sites().values())).down.shape[1]
    hidden = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    return {
        adapter.label: {name: hidden @ site.down.float().T + site.down_bias for name, site in adapter.sites().items()}
        for adapter in adapters
    }


def merged(
    adapters: Sequence[Adapter], method: str, weights: Sequence[float] | None = None, reference: int = 0, **other: Any
) -> Fused:
    given: dict[str, Any] = {"features": "down+bias", "metric": "euclidean", "solver": None, **other}
    given.setdefault("activations", activations(adapters) if method == "acts" else None)
    weights = shares(weights, len(adapters), method=method, normalize=False)
    return fuse(adapters, method=method, weights=weights, reference=reference, **given)


def output(site: Bottleneck, hidden: NDArray[np.float64]) -> NDArray[np.float64]:
    """U relu(D h + b) + c in float64."""
    down, bias, up, up_bias = (getattr(site, part).double().numpy() for part in PARTS)
    return np.asarray(np.maximum(hidden @ down.T + bias, 0) @ up.T + up_bias)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and one[name].numpy().tobytes() == other[name].numpy().tobytes()
        for name in one
    )


# --- permuted copies (B1) --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALIGNING)
def test_an_adapter_and_its_permuted_copy_are_that_adapter_bit_for_bit(tmp_path: Path, method: str) -> None:
    original = adapter(tmp_path, 1, layers=6, width=384, rank=24)
    copy, orders = permuted(original, "copy", seed=2)
    found = merged([original, copy], method)
    assert same(found.adapter.tensors, original.tensors)
    assert found.sites.keys() == {"copy"}
    assert len(found.sites["copy"]) == 6
    for site, matching in found.sites["copy"].items():
        assert matching.permutation is not None
        assert matching.permutation.tolist() == orders[site].argsort().tolist()
        assert matching.cost_before is not None
        assert matching.cost_before > 1
        assert matching.cost_after == pytest.approx(0, abs=1e-3)  # activations are computed in another order
        assert matching.moved > 0.8
    hidden = np.random.default_rng(0).normal(size=(64, 384))
    average = merged([original, copy], "avg").adapter.sites()
    for name, site in original.sites().items():
        wanted = output(site, hidden)
        assert np.abs(output(average[name], hidden) - wanted).max() > 0.1
        assert np.abs(output(found.adapter.sites()[name], hidden) - wanted).max() == 0


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 12), st.integers(2, 5), st.integers(0, 2**32), st.sampled_from(ALIGNING))
def test_any_number_of_permuted_copies_are_the_reference(
    tmp_path: Path, rank: int, count: int, seed: int, method: str
) -> None:
    original = adapter(tmp_path, seed, width=16, rank=rank)
    copies = [permuted(original, f"copy{i}", seed + i)[0] for i in range(count)]
    for reference in (0, count):
        everything = [original, *copies]
        found = merged(everything, method, reference=reference)
        assert same(found.adapter.tensors, everything[reference].tensors)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_others_decides_no_bit(tmp_path: Path, method: str) -> None:
    four = [adapter(tmp_path, seed, rank=5) for seed in range(4)]
    weights = dict(zip(four_labels(four), (0.4, 0.3, 0.2, 0.13), strict=True))
    wanted = merged(four, method, list(weights.values())).adapter
    for rest in itertools.permutations(four[1:]):
        order = [*rest[:2], four[0], *rest[2:]]
        found = merged(order, method, [weights[one.label] for one in order], reference=2)
        assert same(found.adapter.tensors, wanted.tensors)


def four_labels(adapters: Sequence[Adapter]) -> list[str]:
    return [one.label for one in adapters]


# --- one adapter (B2) ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", (None, 0.05))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_of_weight_1_keeps_every_bit(
    tmp_path: Path, method: str, dtype: torch.dtype, solver: float | None
) -> None:
    one = adapter(tmp_path, 1, mh_adapter=True, ln_before=False)
    tensors = {name: tensor.to(dtype) for name, tensor in one.tensors.items()}
    for tensor in tensors.values():
        tensor.view(-1)[0] = -0.0
        tensor.view(-1)[1] = torch.finfo(dtype).smallest_normal / 4
    one = dataclasses.replace(one, tensors=tensors)
    found = merged([one], method, solver=solver)
    assert list(found.adapter.tensors) == list(one.tensors)
    for name, tensor in one.tensors.items():
        assert torch.equal(found.adapter.tensors[name].view(torch.uint8), tensor.view(torch.uint8))
    assert found.adapter.config == one.config
    assert found.sites == {}


# --- sums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ([0.5, 0.3, 0.2], [1.0, 1.0, 1.0], [1.5, -0.75, 0.25], [0.0, 1.0, 0.0]))
@pytest.mark.parametrize("method", ("avg", "sum"))
def test_a_sum_is_the_weighted_sum_of_every_tensor_by_numpy(tmp_path: Path, method: str, weights: list[float]) -> None:
    three = [adapter(tmp_path, seed, name=f"task{seed}", mh_adapter=True) for seed in range(3)]
    found = merged(three, method, weights, reference=1)
    assert list(found.adapter.tensors) == list(three[1].tensors)
    for names in zip(*(one.tensors for one in three), strict=True):
        values = [one.tensors[name].double().numpy() for one, name in zip(three, names, strict=True)]
        wanted = sum(weight * value for weight, value in zip(weights, values, strict=True))
        np.testing.assert_array_equal(found.adapter.tensors[names[1]].numpy(), np.float32(wanted))


@pytest.mark.parametrize("method", ALIGNING)
def test_an_aligned_sum_is_the_sum_of_what_each_permutation_gives_by_numpy(tmp_path: Path, method: str) -> None:
    three = [adapter(tmp_path, seed, rank=6) for seed in range(3)]
    weights = [0.5, 0.3, 0.2]
    found = merged(three, method, weights, reference=2)
    for name, site in found.adapter.sites().items():
        total: dict[str, Any] = dict.fromkeys(PARTS, 0.0)
        for one, weight in zip(three, weights, strict=True):
            values = {part: getattr(one.sites()[name], part).double().numpy() for part in PARTS}
            order = np.arange(6)
            if one is not three[2]:
                matching = found.sites[one.label][name]
                assert matching.permutation is not None
                order = matching.permutation.numpy()
            aligned = {"down": values["down"][order], "down_bias": values["down_bias"][order]}
            aligned |= {"up": values["up"][:, order], "up_bias": values["up_bias"]}
            total = {part: total[part] + weight * aligned[part] for part in PARTS}
        for part in PARTS:
            np.testing.assert_allclose(getattr(site, part).numpy(), total[part], rtol=1e-6, atol=1e-8)


def test_transport_and_assignment_agree_and_units_really_move(tmp_path: Path) -> None:
    three = [adapter(tmp_path, seed, rank=16, width=32) for seed in range(3)]
    assign, wts = merged(three, "assign"), merged(three, "wts")
    assert same(assign.adapter.tensors, wts.adapter.tensors)
    for label in ("a1", "a2"):
        for site, matching in wts.sites[label].items():
            assert matching.moved > 0.5
            assert matching.cost_before is not None
            assert matching.cost_after < matching.cost_before
            assert matching.digest == assign.sites[label][site].digest
    assert not same(wts.adapter.tensors, merged(three, "avg").adapter.tensors)


def test_sums_are_rounded_once(tmp_path: Path) -> None:
    eight = [adapter(tmp_path, seed) for seed in range(8)]
    eight = [
        dataclasses.replace(one, tensors={name: value.bfloat16() for name, value in one.tensors.items()})
        for one in eight
    ]
    found = merged(eight, "avg")
    for name, tensor in found.adapter.tensors.items():
        wanted = torch.stack([one.tensors[name].double() for one in eight]).mean(0).bfloat16()
        assert torch.equal(tensor, wanted)


def test_names_and_number_formats_are_the_references(tmp_path: Path) -> None:
    full, half = adapter(tmp_path, 1, name="one"), adapter(tmp_path, 2, name="two")
    half = dataclasses.replace(half, tensors={name: value.half() for name, value in half.tensors.items()})
    for reference, chosen in enumerate((full, half)):
        found = merged([full, half], "wts", reference=reference)
        assert found.adapter.config == chosen.config
        assert {name: value.dtype for name, value in found.adapter.tensors.items()} == {
            name: value.dtype for name, value in chosen.tensors.items()
        }
        dtype = ("float32", "float16")[reference]
        assert {entry["dtype"] for entry in found.provenance.values()} == {dtype}


def test_what_one_adapter_has_beside_its_bottlenecks_is_kept(tmp_path: Path) -> None:
    at = "bert.encoder.layer.1.output.adapters.task"
    norm = {f"{at}.adapter_norm_after.{leaf}": torch.rand(8) for leaf in ("weight", "bias")}
    one = adapter(tmp_path, 1, ln_after=True, tensors=norm)
    for method in METHODS:
        assert same(merged([one], method).adapter.tensors, one.tensors)


def test_every_tensor_says_where_it_came_from(tmp_path: Path) -> None:
    one, two = adapter(tmp_path, 1, name="one"), adapter(tmp_path, 2, name="two")
    found = merged([one, two], "wts", [0.75, 0.25])
    assert list(found.provenance) == list(one.tensors)
    for name, entry in found.provenance.items():
        ours, theirs = entry["sources"]
        assert ours == {"adapter": "a1", "tensor": name, "weight": 0.75}
        digest = theirs.pop("permutation", None)
        assert theirs == {"adapter": "a2", "tensor": name.replace(".one.", ".two."), "weight": 0.25}
        site = name.removeprefix("bert.").split(".adapters.")[0]
        permutation = found.sites["a2"][site].permutation
        assert permutation is not None
        moved = hashlib.sha256(permutation.numpy().tobytes()).hexdigest()
        assert digest == (None if name.endswith("adapter_up.bias") else moved)
    blended = merged([one, two], "wts", solver=0.1)
    assert all("permutation" not in source for entry in blended.provenance.values() for source in entry["sources"])
    assert sum("plan" in entry["sources"][1] for entry in blended.provenance.values()) == 3 * 2


# --- unequal widths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ("wts", "acts"))
def test_unequal_widths_take_the_references(tmp_path: Path, method: str) -> None:
    narrow, wide = adapter(tmp_path, 1, rank=2), adapter(tmp_path, 2, rank=4)
    for reference, chosen in enumerate((narrow, wide)):
        found = merged([narrow, wide], method, reference=reference)
        assert {n: t.shape for n, t in found.adapter.tensors.items()} == {n: t.shape for n, t in chosen.tensors.items()}
        assert found.adapter.config == chosen.config
        assert {m.permutation for by_site in found.sites.values() for m in by_site.values()} == {None}


@pytest.mark.parametrize("method", ("avg", "sum", "assign"))
def test_methods_that_do_not_transport_refuse_unequal_widths(tmp_path: Path, method: str) -> None:
    with pytest.raises(DataError, match=r"a1 and a2|in a2"):
        merged([adapter(tmp_path, 1, rank=2), adapter(tmp_path, 2, rank=4)], method)


# --- faults ----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_the_format_is_no_result(tmp_path: Path) -> None:
    one = adapter(tmp_path, 1)
    one = dataclasses.replace(one, tensors={name: value.half() for name, value in one.tensors.items()})
    with pytest.raises(CheckFailed, match=r"encoder\.layer\.0.*is not finite once merged"):
        merged([one], "sum", [1e6])


def test_activations_of_other_tokens_are_refused_with_their_place(tmp_path: Path) -> None:
    two = [adapter(tmp_path, seed) for seed in (1, 2)]
    mixed = {**activations(two[:1], tokens=10), **activations(two[1:], tokens=11)}
    with pytest.raises(DataError, match=r"a1 and a2: encoder\.layer\.0\.output: .*10 and by 11"):
        merged(two, "acts", activations=mixed)


# --- weights ---------------------------------------------------------------------------------------------------------


def test_weights_are_alike_unless_given_and_sum_to_1_unless_told_otherwise() -> None:
    assert shares(None, 4, method="wts", normalize=True) == [0.25] * 4
    assert shares(None, 4, method="sum", normalize=True) == [1.0] * 4
    assert shares([2.0, 6.0], 2, method="avg", normalize=True) == [0.25, 0.75]
    assert shares([2.0, -1.0], 2, method="avg", normalize=True) == [2.0, -1.0]
    assert shares([2.0, 6.0], 2, method="avg", normalize=False) == [2.0, 6.0]
    assert shares([2.0, 6.0], 2, method="sum", normalize=True) == [2.0, 6.0]
    assert shares([7.0], 1, method="wts", normalize=True) == [1.0]


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="gives 2 for 3 adapters"):
        shares([1.0, 2.0], 3, method="avg", normalize=True)
    with pytest.raises(UsageError, match="sum to 0"):
        shares([0.1, 0.2, -0.3], 3, method="avg", normalize=True)
    assert shares([1.0, -1.0], 2, method="avg", normalize=False) == [1.0, -1.0]


@pytest.mark.parametrize("method", ("avg", "sum", "assign", "delta-svd"))
def test_a_solver_is_for_methods_that_transport(method: str) -> None:
    with pytest.raises(UsageError, match=f"sinkhorn:0.1 is for wts and acts; --method {method}"):
        Config(method=method, solver="sinkhorn:0.1")
    assert Config(method=method).solver == "exact"
    assert Config(method="wts", solver="sinkhorn:0.1").method == "wts"


# --- medoid ----------------------------------------------------------------------------------------------------------


def mixed(one: Adapter, other: Adapter, shares: tuple[float, float], label: str) -> Adapter:
    """The weighted sum of two adapters, its units in an order of its own."""
    tensors = {name: shares[0] * one.tensors[name] + shares[1] * other.tensors[name] for name in one.tensors}
    return permuted(dataclasses.replace(one, tensors=tensors), label, seed=sum(map(ord, label)))[0]


@pytest.mark.parametrize("method", METHODS)
def test_the_medoid_is_nearest_to_the_others_once_units_are_matched(tmp_path: Path, method: str) -> None:
    """Small parameters alone are near to all: by the distances of units as they come, the faint one would be it."""
    centre, *others = (adapter(tmp_path, seed, rank=6) for seed in range(5))
    around = [mixed(centre, other, (1, 0.2), f"near{i}") for i, other in enumerate(others[:3])]
    faint = mixed(centre, others[3], (0, 0.05), "faint")
    five = [*around, faint, permuted(centre, "centre", seed=9)[0]]
    given: dict[str, Any] = {"features": "down+bias", "metric": "euclidean", "solver": None}
    for order in (five, five[::-1], [five[4], *five[:4]]):
        given["activations"] = activations(order) if method == "acts" else None
        assert order[medoid(order, method=method, **given)].label == "centre"


def test_of_one_or_two_the_first_is_the_medoid(tmp_path: Path) -> None:
    two = [adapter(tmp_path, seed) for seed in (1, 2)]
    for some in (two[:1], two):
        found = medoid(some, method="wts", features="down", metric="cosine", solver=None, activations=None)
        assert found == 0


# --- cost (B12) ------------------------------------------------------------------------------------------------------

_MERGE = """
import re, sys, time
from pathlib import Path
from pomona.methods.mera_merge.adapters import read, write
from pomona.methods.mera_merge.config import Config
from pomona.methods.mera_merge.fusion import fuse
import ot
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
started, imported = time.process_time(), peak()
adapters = [read(argument, allow_pickle=False) for argument in sys.argv[2:]]
asked = dict(features="down+bias", metric="euclidean", solver=None, activations=None)
found = fuse(adapters, method="wts", weights=[1 / len(adapters)] * len(adapters), reference=0, **asked)
write(Path(sys.argv[1]), found.adapter)
print(time.process_time() - started, peak(), imported)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_eight_adapters_of_a_base_model_merge_in_two_seconds_and_half_a_gigabyte(tmp_path: Path) -> None:
    folders = [make_bottleneck(tmp_path / f"a{s}", seed=s, layers=12, width=768, rank=48) for s in range(8)]
    command = [sys.executable, "-c", _MERGE, str(tmp_path / "merged"), *map(str, folders)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    seconds, megabytes, imported = map(float, said.split())
    print(f"{seconds:.2f} s of CPU, {megabytes:.0f} MB, of which torch and POT {imported:.0f} MB")
    assert seconds < 2
    assert megabytes - imported < 150
    assert megabytes < 500 or torch.version.cuda  # whose libraries alone may take more
