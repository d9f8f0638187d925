"""A mixture made dense by our streaming converter and by mergekit's linear merge, on the same bytes.

The source is a synthetic Mixtral in float32 whose experts are all but a few thousandths of its bytes. mergekit does not
merge the experts within a model, so that it is given them as models: eight dense Mistrals, expert j of every layer in
the j-th, in files of their own; all else is one file that the eight share. What each tool reads:

ours                `pomona meo-convert SRC --arch dense-twin --verify none -o OUT`: experts once, the rest once
mergekit yaml       `mergekit-yaml`, `merge_method: linear`: experts once, the rest eight times, which is little
mergekit pytorch    `mergekit-pytorch` on files: experts once, the rest once, exactly our bytes (`--tensor-union`)
..., low memory     with `--low-cpu-memory --lazy-unpickle`, which do nothing on the processor and with safetensors,
                    and `--out-shard-size` of one tensor, so that none waits in memory to be written

mergekit copies no tokenizer and writes no card here. Ours, besides, takes the SHA-256 of all that it reads and writes,
looks for numbers that are not finite, measures how alike the experts are, and writes a report and a model card. Threads
are left to each tool. What each takes for a miniature mixture says how much of its time and memory is its start.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from processes import ROOT, Cost, interpreter, surroundings, versions, watched

VARIABLE = "POMONA_MERGEKIT_PYTHON"
PINNED = ("torch==2.13.0", "transformers==5.23.0", "mergekit==0.1.5")
LEAN = ("--no-copy-tokenizer", "--no-write-model-card", "--quiet")
MINIATURE = ("seconds", "processor_seconds", "peak_mb")
ROLES = {"w1": "gate", "w3": "up", "w2": "down"}


@dataclass(frozen=True)
class Size:
    """Of the synthetic mixture. Heads are few and the vocabulary small, so that experts are what there is."""

    width: int = 1024
    inner: int = 3584
    layers: int = 4
    experts: int = 8
    vocabulary: int = 256
    head: int = 64

    @property
    def config(self) -> dict[str, Any]:
        """What the mixture's and the dense models' configurations have in common."""
        heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": self.head}
        size = {"hidden_size": self.width, "intermediate_size": self.inner, "num_hidden_layers": self.layers}
        return {**heads, **size, "vocab_size": self.vocabulary, "dtype": "float32", "tie_word_embeddings": False}


SIZES = {"full": Size(), "miniature": Size(width=256, inner=512, layers=2)}


@dataclass(frozen=True)
class Sources:
    """The same numbers as a mixture, as dense models, and as bare files for each expert."""

    mixture: Path
    dense: Sequence[Path]
    files: Sequence[Path]
    size: Size

    @classmethod
    def write(cls, folder: Path, size: Size) -> Sources:
        """Draw the numbers, and lay them out in each form; files hold their expert's tensors in both last forms."""
        import torch
        from safetensors.torch import save_file

        random = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=random) * 0.02

        shared = {
            "model.embed_tokens.weight": drawn(size.vocabulary, size.width),
            "lm_head.weight": drawn(size.vocabulary, size.width),
            "model.norm.weight": torch.ones(size.width),
        }
        routers = {}
        for layer in range(size.layers):
            at = f"model.layers.{layer}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shared[f"{at}.{norm}.weight"] = torch.ones(size.width)
            for part in "qkvo":
                shape = (size.width, size.head) if part == "o" else (size.head, size.width)
                shared[f"{at}.self_attn.{part}_proj.weight"] = drawn(*shape)
            routers[f"{at}.block_sparse_moe.gate.weight"] = drawn(size.experts, size.width)
        mixture = folder / "mixture"
        mixture.mkdir()
        save_file({**shared, **routers}, mixture / "shared.safetensors", {"format": "pt"})
        save_file(shared, folder / "shared.safetensors", {"format": "pt"})
        index = dict.fromkeys((*shared, *routers), "shared.safetensors")
        dense, files = [], []
        for expert in range(size.experts):
            own = {}
            for layer in range(size.layers):
                for w, role in ROLES.items():
                    shape = (size.width, size.inner) if w == "w2" else (size.inner, size.width)
                    own[f"model.layers.{layer}.mlp.{role}_proj.weight"] = drawn(*shape)
            names = [
                f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{w}.weight"
                for layer in range(size.layers)
                for w in ROLES
            ]
            there = f"expert-{expert}.safetensors"
            save_file(dict(zip(names, own.values(), strict=True)), mixture / there, {"format": "pt"})
            index |= dict.fromkeys(names, there)
            dense.append(_dense(folder / f"dense-{expert}", own, shared, folder / "shared.safetensors", size))
            files.append(dense[-1] / "experts.safetensors")
        _index(mixture, index)
        experts = {"num_local_experts": size.experts, "num_experts_per_tok": 2}
        _config(mixture, "mixtral", "MixtralForCausalLM", size.config | experts)
        return cls(mixture, dense, [*files, folder / "shared.safetensors"], size)


def _dense(folder: Path, own: Mapping[str, Any], shared: Mapping[str, Any], rest: Path, size: Size) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(dict(own), folder / "experts.safetensors", {"format": "pt"})
    os.link(rest, folder / "shared.safetensors")
    _index(folder, dict.fromkeys(own, "experts.safetensors") | dict.fromkeys(shared, "shared.safetensors"))
    _config(folder, "mistral", "MistralForCausalLM", size.config)
    return folder


def _index(folder: Path, names: Mapping[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _config(folder: Path, kind: str, architecture: str, config: Mapping[str, Any]) -> None:
    described = {"model_type": kind, "architectures": [architecture], **config}
    (folder / "config.json").write_text(json.dumps(described))


def contenders(sources: Sources, folder: Path, python: Path) -> dict[str, list[object]]:
    """The commands, each without its last argument, where to write."""
    plan = {"merge_method": "linear", "dtype": "float32"}
    models = {
        "yaml": [str(path) for path in sources.dense],
        "pytorch": [str(path) for path in sources.files],
    }
    for name, paths in models.items():
        listed = [{"model": path, "parameters": {"weight": 1.0}} for path in paths]
        (folder / f"{name}.yaml").write_text(json.dumps({**plan, "models": listed}))  # JSON is YAML
    merge = {name: [python.parent / f"mergekit-{name}", folder / f"{name}.yaml"] for name in models}
    low = ["--low-cpu-memory", "--lazy-unpickle", "--out-shard-size", str(4 * sources.size.width * sources.size.inner)]
    union = ["--tensor-union"]
    convert = [sys.executable, "-m", "pomona_cli", "meo-convert", sources.mixture, "--arch", "dense-twin"]
    return {
        "ours": [*convert, "--verify", "none", "--quiet", "-o"],
        "mergekit yaml": [*merge["yaml"], *LEAN],
        "mergekit yaml, low memory": [*merge["yaml"], *LEAN, *low],
        "mergekit pytorch": [*merge["pytorch"], *LEAN, *union],
        "mergekit pytorch, low memory": [*merge["pytorch"], *LEAN, *union, *low],
    }


def conversions(peers: Path, rounds: int, *, quick: bool) -> dict[str, Any]:
    """All contenders in turns, in processes of their own."""
    python = interpreter(VARIABLE, peers, PINNED)
    miniature, _, _ = _turns(SIZES["miniature"], python, min(rounds, 2))
    size = SIZES["miniature" if quick else "full"]
    costs, errors, sources = _turns(size, python, rounds)
    told = {
        name: _told(each)
        | {f"miniature_{key}": value for key, value in _told(miniature[name]).items() if key in MINIATURE}
        | errors[name]
        for name, each in costs.items()
    }
    return {
        "size": asdict(size),
        "bytes": sources,
        "versions": versions(python, [pin.split("==")[0] for pin in PINNED]),
        "rounds": rounds,
        "contenders": told,
    }


def _turns(
    size: Size, python: Path, rounds: int
) -> tuple[dict[str, list[Cost]], dict[str, dict[str, Any]], dict[str, int]]:
    """What each contender took in its turns, how far off its output is, and what bytes they read.

    The first turn of each is not counted: it warms caches, and what it wrote is checked.
    """
    with tempfile.TemporaryDirectory(prefix="meo-") as name:
        folder = Path(name)
        sources = Sources.write(folder, size)
        commands = contenders(sources, folder, python)
        costs: dict[str, list[Cost]] = {contender: [] for contender in commands}
        errors = {}
        for turn in range(rounds + 1):
            for contender, command in commands.items():
                ours = surroundings(ROOT / "lib", ROOT / "cli")
                cost = watched([*command, folder / "out"], ours if contender == "ours" else surroundings())
                if turn:
                    costs[contender].append(cost)
                else:
                    errors[contender] = compared(sources, folder / "out")
                shutil.rmtree(folder / "out")
                print(f"{contender}: {cost.wall:.1f} s, {cost.peak_mb:.0f} MB", file=sys.stderr)
        *experts, rest = (path.stat().st_size for path in sources.files)
        return costs, errors, {"experts": sum(experts), "rest": rest}


def _told(costs: Sequence[Cost]) -> dict[str, Any]:
    walls = [cost.wall for cost in costs]
    return {
        "seconds": round(statistics.median(walls), 3),
        "seconds_range": [round(min(walls), 3), round(max(walls), 3)],
        "processor_seconds": round(statistics.median(cost.cpu for cost in costs), 3),
        "peak_mb": round(statistics.median(cost.peak_mb for cost in costs), 1),
        "peak_mb_range": [round(f(cost.peak_mb for cost in costs), 1) for f in (min, max)],
        "anonymous_mb": round(statistics.median(cost.anonymous_mb for cost in costs), 1),
    }


def compared(sources: Sources, out: Path) -> dict[str, Any]:
    """How far the tensors in `out` are from sums in float64, rounded once.

    Raises:
        AssertionError: a tensor is missing or there are others, or one that was not merged has changed.
    """
    import torch
    from safetensors import safe_open

    def opened(path: Path) -> dict[str, Any]:
        return {name: file for file in (safe_open(path, "pt"),) for name in file.keys()}  # noqa: SIM118

    found = {name: file for path in sorted(out.glob("*.safetensors")) for name, file in opened(path).items()}
    *experts, rest = map(opened, sources.files)
    assert found.keys() == experts[0].keys() | rest.keys(), sorted(found.keys() ^ (experts[0].keys() | rest.keys()))
    worst, equal = 0.0, True
    for name, file in rest.items():
        before, after = file.get_tensor(name), found[name].get_tensor(name)
        assert float((after - before).abs().max()) <= 1e-6 * float(before.abs().max()), name
    for name in experts[0]:
        total = sum(own[name].get_tensor(name).double() for own in experts) / len(experts)
        after = found[name].get_tensor(name)
        equal = equal and torch.equal(after, torch.as_tensor(total).float())
        worst = max(worst, float((after.double() - total).abs().max() / torch.as_tensor(total).abs().max()))
    return {"error": float(f"{worst:.2e}"), "rounded_once": equal}


def targets(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """No slower than mergekit's fastest way, and a third of the memory of its leanest."""
    each = found["contenders"]
    told = {}
    for name, key, asked, lasting in (
        ("seconds", "seconds", 1.0, "processor_seconds"),
        ("peak memory", "peak_mb", 1 / 3, "peak_mb"),
    ):
        best = min((peer for peer in each if peer != "ours"), key=lambda peer: each[peer][key])
        ours, theirs = each["ours"], each[best]
        ratio = round(ours[key] / theirs[key], 3)
        told[name] = {"against": best, "ratio": ratio, "asked": round(asked, 3), "met": ratio <= asked}
        beyond = [round(one[lasting] - one[f"miniature_{lasting}"], 2) for one in (ours, theirs)]
        told[name][f"{lasting} beyond a miniature's, ours and theirs"] = beyond
    return told


def show(found: Mapping[str, Any]) -> None:
    """The table, in Markdown."""
    print(f"\n{found['bytes']['experts'] / 1e9:.2f} GB of experts, {found['bytes']['rest'] / 1e6:.0f} MB of the rest\n")
    print("| conversion | s | range | miniature s | processor s | peak MB | miniature MB | error |\n|" + "---|" * 8)
    for name, one in found["contenders"].items():
        low, high = one["seconds_range"]
        seconds, ranged = f"{one['seconds']:.2f}", f"{low:.2f} to {high:.2f}"
        spent = (f"{one[key]:.2f}" for key in ("miniature_seconds", "processor_seconds"))
        held = (f"{one['peak_mb']:.0f}", f"{one['miniature_peak_mb']:.0f}", f"{one['error']:.0e}")
        print(f"| {' | '.join((name, seconds, ranged, *spent, *held))} |")
