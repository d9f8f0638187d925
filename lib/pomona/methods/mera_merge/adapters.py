"""Adapters as they lie in directories: AdapterHub's bottlenecks, and LoRA and (IA)^3 as PEFT writes them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from pomona.errors import DataError, MissingError, UsageError
from pomona.io.atomic import writing
from pomona.io.manifest import file_digest
from pomona.methods.mera_merge import adapterhub, peft_format
from pomona.methods.mera_merge.storage import Stored, read_json

Kind = Literal["bottleneck", "lora", "ia3"]

_CONFIG = "adapter_config.json"
_LABEL = re.compile(r"[\w.+@-]+")
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---", re.DOTALL)
_LICENCE = re.compile(r"^licen[cs]e:(?:[ \t]*\[|\s*-)?[ \t]*[\"']?([\w.+-]{1,64})", re.MULTILINE)


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """One site of a bottleneck adapter: h <- h + up φ(down h + down_bias) + up_bias.

    Attributes:
        down: (r, d).
        down_bias: (r,).
        up: (d, r).
        up_bias: (d,).
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter with all that its directory says of it.

    Attributes:
        config: ``adapter_config.json`` as read.
        tensors: by their names in the file, in its order, those of the prediction head left out.
        head: the prediction head, empty where there is none.
        head_config: AdapterHub's ``head_config.json``.
        inputs: ``{"name": "LABEL/file", "bytes", "sha256"}`` of every file read.
        base: what the configuration calls the base model, None where it does not say.
        licence: as the front matter of its README.md or the configuration states, None where neither does.
    """

    label: str
    path: Path
    kind: Kind
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    head: Mapping[str, Tensor] = field(default_factory=dict)
    head_config: Mapping[str, Any] | None = None
    inputs: Sequence[Mapping[str, Any]] = ()
    base: str | None = None
    licence: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Of a bottleneck adapter: where it sits and how it computes, with what older files leave out filled in."""
        return adapterhub.settings(self.config)

    def sites(self) -> dict[str, Bottleneck]:
        """The bottlenecks by the module they follow, such as ``encoder.layer.0.output``; none of LoRA and (IA)^3.

        That is the tensors' names without the adapter's own name, without their last parts, and without a prefix that
        all share and that tells a model with a head from one without (``bert.``, ``roberta.``, ``model.``).

        Raises:
            DataError: its projections are not plain matrices (Compacter).
        """
        if self.kind != "bottleneck":
            return {}
        if self.settings["phm_layer"]:
            raise DataError(f"adapter {self.label}: phm_layer is set: its projections are products of shared factors")
        return {
            site: Bottleneck(**{part: self.tensors[name] for part, name in names.items()})
            for site, names in adapterhub.site_names(self.tensors, self.config).items()
        }


def read(argument: str, *, allow_pickle: bool) -> Adapter:
    """The adapter of ``PATH`` or ``NAME=PATH``; without a name, its directory's is its label.

    Args:
        allow_pickle: read ``pytorch_adapter.bin`` too, by torch's weights-only loader.

    Raises:
        MissingError: the directory, one of its files or one of its tensors is missing, damaged or a pickle.
        DataError: it is no adapter that can be merged, or its parameters are not finite.
        UsageError: the argument or the label is empty.
    """
    try:
        return _read(*_named(argument), allow_pickle=allow_pickle)
    except OSError as error:
        raise MissingError(f"adapter {argument}: cannot be read: {error.strerror}") from error


def with_sites(adapter: Adapter, sites: Mapping[str, Bottleneck], label: str) -> Adapter:
    """`adapter` with new values in its bottlenecks, cast to its own number formats; all other tensors stay.

    Raises:
        ValueError: `sites` are not those of the adapter, or have other shapes.
    """
    names = adapterhub.site_names(adapter.tensors, adapter.config)
    if names.keys() != sites.keys():
        raise ValueError(f"sites {sorted(names.keys() ^ sites.keys())} are not in both")
    tensors = dict(adapter.tensors)
    for site, parts in names.items():
        for part, name in parts.items():
            value = getattr(sites[site], part)
            if value.shape != tensors[name].shape:
                raise ValueError(f"{name}: shape {tuple(value.shape)} for {tuple(tensors[name].shape)}")
            tensors[name] = value.to(tensors[name].dtype)
    return dataclasses.replace(adapter, label=label, tensors=tensors)


def write(folder: Path, adapter: Adapter) -> None:
    """Write `adapter` into `folder` in the format it was read from, tensors as safetensors.

    Raises:
        OutputError: a file cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _format(adapter).write(folder, adapter.config, _stored(adapter))


def size(adapter: Adapter) -> int:
    """Bytes of the files of tensors that `write` writes."""
    return sum(map(len, _format(adapter).weights(_stored(adapter)).values()))


def _format(adapter: Adapter) -> Any:
    return adapterhub if adapter.kind == "bottleneck" else peft_format


def _stored(adapter: Adapter) -> Stored:
    return Stored(adapter.kind, adapter.tensors, adapter.head, adapter.head_config, (), adapter.base)


def _named(argument: str) -> tuple[str, Path]:
    if not argument:
        raise UsageError("the name of an adapter is empty", hint="give PATH or NAME=PATH")
    name, equals, rest = argument.partition("=")
    if equals and not name:
        raise UsageError(f"{argument}: the name is empty", hint="give PATH or NAME=PATH")
    if equals and _LABEL.fullmatch(name) and not Path(argument).is_dir():
        return name, Path(rest)
    folder = Path(argument)
    return (folder.resolve().name if folder.name in ("", "..") and folder.is_dir() else folder.name), folder


def _read(label: str, folder: Path, *, allow_pickle: bool) -> Adapter:
    if not folder.is_dir():
        raise MissingError(f"adapter {label}: {folder}: no such directory", hint="give PATH or NAME=PATH")
    config_path = folder / _CONFIG
    if not config_path.is_file():
        inner = sorted(path.parent.name for path in folder.glob(f"*/{_CONFIG}"))
        hint = f"its folders {', '.join(inner[:5])} are adapters" if inner else "is this the directory of an adapter?"
        raise MissingError(f"adapter {label}: {_CONFIG} is missing", hint=hint)
    config = read_json(config_path, label)
    stored = _reader(config, label)(folder, config, label, allow_pickle=allow_pickle)
    for name, tensor in (*stored.tensors.items(), *stored.head.items()):
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise DataError(f"adapter {label}: {name} has numbers that are not finite")
    licence, said = _licence(folder, config)
    files = [config_path, *stored.files, *said]
    return Adapter(
        label=label,
        path=folder,
        kind=cast(Kind, stored.kind),
        config=config,
        tensors=stored.tensors,
        head=stored.head,
        head_config=stored.head_config,
        inputs=[{"name": f"{label}/{path.name}", **file_digest(path)} for path in files],
        base=stored.base,
        licence=licence,
    )


def _reader(config: Mapping[str, Any], label: str) -> Any:
    if "peft_type" in config:
        return peft_format.read
    if isinstance(config.get("name"), str) and "config" in config:
        return adapterhub.read
    raise DataError(
        f"adapter {label}: {_CONFIG} is neither AdapterHub's nor PEFT's",
        hint='the first has "name" and "config", the second "peft_type"',
    )


def _licence(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, list[Path]]:
    """The licence that a directory states, and the file that states it."""
    card = folder / "README.md"
    if card.is_file():
        front = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
        said = _LICENCE.search(front[1]) if front else None
        if said:
            return said[1], [card]
    for name in ("license", "licence"):
        if isinstance(config.get(name), str):
            return " ".join(config[name].split())[:64] or None, []
    return None, []
