"""Feature maps fitted to a head's softmax, as Hedgehog's distillation does (arXiv 2402.04347)."""

from __future__ import annotations

import torch
from torch import Tensor

from pomona.methods.attn_compare.fidelity.capture import Heads
from pomona.methods.attn_compare.fidelity.measures import FLOOR
from pomona.methods.attn_compare.kernels import Kernel, inner_products
from pomona.methods.attn_compare.maps import FeatureMap

RATE = 1e-2
SHARES = 4  # a step looks at every fourth query, in turn


def fit(kernel: Kernel, heads: Heads, steps: int, *, seed: int, full: bool = False) -> tuple[FeatureMap, FeatureMap]:
    """phi of queries and of keys, with parameters for each head, after `steps` of Adam from where they begin.

    The loss is the cross-entropy of a kernel's rows to softmax's, the mean over rows and the sum over heads, so that no
    head's fit depends on another's. Fitted in float32.
    """
    made = kernel.build(
        heads.q.shape[-1],
        heads.scale,
        length=heads.q.shape[-2],
        seed=seed,
        heads=len(heads.q),
        device=heads.q.device,
    )
    if not steps:
        return made
    visible = heads.sees(full=full)
    target = heads.scores().masked_fill(~visible, -torch.inf).softmax(-1).float()
    q, k = heads.q.float(), heads.k.float()
    optimizer = torch.optim.Adam([weight for phi in made for weight in phi.parameters()], lr=RATE)
    with torch.enable_grad():
        for step in range(steps):
            optimizer.zero_grad(set_to_none=True)
            rows = slice(step % SHARES, None, SHARES)
            loss = cross_entropy(made, q[:, rows], k, target[:, rows], visible[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return made


def cross_entropy(maps: tuple[FeatureMap, FeatureMap], q: Tensor, k: Tensor, target: Tensor, visible: Tensor) -> Tensor:
    """-sum P log Q, its mean over rows summed over heads; weights below the floor of the divergence count as it."""
    of_queries, of_keys = maps
    raw = inner_products(of_queries(q), of_keys(k), visible)
    shares = raw / raw.sum(-1, keepdim=True).clamp_min(torch.finfo(raw.dtype).tiny)
    return -(target * shares.clamp_min(FLOOR).log()).sum(-1).mean(-1).sum()
