"""A trained network on images it has not seen: ``--evaluate``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.errors import CheckFailed, DataError
from pomona.io.atomic import atomic_file
from pomona.io.directory import RunDirectory
from pomona.io.images import Images, Picture, Reject
from pomona.io.manifest import read_directory_manifest
from pomona.io.pixels import Unreadable, pixels
from pomona.io.rejects import none_readable, reject, unreadable, write_rejects
from pomona.io.writers import brief, dumps
from pomona.methods.madaug_train import report
from pomona.methods.madaug_train.config import Config
from pomona.methods.madaug_train.saved import Classifier, read_model
from pomona.report.intervals import wilson
from pomona.report.sections import markdown, terminal
from pomona.runtime.device import Runtime
from pomona.runtime.jobs import one_thread
from pomona.runtime.settings import Settings

_TASK = "classify"
_GROUP = 1024  # pictures that are handed out at a time
_BATCH = 64

_DONE, _INCOMPLETE = 0, 3


@dataclass(frozen=True)
class _Answers:
    """Of one batch: places of the images that could be read, probabilities of all classes, reasons of the others."""

    kept: list[int]
    probabilities: NDArray[np.float32]
    unreadable: list[tuple[int, str]]


def evaluate(config: Config, settings: Settings, work: RunDirectory) -> tuple[dict[str, Any], int]:
    """Accuracy of the network of ``--evaluate`` on the images, those of their test split where they have one.

    Raises:
        MissingError: there is no such network.
        DataError: an image cannot be read, unless they are set aside; a label is not among the classes; none are there.
    """
    assert config.evaluate is not None, "the caller has looked"
    classifier = read_model(config.evaluate)
    images = Images(work.inputs, config, limit=settings.limit)
    own = any(isinstance(picture, Picture) and picture.split == "test" for picture in images)
    tested = _tested(images, classifier, own)
    if settings.dry_run:
        told = {"images": tested, "classes": len(classifier.shape.names), "net": classifier.shape.net}
        return told, _DONE
    sources = [*images.sources, *classifier.sources]
    runtime = Runtime.open(settings.device, _dtype(settings), settings.seed)
    try:
        finished = work.finished_before(sources)
        if finished is None:
            with one_thread():
                finished = _evaluated(config, settings, work, images, classifier, runtime, tested, own)
        else:
            work.progress.warn(f"{work.path} is finished already")
    finally:
        runtime.close()
    if finished["failed"]:
        work.fail_afterwards(CheckFailed(finished["failed"], hint="--fail-under sets the bound"))
    return finished["summary"], _INCOMPLETE if finished["summary"]["rejected"] else _DONE


def serve(config: Config, settings: Settings) -> None:
    """This process's share of the images."""
    assert config.evaluate is not None, "the caller has looked"
    runtime = Runtime.open(settings.device, _dtype(settings), settings.seed)
    runtime.register(_TASK, _Task(read_model(config.evaluate), runtime))
    runtime.serve()


def _dtype(settings: Settings) -> str:
    return "float32" if settings.dtype == "auto" else settings.dtype


def _tested(images: Images, classifier: Classifier, own: bool) -> int:
    """How many images are to be tested on; all are looked at, and no pixels.

    Args:
        own: whether the images have a test split.

    Raises:
        DataError: there are none; one has no label, or one that the network does not know.
    """
    count, known = 0, set(classifier.shape.names)
    for picture in _chosen(images, own):
        if isinstance(picture, Reject):
            continue
        if picture.label is None:
            raise DataError("the images have no labels, so there is nothing to test", hint="--label-field names it")
        if str(picture.label) not in known:
            raise DataError(
                f'{picture.source}:{picture.line}: the network does not know the label "{picture.label!s:.40}"',
                hint=f"its classes are {', '.join(classifier.shape.names)[:200]}",
            )
        count += 1
    if not count:
        raise DataError("there are no images to test on")
    return count


def _chosen(images: Images, own: bool) -> Iterator[Picture | Reject]:
    """Of images with a test split of their `own` those in it, else all."""
    for picture in images:
        if isinstance(picture, Reject) or not own or picture.split == "test":
            yield picture


class _Task:
    """Probabilities of the classes of a batch of pictures."""

    def __init__(self, classifier: Classifier, runtime: Runtime) -> None:
        self._classifier, self._runtime = classifier, runtime
        classifier.module.to(runtime.device)

    def __call__(self, pictures: Sequence[Picture]) -> _Answers:
        shape = self._classifier.shape
        kept, found, bad = [], [], []
        for place, picture in enumerate(pictures):
            try:
                size = shape.height if shape.height == shape.width else None
                pixel = pixels(picture.content, channels=shape.channels, size=size)
                if pixel.shape[:2] != (shape.height, shape.width):
                    raise Unreadable(
                        f"{pixel.shape[1]} x {pixel.shape[0]} pixels, "
                        f"and the network takes {shape.width} x {shape.height}"
                    )
            except Unreadable as error:
                bad.append((place, str(error)))
                continue
            kept.append(place)
            found.append(torch.from_numpy(pixel).movedim(-1, 0))
        if not kept:
            return _Answers(kept, np.zeros((0, len(shape.names)), np.float32), bad)
        return _Answers(kept, self._probabilities(torch.stack(found)), bad)

    def _probabilities(self, images: Tensor) -> NDArray[np.float32]:
        device = self._runtime.device
        with torch.autocast(device.type, self._runtime.dtype, enabled=self._runtime.dtype != torch.float32):
            logits = self._classifier.logits(images.to(device))
        found: NDArray[np.float32] = logits.float().softmax(1).cpu().numpy()
        return found


def _evaluated(
    config: Config,
    settings: Settings,
    work: RunDirectory,
    images: Images,
    classifier: Classifier,
    runtime: Runtime,
    tested: int,
    own: bool,
) -> dict[str, Any]:
    runtime.register(_TASK, _Task(classifier, runtime))
    work.progress.start("testing", tested)
    rows: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    batch = settings.batch_size or _BATCH
    names = classifier.shape.names
    source = iter(_chosen(images, own))
    while items := list(islice(source, _GROUP)):
        good = [item for item in items if isinstance(item, Picture)]
        bad += [reject(item, item.reason) for item in items if isinstance(item, Reject)]
        batches = [good[start : start + batch] for start in range(0, len(good), batch)]
        for pictures, answers in zip(batches, runtime.map(_TASK, batches), strict=True):
            bad += [reject(pictures[place], reason) for place, reason in answers.unreadable]
            for place, chances in zip(answers.kept, answers.probabilities, strict=True):
                best = int(chances.argmax())
                rows.append(
                    {
                        "id": pictures[place].id,
                        "label": str(pictures[place].label),
                        "predicted": names[best],
                        "probability": round(float(chances[best]), 6),
                    }
                )
        if bad and config.rejects is None:
            raise unreadable(bad[0])
        work.progress.advance(len(items))
    if not rows:
        raise none_readable(config.rejects, bad)
    write_rejects(config.rejects, bad)
    found = _found(rows, classifier) | {"shared": _shared(config, work, images, own)}
    finished: dict[str, Any] = {"summary": _summary(found, len(bad), work), "failed": _failed(config, found)}
    if work.path is not None:
        with work.publish([*images.sources, *classifier.sources], lambda: finished) as folder:
            with atomic_file(folder / "predictions.jsonl") as file:
                for row in rows:
                    file.write(dumps(row) + b"\n")
            with atomic_file(folder / "report.json") as file:
                file.write(orjson.dumps(found, option=orjson.OPT_INDENT_2) + b"\n")
            about = {"images": ", ".join(work.inputs) or "builtin:digits", "run": str(config.evaluate)}
            with atomic_file(folder / "report.md") as file:
                text = markdown(report.TITLE, report.PREAMBLE, report.evaluated(found), about)
                file.write(text.encode())
    work.progress.show("\n".join(terminal(report.evaluated(found))))
    return finished


def _found(rows: Sequence[dict[str, Any]], classifier: Classifier) -> dict[str, Any]:
    """Accuracy over all and class by class, with Wilson's intervals."""

    def share(of: Sequence[dict[str, Any]]) -> dict[str, Any]:
        right = sum(row["label"] == row["predicted"] for row in of)
        low, high = wilson(right, len(of))
        return {"images": len(of), "accuracy": right / len(of) if of else None, "low": low, "high": high}

    by_class: dict[str, list[dict[str, Any]]] = {name: [] for name in classifier.shape.names}
    for row in rows:
        by_class[row["label"]].append(row)
    classes = {name: share(of) for name, of in by_class.items()}
    return {"net": classifier.shape.net, "all": share(rows), "classes": classes}


def _shared(config: Config, work: RunDirectory, images: Images, own: bool) -> list[str]:
    """Names of the sources that the run of the network read too, and may have learned from.

    None where it was to be tested on them, or kept to the test split that they have.
    """
    assert config.evaluate is not None, "the caller has looked"
    manifest = read_directory_manifest(config.evaluate) or {}
    asked = manifest.get("settings", {}).get("config", {})
    read = {each.get("sha256") for each in manifest.get("inputs", [])}
    shared = [str(each["name"]) for each in images.sources if each.get("sha256") in read]
    drawn = asked.get("resplit") or "builtin:digits" in shared  # which are parted anew
    return [] if (own and not drawn) or asked.get("test") in work.inputs else shared


def _summary(found: dict[str, Any], rejected: int, work: RunDirectory) -> dict[str, Any]:
    every, classes = found["all"], found["classes"]
    there = [name for name in classes if classes[name]["images"]]
    worst = min(there, key=lambda name: classes[name]["accuracy"])
    told = {
        "images": every["images"],
        "rejected": rejected,
        "accuracy": every["accuracy"],
        "ci": [every["low"], every["high"]],
        "worst_class": {"name": worst, "accuracy": classes[worst]["accuracy"]},
        **({"run": str(work.path)} if work.path is not None else {}),
    }
    plain: dict[str, Any] = brief(told)
    return plain


def _failed(config: Config, found: dict[str, Any]) -> str | None:
    accuracy = found["all"]["accuracy"]
    if config.fail_under is None or accuracy >= config.fail_under:
        return None
    return f"the accuracy is {accuracy:.3f}, below --fail-under {config.fail_under:g}"
