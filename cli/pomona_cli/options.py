"""Dataclasses become options, in one place.

Every option of every command is a field of a frozen dataclass: its type, default and help are written there, once.
Typer gets a signature made from those fields in which every default is None, so that "not given" can be told from
"given the default"; what a user gave beats the configuration file, which beats the field's default.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
import math
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer

from pomona.errors import MissingError, UsageError

T = TypeVar("T")

_SHORT = {"output": "-o", "dry_run": "-n", "quiet": "-q", "verbose": "-v", "run_as": "--as"}


@dataclasses.dataclass(frozen=True)
class Face:
    """How the command meets its user; nothing here changes a result."""

    config: Annotated[Path | None, "read options from this TOML or JSON file; flags win over it"] = None
    dump_config: Annotated[bool, "print the options in effect as JSON, for --config, and stop"] = False
    quiet: Annotated[bool, "errors only"] = False
    verbose: Annotated[bool, "tell decisions and timings too"] = False
    color: Annotated[Literal["auto", "always", "never"], "colour on standard error; auto obeys NO_COLOR"] = "auto"
    debug: Annotated[bool, "show tracebacks"] = False

    def __post_init__(self) -> None:
        if self.quiet and self.verbose:
            raise UsageError("--quiet and --verbose exclude each other")


def hints(owner: type[Any]) -> dict[str, tuple[Any, str]]:
    """Type and help text of each field of a dataclass whose fields are ``Annotated[type, "help"]``."""
    found = typing.get_type_hints(owner, include_extras=True)
    return {f.name: (get_args(found[f.name])[0], get_args(found[f.name])[1]) for f in dataclasses.fields(owner)}


def parameters(owner: type[Any], panel: str) -> list[inspect.Parameter]:
    """Typer parameters for the fields of `owner`, shown under `panel`: its own first, then inherited ones.

    Those inherited from a class that names a `panel` of its own are shown under that.
    """
    panels = {name: vars(base).get("panel", panel) for base in owner.__mro__ for name in inspect.get_annotations(base)}
    made = []
    described = hints(owner)
    own = inspect.get_annotations(owner)
    for field in sorted(dataclasses.fields(owner), key=lambda field: field.name not in own):
        kind, text = described[field.name]
        flag = f"--{field.name.replace('_', '-')}"
        names = [flag, _SHORT[field.name]] if field.name in _SHORT else [flag]
        if (kind is bool and field.default is True) or kind == bool | None:
            names = [f"{flag}/--no-{field.name.replace('_', '-')}"]
        if field.default not in (None, False, ()):
            text += f" (default: {field.default})"  # in brackets a terminal would take it for markup
        option = typer.Option(*names, help=text, show_default=False, rich_help_panel=panels[field.name])
        if get_origin(kind) is tuple:  # an option that may be given again
            kind = list[get_args(kind)[0]]  # type: ignore[misc]
        optional = kind if _is_optional(kind) else kind | None
        made.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[optional, option]
            )
        )
    return made


def with_parameters(body: Callable[..., None], made: list[inspect.Parameter]) -> Callable[..., None]:
    """`body`, presented to Typer with the signature `made`."""

    @functools.wraps(body)
    def presented(**given: Any) -> None:
        body(**given)

    del presented.__wrapped__
    presented.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]
    presented.__annotations__ = {p.name: p.annotation for p in made}
    return presented


def build(owner: type[T], given: Mapping[str, Any], file: Mapping[str, Any]) -> T:
    """An instance of the dataclass `owner` from the flags that were given and the configuration file.

    Raises:
        UsageError: a value has the wrong type or is out of its range.
    """
    values: dict[str, Any] = {}
    for name, (kind, _) in hints(owner).items():
        if given.get(name) is not None:
            values[name] = tuple(given[name]) if get_origin(kind) is tuple else given[name]
        elif name in file:
            values[name] = _coerced(file[name], kind, name)
    return owner(**values)


def read_config(path: Path | None, known: list[str]) -> dict[str, Any]:
    """The options in a TOML or JSON file, each under its long name with or without hyphens.

    Raises:
        MissingError: the file cannot be read.
        UsageError: it is not TOML or JSON, or holds an unknown option.
    """
    if path is None:
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise MissingError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    try:
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise UsageError(f"{path}: not {kind}: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path}: holds no options")
    options = {}
    for key, value in found.items():
        name = key.replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise UsageError(f'{path}: unknown option "{key}"', hint=f'did you mean "{close[0]}"?' if close else None)
        options[name] = value
    return options


def _is_optional(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind)


def _coerced(value: Any, kind: Any, name: str) -> Any:
    """`value` from a file as the field's type wants it."""
    if _is_optional(kind):
        if value is None:
            return None
        kind = next(k for k in get_args(kind) if k is not type(None))
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise UsageError(f'option "{name}" is {value!r}; it must be one of {", ".join(map(str, get_args(kind)))}')
    if get_origin(kind) is tuple:
        each = value if isinstance(value, list) else [value]
        return tuple(_coerced(item, get_args(kind)[0], name) for item in each)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**1000 else math.inf if value > 0 else -math.inf
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise UsageError(f'option "{name}" is {value!r}; it must be {kind.__name__}')
