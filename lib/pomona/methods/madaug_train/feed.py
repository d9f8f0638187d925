"""Images as the network gets them, and the random numbers of a training."""

from __future__ import annotations

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from pomona.methods.madaug_train.data import Prepared
from pomona.methods.madaug_train.networks import Network
from pomona.methods.madaug_train.normalisation import normalised, statistics
from pomona.methods.madaug_train.recipe import Recipe
from pomona.methods.madaug_train.splits import Parts, Places
from pomona.methods.madaug_train.standard import holes, standard
from pomona.runtime.device import Runtime
from pomona.runtime.seeds import derive

_JUDGED = 4  # batches that are judged at a time: without gradients, they take less memory than one that is learned


class Feed:
    """The images of a training by their places, on its device."""

    def __init__(self, prepared: Prepared, parts: Parts, recipe: Recipe, seed: int, runtime: Runtime) -> None:
        self._prepared, self._parts, self._recipe = prepared, parts, recipe
        self._seed, self._runtime = seed, runtime

    @property
    def judged(self) -> int:
        """Images that are looked at together without learning from them."""
        return _JUDGED * self._recipe.train_batch

    def random(self, name: str) -> Generator:
        """The random numbers of a name; Philox, whose numbers are the same on every processor."""
        return np.random.Generator(np.random.Philox(key=derive(self._seed, name)))

    def pixels(self, places: Places) -> Tensor:
        """The images at `places`, (n, C, H, W), uint8."""
        return torch.from_numpy(np.asarray(self._prepared.images[places])).to(self._runtime.device)

    def labels(self, places: Places) -> Tensor:
        """Their classes, (n,)."""
        return torch.from_numpy(self._prepared.labels[places]).to(self._runtime.device)

    def standard(self, step: int, batch: Places, own: slice) -> Tensor:
        """The images `own` of those of the `batch` of a step, cropped and mirrored."""
        images = self.pixels(batch[own])
        crop, flip = self._recipe.crop, self._recipe.flip
        if not len(images) or (not crop and not flip):
            return images
        offsets = self.random(f"crop/{step}").integers(2 * crop + 1, size=(len(batch), 2))[own]
        mirror = self.random(f"flip/{step}").random(len(batch))[own] < (0.5 if flip else 0.0)
        return standard(
            images, torch.from_numpy(offsets).to(images.device), torch.from_numpy(mirror).to(images.device), crop
        )

    def input(self, step: int, images: Tensor, whole: int, own: slice) -> Tensor:
        """What the network learns from: `images`, which are `own` of a batch of `whole`, normalised, with holes."""
        x = normalised(images, self._parts.mean, self._parts.std)
        if not self._recipe.cutout:
            return x
        centres = self.random(f"holes/{step}").random((whole, 2), dtype=np.float32)[own]
        return holes(x, torch.from_numpy(centres).to(x.device), self._recipe.cutout)

    @torch.no_grad()
    def judge(self, network: Network, places: Places) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Classes and losses, (n,) each, of the images at `places` by the network as it is, in float32."""
        found = torch.zeros(2, len(places), device=self._runtime.device)
        mine = range(0, len(places), self.judged)[self._runtime.rank :: self._runtime.world]
        with statistics(network, "eval"):
            for start in mine:
                some = slice(start, start + self.judged)
                logits = network(normalised(self.pixels(places[some]), self._parts.mean, self._parts.std))
                found[0, some] = logits.argmax(-1)
                found[1, some] = cross_entropy(logits, self.labels(places[some]), reduction="none")
        if self._runtime.world > 1:
            torch.distributed.all_reduce(found)
        predicted, losses = found.double().cpu().numpy()
        return predicted.astype(np.int64), losses
