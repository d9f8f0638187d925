"""What a reading says of itself, for people: sections and figures of report.md, and the card of a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pomona.io.atomic import writing
from pomona.io.image_arrays import DIGITS
from pomona.methods.diffeat_extract.probing.study import of
from pomona.methods.diffeat_extract.reading import column_name
from pomona.report.cards import Parent, command_line, model_card
from pomona.report.charts import Panel, Series, curves
from pomona.report.heatmaps import HeatMap, heat_maps
from pomona.report.sections import Section, Table

TITLE = "Features from inside a diffusion model"
PREAMBLE = (
    "By the command for *Diffusion Models Beat GANs on Image Classification* (arXiv 2307.08702) and its successor "
    "(2311.17921). Every number below was measured or counted in this run; none is quoted from the papers."
)
_KINDS = {"features": "features", "random": "same network, random weights", "pixels": "raw pixels"}
_BEST = 10  # cells of a sweep in its table
_SHOWN = 8  # columns of a probe in its figure


def sections(found: Mapping[str, Any]) -> list[Section]:
    """The report's sections, of what report.json holds."""
    parts = [_features(found)]
    if found["probe"]:
        parts.append(_probe(found["probe"], "probe"))
    if found["sweep"]:
        parts += [_sweep(found["sweep"], found["reading"]), _probe(found["sweep"], "probe")]
    if found["head"]:
        parts.append(_probe(found["head"], "probe"))
    if found["cka"]:
        parts.append(_cka(found["cka"], found["reading"], found["images"]))
    return parts


def _features(found: Mapping[str, Any]) -> Section:
    reading, model = found["reading"], found["model"]
    blocks = {block["name"]: block for block in found["blocks"]}
    read = [blocks[name] for name in reading["blocks"]]
    last = max(block["number"] for block in read)
    said = [
        f"{_count(found['images'], 'image')}; {_listed([block['name'] for block in read], 'block')} of "
        f"{len(blocks)} at t = {_few(reading['timesteps'])}.",
        f"The two passes of DifFeed cost {found['share']:.1%} of one whole pass; its head reads block {last}."
        if _feeds_back(found)
        else f"The pass stops after block {last}, at {found['share']:.1%} of the cost of a whole one.",
    ]
    if found["rejects"]:
        said.append(f"{_count(len(found['rejects']), 'image')} could not be read.")
    size = reading["image_size"]
    notes = [
        f"Model: {model['name']}, {model['parameters']:,} parameters, computed in {model['dtype']}.",
        f"Images: {size} x {size} pixels, {model['channels']} channel{'s' * (model['channels'] > 1)}, scaled and "
        "cropped in the middle where they were not so.",
        f"Noise: {reading['schedule']}. Of the signal's power "
        + _few([f"{value:.4f} is left at t = {t}" for t, value in reading["alpha_bars"].items()])
        + ". An image's noise depends on the seed, its name, the time, the view and the draw.",
    ]
    if reading["views"] > 1 or reading["noise_average"] > 1:
        notes.append(
            f"{reading['views']} views of each image, features averaged over {reading['noise_average']} draws of noise."
        )
    rows = [
        [
            block["name"],
            str(block["number"]),
            f"{block['channels']} x {block['side']} x {block['side']}",
            f"{block['share']:.1%}",
        ]
        for block in read
    ]
    caption = "The blocks, the shapes of their maps, and the cost of a pass that ends there as a share of a whole one."
    return Section(
        "Features",
        "What was read, and at what cost?",
        said,
        notes,
        [Table(caption, ["block", "number", "map", "cost"], rows)],
    )


def _feeds_back(found: Mapping[str, Any]) -> bool:
    return bool(found["head"]) and found["head"]["chosen"] == "diffeed"


def _probe(probed: Mapping[str, Any], figure: str) -> Section:
    rows, chosen = probed["rows"], probed["chosen"]
    best = of(rows, "features", chosen)
    assert best is not None, "there are features"
    several = probed["validation"] is not None and len(probed["validation"]) > 1
    said = []
    for count in dict.fromkeys(row["shots"] for row in rows):
        who = f"{chosen}, {_labels(count)}" if several else _labels(count).capitalize()
        said.append(f"{who}: {_compared([row for row in rows if row['shots'] == count], chosen)}")
    notes = [
        f"Classifier: {probed['classifier']}. {probed['train']:,} images to learn from, {probed['test']:,} to test on, "
        f"{len(probed['classes'])} classes.",
        "Intervals of 95 %: Wilson's where there is one draw of labelled images, else a bootstrap over draws and test "
        "images; differences are taken on the same draws and test images.",
    ]
    if several:
        notes.append(
            f"{chosen} was chosen among {len(probed['validation'])} by accuracy on half of the images to learn from, "
            f"with {_labels(probed['chosen_by'])}; no test image had a part in it."
        )
    return Section(
        "Probe",
        "How well do the features tell the images apart, and how much of that is the model's training?",
        said,
        notes,
        [_accuracies(rows)],
        [(figure, "Accuracy on the test images by the number of labelled images of each class.")],
    )


def _compared(rows: Sequence[Mapping[str, Any]], chosen: str) -> str:
    own = next(row for row in rows if row["kind"] == "features" and row["column"] == chosen)
    parts = []
    for kind in ("random", "pixels"):
        other = next((row for row in rows if row["kind"] == kind and chosen in row.get("behind", {})), None)
        if other is not None:
            gain = other["behind"][chosen]
            what = "untrained" if kind == "random" else "pixels"
            parts.append(f"{_points(gain)} against {what} ({_percent(other['mean'])})")
    beside = f": {' and '.join(parts)}" if parts else ""
    return f"{_percent(own['mean'])} {_interval(own)}{beside}."


def _labels(count: str | int) -> str:
    if count == "all":
        return "all labels"
    return f"{count} label{'s' * (str(count) != '1')} of each class"


def _points(gain: Mapping[str, float]) -> str:
    mean, low, high = (f"{round(100 * gain[name], 1) + 0:+.1f}" for name in ("mean", "low", "high"))  # + 0: never -0.0
    return f"{mean} points ({low} to {high})"


def _accuracies(rows: Sequence[Mapping[str, Any]]) -> Table:
    counts = list(dict.fromkeys(row["shots"] for row in rows))
    by = {(row["kind"], row["column"], row["shots"]): row for row in rows}
    several = len({row["column"] for row in rows if row["kind"] == "features"}) > 1
    lines = []
    for kind, column in dict.fromkeys((row["kind"], row["column"]) for row in rows):
        cells = [by[kind, column, count] for count in counts]
        where = ["" if kind == "pixels" else column] if several else []
        lines.append([_KINDS[kind], *where, *(f"{_percent(row['mean'])} ± {_half(row)}" for row in cells)])
    caption = "Accuracy by the number of labelled images of each class, and half the width of its interval."
    columns = ["column"] if several else []
    return Table(caption, ["classified by", *columns, *(_head(count) for count in counts)], lines)


def _half(row: Mapping[str, Any]) -> str:
    return f"{50 * (row['high'] - row['low']):.1f}"


def _interval(row: Mapping[str, Any]) -> str:
    return f"({100 * row['low']:.1f} to {100 * row['high']:.1f})"


def _head(count: str) -> str:
    return "all labels" if count == "all" else f"{count} a class"


def _sweep(sweep: Mapping[str, Any], reading: Mapping[str, Any]) -> Section:
    cells: Mapping[str, Any] = sweep["validation"]
    about = sweep["about"]
    best = cells[sweep["chosen"]]
    said = [
        f"Block {about['block']} at t = {about['timestep']}, pooled to {about['pool']} x {about['pool']}, is best in "
        f"validation: {_percent(best['mean'])} {_interval(best)}.",
        *_findings(cells, about),
    ]
    if sweep["untrained"]:
        gains = {name: cells[name]["mean"] - sweep["untrained"][name]["mean"] for name in cells}
        most = max(gains, key=lambda name: gains[name])
        said.append(
            f"Training adds {100 * gains[sweep['chosen']]:+.1f} points there, and most, "
            f"{100 * gains[most]:+.1f}, at {most}; it adds in {sum(gain > 0 for gain in gains.values())} of "
            f"{len(gains)} cells."
        )
    best_first = sorted(cells.items(), key=lambda item: -item[1]["mean"])
    rows = [[name, str(cell["dims"]), f"{_percent(cell['mean'])} ± {_half(cell)}"] for name, cell in best_first[:_BEST]]
    notes = [
        f"Validation accuracy with {_labels(sweep['chosen_by'])}, on half of the images to learn from; "
        "neighbouring cells share images and draws, so that differences are surer than the intervals say.",
    ]
    figures = [
        ("sweep", "Accuracy in validation of every block and time, a map for each pool."),
        ("times", f"Accuracy in validation over time at pool {about['pool']}, of the best block and some others."),
    ]
    if sweep["untrained"]:
        figures.append(("gain", "What training adds: points above the same network with random weights."))
    return Section(
        "Sweep",
        "Which block, time and pool tell the images apart best?",
        said,
        notes,
        [Table("The best cells, with half the width of their intervals.", ["column", "dims", "accuracy"], rows)],
        figures,
    )


def _findings(cells: Mapping[str, Any], about: Mapping[str, Any]) -> Iterator[str]:
    """The four findings of the papers, each with its figures here."""
    times = sorted({cell["timestep"] for cell in cells.values()})
    by_time = {t: max(c["mean"] for c in cells.values() if c["timestep"] == t) for t in times}
    if len(times) > 1:
        best = max(by_time, key=lambda t: by_time[t])
        yield f"Noise, by the best cell at each time: {_series(by_time, 't = ')}; {_rises(times, best)}."
    names = dict.fromkeys(cell["block"] for cell in cells.values())
    if len(names) > 1:
        same = {
            cell["block"]: cell["mean"]
            for cell in cells.values()
            if cell["timestep"] == about["timestep"] and cell["pool"] == about["pool"]
        }
        yield f"Block, at that time and pool: {_series(same)}."
    pools = sorted({cell["pool"] for cell in cells.values()})
    if len(pools) > 1:
        same = {
            cell["pool"]: cell["mean"]
            for cell in cells.values()
            if cell["timestep"] == about["timestep"] and cell["block"] == about["block"]
        }
        yield f"Pool, at that block and time: {_series(same)}."


def _rises(times: Sequence[int], best: int) -> str:
    if best == times[0]:
        return "the least noise is best"
    return "the most noise is best" if best == times[-1] else "neither the least nor the most is best"


def _series(values: Mapping[Any, float], prefix: str = "") -> str:
    return _few([f"{prefix}{name} {_percent(value)}" for name, value in values.items()])


def _cka(cka: Mapping[str, Any], reading: Mapping[str, Any], images: int) -> Section:
    said, times = [], reading["timesteps"]
    mirror = cka["mirror"]
    if mirror:
        pairs = _few(
            [
                f"{one:.2f} at t = {time} (others {other:.2f})"
                for time, one, other in zip(times, mirror["mirrors"], mirror["others"], strict=True)
            ]
        )
        said.append(
            f"CKA of encoder blocks with their mirrors in the decoder, on average, and with its other blocks: {pairs}."
        )
    matrix, count = cka["matrix"], len(reading["blocks"])
    if len(times) > 1:
        last = count * (len(times) - 1)
        apart = [(reading["blocks"][place], matrix[place][last + place]) for place in range(count)]
        known = [(name, value) for name, value in apart if value is not None]
        if known:
            name, value = min(known, key=lambda item: item[1])
            said.append(
                f"From t = {times[0]} to t = {times[-1]} block {name} changes most: CKA of the two {value:.2f}."
            )
    pools = _few([f"{pool} x {pool}" for pool in sorted(set(cka["pools"].values()))])
    return Section(
        "Similarity",
        "How alike are the features of the blocks, and do they change with the noise?",
        said or ["No two sets of features could be compared."],
        [
            f"Linear CKA (Kornblith et al. 2019), debiased, over {images:,} images; 1 is the same up to "
            "rotation and scale, 0 is unrelated.",
            f"Maps pooled to {pools}: the largest asked for that fits the block.",
        ],
        [],
        [("cka", "CKA of all pairs of blocks, a map for each time.")],
    )


# --- figures ---------------------------------------------------------------------------------------------------------


def figures(found: Mapping[str, Any], folder: Path) -> None:
    """Write the figures that the sections name into `folder`.

    Raises:
        OutputError: a file cannot be written.
    """
    probed = found["probe"] or found["sweep"] or found["head"]
    if not probed and not found["cka"]:
        return
    with writing(folder):
        folder.mkdir()
    if probed:
        _probe_figure(folder / "probe", probed)
    if found["sweep"]:
        _sweep_figures(folder, found["sweep"], found["reading"])
    if found["cka"]:
        _cka_figure(folder / "cka", found["cka"], found["reading"])


def _probe_figure(stem: Path, probed: Mapping[str, Any]) -> None:
    """Accuracy over the number of labels; all of them stand at their mean number a class."""
    rows, classes = probed["rows"], len(probed["classes"])
    wanted = [probed["chosen"], *dict.fromkeys(row["column"] for row in rows if row["kind"] == "features")]
    shown = [("features", column) for column in list(dict.fromkeys(wanted))[:_SHOWN]]
    shown += [("random", probed["chosen"]), ("pixels", "pixels")]
    series = []
    for kind, column in shown:
        points = [row for row in rows if row["kind"] == kind and row["column"] == column]
        if points:
            series.append(
                Series(
                    column if kind == "features" else _KINDS[kind],
                    [_each(row["shots"], probed["train"], classes) for row in points],
                    [row["mean"] for row in points],
                    [row["low"] for row in points],
                    [row["high"] for row in points],
                )
            )
    panel = Panel("", "labelled images of each class", "accuracy", series, log_x=True)
    curves(stem, "What tells the images apart", [panel])


def _each(count: str, train: int, classes: int) -> float:
    return max(1, round(train / classes)) if count == "all" else float(count)


def _sweep_figures(folder: Path, sweep: Mapping[str, Any], reading: Mapping[str, Any]) -> None:
    cells, about = sweep["validation"], sweep["about"]
    blocks, times, pools = reading["blocks"], reading["timesteps"], reading["pools"]
    heat_maps(
        folder / "sweep",
        "Accuracy in validation",
        [_map(pool, blocks, times, lambda name: cells[name]["mean"] if name in cells else None) for pool in pools],
        x_label="time of the diffusion",
        y_label="block",
        scale_label="accuracy",
    )
    if sweep["untrained"]:
        plain = sweep["untrained"]
        heat_maps(
            folder / "gain",
            "What training adds",
            [
                _map(
                    pool,
                    blocks,
                    times,
                    lambda name: 100 * (cells[name]["mean"] - plain[name]["mean"]) if name in cells else None,
                )
                for pool in pools
            ],
            x_label="time of the diffusion",
            y_label="block",
            scale_label="points above random weights",
            signed=True,
        )
    at = dict.fromkeys([about["block"], blocks[0], "mid", blocks[-1]])
    series = []
    for block in [name for name in at if name in blocks]:
        found = [(t, cells.get(column_name(t, block, about["pool"]))) for t in times]
        points = [(t, cell) for t, cell in found if cell is not None]
        if points:
            series.append(
                Series(
                    block,
                    [t for t, _ in points],
                    [cell["mean"] for _, cell in points],
                    [cell["low"] for _, cell in points],
                    [cell["high"] for _, cell in points],
                )
            )
    panel = Panel(f"pool {about['pool']} x {about['pool']}", "time of the diffusion", "accuracy", series)
    curves(folder / "times", "How much noise?", [panel])


def _map(pool: int, blocks: Sequence[str], times: Sequence[int], value: Any) -> HeatMap:
    rows = [[value(column_name(t, block, pool)) for t in times] for block in blocks]
    return HeatMap(f"pool {pool} x {pool}", rows, row_names=list(blocks), column_names=[str(t) for t in times])


def _cka_figure(stem: Path, cka: Mapping[str, Any], reading: Mapping[str, Any]) -> None:
    blocks, count = reading["blocks"], len(reading["blocks"])
    maps = []
    for place, time in enumerate(reading["timesteps"]):
        start = place * count
        values = [row[start : start + count] for row in cka["matrix"][start : start + count]]
        maps.append(HeatMap(f"t = {time}", values, row_names=list(blocks), column_names=list(blocks)))
    heat_maps(stem, "How alike blocks are", maps, x_label="block", y_label="block", scale_label="linear CKA")


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _listed(names: Sequence[str], what: str) -> str:
    return f"{what}{'s' * (len(names) > 1)} {_few(names)}"


def _few(values: Sequence[Any]) -> str:
    shown = ", ".join(map(str, values[:9]))
    return f"{shown} and {len(values) - 9} more" if len(values) > 9 else shown


# --- a model of one's own --------------------------------------------------------------------------------------------


def model_sections(plan: Mapping[str, Any], losses: Sequence[float], said: Mapping[str, Any]) -> list[Section]:
    """What a training says on a terminal.

    Args:
        plan: what was trained.
        losses: mean squared error of the noise over each 100 steps.
    """
    rows = [[f"{100 * place:,}", f"{loss:.4f}"] for place, loss in enumerate(losses)]
    shown = rows if len(rows) <= 8 else [rows[round(place * (len(rows) - 1) / 7)] for place in range(8)]
    return [
        Section(
            "Training",
            "How well does the model find the noise in an image?",
            [
                f"{_count(said['images'], 'image')}, {plan['steps']:,} steps, {plan['parameters']:,} parameters: the "
                f"mean squared error of the noise is {losses[-1]:.4f} over the last steps; 1 is to know nothing."
            ],
            tables=[
                Table(
                    "Error by step, over the hundred steps from there or those that are left.", ["step", "error"], shown
                )
            ],
            figures=[("loss", "Mean squared error of the noise.")],
        )
    ]


def loss_figure(stem: Path, losses: Sequence[float]) -> None:
    """Draw the error over the steps.

    Raises:
        OutputError: a file cannot be written.
    """
    steps = [100 * place + 50 for place in range(len(losses))]
    panel = Panel("", "step", "mean squared error", [Series("of the noise", steps, list(losses))], log_y=True)
    curves(stem, "Training of the diffusion model", [panel])


def card(loss: float, command: str, inputs: Sequence[str], options: Sequence[Any]) -> str:
    """README.md of a trained model; `loss` is its error over the last steps."""
    images = ", ".join(Path(name).name for name in inputs) or DIGITS
    return model_card(
        "An unconditional diffusion model",
        "A denoising diffusion model (DDPM, Ho et al. 2020) without labels, in the layout of diffusers.",
        parents=[Parent(images, "images", "cc-by-4.0" if images == DIGITS else None)],
        method=["Trained to predict the noise in images; what is here is the moving average of the weights."],
        command=command_line(command, list(inputs), *options),
        metrics={"mean squared error of the noise over the last steps": f"{loss:.4f}"},
        limits=["It was made to read features from; images sampled from it were not looked at."],
        tags=["diffusers", "unconditional-image-generation"],
        usage='from diffusers import UNet2DModel\n\nmodel = UNet2DModel.from_pretrained("DIR")\n',
        library="diffusers",
    )
