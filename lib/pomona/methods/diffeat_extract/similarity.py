"""How alike the features of all blocks and times are, by linear CKA (section 5 of the papers)."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import numpy as np

from pomona.errors import DataError
from pomona.io.directory import RunDirectory
from pomona.io.images import Images
from pomona.methods.diffeat_extract.cka import Accumulated
from pomona.methods.diffeat_extract.reading import column_name
from pomona.methods.diffeat_extract.session import Reader, Session

_LEAST = 4  # images; the unbiased estimator takes as many


def similarity(session: Session, readers: Mapping[str, Reader], images: Images, work: RunDirectory) -> dict[str, Any]:
    """CKA between all pairs of blocks and times, at the largest pool that fits each block, over all images.

    Raises:
        DataError: fewer than four images could be read.
    """
    reading = session.reading
    pool_of = {block.name: max(pool for pool in reading.pools if pool <= block.side) for block in reading.blocks}
    places = [(time, block.name) for time in reading.timesteps for block in reading.blocks]
    names = [column_name(time, block, pool_of[block]) for time, block in places]
    sums = Accumulated(names)
    work.progress.start("comparing blocks", images.count)
    read, rejects = 0, []
    for group in session.groups(images, "features", readers["features"]):
        work.progress.advance(group.images)
        rejects += group.rejects
        if group.rows:
            first = slice(None, None, reading.views)
            sums.add({name: group.vectors[name][first] for name in names})
            read += len(group.rows) // reading.views
    if read < _LEAST:
        raise DataError(f"{read} images could be read, and comparing features takes {_LEAST}")
    matrix = sums.matrix()
    return {
        "images": read,
        "rejects": rejects,
        "pools": pool_of,
        "places": [{"timestep": time, "block": block} for time, block in places],
        "matrix": matrix,
        "mirror": _mirror(session, matrix, len(reading.blocks)),
    }


def _mirror(session: Session, matrix: list[list[float | None]], count: int) -> dict[str, Any] | None:
    """Whether an encoder block is more like its mirror, total + 1 - b, than like other decoder blocks, at each time."""
    blocks, total = session.reading.blocks, len(session.table)
    middle = next(block.number for block in session.table if block.name == "mid")
    found = []
    for start in range(0, len(matrix), count):
        mirrored: list[float] = []
        others: list[float] = []
        for row, one in enumerate(blocks):
            for column, other in enumerate(blocks):
                value = matrix[start + row][start + column]
                if one.number < middle < other.number and value is not None:
                    (mirrored if one.number + other.number == total + 1 else others).append(value)
        if not mirrored or not others:
            return None
        found.append((fmean(mirrored), fmean(others)))
    of_mirrors, of_others = np.array(found).T
    return {"mirrors": [float(v) for v in of_mirrors], "others": [float(v) for v in of_others]}
