"""Noise: the schedule against NumPy and diffusers, the moments of x_t, and streams that only their key decides."""

from __future__ import annotations

import hashlib
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from pomona.errors import DataError
from pomona.methods.diffeat_extract.noising import noise, noised, schedule

LINEAR = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "trained_betas": None,
}


def test_linear_schedule_is_the_product_of_the_papers_betas() -> None:
    """B3: abar_90 and abar_500 to 1e-12 of the product, term by term."""
    alpha_bars = schedule("linear", None).alpha_bars
    assert (alpha_bars.dtype, alpha_bars.shape) == (torch.float64, (1000,))
    for t in (0, 90, 500, 999):
        product = math.prod(1 - (1e-4 + (0.02 - 1e-4) * s / 999) for s in range(t + 1))
        assert alpha_bars[t].item() == pytest.approx(product, rel=1e-12)


def test_cosine_schedule_is_that_of_nichol_and_dhariwal() -> None:
    alpha_bars = schedule("cosine", None).alpha_bars.numpy()
    t = np.arange(1, 1001) / 1000
    wanted = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(alpha_bars[:-1], wanted[:-1], rtol=1e-9)
    assert alpha_bars[-1] == pytest.approx(alpha_bars[-2] * 0.001, rel=1e-12)  # beta is capped


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 300},
        {"trained_betas": np.linspace(0.001, 0.3, 7).tolist()},
        {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"num_train_timesteps": 50, "beta_end": 0.3},
    ],
    ids=lambda changes: "-".join(changes) or "linear",
)
def test_schedules_of_models_are_those_of_diffusers(changes: dict[str, Any]) -> None:
    diffusers = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    config = LINEAR | changes
    found = schedule("model", config)
    theirs = diffusers.DDPMScheduler(**{k: v for k, v in config.items() if k != "_class_name"}).alphas_cumprod
    np.testing.assert_allclose(found.alpha_bars.numpy(), theirs.double().numpy(), rtol=2e-4, atol=1e-7)  # float32


def test_a_model_that_names_no_schedule_gets_the_linear_one_and_it_is_said() -> None:
    silent = schedule("model", None)
    assert torch.equal(silent.alpha_bars, schedule("linear", None).alpha_bars)
    assert silent.name == "linear from 0.0001 to 0.02 over 1,000 times, as the model names none"
    assert schedule("model", LINEAR | {"num_train_timesteps": 50}).name == (
        "linear from 0.0001 to 0.02 over 50 times, of the model"
    )


def test_the_option_wins_over_the_model() -> None:
    model = LINEAR | {"num_train_timesteps": 10}
    assert torch.equal(schedule("cosine", model).alpha_bars, schedule("cosine", None).alpha_bars)
    assert len(schedule("linear", model).alpha_bars) == 1000


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LINEAR | {"beta_schedule": "laplace"}, "beta_schedule is 'laplace'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "no betas (FlowMatchEulerDiscreteScheduler)"),
        (LINEAR | {"beta_schedule": ["linear"]}, "beta_schedule is ['linear']"),
        (LINEAR | {"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        (LINEAR | {"num_train_timesteps": True}, "num_train_timesteps is True"),
        (LINEAR | {"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000"),
        (LINEAR | {"beta_start": math.nan}, "beta_start is nan"),
        (LINEAR | {"beta_end": "0.02"}, "beta_end is '0.02'"),
        (LINEAR | {"trained_betas": []}, "trained_betas"),
        (LINEAR | {"trained_betas": [0.1, math.inf]}, "trained_betas"),
        (LINEAR | {"trained_betas": {"0": 0.1}}, "trained_betas"),
        (LINEAR | {"num_train_timesteps": 1, "rescale_betas_zero_snr": True}, "more than one time"),
    ],
)
def test_a_schedule_that_makes_none_is_refused_with_what_to_do(config: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=r"scheduler_config\.json") as caught:
        schedule("model", config)
    assert said in caught.value.message
    assert "--schedule linear" in (caught.value.hint or "")


def test_noisy_images_have_the_moments_of_the_equation() -> None:
    """B3: what is left after sqrt(abar) x has mean 0 and variance 1 - abar within 1 %, and nothing of x in it."""
    alpha_bars = schedule("linear", None).alpha_bars
    x = torch.from_numpy(np.random.default_rng(3).uniform(-1, 1, (64, 3, 32, 32)).astype(np.float32))
    for t in (0, 90, 500, 999):
        eps = torch.stack([noise(0, f"image-{i}", t, 0, 0, x.shape[1:]) for i in range(len(x))])
        left = noised(x, alpha_bars[t], eps).double() - alpha_bars[t].sqrt() * x
        spread = 1 - alpha_bars[t].item()
        assert left.var().item() == pytest.approx(spread, rel=0.01)
        assert abs(left.mean().item()) < 4 * math.sqrt(spread / x.numel())
        assert abs(np.corrcoef(left.flatten(), x.flatten())[0, 1]) < 4 / math.sqrt(x.numel())


def test_each_image_can_have_a_time_of_its_own() -> None:
    alpha_bars = schedule("cosine", None).alpha_bars[[0, 400, 999]]
    drawn = np.random.default_rng(4).standard_normal((2, 3, 1, 5, 4)).astype(np.float32)
    x, eps = torch.from_numpy(drawn)
    together = noised(x, alpha_bars, eps)
    assert together.dtype == torch.float32
    shares = alpha_bars.numpy()[:, None, None, None]
    wanted = np.sqrt(shares) * drawn[0].astype(np.float64) + np.sqrt(1 - shares) * drawn[1].astype(np.float64)
    np.testing.assert_allclose(together.numpy(), wanted, rtol=1e-6, atol=1e-6)
    for one in range(3):
        alone = noised(x[one : one + 1], alpha_bars[one].item(), eps[one : one + 1])
        assert torch.equal(alone[0], together[one])


def test_noise_is_the_same_today_as_when_this_was_written() -> None:
    """Features of one version of Pomona must be those of the next: the bytes are pinned."""
    drawn = noise(7, "käfer/7.png", 90, 1, 2, (3, 16, 16))
    assert (drawn.dtype, drawn.shape) == (torch.float32, (3, 16, 16))
    digest = hashlib.sha256(drawn.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest[:16] == "e23ac3f4a03809ea"


def test_only_the_key_decides_the_noise() -> None:
    keys = [(0, "a", 90, 0, 0), (0, "b", 90, 0, 0), (1, "a", 90, 0, 0)]
    forwards = [noise(*key, (1, 8, 8)) for key in keys]
    torch.manual_seed(5)
    np.random.seed(5)
    backwards = [noise(*key, (1, 8, 8)) for key in reversed(keys)]
    assert all(torch.equal(one, other) for one, other in zip(forwards, reversed(backwards), strict=True))


def test_keys_that_differ_in_anything_give_unrelated_noise() -> None:
    """Neighbouring seeds, images, times, views and draws: correlations are those of independent numbers."""
    size = 1024
    ids = ["0", "1", "10", "0/1", "1/0", "0/0/1", "", "é", "e\u0301", "\udcff"]
    keys = list(itertools.product((0, 1), ids, (0, 1, 10), (0, 1), (0, 1)))
    streams = np.stack([noise(*key, (size,)).numpy() for key in keys]).astype(np.float64)
    correlations = np.corrcoef(streams)[np.triu_indices(len(keys), 1)] * math.sqrt(size)
    assert len(correlations) > 25_000
    assert np.abs(correlations).max() < 6  # the largest of 28,680 normal numbers is above 4.2 half of the time
    assert stats.kstest(correlations, "norm").pvalue > 1e-3
    shifted = np.einsum("kn,kn->k", streams[:-1, 1:], streams[1:, :-1]) / math.sqrt(size)  # no stream is another's tail
    assert stats.kstest(shifted, "norm").pvalue > 1e-3


def test_noise_is_standard_normal_within_a_key_and_across_keys() -> None:
    within = noise(0, "one", 0, 0, 0, (200_000,)).numpy()
    across = np.array([noise(0, f"{i}", 50, 0, 0, (1,)).item() for i in range(5_000)])
    for sample in (within, across):
        assert stats.kstest(sample, "norm").pvalue > 1e-3
        assert stats.kurtosistest(sample).pvalue > 1e-3
    assert len(np.unique(across)) == 5_000
