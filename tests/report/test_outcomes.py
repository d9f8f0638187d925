"""Intervals of a probe's accuracy: Wilson's of one draw, otherwise as wide as draws and test images make them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pomona.report.outcomes import accuracy, difference


def _answers(draws: int, tests: int, seed: int, *, easy: float = 0.8, by_draw: float = 0.0) -> Any:
    """Right answers of images that differ in difficulty, and draws that differ in luck."""
    random = np.random.default_rng(seed)
    chance = np.clip(random.beta(4 * easy, 4 * (1 - easy), tests) + by_draw * random.normal(size=(draws, 1)), 0, 1)
    return random.random((draws, tests)) < chance


def test_one_draw_has_wilsons_interval() -> None:
    """13 of 15: 0.8667, (0.6212, 0.9626), from the score equation |p - q| = 1.96 sqrt(q (1 - q) / n)."""
    found = accuracy([[True] * 13 + [False] * 2], seed=0)
    assert found.mean == pytest.approx(13 / 15) and (found.draws, found.tests, found.deviation) == (1, 15, None)
    for end in (found.low, found.high):
        assert abs(found.mean - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / 15), rel=1e-6)
    assert found.low == pytest.approx(0.6212, abs=5e-5)


def test_mean_and_deviation_are_over_draws() -> None:
    answers = _answers(5, 80, 0)
    found = accuracy(answers, seed=0)
    by_draw = [sum(map(bool, row)) / 80 for row in answers]
    mean = sum(by_draw) / 5
    assert found.mean == pytest.approx(mean)
    assert found.deviation == pytest.approx((sum((value - mean) ** 2 for value in by_draw) / 4) ** 0.5)
    assert (found.draws, found.tests) == (5, 80) and found.low < found.mean < found.high


def _resampled_one_by_one(values: Any, times: int, seed: int) -> tuple[float, float]:
    """The same bootstrap, drawing one image and one draw at a time."""
    random = np.random.default_rng(seed)
    draws, tests = values.shape
    means = []
    for _ in range(times):
        rows = random.integers(draws, size=max(1, draws - 1))
        columns = random.integers(tests, size=tests)
        means.append(values[rows][:, columns].mean())
    return tuple(np.quantile(means, (0.025, 0.975)))


@pytest.mark.parametrize(("draws", "by_draw"), [(2, 0.2), (5, 0.0), (3, 0.3), (12, 0.05)])
def test_draws_and_images_are_both_resampled(draws: int, by_draw: float) -> None:
    answers = _answers(draws, 60, draws, by_draw=by_draw)
    found = accuracy(answers, seed=0)
    expected = _resampled_one_by_one(answers.astype(float), 12_000, 1)
    width = expected[1] - expected[0]
    assert (found.low, found.high) == pytest.approx(expected, abs=0.06 * width)


def test_the_interval_holds_what_the_draws_contribute() -> None:
    """As many answers from draws of unlike luck leave more doubt; their share is s^2 / draws."""
    lucky = np.zeros((6, 1000), dtype=bool)
    for row, right in enumerate([500, 600, 700, 800, 900, 700]):
        lucky[row, :right] = True
    found = accuracy(lucky, seed=0)
    by_draw = lucky.mean(axis=1).std(ddof=1) / np.sqrt(6)
    images = lucky.mean(axis=0).std() / np.sqrt(1000)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(np.hypot(by_draw, images), rel=0.1)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """150 experiments of 5 draws and 60 images, from a world where images and draws both vary."""
    random = np.random.default_rng(0)
    hits = 0
    for seed in range(150):
        luck = 0.3 * random.normal(size=(5, 1))
        hard = random.normal(size=(1, 60))
        answers = random.normal(size=(5, 60)) + luck + hard + 1.0 > 0
        found = accuracy(answers, seed=seed)
        hits += found.low <= 0.7554 <= found.high  # P(N(1, 1 + 0.09 + 1) > 0)
    assert hits / 150 >= 0.92


@pytest.mark.parametrize(("value", "draws"), [(True, 1), (True, 5), (False, 5)])
def test_answers_all_alike_still_leave_doubt(value: bool, draws: int) -> None:
    found = accuracy(np.full((draws, 20), value), seed=0)
    room = 1.959964**2 / (20 + 1.959964**2)
    assert (found.low, found.high) == pytest.approx((1 - room, 1) if value else (0, room))


# --- differences -----------------------------------------------------------------------------------------------------


def test_a_difference_is_paired_and_so_narrower_than_its_parts() -> None:
    theirs = _answers(5, 300, 1)
    ours = theirs | (np.random.default_rng(2).random((5, 300)) < 0.2)
    found = difference(ours, theirs, seed=0)
    parts = [accuracy(answers, seed=0) for answers in (ours, theirs)]
    assert found.mean == pytest.approx(parts[0].mean - parts[1].mean)
    assert 0 < found.low < found.mean < found.high
    assert found.high - found.low < 0.5 * sum(each.high - each.low for each in parts)


def test_a_difference_of_one_draw_is_that_of_its_images() -> None:
    random = np.random.default_rng(3)
    ours, theirs = random.random((1, 500)) < 0.8, random.random((1, 500)) < 0.7
    found = difference(ours, theirs, seed=0)
    error = (ours.astype(float) - theirs).std() / np.sqrt(500)
    assert (found.high - found.low) / (2 * 1.96 * error) == pytest.approx(1.0, abs=0.06)


def test_turning_a_difference_round_turns_its_interval_round() -> None:
    ours, theirs = _answers(5, 100, 4), _answers(5, 100, 5, easy=0.6)
    there, back = difference(ours, theirs, seed=0), difference(theirs, ours, seed=0)
    assert back.mean == -there.mean
    assert (-back.high, -back.low) == pytest.approx((there.low, there.high), abs=0.012)


def test_no_difference_anywhere_is_no_certainty() -> None:
    same = _answers(3, 40, 6)
    found = difference(same, same, seed=0)
    assert found.mean == 0 and -found.low == pytest.approx(found.high)
    assert found.high == pytest.approx(1.959964**2 / (40 + 1.959964**2))
    best = difference(np.ones((1, 40)), np.zeros((1, 40)), seed=0)
    assert best.high == 1 and 0.9 < best.low < 1


def test_the_seed_decides_the_interval() -> None:
    answers = _answers(5, 200, 7)
    assert accuracy(answers, seed=0) == accuracy(answers.copy(), seed=0)
    assert len({accuracy(answers, seed=seed).low for seed in range(8)}) > 1


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (5,)])
def test_no_answers_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="answers of shape"):
        accuracy(np.zeros(shape), seed=0)
    with pytest.raises(ValueError, match="answers of shape"):
        difference(np.zeros((2, 5)), np.zeros((3, 5)), seed=0)


# --- draws that are tested on images of their own --------------------------------------------------------------------


def _apart(draws: int, images: int, tested: int, seed: int) -> Any:
    """NaN but for `tested` images of each draw."""
    random = np.random.default_rng(seed)
    answers = np.full((draws, images), np.nan)
    luck, hard = 0.3 * random.normal(size=(draws, 1)), random.normal(size=(1, images))
    right = random.normal(size=(draws, images)) + luck + hard + 1.0 > 0
    for row in range(draws):
        places = random.permutation(images)[:tested]
        answers[row, places] = right[row, places]
    return answers


def test_answers_that_are_not_there_count_in_nothing() -> None:
    answers = _apart(4, 90, 60, 0)
    found = accuracy(answers, seed=0)
    by_draw = [row[~np.isnan(row)].mean() for row in answers]
    assert found.mean == pytest.approx(np.mean(by_draw)) and found.deviation == pytest.approx(np.std(by_draw, ddof=1))
    assert (found.draws, found.tests) == (4, 60)
    padded = np.concatenate([answers, np.full((4, 30), np.nan)], axis=1)
    alike = accuracy(padded, seed=0)
    assert alike.mean == found.mean and (alike.low, alike.high) == pytest.approx((found.low, found.high), abs=0.01)


def test_missing_answers_are_resampled_as_the_others_are() -> None:
    answers = _apart(5, 60, 40, 1)
    random = np.random.default_rng(2)
    means = [np.nanmean(answers[random.integers(5, size=4)][:, random.integers(60, size=60)]) for _ in range(12_000)]
    expected = np.quantile(means, (0.025, 0.975))
    found = accuracy(answers, seed=0)
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.06 * (expected[1] - expected[0]))


def test_intervals_cover_the_truth_where_draws_are_tested_apart() -> None:
    hits = 0
    for seed in range(150):
        found = accuracy(_apart(5, 90, 60, 100 + seed), seed=seed)
        hits += found.low <= 0.7554 <= found.high  # P(N(1, 1 + 0.09 + 1) > 0)
    assert hits / 150 >= 0.92


def test_a_draw_without_an_answer_and_pairs_that_do_not_match_are_refused() -> None:
    answers = _apart(3, 20, 10, 3)
    with pytest.raises(ValueError, match="some of each draw"):
        accuracy(np.concatenate([answers, np.full((1, 20), np.nan)]), seed=0)
    with pytest.raises(ValueError, match="not of the same images"):
        difference(answers, np.roll(answers, 1, axis=1), seed=0)
