"""What is kept of a policy: the images that are watched, figures by class, and moments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pomona.methods.madaug_train import record
from pomona.methods.madaug_train.choosing import Choice
from pomona.methods.madaug_train.operations.table import chosen
from pomona.methods.madaug_train.table import HISTORY

OPERATIONS = chosen("Invert,Solarize,Contrast")


def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_images_to_watch_are_of_all_classes_in_turn() -> None:
    labels = random().choice(7, 5000, p=[0.4, 0.3, 0.2, 0.07, 0.01, 0.01, 0.01])
    found = record.sample(labels, random())
    assert len(found) == len(set(found.tolist())) == 1000
    assert len(set(labels[found[:7]].tolist())) == 7
    counts, whole = np.bincount(labels[found]), np.bincount(labels)
    assert (counts[whole < 80] == whole[whole < 80]).all() and np.ptp(counts[:3]) <= 1


@pytest.mark.parametrize(("labels", "count"), [(np.arange(1500), 1500), (np.array([4, 4, 9]), 3)])
def test_no_class_is_left_out_however_many_there_are(labels: np.ndarray, count: int) -> None:
    assert sorted(record.sample(labels, random()).tolist()) == list(range(count))


def test_figures_are_of_each_class_and_those_of_all_where_it_has_no_image() -> None:
    logits, magnitudes = torch.randn(1200, 3), torch.rand(1200, 3)
    images = torch.arange(1200).view(-1, 1, 1, 1)

    def outlook(images: Tensor) -> tuple[Tensor, Tensor]:
        places = images.flatten()
        return logits[places], magnitudes[places]

    labels = np.arange(1200) % 2 * 2
    figures, entropy, strength = record.watched(Choice(OPERATIONS, 2, 3.0, 0.3, outlook), images, labels, 4, 700)
    p, lam = np.exp(logits.double().numpy() / 3), magnitudes.double().numpy()
    p /= p.sum(1, keepdims=True)
    strong = np.stack([np.ones(1200), 1 - lam[:, 1], abs(2 * lam[:, 2] - 1)], 1)
    for place, rows in enumerate((labels == 0, labels < 9, labels == 2, labels < 9)):
        expected = [[each[rows].mean(0), each[rows].std(0)] for each in (p, lam, strong)]
        np.testing.assert_allclose(figures[place], np.concatenate(expected).T, atol=1e-6)
    assert entropy == pytest.approx(-(p * np.log(p)).sum(1).mean() / np.log(3))
    assert strength == pytest.approx((p * strong).sum(1).mean())
    assert len(HISTORY) == figures.shape[-1] == 6


def test_a_certain_choice_has_entropy_0() -> None:
    certain = torch.tensor([[200.0, 0.0, -900.0]])
    choice = Choice(OPERATIONS, 1, 1.0, 0.0, lambda images: (certain, torch.zeros(1, 3)))
    assert record.watched(choice, torch.zeros(1, 1, 2, 2), np.zeros(1, np.int64), 1, 9)[1:] == pytest.approx((0, 1))


@pytest.mark.parametrize(("epochs", "middle"), [(1, 0), (2, 1), (80, 40), (81, 40)])
def test_moments_are_the_first_the_middle_and_the_last_epoch(epochs: int, middle: int) -> None:
    assert record.moments(epochs) == {"first": 0, "middle": middle, "last": epochs - 1}
