"""Errors of layers: which bars are drawn, on what axis, and which layers are named the worst."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pomona.report import layers
from pomona.report.layers import layer_errors, worst_layers

NAMES = [str(number) for number in range(1, 13)]
GROWING = [1e-7 * 3.0**place for place in range(12)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the bars were asked to be."""
    told: dict[str, Any] = {}

    def bars(stem: Path, title: str, groups: Any, series: Any, **more: Any) -> None:
        told.update(groups=list(groups), series=series, **more)

    monkeypatch.setattr(layers, "bars", bars)
    return told


@pytest.mark.parametrize(
    ("errors", "log"),
    [
        (GROWING, True),
        ([0.01, 0.02, 0.29], False),
        ([0.01, 0.02, 0.3], True),
        ([0.0, 0.1, 0.2], False),
        ([0.0, 0.001, 0.2], True),
        ([0.0, 0.0], False),
    ],
)
def test_the_axis_is_logarithmic_where_errors_span_decades(
    drawn: dict[str, Any], errors: list[float], log: bool
) -> None:
    layer_errors(Path("stem"), "t", NAMES[: len(errors)], errors)
    assert drawn["log_y"] is log and drawn["series"] == [("error", errors)]


def test_every_layer_has_its_bar_and_some_of_many_their_names(drawn: dict[str, Any]) -> None:
    names = [str(number) for number in range(1, 81)]
    layer_errors(Path("stem"), "t", names, [0.1] * 80)
    assert len(drawn["groups"]) == 80 and [name for name in drawn["groups"] if name] == names[::3]
    layer_errors(Path("stem"), "t", NAMES, [0.1] * 12)
    assert drawn["groups"] == NAMES


@pytest.mark.parametrize("errors", [GROWING, [0.0] * 12, [0.0, 0.0, *GROWING[2:]], [1e-30] * 12, [2e9] * 12])
def test_both_files_are_drawn_alike_each_time(tmp_path: Path, errors: list[float]) -> None:
    for name in ("a", "b"):
        layer_errors(tmp_path / name, "Error of each layer", NAMES, errors)
    for suffix in (".png", ".svg"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_the_worst_layers_come_worst_first() -> None:
    table = worst_layers(NAMES, [0.0, 0.5, 0.1, 0.5, 0.0023, 0.2, 0.3, 4e-7, 0, 0, 0, 0.11])
    assert table.rows == [["2", "0.5"], ["4", "0.5"], ["7", "0.3"], ["6", "0.2"], ["12", "0.11"]]
    assert table.caption.startswith("The 5 worst of 12 layers.")


def test_of_few_layers_all_are_shown() -> None:
    table = worst_layers(["encoder 1", "decoder 1"], [4.321e-7, 0.00023456])
    assert table.rows == [["decoder 1", "0.000235"], ["encoder 1", "4.32×10⁻⁷"]]
    assert table.caption.startswith("All layers")
