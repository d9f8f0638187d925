"""The options of `pomona madaug-train`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pomona.errors import UsageError
from pomona.io.image_options import LARGEST_SIDE, ImageOptions
from pomona.runtime.ranges import at_least, positive

MOST_EPOCHS, MOST_HIDDEN = 100_000, 100

CONTENDERS = ("none", "random", "uniform", "train+val")
"""What a learned policy is compared with: no policy; under the same curriculum one that knows nothing, all operations
alike likely and magnitudes about the middle; one with magnitudes of every strength; and again the one that knows
nothing, with the images to learn a policy on among those to learn from."""


@dataclass(frozen=True)
class SplitOptions:
    """Which images the network learns from, which the policy, and which both are tested on."""

    panel: ClassVar[str] = "Splits"

    val: Annotated[str | None, "images to learn the policy on, of a data set of their own"] = None
    test: Annotated[str | None, "images to test on, of a data set of their own"] = None
    val_fraction: Annotated[
        float, "share of the images to learn from that the policy is learned on, class by class, where there are none"
    ] = 0.2
    test_fraction: Annotated[float, "share of all images to test on, where the data has no test images"] = 0.2
    train_images: Annotated[int | None, "learn from this many, class by class (digits: 200)"] = None
    val_images: Annotated[int | None, "learn the policy on this many, instead of a share (digits: 200)"] = None
    resplit: Annotated[
        bool, "part the images anew for every seed, whatever split the data has (digits: so for builtin:digits)"
    ] = False
    overlap: Annotated[
        Literal["refuse", "drop"],
        "images with the same pixels in two parts: refuse the data (exit 4), or drop those that are to be learned from",
    ] = "refuse"

    def __post_init__(self) -> None:
        for name in ("val_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be between 0 and 1")
        at_least(self, 1, "train_images", "val_images")


@dataclass(frozen=True)
class TrainingOptions:
    """The network and how it learns; in brackets what the presets give (paper and code alike where one is named)."""

    panel: ClassVar[str] = "Training"

    net: Annotated[
        str | None,
        "network: cnn-small, resnet-18, or wrn-DEPTH-WIDTH as wrn-40-2 (digits cnn-small, photos wrn-40-2, paper "
        "wrn-28-10)",
    ] = None
    epochs: Annotated[int | None, "times that every image is seen (digits 80, photos 200, paper 240)"] = None
    lr: Annotated[
        float | None,
        "step size of SGD, with momentum 0.9 (digits 0.05, otherwise 0.1); a warm-up leads to --warmup-factor times it",
    ] = None
    min_lr: Annotated[float | None, "step size at the end of the cosine (paper 1e-4, otherwise 0)"] = None
    weight_decay: Annotated[float | None, "of the network (5e-4)"] = None
    warmup_epochs: Annotated[int | None, "epochs of a linear warm-up (digits 0, otherwise 5)"] = None
    warmup_factor: Annotated[
        float | None, "peak of the warm-up, in times of --lr (paper: 2, which the released code does not say)"
    ] = None
    label_smoothing: Annotated[float | None, "of the loss that is learned by (code 0.1, otherwise 0)"] = None
    crop: Annotated[int | None, "pixels of padding for random crops, 0 for none (digits 0, otherwise 4)"] = None
    flip: Annotated[bool | None, "mirror half of the images (digits no, otherwise yes)"] = None
    cutout: Annotated[int | None, "side of the square hole in each image, 0 for none (digits 0, otherwise 16)"] = None
    clip: Annotated[float, "norm that gradients of the network are clipped to"] = 5.0
    select: Annotated[
        Literal["last", "validation"], "weights to test: of the last epoch, or of the best one in validation"
    ] = "last"

    def __post_init__(self) -> None:
        if self.net is not None:
            network(self.net)
        at_least(self, 1, "epochs")
        at_least(self, 0, "min_lr", "weight_decay", "warmup_epochs", "crop", "cutout")
        for name, most in (("epochs", MOST_EPOCHS), ("crop", LARGEST_SIDE), ("cutout", LARGEST_SIDE)):
            value = getattr(self, name)
            if value is not None and value > most:
                raise UsageError(f"--{name} is {value}; it must be at most {most}")
        positive(self, "lr", "warmup_factor", "clip")
        if self.label_smoothing is not None and not 0 <= self.label_smoothing < 1:
            raise UsageError(f"--label-smoothing is {self.label_smoothing}; it must be from 0 to below 1")


@dataclass(frozen=True)
class PolicyOptions:
    """When images are augmented, how, and how that is learned."""

    panel: ClassVar[str] = "Policy"

    augment: Annotated[
        Literal["madaug", "random", "uniform", "none"],
        "what to train: with a learned policy, with one that knows nothing, all alike likely at medium strength or at "
        "every strength, or with none",
    ] = "madaug"
    ops: Annotated[str, "operations to choose from, by comma, or all 17"] = "all"
    k: Annotated[int, "operations applied to an image, one after the other, without replacement"] = 2
    tau: Annotated[
        float | None,
        "time constant of the curriculum in epochs, 0 for none: an image is augmented with probability "
        "tanh(epoch / tau) (digits 20, otherwise 40)",
    ] = None
    curriculum_floor: Annotated[float | None, "added to that probability (code 0.01, otherwise 0)"] = None
    temperature: Annotated[float | None, "of the softmax that operations are drawn from (paper 3, otherwise 1)"] = None
    jitter: Annotated[float, "most that a drawn magnitude is moved by, of 1"] = 0.3
    policy_hidden: Annotated[int, "hidden layers of 128 in the policy, which is linear otherwise"] = 0
    policy_lr: Annotated[float | None, "step size of the policy's Adam (paper 1e-3, otherwise 5e-3)"] = None
    policy_decay: Annotated[float | None, "weight decay of the policy's Adam (paper 1e-3, otherwise 0)"] = None
    policy_every: Annotated[int | None, "training steps from one policy step to the next (digits 1, otherwise 3)"] = (
        None
    )
    policy_start: Annotated[int, "epoch of the first policy step"] = 0
    inner_batch: Annotated[
        int | None, "images of the inner step, each under every operation (paper 128, otherwise 16)"
    ] = None
    val_batch: Annotated[int | None, "images of the outer loss (digits 50, photos 64, paper 16)"] = None
    relaxation: Annotated[
        Literal["loss", "feature", "image"] | None,
        "what the probabilities mix in the inner step: losses, features, or images as the released code does, which "
        "does not find the right operation (paper image, otherwise loss)",
    ] = None
    inner_bn: Annotated[
        Literal["batch", "eval"] | None, "batch norm in the inner step: of the batch, or running (paper eval)"
    ] = None
    hypergradient: Annotated[
        Literal["jvp", "unrolled"], "forward-mode product, or differentiating through the unrolled step: equal"
    ] = "jvp"
    magnitude_grad: Annotated[
        Literal["straight-through", "finite-difference"],
        "gradient of magnitudes: as if each added itself to every pixel (released code), or by differences",
    ] = "straight-through"
    entropy_warn: Annotated[float, "warn when the entropy of the choice falls below this share of its largest"] = 0.3

    def __post_init__(self) -> None:
        at_least(self, 1, "k", "policy_every", "inner_batch", "val_batch")
        at_least(self, 0, "tau", "jitter", "policy_hidden", "policy_decay", "policy_start", "entropy_warn")
        positive(self, "temperature", "policy_lr")
        if self.policy_hidden > MOST_HIDDEN:
            raise UsageError(f"--policy-hidden is {self.policy_hidden}; it must be at most {MOST_HIDDEN}")
        for name in ("jitter", "entropy_warn", "curriculum_floor"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be from 0 to 1")


@dataclass(frozen=True)
class Config(SplitOptions, TrainingOptions, PolicyOptions, ImageOptions):
    """What is trained, on what, and what it is compared with."""

    preset: Annotated[
        Literal["digits", "photos", "paper", "code"] | None,
        "digits: ours for small data; photos: ours for 32-pixel photographs; code: as the released code; paper: the "
        "same with its stated loss and curriculum (default: digits for builtin:digits, photos otherwise)",
    ] = None
    compare: Annotated[
        str, "train these beside it on the same splits: none, random, uniform, train+val, by comma; or nothing"
    ] = "none,random"
    seeds: Annotated[int, "seeds to train each with: --seed and those after it"] = 1
    jobs: Annotated[int, "trainings that run side by side, in processes of one thread each"] = 1
    policy: Annotated[
        Path | None,
        "use the policy of this run, or a directory with policy.json, as it is: transfer, nothing is learned",
    ] = None
    evaluate: Annotated[Path | None, "test the network of this run on the images, and train nothing"] = None
    fail_under: Annotated[float | None, "fail (exit 9) when the mean test accuracy is below this"] = None
    backend: Annotated[
        Literal["auto", "batched", "pillow"],
        "how images are augmented: batched on the device, or by Pillow, image by image; auto is what is faster",
    ] = "auto"

    def __post_init__(self) -> None:
        for options in (SplitOptions, TrainingOptions, PolicyOptions, ImageOptions):
            options.__post_init__(self)
        at_least(self, 1, "seeds", "jobs")
        contenders(self.compare)
        if self.fail_under is not None and not 0 <= self.fail_under <= 1:
            raise UsageError(f"--fail-under is {self.fail_under}; it must be from 0 to 1")
        if self.policy is not None and self.augment != "madaug":
            raise UsageError(f"--policy is used with --augment madaug, not with {self.augment}")
        if self.evaluate is not None and self.policy is not None:
            raise UsageError("--evaluate trains nothing, and has no use for --policy")
        if self.evaluate is not None and (self.val is not None or self.test is not None):
            raise UsageError(
                "--evaluate tests on the images that are given as INPUT, and has no use for --val and --test",
                hint="pomona madaug-train IMAGES --evaluate RUN",
            )


def contenders(text: str) -> list[str]:
    """The names in ``--compare``, in order; none of ``nothing``.

    Raises:
        UsageError: a name is unknown.
    """
    parts = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if parts == ["nothing"]:
        return []
    if unknown := [part for part in parts if part not in CONTENDERS]:
        raise UsageError(f"--compare {unknown[0]}: expected {', '.join(CONTENDERS)}, by comma, or nothing")
    return parts


def network(name: str) -> tuple[str, int, int]:
    """Kind, depth and width of a network by name; 0 where its kind has none.

    Raises:
        UsageError: there is no such network.
    """
    if name in ("cnn-small", "resnet-18"):
        return name, 0, 0
    wide = re.fullmatch(r"wrn-(\d{1,3})-(\d{1,2})", name)
    if wide is None or int(wide[1]) < 10 or (int(wide[1]) - 4) % 6 or not int(wide[2]):
        raise UsageError(
            f"--net {name}: expected cnn-small, resnet-18, or wrn-DEPTH-WIDTH",
            hint="a depth is 4 more than a multiple of 6: wrn-16-2, wrn-28-10, wrn-40-2",
        )
    return "wrn", int(wide[1]), int(wide[2])
