"""Linear CKA: what it is blind to, what it sees, the formulas of its papers, and the same however images come."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from pomona.errors import CheckFailed, DataError
from pomona.methods.diffeat_extract import cka
from pomona.methods.diffeat_extract.cka import Accumulated, linear_cka


def _rotation(width: int, random: Any) -> Any:
    return np.linalg.qr(random.normal(size=(width, width)))[0]


@pytest.mark.parametrize("debiased", [True, False])
def test_a_layer_its_rotated_copy_and_noise(debiased: bool) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(800, 24)) * np.linspace(0.1, 3, 24)
    assert linear_cka(x, x, debiased=debiased) == pytest.approx(1, abs=1e-12)
    turned = 7 * x @ _rotation(24, random) - 100
    assert linear_cka(x, turned, debiased=debiased) == pytest.approx(1, abs=1e-6)
    noise = linear_cka(x, random.normal(size=(800, 40)), debiased=debiased)
    assert noise is not None and abs(noise) < 0.2
    stretched = linear_cka(x, x * np.linspace(5, 0.1, 24), debiased=debiased)
    assert stretched is not None and stretched < 0.9  # only rotations and one scale for all are free


def _hsic_paper(x: Any, y: Any) -> float:
    """Kornblith et al., equation 3: tr(K H L H) / (n - 1)^2."""
    n = len(x)
    h = np.eye(n) - np.ones((n, n)) / n
    return float(np.trace(x @ x.T @ h @ (y @ y.T) @ h) / (n - 1) ** 2)


def _hsic_unbiased(x: Any, y: Any) -> float:
    """Song et al. 2012, equation 5, with the diagonals of the kernels set to 0."""
    n = len(x)
    k, l = x @ x.T, y @ y.T  # noqa: E741  the paper's letters
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    one = np.ones(n)
    inner = (
        np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    )
    return float(inner / (n * (n - 3)))


def _ratio(hsic: Any, x: Any, y: Any) -> float:
    return hsic(x, y) / (hsic(x, x) * hsic(y, y)) ** 0.5


@pytest.mark.parametrize(("images", "widths"), [(4, (3, 2)), (30, (5, 8)), (20, (60, 90)), (25, (3, 300))])
def test_values_are_those_of_the_formulas(images: int, widths: tuple[int, int]) -> None:
    random = np.random.default_rng(images)
    x = random.normal(size=(images, widths[0])) + 3
    y = random.normal(size=(images, widths[1])) + x[:, :1] * random.normal(size=widths[1]) - 5
    assert linear_cka(x, y, debiased=False) == pytest.approx(_ratio(_hsic_paper, x, y), abs=1e-10)
    assert linear_cka(x, y) == pytest.approx(_ratio(_hsic_unbiased, x, y), abs=1e-10)


def test_unrelated_features_wider_than_there_are_images_look_alike_only_to_the_biased_one() -> None:
    random = np.random.default_rng(1)
    pairs = [(random.normal(size=(60, 900)), random.normal(size=(60, 900))) for _ in range(20)]
    biased = [linear_cka(x, y, debiased=False) for x, y in pairs]
    unbiased = [linear_cka(x, y) for x, y in pairs]
    assert min(v for v in biased if v is not None) > 0.9
    assert abs(np.mean([v for v in unbiased if v is not None])) < 0.02
    assert max(v for v in unbiased if v is not None) < 0.1


def test_a_set_that_tells_no_images_apart_has_no_value() -> None:
    x = np.random.default_rng(2).normal(size=(50, 6))
    assert linear_cka(x, np.full((50, 3), 0.1)) is None
    assert linear_cka(np.full((50, 3), 1e8 + 0.1), x, debiased=False) is None
    assert linear_cka(np.eye(50), x) is None  # every image as far from every other


def test_what_cannot_be_compared_is_refused() -> None:
    x = np.random.default_rng(3).normal(size=(6, 4))
    with pytest.raises(DataError, match="3 images are too few for CKA, which needs 4"):
        linear_cka(x[:3], x[:3])
    with pytest.raises(ValueError, match="features of 6 and of 5 images"):
        linear_cka(x, x[:5])
    bad = x.copy()
    bad[1, 1] = np.inf
    with pytest.raises(CheckFailed, match="the second features: not all features are finite"):
        linear_cka(x, bad)
    sums = Accumulated(["a", "b"])
    with pytest.raises(ValueError, match=r"sets of \[5, 6\] images"):
        sums.add({"a": x, "b": x[:5]})
    with pytest.raises(DataError, match="0 images"):
        sums.matrix()
    sums.add({"a": x, "b": bad})
    with pytest.raises(CheckFailed, match="b: not all"):
        sums.matrix()


# --- in batches ------------------------------------------------------------------------------------------------------

WIDTHS = {"stem": 4, "mid": 70, "last": 9, "stuck": 2}


def _sets(images: int) -> dict[str, Any]:
    random = np.random.default_rng(images)
    base = random.normal(size=(images, 4))
    sets = {
        name: (base @ random.normal(size=(4, width)) + random.normal(size=(images, width)) + 2).astype(np.float32)
        for name, width in WIDTHS.items()
    }
    sets["stuck"][:] = 0.3
    return sets


def _given(sets: dict[str, Any], sizes: Any) -> list[list[float | None]]:
    sums = Accumulated(list(sets))
    start = 0
    for size in sizes:
        sums.add({name: rows[start : start + size] for name, rows in sets.items()})
        start += size
    assert start == len(sets["stem"]) == sums.images
    assert sum(map(len, sums._pending["mid"])) < 2 * cka.WINDOW
    return sums.matrix()


def test_few_images_are_compared_all_at_once() -> None:
    sets = _sets(2 * cka.WINDOW - 1)
    found = _given(sets, [200, len(sets["stem"]) - 200])
    for (row, x), (column, y) in itertools.product(enumerate(sets.values()), repeat=2):
        assert found[row][column] == pytest.approx(linear_cka(x, y), abs=1e-12)
        assert (found[row][column] is None) == (3 in (row, column))


def test_many_images_are_compared_in_windows_that_add_up() -> None:
    """HSIC of each window by the paper's formula, averaged with the windows' sizes for weights; the last takes what
    is left."""
    sets = _sets(3 * cka.WINDOW + 11)
    bounds = [0, cka.WINDOW, 2 * cka.WINDOW, 3 * cka.WINDOW + 11]

    def hsic(x: Any, y: Any) -> float:
        parts = [
            (b - a) * _hsic_unbiased(x[a:b].astype(float), y[a:b].astype(float)) for a, b in itertools.pairwise(bounds)
        ]
        return sum(parts)

    found = _given(sets, [len(sets["stem"])])
    names = list(sets)
    for first, second in itertools.combinations(names[:3], 2):
        expected = _ratio(hsic, sets[first], sets[second])
        assert found[names.index(first)][names.index(second)] == pytest.approx(expected, abs=1e-9)
        whole = linear_cka(sets[first], sets[second])
        assert whole is not None and expected == pytest.approx(whole, abs=0.02)


def test_how_images_are_batched_changes_no_bit() -> None:
    sets = _sets(3 * cka.WINDOW + 11)
    images = len(sets["stem"])
    whole = _given(sets, [images])
    assert _given(sets, [97] * (images // 97) + [images % 97]) == whole
    assert _given(sets, [0, 1, 2, images - 3]) == whole


def test_the_matrix_is_symmetric_and_one_on_its_diagonal_and_may_be_asked_for_midway() -> None:
    sets = _sets(700)
    sums = Accumulated(list(sets))
    sums.add({name: rows[:600] for name, rows in sets.items()})
    early = sums.matrix()
    sums.add({name: rows[600:] for name, rows in sets.items()})
    found = sums.matrix()
    assert early != found == _given(sets, [700])
    for row in range(3):
        assert found[row][row] == pytest.approx(1, abs=1e-12)
        assert all(found[row][column] == found[column][row] for column in range(3))
