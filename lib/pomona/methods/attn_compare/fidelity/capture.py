"""Queries, keys and values as softmax sees them: of a model at work, from a file, or Gaussian."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pomona.errors import DataError, MissingError
from pomona.runtime.seeds import derive

HEADS, WIDTH = 8, 64  # of synthetic layers
MOST_TOKENS, MOST_WIDTH = 8192, 1024  # of a file: whole attention matrices and squares of the width are held

_NAME = "pomona_capture"


@dataclass(frozen=True)
class Heads:
    """The heads of one layer at one text.

    Attributes:
        q: (heads, n, d) queries, after rotary positions where the model has them.
        k: (heads, n, d) keys; those that several heads share are repeated.
        v: (heads, n, e) values.
        scale: what multiplies q . k.
        visible: (n, n), True where the model lets a query see a key; None: keys up to its own position.
        softcap: scores s count as softcap tanh(s / softcap); None: as they are.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    visible: Tensor | None = None
    softcap: float | None = None

    def save(self, path: Path) -> None:
        """Write everything to `path`, as safetensors."""
        from safetensors.torch import save_file

        tensors = {"q": self.q, "k": self.k, "v": self.v}
        if self.visible is not None:
            tensors["visible"] = self.visible
        rest = json.dumps({"scale": self.scale, "softcap": self.softcap})
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"heads": rest})

    @classmethod
    def load(cls, path: Path) -> Heads:
        """What `save` wrote to `path`."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return cls(**tensors, **json.loads(file.metadata()["heads"]))

    def scores(self) -> Tensor:
        """What softmax is taken of, (heads, n, n): scale q . k, soft-capped where the model does so."""
        found = self.q @ self.k.mT * self.scale
        return found if self.softcap is None else self.softcap * (found / self.softcap).tanh()

    def sees(self, *, full: bool = False) -> Tensor:
        """(n, n), True where a query sees a key: as in the model, or everywhere with `full`."""
        n = self.q.shape[-2]
        everywhere = torch.ones(n, n, dtype=torch.bool, device=self.q.device)
        return everywhere if full else everywhere.tril() if self.visible is None else self.visible

    @property
    def masked(self) -> list[str]:
        """What softmax does here besides plain causal attention, in words."""
        found = []
        if self.visible is not None:
            causal = self.sees(full=True).tril()
            reach = int(self.visible.sum(-1).max())
            plain = self.visible.equal(causal & ~causal.tril(-reach))
            found.append(f"a sliding window of {reach} tokens" if plain else "a mask of its own")
        if self.softcap is not None:
            found.append(f"scores soft-capped at {self.softcap:g}")
        return found

    def to(self, device: str, dtype: torch.dtype) -> Heads:
        q, k, v = (x.to(device, dtype) for x in (self.q, self.k, self.v))
        visible = None if self.visible is None else self.visible.to(device)
        return Heads(q, k, v, self.scale, visible, self.softcap)

    def part(self, start: int, end: int) -> Heads:
        """Heads number `start` to `end`, which is not included."""
        q, k, v = (x[start:end] for x in (self.q, self.k, self.v))
        return Heads(q, k, v, self.scale, self.visible, self.softcap)


# --- a model at work -------------------------------------------------------------------------------------------------


def capture(model: Any, ids: Sequence[int], keep: Callable[[int, Heads], None]) -> None:
    """Run `model` over the tokens `ids` and give `keep` each layer's number and heads, in float32 on the CPU.

    The model's attention is computed as ever, from the tensors that are kept, and its implementation is put back.

    Raises:
        DataError: the model's attention cannot be caught, or is not softmax of q . k alone.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    caught: set[int] = set()

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        layer = int(getattr(module, "layer_idx", len(caught)))
        for name in ("s_aux", "position_bias"):
            if more.get(name) is not None:
                raise DataError(
                    f"layer {layer} adds {name} to its scores", hint="fidelity knows softmax of q . k alone"
                )
        heads = _heads(layer, query, key, value, attention_mask, scaling, softcap)
        caught.add(layer)
        keep(layer, heads.to("cpu", torch.float32))
        return _attended(heads).to(query.dtype).transpose(0, 1)[None].contiguous(), None

    before = model.config._attn_implementation
    AttentionMaskInterface.register(_NAME, eager_mask)  # without one, sliding windows would go unseen
    AttentionInterface.register(_NAME, attend)
    try:
        model.set_attn_implementation(_NAME)
        with torch.no_grad():
            model.base_model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    finally:
        model.set_attn_implementation(before)
        AttentionInterface.register(_NAME, _absent)
    if not caught:
        raise DataError(f"{type(model).__name__} does not attend through transformers' attention interface")


def _absent(*_: Any, **__: Any) -> tuple[Tensor, None]:
    raise RuntimeError("nothing is being captured")


def _heads(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Heads:
    q, k, v = query[0], key[0], value[0]
    groups = len(q) // len(k)
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    visible = None
    if mask is not None:
        added = mask[0, 0]
        visible = added == 0
        if mask.shape[1] > 1 or (added[~visible] > -1e4).any():
            raise DataError(f"layer {layer} adds a bias to its scores", hint="fidelity knows softmax of q . k alone")
        if visible.equal(torch.ones_like(visible).tril()):
            visible = None
    return Heads(q, k, v, q.shape[-1] ** -0.5 if scaling is None else float(scaling), visible, softcap)


def _attended(heads: Heads) -> Tensor:
    if heads.softcap is None:
        return functional.scaled_dot_product_attention(
            heads.q, heads.k, heads.v, attn_mask=heads.visible, is_causal=heads.visible is None, scale=heads.scale
        )
    return heads.scores().masked_fill(~heads.sees(), -math.inf).float().softmax(-1).to(heads.v.dtype) @ heads.v


# --- a file ----------------------------------------------------------------------------------------------------------


def read_arrays(path: Path) -> list[Heads]:
    """The layers in a ``.npz`` file.

    It holds ``q`` (layers, heads, n, d), ``k`` (layers, groups, n, d) and ``v`` (layers, groups, n, e), floating, where
    heads is a multiple of groups and consecutive heads share a group; and ``scale``, one number, if it is not
    1 / sqrt(d).

    Raises:
        MissingError: the file is not there, or cannot be read.
        DataError: it is no such file.
    """
    import numpy as np

    def refused(why: str) -> DataError:
        return DataError(
            f"{path}: {why}", hint="needed: q (layers, heads, n, d), k and v alike, in a .npz without pickles"
        )

    found: dict[str, Any] = {}
    try:
        with path.open("rb") as file:
            held = np.load(file, allow_pickle=False)
            if not isinstance(held, np.lib.npyio.NpzFile):
                raise refused("one array, not a .npz of several")
            for name in ("q", "k", "v", "scale"):
                if name in held:
                    found[name] = held[name]
    except MemoryError as error:
        raise refused("its arrays are too large for memory") from error
    except (
        *(zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError, OverflowError),
        *(RuntimeError, TokenError),  # of an encrypted or an unknown archive, and of a header that is not Python
    ) as error:
        why = (str(error).splitlines() or ["damaged"])[0]
        if "allow_pickle" in why:  # NumPy's advice is to load it all the same
            why = "it is no .npz, or has pickles in it"
        raise refused(f"cannot be read as arrays: {why}") from error
    except OSError as error:
        raise MissingError(f"{path}: {error.strerror or error}") from error
    for name in ("q", "k", "v"):
        if name not in found:
            raise refused(f"no array {name}")
        array = found[name]
        if array.dtype.kind != "f" or array.ndim != 4 or 0 in array.shape:
            raise refused(f"{name} is {array.dtype} of shape {array.shape}, not floating of four axes")
        if not np.isfinite(array).all():
            raise refused(f"{name} has numbers that are not finite")
    q, k, v = (found[name] for name in ("q", "k", "v"))
    layers, heads, n, width = q.shape
    if k.shape[:3] != v.shape[:3] or (k.shape[0], k.shape[2], k.shape[3]) != (layers, n, width) or heads % k.shape[1]:
        raise refused(f"shapes {q.shape}, {k.shape} and {v.shape} do not fit each other")
    if n < 4:
        raise refused(f"{n} positions are too few to compare anything")
    if n > MOST_TOKENS or width > MOST_WIDTH:
        raise refused(f"{n} positions of width {width} are more than {MOST_TOKENS} of {MOST_WIDTH}")
    scale = found.get("scale", np.float64(width**-0.5))
    if scale.size != 1 or scale.dtype.kind not in "fiu" or not 0 < float(scale.item()) < math.inf:
        raise refused("scale is not one positive number")
    groups = heads // k.shape[1]
    return [
        Heads(
            torch.from_numpy(q[layer].astype(np.float64)),
            torch.from_numpy(k[layer].astype(np.float64)).repeat_interleave(groups, 0),
            torch.from_numpy(v[layer].astype(np.float64)).repeat_interleave(groups, 0),
            float(scale.item()),
        )
        for layer in range(layers)
    ]


# --- chance ----------------------------------------------------------------------------------------------------------


def gaussian(deviation: float, tokens: int, seed: int, name: str) -> Heads:
    """One layer of independent normal queries, keys and values; `deviation` is the standard deviation of its scores.

    q . k of d products of two normals of variance t has variance d t**2, so t = deviation with scale 1 / sqrt(d).
    """
    generator = torch.Generator().manual_seed(derive(seed, f"fidelity/{name}"))
    q, k, v = torch.randn((3, HEADS, tokens, WIDTH), generator=generator, dtype=torch.float64)
    return Heads(q * math.sqrt(deviation), k * math.sqrt(deviation), v, WIDTH**-0.5)
