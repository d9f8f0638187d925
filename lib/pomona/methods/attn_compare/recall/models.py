"""The model of the study, whose kernel alone is swapped."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pomona.methods.attn_compare.kernels import Kernel, attention, inner_products, normalised
from pomona.methods.attn_compare.maps import Features

WIDTH = 64


class RecallModel(nn.Module):
    """Embedding, causal convolution, one attention layer, and the embedding again as the head; no positions.

    With E the embedding and x = E[tokens]: h = x + conv(x), depthwise over three tokens; y = h + (A h V) O, where A is
    the kernel's attention between queries h Q and keys h K, both `feature_dim` wide, with the scale 1 / sqrt of that;
    logits = y E^T. Nothing is normalised, and nothing has a bias.

    Parameters are drawn from `random`, in the same order whatever the kernel: models of one seed begin alike. The
    embedding is Gaussian with variance 1 / `WIDTH`, the others uniform within 1 / sqrt(inputs). A map that learns has
    parameters besides, and begins as `maps` defines.

    Args:
        length: the longest sequence there will be.
    """

    def __init__(
        self, kernel: Kernel, vocabulary: int, feature_dim: int, length: int, random: np.random.Generator
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.scale = 1 / math.sqrt(feature_dim)
        self.embedding = _parameter(random.normal(0, 1 / math.sqrt(WIDTH), (vocabulary, WIDTH)))
        self.convolution = _uniform(random, 3, WIDTH)  # of a token, of the one before it, and before that
        self.of_queries = _uniform(random, WIDTH, feature_dim)
        self.of_keys = _uniform(random, WIDTH, feature_dim)
        self.of_values = _uniform(random, WIDTH, WIDTH)
        self.output = _uniform(random, WIDTH, WIDTH)
        seed = int(random.integers(2**62))
        self.maps: nn.ModuleList | None = None
        if kernel.weight is None:
            self.maps = nn.ModuleList(kernel.build(feature_dim, self.scale, length=length, seed=seed))

    def forward(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """Logits (b * a, V) at the positions `asked` (b, a) of `tokens` (b, n); other rows of A are not computed."""
        x = functional.embedding(tokens, self.embedding)
        padded = functional.pad(x, (0, 0, 2, 0))
        now, before, earlier = self.convolution
        x = x + now * x + before * padded[:, 1:-1] + earlier * padded[:, :-2]
        values = self.mixing(x @ self.of_queries, x @ self.of_keys, asked) @ (x @ self.of_values)
        mixed: Tensor = _at(x, asked) + values @ self.output
        return mixed.flatten(0, 1) @ self.embedding.T

    def mixing(self, queries: Tensor, keys: Tensor, asked: Tensor) -> Tensor:
        """The rows `asked` (b, a) of causal attention among `queries` and `keys` (b, n, r): (b, a, n)."""
        visible = torch.arange(keys.shape[1], device=keys.device) <= asked[..., None]
        if self.maps is None:
            return attention(self.kernel, _at(queries, asked), keys, self.scale, visible=visible)
        of_queries, of_keys = self.maps
        features = Features(_at(of_queries(queries).values, asked))  # exponents of queries cancel
        return normalised(self.kernel, inner_products(features, of_keys(keys), visible), visible=visible)


def state_bytes(kernel: Kernel, feature_dim: int, length: int) -> int:
    """Bytes in float32 of what decoding must keep after `length` tokens.

    The keys and values of all of them where no finite map is exact; otherwise sum phi(k) v and sum phi(k), and for a
    kernel that subtracts the sum of values and the number of keys.
    """
    features = kernel.features(feature_dim)
    if features is None:
        return length * cache_bytes(feature_dim)
    return 4 * (features + kernel.subtractive) * (WIDTH + 1)


def cache_bytes(feature_dim: int) -> int:
    """Bytes in float32 of one key and its value."""
    return 4 * (feature_dim + WIDTH)


def _at(rows: Tensor, asked: Tensor) -> Tensor:
    """Those of `rows` (b, n, f) whose positions are `asked` (b, a): (b, a, f)."""
    return rows.gather(1, asked[..., None].expand(-1, -1, rows.shape[-1]))


def _uniform(random: np.random.Generator, inputs: int, outputs: int) -> nn.Parameter:
    bound = 1 / math.sqrt(inputs)
    return _parameter(random.uniform(-bound, bound, (inputs, outputs)))


def _parameter(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(values.astype(np.float32)))
