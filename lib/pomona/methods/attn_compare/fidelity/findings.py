"""What the study `fidelity` says: from rows of layer, head and kernel to a verdict, tables and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

from pomona.methods.attn_compare.fidelity.judging import QUERIES
from pomona.methods.attn_compare.kernels import find
from pomona.methods.attn_compare.rows import Row
from pomona.report.sections import Section, Table

NEAR = 0.15
"""A mean divergence this near to uniform's, as a share of it, counts as the same."""

SAFEST = 10
_SHOWN = ("uniform", "elu1", "taylor2", "favor:256", "hedgehog", "euler:8")  # heat maps, where they were judged
_MAPPED = {
    "kl": ("kl", "KL(softmax || kernel), nats"),
    "err": ("error", "relative error of the output"),
    "entropy": ("entropy", "entropy of the weights, nats"),
}

_KINDS = ("fixed maps", "functions of the score", "random features", "learned")

Heads = Mapping[str, Sequence[Row]]


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Mean divergence and mean output error of each kernel over its heads."""
    return {
        kernel: {"kl": _mean(held, "kl"), "error": _mean(held, "error")} for kernel, held in _by_kernel(rows).items()
    }


def section(rows: Sequence[Row]) -> Section:
    """The verdict, with a table of kernels, one of spread, one of learning and one of the safest heads."""
    heads = {kernel: held for kernel, held in _by_kernel(rows).items() if held}
    question = "Do its weights look like a real model's?"
    if "exp" not in heads:
        return Section("fidelity", question, ["No head could be judged."], _failures(rows))
    tables = [_kernels(heads), _spread(heads)]
    if learning := _learning(heads):
        tables.append(learning)
    if safest := _safest(heads):
        tables.append(safest)
    mapped = _MAPPED[heads["exp"][0]["point"]["heatmap"]][1]
    figures = [("fidelity_heads", f"Each cell is a head: {mapped}; one scale for all kernels.")]
    if len({row["point"]["layer"] for row in heads["exp"]}) > 1:
        figures.append(("fidelity_kl", "Mean over a layer's heads of KL(softmax || kernel); uniform in each."))
    return Section("fidelity", question, _verdict(heads), [*_notes(heads), *_failures(rows)], tables, figures)


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Heat maps of layers x heads, and the mean divergence of each layer."""
    from pomona.report.charts import Panel, Series, curves
    from pomona.report.heatmaps import HeatMap, heat_maps

    heads = {kernel: held for kernel, held in _by_kernel(rows).items() if held}
    if "exp" not in heads:
        return
    column, label = _MAPPED[heads["exp"][0]["point"]["heatmap"]]
    layers = sorted({row["point"]["layer"] for row in heads["exp"]})
    count = 1 + max(row["point"]["head"] for row in heads["exp"])
    shown = [kernel for kernel in _SHOWN if kernel in heads]
    if column == "entropy":
        shown = ["exp", *(kernel for kernel in shown if find(kernel).positive)]
    maps = []
    for kernel in shown:
        cells = {(row["point"]["layer"], row["point"]["head"]): row["values"][column] for row in heads[kernel]}
        maps.append(HeatMap(kernel, [[cells.get((layer, head)) for head in range(count)] for layer in layers]))
    name = "layer" if layers == list(range(len(layers))) else f"layers {', '.join(map(str, layers))}"
    heat_maps(
        folder / "fidelity_heads",
        "How each head's softmax is missed" if column != "entropy" else "How spread each head's weights are",
        maps,
        x_label="head",
        y_label=name,
        scale_label=label,
    )
    if len(layers) == 1:
        return
    panels: dict[str, list[Series]] = {}
    for kernel, held in heads.items():
        if kernel == "exp" or not find(kernel).positive:
            continue
        means = {layer: _mean([row for row in held if row["point"]["layer"] == layer], "kl") for layer in layers}
        known = [(layer, mean) for layer, mean in means.items() if mean is not None]
        line = Series(kernel, [layer for layer, _ in known], [mean for _, mean in known])
        for title in _KINDS if kernel == "uniform" else (_kind(kernel),):
            panels.setdefault(title, []).append(line)
    drawn = {title: lines for title, lines in panels.items() if len(lines) > 1} or panels
    top = 1.05 * max(y for lines in drawn.values() for line in lines for y in line.y)
    curves(
        folder / "fidelity_kl",
        "Divergence from softmax, layer by layer",
        [
            Panel(title, "layer", "KL(softmax || kernel), nats", lines, y_range=(0, top))
            for title, lines in drawn.items()
        ],
        columns=2,
    )


def _kind(kernel: str) -> str:
    found = find(kernel)
    if found.learnable:
        return "learned"
    if kernel.partition(":")[0] in ("favor", "rfa", "polysketch"):
        return "random features"
    return "fixed maps" if found.weight is None else "functions of the score"


# --- sentences -------------------------------------------------------------------------------------------------------


def _verdict(heads: Heads) -> list[str]:
    truth = heads["exp"]
    found = []
    base = _mean(heads["uniform"], "kl")
    assert base is not None
    means = {kernel: _mean(held, "kl") for kernel, held in heads.items() if kernel not in ("exp", "uniform")}
    alike = [kernel for kernel, mean in means.items() if mean is not None and abs(mean - base) <= NEAR * base]
    better = sorted((mean, kernel) for kernel, mean in means.items() if mean is not None and mean < base * (1 - NEAR))
    worse = sorted((mean, kernel) for kernel, mean in means.items() if mean is not None and mean > base * (1 + NEAR))
    told = f"uniform attention, which looks at nothing, diverges by {base:.3f} nats in the mean of {len(truth)} heads"
    if alike:
        found.append(f"Indistinguishable from uniform by their divergence from softmax: {', '.join(alike)}; {told}.")
    else:
        found.append(f"{told[0].upper()}{told[1:]}; no kernel is within {NEAR:.0%} of that.")
    if better:
        found.append(f"Better than uniform: {', '.join(f'{kernel} ({mean:.3f})' for mean, kernel in better)}.")
    if worse:
        found.append(f"Worse than uniform: {', '.join(f'{kernel} ({mean:.3f})' for mean, kernel in worse)}.")
    heavy = [(kernel, find(kernel).features(truth[0]["point"]["width"])) for _, kernel in better]
    if heavy := [(kernel, count) for kernel, count in heavy if count is not None and find(kernel).map is None]:
        found.append(
            "Fidelity costs state: "
            + ", ".join(f"{kernel} would need {count:.3g} features exactly" for kernel, count in heavy)
            + "."
        )
    for kernel, held in heads.items():
        learned = [row for row in held if row["values"].get("kl_before") is not None]
        if learned:
            before, after, seen = (_mean(learned, name) for name in ("kl_before", "kl", "kl_fitted"))
            steps = learned[0]["point"]["learn_steps"]
            found.append(
                f"{steps} steps of learning take {kernel} from {before:.3f} to {after:.3f} nats on text it never saw, "
                f"and to {seen:.3f} on the text it learned from."
            )
    found.append(_sinks(heads))
    return found


def _sinks(heads: Heads) -> str:
    changed = [
        f"{kernel} {_cell(_mean(heads[kernel], 'kl'))} to {_cell(_mean(heads[kernel], 'kl_rest'))}"
        for kernel in ("uniform", _best(heads))
        if kernel is not None
    ]
    return (
        f"Softmax lays {_mean(heads['exp'], 'softmax_sink'):.1%} of its weight on token 0. Leaving that token out "
        f"moves the divergence of {' and of '.join(changed)} nats."
    )


def _notes(heads: Heads) -> list[str]:
    point = heads["exp"][0]["point"]
    layers = {row["point"]["layer"] for row in heads["exp"]}
    form = (
        "full attention, which a causal model never computes"
        if point["full"]
        else "causal attention; means over rows leave out row 0, which has no choice"
    )
    found = [
        f"{point['source']}: {len(heads['exp'])} heads of {_count(len(layers), 'layer')}, {point['tokens']} tokens, "
        f"heads {point['width']} wide, float64, {form}.",
        "KL is infinite where a kernel denies a key that softmax uses. A weight below 1e-12 therefore counts as 1e-12, "
        "or as softmax's where that is smaller still; the column floored says in how many rows that happened. Negative "
        "weights count likewise, so KL says little of kernels that have them.",
    ]
    masked = sorted({text for row in heads["exp"] for text in row["point"]["masked"]})
    if masked:
        found.append(
            f"The model's softmax has {' and '.join(masked)}. Every kernel sees the keys that softmax sees; "
            "none is soft-capped, so exp itself differs from a soft-capped softmax."
        )
    unlearned = [k for k, held in heads.items() if find(k).learnable and held[0]["values"].get("kl_before") is None]
    if unlearned:
        found.append(f"Judged as they begin, without learning: {', '.join(unlearned)}.")
    if slope := _slope(heads):
        found.append(slope)
    return found


def _slope(heads: Heads) -> str | None:
    """How the error of FAVOR+ falls with its number of features m, as a power of m."""
    points = []
    for kernel, held in heads.items():
        error = _mean(held, "estimate_error") if kernel.startswith("favor:") else None
        if error:
            points.append((math.log(int(kernel.partition(":")[2])), math.log(error), _mean(held, "effective_samples")))
    if not points:
        return None
    carried = ", ".join(f"{samples:.1f} of {round(math.exp(m))}" for m, _, samples in points)
    said = f"FAVOR+ estimates exp(s) where softmax puts its weight from this many effective samples: {carried}."
    if len(points) < 2:
        return said
    centre = fmean(m for m, _, _ in points)
    slope = sum((m - centre) * e for m, e, _ in points) / sum((m - centre) ** 2 for m, _, _ in points)
    return f"{said} Its relative error goes as m^{slope:.2f}; independent samples of small variance give m^-0.50."


def _failures(rows: Sequence[Row]) -> list[str]:
    found: dict[str, int] = {}
    for row in rows:
        if row["status"] != "done":
            key = f"{row['status']}: {row['kernel']}, {row['reason']}"
            found[key] = found.get(key, 0) + 1
    return [f"{_count(count, 'row')} {key}." for key, count in found.items()]


# --- tables ----------------------------------------------------------------------------------------------------------


def _kernels(heads: Heads) -> Table:
    caption = (
        "Means over heads, of rows within a head. KL: KL(softmax || kernel) in nats, and its median over heads. Error: "
        "||(P - Q)V|| / ||PV||. Entropy: of the weights, in nats. Largest: the largest weight of a row. Sink: the "
        "weight on token 0. Top-1: rows whose largest weight is on softmax's key, a tie being a miss. KL, error and "
        "top-1 once more over the keys after token 0. Spearman: rank correlation of q.k and weight along a row; "
        f"discordant: pairs of keys in the wrong order; both over up to {QUERIES} queries evenly spaced. Floored: rows "
        "in which a weight was raised for KL. Near 0: rows whose weights sum to less than a thousandth of their sizes."
    )
    columns = (
        ("KL", "kl"),
        ("median", None),
        ("error", "error"),
        ("entropy", "entropy"),
        ("largest", "max_weight"),
        ("sink", "sink"),
        ("top-1", "top1"),
        ("KL, no token 0", "kl_rest"),
        ("error, no token 0", "error_rest"),
        ("top-1, no token 0", "top1_rest"),
        ("Spearman", "spearman"),
        ("discordant", "discordant"),
        ("floored", "floored"),
        ("near 0", "near_zero"),
    )
    return Table(
        caption,
        ["kernel", *(title for title, _ in columns)],
        [
            [kernel, *(_cell(_quantile(held, "kl", 50) if name is None else _mean(held, name)) for _, name in columns)]
            for kernel, held in heads.items()
        ],
    )


def _spread(heads: Heads) -> Table:
    caption = (
        "Quantiles over heads, as 10 % / 50 % / 90 %. Nearest rows: the least Euclidean distance between the attention "
        "rows, over all keys, of two distinct queries: 0 where two queries cannot be told apart. Doubling: the largest "
        "change of a weight when a query is doubled: 0 where the kernel does not see how long a query is. State: what "
        "a head carries from token to token in float32, r (e + 1) numbers of r features and values e wide. Break-even: "
        "the length from which that is smaller than the cache of keys and values."
    )
    rows = []
    for kernel, held in heads.items():
        values = held[0]["values"]
        rows.append(
            [
                kernel,
                *(
                    " / ".join(_cell(_quantile(held, name, at)) for at in (10, 50, 90))
                    for name in ("kl", "error", "nearest_rows", "doubling")
                ),
                _bytes(values["state_bytes"]),
                "-" if values["break_even"] is None else f"{values['break_even']:.4g}",
            ]
        )
    return Table(caption, ["kernel", "KL", "error", "nearest rows", "doubling", "state", "break-even"], rows)


def _learning(heads: Heads) -> Table | None:
    learned = {kernel: held for kernel, held in heads.items() if held[0]["values"].get("kl_before") is not None}
    if not learned:
        return None
    rows = []
    for layer in sorted({row["point"]["layer"] for held in learned.values() for row in held}):
        cells = [str(layer)]
        for held in learned.values():
            here = [row for row in held if row["point"]["layer"] == layer]
            for names in (("kl_fitted_before", "kl_fitted"), ("kl_before", "kl")):
                cells.append(" → ".join(_cell(_mean(here, name)) for name in names))
        rows.append(cells)
    caption = (
        "Maps fitted head by head to softmax's rows on one text (learned) and judged on another (judged): mean KL of a "
        "layer's heads in nats, before → after."
    )
    return Table(caption, ["layer", *(f"{kernel}, {on}" for kernel in learned for on in ("learned", "judged"))], rows)


def _safest(heads: Heads) -> Table | None:
    kernel = _best(heads)
    if kernel is None:
        return None
    held = sorted(
        (row for row in heads[kernel] if row["values"]["error"] is not None), key=lambda row: row["values"]["error"]
    )
    caption = (
        f"The heads safest to linearise: those whose output changes least under {kernel}, which has the least mean "
        "error of the kernels that run in linear time here. Each error is that of one head on the text judged, not of "
        "a model in which it was replaced. Softmax's entropy and weight on token 0 say what the head does."
    )
    names = ("error", "kl", "top1", "softmax_entropy", "softmax_sink")
    return Table(
        caption,
        ["layer", "head", "error", "KL", "top-1", "softmax's entropy", "softmax's sink"],
        [
            [str(row["point"]["layer"]), str(row["point"]["head"]), *(_cell(row["values"][name]) for name in names)]
            for row in held[:SAFEST]
        ],
    )


def _best(heads: Heads) -> str | None:
    """The kernel with a feature map whose mean error is least; uniform is none that anyone would use."""
    means = {
        kernel: _mean(held, "error")
        for kernel, held in heads.items()
        if kernel != "uniform" and find(kernel).map is not None
    }
    known = {kernel: mean for kernel, mean in means.items() if mean is not None}
    return min(known, key=known.__getitem__) if known else None


# --- numbers ---------------------------------------------------------------------------------------------------------


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _by_kernel(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        held = found.setdefault(row["kernel"], [])
        if row["status"] == "done":
            held.append(row)
    return found


def _known(rows: Sequence[Row], name: str) -> list[float]:
    return [value for row in rows if (value := row["values"].get(name)) is not None]


def _mean(rows: Sequence[Row], name: str) -> float | None:
    known = _known(rows, name)
    return fmean(known) if known else None


def _quantile(rows: Sequence[Row], name: str, percent: int) -> float | None:
    known = _known(rows, name)
    if len(known) < 2:
        return known[0] if known else None
    return quantiles(known, n=100, method="inclusive")[percent - 1]


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.1e}"


def _bytes(count: int | None) -> str:
    if count is None:
        return "-"
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
