"""What a static merge does to each layer on its own: the merged expert beside the mixture, on what the layer sees."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pomona.errors import CheckFailed
from pomona.methods.meo_convert.expert_alignment import activations
from pomona.methods.meo_convert.layouts import Role
from pomona.methods.meo_convert.routing import Routing
from pomona.models.checkpoint import Checkpoint


def block_errors(
    merged: Checkpoint, names: Mapping[str, Mapping[Role, str]], routing: Mapping[str, Routing], activation: str
) -> dict[str, float]:
    """Relative L2 error of the merged expert's output in each layer, over the tokens that `routing` kept.

    The residual stream is left out, which would hide the error, and so are the errors of the layers before.

    Args:
        merged: the output of the merge.
        names: of each layer its tensors by role, as `StaticResult.merged` has them.
        routing: of the mixture.
        activation: the nonlinearity's name in transformers.

    Raises:
        CheckFailed: an error is not finite.
    """
    errors: dict[str, float] = {}
    for layer, tensors in names.items():
        maps = {role: merged.read(name) for role, name in tensors.items()}
        expected = routing[layer].outputs
        found = activations(routing[layer].inputs, maps, activation) @ maps["down"].float().T
        error = torch.linalg.vector_norm((found - expected).double()) / torch.linalg.vector_norm(expected.double())
        if not bool(error.isfinite()):
            raise CheckFailed(f"layer {layer}: the error of the merged expert is not finite")
        errors[layer] = float(error)
    return errors
