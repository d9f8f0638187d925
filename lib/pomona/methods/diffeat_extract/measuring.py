"""Probes of features and controls that were read, and the sweep over blocks, times and pools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.io.directory import RunDirectory
from pomona.io.images import Images
from pomona.io.picture import Picture
from pomona.io.rejects import none_readable
from pomona.io.shards import Column, Shards
from pomona.methods.diffeat_extract.probing.contenders import Contender, Kind, on_vectors
from pomona.methods.diffeat_extract.probing.splits import Task, task, validation
from pomona.methods.diffeat_extract.probing.study import Study
from pomona.methods.diffeat_extract.reading import PIXELS, Reading
from pomona.methods.diffeat_extract.session import Reader, Session
from pomona.report import outcomes

MODELS: tuple[Kind, ...] = ("features", "random")

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Features:
    """What was read of all images, in memory.

    Attributes:
        rows: of the views of all images, the views of an image following one another.
        vectors: by column, (rows, dims).
        rejects: what is kept of the images that could not be read.
    """

    rows: Rows
    vectors: Mapping[str, NDArray[Any]]
    rejects: Rows


def task_of(session: Session, rows: Rows) -> Task:
    """The classification that the rows' labels and splits make."""
    views = session.reading.views
    first = rows[::views]
    return task(
        [row.get("label") for row in first],
        [row.get("split") for row in first],
        test_share=session.config.test_share,
        seed=session.settings.seed,
    )


def study_of(session: Session, rows: Rows, work: RunDirectory) -> Study:
    """How contenders are compared on the images of `rows`."""
    return Study(session.config, task_of(session, rows), session.settings.seed, work.journal, work.progress)


def check(session: Session, images: Images, work: RunDirectory) -> None:
    """Refuse images that cannot be probed before any of them goes through the model, by their labels and splits alone.

    Raises:
        DataError: as `task` and `Study.check` say.
    """
    pictures = (image for image in images if isinstance(image, Picture))
    rows = [{"label": image.label, "split": image.split} for image in pictures for _ in range(session.reading.views)]
    if rows:  # else none can be read, which the reading says with the reason
        several = session.config.head == "none" and len(session.reading.columns()) > 1
        study_of(session, rows, work).check(choosing=several)


def probe(session: Session, kept: Mapping[str, Shards], work: RunDirectory) -> dict[str, Any]:
    """Every column of features, and the controls, by the classifier of ``--probe``; the best column by validation.

    Args:
        kept: the shards of ``features`` and of the controls that are wanted.
    """
    rows = [row for part in kept["features"].rows() for row in part]
    study = study_of(session, rows, work)
    contenders = [
        _contender(session, kind, column, kept[kind].column(column.name))
        for kind in MODELS
        if kind in kept
        for column in kept[kind].columns
    ]
    if "pixels" in kept:
        contenders.append(_contender(session, "pixels", pixel_column(session), kept["pixels"].column("pixels")))
    columns = [column.name for column in kept["features"].columns]
    chosen, cells = columns[0], None
    fits = sum(map(study.fits, study.counts())) * len(contenders)
    count = study.choosing_count()
    if len(columns) > 1:
        fits += study.fits(count) * len(columns)
    work.progress.start("probing", fits)
    if len(columns) > 1:
        inner = validation(study.task, session.settings.seed)
        cells = {
            each.column: asdict(outcomes.accuracy(study.correct(each, count, inner), seed=session.settings.seed))
            for each in contenders
            if each.kind == "features"
        }
        chosen = study.choose(cells)
    return found(session, study, study.table(contenders), chosen, cells)


def found(
    session: Session, study: Study, rows: list[dict[str, Any]], chosen: str, cells: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a probe found, as plain JSON.

    Args:
        cells: accuracies in validation by column, where there was a choice.
    """
    count = study.choosing_count()
    return {
        "classifier": classifier(session),
        "classes": study.task.names,
        "train": len(study.task.train),
        "test": len(study.task.test),
        "rows": rows,
        "chosen": chosen,
        "chosen_by": "all" if count is None else count,
        "validation": cells,
    }


def classifier(session: Session) -> str:
    """What learns on the features, for people."""
    config = session.config
    if config.head != "none":
        return {"difformer": "DifFormer", "diffeed": "DifFeed"}[config.head]
    if config.probe == "mlp":
        return f"a multi-layer perceptron (hidden: {config.hidden})"
    if config.probe == "attention":
        return "the attention head"
    plain = config.linear == "sgd"
    return "a linear layer trained by plain SGD" if plain else "standardised multinomial logistic regression"


def _contender(session: Session, kind: Kind, column: Column, vectors: NDArray[np.float32]) -> Contender:
    """The classifier of ``--probe`` on the vectors of one column, trained or not, or on pixels, which have one view."""
    return on_vectors(
        session.config,
        kind,
        column.name,
        vectors,
        views=1 if kind == "pixels" else session.reading.views,
        channels=column.about["channels"],
        device=session.runtime.device,
    )


def pixel_column(session: Session) -> Column:
    """What the control of raw pixels is called and how wide it is."""
    cells = min(session.reading.size, PIXELS) ** 2
    channels = session.unet.channels
    return Column("pixels", channels * cells, {"block": "pixels", "channels": channels})


# --- the sweep -------------------------------------------------------------------------------------------------------


def sweep(session: Session, readers: Mapping[str, Reader], images: Images, work: RunDirectory) -> dict[str, Any]:
    """Accuracy in validation of every block, time and pool, trained and untrained, and the test of the best.

    The features of one time are in memory at once, and are read again where a run is resumed. No test image has a part
    in the choice; it is tested once, with its controls.
    """
    readings = dict(session.readings())
    kinds = [kind for kind in MODELS if kind == "features" or kind in session.controls]
    cells: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
    for ending, asked in readings.items():
        for kind in kinds:
            cells[kind].update(_cells(session, kind, ending, asked, readers, images, work))
    chosen = max(cells["features"], key=lambda column: cells["features"][column]["mean"])
    about, read_again, contenders = _chosen(session, chosen, readings, kinds, readers, images, work)
    study = study_of(session, read_again.rows, work)
    work.progress.start("testing the choice", sum(map(study.fits, study.counts())) * len(contenders))
    result = found(session, study, study.table(contenders), chosen, cells["features"])
    return result | {
        "images": len(read_again.rows) // session.reading.views,
        "rejects": read_again.rejects,
        "untrained": cells.get("random"),
        "about": about,
    }


def _cells(
    session: Session,
    kind: Kind,
    ending: str,
    asked: Reading,
    readers: Mapping[str, Reader],
    images: Images,
    work: RunDirectory,
) -> dict[str, Any]:
    """Accuracies in validation by column, for the columns of one reading."""
    key = f"sweep/{kind}{ending}"
    earlier = work.journal.get(key)
    if earlier is not None:
        return earlier
    name = f"{kind}{ending}"
    label = f"reading t = {asked.timesteps[0]}{', random weights' if kind == 'random' else ''}"
    features = read(session, name, readers[name], images, work, label)
    study = study_of(session, features.rows, work)
    inner = validation(study.task, session.settings.seed)
    count = study.choosing_count()
    columns = asked.columns()
    work.progress.start(f"probing t = {asked.timesteps[0]}", study.fits(count) * len(columns))
    probed = {}
    for column in columns:
        contender = _contender(session, kind, column, features.vectors[column.name])
        accuracy = outcomes.accuracy(study.correct(contender, count, inner), seed=session.settings.seed)
        probed[column.name] = {**column.about, "dims": column.dims, **asdict(accuracy)}
    work.journal.append(key, probed)
    return probed


def _chosen(
    session: Session,
    chosen: str,
    readings: Mapping[str, Reading],
    kinds: Sequence[Kind],
    readers: Mapping[str, Reader],
    images: Images,
    work: RunDirectory,
) -> tuple[dict[str, Any], Features, list[Contender]]:
    """What the chosen column is, what was read, and the contenders to test: it, and the controls."""
    ending, column = next(
        (ending, column) for ending, asked in readings.items() for column in asked.columns() if column.name == chosen
    )
    found = {
        kind: read(
            session, f"{kind}{ending}", readers[f"{kind}{ending}"], images, work, f"reading {chosen}", only=chosen
        )
        for kind in kinds
    }
    contenders = [_contender(session, kind, column, features.vectors[chosen]) for kind, features in found.items()]
    if "pixels" in session.controls:
        pixels = read(session, "pixels", readers["pixels"], images, work, "reading pixels")
        contenders.append(_contender(session, "pixels", pixel_column(session), pixels.vectors["pixels"]))
    return {**column.about, "dims": column.dims}, found["features"], contenders


def read(
    session: Session,
    name: str,
    reader: Reader,
    images: Images,
    work: RunDirectory,
    label: str,
    only: str | None = None,
) -> Features:
    """All images by one task, in memory.

    Raises:
        DataError: none could be read.
    """
    work.progress.start(label, images.count)
    parts, rejects = [], []
    for group in session.groups(images, name, reader):
        work.progress.advance(group.images)
        rejects += group.rejects
        if group.rows:
            parts.append(group if only is None else replace(group, vectors={only: group.vectors[only]}))
    if not parts:
        raise none_readable(session.config.rejects, rejects)
    names = parts[0].vectors
    return Features(
        [row for group in parts for row in group.rows],
        {name: np.concatenate([group.vectors[name] for group in parts]) for name in names},
        rejects,
    )
