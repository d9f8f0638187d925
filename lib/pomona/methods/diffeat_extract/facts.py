"""What a run has found, as plain JSON: what report.json holds, and the summary for standard output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pomona.io.directory import RunDirectory
from pomona.io.single import RunFile
from pomona.io.writers import brief
from pomona.methods.diffeat_extract.probing.study import of
from pomona.methods.diffeat_extract.reading import described
from pomona.methods.diffeat_extract.session import Session


def facts(session: Session, *, images: int) -> dict[str, Any]:
    """What was read, of what; what was found in it is filled in by the caller.

    Args:
        images: how many could be read.
    """
    reading = session.reading
    return {
        "images": images,
        "rejects": [],
        "model": {
            "name": session.unet.name,
            "class": session.unet.config.get("_class_name"),
            "channels": session.unet.channels,
            "size": session.unet.size,
            "parameters": sum(block.parameters for block in session.table),
            "dtype": str(session.runtime.dtype).removeprefix("torch."),
        },
        "reading": described(reading, session.schedule),
        "columns": {column.name: column.dims for column in reading.columns()},
        "blocks": [asdict(block) for block in session.table],
        "share": session.share,
        "probe": None,
        "sweep": None,
        "cka": None,
        "head": None,
    }


def summary(found: Mapping[str, Any], work: RunDirectory) -> dict[str, Any]:
    """One line for standard output."""
    told: dict[str, Any] = {"images": found["images"], "rejected": len(found["rejects"])}
    if not (found["sweep"] or found["cka"] or found["head"]):
        told["dims"] = sum(found["columns"].values())
    told |= {name: found["reading"][name] for name in ("blocks", "timesteps")}
    probed = found["probe"] or found["sweep"] or found["head"]
    if probed:
        told["probe"] = brief(_probe(probed))
    if found["cka"] and found["cka"]["mirror"]:
        told["cka"] = brief(found["cka"]["mirror"])
    if work.path is not None:
        told["output" if isinstance(work, RunFile) else "run"] = str(work.path)
    return told


def _probe(probed: Mapping[str, Any]) -> dict[str, Any]:
    """The accuracy of the chosen column with most labels, and of the controls beside it."""
    best = of(probed["rows"], "features", probed["chosen"])
    assert best is not None, "there are features"
    controls = {}
    for kind in ("pixels", "random"):
        row = of(probed["rows"], kind, probed["chosen"] if kind == "random" else None)
        if row is not None:
            controls[kind] = {"accuracy": row["mean"], "ci": [row["low"], row["high"]]}
    by_shots = {
        row["shots"]: row["mean"]
        for row in probed["rows"]
        if (row["kind"], row["column"]) == (best["kind"], best["column"])
    }
    return {
        "column": probed["chosen"],
        "shots": best["shots"],
        "accuracy": best["mean"],
        "ci": [best["low"], best["high"]],
        "by_shots": by_shots,
        "controls": controls,
    }
