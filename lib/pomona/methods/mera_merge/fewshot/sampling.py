"""Which examples an arm is tuned on, and which it is tested on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pomona.errors import DataError
from pomona.runtime.seeds import derive


@dataclass(frozen=True)
class Draw:
    """Places of examples in their file, ascending: those to tune on, and the others."""

    shots: list[int]
    rest: list[int]


def draw(labels: Sequence[int], names: Sequence[str], shots: int, seed: int, number: int) -> Draw:
    """`shots` examples of every label, the same for one `seed` and `number` whatever else is asked for.

    More shots keep those of fewer.

    Raises:
        DataError: a label has fewer examples, or there is but one label.
    """
    if len(names) < 2:
        raise DataError(f'all examples are labelled "{names[0]}"', hint="there is nothing to tell apart")
    chosen: list[int] = []
    for label, name in enumerate(names):
        places = [place for place, found in enumerate(labels) if found == label]
        if len(places) < shots:
            raise DataError(
                f'label "{name}" has {len(places)} examples, fewer than the {shots} shots',
                hint=f"--shots {len(places)} at most" if places else None,
            )
        random = np.random.Generator(np.random.Philox(derive(seed, f"few-shot/shots/{number}/{name}")))
        chosen += [places[index] for index in random.permutation(len(places))[:shots]]
    taken = set(chosen)
    return Draw(sorted(chosen), [place for place in range(len(labels)) if place not in taken])
