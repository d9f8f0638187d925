"""Per-token losses of a causal language model, in batches, for the tokens that matter alone.

A sequence costs its forward pass through the body; only the positions whose successor is scored go through the output
layer, a chunk of rows at a time. Sequences of similar length share a batch, padded on the right without an attention
mask: a causal model never looks at what comes later, so padding changes nothing. The same property lets sequences that
begin alike, as a prompt template makes them, share the computation of their common head.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pomona.errors import UnavailableError
from pomona.runtime.device import Runtime

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pomona.models.loading import Scorer


@dataclass(frozen=True, slots=True)
class Passage:
    """A token sequence and the spans ``[start, end)`` of positions to score, ``start >= 1``.

    Token i is predicted from ``ids[:i]``. One forward pass serves all spans.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


_HEAD = 16  # tokens; sharing less costs more than it saves
_FAMILY = 4  # passages
_ROWS_ON_CPU = 128  # logits of more rows leave the cache before they are summed


def batches(lengths: Sequence[int], tokens_per_batch: int, rows: int | None = None) -> list[list[int]]:
    """Indices of sequences grouped so that each batch holds at most `tokens_per_batch` tokens, padding counted, and at
    most `rows` sequences.

    Longest first, so that threads finish together and memory runs out at once or never. A sequence longer than the
    budget has a batch of its own. The plan depends on `lengths` alone.
    """
    planned: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = planned and lengths[planned[-1][0]] * (len(planned[-1]) + 1) <= tokens_per_batch
        if fits and (rows is None or len(planned[-1]) < rows):
            planned[-1].append(index)
        else:
            planned.append([index])
    return planned


def heads(passages: Sequence[Passage]) -> list[int]:
    """For each passage the number of its first tokens that are computed once for all passages beginning with them.

    Passages whose first `_HEAD` tokens agree form a family, and the head is what the whole family has in common, short
    of the tokens that predict a scored one.
    """
    families: dict[tuple[int, ...], list[int]] = {}
    for index, passage in enumerate(passages):
        families.setdefault(passage.ids[:_HEAD], []).append(index)
    found = [0] * len(passages)
    for family in families.values():
        first = passages[family[0]].ids
        common = min(start - 1 for i in family for start, _ in passages[i].spans)
        for i in family:
            ids = passages[i].ids
            common = next((n for n in range(min(common, len(ids))) if ids[n] != first[n]), min(common, len(ids)))
        if len(family) >= _FAMILY and common >= _HEAD:
            for i in family:
                found[i] = common
    return found


def passage_nll(
    scorer: Scorer, passages: Sequence[Passage], *, tokens_per_batch: int, chunk_rows: int, rows: int | None = None
) -> list[tuple[float, ...]]:
    """Negative log-likelihood in nats, summed over each span of each passage, in order.

    Log-softmax is taken in float32 and summed in float64. A sum that is not finite comes back as NaN. A batch that does
    not fit into memory is halved and tried again.

    Raises:
        UnavailableError: a single sequence does not fit into memory.
    """
    planned, shared = _plan(scorer, passages, tokens_per_batch, rows)
    items = [([passages[i] for i in batch], shared[batch[0]], chunk_rows) for batch in planned]
    return _in_order(planned, scorer.runtime.map("nll", items), len(passages))


def _plan(
    scorer: Scorer, passages: Sequence[Passage], tokens_per_batch: int, rows: int | None
) -> tuple[list[list[int]], list[int]]:
    shared = heads(passages) if scorer.shares_heads else [0] * len(passages)
    lengths = [len(p.ids) - head for p, head in zip(passages, shared, strict=True)]
    return plan(passages, shared, lengths, tokens_per_batch, rows), shared


def plan(
    passages: Sequence[Passage], shared: Sequence[int], lengths: Sequence[int], tokens_per_batch: int, rows: int | None
) -> list[list[int]]:
    """Batches of passages with the same head, `shared` tokens of each; `lengths` are what the budget counts."""
    members: dict[tuple[int, ...], list[int]] = {}
    for index, passage in enumerate(passages):
        members.setdefault(passage.ids[: shared[index]], []).append(index)
    planned: list[list[int]] = []
    for indices in members.values():
        own = batches([lengths[i] for i in indices], tokens_per_batch, rows)
        planned += [[indices[k] for k in batch] for batch in own]
    # The longest first, so that threads and processes end together.
    planned.sort(key=lambda batch: -sum(lengths[i] for i in batch))
    return planned


def next_token_logprobs(
    scorer: Scorer,
    prompts: Sequence[tuple[int, ...]],
    candidates: Sequence[int],
    *,
    tokens_per_batch: int,
    rows: int | None = None,
) -> NDArray[np.float64]:
    """Log-probability in nats of each candidate token as the next after each prompt, shape [prompts, candidates]."""
    import numpy as np

    passages = [Passage(ids, ((len(ids), len(ids) + 1),)) for ids in prompts]
    planned, shared = _plan(scorer, passages, tokens_per_batch, rows)
    wanted = list(candidates)
    done = scorer.runtime.map("next", [([prompts[i] for i in batch], shared[batch[0]], wanted) for batch in planned])
    found = _in_order(planned, done, len(prompts))
    return np.array(found, dtype=np.float64).reshape(len(prompts), len(wanted))


def text_statistics(
    scorer: Scorer, texts: Sequence[tuple[int, ...]], *, tokens_per_batch: int
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Mean NLL of each text (nats per predicted token, shape [texts]) and the mean over its positions of the last
    hidden state (shape [texts, hidden])."""
    import numpy as np

    planned = batches([len(t) for t in texts], tokens_per_batch)
    done = scorer.runtime.map("statistics", [[texts[i] for i in batch] for batch in planned])
    rows = _in_order(planned, done, len(texts))
    return np.array([nll for nll, _ in rows]), np.array([embedding for _, embedding in rows], dtype=np.float32)


def _in_order(planned: Sequence[Sequence[int]], done: Sequence[Sequence[Any]], count: int) -> list[Any]:
    found: list[Any] = [None] * count
    for batch, rows in zip(planned, done, strict=True):
        for index, row in zip(batch, rows, strict=True):
            found[index] = row
    return found


def register(runtime: Runtime, model: Any) -> None:
    """Make `model` known to every process of `runtime` under the names that this module maps over."""
    remembered = Heads(model)
    runtime.register("nll", lambda i: halving(lambda part: _nll(model, part, remembered, i[1], i[2]), i[0]))
    runtime.register("next", lambda i: halving(lambda part: _next(model, part, remembered, i[1], i[2]), i[0]))
    runtime.register("statistics", lambda i: halving(lambda part: _statistics(model, part), i))


def shares_heads(model: Any) -> bool:
    """Whether the keys and values of a common head can be computed once: plain attention over everything before."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and not getattr(config, "sliding_window", None) and not model._is_stateful


class Heads:
    """Keys and values of the heads used last. Two threads may compute the same one; they get the same bits."""

    _KEPT = 8

    def __init__(self, model: Any) -> None:
        self._model = model
        self._caches: OrderedDict[tuple[int, ...], Any] = OrderedDict()

    def cache(self, ids: tuple[int, ...], count: int) -> Any:
        """A cache to continue `count` sequences that begin with `ids`."""
        own = copy.deepcopy(self.of(ids))
        own.batch_repeat_interleave(count)
        return own

    def of(self, ids: tuple[int, ...]) -> Any:
        """The cache of one sequence `ids`, to be read and left as it is."""
        cache = self._caches.get(ids)
        if cache is None:
            cache = self._model.base_model(
                input_ids=torch.tensor([ids], device=self._model.device), use_cache=True
            ).past_key_values
            self._caches[ids] = cache
            while len(self._caches) > self._KEPT:
                self._caches.popitem(last=False)
        return cache


def halving(
    compute: Callable[[Sequence[Any]], list[Any]],
    batch: Sequence[Any],
    hint: str = "a smaller --max-length or --chunk-rows needs less",
) -> list[Any]:
    """`compute` on the whole batch or, when memory runs out, on its halves."""
    try:
        return compute(batch)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        if len(batch) == 1:
            raise UnavailableError("out of memory on a single sequence", hint=hint) from error
    # Outside the handler, so that the failed attempt's tensors are let go first.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(batch) // 2
    return halving(compute, batch[:half], hint) + halving(compute, batch[half:], hint)


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _padded(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    width = max(map(len, sequences))
    return torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in sequences], device=device)


@torch.inference_mode()
def _nll(model: Any, passages: Sequence[Passage], heads: Heads, head: int, chunk_rows: int) -> list[tuple[float, ...]]:
    ids = _padded([p.ids[head:] for p in passages], model.device)
    spans = [(row, start - head, end - head) for row, p in enumerate(passages) for start, end in p.spans]
    rows = torch.tensor([row for row, start, end in spans for _ in range(start, end)], device=ids.device)
    columns = torch.tensor([i for _, start, end in spans for i in range(start, end)], device=ids.device)
    past = heads.cache(passages[0].ids[:head], len(passages)) if head else None
    hidden = body(model, ids, past)[rows, columns - 1]
    targets = ids[rows, columns]
    chunk = min(chunk_rows, _ROWS_ON_CPU) if ids.device.type == "cpu" else chunk_rows
    chunks = zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    nll = torch.cat([_token_nll(model, h, t) for h, t in chunks]).double().cpu()
    sums = [float(part.sum()) for part in torch.split(nll, [end - start for _, start, end in spans])]
    finite = iter(s if math.isfinite(s) else math.nan for s in sums)
    return [tuple(next(finite) for _ in p.spans) for p in passages]


def body(model: Any, ids: Tensor, past: Any = None) -> Tensor:
    """Last hidden states, shape [batch, length, hidden], after the `past` of a shared head if there is one."""
    more = {} if past is None else {"past_key_values": past}
    hidden: Tensor = model.base_model(input_ids=ids, use_cache=past is not None, **more).last_hidden_state
    return hidden


def _token_nll(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of `targets` [rows] from `hidden` [rows, hidden], float32."""
    return torch.nn.functional.cross_entropy(logits(model, hidden), targets, reduction="none")


def logits(model: Any, hidden: Tensor) -> Tensor:
    """Output layer and whatever the architecture does to its result, float32, shape [rows, vocabulary]."""
    config = model.config.get_text_config()
    logits: Tensor = model.get_output_embeddings()(hidden)
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scaling
    logits = logits.float()
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = torch.tanh(logits / cap) * cap
    return logits


@torch.inference_mode()
def check(model: Any) -> None:
    """Refuse an architecture that does more between its body and its logits than `logits` knows of.

    Raises:
        UnavailableError: a few tokens get other logits from the whole model.
    """
    ids = torch.arange(2, 10, device=model.device)[None]
    whole = model(input_ids=ids, use_cache=False).logits.float()
    if not alike(logits(model, body(model, ids)), whole, model.dtype):
        raise UnavailableError(
            f"models of type {model.config.model_type} compute their logits in a way that is not supported",
            hint="it would get wrong scores; please report the model",
        )


def alike(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits agree as far as a model that computes in `dtype` lets them; NaN agrees with NaN."""
    loose = 1e-4 if dtype is torch.float32 else 3e-2
    least = loose * float(expected.abs().nan_to_num().max())
    return torch.allclose(expected, found, rtol=loose, atol=least, equal_nan=True)


@torch.inference_mode()
def _next(
    model: Any, prompts: Sequence[tuple[int, ...]], heads: Heads, head: int, candidates: Sequence[int]
) -> list[list[float]]:
    ids = _padded([p[head:] for p in prompts], model.device)
    last = torch.tensor([len(p) - head - 1 for p in prompts], device=ids.device)
    past = heads.cache(prompts[0][:head], len(prompts)) if head else None
    hidden = body(model, ids, past)[torch.arange(len(prompts), device=ids.device), last]
    logprobs = torch.log_softmax(logits(model, hidden), dim=-1)
    rows: list[list[float]] = logprobs[:, list(candidates)].double().cpu().tolist()
    return rows


@torch.inference_mode()
def _statistics(model: Any, texts: Sequence[Sequence[int]]) -> list[tuple[float, list[float]]]:
    ids = _padded(texts, model.device)
    hidden = body(model, ids)
    found = []
    for row, text in enumerate(texts):
        states = hidden[row, : len(text)].float()
        nll = _token_nll(model, hidden[row, : len(text) - 1], ids[row, 1 : len(text)]).double()
        found.append((float(nll.mean()), states.mean(dim=0).cpu().tolist()))
    return found
