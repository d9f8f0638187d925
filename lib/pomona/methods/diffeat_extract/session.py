"""What every reading starts from: the model, its blocks, the schedule, and the work that other processes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from pomona.errors import DataError, UsageError
from pomona.io.images import Images
from pomona.methods.diffeat_extract import noising
from pomona.methods.diffeat_extract.config import Config, controls
from pomona.methods.diffeat_extract.extraction import FeatureReader, Group, ImageReader, PixelReader, groups
from pomona.methods.diffeat_extract.heads import diffeed
from pomona.methods.diffeat_extract.reading import Reading, reading, rows_at_once, settled
from pomona.models.unets.blocks import Block, blocks
from pomona.models.unets.loading import UNet, load_unet, random_weights
from pomona.runtime.device import Runtime
from pomona.runtime.seeds import derive
from pomona.runtime.settings import Settings

DEFAULT = "digits"

Reader = FeatureReader | ImageReader


@dataclass(frozen=True)
class Session:
    """A model on its device, and what is to be read of it.

    Attributes:
        table: all blocks of the model.
    """

    config: Config
    settings: Settings
    runtime: Runtime
    unet: UNet
    table: list[Block]
    schedule: noising.Schedule
    reading: Reading

    @classmethod
    def open(cls, config: Config, settings: Settings) -> Session:
        """Load the model and settle what is read; the same in every process of a launch.

        Raises:
            PomonaError: as its class says.
        """
        config = settled(config)
        runtime = Runtime.open(settings.device, settings.dtype, settings.seed)
        unet = load_unet(settings.model or DEFAULT, dtype=runtime.dtype, device=runtime.device)
        if unet.channels not in (1, 3):
            raise DataError(
                f"{unet.name} takes {unet.channels} channels, and images have 1 or 3",
                hint="a model of latents needs its autoencoder, which this command does not run",
            )
        size = side(config, unet)
        table = blocks(unet.module, size)
        schedule = noising.schedule(config.schedule, unet.scheduler)
        asked = reading(config, unet.name, table, len(schedule.alpha_bars), size)
        return cls(config, settings, runtime, unet, table, schedule, asked)

    @property
    def rows(self) -> int:
        """Passes through the model in one batch at most."""
        accelerated = self.runtime.device.type != "cpu"
        return rows_at_once(self.settings.batch_size, self.reading.blocks, accelerated=accelerated)

    @cached_property
    def feedback(self) -> diffeed.Feedback | None:
        """Which blocks DifFeed feeds back, where it is the head."""
        return diffeed.feedback(self.table, self.reading.blocks[0].number) if self.config.head == "diffeed" else None

    @property
    def share(self) -> float:
        """What reading costs, as a share of one whole pass; of DifFeed both of its passes."""
        shares = {block.number: block.share for block in self.table}
        if self.feedback is not None:
            return shares[max(self.feedback.sources)] + shares[self.feedback.head]
        return max(block.share for block in self.reading.blocks)

    @cached_property
    def controls(self) -> list[str]:
        """What is probed beside the features."""
        return controls(self.config.controls)

    @cached_property
    def untrained(self) -> UNet:
        """The same network with random weights."""
        return random_weights(self.unet, derive(self.settings.seed, "random weights"))

    def register(self, task: str, asked: Reading, *, untrained: bool = False) -> FeatureReader:
        """Give `runtime` the task of reading that; every process of a launch registers the same tasks."""
        reader = FeatureReader(
            self.untrained if untrained else self.unet,
            asked,
            self.schedule,
            self.runtime,
            seed=self.settings.seed,
            rows=self.rows,
            compiled=self.config.compile,
        )
        self.runtime.register(task, reader)
        return reader

    def register_all(self) -> dict[str, Reader]:
        """Every task that this session's command may hand out, by name."""
        found: dict[str, Reader] = {}
        live = self.config.head == "diffeed"  # which runs the model itself, in every step
        for name, asked in () if live else self.readings():
            found[f"features{name}"] = self.register(f"features{name}", asked)
            if self.probed and "random" in self.controls:
                found[f"random{name}"] = self.register(f"random{name}", asked, untrained=True)
        plain = {"images": ImageReader} if live else {}
        if self.probed and "pixels" in self.controls:
            plain["pixels"] = PixelReader
        for name, kind in plain.items():
            found[name] = kind(self.unet.channels, self.reading.size)
            self.runtime.register(name, found[name])
        return found

    @property
    def probed(self) -> bool:
        return self.config.sweep or self.config.probe != "none" or self.config.head != "none"

    def readings(self) -> Iterator[tuple[str, Reading]]:
        """What is read in one go, under the ending of its task: a sweep reads one time after the other."""
        if not self.config.sweep:
            yield "", self.reading
            return
        for timestep in self.reading.timesteps:
            yield f"/{timestep}", replace(self.reading, timesteps=(timestep,))

    def groups(
        self,
        images: Images,
        task: str,
        reader: Reader,
        *,
        size: int | None = None,
        skip: Callable[[int], bool] = lambda index: False,
    ) -> Iterator[Group]:
        """The images, read by that task group by group, of ``--shard-size`` unless `size` says otherwise."""
        return groups(
            images,
            task,
            self.runtime,
            size=size if size is not None else self.config.shard_size,
            pictures=reader.pictures,
            views=self.reading.views if isinstance(reader, FeatureReader) else 1,
            tolerant=self.config.rejects is not None,
            skip=skip,
        )


def side(config: Config, unet: UNet) -> int:
    """Side of the images as the model gets them.

    Raises:
        UsageError: neither the options nor the model say.
    """
    size = config.image_size or unet.size
    if size is None:
        raise UsageError(f"{unet.name} does not say for what size of images it is", hint="give --image-size")
    return size
