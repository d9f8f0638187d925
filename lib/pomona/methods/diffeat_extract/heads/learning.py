"""How every head is trained, and what it says afterwards (released code: ``finetune.py`` and its scripts).

Stochastic gradient descent without momentum or weight decay on the cross-entropy, step size divided by 10 after each
quarter of the epochs. Unlike the released code no image is left out of an epoch or of a test, and a head is in training
mode whenever it learns: there, the first evaluation froze the batch statistics for the rest of the training.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pomona.errors import CheckFailed, UsageError
from pomona.models.drift import evaluating
from pomona.runtime.jobs import one_thread
from pomona.runtime.progress import Progress
from pomona.runtime.seeds import derive

RATES = {"linear": 1e-2, "mlp": 1e-2, "attention": 5e-2, "difformer": 5e-2, "diffeed": 1e-2}
"""Step sizes of the released scripts, for 128 images in a step, or 16 of diffeed."""
_QUARTERS = 4

Inputs = Callable[[NDArray[np.int64]], tuple[Tensor, ...]]
"""What a head takes of the images at these rows, each tensor with one entry for each."""


def rates(epochs: int, rate: float) -> list[float]:
    """The step size of every epoch: `rate`, divided by 10 after each quarter of them."""
    return [rate / 10 ** (_QUARTERS * epoch // epochs) for epoch in range(epochs)]


def learn(
    module: nn.Module,
    inputs: Inputs,
    labels: NDArray[np.int64],
    rows: NDArray[np.int64],
    *,
    epochs: int,
    batch: int,
    rate: float,
    seed: int,
    progress: Progress,
) -> list[float]:
    """Train what of `module` requires gradients; returns the mean loss of every epoch, in nats.

    Every epoch goes through all `rows` in a new order, in batches that differ by one row at most, so that no row weighs
    much more than another. Sums are made in one thread: same seed, same bytes.

    Args:
        module: on its device; in evaluation mode afterwards.
        labels: class of every row there is, of which `rows` are learned from.
        progress: told of every epoch; the caller starts the stage.

    Raises:
        CheckFailed: the loss of an epoch is not finite.
        UsageError: batch statistics of single images are asked for.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    steps = -(-len(rows) // batch)
    if len(rows) < 2 * steps and any(isinstance(part, nn.BatchNorm2d) for part in module.modules()):
        raise UsageError("a step of one image has no batch statistics", hint="--head-batch 2 at least")
    optimiser = torch.optim.SGD(parameters, lr=rate)
    random = np.random.Generator(np.random.Philox(derive(seed, "heads/order")))
    losses: list[float] = []
    module.train()
    try:
        with one_thread():
            for epoch, now in enumerate(rates(epochs, rate), start=1):
                optimiser.param_groups[0]["lr"] = now
                total = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
                for chosen in np.array_split(rows[random.permutation(len(rows))], steps):
                    targets = torch.from_numpy(labels[chosen]).to(total.device)
                    loss = functional.cross_entropy(_logits(module, inputs(chosen)), targets)
                    optimiser.zero_grad()
                    torch.autograd.backward(loss)
                    optimiser.step()
                    total += loss.detach() * len(chosen)  # read once an epoch: a device need not wait for each step
                losses.append(float(total) / len(rows))
                if not np.isfinite(losses[-1]):
                    raise CheckFailed(
                        f"the head's loss was not finite in epoch {epoch} of {epochs}, with step size {now:g}",
                        hint="a smaller --head-rate may keep it so",
                    )
                progress.advance()
    finally:
        module.eval()
    return losses


def predict(module: nn.Module, inputs: Inputs, rows: NDArray[np.int64], *, batch: int) -> NDArray[np.int64]:
    """The class with the largest logit, for each of the `rows` in order; nothing in `module` changes.

    Raises:
        CheckFailed: a logit is not finite.
    """
    found = np.empty(len(rows), dtype=np.int64)
    with torch.no_grad(), evaluating(module), one_thread():
        for start in range(0, len(rows), batch):
            logits = _logits(module, inputs(rows[start : start + batch]))
            if not logits.isfinite().all():
                raise CheckFailed("the head gives logits that are not finite", hint="a smaller --head-rate may help")
            found[start : start + batch] = logits.argmax(-1).cpu().numpy()
    return found


def _logits(module: nn.Module, tensors: tuple[Tensor, ...]) -> Tensor:
    device = next(module.parameters()).device
    logits: Tensor = module(*(tensor.to(device, torch.float32) for tensor in tensors))
    return logits
