"""Models whose experts are merged into one before they are used: MEO (He et al., EMNLP 2023, arXiv 2310.09832).

This is one file, needing torch and transformers alone, because it is also copied into the directory of a converted
model, where ``AutoModel*.from_pretrained(folder, trust_remote_code=True)`` reads it. `pomona` itself imports its own.
It is part of Pomona, under the Apache License 2.0.

**What is computed.** With n experts W_j, b_j of one linear map and gates g that sum to 1 and are zero but for k of
them, the merged map is σ(Ŵ x + b̂) with Ŵ = Σ g_j W_j and b̂ = Σ g_j b_j: the sum comes before the nonlinearity, and x
passes through one map whatever k is (`MergedLinear`). Run as a mixture, the outputs Σ g_j (W_j x + b_j) are summed
instead. The gates come from a noisy top-k network (`NoisyTopK`, Shazeer et al. 2017) that sees one vector for the whole
task, or the mean of a sequence (`level`); at the token level a small bottleneck rewrites the tokens first
(`TokenBlock`). `MergedExperts` does the same to the feed-forward experts of a mixture, by its own router.

Linear experts merged and mixed are the same up to rounding at the levels of task and sequence. At the token level they
are not, and share only a name: run as a mixture, every token has gates of its own, as in the released MoE class.

**Names of tensors** in a converted dense model, for a linear map of d inputs and f outputs called <map> in the source,
n experts, token reduction r:

    <map>.weight            (n, f, d)   the experts; three axes, so that plain transformers refuses to load them
    <map>.bias              (n, f)      where the source has one
    <map>.gate.weight       (n, m)      m = d, or max(1, 128 // r) at the task level
    <map>.gate.noise        (n, m)
    <map>.token.down.weight (w, d)      w = max(1, d // r), at the token level alone
    <map>.token.down.bias   (w,)
    <map>.token.up.weight   (d, w)
    <map>.token.up.bias     (d,)
    <map>.task.embedding.weight (t, 128)  t distinct tokens of the task's description, at the task level alone
    <map>.task.reduce.weight    (m, 128)
    <map>.task.reduce.bias      (m,)

GPT-2's maps are stored transposed, as above. In Llama-like models up_proj has no gate: it shares gate_proj's, as it
shares its input. A mixture keeps the names of its source, and gains <block>.token.* at the token level.

**The block "meo"** of config.json, beside `auto_map`:

    level            "sequence", "token" or, for models that were dense, "task"
    experts          n
    selected         k
    run_as           "meo" (merge) or "moe" (mix); a mixture run as "moe" is the source itself
    scope            what the gates of a decoder see: "prompt", "segment:LEN", or "sequence" with compat alone;
                     an encoder's always see the sequence
    token_reduction  r
    compat           "none", or "reference": BERT and BART without biases, gates that see padding, future tokens
    task_tokens      ids of the task's description, or null
    mass             of a mixture whose gates do not sum to 1: "keep" or "one"

Anything else in the block is left alone.

**Scopes of a decoder.** At the scope "sequence" the gate of every token would see the tokens after it. Hence:

- prompt: the gates see the prompt and are frozen afterwards, and so are the merged maps, which stay with the cache.
  The prompt is what `generate` is given, or the columns that `prompted` declares, or what is passed first with a cache
  or ``use_cache=True``, or, where `labels` are passed, the tokens before the first that is scored. Failing all these it
  is the first token, so that no logit of a plain forward pass depends on a later token. The prompt of a decoder behind
  an encoder is its start token, and a sequence classifier's is the whole text.
- segment:LEN: the gates of a segment see the segment before it (Lory, arXiv 2405.03133), those of the first segment its
  first token. Positions count from the first token that is not padding.
"""

from __future__ import annotations

import functools
import inspect
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

F = TypeVar("F", bound=Callable[..., Any])

TASK_WIDTH = 128  # of the embedding of a task's description (released code: description_size)
MERGED_AT_ONCE = 2**28  # bytes of merged weights that one map makes at a time; more sequences go through in turns
ALIKE = 1e-6  # gates as close as this are the same: equal sequences differ as much by their places in a batch
KEPT_WITH_CACHE = 2**31  # bytes of merged weights that stay with one cache; later maps merge again at every step


# --- what a model is converted into ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The block "meo" of a config, as the docstring of this file tells it."""

    level: str = "sequence"
    experts: int = 8
    selected: int = 2
    run_as: str = "meo"
    scope: str = "sequence"
    token_reduction: int = 64
    compat: str = "none"
    task_tokens: tuple[int, ...] | None = None
    mass: str = "keep"

    @classmethod
    def read(cls, meo: Any) -> Settings:
        """The settings that `meo`, a mapping, holds.

        Raises:
            ValueError: it is none, or a value in it is none that this file knows.
        """
        if not isinstance(meo, Mapping):
            raise ValueError('the config has no block "meo"; is this the config of a converted model?')
        given = {entry.name: meo[entry.name] for entry in fields(cls) if entry.name in meo}
        if isinstance(given.get("task_tokens"), list):
            given["task_tokens"] = tuple(given["task_tokens"])
        return cls(**given)

    def __post_init__(self) -> None:
        allowed = {
            "level": ("sequence", "token", "task"),
            "run_as": ("meo", "moe"),
            "compat": ("none", "reference"),
            "mass": ("keep", "one"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"meo.{name} is {getattr(self, name)!r}; expected one of {', '.join(values)}")
        for name, most in (("experts", None), ("selected", self.experts), ("token_reduction", None)):
            number = getattr(self, name)
            if type(number) is not int or number < 1 or (most is not None and number > most):
                limit = "from 1" if most is None else f"from 1 to the {most} experts"
                raise ValueError(f"meo.{name} is {number!r}; expected a whole number {limit}")
        tokens = self.task_tokens
        if tokens is not None and not (isinstance(tokens, tuple) and all(type(token) is int for token in tokens)):
            raise ValueError(f"meo.task_tokens is {tokens!r}; expected a list of token ids, or null")
        if self.level == "task" and not tokens:
            raise ValueError("meo.task_tokens is empty; the task level needs a description of the task")
        if self.scope not in ("sequence", "prompt") and not self.segment:
            raise ValueError(f"meo.scope is {self.scope!r}; expected sequence, prompt or segment:LEN")

    @property
    def segment(self) -> int:
        """The LEN of ``segment:LEN``, 0 of the other scopes."""
        found = re.fullmatch("segment:([1-9][0-9]{0,8})", str(self.scope))
        return int(found[1]) if found else 0

    @property
    def token_gates(self) -> bool:
        """Whether every token has gates of its own: the token level of a vanilla mixture (released MoE class)."""
        return self.run_as == "moe" and self.level == "token"


_BERT = r"(?P<stack>.*?)encoder\.layer\.\d+\.(?:intermediate|output)\.dense"
_LLAMA = r"(?P<stack>.*?)layers\.\d+\.mlp\.(?:gate_proj|up_proj|down_proj)"
DENSE = {  # the linear maps that experts replace, and the stack of layers that they belong to
    "bert": _BERT,
    "roberta": _BERT,
    "gpt2": r"(?P<stack>.*?)h\.\d+\.mlp\.(?:c_fc|c_proj)",
    "t5": r"(?P<stack>(?:.*\.)?(?:encoder|decoder)\.)block\.\d+\.layer\.\d+\.DenseReluDense\.(?:wi|wi_0|wi_1|wo)",
    "bart": r"(?P<stack>(?:.*\.)?(?:encoder|decoder)\.)layers\.\d+\.(?:fc1|fc2)",
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
}
MIXTURES = {  # the blocks of experts, likewise
    **dict.fromkeys(("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"), r"(?P<stack>.*?)layers\.\d+\.mlp"),
    "switch_transformers": r"(?P<stack>(?:.*\.)?(?:encoder|decoder)\.)block\.\d+\.layer\.\d+\.mlp",
}


def maps(model_type: str, names: Iterable[str]) -> dict[str, str]:
    """The names, among those of modules, of the linear maps that experts replace, each with that of its stack.

    Raises:
        ValueError: models of this type cannot be upcycled.
    """
    if model_type not in DENSE:
        raise ValueError(f"a model of type {model_type} cannot be upcycled; types that can: {', '.join(DENSE)}")
    return _matches(DENSE[model_type], names)


def has_gate(name: str) -> bool:
    """Whether the linear map called `name` has a gate of its own: up_proj shares that of gate_proj."""
    return not name.endswith("up_proj")


def keeps_bias(model_type: str, compat: str) -> bool:
    """Whether experts have biases where their source has; the released code loses those of BERT and BART."""
    return compat != "reference" or model_type not in ("bert", "bart")


def _matches(pattern: str, names: Iterable[str]) -> dict[str, str]:
    found = {name: re.fullmatch(pattern, name) for name in names}
    return {name: match["stack"].rstrip(".") for name, match in found.items() if match}


# --- gates -----------------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """The gates of some rows; a row is a sequence, a segment, a token, or all that shares a task."""

    scores: Tensor  # (rows, n): every row sums to 1 and is zero but for the chosen
    chosen: Tensor  # (rows, k) int64

    def pick(self, rows: Tensor | slice) -> Choice:
        """Those of `rows`."""
        return Choice(self.scores[rows], self.chosen[rows])


def top_k(logits: Tensor, k: int) -> Choice:
    """Softmax over the `k` largest of `logits` (rows, n), zero elsewhere; among equals the first are chosen."""
    ranked = logits.sort(dim=-1, descending=True, stable=True)
    chosen = ranked.indices[:, :k]
    return Choice(torch.zeros_like(logits).scatter(1, chosen, ranked.values[:, :k].softmax(-1)), chosen)


def _in_float32(function: F) -> F:
    """`function` as it is, where mixed precision would have its matrix products rounded."""

    @functools.wraps(function)
    def exact(*args: Any) -> Any:
        device = next(each.device.type for each in args if isinstance(each, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args)

    return cast(F, exact)


class NoisyTopK(nn.Module):
    """Noisy top-k gating (Shazeer et al. 2017, eq. 3-5; released MEO code): both matrices start at zero.

    Logits are x W_gate, and in training x W_gate + N(0, 1) (softplus(x W_noise) + 0.01).

    Attributes:
        balance: in training, importance and load of the experts in the last batch, (2, n).
    """

    def __init__(self, width: int, settings: Settings) -> None:
        super().__init__()
        self.selected = settings.selected
        self.weight = nn.Parameter(torch.zeros(settings.experts, width))
        self.noise = nn.Parameter(torch.zeros(settings.experts, width))
        self.balance: Tensor | None = None

    @_in_float32
    def forward(self, features: Tensor, real: Tensor | None = None) -> Choice:
        """Gates of `features` (rows, width); rows that are not `real` (rows,) weigh nothing in importance and load."""
        features = _wide(features)
        clean = features @ self.weight.to(features.dtype).T
        if not self.training:
            self.balance = None
            return top_k(clean, self.selected)
        spread = functional.softplus(features @ self.noise.to(features.dtype).T) + 0.01
        logits = clean + spread * self._normal(clean)
        choice = top_k(logits, self.selected)
        both = torch.stack((choice.scores, _load(clean, logits, spread, choice)))
        self.balance = (both if real is None else both * real[:, None]).sum(1)
        return choice

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn_like(like)


def _load(clean: Tensor, logits: Tensor, spread: Tensor, choice: Choice) -> Tensor:
    """P(an expert is among the k, were its own noise drawn again), (rows, n); Shazeer et al. 2017, appendix A."""
    k = choice.chosen.shape[1]
    if k == clean.shape[1]:
        return torch.ones_like(clean)
    largest = logits.topk(k + 1).values
    selected = torch.zeros_like(logits, dtype=torch.bool).scatter(1, choice.chosen, True)
    rival = torch.where(selected, largest[:, k:], largest[:, k - 1 : k])
    probability: Tensor = torch.special.ndtr((clean - rival) / spread)
    return probability


def load_balancing_loss(model: nn.Module, weight: float = 0.01) -> Tensor:
    """weight · Σ (CV²(importance) + CV²(load)) over the gates of `model` in the last training batch (released code).

    It is zero at the task level, where all samples share their gates and balance is not wanted, and outside training.
    A model's own loss never has it.
    """
    kept = [gate.balance for gate in model.modules() if isinstance(gate, NoisyTopK) and gate.balance is not None]
    if not kept:
        return torch.zeros((), device=next(model.parameters()).device)
    return weight * imbalance(torch.stack(kept))


def imbalance(sums: Tensor) -> Tensor:
    """CV²(importance) + CV²(load), summed over gates: `sums` is (..., 2, n); 0 of a single expert.

    CV² is the unbiased variance over the squared mean + 1e-10.
    """
    if sums.shape[-1] == 1:
        return sums.sum() * 0.0
    return (sums.var(-1) / (sums.mean(-1).square() + 1e-10)).sum()


class TaskDescription(nn.Module):
    """What a task-level gate sees: the mean over the description's tokens of a narrow map of their embeddings."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        tokens = sorted(set(settings.task_tokens or ()))
        self.places = [tokens.index(token) for token in settings.task_tokens or ()]
        self.embedding = nn.Embedding(len(tokens), TASK_WIDTH)
        self.reduce = nn.Linear(TASK_WIDTH, task_features(settings))

    def forward(self) -> Tensor:
        """(1, m)."""
        features: Tensor = self.reduce(self.embedding.weight[self.places]).mean(0, keepdim=True)
        return features


def task_features(settings: Settings) -> int:
    """Width m of what a task-level gate sees (released code: 128 // reduction)."""
    return max(1, TASK_WIDTH // settings.token_reduction)


class TokenBlock(nn.Module):
    """x + Up(ReLU(Down(x))), the paper's token-level attention block (released code): the identity at first."""

    def __init__(self, width: int, settings: Settings) -> None:
        super().__init__()
        self.down = nn.Linear(width, max(1, width // settings.token_reduction))
        self.up = nn.Linear(self.down.out_features, width)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        rewritten: Tensor = x + self.up(functional.relu(self.down(x)))
        return rewritten


def additions(settings: Settings, width: int) -> nn.ModuleDict:
    """What a linear map of `width` inputs gains besides its experts: gate, and task or token at those levels."""
    at_task = settings.level == "task"
    added: dict[str, nn.Module] = {"gate": NoisyTopK(task_features(settings) if at_task else width, settings)}
    if at_task:
        added["task"] = TaskDescription(settings)
    if settings.level == "token":
        added["token"] = TokenBlock(width, settings)
    return nn.ModuleDict(added)


# --- merging ---------------------------------------------------------------------------------------------------------


class Merged(NamedTuple):
    """Merged weights of some rows, one per group of rows whose gates are equal."""

    weights: tuple[Tensor, ...]  # each (groups, ...)
    group: Tensor | None  # (rows,) int64: the group of a row; None where there is one group, or one for every row


def merge(experts: Tensor | Sequence[Tensor], choice: Choice) -> Tensor:
    """Σ_j g_j W_j of n `experts` (n, ...) for every row of gates, (rows, ...): summed in float32, then rounded once."""
    if torch.is_grad_enabled():
        return _product(experts if isinstance(experts, Tensor) else torch.stack(list(experts)), choice.scores)
    rows, k = choice.chosen.shape
    if k == 1:  # its gate is 1
        if isinstance(experts, Tensor):
            only = int(choice.chosen[0, 0])
            return experts[only : only + 1] if rows == 1 else experts[choice.chosen[:, 0]]
        return torch.stack([experts[j] for j in choice.chosen[:, 0].tolist()])
    n = len(experts)
    if isinstance(experts, Tensor) and rows > 1 and 4 * k > n:
        return _product(experts, choice.scores)  # reads every expert once for all rows
    out = experts[0].new_empty((rows, *experts[0].shape))
    for row, chosen, scores in zip(out, choice.chosen.tolist(), choice.scores.tolist(), strict=True):
        total = _wide(row)
        torch.mul(_wide(experts[chosen[0]]), scores[chosen[0]], out=total)
        for j in chosen[1:]:
            total.add_(experts[j], alpha=scores[j])
        row.copy_(total)
    return out


@_in_float32
def _product(experts: Tensor, scores: Tensor) -> Tensor:
    """The same as one matrix product over all experts, of which those that are not chosen weigh nothing."""
    flat = experts.flatten(1)
    wide = torch.promote_types(flat.dtype, torch.float32)
    if flat.dtype == wide:
        product = scores.to(wide) @ flat
    else:  # in pieces, so that the experts are never all there twice
        pieces = [flat[:, at : at + 2**20] for at in range(0, flat.shape[1], 2**20)]
        product = torch.cat([(scores @ piece.to(wide)).to(flat.dtype) for piece in pieces], 1)
    return product.view(-1, *experts.shape[1:])


def grouped(choice: Choice) -> tuple[Choice, Tensor | None]:
    """The distinct rows of `choice`, and the group that each row belongs to; rows within `ALIKE` count as equal."""
    rows = len(choice.scores)
    if not 1 < rows <= 1024 or torch.is_grad_enabled():
        return choice, None
    near = torch.cdist(choice.scores, choice.scores, p=torch.inf) <= ALIKE
    leader = near.fill_diagonal_(True).to(torch.uint8).argmax(1)  # the first row like this one
    leaders, group = torch.unique(leader, return_inverse=True)
    if len(leaders) == rows:
        return choice, None
    return choice.pick(leaders), group if len(leaders) > 1 else None


# --- what gates may see ----------------------------------------------------------------------------------------------


class Open(NamedTuple):
    """The segment that the next token of each row falls into."""

    total: Tensor  # (rows, d): sum of its tokens
    filled: Tensor  # (rows,): how many they are


@dataclass
class Held:
    """What the gates of one map have settled on during a generation, for the rows of its cache."""

    choice: Choice
    merged: dict[str, Merged] = field(default_factory=dict)  # by the map's name
    open: Open | None = None  # where gates go by segments
    common: bool = False  # whether one row stands for all of the cache, as at the task level

    def select(self, rows: Tensor) -> None:
        """Follow a cache whose rows were reordered or repeated."""
        if self.common:
            return
        self.choice = self.choice.pick(rows)
        if self.open is not None:
            self.open = Open(self.open.total[rows], self.open.filled[rows])
        for name, (weights, group) in self.merged.items():
            if len(weights[0]) > 1:
                self.merged[name] = Merged(weights, rows if group is None else group[rows])


@dataclass
class Memory:
    """What all gates of a stack have settled on, kept with the cache of keys and values of a generation."""

    held: dict[str, Held] = field(default_factory=dict)  # by the map's name
    length: int = 0  # of the cache, in tokens

    @property
    def size(self) -> int:
        """Bytes of the merged weights."""
        kept = [merged for held in self.held.values() for merged in held.merged.values()]
        return sum(weight.nbytes for merged in kept for weight in merged.weights)

    def select(self, rows: Tensor) -> None:
        for held in self.held.values():
            held.select(rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        """A copy that goes its own way; tensors are shared, since none is ever changed in place."""
        copies = {key: replace(held, merged=dict(held.merged)) for key, held in self.held.items()}
        return Memory(copies, self.length)


@functools.cache
def _remembering(base: Any) -> Any:
    """The class of caches `base`, whose memory follows when rows are reordered, repeated or selected."""

    class Remembering(base):  # type: ignore[misc]
        meo_memory: Memory

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self.meo_memory.select(beam_idx)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            for held in self.meo_memory.held.values():
                rows = torch.arange(len(held.choice.scores), device=held.choice.scores.device)
                held.select(rows.repeat_interleave(repeats))

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self.meo_memory.select(indices)

    Remembering.__name__ = Remembering.__qualname__ = base.__name__
    return Remembering


class Pass(NamedTuple):
    """One pass through a stack of layers."""

    mask: Tensor | None = None  # (B, past + S): what is no padding
    prompt: int | None = None  # columns; None where nobody has said
    labels: Tensor | None = None  # (B, S), of a causal language model whose loss is asked for
    prefill: bool = False  # whether it is the first with a cache
    memory: Memory | None = None


class Scene:
    """What the gates of one stack of layers may see of what passes through it now.

    Attributes:
        scope: "sequence" of an encoder, else that of the settings.
        whole: whether all the text is the prompt, as a sequence classifier's is.
        now: the pass that goes on; after one in training it stays for those who compute activations again.
        prompt: columns that passes to come are told; 0 where the first of them shall say.
        labels: those that the model was called with.
    """

    def __init__(self, settings: Settings, *, causal: bool, whole: bool) -> None:
        self.causal = causal
        self.scope = settings.scope if causal else "sequence"
        self.frozen = causal and (self.scope == "prompt" or settings.level == "task")
        self.remembers = self.frozen or bool(causal and settings.segment)
        self.padding_counts = settings.compat == "reference"
        self.whole = whole
        self.now = Pass()
        self.prompt: int | None = None
        self.labels: Tensor | None = None
        self._names: list[str] = []
        self._names_of_model: list[str] = []

    def watch(self, stack: nn.Module) -> None:
        """Look at every pass through `stack`."""
        self._names = list(inspect.signature(stack.forward).parameters)
        stack.register_forward_pre_hook(self._begin, with_kwargs=True)
        stack.register_forward_hook(self._end, always_call=True)

    def watch_labels(self, model: nn.Module) -> None:
        """Look at the labels that `model`, a causal language model, is given."""
        self._names_of_model = list(inspect.signature(model.forward).parameters)
        model.register_forward_pre_hook(self._take_labels, with_kwargs=True)
        model.register_forward_hook(self._drop_labels, always_call=True)

    def _take_labels(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.labels = (dict(zip(self._names_of_model, args, strict=False)) | kwargs).get("labels")

    def _drop_labels(self, *_: Any) -> None:
        self.labels = None

    def _begin(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        mask, cache = given.get("attention_mask"), given.get("past_key_values")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise ValueError("gates need an attention mask of two axes; use a dynamic cache, and no packed sequences")
        past = 0 if cache is None else int(cache.get_seq_length())
        if self.prompt == 0:
            shown = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
            self.prompt = 1 if shown is None else shown.shape[1]
        self.now = Pass(
            mask=mask,
            prompt=self.prompt,
            labels=self.labels,
            prefill=past == 0 and (cache is not None or given.get("use_cache") is True),
            memory=self._recall(cache, past) if self.remembers and not _learns(stack) else None,
        )

    def _recall(self, cache: Any, past: int) -> Memory:
        memory: Memory | None = getattr(cache, "meo_memory", None) if past else Memory()
        if memory is None:
            raise ValueError("the cache was filled by another model: it says nothing of this model's gates")
        if not self.frozen and memory.length != past:
            raise ValueError(f"the cache was cut from {memory.length} tokens to {past}; segments cannot follow")
        return memory

    def _end(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        memory, cache = self.now.memory, getattr(output, "past_key_values", None)
        if not _learns(stack):
            self.now = Pass()
        if memory is None or not isinstance(cache, transformers.Cache):
            return
        if not hasattr(cache, "meo_memory"):
            kind: Any = type(cache)
            cache.__class__ = _remembering(kind)
        cache.meo_memory = memory
        memory.length = int(cache.get_seq_length())

    def real(self, x: Tensor) -> Tensor | None:
        """Which tokens of `x` (B, S, d) are no padding, (B, S) bool; None where all are."""
        mask = self.now.mask
        return None if mask is None else mask[:, -x.shape[1] :].to(x.device) != 0

    def seen(self, x: Tensor) -> Tensor | None:
        """Which tokens of `x` (B, S, d) a gate of its whole may see, (B, S) bool; None where it may see all."""
        real = self.real(x)
        if self.scope == "sequence":
            return None if self.padding_counts else real
        now = self.now
        if self.whole or (now.prefill and now.prompt is None):
            return real
        columns = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        real = torch.ones_like(columns, dtype=torch.bool) if real is None else real
        end: Tensor | int = now.prompt or 0
        if now.prompt is None and now.labels is not None:
            scored = functional.pad(now.labels[:, 1:] != -100, (1, 1), value=True)
            scored[:, 0] = False  # nothing comes before the first token to predict it
            end = scored.to(torch.uint8).argmax(1, keepdim=True).to(x.device)
        return real & ((columns < end) | (real.cumsum(1) == 1))

    def held(self, key: str) -> Held | None:
        """What the map called `key` has settled on."""
        return None if self.now.memory is None else self.now.memory.held.get(key)

    def hold(self, key: str, held: Held) -> None:
        """Keep `held` for the next pass with the same cache."""
        if self.now.memory is not None:
            self.now.memory.held[key] = held

    def keep(self, held: Held, name: str, merged: Merged) -> None:
        """Keep the merged weights of the map called `name`, while a generation goes on and there is room."""
        memory = self.now.memory
        if memory is None or not (self.now.prefill or memory.length):
            return
        if memory.size + sum(weight.nbytes for weight in merged.weights) <= KEPT_WITH_CACHE:
            held.merged[name] = merged


def _learns(stack: nn.Module) -> bool:
    return stack.training and torch.is_grad_enabled()


@contextmanager
def prompted(model: nn.Module, columns: int) -> Iterator[None]:
    """Within it, the first `columns` of what a decoder is given are its prompt; 0: all that its first pass is given."""
    scenes = list({id(part.scene): part.scene for part in model.modules() if isinstance(part, Gated)}.values())
    before = [scene.prompt for scene in scenes]
    for scene in scenes:
        scene.prompt = columns if scene.causal else None
    try:
        yield
    finally:
        for scene, prompt in zip(scenes, before, strict=True):
            scene.prompt = prompt


# --- modules ---------------------------------------------------------------------------------------------------------


@dataclass
class Routed:
    """Tokens in rows, the gates of each row, and the way back."""

    x: Tensor  # (rows, tokens, d)
    choice: Choice
    back: Callable[[Tensor], Tensor]  # (rows, tokens, f) -> (B, S, f)
    held: Held | None = None


class Gated(nn.Module):
    """A map with experts, merged or mixed; `install` says what its gates may see (`scene`) and how it is called."""

    scene: Scene
    name: str
    settings: Settings
    gate: Any  # where it shares that of another map, it has none
    task: Any
    token: Any

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, d) -> (B, S, f)."""
        return self.carry(self.choose(x))

    def score(self, features: Tensor, real: Tensor | None = None) -> Choice:
        """The gates of rows with `features` (rows, m); those that are not `real` are not counted."""
        raise NotImplementedError

    def stacked(self) -> tuple[Tensor | Sequence[Tensor], ...]:
        """The weights that are merged, n of each kind."""
        raise NotImplementedError

    def run(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """(rows, tokens, d) through the merged `weights` of every row."""
        raise NotImplementedError

    def mix(self, x: Tensor, choice: Choice) -> Tensor:
        """Σ_j g_j E_j(x), the outputs of a vanilla mixture."""
        raise NotImplementedError

    def choose(self, x: Tensor) -> Routed:
        """The gates of `x` (B, S, d)."""
        batch, length, width = x.shape
        if self.token is not None:
            x = self.token(x)
        if self.settings.token_gates:
            real = self.scene.real(x)
            choice = self.score(x.reshape(-1, width), None if real is None else real.flatten())
            return Routed(x.reshape(-1, 1, width), choice, lambda y: y.view(batch, length, -1))
        held = self.scene.held(self.name)
        if self.task is not None:
            held = held or Held(self.score(self.task()), common=True)
            self.scene.hold(self.name, held)
            self.gate.balance = None  # one gate for all is what is wanted here
            return Routed(x.reshape(1, -1, width), held.choice, lambda y: y.view(batch, length, -1), held)
        if self.scene.causal and self.settings.segment:
            return self._by_segment(x, held)
        if held is None:
            held = Held(self.score(masked_mean(x, self.scene.seen(x))))
            if self.scene.frozen:
                self.scene.hold(self.name, held)
        return Routed(x, held.choice, lambda y: y, held)

    def _by_segment(self, x: Tensor, held: Held | None) -> Routed:
        """Gates of every segment from the mean of the one before, of the first from the first token."""
        batch, length, width = x.shape
        real = self.scene.real(x)
        if real is None:
            real = torch.ones(batch, length, dtype=torch.bool, device=x.device)
        if held is not None and length == 1:
            return self._next_token(x, real, held)
        size = self.settings.segment
        start = real.new_zeros(batch, dtype=torch.int64) if held is None else _open(held).filled
        end = start + real.sum(1)
        count = max(1, -(-int(end.max()) // size))  # segments, the one that is open already among them
        # Every row is laid out from the start of its open segment; padding goes to a place behind the last.
        place = torch.where(real, start[:, None] + real.cumsum(1) - 1, count * size)
        laid = x.new_zeros(batch, count * size + 1, width).scatter(1, place[:, :, None].expand_as(x), x)[:, :-1]
        sums = _wide(laid).view(batch, count, size, width).sum(2)
        if held is not None:
            sums = torch.cat((sums[:, :1] + _open(held).total[:, None], sums[:, 1:]), 1)
        tokens = (end[:, None] - size * torch.arange(count, device=x.device)).clamp(0, size)  # of a segment
        # What the gates see of segments 0 to count, the last of which has no token yet.
        features = torch.cat((_wide(laid[:, :1]), sums / tokens.clamp(min=1)[:, :, None]), 1)
        choice = self.score(features.flatten(0, 1), functional.pad(tokens > 0, (0, 1)).flatten())
        gates = [part.view(batch, count + 1, -1) for part in choice]
        if held is not None:
            gates = [torch.cat((old[:, None], new[:, 1:]), 1) for old, new in zip(held.choice, gates, strict=True)]
        rows, opened = torch.arange(batch, device=x.device), end // size
        total = torch.where((opened < count)[:, None], sums[rows, opened.clamp(max=count - 1)], 0.0)
        now = Choice(*(part[rows, opened] for part in gates))
        self.scene.hold(self.name, Held(now, open=Open(total, end % size)))

        def back(y: Tensor) -> Tensor:
            y = functional.pad(y.reshape(batch, count * size, -1), (0, 0, 0, 1))
            return y.gather(1, place[:, :, None].expand(-1, -1, y.shape[2]))

        by_row = Choice(*(part[:, :count].flatten(0, 1) for part in gates))
        return Routed(laid.reshape(batch * count, size, width), by_row, back)

    def _next_token(self, x: Tensor, real: Tensor, held: Held) -> Routed:
        """One more token: it passes by the gates of the open segment, and may fill it."""
        size = self.settings.segment
        total = _open(held).total + _wide(x[:, 0]) * real
        filled = _open(held).filled + real[:, 0]
        full = filled == size
        after = replace(held, open=Open(total, filled))  # with the same merged weights, those to come included
        if full.any():
            pairs = zip(self.score(total / size), held.choice, strict=True)
            choice = Choice(*(torch.where(full[:, None], new, old) for new, old in pairs))
            after = Held(choice, open=Open(torch.where(full[:, None], 0.0, total), filled % size))
        self.scene.hold(self.name, after)
        return Routed(x, held.choice, lambda y: y, held)

    def carry(self, routed: Routed) -> Tensor:
        """The routed tokens through the experts, merged or mixed."""
        x, choice, back, held = routed.x, routed.choice, routed.back, routed.held
        if self.settings.run_as == "moe":
            return back(self.mix(x, choice))
        kept = None if held is None else held.merged.get(self.name)
        if kept is not None:
            return back(self._through(x, kept))
        distinct, group = grouped(choice)
        size = sum(_nbytes(each) for each in self.stacked()) // self.settings.experts
        turns = max(1, MERGED_AT_ONCE // size)
        if len(distinct.scores) <= turns:
            merged = Merged(tuple(merge(each, distinct) for each in self.stacked()), group)
            if held is not None:
                self.scene.keep(held, self.name, merged)
            return back(self._through(x, merged))
        parts = []
        for at in range(0, len(x), turns):
            few, gates = x[at : at + turns], choice.pick(slice(at, at + turns))
            if torch.is_grad_enabled():  # merge again for the gradients rather than keep what was merged
                parts.append(checkpoint(self._merge_and_run, few, *gates, use_reentrant=False))
            else:
                parts.append(self._merge_and_run(few, *gates))
        return back(torch.cat(parts))

    def _merge_and_run(self, x: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        distinct, group = grouped(Choice(scores, chosen))
        return self._through(x, Merged(tuple(merge(each, distinct) for each in self.stacked()), group))

    def _through(self, x: Tensor, merged: Merged) -> Tensor:
        weights, group = merged
        rows, tokens, width = x.shape
        if len(weights[0]) == 1:
            return self.run(x.reshape(1, -1, width), weights).view(rows, tokens, -1)
        if group is None:
            return self.run(x, weights)
        order, sizes = group.argsort(), group.bincount(minlength=len(weights[0])).tolist()
        pieces = [
            self.run(x[some].reshape(1, -1, width), tuple(weight[place : place + 1] for weight in weights))
            for place, some in enumerate(torch.split(order, sizes))
        ]
        passed = torch.cat([piece.view(-1, tokens, piece.shape[2]) for piece in pieces])
        return torch.empty_like(passed).index_copy(0, order, passed)


class MergedLinear(Gated):
    """n linear maps in the place of one: what an expert is in the paper's released code; `linear` n times at first."""

    def __init__(self, linear: Any, settings: Settings, *, gate: bool = True, bias: bool = True) -> None:
        super().__init__()
        weight = linear.weight.detach() if isinstance(linear, nn.Linear) else linear.weight.detach().T  # Conv1D
        self.settings = settings
        self.weight = nn.Parameter(weight.repeat(settings.experts, 1, 1))
        self.bias = None
        if bias and linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().repeat(settings.experts, 1))
        self.gate = self.task = self.token = None
        if gate:
            for name, module in additions(settings, weight.shape[1]).to(weight.device, weight.dtype).items():
                setattr(self, name, module)

    def score(self, features: Tensor, real: Tensor | None = None) -> Choice:
        choice: Choice = self.gate(features, real)
        return choice

    def stacked(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def run(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        weight, bias = weights if len(weights) == 2 else (weights[0], None)
        if len(weight) == 1:
            return functional.linear(x, weight[0], None if bias is None else bias[0])
        return x @ weight.mT if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)

    def mix(self, x: Tensor, choice: Choice) -> Tensor:
        out = _wide(x.new_zeros(*x.shape[:2], self.weight.shape[1]))
        for j, weight in enumerate(self.weight):
            rows = (choice.chosen == j).any(1).nonzero().squeeze(1)
            passed = functional.linear(x[rows], weight, None if self.bias is None else self.bias[j])
            out = out.index_add(0, rows, _wide(passed) * choice.scores[rows, j, None, None].to(out.dtype))
        return out.to(x.dtype)


class SharedGateMLP(nn.Module):
    """A Llama-like feed-forward layer, whose gate_proj and up_proj share their input, hence their gate."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = source.gate_proj, source.up_proj, source.down_proj
        self.act_fn = source.act_fn

    def forward(self, x: Tensor) -> Tensor:
        routed = self.gate_proj.choose(x)
        inner = self.act_fn(self.gate_proj.carry(routed)) * self.up_proj.carry(routed)
        out: Tensor = self.down_proj(inner)
        return out


class MergedExperts(Gated):
    """The feed-forward experts of a mixture, merged by its own router on the mean of what the scope shows.

    An expert has its nonlinearity inside, so merging approximates the mixture; with equal experts it is exact. The
    merge needs gates that sum to 1. Where the source's do not, a token's mass, the sum of its own top-k probabilities,
    multiplies the output (``mass: keep``). Shared experts see the tokens as they came. Switch's capacity, which drops
    tokens, has no meaning here, and router jitter is left out.
    """

    router: Any
    experts: Any
    shared_expert: Any
    shared_expert_gate: Any

    def __init__(self, block: nn.Module, width: int, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.task = None
        for name, child in block.named_children():
            setattr(self, name, child)
        self.switch = hasattr(self, "router")
        self.mass = settings.mass == "keep" and not getattr(self._router, "norm_topk_prob", not self.switch)
        first = next(block.parameters())
        self.token = TokenBlock(width, settings).to(first.device, first.dtype) if settings.level == "token" else None

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        # Called for every model, as some tell what their routers said; on a copy in training, where Switch's alters it.
        routed = self._router(x.clone() if self.training else x)[1]
        if self.mass:
            out = out * routed.reshape(*x.shape[:2], -1).sum(-1, keepdim=True).to(out.dtype)
        if hasattr(self, "shared_expert"):
            out = out + functional.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return out

    @property
    def _router(self) -> Any:
        return self.router if self.switch else self.gate

    @_in_float32
    def score(self, features: Tensor, real: Tensor | None = None) -> Choice:
        router = self.router.classifier if self.switch else self.gate
        bias = getattr(router, "bias", None)
        logits = functional.linear(features, _wide(router.weight), None if bias is None else _wide(bias))
        return top_k(logits, self.settings.selected)

    def stacked(self) -> tuple[Tensor | Sequence[Tensor], ...]:
        if self.switch:
            every = list(self.experts.values())
            return [expert.wi.weight for expert in every], [expert.wo.weight for expert in every]
        return self.experts.gate_up_proj, self.experts.down_proj

    def run(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        into, out = weights
        inner = _each(x, into)
        if self.switch:
            expert = self.experts["expert_0"]
            return _each(expert.dropout(expert.act(inner)), out)
        gate, up = inner.chunk(2, dim=-1)
        return _each(self.experts.act_fn(gate) * up, out)


def _each(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ of every row."""
    return functional.linear(x, weight[0]) if len(weight) == 1 else x @ weight.mT


def masked_mean(x: Tensor, seen: Tensor | None) -> Tensor:
    """The mean of the tokens of `x` (B, S, d) that are `seen` (B, S), in float32 or better, (B, d)."""
    x = _wide(x)
    if seen is None:
        return x.mean(1)
    weights = seen.to(x.dtype)
    return (weights[:, None] @ x).squeeze(1) / weights.sum(1, keepdim=True).clamp(min=1)


def _open(held: Held) -> Open:
    assert held.open is not None
    return held.open


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _nbytes(experts: Tensor | Sequence[Tensor]) -> int:
    return experts.nbytes if isinstance(experts, Tensor) else sum(each.nbytes for each in experts)


# --- models ----------------------------------------------------------------------------------------------------------


def install(model: Any, meo: Mapping[str, Any]) -> Any:
    """Give `model`, a transformers model, experts in place, as the block `meo` says; returns it.

    A dense model's maps become n copies, with fresh gates; a mixture's experts are merged. The model is then of a
    subclass of its class, of the same name, which `save_pretrained` writes together with this file.

    Raises:
        ValueError: the model's type is not known, it has experts already, or the block does not fit it.
    """
    _convert(model, Settings.read(meo))
    model.config.meo = dict(meo)
    kind: Any = type(model)
    model.__class__ = converted_class(kind)
    return model


@functools.cache
def converted_class(base: Any) -> Any:
    """The transformers class `base` with the experts that a config's block "meo" says."""

    class Converted(base):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            _convert(self, Settings.read(getattr(config, "meo", None)))

        def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            given = [inputs, kwargs.get("inputs_embeds"), kwargs.get("input_ids")]
            shown = next((each for each in given if each is not None), None)
            columns = 0 if shown is None or self.config.is_encoder_decoder else shown.shape[1]
            with prompted(self, columns):
                return super().generate(inputs, *args, **kwargs)

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
            self.config.auto_map = auto_map(self.config)
            super().save_pretrained(save_directory, *args, **kwargs)
            if kwargs.get("is_main_process", True):
                shutil.copyfile(__file__, Path(save_directory) / "modeling_meo.py")

        @classmethod
        def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
            _complete(model, info["missing_keys"])
            return (model, info) if output_loading_info else model

    Converted.__name__ = Converted.__qualname__ = base.__name__
    return Converted


def _convert(model: Any, settings: Settings) -> None:
    config, kind = model.config, model.config.model_type
    modules = dict(model.named_modules())
    if any(isinstance(module, Gated) for module in modules.values()):
        raise ValueError("the model has merged experts already")
    if getattr(config, "chunk_size_feed_forward", 0):
        raise ValueError("chunk_size_feed_forward must be 0: gates see whole sequences")
    if kind in MIXTURES:
        if settings.level == "task":
            raise ValueError("a mixture has no gate for the task level; merge its experts once instead")
        if settings.run_as == "moe":
            return
        blocks = _matches(MIXTURES[kind], modules)
        stacks = {name: stack for name, stack in blocks.items() if hasattr(modules[name], "experts")}
    else:
        stacks = maps(kind, modules)
    if not stacks:
        raise ValueError(f"nothing to convert in a {type(model).__name__}")
    scenes = {name: _scene(model, name, settings) for name in dict.fromkeys(stacks.values())}
    for name, stack in stacks.items():
        old = modules[name]
        new: Gated
        if kind in MIXTURES:
            if (n := _count(old)) != settings.experts:
                raise ValueError(f"meo.experts is {settings.experts}, but {name} has {n}")
            new = MergedExperts(old, config.hidden_size, settings)
        else:
            new = MergedLinear(old, settings, gate=has_gate(name), bias=keeps_bias(kind, settings.compat))
        new.scene, new.name = scenes[stack], name
        new.train(model.training)
        model.set_submodule(name, new)
    for name in dict.fromkeys(name.removesuffix(".gate_proj") for name in stacks if name.endswith(".gate_proj")):
        model.set_submodule(name, SharedGateMLP(modules[name]).train(model.training))
    for name, scene in scenes.items():
        scene.watch(model.get_submodule(name))
    if not config.is_encoder_decoder and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        for scene in scenes.values():
            scene.watch_labels(model)


def _complete(model: Any, missing: Iterable[str]) -> None:
    """See that a checkpoint lacked nothing of what is merged; the token blocks of a mixture start as the identity."""
    for name, module in model.named_modules():
        if not isinstance(module, Gated):
            continue
        lacking = {each for each in missing if each.startswith(f"{name}.")}
        if isinstance(module, MergedExperts) and module.token is not None:
            block = {f"{name}.token.{each}" for each, _ in module.token.named_parameters()}
            if block <= lacking:
                nn.init.zeros_(module.token.up.weight)
                lacking -= block
        if lacking:
            raise ValueError(f"{min(lacking)} is missing; are these the files of a converted model?")


def _scene(model: Any, stack: str, settings: Settings) -> Scene:
    kind, config = model.config.model_type, model.config
    if kind in ("bert", "roberta"):
        causal = bool(config.is_decoder)
    elif kind in ("t5", "bart", "switch_transformers"):
        causal = stack.endswith("decoder")
    else:
        causal = True
    sees_ahead = causal and settings.scope == "sequence" and settings.level != "task" and not settings.token_gates
    if sees_ahead and settings.compat != "reference":
        raise ValueError('at the scope "sequence" a decoder\'s gates see later tokens; use "prompt" or "segment:LEN"')
    return Scene(settings, causal=causal, whole=type(model).__name__.endswith("ForSequenceClassification"))


def _count(block: Any) -> int:
    experts = block.experts
    return len(experts) if isinstance(experts, nn.ModuleDict) else len(experts.gate_up_proj)


class _Auto:
    """What ``from_pretrained(..., trust_remote_code=True)`` of the Auto class named after it finds in `auto_map`."""

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, config: Any, **kwargs: Any) -> Any:
        return cls._of(config).from_pretrained(folder, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return cls._of(config)._from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: `save_pretrained` writes `auto_map` itself."""

    @classmethod
    def _of(cls, config: Any) -> Any:
        return converted_class(_auto(cls)._model_mapping[type(config)])


class MeoModel(_Auto):
    """AutoModel."""


class MeoModelForCausalLM(_Auto):
    """AutoModelForCausalLM."""


class MeoModelForMaskedLM(_Auto):
    """AutoModelForMaskedLM."""


class MeoModelForSeq2SeqLM(_Auto):
    """AutoModelForSeq2SeqLM."""


class MeoModelForSequenceClassification(_Auto):
    """AutoModelForSequenceClassification."""


class MeoModelForTokenClassification(_Auto):
    """AutoModelForTokenClassification."""


class MeoModelForQuestionAnswering(_Auto):
    """AutoModelForQuestionAnswering."""


def _auto(cls: type[_Auto]) -> Any:
    return getattr(transformers, cls.__name__.replace("Meo", "Auto", 1))


def auto_map(config: Any) -> dict[str, str]:
    """The entry "auto_map" of a converted model's config.json: its Auto classes, and where they are."""
    able = [cls for cls in _Auto.__subclasses__() if type(config) in _auto(cls)._model_mapping]
    return {_auto(cls).__name__: f"modeling_meo.{cls.__name__}" for cls in able}
