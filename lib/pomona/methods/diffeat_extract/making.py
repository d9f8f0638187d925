"""Models of one's own: trained on images, or converted from the public checkpoint of the papers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.errors import DataError, MissingError, UsageError
from pomona.io.atomic import atomic_file, writing
from pomona.io.directory import RunDirectory
from pomona.io.images import Images, Picture
from pomona.io.manifest import file_digest
from pomona.io.pixels import Unreadable, pixels, size_of
from pomona.io.records import Reject
from pomona.io.rejects import reject, unreadable, write_rejects
from pomona.io.single import RunFile
from pomona.methods.diffeat_extract import report, training
from pomona.methods.diffeat_extract.config import Config
from pomona.models.unets import adm
from pomona.report.sections import terminal
from pomona.runtime.device import Runtime
from pomona.runtime.settings import Settings

_DONE, INCOMPLETE = 0, 3
CHECKPOINT = "training.safetensors"


def convert(config: Config, settings: Settings, work: RunDirectory) -> tuple[dict[str, Any], int]:
    """The checkpoint of guided-diffusion that ``--convert`` names, as a directory that diffusers reads."""
    assert config.convert is not None, "the caller has looked"
    if settings.model is not None or work.inputs:
        what = "--model" if settings.model is not None else work.inputs[0]
        raise UsageError(f"--convert reads one file, and has no use for {what}")
    if not config.convert.is_file():
        raise MissingError(f"{config.convert}: no such file")
    if work.settings.dry_run:
        return adm.predict(config.convert), _DONE
    _need_directory(work)
    sources = [{"name": config.convert.name, **file_digest(config.convert)}]
    finished = work.finished_before(sources)
    if finished is None:
        results: dict[str, Any] = {}
        with work.publish(sources, lambda: results) as folder:
            made = adm.write(config.convert, folder, work.progress)
            results["summary"] = {**made, "run": str(work.path)}
        finished = results
    else:
        work.progress.warn(f"{work.path} is finished already")
    return finished["summary"], _DONE


def train(config: Config, settings: Settings, work: RunDirectory) -> tuple[dict[str, Any], int]:
    """A diffusion model trained on the images, as a directory that diffusers and this command read."""
    if settings.model is not None:
        raise UsageError("--train-model makes a model, and --model names one: give one of the two")
    images = Images(work.inputs, config, limit=settings.limit)
    if settings.dry_run:
        return asdict(training.plan(_shape(images, config), config)), _DONE
    _need_directory(work)
    runtime = _runtime(settings)
    try:
        finished = work.finished_before(images.sources)
        if finished is None:
            finished = _train(config, settings, work, images, runtime)
        else:
            work.progress.warn(f"{work.path} is finished already")
    finally:
        runtime.close()
    seconds = {"seconds": work.measured["seconds"]} if "seconds" in work.measured else {}
    return finished["summary"] | seconds, INCOMPLETE if finished["summary"]["rejected"] else _DONE


def serve(settings: Settings) -> None:
    """This process's share of a training."""
    runtime = _runtime(settings)
    training.share(runtime)
    runtime.serve()


def _runtime(settings: Settings) -> Runtime:
    """Where to train; in float32 unless another number format is asked for, so that machines make the same model."""
    dtype = "float32" if settings.dtype == "auto" else settings.dtype
    return Runtime.open(settings.device, dtype, settings.seed)


def _train(config: Config, settings: Settings, work: RunDirectory, images: Images, runtime: Runtime) -> dict[str, Any]:
    pictures, rejects = _loaded(images, config, work)
    work.open_journal({"settings": work.described, "sources": images.sources})
    work.journal.append("begun", {"images": len(pictures)})  # what --resume and --overwrite are asked about
    with writing(work.kept):
        work.kept.mkdir(exist_ok=True)
    results: dict[str, Any] = {}
    trained = training.train(
        pictures,
        config,
        seed=settings.seed,
        runtime=runtime,
        checkpoint=work.kept / CHECKPOINT,
        progress=work.progress,
    )
    work.measured["seconds"] = round(trained.seconds, 1)
    planned = training.plan(pictures.shape, config)
    write_rejects(config.rejects, rejects)
    with work.publish(images.sources, lambda: results) as folder:
        training.write(trained, folder)
        results["summary"] = {
            "images": len(pictures),
            "rejected": len(rejects),
            "steps": planned.steps,
            "parameters": planned.parameters,
            "loss": trained.losses[-1],
            "run": str(work.path),
        }
        results["losses"] = list(trained.losses)
        _report(folder, config, work, planned, trained, results["summary"])
    return results


def _report(
    folder: Path,
    config: Config,
    work: RunDirectory,
    planned: training.Plan,
    trained: training.Trained,
    summary: Mapping[str, Any],
) -> None:
    """Model card, and the curve of the loss."""
    said = report.model_sections(asdict(planned), trained.losses, summary)
    with atomic_file(folder / "README.md") as file:
        file.write(
            report.card(trained.losses[-1], work.command, work.inputs, [config, work.settings.decisive()]).encode()
        )
    with writing(folder):
        (folder / "figures").mkdir()
    report.loss_figure(folder / "figures/loss", trained.losses)
    work.progress.show("\n".join(terminal(said)))


def _need_directory(work: RunDirectory) -> None:
    if work.path is None or isinstance(work, RunFile):
        raise UsageError("a model is written into a directory: give -o DIR", hint="--dry-run prints the plan instead")


def _shape(images: Images, config: Config) -> tuple[int, int, int, int]:
    """Of all images to learn from, by the first of them; no other is opened."""
    first, count = None, 0
    for picture in images:
        if isinstance(picture, Picture) and _taught(picture):
            first, count = first or picture, count + 1
    if first is None:
        raise DataError("there is no image to learn from")
    try:
        width, height, channels = size_of(first.content)
    except Unreadable as error:
        raise unreadable(reject(first, str(error))) from error
    side = config.image_size
    return count, side or height, side or width, channels


def _taught(picture: Picture) -> bool:
    return picture.split in (None, "train")


def _loaded(images: Images, config: Config, work: RunDirectory) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """The images to learn from, (N, H, W, C), and those that cannot be read.

    Raises:
        DataError: an image cannot be read, and none are set aside; they differ in size; there are none.
    """
    work.progress.start("reading images", images.count)
    found: list[NDArray[np.uint8]] = []
    rejects = []
    channels = None
    for item in images:
        work.progress.advance()
        if isinstance(item, Picture) and not _taught(item):
            continue
        try:
            if isinstance(item, Reject):
                raise Unreadable(item.reason)
            channels = channels or size_of(item.content)[2]
            pixel = pixels(item.content, channels=channels, size=config.image_size)
        except Unreadable as error:
            rejects.append(reject(item, str(error)))
            if config.rejects is None:
                raise unreadable(rejects[0]) from error
            continue
        if found and pixel.shape != found[0].shape:
            raise DataError(
                f"{item.source}:{item.line}: {pixel.shape[1]} x {pixel.shape[0]} pixels, and the first image has "
                f"{found[0].shape[1]} x {found[0].shape[0]}",
                hint="--image-size scales and crops them alike",
            )
        found.append(pixel)
    if not found:
        raise DataError("there is no image to learn from")
    return np.stack(found), rejects
