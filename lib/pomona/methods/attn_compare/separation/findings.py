"""What the rows of the separation say: the summary, the section of the report, the figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pomona.methods.attn_compare.rows import Row
from pomona.methods.attn_compare.separation import theory
from pomona.report.sections import Section, Table

SEPARATES, FAILS = 0.9, 0.1

_AXES = {
    "n": "tokens n",
    "d": "width d",
    "m": "sign vectors m",
    "a0": "amplitude a0",
    "a1": "amplitude a1",
    "c": "share c",
}
_LOGARITHMIC = ("n", "d", "m")


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Success and AUC of each kernel at the base point."""
    return {row["kernel"]: {name: row["values"][name] for name in ("success", "auc")} for row in _done(rows, "base")}


def section(rows: Sequence[Row]) -> Section:
    base = _done(rows, "base")
    point = next(row["point"] for row in rows if row["point"]["part"] == "base")
    powers, amplitudes = _done(rows, "p"), _done(rows, "amplitude")
    figures = []
    if _swept(rows):
        figures.append(("separation_sweeps", "Success while one constant varies, the others held; dashed: calculated."))
    if powers:
        figures.append(
            (
                "separation_degree",
                "Success of s^p over n, dashed: calculated; the least degree that did, dashed: needed.",
            )
        )
    return Section(
        "separation",
        "Does it separate what softmax separates?",
        [*_separated(base), *_law(point, powers)],
        _notes(point, {row["kernel"] for row in rows}),
        [*_base_table(base, rows, point), *_degree_table(point, powers), *_amplitude_table(amplitudes)],
        figures,
    )


def _separated(base: Sequence[Row]) -> list[str]:
    if not base:
        return ["No kernel could be tried at these constants; the table says why."]
    said = []
    reached = {row["kernel"]: row["values"]["success"] for row in base}
    for row in base:
        if row["kernel"] not in ("exp", "linear"):
            continue
        name = "Softmax (exp)" if row["kernel"] == "exp" else "Linear attention (linear)"
        low, high = row["intervals"]["success"]
        said.append(
            f"{name} separates D1 from D0 in {reached[row['kernel']]:.1%} of {row['point']['trials']} trials "
            f"(95 % interval {low:.1%} to {high:.1%}; calculated {row['theory']['success']:.1%})."
        )
    others = {kernel: success for kernel, success in reached.items() if kernel not in ("exp", "linear")}
    groups = (
        (f"in at least {SEPARATES:.0%} of trials", [k for k, s in others.items() if s >= SEPARATES]),
        ("in some trials", [k for k, s in others.items() if FAILS < s < SEPARATES]),
        (f"in at most {FAILS:.0%} of trials", [k for k, s in others.items() if s <= FAILS]),
    )
    listed = "; ".join(f"{how}: {', '.join(names)}" for how, names in groups if names)
    return [*said, f"The other kernels separate them {listed}."] if listed else said


def _law(point: Mapping[str, Any], powers: Sequence[Row]) -> list[str]:
    a, b = point["a1"], point["b"]
    if not powers or theory.critical_power(point["n"], a, b) is None:
        return []
    needed = [(n, max(theory.critical_power(n, a, b) or 0, 0)) for n in _sizes(powers)]
    (small, least), (large, most) = needed[0], needed[-1]
    said = f"at n = {small:,} a degree above {least:.1f}"
    if large > small:
        said += f", at n = {large:,} one above {most:.1f}"
    highest = max((row["kernel"] for row in powers), key=_degree)
    limit = theory.critical_size(_degree(highest), a, b)
    enough = "a1 (1 + a1) > 1, that is a1 > 0.618" if point["variant"] == "self" else "g a1 > 1"
    return [
        f"To leading order a power s^p of fixed degree fails for n large enough, as the degree it takes grows like "
        f"log n: {said}. {highest} lasts to about n = {limit:.2g}. Softmax has no such limit once {enough}."
    ]


def _notes(point: Mapping[str, Any], kernels: Iterable[str]) -> list[str]:
    n, a1, b = point["n"], point["a1"], point["b"]
    least = theory.critical_amplitude(n, b, point.get("g"))
    linear = theory.crossing(lambda a: theory.weight_on_special(1 + a, n) * (a + b), (0.0, 1.0, 1e2, 1e4, 1e6, 1e13))
    notes = [
        "Provenance. Data sets, network and constants are recalled from the paper, whose text beyond its opening could "
        "not be read; they are no quotations. Its grids and numbers of trials are not known: the values swept are our "
        "own, and leave the theorem's conditions on purpose (within_theorem in the rows).",
        "What is measured. A trial draws m sign vectors. It is a success when the network is above 0 on D1 and 0 on "
        "D0, under the same vectors. What is calculated is exact, a finite sum over all that a sign vector can be; a "
        "value equal to the threshold does not exceed it. Intervals are Wilson's, 95 %, for the AUC as if each D1 "
        "sample met one D0 sample only, which makes it wide.",
        "Scope. This is one network with one threshold, tau = (c + 0.1) sqrt(log n), and not all linear attention. The "
        "AUC asks for less: how often the largest value before the threshold is higher on D1 than on D0, each with "
        "vectors of its own; 0.5 is chance. The accuracy at the best threshold is that of the threshold that was best "
        "on half of the trials, on the other half.",
        f"Amplitude. To leading order a kernel separates once its margin f* (a1 + b) exceeds 0.1. At n = {n:,} softmax "
        f"needs a1 above {least:.3f}"
        + (f" and linear attention above {linear:.3g}, about sqrt(0.1 n)" if linear else "")
        + f"; here a1 = {a1:g}"
        + (", a tenth above what softmax needs (preset finite)." if "this n" in point["provenance"] else "."),
        "Context, not a proof. Entries of the order sqrt(log n), as the data sets have, are where attention ceases to "
        "have approximations in nearly linear time, if SETH holds (Alman and Song, arXiv 2302.13214).",
    ]
    if point["variant"] == "cross":
        notes.append(
            "Declared variant. The paper's cross-attention data could not be recovered. Here keys and values are those "
            f"of self-attention, and every query has the row sum {point['g']:g} sqrt(log n)."
        )
    if any(kernel.startswith(("favor", "rfa", "polysketch")) for kernel in kernels):
        notes.append("Random features are drawn once for the run, from its seed, not once for each trial.")
    if "inline" in kernels:
        notes.append(
            "inline has the scores of linear attention and subtracts where that divides: where inline separates, the "
            "division by the sum is what fails in linear, not that it is linear."
        )
    if {"hedgehog", "t2r"} & set(kernels):
        notes.append("hedgehog and t2r are as they begin, not fitted.")
    return notes


def _base_table(base: Sequence[Row], rows: Sequence[Row], point: Mapping[str, Any]) -> list[Table]:
    told = ", ".join(f"{name} = {point[name]:g}" for name in ("n", "d", "m", "a0", "a1", "b", "c"))
    caption = (
        f"At {told}, {point['trials']} trials: success and AUC with 95 % intervals and what they are calculated to be; "
        "accuracy at the best threshold; attention f* of D1's special token to itself; margin f* (a1 + b), to be "
        "compared with 0.1"
    )
    dense = any("dense_difference" in row["values"] for row in base)
    head = ["kernel", "success", "calculated", "AUC", "calculated", "best threshold", "f*", "margin"]
    cells = [
        [
            row["kernel"],
            _with_interval(row, "success"),
            _number(row["theory"].get("success")),
            _with_interval(row, "auc"),
            _number(row["theory"].get("auc")),
            _number(row["values"]["best_threshold_accuracy"]),
            _short(row["values"]["weight"]),
            _short(row["values"]["margin"]),
            *([_short(row["values"]["dense_difference"])] if dense else []),
        ]
        for row in base
    ]
    if dense:
        head.append("dense - fast")
        caption += "; largest difference between token by token and by distinct rows (- where n is too large)"
    left_out = [
        [row["kernel"], f"{row['status']}: {row['reason']}", *[""] * (len(head) - 2)]
        for row in rows
        if row["point"]["part"] == "base" and row["status"] != "done"
    ]
    return [Table(caption, head, [*cells, *left_out])]


def _degree_table(point: Mapping[str, Any], powers: Sequence[Row]) -> list[Table]:
    if not powers:
        return []
    cells = []
    for n in _sizes(powers):
        enough = [row["kernel"] for row in powers if row["point"]["n"] == n and row["values"]["success"] >= 0.5]
        needed = theory.critical_power(n, point["a1"], point["b"])
        cells.append([f"{n:,}", _number(needed, 2), min(enough, key=_degree) if enough else "none of those tried"])
    caption = "The degree that s^p needs, calculated, and the least that separated in half of the trials"
    return [Table(caption, ["n", "degree above", "separated from"], cells)]


def _amplitude_table(amplitudes: Sequence[Row]) -> list[Table]:
    if not amplitudes:
        return []
    caption = "The amplitude a1 where f* (a1 + b) reaches 0.1, by formula where there is one, and success around it"
    head = ["kernel", "a1", "by formula", "success at 0.9 a1", "at a1", "at 1.1 a1"]
    cells = [
        [
            row["kernel"],
            _short(row["values"]["amplitude"]) if row["values"]["amplitude"] is not None else row["reason"],
            _short(row["theory"].get("amplitude")),
            *(_number(row["values"].get(f"success_{where}")) for where in ("below", "at", "above")),
        ]
        for row in amplitudes
    ]
    return [Table(caption, head, cells)]


def draw(rows: Sequence[Row], folder: Path) -> None:
    from pomona.report import charts

    swept = _swept(rows)
    if swept:
        panels = [
            charts.Panel(
                f"{name} varies",
                _AXES[name],
                "success",
                _series(of, name),
                log_x=name in _LOGARITHMIC,
                y_range=(-0.03, 1.03),
            )
            for name, of in swept.items()
        ]
        charts.curves(folder / "separation_sweeps", "Success over the constants of the construction", panels)
    if powers := _done(rows, "p"):
        point = powers[0]["point"]
        panels = [
            charts.Panel("success", "tokens n", "success", _series(powers, "n"), log_x=True, y_range=(-0.03, 1.03)),
            charts.Panel("degree needed", "tokens n", "degree p", _degrees(point, powers), log_x=True),
        ]
        charts.curves(folder / "separation_degree", "A fixed degree fails for n large enough", panels, columns=2)


def _series(rows: Sequence[Row], name: str) -> list[Any]:
    """For each kernel, what was measured over the constant `name`, and then what is calculated."""
    from pomona.report import charts

    series = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        of = sorted((row for row in rows if row["kernel"] == kernel), key=lambda row: row["point"][name])
        x = [row["point"][name] for row in of]
        low, high = ([row["intervals"]["success"][end] for row in of] for end in (0, 1))
        series.append(charts.Series(kernel, x, [row["values"]["success"] for row in of], low, high))
        if all("success" in row["theory"] for row in of):
            series.append(charts.Series(kernel, x, [row["theory"]["success"] for row in of], theory=True))
    return series


def _degrees(point: Mapping[str, Any], powers: Sequence[Row]) -> list[Any]:
    from pomona.report import charts

    found = []
    for n in _sizes(powers):
        enough = [
            _degree(row["kernel"]) for row in powers if row["point"]["n"] == n and row["values"]["success"] >= 0.5
        ]
        if enough:
            found.append((n, min(enough)))
    series = [charts.Series("pow", [n for n, _ in found], [degree for _, degree in found])] if found else []
    needed = [(n, theory.critical_power(n, point["a1"], point["b"])) for n in _sizes(powers)]
    known = [(n, degree) for n, degree in needed if degree is not None]
    return [*series, charts.Series("pow", [n for n, _ in known], [degree for _, degree in known], theory=True)]


def _done(rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if row["point"]["part"] == part and row["status"] == "done"]


def _swept(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each constant that was swept."""
    return {name: of for name in _AXES if (of := _done(rows, name))}


def _sizes(powers: Sequence[Row]) -> list[int]:
    return sorted({row["point"]["n"] for row in powers})


def _degree(kernel: str) -> int:
    return int(kernel.removeprefix("pow:"))


def _with_interval(row: Row, name: str) -> str:
    low, high = row["intervals"][name]
    return f"{row['values'][name]:.3f} ({low:.3f} to {high:.3f})"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
