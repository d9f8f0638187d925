"""Causal language models and their tokenizers, ready to score: the embedded one, a directory, a GGUF file, a hub id.

Weights are read from safetensors or GGUF alone; pickles are refused and no code of a model's repository is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pomona.errors import MissingError, UnavailableError
from pomona.models import embedded, generation, losses
from pomona.runtime.device import Runtime


@dataclass
class Scorer:
    """A model in evaluation mode on its device, with its tokenizer.

    Attributes:
        identity: what names the model exactly, for manifests and journals: name, revision, number format.
        shares_heads: whether sequences that begin alike may share the computation of their beginning.
    """

    model: Any
    tokenizer: Any
    runtime: Runtime
    identity: dict[str, str]
    shares_heads: bool = False

    @cached_property
    def caching(self) -> generation.Caching:
        """What the model remembers while it generates."""
        return generation.caching(self.model, shares_heads=self.shares_heads)

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        max_new_tokens: int,
        *,
        tokens_per_batch: int,
        rows: int | None = None,
    ) -> list[tuple[str, int]]:
        """Greedy continuations of `prompts`: the text without special tokens, and the number of tokens generated.

        Raises:
            CheckFailed: the model's logits are not finite.
        """
        asked = [generation.Prompt(ids, max_new_tokens) for ids in prompts]
        planned = generation.plan(self, asked, tokens_per_batch=tokens_per_batch, rows=rows, foreseen=max_new_tokens)
        texts: list[tuple[str, int]] = [("", 0)] * len(prompts)
        for batch, said in zip(planned, generation.generate(self, asked, planned), strict=True):
            for place, continuation in zip(batch.places, said, strict=True):
                text = self.tokenizer.decode(continuation.ids, skip_special_tokens=True)
                texts[place] = text, len(continuation.ids)
        return texts


def load_causal_lm(
    name: str | None,
    runtime: Runtime,
    *,
    adapter: Path | None = None,
    gguf_file: str | None = None,
    revision: str | None = None,
) -> Scorer:
    """Load the model called `name` onto the device of `runtime`.

    Args:
        name: None or "smollm2" for the embedded model, a local directory, a ``.gguf`` file, else a hub id.
        adapter: a PEFT adapter directory to merge into the weights.
        gguf_file: the GGUF file inside the directory or repository `name`.

    Raises:
        MissingError: the model is not there, is incomplete, or has no safetensors.
        UnavailableError: the embedded model or `peft` is not installed.
    """
    from transformers import AutoModelForCausalLM

    place = _place(name, gguf_file, revision)
    with _explained(place):
        model, report = AutoModelForCausalLM.from_pretrained(
            place.where,
            dtype=runtime.dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,  # left unsaid, transformers asks standard input
            output_loading_info=True,
            **place.options,
        )
        tokenizer = _tokenizer(place)
    _whole(place, report, "are its files complete, and are they those of a causal language model?")
    identity = {
        "model": place.shown,
        "revision": place.revision(model.config),
        "dtype": str(runtime.dtype).removeprefix("torch."),
    }
    if adapter is not None:
        model = _with_adapter(model, adapter)
        identity["adapter"] = _directory_digest(adapter)
    model = model.to(runtime.device).eval().requires_grad_(False)
    losses.check(model)
    losses.register(runtime, model)
    generation.register(runtime, model)
    return Scorer(model, tokenizer, runtime, identity, losses.shares_heads(model))


@dataclass(frozen=True)
class Loaded:
    """A model of any kind in evaluation mode on its device, its tokenizer (None if it has none), and its identity."""

    model: Any
    tokenizer: Any
    identity: dict[str, str]


def load_model(name: str, runtime: Runtime, *, revision: str | None = None) -> Loaded:
    """Load the model called `name` as the class that its configuration names, for what reads its hidden states.

    Args:
        name: smollm2 or minilm for an embedded model, a local directory, a ``.gguf`` file, else a hub id.

    Raises:
        MissingError: the model is not there, is incomplete, or has no safetensors.
        UnavailableError: an embedded model is not installed.
    """
    import transformers

    place = _place(name, None, revision)
    config = _config(place)
    named = str((getattr(config, "architectures", None) or ["AutoModel"])[0])
    kind: Any = getattr(transformers, named, None)
    if named != "AutoModel" and not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise MissingError(f"model {place.shown}: transformers has no model class {named!r:.60}")
    with _explained(place):
        model, report = kind.from_pretrained(
            place.where,
            dtype=runtime.dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **place.options,
        )
    _whole(place, report)
    try:
        tokenizer = _tokenizer(place)
    except Exception:  # transformers raises what it likes; a model without a tokenizer is still a model
        tokenizer = None
    described = {
        "model": place.shown,
        "revision": place.revision(config),
        "dtype": str(runtime.dtype).removeprefix("torch."),
    }
    return Loaded(model.to(runtime.device).eval().requires_grad_(False), tokenizer, described)


def load_tokenizer(name: str | None, *, gguf_file: str | None = None, revision: str | None = None) -> Any:
    """The tokenizer of the model called `name`, without its weights."""
    place = _place(name, gguf_file, revision)
    with _explained(place):
        return _tokenizer(place)


def load_config(name: str | None, *, gguf_file: str | None = None, revision: str | None = None) -> Any:
    """The configuration of the model called `name`, without its weights.

    Raises:
        MissingError: the model is not there, or is incomplete.
        UnavailableError: the embedded model is not installed.
    """
    return _config(_place(name, gguf_file, revision))


def identity(name: str | None, *, gguf_file: str | None = None, revision: str | None = None) -> dict[str, str]:
    """What names the model called `name` exactly, as `Scorer.identity` does, but for the number format.

    Raises:
        MissingError: the model is not there, or is incomplete.
        UnavailableError: the embedded model is not installed.
    """
    place = _place(name, gguf_file, revision)
    return {"model": place.shown, "revision": place.revision(None if place.local else _config(place))}


def directory(name: str, *, revision: str | None = None) -> Path:
    """The directory of the model called `name`; what a hub id names is fetched, safetensors and text alone.

    Raises:
        MissingError: it is not there.
        UnavailableError: an embedded model is not installed.
    """
    place = _place(name, None, revision)
    if place.local is not None:
        return place.local
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    with _explained(place):
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


@dataclass(frozen=True)
class _Place:
    """Where a model is, and what transformers must be told to load it from there."""

    shown: str
    where: str
    options: dict[str, Any]
    local: Path | None

    def revision(self, config: Any) -> str:
        if self.local is not None:
            return _directory_digest(self.local)
        return str(getattr(config, "_commit_hash", None) or self.options.get("revision") or "unknown")


def _place(name: str | None, gguf_file: str | None, revision: str | None) -> _Place:
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    if name is None or name == embedded.NAME:
        path = embedded.smollm2()
        return _Place(embedded.NAME, str(path), {}, path)
    if name == embedded.MINILM:
        path = embedded.minilm()
        return _Place(name, str(path), {}, path)
    path = Path(name)
    if path.is_file() and path.suffix == ".gguf":
        return _Place(name, str(path.parent), {"gguf_file": path.name}, path)
    if path.is_dir():
        _complete(path, gguf_file)
        return _Place(name, name, options, path / gguf_file if gguf_file else path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix == ".gguf":
        raise MissingError(f"model {name}: no such directory", hint="give a directory, a .gguf file or a hub id")
    return _Place(name, name, {**options, **({"revision": revision} if revision else {})}, None)


def _complete(path: Path, gguf_file: str | None) -> None:
    """Refuse a directory that lacks what loading it will need, by name (MissingError)."""
    if gguf_file:
        if not (path / gguf_file).is_file():
            raise MissingError(f"model {path}: {gguf_file} is missing")
        return
    if not (path / "config.json").is_file():
        raise MissingError(f"model {path}: config.json is missing", hint="is this a transformers model directory?")
    if (path / "model.safetensors").is_file():
        return
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise MissingError(f"model {path}: {index.name} is damaged") from error
        lacking = [shard for shard in shards if not (path / shard).is_file()]
        if lacking:
            raise MissingError(
                f"model {path}: {len(lacking)} of {len(shards)} shards missing: {', '.join(lacking[:5])}"
            )
        return
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    if pickles:
        raise MissingError(
            f"model {path}: its weights are a pickle ({pickles[0]}), which can run code when loaded",
            hint="convert it to safetensors on a machine where you trust it: model.save_pretrained(FOLDER)",
        )
    raise MissingError(f"model {path}: model.safetensors is missing")


def _whole(place: _Place, report: Mapping[str, Any], hint: str = "are its files complete?") -> None:
    """Refuse a model that transformers would leave in part random (MissingError)."""
    if lacking := sorted(report["missing_keys"]):
        raise MissingError(
            f"model {place.shown}: {len(lacking)} weights are missing, among them {lacking[0]}", hint=hint
        )


class _explained:
    """Turn what transformers raises while loading into one line."""

    def __init__(self, place: _Place) -> None:
        self._place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            hint = None if self._place.local else "a hub id needs a network or a local copy; a directory works offline"
            raise MissingError(f"model {self._place.shown}: cannot be loaded: {lines[0]}", hint=hint) from error


def _config(place: _Place) -> Any:
    from transformers import AutoConfig

    with _explained(place):
        return AutoConfig.from_pretrained(place.where, trust_remote_code=False, **place.options)


def _tokenizer(place: _Place) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place.where, trust_remote_code=False, **place.options)
    words = len(tokenizer) - len(set(tokenizer.all_special_ids))
    if words <= 0:  # what transformers makes of a directory without the files
        raise ValueError("its tokenizer has no vocabulary: the tokenizer's files are missing")
    return tokenizer


def _with_adapter(model: Any, adapter: Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UnavailableError("--adapter needs the package peft", hint="pip install 'pomona[merge]'") from error
    if not (adapter / "adapter_config.json").is_file():
        raise MissingError(f"adapter {adapter}: adapter_config.json is missing")
    if not (adapter / "adapter_model.safetensors").is_file():
        raise MissingError(f"adapter {adapter}: adapter_model.safetensors is missing (pickles are not loaded)")
    return PeftModel.from_pretrained(model, str(adapter), use_safetensors=True).merge_and_unload()


def _directory_digest(path: Path) -> str:
    """SHA-256 over names and contents of the files that decide what a model computes."""
    sha = hashlib.sha256()
    files = (
        [path]
        if path.is_file()
        else sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors", ".jinja"))
    )
    for file in files:
        sha.update(file.name.encode())
        with file.open("rb") as content:
            sha.update(hashlib.file_digest(content, "sha256").digest())
    return sha.hexdigest()
