"""A merge from directories to a directory: what is written, what it says, what is refused, what is foretold."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from conftest import ROOT, command
from methods.mera_merge.adapterhub import make_bottleneck, make_ia3, make_lora
from pomona.errors import CheckFailed, DataError, MissingError, PomonaError, UsageError
from pomona.io.directory import RunDirectory
from pomona.io.manifest import file_digest
from pomona.methods.mera_merge import quality, run
from pomona.methods.mera_merge.adapters import read
from pomona.methods.mera_merge.config import Config
from pomona.runtime.progress import Quiet
from pomona.runtime.settings import Settings


class Heard(Quiet):
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def go(
    path: Path | None, *inputs: str | Path, heard: Quiet | None = None, **given: Any
) -> tuple[dict[str, Any], int, RunDirectory]:
    """Summary, exit code, and what is left of the work."""
    told = {"device": "cpu"}
    told |= {k: given.pop(k) for k in ("resume", "overwrite", "dry_run", "limit", "seed", "model") if k in given}
    settings = Settings(output=path, **told)
    config = Config(**given)
    described = {"config": config, "seed": settings.seed}
    work = RunDirectory(
        "mera-merge",
        tuple(map(str, inputs)),
        settings,
        described=described,
        progress=heard or Quiet(),
        emit=lambda record: None,
    )
    with work:
        summary, code = run.run(config, settings, work)
    return summary, code, work


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "manifest.json"
    }


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_bytes())
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("two")
    return make_bottleneck(folder / "one", seed=1, labels=2), make_bottleneck(folder / "two", seed=2)


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return make_lora(folder / "one", seed=1, rank=2), make_lora(folder / "two", seed=2, rank=3)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import save_tiny_bert

    return save_tiny_bert(tmp_path_factory.mktemp("bert") / "model")


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shots") / "shots.jsonl"
    path.write_text("".join(json.dumps({"text": f"{'ab'[n % 2]} {n}", "label": n % 2}) + "\n" for n in range(12)))
    return path


TUNED: dict[str, Any] = {"shots": 2, "seeds": 2, "epochs": 2, "max_length": 16, "calib_samples": 4}


# --- what is written -------------------------------------------------------------------------------------------------


def test_a_plain_average_is_written_with_all_that_tells_of_it(tmp_path: Path, two: tuple[Path, Path]) -> None:
    summary, code, _ = go(tmp_path / "out", *two, method="avg", weights="1,3")
    assert code == 0 and summary == {
        "method": "avg",
        "adapters": {"one": 0.25, "two": 0.75},
        "drift": None,
        "alignment": {"cost_before": None, "cost_after": None, "moved": None},
        "run": str(tmp_path / "out"),
    }
    first, second, merged = (load_file(p / "adapter.safetensors") for p in (*two, tmp_path / "out"))
    assert merged.keys() == first.keys()
    for name, tensor in merged.items():
        wanted = 0.25 * first[name].numpy().astype(np.float64) + 0.75 * second[name].numpy().astype(np.float64)
        np.testing.assert_allclose(tensor.numpy(), wanted, rtol=1e-6, atol=1e-8)
    written = files(tmp_path / "out")
    assert {*written} == {
        *("adapter.safetensors", "adapter_config.json", "journal.jsonl", "report.json", "report.md", "README.md"),
        *("figures/sites.png", "figures/sites.svg"),
    }
    manifest = json.loads((tmp_path / "out/manifest.json").read_bytes())
    assert {name: file_digest(tmp_path / "out" / name) for name in written} == manifest["files"]
    assert {entry["name"] for entry in manifest["inputs"]} == {
        *("one/adapter.safetensors", "one/adapter_config.json", "one/head_config.json", "one/model_head.safetensors"),
        *("two/adapter.safetensors", "two/adapter_config.json"),
    }
    assert manifest["results"]["tensors"].keys() == merged.keys()


def test_matching_costs_are_those_of_an_assignment_by_scipy(tmp_path: Path, two: tuple[Path, Path]) -> None:
    go(tmp_path / "out", *two, method="wts")
    sites = [read(str(folder), allow_pickle=False).sites() for folder in two]
    before = after = 0.0
    moved = []
    for name in sites[0]:
        one, other = (
            np.hstack([s[name].down.numpy(), s[name].down_bias.numpy()[:, None]]).astype(np.float64) for s in sites
        )
        costs = cdist(one, other)
        rows, columns = linear_sum_assignment(costs)
        before, after = before + float(np.trace(costs)), after + float(costs[rows, columns].sum())
        moved += list(rows != columns)
    found = report(tmp_path / "out")
    assert found["alignment"] == pytest.approx(
        {"cost_before": before, "cost_after": after, "moved": float(np.mean(moved))}, rel=1e-6
    )
    assert found["adapters"][1]["cost_after"] == pytest.approx(after, rel=1e-6)
    assert found["adapters"][0]["cost_after"] is None


def test_units_of_unequal_sites_count_for_their_number(tmp_path: Path) -> None:
    folders = [
        make_bottleneck(tmp_path / name, seed=seed, rank=rank) for name, seed, rank in (("a", 1, 3), ("b", 2, 4))
    ]
    go(tmp_path / "out", *folders, allow_resize=True, reference="b")
    found = report(tmp_path / "out")
    assert found["reference"] == "b" and found["alignment"]["cost_before"] is None
    assert found["parameters"] == {"before": 2 * (3 * 17 + 8 + 4 * 17 + 8), "after": 2 * (4 * 17 + 8)}


def test_the_drift_is_that_of_what_was_written(tmp_path: Path, two: tuple[Path, Path], bert: Path) -> None:
    options: dict[str, Any] = {"base_model": str(bert), "max_length": 16, "calib_samples": 4}
    summary, _, _ = go(tmp_path / "out", *two, **options)
    loaded = quality.load_base(Config(**options), Settings(device="cpu"))
    written = read(str(tmp_path / "out"), allow_pickle=False)
    for folder in two:
        drift = quality.model_drift(loaded, read(str(folder), allow_pickle=False), written, Quiet())
        assert report(tmp_path / "out")["drift"][folder.name]["relative"] == drift.relative > 0
    assert summary["drift"]["relative"] == pytest.approx(report(tmp_path / "out")["drift"]["one"]["relative"], rel=1e-5)
    manifest = json.loads((tmp_path / "out/manifest.json").read_bytes())
    assert [entry["name"] for entry in manifest["inputs"]][-2:] == [f"base model {bert}", "our own texts"]


def test_transport_on_activations_matches_what_units_do_on_text(
    tmp_path: Path, two: tuple[Path, Path], bert: Path
) -> None:
    options: dict[str, Any] = {"method": "acts", "base_model": str(bert), "max_length": 16, "calib_samples": 4}
    go(tmp_path / "out", *two, **options)
    loaded = quality.load_base(Config(**options), Settings(device="cpu"))
    adapters = [read(str(folder), allow_pickle=False) for folder in two]
    seen = quality.activations(loaded, adapters, "pre", Quiet())
    after = 0.0
    for name in adapters[0].sites():
        costs = cdist(*(seen[adapter.label][name].numpy().astype(np.float64).T for adapter in adapters))
        after += float(costs[linear_sum_assignment(costs)].sum())
    assert report(tmp_path / "out")["alignment"]["cost_after"] == pytest.approx(after, rel=1e-5)
    assert "of activations before the nonlinearity" in (tmp_path / "out/report.md").read_text()


def test_a_merge_of_loras_is_reported_by_its_maps(tmp_path: Path, loras: tuple[Path, Path]) -> None:
    go(tmp_path / "out", *loras, rank=2)
    maps = []
    for folder in (*loras, tmp_path / "out"):
        tensors = {k: v.double().numpy() for k, v in load_file(folder / "adapter_model.safetensors").items()}
        config = json.loads((folder / "adapter_config.json").read_bytes())
        downs = [name for name in tensors if ".lora_A." in name]
        scale = config["lora_alpha"] / config["r"]
        maps.append({n: scale * tensors[n.replace("lora_A", "lora_B")] @ tensors[n] for n in downs})
    found = report(tmp_path / "out")["sites"]
    assert len(found) == 4
    for name in maps[0]:
        due = (maps[0][name] + maps[1][name]) / 2
        error = np.linalg.norm(maps[2][name] - due) / np.linalg.norm(due)
        assert found[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] == pytest.approx(
            error, rel=1e-4
        )
        values = np.linalg.svd(due, compute_uv=False)
        assert error == pytest.approx(math.sqrt((values[2:] ** 2).sum() / (values**2).sum()), rel=1e-4)


def test_sites_come_in_the_order_of_the_model(tmp_path: Path) -> None:
    folders = [make_lora(tmp_path / str(seed), seed=seed, layers=12) for seed in (1, 2)]
    go(tmp_path / "out", *folders)
    found = [site for site in report(tmp_path / "out")["sites"] if site.endswith("query")]
    assert found == [f"encoder.layer.{layer}.attention.self.query" for layer in range(12)]


@pytest.mark.parametrize("make", [make_bottleneck, make_lora, make_ia3])
def test_a_copy_has_no_errors_to_report(tmp_path: Path, make: Callable[..., Path]) -> None:
    folder = make(tmp_path / "one", seed=1)
    go(tmp_path / "out", folder)
    assert report(tmp_path / "out")["sites"] == {} and not (tmp_path / "out/figures").exists()
    name = "adapter.safetensors" if make is make_bottleneck else "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_a_weighted_single_adapter_is_no_copy(tmp_path: Path, two: tuple[Path, Path]) -> None:
    go(tmp_path / "out", two[0], weights="0.5", normalize=False)
    assert min(report(tmp_path / "out")["sites"].values()) > 0.1
    assert "with the weight 0.5" in (tmp_path / "out/report.md").read_text()


def test_adapters_of_a_track_keep_the_weights_they_were_given(tmp_path: Path) -> None:
    folders = [make_bottleneck(tmp_path / name, seed=n) for n, name in enumerate(("a", "b", "c"))]
    (tmp_path / "tracks.json").write_text('{"a": "x", "b": "y", "c": "x"}')
    summary, _, _ = go(tmp_path / "out", *folders, tracks=tmp_path / "tracks.json", track="x", weights="1,7,3")
    assert summary["adapters"] == {"a": 0.25, "c": 0.75}
    manifest = json.loads((tmp_path / "out/manifest.json").read_bytes())
    assert manifest["inputs"][-1] == {"name": "tracks.json", **file_digest(tmp_path / "tracks.json")}


def test_linear_warns_of_what_it_is_off(tmp_path: Path) -> None:
    folders = [make_lora(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    heard = Heard()
    go(tmp_path / "out", *folders, method="linear", heard=heard)
    worst = max(report(tmp_path / "out")["sites"].values())
    assert worst > 0.3 and f"up to {worst:.0%} off" in heard.warnings[-1]


# --- few-shot --------------------------------------------------------------------------------------------------------


def test_the_tuned_adapter_and_its_head_are_written_beside_the_merged_one(
    tmp_path: Path, two: tuple[Path, Path], bert: Path, shots: Path
) -> None:
    options: dict[str, Any] = {"base_model": str(bert), "few_shot": shots, "baselines": True, **TUNED}
    summary, _, _ = go(tmp_path / "out", *two, **options)
    found = report(tmp_path / "out")["few_shot"]
    assert [arm["arm"] for arm in found["arms"]] == [
        *("merged", "single:one", "single:two", "average", "fusion", "fresh", "full"),
    ]
    assert (found["tests"], found["labels"], len(found["rows"])) == (8, ["0", "1"], 14)
    accuracies = [row["accuracy"] for row in found["rows"] if row["arm"] == "merged"]
    assert found["arms"][0]["accuracy"]["mean"] == pytest.approx(np.mean(accuracies), abs=1e-12)
    assert found["arms"][0]["accuracy"]["deviation"] == pytest.approx(np.std(accuracies, ddof=1), abs=1e-12)
    assert summary["few_shot"]["merged"]["accuracy"] == pytest.approx(np.mean(accuracies), abs=1e-6)
    assert {"tuned/adapter.safetensors", "tuned/linear_head.safetensors", "tuned/linear_head.json"} <= {
        *files(tmp_path / "out")
    }
    assert json.loads((tmp_path / "out/tuned/linear_head.json").read_bytes()) == {
        "labels": ["0", "1"],
        "pooling": "mean",
    }
    merged, tuned = (load_file(tmp_path / "out" / name / "adapter.safetensors") for name in (".", "tuned"))
    assert merged.keys() == tuned.keys() and any(not torch.equal(merged[name], tuned[name]) for name in merged)


def test_a_plain_average_is_no_arm_beside_itself(
    tmp_path: Path, two: tuple[Path, Path], bert: Path, shots: Path
) -> None:
    options: dict[str, Any] = {"base_model": str(bert), "few_shot": shots, "baselines": True, **TUNED, "seeds": 1}
    go(tmp_path / "out", *two, method="avg", **options)
    assert "average" not in [arm["arm"] for arm in report(tmp_path / "out")["few_shot"]["arms"]]


def test_an_interrupted_study_goes_on_to_the_same_bytes(
    tmp_path: Path, two: tuple[Path, Path], bert: Path, shots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"base_model": str(bert), "few_shot": shots, "baselines": True, **TUNED, "seeds": 1}
    go(tmp_path / "whole", *two, **options)
    measure, seen = run.fewshot.Study.measure, []

    def failing(self: Any, piece: Any) -> Any:
        seen.append(piece.key)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return measure(self, piece)

    monkeypatch.setattr(run.fewshot.Study, "measure", failing)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "out", *two, **options)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.journal").exists()
    with pytest.raises(UsageError, match=r"made with settings\.config\.epochs = 2, now it is 3$"):
        go(tmp_path / "out", *two, **{**options, "epochs": 3}, resume=True)
    go(tmp_path / "out", *two, **options, resume=True)
    assert len(seen) == 4 + 4 and not (tmp_path / "out.journal").exists()
    for name, content in files(tmp_path / "whole").items():
        assert files(tmp_path / "out")[name] == content, name


def test_a_finished_merge_is_not_done_again(tmp_path: Path, two: tuple[Path, Path]) -> None:
    first, _, _ = go(tmp_path / "out", *two)
    before, heard = (tmp_path / "out/manifest.json").read_bytes(), Heard()
    again, code, _ = go(tmp_path / "out", *two, resume=True, heard=heard)
    assert (again, code) == (first, 0) and "is finished already" in heard.warnings[-1]
    assert (tmp_path / "out/manifest.json").read_bytes() == before


# --- what fails, and what is refused ---------------------------------------------------------------------------------


def test_too_much_drift_fails_with_the_output_in_place(tmp_path: Path, two: tuple[Path, Path], bert: Path) -> None:
    options: dict[str, Any] = {"base_model": str(bert), "max_length": 16, "calib_samples": 2}
    _, _, work = go(tmp_path / "out", *two, **options, max_drift=1e-3)
    assert isinstance(work.failure, CheckFailed) and "above --max-drift 0.001" in str(work.failure)
    assert (tmp_path / "out/adapter.safetensors").exists()
    _, _, again = go(tmp_path / "out", *two, **options, max_drift=1e-3, resume=True)
    assert isinstance(again.failure, CheckFailed)
    _, _, work = go(tmp_path / "fine", *two, **options, max_drift=10)
    assert work.failure is None


Refusal = tuple[dict[str, Any], type[PomonaError], str]
REFUSED: dict[str, Refusal] = {
    "weights beyond numbers": ({"weights": "1e308,1e308"}, UsageError, "too large to be summed"),
    "rank of bottlenecks": ({"rank": 2}, UsageError, "--rank is for delta-svd; wts cuts no ranks"),
    "method of loras": ({"method": "linear"}, UsageError, "--method linear is not for bottleneck adapters"),
    "unknown reference": ({"reference": "three"}, UsageError, "no adapter is called so"),
    "solver of an average": ({"method": "avg", "solver": "sinkhorn:1"}, UsageError, "transports nothing"),
    "text without a base": ({"calib": Path("x")}, UsageError, "--calib needs --base-model"),
    "shots from a pipe": ({"few_shot": Path("-"), "base_model": "x"}, UsageError, "--few-shot - : give a file"),
    "a model": ({"model": "minilm"}, UsageError, "is --base-model here"),
    "no tracks file": ({"tracks": Path("nowhere.json")}, MissingError, "nowhere.json: cannot be read"),
    "no heads": ({"heads": "average"}, DataError, "two came without a prediction head"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("dry_run", [False, True])
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    tmp_path: Path, two: tuple[Path, Path], what: str, dry_run: bool
) -> None:
    given, kind, message = REFUSED[what]
    with pytest.raises(kind) as raised:
        go(tmp_path / "out", *two, dry_run=dry_run, **given)
    assert message in raised.value.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [{"method": "delta-cat", "rank": 2}, {"solver": "sinkhorn:0.1"}, {"method": "wts"}])
def test_options_that_loras_have_no_use_for_are_refused(
    tmp_path: Path, loras: tuple[Path, Path], given: dict[str, Any]
) -> None:
    with pytest.raises(UsageError):
        go(tmp_path / "out", *loras, **given)


def test_loras_are_not_tuned(tmp_path: Path, loras: tuple[Path, Path], bert: Path, shots: Path) -> None:
    with pytest.raises(UsageError, match="these are LoRA adapters"):
        go(tmp_path / "out", *loras, few_shot=shots, base_model=str(bert))


@pytest.mark.parametrize("inputs", [(), ("",)])
def test_an_adapter_must_be_named(tmp_path: Path, inputs: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=r"no adapter is named|name of an adapter is empty"):
        go(tmp_path / "out", *inputs)


def test_first_is_the_first_named_whatever_adapters_are_called(tmp_path: Path) -> None:
    folders = [make_bottleneck(tmp_path / name, seed=n) for n, name in enumerate(("second", "first", "third"))]
    for reference, wanted in (("first", "second"), ("third", "third")):
        go(tmp_path / reference / "out", *folders, reference=reference)
        assert report(tmp_path / reference / "out")["reference"] == wanted


# --- what is foretold ------------------------------------------------------------------------------------------------


def weights_written(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def foretold(path: Path, *inputs: Path, **given: Any) -> dict[str, Any]:
    """What the dry run says, once it is compared with what then happens."""
    told, code, _ = go(None, *inputs, dry_run=True, **given)
    go(path, *inputs, **given)
    found = report(path)
    assert code == 0 and told["bytes"] == weights_written(path)
    assert (told["parameters"], told["flops"]) == (found["parameters"], found["flops"])
    assert told["adapters"] == {each["label"]: each["weight"] for each in found["adapters"]}
    return told


@pytest.mark.parametrize(
    "given",
    [{}, {"method": "sum"}, {"heads": "keep-reference"}, {"reference": "medoid"}, {"solver": "sinkhorn:0.1"}],
    ids=str,
)
def test_bottlenecks_are_foretold_to_the_byte(tmp_path: Path, two: tuple[Path, Path], given: dict[str, Any]) -> None:
    foretold(tmp_path / "out", *two, **given)


@pytest.mark.parametrize("given", [{}, {"rank": 1}, {"rank": 4}, {"rank": 999}, {"method": "delta-cat"}], ids=str)
def test_loras_are_foretold_to_the_byte(tmp_path: Path, loras: tuple[Path, Path], given: dict[str, Any]) -> None:
    foretold(tmp_path / "out", *loras, **given)


def test_scales_are_foretold_to_the_byte(tmp_path: Path) -> None:
    foretold(tmp_path / "out", *(make_ia3(tmp_path / str(seed), seed=seed) for seed in (1, 2)))


def test_tuned_adapters_are_foretold_to_the_byte(
    tmp_path: Path, two: tuple[Path, Path], bert: Path, shots: Path
) -> None:
    options: dict[str, Any] = {"method": "acts", "base_model": str(bert), "few_shot": shots, **TUNED, "seeds": 1}
    foretold(tmp_path / "out", *two, **options, heads="keep-reference")


def test_a_dry_run_reads_the_base_s_limits(tmp_path: Path, two: tuple[Path, Path], bert: Path) -> None:
    with pytest.raises(UsageError, match="the base model reads 128 tokens at most"):
        go(None, *two, base_model=str(bert), max_length=129, dry_run=True)


@pytest.fixture
def peak(tmp_path: Path) -> Iterator[Callable[..., tuple[dict[str, Any], float]]]:
    """Run the command; its summary and its peak memory in megabytes."""

    def measured(*args: str | Path) -> tuple[dict[str, Any], float]:
        program = (
            "import json, resource, subprocess, sys; done = subprocess.run(sys.argv[1:], capture_output=True);"
            "used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss;"
            "print(json.dumps([done.returncode, done.stdout.decode(), done.stderr.decode(), used]))"
        )
        line = [sys.executable, "-c", program, *command("mera-merge", *args)]
        code, out, err, used = json.loads(subprocess.run(line, capture_output=True, cwd=tmp_path, check=True).stdout)
        assert code == 0, err
        return json.loads(out), used * 1024 / 1e6

    yield measured


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--base-model", "minilm", "--method", "acts")], ids=["plain", "base"])
def test_memory_is_foretold_within_a_quarter(
    peak: Callable[..., tuple[dict[str, Any], float]], more: tuple[str, ...]
) -> None:
    adapters = [ROOT / "data/adapters" / name for name in ("first", "second", "third")]
    told, _ = peak(*adapters, *more, "-n")
    _, used = peak(*adapters, *more, "-o", "out")
    assert told["peak_rss_mb"] == pytest.approx(used, rel=0.25)
