"""The heads of the successor (arXiv 2311.17921) on the images of a run, with their controls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.io.directory import RunDirectory
from pomona.io.images import Images
from pomona.methods.diffeat_extract.extraction import as_input, noisy
from pomona.methods.diffeat_extract.heads import diffeed, difformer, modules
from pomona.methods.diffeat_extract.measuring import MODELS, Features, found, read, study_of
from pomona.methods.diffeat_extract.probing.contenders import Contender, Kind, on_maps, stacked
from pomona.methods.diffeat_extract.reading import column_name
from pomona.methods.diffeat_extract.session import Reader, Session
from pomona.models.unets.loading import UNet


def heads(session: Session, readers: Mapping[str, Reader], images: Images, work: RunDirectory) -> dict[str, Any]:
    """Train and test the head that the options name, on the model, on random weights and on pixels."""
    kinds = [kind for kind in MODELS if kind == "features" or kind in session.controls]
    if session.config.head == "difformer":
        parts = {kind: read(session, kind, readers[kind], images, work, f"reading {_NAMES[kind]}") for kind in kinds}
        first = parts["features"]
        contenders = [_difformer(session, kind, parts[kind]) for kind in kinds]
    else:
        first = read(session, "images", readers["images"], images, work, "reading images")
        networks = {"features": session.unet, **({"random": session.untrained} if "random" in kinds else {})}
        contenders = [_diffeed(session, kind, networks[kind], first) for kind in kinds]
    if "pixels" in session.controls:
        pixels = read(session, "pixels", readers["pixels"], images, work, "reading pixels")
        contenders.append(_attention(session, pixels.vectors["pixels"]))
    study = study_of(session, first.rows, work)
    work.progress.start("training heads", sum(map(study.fits, study.counts())) * len(contenders))
    result = found(session, study, study.table(contenders), contenders[0].column, None)
    return result | {"images": len(first.rows), "rejects": first.rejects}


_NAMES = {"features": "features", "random": "features of random weights"}


def _difformer(session: Session, kind: Kind, features: Features) -> Contender:
    reading = session.reading
    columns = [
        (column_name(time, block.name, pool), (block.channels, pool))
        for time in reading.timesteps
        for block in reading.blocks
        for pool in (max(pool for pool in reading.pools if pool <= block.side),)
    ]
    shapes = [shape for _, shape in columns]
    inputs = stacked([features.vectors[name] for name, _ in columns], shapes)
    times = len(reading.timesteps)

    def module(classes: int, seed: int) -> difformer.DifFormer:
        return difformer.DifFormer(shapes[: len(reading.blocks)], times, classes, seed=seed)

    return on_maps(module, "difformer", session.config, kind, "difformer", inputs, device=session.runtime.device)


def _diffeed(session: Session, kind: Kind, unet: UNet, pictures: Features) -> Contender:
    """Two passes in every step; the noise of an image is the same in all of them."""
    (timestep,) = session.reading.timesteps
    plan = session.feedback
    assert plan is not None, "the head is DifFeed"
    side, channels = session.reading.size, session.unet.channels

    def inputs(chosen: NDArray[np.int64]) -> tuple[Tensor, ...]:
        stored = pictures.vectors["images"][chosen].reshape(-1, side, side, channels)
        names = [pictures.rows[place]["id"] for place in chosen]
        return (
            torch.stack(
                [
                    noisy(image, session.schedule, seed=session.settings.seed, name=name, timestep=timestep)
                    for image, name in zip(as_input(stored), names, strict=True)
                ]
            ),
        )

    def module(classes: int, seed: int) -> diffeed.DifFeed:
        return diffeed.DifFeed(unet.module, session.table, plan, classes, time=timestep, seed=seed)

    return on_maps(module, "diffeed", session.config, kind, "diffeed", inputs, device=session.runtime.device)


def _attention(session: Session, vectors: NDArray[np.float32]) -> Contender:
    """Raw pixels by the attention head, which both heads of the successor end in."""
    channels = session.unet.channels
    side = round((vectors.shape[1] // channels) ** 0.5)

    def module(classes: int, seed: int) -> modules.Attention:
        return modules.Attention(channels, side, classes, seed=seed)

    inputs = stacked([vectors], [(channels, side)])
    return on_maps(module, "attention", session.config, "pixels", "pixels", inputs, device=session.runtime.device)
