"""Constants without a construction are refused with the fix; sweeps are read as written."""

from __future__ import annotations

from typing import Any

import pytest

from pomona.errors import UsageError
from pomona.methods.attn_compare.config import Config
from pomona.methods.attn_compare.separation import study
from pomona.methods.attn_compare.separation.constants import Constants, fitted, own_grids, parse, unmet
from pomona.runtime.settings import Settings

BASE = Constants(n=1000, d=102, m=20, a0=0.05, a1=1.0, c=0.9)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"n": 1000, "d": 100}, "try n=980 or 1078"),
        ({"n": 50}, "try n=100"),
        ({"n": 1, "d": 3}, "tau = (c + 0.1) sqrt(log n) must be positive"),
        ({"n": -5, "fit_n": True}, "--n is -5"),
        ({"n": 10**13}, "--n is 10000000000000"),
        ({"d": 2}, "--d is 2"),
        ({"d": 2, "fit_n": True}, "--d is 2"),
        ({"d": 10**6 + 2, "n": 10**6}, "--d is 1000002"),
        ({"m": 0}, "--m is 0"),
        ({"c": -0.1}, "--c is -0.1; the threshold tau"),
        ({"c": -0.05}, "--c is -0.05; b = 1 - c and c are shares"),
        ({"c": 1.2}, "--c is 1.2; b = 1 - c"),
        ({"c": float("nan")}, "--c is nan"),
        ({"a0": -0.1}, "--a0 is -0.1"),
        ({"a1": float("inf")}, "--a1 is inf"),
        ({"g": 0.0}, "--g is 0"),
        ({"trials": 0}, "--trials is 0"),
        ({"sweep": ("a1",)}, "--sweep a1: expected NAME=VALUES"),
        ({"sweep": ("b=1,2",)}, "with a NAME of n, d, m, a0, a1, c, p"),
        ({"sweep": ("a1=",)}, "'' is not a number"),
        ({"sweep": ("a1=0.3,x",)}, "'x' is not a number"),
        ({"sweep": ("a1=nan",)}, "'nan' is not a number"),
        ({"sweep": ("a1=0.3:1.2",)}, "START:STOP:STEP"),
        ({"sweep": ("a1=1.2:0.3:0.1",)}, "START must not exceed STOP"),
        ({"sweep": ("a1=0.3:1.2:0",)}, "the values must grow"),
        ({"sweep": ("n=100:1000:x1",)}, "the values must grow"),
        ({"sweep": ("a1=0:1:0.0001",)}, "more than 200 values"),
        ({"sweep": ("m=1.5",)}, "m is a whole number"),
        ({"sweep": ("m=1", "m=2")}, "--sweep m is given twice"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        Config(**options)
    assert told in caught.value.message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"a0": 0.1}, "--preset paper: a0 = 0.1 is not between 0 and 0.1"),
        ({"a1": 0.6}, "--preset paper: a1 = 0.6 is below 0.7"),
        ({"c": 0.95}, "--preset paper: b = 1 - c = 0.05 is below 0.1"),
        ({"c": 0.05}, "--preset paper: c = 0.05 is below 0.1"),
        ({"n": 100}, "--preset paper: d = 102 is not between"),
        ({"preset": "finite", "a0": 0.9}, "a0 = 0.9 is not below a1 = 0.558"),
        ({"sweep": ("n=1000,1050",)}, "n=1050, d=102: n must be divisible by d - 2 = 100; try n=1000 or 1100"),
        ({"sweep": ("d=50",)}, "try n=960 or 1008"),
        ({"sweep": ("c=0.5,1.5",)}, "--c is 1.5"),
        ({"sweep": ("p=2,3",)}, "--sweep p=3"),
        ({"sweep": ("p=0,2",)}, "--sweep p=0"),
        ({"kernels": "softmax"}, "no such kernel"),
    ],
)
def test_the_plan_refuses_what_the_theorem_or_a_sweep_does_not_allow(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        study.plan(Config(**options), Settings())
    assert told in caught.value.message


def test_n_is_rounded_when_asked() -> None:
    assert [fitted(n, 100) for n in (1000, 1029, 1030, 5, 980)] == [980, 980, 1078, 98, 980]
    (point, *_) = study.plan(Config(n=1040, fit_n=True, sweep=("n=1040,1060",)), Settings())
    assert point.settings["constants"][0]["n"] == 1000
    swept = [point for point in study.plan(Config(fit_n=True, sweep=("d=50,102",)), Settings()) if "/d/" in point.name]
    assert [(one["n"], one["d"]) for one in swept[0].settings["constants"]] == [(1008, 50), (1000, 102)]


def test_sweeps_are_read_as_written() -> None:
    assert parse("a1=0.3:1.2:0.05") == ("a1", tuple(round(0.3 + 0.05 * i, 2) for i in range(19)))
    assert parse("n=100,1000,100") == ("n", (100, 1000))
    assert parse("n=100:100000:x10") == ("n", (100, 1000, 10_000, 100_000))
    assert parse("c=0.5") == ("c", (0.5,))
    assert parse("m=1:10:4") == ("m", (1, 5, 9))
    assert all(type(value) is int for value in parse("p=2:8:2")[1])


@pytest.mark.parametrize(("n", "d"), [(1000, 102), (997, 3), (2, 3), (600, 62), (10**6, 12), (300, 302)])
def test_our_own_grids_hold_constructions_only(n: int, d: int) -> None:
    import dataclasses

    base = Constants(n, d, 20, 0.05, 1.0, 0.9)
    for name, values in own_grids(base).items():
        assert values
        for value in values if name != "p" else ():
            dataclasses.replace(base, **{name: value})  # type: ignore[arg-type]


def test_the_theorem_holds_where_its_conditions_do() -> None:
    assert unmet(BASE) == []
    assert BASE.b == 0.1  # not 0.09999999999999998


def test_the_finite_preset_lies_a_tenth_above_what_softmax_needs() -> None:
    (point, *_) = study.plan(Config(preset="finite", a0=0.2), Settings())
    assert point.settings["constants"][0]["a1"] == pytest.approx(1.1 * 0.5073, abs=1e-3)
    (point, *_) = study.plan(Config(preset="finite", a1=0.3), Settings())
    assert point.settings["constants"][0]["a1"] == 0.3
