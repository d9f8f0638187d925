"""What each form of attention costs, before anything is timed: FLOPs, bytes and the lengths where they cross.

FLOPs are those of matrix products, a multiplication and an addition as two; feature maps are not in them. n is the
length, d the width of a head, r the number of features, e = d + 1 the width of v with its column of ones, C the chunk.
Everything here is for one head, unless it takes `Shape`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pomona.methods.attn_compare.linear import CHUNK


@dataclass(frozen=True)
class Shape:
    """What is computed.

    Attributes:
        heads: in all, over the batch.
        length: n.
        width: d.
        features: r, of a linear form; 0 of softmax.
        itemsize: bytes of a number.
        causal: queries see no later key.
    """

    heads: int
    length: int
    width: int
    features: int
    itemsize: int = 4
    causal: bool = True

    @property
    def extended(self) -> int:
        return self.width + 1


def flops(form: str, way: str, shape: Shape, chunk: int = CHUNK) -> int:
    """FLOPs of all heads: of one pass over the sequence for `way` fwd or train, of one step for decode."""
    n, d, r, e = shape.length, shape.width, shape.features, shape.extended
    if way == "decode":
        return shape.heads * (4 * r * e if form == "state" else 4 * n * d)
    softmax = 4 * n * n * d
    forward, train = {
        # A fused softmax skips what is masked; its backward computes the scores anew, 5 products to the forward's 2.
        "sdpa": (softmax // (1 + shape.causal), softmax // (1 + shape.causal) * 7 // 2),
        "flex": (softmax // (1 + shape.causal), softmax // (1 + shape.causal) * 7 // 2),
        "eager": (softmax, 3 * softmax),
        "chunked": (
            n * (2 * chunk * (r + e) + 4 * r * e),
            n * (2 * chunk * (4 * r + 3 * e) + 14 * r * e),
        ),
        "batched": (n * (2 * chunk * (r + e) + 4 * r * e), 3 * n * (2 * chunk * (r + e) + 4 * r * e)),
        "quadratic": (2 * n * n * (r + e), 6 * n * n * (r + e)),
        "prefix-sum": (4 * n * r * e, 12 * n * r * e),
        "full": (4 * n * r * e, 12 * n * r * e),
    }[form]
    return shape.heads * (forward if way == "fwd" else train)


def nbytes(form: str, way: str, shape: Shape, chunk: int = CHUNK) -> int:
    """Bytes of all heads held at once, at most: inputs, output, gradients, features and what the form needs itself.

    An estimate, counted from what our implementations hold; measured peaks lie within a third of it.
    """
    n, d, r, e = shape.length, shape.width, shape.features, shape.extended
    summed = max(shape.itemsize, 4)
    if way == "decode":  # what there was before the step, and the step's own
        own = 2 * decode_state(r, d, summed) if form == "state" else n * shape.itemsize
        return shape.heads * (3 * n * d * shape.itemsize + own)
    train = way == "train"
    chunks = -(-n // chunk)
    if not r:
        own = {"eager": (3 if train else 2) * n * n}.get(form, n)
        mask = n * n if form == "eager" and shape.causal else 0  # a byte each, shared by the heads
        return shape.heads * ((8 if train else 4) * n * d + own) * shape.itemsize + mask
    forward, backward = {
        "chunked": (n + chunk * chunk + 2 * chunk * e + r * e, n + chunk * chunk + 2 * chunk * e + r * e),
        "batched": (3 * chunks * r * e + n * chunk + 3 * n * e, chunks * r * e + 2 * n * chunk + 2 * n * e),
        "quadratic": (n * n + n * e, 2 * n * n),
        "prefix-sum": (2 * n * r * e, 4 * n * r * e),
        "full": (r * e + 2 * n * e, r * e + 2 * n * e),
    }[form]
    # Features that outnumber d are made of several arrays as large; others of one or two.
    wide = r > d
    if train:  # q, k, v, output and gradient of v; features and their gradients
        own = 5 * n * d + (7 if wide else 4) * n * r + backward
    else:  # either the features of keys are in the making, or the output is
        own = max(3 * n * d + (5 if wide else 3) * n * r, 4 * n * d + 2 * n * r + forward)
    return shape.heads * own * shape.itemsize


def flop_crossover(width: int, features: int, chunk: int = CHUNK) -> float:
    """The n at which the chunked form takes as many FLOPs as causal softmax: (2C (r + e) + 4re) / 2d."""
    e = width + 1
    return (2 * chunk * (features + e) + 4 * features * e) / (2 * width)


def decode_break_even(width: int, features: int) -> float:
    """The n at which keys and values take as many numbers as the state: re / 2d."""
    return features * (width + 1) / (2 * width)


def decode_state(features: int, width: int, itemsize: int = 4) -> int:
    """Bytes that decoding keeps of the past, at any length: re numbers."""
    return features * (width + 1) * itemsize


def decode_cache(length: int, width: int, itemsize: int = 4) -> int:
    """Bytes of the keys and values that softmax keeps: 2nd numbers."""
    return 2 * length * width * itemsize
