"""The pre-experience stage: a brief model that has met each kind of instruction once (paper section 2.1).

Instructions are embedded by the base model and clustered; a few of middling perplexity are taken from each cluster; one
epoch over their answers makes the brief model that scores.
"""

from __future__ import annotations

import hashlib
import math
import random
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch

from pomona.errors import CheckFailed, DataError, MissingError, OutputError, UsageError
from pomona.io.atomic import atomic_directory, locked, writing
from pomona.io.conversation import Turn
from pomona.methods.ifd_score.config import Config, Recipe
from pomona.methods.ifd_score.passages import Codec, Ids, Sample
from pomona.methods.ifd_score.templates import Template
from pomona.models.loading import Scorer
from pomona.models.losses import batches, text_statistics
from pomona.runtime.progress import Progress
from pomona.runtime.settings import Settings

MARKER = "experience.json"
_WARM_UP = 0.03  # of the steps; with the cosine schedule and the norm of 1 this is Alpaca's training recipe
_MAX_NORM = 1.0
_IGNORED = -100


def described(config: Config, recipe: Recipe, settings: Settings) -> dict[str, Any]:
    """What a brief model's directory must agree on to be used again. The records it was made from are not among it."""
    return {
        "model": settings.model or "smollm2",
        "revision": config.revision,
        "gguf_file": config.gguf_file,
        "template": recipe.template,
        "max_length": recipe.max_length,
        "bos": recipe.bos,
        "clusters": config.clusters,
        "per_cluster": config.per_cluster,
        "ppl_band": config.ppl_band,
        "learning_rate": config.learning_rate,
        "train_batch": config.train_batch,
        "seed": settings.seed,
    }


def finished(directory: Path, wanted: Mapping[str, Any], *, overwrite: bool) -> dict[str, Any] | None:
    """The record of the brief model in `directory`, or None when it is still to be made.

    Raises:
        UsageError: other settings made it.
        OutputError: the directory holds something else.
        MissingError: its record cannot be read.
    """
    marker = directory / MARKER
    if not marker.exists():
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise OutputError(f"--experience {directory} exists and holds no brief model", hint="name a new directory")
        return None
    try:
        entry: dict[str, Any] = orjson.loads(marker.read_bytes())
        found = dict(entry["settings"])
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise MissingError(f"{marker}: not a record of a brief model", hint="remove it, or name another") from error
    differing = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    if differing and not overwrite:
        key = differing[0]
        raise UsageError(
            f"--experience {directory} was made with {key} = {found.get(key)!r}, now it is {wanted.get(key)!r}",
            hint="name another directory, or --overwrite to make it again",
        )
    return None if differing else entry


def make(
    directory: Path,
    records: Sequence[tuple[Turn, ...]],
    scorer: Scorer,
    template: Template,
    codec: Codec,
    config: Config,
    recipe: Recipe,
    settings: Settings,
    progress: Progress,
    *,
    tokens_per_batch: int,
) -> dict[str, Any]:
    """Train the brief model on a sample of `records` and save it at `directory`; `scorer` is changed on the way.

    Raises:
        DataError: no record can be learned from.
        CheckFailed: a loss is not finite; nothing is saved.
        OutputError: the directory cannot be written.
    """
    with locked(directory), atomic_directory(directory) as partial:
        chosen = sample(records, scorer, template, codec, config, recipe, progress, tokens_per_batch=tokens_per_batch)
        examples = training_examples([records[i] for i in chosen], template, codec, recipe)
        if not examples:
            raise DataError("--experience: none of the chosen records has an answer within the maximal length")
        progress.note(f"pre-experience: {len(chosen)} records chosen, {len(examples)} of them can be learned from")
        losses = brief_epoch(
            scorer,
            examples,
            batch=config.train_batch,
            learning_rate=config.learning_rate,
            seed=settings.seed,
            tokens_per_batch=tokens_per_batch,
            progress=progress,
        )
        entry = {
            "settings": described(config, recipe, settings),
            "base": dict(scorer.identity),
            "records": len(records),
            "records_sha256": content_digest(records),
            "chosen": chosen,
            "learned": len(examples),
            "losses": losses,
        }
        with writing(directory):
            scorer.model.save_pretrained(partial)
            scorer.tokenizer.save_pretrained(partial)
            (partial / MARKER).write_bytes(orjson.dumps(entry, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    return entry


def sample(
    records: Sequence[tuple[Turn, ...]],
    scorer: Scorer,
    template: Template,
    codec: Codec,
    config: Config,
    recipe: Recipe,
    progress: Progress,
    *,
    tokens_per_batch: int,
) -> list[int]:
    """Indices of the records that the brief model learns from, cluster by cluster."""
    texts = [ids[: recipe.max_length] for ids in codec.encode([template.instruction(turns) for turns in records])]
    known = [index for index, ids in enumerate(texts) if len(ids) > 1]  # one token has nothing to predict it from
    if not known:
        raise DataError("--experience: the input holds no instruction to learn from")
    progress.start("embedding instructions", len(known))
    nll, embeddings = text_statistics(scorer, [texts[i] for i in known], tokens_per_batch=tokens_per_batch)
    progress.advance(len(known))
    if not np.isfinite(embeddings).all():
        raise CheckFailed("--experience: the model's hidden states are not finite; its weights are damaged")
    with np.errstate(over="ignore"):
        ppl = np.exp(np.asarray(nll, dtype=np.float64))
    labels = clusters(embeddings, config.clusters)
    return [known[i] for i in cluster_sample(labels, ppl, per_cluster=config.per_cluster, band=config.band)]


def clusters(embeddings: np.ndarray, count: int) -> np.ndarray:
    """k-means labels of `embeddings` [n, hidden] as the reference makes them, with at most n clusters."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # n_init was 10 when the paper was written and is 1 since scikit-learn 1.4. One thread: the order in which several
    # add up their shares is not fixed.
    model = KMeans(n_clusters=min(count, len(embeddings)), random_state=0, n_init=10)
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # equal instructions: fewer clusters than asked for
        labels: np.ndarray = model.fit(embeddings).labels_
    return labels


def cluster_sample(labels: np.ndarray, ppl: np.ndarray, *, per_cluster: int, band: tuple[float, float]) -> list[int]:
    """Records of middling perplexity, evenly spaced over each cluster in index order.

    A cluster with fewer than `per_cluster` members is taken whole, a band with fewer likewise. Non-finite perplexities
    are left out before anything is counted.
    """
    chosen: list[int] = []
    for label in np.unique(labels):
        members = np.flatnonzero((labels == label) & np.isfinite(ppl))
        if len(members) >= per_cluster:
            low, high = np.percentile(ppl[members], band)
            members = members[(ppl[members] >= low) & (ppl[members] <= high)]
        if len(members) >= per_cluster:
            members = members[:: len(members) // per_cluster][:per_cluster]
        chosen.extend(int(i) for i in members)
    return chosen


def training_examples(
    records: Iterable[tuple[Turn, ...]], template: Template, codec: Codec, recipe: Recipe
) -> list[tuple[Ids, int]]:
    """Token ids of prompt, last answer and end of text, cut at the maximal length, and where the answer starts."""
    found = [Sample(template.prompt(turns), turns[-1].output) for turns in records]
    prompts = codec.encode([one.prompt for one in found])
    wholes = codec.encode([one.prompt + one.answer for one in found])
    end = () if codec.eos is None else (codec.eos,)
    cut = [(whole + end)[: recipe.max_length] for whole in wholes]
    return [
        (ids, max(len(prompt), 1))
        for one, prompt, ids in zip(found, prompts, cut, strict=True)
        if one.answer and max(len(prompt), 1) < len(ids)
    ]


def brief_epoch(
    scorer: Scorer,
    examples: Sequence[tuple[Ids, int]],
    *,
    batch: int,
    learning_rate: float,
    seed: int,
    tokens_per_batch: int,
    progress: Progress,
) -> list[float]:
    """One epoch of next-token training on the answers; returns the mean loss of each step (nats per answer token).

    A step's gradient is that of the mean over all answer tokens of its batch, however it is split for memory.

    Raises:
        CheckFailed: a loss or a gradient is not finite.
    """
    from transformers import get_cosine_schedule_with_warmup

    model, device = scorer.model.requires_grad_(True), scorer.runtime.device
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    steps = [order[i : i + batch] for i in range(0, len(order), batch)]
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    # The schedule starts at 0: a single step would learn nothing.
    warm_up = math.ceil(_WARM_UP * len(steps)) if len(steps) > 1 else 0
    schedule = get_cosine_schedule_with_warmup(optimiser, warm_up, len(steps))
    losses: list[float] = []
    progress.start("brief experience", len(steps))
    torch.manual_seed(seed)
    single = torch.get_num_threads()
    torch.set_num_threads(max(single, scorer.runtime.threads))  # a step is one computation, not several side by side
    model.train()
    for number, members in enumerate(steps, start=1):
        answer_tokens = sum(len(examples[i][0]) - examples[i][1] for i in members)
        total = 0.0
        for part in batches([len(examples[i][0]) for i in members], tokens_per_batch):
            loss = _answer_nll(model, [examples[members[k]] for k in part], device) / answer_tokens
            scorer.runtime.accelerator.backward(loss)
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_NORM)
        if not (math.isfinite(total) and math.isfinite(norm.item())):
            raise CheckFailed(f"--experience: loss not finite at step {number} of {len(steps)}; nothing was saved")
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(total)
        progress.advance()
    model.eval().requires_grad_(False)
    torch.set_num_threads(single)
    return losses


def _answer_nll(model: Any, examples: Sequence[tuple[Ids, int]], device: torch.device) -> torch.Tensor:
    """Summed NLL of the answers' tokens; right padding, which a causal model never sees."""
    longest = max(len(ids) for ids, _ in examples)
    inputs = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full((len(examples), longest), _IGNORED)
    for row, (ids, start) in enumerate(examples):
        inputs[row, : len(ids)] = torch.tensor(ids)
        labels[row, start : len(ids)] = inputs[row, start : len(ids)]
    logits = model(input_ids=inputs.to(device), use_cache=False).logits[:, :-1]
    targets = labels[:, 1:].to(device)
    scored = targets != _IGNORED
    return torch.nn.functional.cross_entropy(logits[scored].float(), targets[scored], reduction="sum")


def content_digest(records: Sequence[tuple[Turn, ...]]) -> str:
    """SHA-256 over the texts of all records, in order."""
    sha = hashlib.sha256()
    for turns in records:
        sha.update(orjson.dumps([[turn.instruction, turn.input, turn.output] for turn in turns]))
    return sha.hexdigest()
