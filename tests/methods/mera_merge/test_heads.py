"""Prediction heads against their means by NumPy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from methods.mera_merge.adapterhub import make_bottleneck
from pomona.errors import CheckFailed, DataError, UsageError
from pomona.methods.mera_merge.adapters import Adapter, read
from pomona.methods.mera_merge.heads import merged


def adapter(folder: Path, seed: int, labels: int | None = 3, **made: Any) -> Adapter:
    path = make_bottleneck(folder / f"adapter{seed}", seed=seed, labels=labels, name=f"task{seed}", **made)
    return read(f"a{seed}={path}", allow_pickle=False)


def test_heads_are_dropped_or_the_references(tmp_path: Path) -> None:
    two = [adapter(tmp_path, 1), adapter(tmp_path, 2)]
    assert merged(two, choice="drop", weights=[0.5, 0.5], reference=1) == ({}, None)
    head, described = merged(two, choice="keep-reference", weights=[0.5, 0.5], reference=1)
    assert described == two[1].head_config
    assert list(head) == list(two[1].head)
    assert all(torch.equal(head[name], two[1].head[name]) for name in head)


@pytest.mark.parametrize("weights", ([0.5, 0.5], [3.0, 1.0], [2.0, -1.0]))
def test_an_average_has_weights_of_sum_1_and_the_names_of_the_reference(tmp_path: Path, weights: list[float]) -> None:
    two = [adapter(tmp_path, 1), adapter(tmp_path, 2)]
    head, described = merged(two, choice="average", weights=weights, reference=1)
    assert described == two[1].head_config
    assert list(head) == list(two[1].head)
    for ours, theirs in zip(two[1].head, two[0].head, strict=True):
        assert ours != theirs
        values = two[0].head[theirs].double().numpy(), two[1].head[ours].double().numpy()
        wanted = np.average(values, axis=0, weights=weights)
        np.testing.assert_allclose(head[ours].numpy(), wanted, rtol=1e-6, atol=1e-7)
    assert {value.dtype for value in head.values()} == {torch.float32}


def test_one_head_averaged_alone_keeps_every_bit(tmp_path: Path) -> None:
    one = adapter(tmp_path, 1)
    head, _ = merged([one], choice="average", weights=[4.0], reference=0)
    assert all(torch.equal(head[name], one.head[name]) for name in one.head)


@pytest.mark.parametrize("choice", ("keep-reference", "average"))
def test_a_head_that_is_needed_and_missing_is_refused(tmp_path: Path, choice: Any) -> None:
    two = [adapter(tmp_path, 1), adapter(tmp_path, 2, labels=None)]
    with pytest.raises(DataError, match=f"--heads {choice}: a2 came without"):
        merged(two, choice=choice, weights=[0.5, 0.5], reference=1)
    assert merged(two, choice="keep-reference", weights=[0.5, 0.5], reference=0)[0].keys() == two[0].head.keys()


def test_heads_of_other_labels_are_not_averaged(tmp_path: Path) -> None:
    two = [adapter(tmp_path, 1, labels=2), adapter(tmp_path, 2, labels=3)]
    with pytest.raises(DataError, match=r"heads of a1 and a2 differ in num_labels: 2 and 3|label2id"):
        merged(two, choice="average", weights=[0.5, 0.5], reference=0)
    swapped = adapter(tmp_path, 3, labels=2)
    assert swapped.head_config is not None
    inner = {**swapped.head_config["config"], "label2id": {"0": 1, "1": 0}}
    swapped = dataclasses.replace(swapped, head_config={**swapped.head_config, "config": inner})
    with pytest.raises(DataError, match="heads of a1 and a3 differ in label2id"):
        merged([two[0], swapped], choice="average", weights=[0.5, 0.5], reference=0)


def test_heads_of_other_shapes_or_tensors_are_not_averaged(tmp_path: Path) -> None:
    one, two = adapter(tmp_path, 1), adapter(tmp_path, 2)
    name = next(iter(two.head))
    wider = dataclasses.replace(two, head={**two.head, name: torch.zeros(7, 7)})
    more = dataclasses.replace(two, head={**two.head, "heads.task2.9.weight": torch.zeros(1)})
    for other, role in ((wider, "1"), (more, "9.weight")):
        with pytest.raises(DataError, match=rf"heads of a1 and a2 differ in {role}"):
            merged([one, other], choice="average", weights=[0.5, 0.5], reference=0)


def test_weights_of_sum_0_average_no_heads(tmp_path: Path) -> None:
    two = [adapter(tmp_path, 1), adapter(tmp_path, 2)]
    with pytest.raises(UsageError, match="sum to 0"):
        merged(two, choice="average", weights=[1.0, -1.0], reference=0)


def test_an_average_that_is_not_finite_is_no_result(tmp_path: Path) -> None:
    two = [adapter(tmp_path, 1), adapter(tmp_path, 2)]
    two[0] = dataclasses.replace(two[0], head={name: value.half() + 60_000 for name, value in two[0].head.items()})
    with pytest.raises(CheckFailed, match=r"heads\.task1.* not finite"):
        merged(two, choice="average", weights=[1.0, -0.6], reference=0)
