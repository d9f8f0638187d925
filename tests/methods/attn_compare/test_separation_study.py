"""The separation study: the figures known beforehand, the same rows in any process, and what it says of them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pomona.methods.attn_compare.config import Config
from pomona.methods.attn_compare.rows import Point, Workshop
from pomona.methods.attn_compare.separation import study
from pomona.runtime.settings import Settings

SHOP = Workshop(Path(), "cpu")
QUICK: dict[str, Any] = {"n": 120, "d": 12, "m": 8, "trials": 60}


def measured(config: Config, seed: int = 0, part: str | None = None) -> list[dict[str, Any]]:
    points = study.plan(config, Settings(seed=seed))
    return [row for point in points if part in (None, point.settings["part"]) for row in study.measure(point, SHOP)]


def one(part: str, **options: Any) -> dict[str, Any]:
    """The values of the row of exp or of the one kernel asked for."""
    (row,) = measured(Config(**{"kernels": "exp", **options}), part=part)
    assert row["status"] == "done"
    return row


def within_theorem(point: dict[str, Any]) -> bool:
    n, d, a0, a1 = (point[name] for name in ("n", "d", "a0", "a1"))
    return 0 < a0 < 0.1 and a1 >= 0.7 and min(point["b"], point["c"]) >= 0.1 and n**0.02 < d <= n**0.99  # type: ignore[no-any-return]


def test_softmax_and_high_powers_separate_and_the_others_do_not() -> None:
    began = time.process_time()
    rows = measured(Config(), part="base")
    assert time.process_time() - began < 5
    success = {row["kernel"]: row["values"]["success"] for row in rows}
    area = {row["kernel"]: row["values"]["auc"] for row in rows}
    assert success["exp"] >= 0.99
    assert all(success[kernel] >= 0.99 for kernel in ("pow:8", "pow:16"))
    for kernel in ("linear", "elu1", "taylor2", "pow:2", "pow:4", "pow:6", "favor:16", "favor:256", "favor:4096"):
        assert success[kernel] <= 0.01
    assert 0.45 <= area["linear"] <= 0.60 and area["exp"] >= 0.99


def test_success_over_m_follows_the_chance_that_any_vector_hits() -> None:
    rows = measured(Config(kernels="exp", trials=2000, sweep=("m=1,2,4,8,16,32",)), part="m")
    assert len(rows) == 6
    for row in rows:
        chance = 1 - 0.75 ** row["point"]["m"]
        assert abs(row["values"]["success"] - chance) <= 3 * (chance * (1 - chance) / 2000) ** 0.5 + 0.02


def test_wide_noise_raises_hits_and_false_alarms_as_calculated() -> None:
    assert one("base", c=0.5, m=2, trials=4000)["values"]["d1_fires"] == pytest.approx(0.609, abs=0.03)
    assert one("base", c=0.5)["values"]["success"] == pytest.approx(0.793, abs=0.04)


def test_linear_attention_separates_at_twenty_times_the_amplitude() -> None:
    rows = measured(Config(kernels="linear", sweep=("a1=5,9,10,11",)), part="a1")
    success = [row["values"]["success"] for row in rows]
    assert success[0] == 0 and 0.4 < success[1] < 0.6 and success[2] > 0.97 and success[3] > 0.99


def test_amplitudes_are_where_the_formula_has_them_and_the_simulation_confirms_them() -> None:
    for kernel in ("exp", "linear", "pow:4"):
        row = one("amplitude", kernels=kernel, find_amplitude=True)
        values = row["values"]
        assert values["amplitude"] == pytest.approx(row["theory"]["amplitude"], rel=1e-9)
        assert values["success_below"] < 0.3 < values["success_at"] < 0.97 < values["success_above"]
    linear = one("amplitude", kernels="linear", find_amplitude=True)["values"]["amplitude"]
    assert (1 + linear) * (linear + 0.1) == pytest.approx(0.1 * (1000 + linear), rel=1e-9)
    none = one("amplitude", kernels="favor:64", find_amplitude=True)
    assert none["values"] == {"amplitude": None} and "no amplitude" in none["reason"]


def test_a_fixed_degree_fails_for_n_large_enough_and_softmax_does_not() -> None:
    rows = measured(Config(kernels="exp,pow:8", sweep=("n=1000,2000,5000,100000",)), part="n")
    success = {(row["kernel"], row["point"]["n"]): row["values"]["success"] for row in rows}
    assert [success["pow:8", n] > 0.9 for n in (1000, 2000, 5000, 100_000)] == [True, True, False, False]
    assert all(success["exp", n] > 0.99 for n in (1000, 2000, 5000, 100_000))


def test_both_ways_agree_and_say_so() -> None:
    rows = measured(Config(n=600, d=62, dense_check=True, sweep=("n=6000",)))
    near = [row for row in rows if row["point"]["part"] == "base"]
    assert len(near) == 12
    assert all(row["values"]["dense_difference"] <= 1e-12 for row in near)
    far = [row for row in rows if row["point"]["part"] == "n"]
    assert all(row["values"]["dense_difference"] is None and "token by token" in row["reason"] for row in far)


def test_rows_do_not_depend_on_order_or_process() -> None:
    """Also not on hash seeds, nor on what was measured before."""
    points = study.plan(Config(**QUICK, kernels="exp,favor:16,cosformer"), Settings(seed=5))
    forwards = {point.name: json.dumps(study.measure(point, SHOP)) for point in points}
    assert {point.name: json.dumps(study.measure(point, SHOP)) for point in reversed(points)} == forwards
    program = (
        "import json, sys\nfrom pathlib import Path\n"
        "from pomona.methods.attn_compare.rows import Point, Workshop\n"
        "from pomona.methods.attn_compare.separation import study\n"
        "for name, settings in json.load(sys.stdin):\n"
        "    point = Point('separation', name, settings)\n"
        "    print(json.dumps(study.measure(point, Workshop(Path(), 'cpu'))))\n"
    )
    given = json.dumps([(point.name, dict(point.settings)) for point in points])
    done = subprocess.run([sys.executable, "-c", program], input=given, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == list(forwards.values())


def test_another_seed_gives_other_trials() -> None:
    first, second = (measured(Config(**QUICK, kernels="exp"), seed=seed, part="base") for seed in (0, 1))
    assert first[0]["values"] != second[0]["values"]


def test_points_are_unique_and_survive_json() -> None:
    points = study.plan(Config(find_amplitude=True), Settings())
    assert len({point.name for point in points}) == len(points)
    for point in points:
        assert json.loads(json.dumps(point.settings)) == point.settings
        assert isinstance(point, Point)


def test_rows_say_where_they_come_from_and_hold_no_number_that_is_none() -> None:
    rows = measured(Config(**QUICK, kernels="exp,linear,euler:256,cosformer", find_amplitude=True, a0=0.09, a1=1e5))
    json.dumps(rows, allow_nan=False)
    for row in rows:
        assert row["point"]["provenance"] == "recalled"
        assert row["point"]["within_theorem"] == within_theorem(row["point"])
        assert row["status"] == "done" or row["reason"]
        for name in row.get("theory", {}):
            assert name in row["values"] or name == "success_leading"
        for name, (low, high) in row.get("intervals", {}).items():
            assert low <= row["values"][name] <= high
    statuses = {row["kernel"]: row["status"] for row in rows if row["point"]["part"] == "base"}
    assert statuses == {"exp": "done", "linear": "done", "euler:256": "failed", "cosformer": "done"}


def test_where_d0_concentrates_too_nothing_is_separated_to_leading_order_either() -> None:
    row = one("base", preset="finite", a0=0.6, a1=1.0)
    assert row["values"]["success"] < 0.01 and row["theory"]["success"] < 0.01
    assert row["theory"]["success_leading"] < 0.01
    assert one("base")["theory"]["success_leading"] == pytest.approx(1 - 0.75**20, abs=1e-9)


def test_what_is_not_measured_has_a_reason() -> None:
    row = one("base", preset="finite", a0=0.0, trials=1)
    assert row["values"]["weight_d0"] is None and row["values"]["best_threshold_accuracy"] is None
    assert "a0 = 0" in row["reason"] and "two trials" in row["reason"]
    (row,) = measured(Config(kernels="cosformer", n=100_000), part="base")
    assert row["status"] == "skipped" and "positions" in row["reason"]


def test_the_section_says_what_the_rows_show() -> None:
    rows = measured(Config(find_amplitude=True))
    assert study.summary(rows)["exp"] == {name: rows[0]["values"][name] for name in ("success", "auc")}
    found = study.section(rows)
    said = " ".join(found.verdict)
    assert "Softmax (exp) separates D1 from D0 in 99." in said
    assert "at least 90% of trials: pow:8, pow:16; in at most 10% of trials: pow:2, pow:4, pow:6, taylor2" in said
    assert "at n = 200 a degree above 4.3, at n = 1,000,000 one above 16.6" in said
    notes = " ".join(found.notes)
    assert "recalled" in notes and "the paper says" not in notes
    assert "softmax needs a1 above 0.507 and linear attention above 9.51" in notes
    assert [stem for stem, _ in found.figures] == ["separation_sweeps", "separation_degree"]
    base, degrees, amplitudes = found.tables
    assert [row[0] for row in base.rows][:2] == ["exp", "linear"]
    assert degrees.rows[2] == ["1,000", "6.64", "pow:8"] and degrees.rows[-1][-1] == "none of those tried"
    assert amplitudes.rows[1][:3] == ["linear", "9.507", "9.507"]
    for table in found.tables:
        assert all(len(row) == len(table.head) for row in table.rows)


def test_the_declared_variant_is_called_that() -> None:
    found = study.section(measured(Config(variant="cross", sweep=("a1=0.8,1",), kernels="exp,cosformer", n=5000)))
    assert any(note.startswith("Declared variant") for note in found.notes)
    assert found.tables[0].rows[-1][1].startswith("skipped: cosformer depends on positions")
    assert [stem for stem, _ in found.figures] == ["separation_sweeps"]


@pytest.mark.skipif(importlib.util.find_spec("pomona.report.charts") is None, reason="no charts yet")
def test_figures_are_drawn_as_the_section_names_them(tmp_path: Path) -> None:
    rows = measured(Config(**QUICK, kernels="exp,pow:4"))
    study.draw(rows, tmp_path)
    names = {f"{stem}.{suffix}" for stem, _ in study.section(rows).figures for suffix in ("png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == names
