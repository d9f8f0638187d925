"""What is read: which blocks at which times, pooled how, and the names of what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pomona.errors import UsageError
from pomona.io.shards import Column
from pomona.methods.diffeat_extract.config import Config
from pomona.methods.diffeat_extract.heads import diffeed, difformer
from pomona.methods.diffeat_extract.heads.modules import GRID
from pomona.methods.diffeat_extract.noising import Schedule
from pomona.models.unets.blocks import Block, resolve

PIXELS = 32  # a side; the control of raw pixels averages larger images down to it


@dataclass(frozen=True)
class Defaults:
    """What is read of a model where the options say nothing."""

    block: str
    timestep: int
    pool: int
    difformer: tuple[int, ...] = difformer.TIMES
    diffeed: int = diffeed.TIME


# The paper's noise for photographs; 8 x 8 digits have little redundancy, and less noise tells most (a sweep shows it).
_DEFAULTS = {"digits": Defaults("u0r0", 50, 4, (10, 50, 100), 50)}
_OTHERWISE = Defaults("mid+1", 90, 2)
_TIMES = (0, 10, 30, 50, 90, 150, 300, 500)


@dataclass(frozen=True)
class Reading:
    """Blocks, times and pools of one pass over the images.

    Attributes:
        mirror: whether half of the random crops are mirrored.
        draws: of the noise, which the features of each view are averaged over.
        size: side of the images as the model gets them.
    """

    blocks: tuple[Block, ...]
    timesteps: tuple[int, ...]
    pools: tuple[int, ...]
    views: int
    mirror: bool
    draws: int
    size: int

    @property
    def rows(self) -> int:
        """Passes through the model for each image."""
        return self.views * self.draws * len(self.timesteps)

    def columns(self) -> list[Column]:
        """One for each time, block and pool, in that order."""
        return [
            Column(
                column_name(timestep, block.name, pool),
                block.channels * pool * pool,
                {
                    "timestep": timestep,
                    "block": block.name,
                    "number": block.number,
                    "pool": pool,
                    "channels": block.channels,
                },
            )
            for timestep in self.timesteps
            for block in self.blocks
            for pool in self.pools
            if pool <= block.side
        ]


def column_name(timestep: int, block: str, pool: int) -> str:
    """As ``t50_u0r0_p4``."""
    return f"t{timestep}_{block}_p{pool}"


def settled(config: Config) -> Config:
    """`config` with what its preset stands for; what the user gave stays. A sweep has a linear probe if no other."""
    if config.sweep and config.probe == "none":
        config = replace(config, probe="linear")
    if config.preset is None:
        return config
    block, pool = config.block or ("24",), config.pool or (2,)
    if config.preset == "paper-2307":
        return replace(config, block=block, pool=pool, timestep=config.timestep or (90,), linear="sgd")
    head = config.head if config.probe != "none" or config.head != "none" else "diffeed"
    return replace(config, block=block, pool=pool, timestep=config.timestep or (150,), linear="sgd", head=head)


def reading(config: Config, model: str, table: list[Block], steps: int, size: int) -> Reading:
    """The reading that `config` asks for.

    Args:
        model: its name, which decides what is read where nothing is asked for.
        table: the blocks of the model.
        steps: times of its diffusion.

    Raises:
        UsageError: no such block, time or pool; what there is is named.
    """
    defaults = _DEFAULTS.get(model, _OTHERWISE)
    every = config.sweep or config.cka or config.head == "difformer"  # each block with the pools that fit it
    blocks = _resolved(config, config.block or _blocks(config, defaults, table), table)
    timesteps = config.timestep or _timesteps(config, defaults, steps)
    for timestep in timesteps:
        if timestep >= steps:
            raise UsageError(f"--timestep is {timestep}; the model's diffusion has times 0 to {steps - 1}")
    if config.head == "diffeed" and (len(blocks) > 1 or len(timesteps) > 1):
        raise UsageError("--head diffeed reads one block at one time")
    if config.head == "diffeed":
        diffeed.feedback(table, blocks[0].number)  # refuses a block that feedback does not reach
    pools = config.pool or _pools(config, defaults, blocks)
    for pool in pools:
        fitting = [block for block in blocks if pool <= block.side]
        if not fitting or (len(fitting) < len(blocks) and not every):
            small = min(blocks, key=lambda block: block.side)
            raise UsageError(f"--pool is {pool}; the maps of block {small.name} have {small.side} cells a side")
    return Reading(
        tuple(blocks),
        tuple(dict.fromkeys(timesteps)),
        tuple(dict.fromkeys(pools)),
        config.views,
        config.flip,
        config.noise_average,
        size,
    )


def _resolved(config: Config, wanted: tuple[str, ...], table: list[Block]) -> list[Block]:
    try:
        return resolve(wanted, table)
    except UsageError as error:
        if config.preset is None:
            raise
        hint = "it is for the papers' model, ADM (--convert makes it); of another name a --block as well"
        raise UsageError(f"--preset {config.preset}: {error.message}", hint=hint) from error


def _blocks(config: Config, defaults: Defaults, table: list[Block]) -> tuple[str, ...]:
    if config.sweep or config.cka:
        return ("all",)
    if config.head == "difformer":
        return tuple(map(str, difformer.blocks_to_read(table)))
    if config.head == "diffeed":
        return (str(diffeed.feedback(table).head),)
    return (defaults.block,)


def _timesteps(config: Config, defaults: Defaults, steps: int) -> tuple[int, ...]:
    """For a sweep those of the papers' figures, and 0, as far as the diffusion goes."""
    if config.head == "difformer":
        return defaults.difformer
    if config.head == "diffeed":
        return (defaults.diffeed,)
    if config.cka:
        return tuple(time for time in (10, 90, 300) if time < steps)
    return tuple(time for time in _TIMES if time < steps) if config.sweep else (defaults.timestep,)


def _pools(config: Config, defaults: Defaults, blocks: list[Block]) -> tuple[int, ...]:
    if config.head == "difformer":
        return tuple(sorted({min(GRID, block.side) for block in blocks}))
    if config.probe == "attention":
        return (min(GRID, *(block.side for block in blocks)),)
    return (1, 2, 4) if config.sweep else (defaults.pool,)


def rows_at_once(asked: int | None, blocks: tuple[Block, ...], *, accelerated: bool) -> int:
    """Passes in one batch: what was asked for, or as many as keep the largest map within reach of the cache.

    An accelerator gets eight times as many. The same for any number of threads and processes.
    """
    if asked is not None:
        return asked
    largest = max(block.channels * block.side**2 for block in blocks)
    return max(1, min(64, 2**19 // largest)) * (8 if accelerated else 1)


def described(reading: Reading, schedule: Schedule) -> dict[str, object]:
    """For the manifest and the table's own description."""
    return {
        "blocks": [block.name for block in reading.blocks],
        "timesteps": list(reading.timesteps),
        "pools": list(reading.pools),
        "views": reading.views,
        "flip": reading.mirror,
        "noise_average": reading.draws,
        "image_size": reading.size,
        "schedule": schedule.name,
        "alpha_bars": {str(time): float(schedule.alpha_bars[time]) for time in reading.timesteps},
    }
