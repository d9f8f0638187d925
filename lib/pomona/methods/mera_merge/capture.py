"""What the hidden units of an adapter do on text: the features that transport on activations compares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from pomona.errors import CheckFailed, DataError
from pomona.methods.mera_merge.adapters import Adapter
from pomona.methods.mera_merge.bottleneck import AdapterLayer, attach


@torch.no_grad()
def capture(
    model: Any, adapter: Adapter, batches: Iterable[Mapping[str, Tensor]], *, act: Literal["pre", "post"]
) -> dict[str, Tensor]:
    """The activations of `adapter`'s hidden units inside `model`, of all tokens that are no padding, in their order.

    Every adapter is looked at alone in the model, so deeper sites see what its own earlier ones did (as OTFusion,
    arXiv 1910.05653, looks at each network on its own).

    Args:
        batches: of inputs of `model`, each with its ``attention_mask`` (b, s).
        act: before ("pre", what OTFusion's published commands compare) or after ("post") the nonlinearity.

    Returns:
        By site (tokens, r), in float32 on the CPU.

    Raises:
        DataError: the adapter does not fit the model, or there is no token.
        CheckFailed: an activation is not finite.
    """
    found: dict[str, list[Tensor]] = {}
    real = torch.zeros(0, dtype=torch.bool)

    def keep(site: str) -> Any:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            found[site].append(output[real].float().cpu())

        return hook

    training = model.training
    with attach(model.eval(), adapter) as attached:
        for site, layer in attached.changes.items():
            assert isinstance(layer, AdapterLayer)
            found[site] = []
            (layer.down if act == "pre" else layer.activation).register_forward_hook(keep(site))
        for batch in batches:
            placed = {name: tensor.to(model.device) for name, tensor in batch.items()}
            real = placed["attention_mask"].bool()
            model.base_model(**placed)
    model.train(training)
    if not all(found.values()):
        raise DataError("there is no text whose activations could be compared")
    activations = {site: torch.cat(parts) for site, parts in found.items()}
    for site, values in activations.items():
        if not values.isfinite().all():
            raise CheckFailed(f"adapter {adapter.label}: its activations at {site} are not finite")
    return activations
