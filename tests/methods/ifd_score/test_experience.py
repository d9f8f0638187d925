"""The pre-experience sample against the rule restated in NumPy (check A9), and the brief epoch on a tiny model."""

from __future__ import annotations

import numpy as np
import pytest

from pomona.methods.ifd_score.experience import cluster_sample, clusters


def separated(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points around well separated centres, in shuffled order: embeddings, perplexities, true cluster of each."""
    random = np.random.default_rng(seed)
    truth = np.repeat(np.arange(len(sizes)), sizes)
    random.shuffle(truth)
    centres = random.normal(size=(len(sizes), 16)) * 100
    points = (centres[truth] + random.normal(size=(len(truth), 16)) * 0.01).astype(np.float32)
    return points, np.exp(random.normal(2, 1, size=len(truth))), truth


def test_a9_ten_of_each_of_a_hundred_clusters_inside_the_band() -> None:
    points, ppl, truth = separated([50] * 100)
    labels = clusters(points, 100)
    chosen = cluster_sample(labels, ppl, per_cluster=10, band=(25, 75))
    assert len(chosen) == len(set(chosen)) == 1000
    for cluster in range(100):
        members = np.flatnonzero(truth == cluster)
        low, high = np.percentile(ppl[members], [25, 75])
        inside = [i for i in members if low <= ppl[i] <= high]
        step = len(inside) // 10
        assert [i for i in sorted(chosen) if truth[i] == cluster] == inside[::step][:10]
    assert cluster_sample(clusters(points, 100), ppl, per_cluster=10, band=(25, 75)) == chosen


def test_a9_small_clusters_are_taken_whole() -> None:
    points, ppl, truth = separated([6, 50, 15])
    chosen = cluster_sample(clusters(points, 3), ppl, per_cluster=10, band=(25, 75))
    assert {i for i in chosen if truth[i] == 0} == set(np.flatnonzero(truth == 0))
    assert sum(truth[i] == 1 for i in chosen) == 10
    members = np.flatnonzero(truth == 2)
    low, high = np.percentile(ppl[members], [25, 75])
    inside = {i for i in members if low <= ppl[i] <= high}
    assert len(inside) < 10 and {i for i in chosen if truth[i] == 2} == inside


def test_fewer_records_than_clusters_are_all_taken() -> None:
    points, ppl, _ = separated([1] * 5)
    assert sorted(cluster_sample(clusters(points, 100), ppl, per_cluster=10, band=(25, 75))) == list(range(5))


def test_sampling_steps_through_the_band_in_index_order() -> None:
    labels, ppl = np.zeros(47, dtype=int), np.arange(47.0)
    low, high = np.percentile(ppl, [25, 75])
    inside = [i for i in range(47) if low <= ppl[i] <= high]
    assert cluster_sample(labels, ppl, per_cluster=5, band=(25, 75)) == inside[:: len(inside) // 5][:5]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_texts_without_a_perplexity_are_never_chosen(bad: float) -> None:
    labels, ppl = np.zeros(30, dtype=int), np.full(30, 2.0)
    ppl[::3] = bad
    assert all(i % 3 for i in cluster_sample(labels, ppl, per_cluster=10, band=(25, 75)))
