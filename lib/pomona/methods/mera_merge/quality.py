"""What a merge did to what the adapters compute: site by site, and through their base model.

What loads models is imported where that is done: a merge alone is over before transformers would be there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch

from pomona.errors import DataError, MissingError, UnavailableError, UsageError
from pomona.methods.mera_merge import compatibility, peft_format
from pomona.methods.mera_merge.adapters import Adapter, Bottleneck
from pomona.methods.mera_merge.bottleneck import attach, nonlinearity
from pomona.methods.mera_merge.config import Config
from pomona.methods.mera_merge.fewshot.inputs import longest
from pomona.runtime.progress import Progress
from pomona.runtime.settings import Settings

if TYPE_CHECKING:
    from pomona.models.drift import Batch, Drift
    from pomona.models.loading import Loaded
    from pomona.runtime.device import Runtime

_PROBES = 512
BATCH = 16


@dataclass(frozen=True)
class Base:
    """The model that the adapters sit in, and the texts it reads to measure them."""

    loaded: Loaded
    runtime: Runtime
    batches: list[Batch]
    sources: list[Mapping[str, Any]]


def load_base(config: Config, settings: Settings) -> Base:
    """Load ``--base-model`` and read ``--calib``.

    Raises:
        MissingError: either is not there, or the model has no tokenizer.
        UsageError: ``--max-length`` is more than the model can read.
    """
    from pomona.models import drift, texts
    from pomona.models.loading import load_model
    from pomona.runtime.device import Runtime

    assert config.base_model is not None
    # Differences are what is looked for here, and tuning needs small gradients.
    dtype = "float32" if settings.dtype == "auto" else settings.dtype
    runtime = Runtime.open(settings.device, dtype, settings.seed)
    loaded = load_model(config.base_model, runtime)
    if loaded.tokenizer is None:
        raise MissingError(f"model {config.base_model}: it has no tokenizer, and texts must be read")
    check_length(config, loaded.model.config)
    read = texts.read_texts(config.calib, config.calib_samples)
    batches = drift.batches(
        loaded.tokenizer, read, max_length=config.max_length, batch_size=settings.batch_size or BATCH
    )
    named = {"name": f"base model {loaded.identity['model']}", "sha256": loaded.identity["revision"]}
    return Base(loaded, runtime, batches, [named, texts.digest(config.calib)])


def check_length(config: Config, described: Any) -> None:
    """Refuse a ``--max-length`` of more tokens than the model that `described` configures can read (UsageError)."""
    most = longest(described)
    if most is not None and config.max_length > most:
        raise UsageError(f"--max-length is {config.max_length}; the base model reads {most} tokens at most")


def activations(
    base: Base, adapters: Sequence[Adapter], act: Literal["pre", "post"], progress: Progress
) -> dict[str, dict[str, torch.Tensor]]:
    """Of each adapter, by label and site, what its units do on the base's texts, (tokens, r)."""
    from pomona.methods.mera_merge.capture import capture

    progress.start("activations", len(adapters))
    found = {}
    for adapter in adapters:
        found[adapter.label] = capture(base.loaded.model, adapter, base.batches, act=act)
        progress.advance()
    return found


def function_errors(merged: Adapter, parts: Sequence[Adapter], weights: Sequence[float]) -> dict[str, float]:
    """At each site, how far the merged bottleneck is from the weighted sum of what the parts put out.

    The relative L2 distance on Gaussian input of unit variance, as a layer norm's output is, with a seed of its own.
    Adapters that compute the same, in whatever order of units, come to 0 when they are matched and weights sum to 1.

    Raises:
        DataError: the nonlinearity is none that is known.
    """
    named = str(merged.settings["non_linearity"])
    phi = nonlinearity(named.lower())
    if phi is None:
        raise DataError(f"non_linearity is {named!r:.40}: no such activation")
    every = [part.sites() for part in parts]
    errors = {}
    for name, site in merged.sites().items():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(_PROBES, site.down.shape[1], generator=generator, dtype=torch.float64)
        due = torch.zeros(_PROBES, site.up.shape[0], dtype=torch.float64)
        for weight, sites in zip(weights, every, strict=True):
            due += weight * _output(sites[name], x, phi)
        distance = torch.linalg.vector_norm(_output(site, x, phi) - due)
        norm = float(torch.linalg.vector_norm(due))
        errors[name] = float(distance) / norm if norm else float(distance)
    return errors


def _output(site: Bottleneck, x: torch.Tensor, phi: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    hidden = phi(x @ site.down.double().T + site.down_bias.double())
    return hidden @ site.up.double().T + site.up_bias.double()


def model_drift(base: Base, before: Adapter, after: Adapter, progress: Progress) -> Drift:
    """How far the base with `after` is from the base with `before`, on the base's texts.

    Raises:
        DataError: an adapter does not fit the model.
        CheckFailed: an output is not finite.
    """
    from pomona.models import drift

    first, second = _with(base, before), _with(base, after)
    return drift.measure(first, second, base.batches, labels=(before.label, after.label), progress=progress)


def _with(base: Base, adapter: Adapter) -> Any:
    """A twin of the base with the adapter in it; they share their weights unless the adapter may change them."""
    model = base.loaded.model
    shared: dict[int, Any] = {}
    if _adds_only(adapter):
        shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    model = copy.deepcopy(model, shared)
    if adapter.kind == "bottleneck":
        attach(model, adapter)
        return model
    return _with_peft(model, adapter)


def _adds_only(adapter: Adapter) -> bool:
    try:
        compatibility.check_plain(adapter)
    except DataError:
        return False
    return True


def _with_peft(model: Any, adapter: Adapter) -> Any:
    """`model` with a LoRA or (IA)^3 adapter beside its weights, from the adapter's own directory."""
    try:
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        hint = "pip install 'pomona[merge]', or leave --base-model out"
        raise UnavailableError("LoRA and (IA)³ adapters run through the package peft", hint=hint) from error

    try:
        adapted = PeftModel.from_pretrained(model, str(adapter.path), use_safetensors=True).get_base_model()
    except (ValueError, RuntimeError, KeyError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"adapter {adapter.label} does not fit the base model: {line}", hint="is it the model it was trained on?"
        ) from error
    # PEFT leaves a layer that its file lacks at random, and drops what the model lacks.
    places = {name for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)}
    if apart := sorted(places ^ peft_format.module_names(adapter.tensors).keys()):
        having, lacking = ("model", "adapter") if apart[0] in places else ("adapter", "model")
        raise DataError(
            f"adapter {adapter.label} does not fit the base model: the {having} has {apart[0]}, the {lacking} has not",
            hint="is it the model it was trained on?",
        )
    return adapted
