"""The options of `pomona diffeat-extract`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pomona.errors import UsageError
from pomona.io.image_options import ImageOptions
from pomona.runtime.ranges import at_least, positive

CONTROLS = ("pixels", "random")


@dataclass(frozen=True)
class ModelOptions:
    """A diffusion model of one's own: trained on the images, or converted."""

    panel: ClassVar[str] = "Making a model"

    train_model: Annotated[
        int | None, "train an unconditional diffusion model on the images for this many steps (DDPM, Ho et al. 2020)"
    ] = None
    widths: Annotated[str, "channels at each resolution of the model to train, by comma"] = "32,64"
    residual_blocks: Annotated[int, "residual blocks at each resolution"] = 1
    attention_at: Annotated[str | None, "sides of the maps with self-attention, by comma, as 16,8; by default none"] = (
        None
    )
    train_batch: Annotated[int, "images in a training step"] = 64
    learning_rate: Annotated[float, "peak step size of AdamW, after the warm-up and before a cosine to 0"] = 1e-3
    warmup_steps: Annotated[int, "steps of the warm-up"] = 100
    average: Annotated[float, "decay of the moving average of the weights, which is what is written"] = 0.995
    convert: Annotated[
        Path | None, "read this checkpoint of guided-diffusion (ADM, 256x256 unconditional) and write it as a model"
    ] = None

    def __post_init__(self) -> None:
        at_least(self, 1, "train_model", "residual_blocks", "train_batch")
        at_least(self, 0, "warmup_steps")
        positive(self, "learning_rate")
        if not 0 <= self.average < 1:
            raise UsageError(f"--average is {self.average}; it must be from 0 to below 1")
        whole_numbers(self.widths, "--widths")
        if self.attention_at is not None:
            whole_numbers(self.attention_at, "--attention-at")


@dataclass(frozen=True)
class ProbeOptions:
    """What is learned on the features, to tell what is in them."""

    panel: ClassVar[str] = "Probe"

    probe: Annotated[
        Literal["none", "linear", "mlp", "attention"], "classifier trained on the frozen features (section 3)"
    ] = "none"
    head: Annotated[
        Literal["none", "difformer", "diffeed"],
        "classifier of the successor (arXiv 2311.17921): tokens of several blocks and times, or features fed back",
    ] = "none"
    shots: Annotated[str, "labelled images of each class to learn from, by comma; all is all of them"] = "1,10,all"
    draws: Annotated[int, "draws of the labelled images, for all numbers but all"] = 5
    controls: Annotated[
        str, "what to probe beside the features: pixels, random (the model with random weights), both by comma, or none"
    ] = "pixels,random"
    test_share: Annotated[
        float, "share of the images to test on, class by class, where the data has no split of its own"
    ] = 0.5
    linear: Annotated[
        Literal["logistic", "sgd"],
        "linear probe: standardised logistic regression, or the released code's plain SGD without normalisation",
    ] = "logistic"
    penalty: Annotated[float, "inverse strength of the L2 penalty of the logistic regression"] = 0.1
    hidden: Annotated[str, "widths of the hidden layers of the MLP, by comma"] = "512"
    epochs: Annotated[int, "epochs of heads trained by SGD (released code: 28, step size / 10 every 7)"] = 28
    head_batch: Annotated[
        int | None,
        "images in a step of heads trained by SGD; by default 128 (released code), or 16 for diffeed and for fewer "
        "than 2,000 images",
    ] = None
    head_rate: Annotated[float | None, "step size of SGD (released code: 0.01; attention and difformer 0.05)"] = None
    fail_under: Annotated[float | None, "fail (exit 9) when the probe's accuracy with most labels is below this"] = None

    def __post_init__(self) -> None:
        at_least(self, 1, "draws", "epochs", "head_batch")
        positive(self, "penalty", "head_rate")
        if not 0 < self.test_share < 1:
            raise UsageError(f"--test-share is {self.test_share}; it must be between 0 and 1")
        if self.fail_under is not None and not 0 <= self.fail_under <= 1:
            raise UsageError(f"--fail-under is {self.fail_under}; it must be from 0 to 1")
        if self.probe != "none" and self.head != "none":
            raise UsageError("--probe and --head exclude each other")
        shots(self.shots)
        whole_numbers(self.hidden, "--hidden")
        named = controls(self.controls)
        if unknown := [name for name in named if name not in CONTROLS]:
            raise UsageError(f"--controls {unknown[0]}: expected {', '.join(CONTROLS)}, both by comma, or none")


@dataclass(frozen=True)
class Config(ModelOptions, ProbeOptions, ImageOptions):
    """Which features of which model, and what is done with them."""

    block: Annotated[
        tuple[str, ...], "block to read: its number, its name (--list-blocks), mid or mid+N; again for several, or all"
    ] = ()
    timestep: Annotated[tuple[int, ...], "time of the diffusion at which to read, 0 to T - 1; again for several"] = ()
    pool: Annotated[tuple[int, ...], "average maps to this many cells a side; again for several"] = ()
    preset: Annotated[
        Literal["paper-2307", "paper-2311"] | None,
        "the settings of a paper for its model: t 90, block 24, pool 2, linear SGD; or t 150 and --head diffeed",
    ] = None
    schedule: Annotated[
        Literal["model", "linear", "cosine"], "noise schedule: what the model says, or one of these over 1,000 steps"
    ] = "model"
    views: Annotated[int, "rows of each image: the middle crop, then random ones of 0.8 to 1 of the side"] = 1
    flip: Annotated[bool, "mirror half of the random crops"] = False
    noise_average: Annotated[int, "draws of the noise to average the features of each view over"] = 1
    save_dtype: Annotated[Literal["float32", "float16"], "number format of the features in the output"] = "float32"
    shard_size: Annotated[int, "images that are kept together as they are done, for --resume"] = 512
    compile: Annotated[bool, "compile the part of the model that is used (pays with many images)"] = False
    sweep: Annotated[bool, "probe every block, time and pool of --block, --timestep, --pool, with all the controls"] = (
        False
    )
    cka: Annotated[bool, "compare the features of all blocks and times by linear CKA (Kornblith et al. 2019)"] = False
    list_blocks: Annotated[bool, "print the blocks of the model with their shapes and costs as JSONL, and stop"] = False

    def __post_init__(self) -> None:
        for options in (ModelOptions, ProbeOptions, ImageOptions):
            options.__post_init__(self)
        at_least(self, 1, "views", "noise_average", "shard_size")
        for name, least in (("timestep", 0), ("pool", 1)):
            for value in getattr(self, name):
                if value < least:
                    raise UsageError(f"--{name} is {value}; it must be {least} or more")
        asked = [f"--{name.replace('_', '-')}" for name in ("sweep", "cka", "list_blocks") if getattr(self, name)]
        asked += [f"--{name.replace('_', '-')}" for name in ("train_model", "convert") if getattr(self, name)]
        asked += [f"--{name}" for name in ("head", "probe") if getattr(self, name) != "none"]
        if asked[:1] == ["--sweep"] and asked[1:] == ["--probe"]:
            asked.pop()  # which a sweep is made with
        if len(asked) > 1:
            raise UsageError(f"{asked[0]} and {asked[1]} exclude each other")
        if self.probe == "none" and self.head == "none" and not self.sweep and self.fail_under is not None:
            raise UsageError("--fail-under needs a probe", hint="--probe linear, for one")
        if self.flip and self.views == 1:
            raise UsageError("--flip needs --views of 2 or more: the first is the middle crop, as it is")


def whole_numbers(text: str, flag: str) -> list[int]:
    """Whole numbers by comma, each 1 or more.

    Raises:
        UsageError: there is none, or something else among them.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[1-9][0-9]{0,5}", part) for part in parts):
        raise UsageError(f"{flag} {text}: expected whole numbers by comma, as 32,64")
    return [int(part) for part in parts]


def shots(text: str) -> list[int | None]:
    """The numbers of labelled images of each class, in order; None is all of them.

    Raises:
        UsageError: there is none, or something else among them.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part == "all" or re.fullmatch("[1-9][0-9]{0,5}", part) for part in parts):
        raise UsageError(f"--shots {text}: expected whole numbers or all, by comma, as 1,10,all")
    counts = sorted({int(part) for part in parts if part != "all"})
    return [*counts, *([None] if "all" in parts else [])]


def controls(text: str) -> list[str]:
    """The names of the controls; none of ``none``."""
    parts = [part.strip() for part in text.split(",")]
    return [] if parts == ["none"] else list(dict.fromkeys(parts))
