"""Logistic regression: scikit-learn's optimum on any shape, the same bytes each time, honest where it fails."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from pomona.errors import CheckFailed, DataError
from pomona.methods.diffeat_extract.probing import logistic as module
from pomona.methods.diffeat_extract.probing.logistic import logistic
from pomona.methods.diffeat_extract.probing.splits import Task, draws, task


def _plain(train: Any, labels: Any, test: Any, penalty: float, tolerance: float = 1e-9) -> Any:
    scaler = StandardScaler().fit(np.asarray(train, dtype=np.float64))
    model = LogisticRegression(C=penalty, max_iter=20_000, tol=tolerance)
    model.fit(scaler.transform(np.asarray(train, dtype=np.float64)), labels)
    return model.predict(scaler.transform(np.asarray(test, dtype=np.float64)))


def _made(images: int, columns: int, labels: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Correlated features of overlapping classes of unlike size, and many places to be asked about."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(columns, columns)) / np.sqrt(columns) + np.eye(columns)
    targets = np.concatenate([np.arange(labels), (labels * random.random(images - labels) ** 1.3).astype(int)])
    centres = random.normal(size=(labels, columns)) * 0.7
    train = (centres[targets] + random.normal(size=(images, columns))) @ mixing + 3
    test = random.normal(size=(2_000, columns)) @ mixing + 3
    return train.astype(np.float32), targets, test.astype(np.float32)


@pytest.mark.parametrize(
    ("images", "columns", "labels", "penalty"),
    [
        (10, 64, 10, 0.1),
        (100, 64, 10, 0.1),
        (100, 400, 7, 0.1),
        (300, 30, 4, 1e-3),
        (60, 60, 3, 10.0),
        (80, 5, 2, 0.1),
        (40, 90, 2, 1.0),
        (2, 3, 2, 0.1),
    ],
)
def test_answers_are_those_of_scikit_learn_at_a_tight_tolerance(
    images: int, columns: int, labels: int, penalty: float
) -> None:
    train, targets, test = _made(images, columns, labels)
    ours, theirs = logistic(train, targets, test, penalty=penalty), _plain(train, targets, test, penalty)
    assert ours.dtype == np.int64 and len(set(theirs)) > 1
    assert (ours != theirs).sum() <= 2  # of 2,000 places anywhere, some lie on a border


def test_the_loss_is_at_its_least() -> None:
    train, targets, _ = _made(90, 20, 5)
    x = (train - train.mean(axis=0)).astype(np.float64)
    model = LogisticRegression(C=0.5, max_iter=20_000, tol=1e-10).fit(x, targets)

    def loss(weights: Any, bias: Any) -> float:
        logits = x @ weights + bias
        alone = logits[np.arange(len(x)), targets]
        return float((np.log(np.exp(logits).sum(axis=1)) - alone).sum() + (weights**2).sum() / (2 * 0.5))

    least = loss(model.coef_.T, model.intercept_)
    assert least <= loss(*module._optimum(x, targets, 5, 1 / 0.5)) <= least * (1 + 2e-6)


def test_two_labels_are_told_apart_by_one_sigmoid() -> None:
    """A border between means of unlike sizes moves with the strength of the penalty: twice the strength would show."""
    train = np.array([[0.0], [0.2], [0.4], [3.0]])
    places = np.linspace(-1, 5, 3_001)[:, None]
    for penalty in (0.05, 0.1, 1.0):
        ours = logistic(train, [7, 7, 7, 9], places, penalty=penalty)
        assert np.array_equal(ours, _plain(train, [7, 7, 7, 9], places, penalty))


def test_scale_offset_and_order_change_no_answer() -> None:
    train, targets, test = _made(60, 8, 3)
    expected = logistic(train, targets, test, penalty=0.1)
    scale, offset = 10.0 ** np.arange(-12, 12, 3), 10.0 ** np.arange(-9, 7, 2)
    moved = [rows.astype(np.float64) * scale + offset * scale for rows in (train, test)]
    assert (logistic(moved[0], targets, moved[1], penalty=0.1) == expected).mean() > 0.999
    order = np.random.default_rng(1).permutation(60)
    assert (logistic(train[order], targets[order], test, penalty=0.1) == expected).mean() > 0.999


def test_columns_that_are_constant_in_training_say_nothing() -> None:
    train, targets, test = _made(60, 8, 3)
    stuck = np.full((60, 3), [0.1, 1e30, -7.0], dtype=np.float32)
    wild = np.random.default_rng(2).normal(size=(len(test), 3)).astype(np.float32) * 1e20
    padded = logistic(np.hstack([train, stuck]), targets, np.hstack([test, wild]), penalty=0.1)
    assert np.array_equal(padded, logistic(train, targets, test, penalty=0.1))
    nothing = logistic(stuck[:5], [4, 4, 2, 2, 2], wild[:6], penalty=0.1)
    assert nothing.tolist() == [2] * 6  # the more frequent label


def test_one_label_is_what_all_are_given() -> None:
    assert logistic(np.eye(3), [5, 5, 5], np.ones((2, 3)), penalty=0.1).tolist() == [5, 5]


def test_the_same_input_gives_the_same_answers() -> None:
    train, targets, test = _made(100, 200, 10)
    first, second = (logistic(train.copy(), targets, test, penalty=0.1) for _ in range(2))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("penalty", [1e-12, 1e3, 1e9])
def test_no_penalty_is_too_weak_or_too_strong(penalty: float) -> None:
    train, targets, _ = _made(60, 100, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = logistic(train, targets, train, penalty=penalty) == targets
    assert right.mean() > (0.99 if penalty > 1 else 0.3)


def test_what_is_not_finite_is_refused() -> None:
    good, bad = np.eye(4), np.eye(4)
    bad[2, 1] = np.nan
    with pytest.raises(CheckFailed, match="to learn from are not all finite"):
        logistic(bad, [0, 0, 1, 1], good, penalty=0.1)
    with pytest.raises(CheckFailed, match="to test on are not all finite"):
        logistic(good, [0, 0, 1, 1], np.full((1, 4), np.inf), penalty=0.1)
    with pytest.raises(DataError, match="no image to learn from"):
        logistic(np.empty((0, 4)), [], good, penalty=0.1)


def test_too_few_iterations_are_said_and_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    train, targets, test = _made(100, 64, 10)
    monkeypatch.setattr(module, "_ITERATIONS", 3)
    with pytest.raises(CheckFailed, match="did not converge in 3 iterations"):
        logistic(train, targets, test, penalty=0.1)


# --- digits ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[NDArray[np.float32], Task]:
    """Raw pixels, 0 to 255, and the halves of `builtin:digits`."""
    images, labels = load_digits(return_X_y=True)
    splits = np.full(1797, "test", dtype=object)
    splits[np.random.default_rng(0).permutation(1797)[:898]] = "train"
    return np.rint(images * 255 / 16).astype(np.float32), task(labels.tolist(), splits.tolist(), test_share=0.5, seed=0)


def test_pixels_of_digits_are_as_good_as_the_control_should_be(digits: tuple[NDArray[np.float32], Task]) -> None:
    """88.5 % of 10 labels a class within a point, 56.0 of one, 96.3 of all: what features have to beat."""
    pixels, parted = digits
    answers = parted.labels[parted.test]

    def accuracy(shots: int | None, count: int) -> float:
        found = [
            logistic(pixels[rows], parted.labels[rows], pixels[parted.test], penalty=0.1) == answers
            for rows in draws(parted, shots, count, seed=0)
        ]
        return 100 * float(np.mean(found))

    assert len(parted.train) == 898 and len(answers) == 899
    assert accuracy(10, 5) == pytest.approx(88.5, abs=1.0)
    assert accuracy(10, 40) == pytest.approx(88.9, abs=0.7)
    assert accuracy(1, 40) == pytest.approx(57.0, abs=2.5)
    assert accuracy(None, 5) == pytest.approx(96.3, abs=0.5)


def test_every_answer_on_digits_is_scikit_learns(digits: tuple[NDArray[np.float32], Task]) -> None:
    pixels, parted = digits
    for rows in (*draws(parted, 1, 2, seed=5), *draws(parted, 10, 2, seed=5), parted.train):
        given = pixels[rows], parted.labels[rows], pixels[parted.test]
        assert np.array_equal(logistic(*given, penalty=0.1), _plain(*given, 0.1, 1e-7))
