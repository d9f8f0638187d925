"""What a run refuses, what it leaves behind, and what decides no byte of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pomona.errors import UsageError
from pomona.methods.madaug_train.config import Config

QUICK = ("--preset", "digits", "--epochs", "2", "--compare", "nothing")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(40) % 2)
    return tmp_path


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("--val-fraction", "0.001"), 4, b"try --val-fraction"),
        (("--policy-start", "1", "--policy-every", "1000"), 9, b"0 policy updates"),
        (("--dtype", "float16"), 2, b"float16"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_leaves_nothing(
    pomona: Any, data: Path, args: tuple[str, ...], code: int, said: bytes
) -> None:
    done = pomona("madaug-train", "data.npz", "-o", "out", *QUICK, *args)
    assert done.returncode == code and said in done.stderr, done.stderr
    assert [path.name for path in data.iterdir()] == ["data.npz"]


def test_a_report_does_not_tell_of_options_without_effect(pomona: Any, data: Path) -> None:
    for out, more in (("out", ()), ("other", ("--jobs", "2", "--rejects", "rejects.jsonl"))):
        done = pomona("madaug-train", "data.npz", "-o", out, *QUICK, "--augment", "none", *more)
        assert done.returncode == 0, done.stderr
    assert (data / "out/report.md").read_bytes() == (data / "other/report.md").read_bytes()


@pytest.mark.parametrize("part", ["val", "test"])
def test_parts_to_evaluate_on_are_not_passed_over(part: str) -> None:
    with pytest.raises(UsageError, match="INPUT"):
        Config(evaluate=Path("run"), **{part: "images"})


@pytest.mark.parametrize("given", [{"epochs": 100_001}, {"crop": 4097}, {"cutout": 10**23}])
def test_numbers_beyond_all_measure_are_refused(given: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="at most"):
        Config(**given)  # type: ignore[arg-type]
