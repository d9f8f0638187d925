"""A mixture merged offline is a plain model: it loads as one, and computes what its experts' summed weights do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from methods.meo_convert import mixtures
from pomona.errors import CheckFailed, DataError, UsageError
from pomona.methods.meo_convert import upcycling
from pomona.methods.meo_convert.config import Config
from pomona.methods.meo_convert.damage import block_errors
from pomona.methods.meo_convert.expert_alignment import Alignment
from pomona.methods.meo_convert.families import recognise
from pomona.methods.meo_convert.routing import statistics
from pomona.methods.meo_convert.static import StaticResult, convert, cosine
from pomona.methods.meo_convert.weighting import mass, weights
from pomona.models import embedded
from pomona.models.checkpoint import Checkpoint
from pomona.runtime.progress import Quiet


def merge(
    source: Path,
    folder: Path,
    *,
    arch: str = "auto",
    shares: Mapping[str, Sequence[float]] | Sequence[float] | None = None,
    scales: Mapping[str, float] | None = None,
    align: Alignment | None = None,
    dtype: str = "source",
    shard_bytes: int = 10**9,
) -> StaticResult:
    checkpoint = Checkpoint.open(source)
    family = recognise(checkpoint)
    if shares is None:
        shares = weights(family, "uniform")
    elif not isinstance(shares, Mapping):
        shares = {layer.name: shares for layer in family.layers}
    folder.mkdir(parents=True, exist_ok=True)
    return convert(
        checkpoint,
        family,
        arch=arch,
        weights=shares,
        align=align,
        mass=scales or {},
        folder=folder,
        shard_bytes=shard_bytes,
        dtype=dtype,
    )


def load(folder: Path, family: str) -> Any:
    """The model as plain transformers loads it, which must find every weight and use every weight."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if family == "switch_transformers" else AutoModelForCausalLM
    model, told = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


TWINS = {"mixtral": "MistralForCausalLM", "qwen3_moe": "Qwen3ForCausalLM"}

FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    with torch.no_grad():
        logits = model.eval()(torch.load(sys.argv[1], weights_only=True)).logits
    torch.save(logits, folder + ".pt")
    print(type(model).__name__)
"""


# --- check A3: dense twins -------------------------------------------------------------------------------------------


def test_a_mixture_of_copies_is_its_dense_twin_in_a_fresh_process(tmp_path: Path) -> None:
    expected = {}
    for family in TWINS:
        model = mixtures.alike(mixtures.make(family, **({} if family == "mixtral" else {"norm_topk_prob": True})))
        source = mixtures.save(model, tmp_path / f"{family}-in")
        assert merge(source, tmp_path / family, arch="dense-twin").arch == "dense-twin"
        expected[family] = mixtures.logits(model, family)
    torch.save(mixtures.inputs("mixtral")["input_ids"], tmp_path / "ids.pt")
    command = [sys.executable, "-c", FRESH, "ids.pt", *TWINS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200, cwd=tmp_path)
    assert done.stdout.split() == list(TWINS.values())
    for family, logits in expected.items():
        found = torch.load(tmp_path / f"{family}.pt", weights_only=True)
        assert float((found - logits).abs().max()) <= 1e-6


def test_switch_becomes_t5(tmp_path: Path) -> None:
    """The router's largest probability scales the expert, so it is made to be 1."""
    model = mixtures.alike(mixtures.make("switch_transformers"))
    for name, value in model.named_parameters():
        if "router" in name:
            value.data *= 1e4
    source = mixtures.save(model, tmp_path / "in")
    expected = mixtures.logits(model, "switch_transformers")
    for arch, kind in (("dense-twin", "T5"), ("single-expert", "SwitchTransformers")):
        merge(source, tmp_path / arch, arch=arch)
        found = load(tmp_path / arch, "switch_transformers")
        assert type(found).__name__ == f"{kind}ForConditionalGeneration"
        assert float((mixtures.logits(found, "switch_transformers") - expected).abs().max()) <= 1e-5  # logits to 5


def test_one_switch_expert_passes_over_no_token(tmp_path: Path) -> None:
    """All tokens now choose one expert; its old capacity would have dropped most of them."""
    model = mixtures.alike(mixtures.make("switch_transformers", expert_capacity=3))
    merge(mixtures.save(model, tmp_path / "in"), tmp_path / "one", arch="single-expert")
    merge(tmp_path / "in", tmp_path / "twin", arch="dense-twin")
    one, twin = (load(tmp_path / arch, "switch_transformers") for arch in ("one", "twin"))
    found, expected = (mixtures.logits(model, "switch_transformers", length=80) for model in (one, twin))
    assert float((found - expected).abs().max()) <= 1e-5


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("mixtral", {"sliding_window": None}),
        ("mixtral", {"sliding_window": 5}),
        ("mixtral", {"rms_norm_eps": 1e-2, "head_dim": 12}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 5}),
        ("qwen3_moe", {"attention_bias": True}),
        ("qwen3_moe", {"head_dim": None}),
        ("qwen3_moe", {"mlp_only_layers": [1], "intermediate_size": 20}),
        ("mixtral", {"tie_word_embeddings": True}),
        ("mixtral", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}),
    ],
)
def test_a_twin_means_what_the_mixture_left_unsaid(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    """The two families' defaults differ (windows, norms, heads), so config.json keeps only what differs from them."""
    model = mixtures.alike(mixtures.make(family, num_experts_per_tok=4, **config))
    source = mixtures.save(model, tmp_path / "in")
    told = json.loads((source / "config.json").read_bytes())
    plain = type(model.config)().to_dict()
    short = {key: value for key, value in told.items() if key not in plain or plain[key] != value}
    (source / "config.json").write_text(json.dumps({**short, "model_type": family}))
    merge(source, tmp_path / "out", arch="dense-twin")
    found = mixtures.logits(load(tmp_path / "out", family), family)
    assert float((found - mixtures.logits(model, family)).abs().max()) <= 2e-6


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("olmoe", {}, "no dense family has OLMoE's graph"),
        ("qwen2_moe", {}, "shared expert has a gate"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "its dense layers are 24 wide, its experts 20"),
        ("switch_transformers", {"tie_word_embeddings": False}, "T5 ties its embeddings"),
    ],
)
def test_a_twin_that_would_compute_something_else_is_refused(
    family: str, config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    source = mixtures.save(mixtures.make(family, **config), tmp_path / "in")
    with pytest.raises(UsageError, match=reason) as caught:
        merge(source, tmp_path / "out", arch="dense-twin")
    assert caught.value.hint == "use --arch single-expert"
    assert merge(source, tmp_path / "out", arch="auto").arch == "single-expert"
    load(tmp_path / "out", family)


# --- check A4: single experts, and the mass of gates that do not sum to 1 ---------------------------------------------

NAIVE = {"olmoe": 0.054, "qwen2_moe": 0.042, "qwen3_moe": 0.029}


@pytest.mark.parametrize("family", mixtures.DECODERS)
def test_copies_with_all_experts_selected_are_one_expert(family: str, tmp_path: Path) -> None:
    model = mixtures.alike(mixtures.make(family, num_experts_per_tok=4))
    merge(mixtures.save(model, tmp_path / "in"), tmp_path / "out", arch="single-expert")
    found = load(tmp_path / "out", family)
    assert type(found) is type(model)
    assert float((mixtures.logits(found, family) - mixtures.logits(model, family)).abs().max()) <= 1e-6


@pytest.mark.parametrize("family", NAIVE)
def test_the_mass_of_the_gates_goes_to_the_output_map_alone(family: str, tmp_path: Path) -> None:
    model = mixtures.alike(mixtures.make(family, norm_topk_prob=False, initializer_range=0.05))
    source = mixtures.save(model, tmp_path / "in")
    family_found = recognise(Checkpoint.open(source))
    routing = statistics(model, [mixtures.inputs(family, seed=9, length=40)])
    scales = mass(family_found, "keep", routing)
    assert all(0.5 < scale < 0.99 for scale in scales.values())
    result = merge(source, tmp_path / "kept", arch="single-expert", scales=scales)
    merge(source, tmp_path / "naive", arch="single-expert")
    expected = mixtures.logits(model, family)
    kept, naive = (
        relative(mixtures.logits(load(tmp_path / name, family), family), expected) for name in ("kept", "naive")
    )
    assert kept < NAIVE[family] / 5 and kept < naive / 5, (kept, naive)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("kept", "naive"))
    for layer, tensors in result.merged.items():
        assert torch.equal(one[tensors["gate"]], other[tensors["gate"]])
        assert torch.equal(one[tensors["up"]], other[tensors["up"]])
        torch.testing.assert_close(one[tensors["down"]], scales[layer] * other[tensors["down"]], rtol=1e-6, atol=0)
        assert result.provenance[tensors["down"]]["scale"] == scales[layer]


def test_shared_experts_and_their_gates_are_kept(tmp_path: Path) -> None:
    source = mixtures.save(mixtures.make("qwen2_moe"), tmp_path / "in")
    result = merge(source, tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    shared = [name for name in before if "shared_expert" in name]
    assert len(shared) == 8
    for name in shared:
        assert torch.equal(before[name], after[name]) and result.provenance[name] == {"dtype": "F32", "copied": name}


# --- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["single-expert", "dense-twin"])
def test_every_merged_tensor_is_the_weighted_sum_in_float64(arch: str, tmp_path: Path) -> None:
    source = mixtures.save(mixtures.make("mixtral"), tmp_path / "in")
    shares, scales = {"0": [1.0, 2.0, 3.0, 4.0], "1": [0.0, 0.0, 5.0, 0.0]}, {"0": 0.75, "1": 1.0}
    result = merge(source, tmp_path / "out", arch=arch, shares=shares, scales=scales)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    told = {"gate": "w1", "up": "w3", "down": "w2"}
    for layer, tensors in result.merged.items():
        share = np.array(shares[layer]) / np.sum(shares[layer])
        for role, name in tensors.items():
            stacked = [
                before[f"model.layers.{layer}.block_sparse_moe.experts.{n}.{told[role]}.weight"].double().numpy()
                for n in range(4)
            ]
            expected = np.tensordot(share, np.stack(stacked), 1) * (scales[layer] if role == "down" else 1)
            # The nearest float32, but for sums that lie between two: there the last bit of the float64 decides.
            error = np.abs(after[name].double().numpy() - expected)
            assert (error <= np.spacing(np.abs(after[name].numpy())) / 2 * (1 + 1e-6)).all()
    # The rest is the source's, bit for bit, but for the routers.
    merged = {name for tensors in result.merged.values() for name in tensors.values()}
    for name in after.keys() - merged:
        if "block_sparse_moe.gate" in name:
            assert after[name].shape == (1, 16) and not after[name].any()
        else:
            assert torch.equal(after[name], before[name])


@pytest.mark.parametrize("count", [3, 4, 7])
def test_copies_come_back_bit_for_bit_whatever_their_number(count: int, tmp_path: Path) -> None:
    model = mixtures.alike(mixtures.make("mixtral", num_local_experts=count))
    merge(mixtures.save(model, tmp_path / "in"), tmp_path / "out", arch="dense-twin")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    for n in range(2):
        for w, role in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            expected = before[f"model.layers.{n}.block_sparse_moe.experts.0.{w}.weight"]
            assert torch.equal(after[f"model.layers.{n}.mlp.{role}_proj.weight"], expected)


def test_the_order_of_the_experts_decides_nothing(tmp_path: Path) -> None:
    """Property 5: experts and rows of the router permuted together."""
    model = mixtures.make("olmoe")
    ids = mixtures.inputs("olmoe")
    order = torch.tensor([2, 0, 3, 1])
    found = {}
    for name in ("in", "permuted"):
        source = mixtures.save(model, tmp_path / name)
        routing = statistics(model, [ids])
        family = recognise(Checkpoint.open(source))
        shares = weights(family, "router-prob", routing)
        merge(source, tmp_path / f"{name}-out", shares=shares, scales=mass(family, "keep", routing))
        found[name] = mixtures.logits(load(tmp_path / f"{name}-out", "olmoe"), "olmoe"), shares
        for layer in model.model.layers:
            block = layer.mlp
            for parameter in (block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight):
                parameter.data = parameter.data[order]
    assert float((found["in"][0] - found["permuted"][0]).abs().max()) <= 1e-6
    for layer, share in found["in"][1].items():
        assert found["permuted"][1][layer] == pytest.approx([share[n] for n in order], abs=1e-6)


def test_the_cosine_is_that_of_whole_experts(tmp_path: Path) -> None:
    model = mixtures.make("mixtral")
    result = merge(mixtures.save(model, tmp_path / "in"), tmp_path / "out")
    stacks = iter(mixtures.stacks(model))
    for layer in ("0", "1"):
        experts = [torch.cat([a.flatten(), b.flatten()]) for a, b in zip(next(stacks), next(stacks), strict=True)]
        rows = np.stack([expert.double().numpy() for expert in experts])
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        assert result.cosine[layer] == pytest.approx((np.sum(rows @ rows.T) - 4) / 12, abs=1e-12)
    assert cosine(torch.ones(1, 1)) is None and cosine(torch.zeros(2, 2)) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_numbers_are_rounded_once_to_the_format_asked_for(dtype: str, tmp_path: Path) -> None:
    source = mixtures.save(mixtures.make("mixtral").bfloat16(), tmp_path / "in")
    result = merge(source, tmp_path / "out", dtype=dtype, arch="dense-twin")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    wanted = getattr(torch, dtype)
    assert {value.dtype for value in after.values()} == {wanted} and result.config["dtype"] == dtype
    experts = torch.stack([before[f"model.layers.0.block_sparse_moe.experts.{n}.w1.weight"] for n in range(4)])
    assert torch.equal(after["model.layers.0.mlp.gate_proj.weight"], experts.double().mean(0).float().to(wanted))
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"].to(wanted))
    assert load(tmp_path / "out", "mixtral").dtype == wanted


def test_a_number_that_does_not_fit_the_format_is_no_result(tmp_path: Path) -> None:
    source = mixtures.save(mixtures.make("mixtral"), tmp_path / "in")
    mixtures.changed(source, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    with pytest.raises(CheckFailed, match=r"model\.norm\.weight holds numbers that are not finite"):
        merge(source, tmp_path / "out", dtype="float16")


def test_a_poisoned_expert_is_named_by_what_it_would_spoil(tmp_path: Path) -> None:
    source = mixtures.save(mixtures.make("mixtral"), tmp_path / "in")
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    mixtures.changed(source, lambda tensors: tensors[name].view(-1)[5:6].fill_(float("nan")))
    with pytest.raises(CheckFailed, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        merge(source, tmp_path / "out", arch="dense-twin")


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"0": [1, 1, 1, 1]}, "layer 1 has no weights"),
        ([1, 1, 1], "4 experts, but 3 weights"),
        ([1, -1, 1, 1], "must be finite, 0 or more"),
        ([0, 0, 0, 0], "not all 0"),
        ([1, float("nan"), 1, 1], "must be finite"),
    ],
)
def test_weights_that_are_none_are_refused(shares: Any, message: str, tmp_path: Path) -> None:
    source = mixtures.save(mixtures.make("mixtral"), tmp_path / "in")
    with pytest.raises(DataError, match=message):
        merge(source, tmp_path / "out", shares=shares)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf")])
def test_a_mass_that_is_none_is_refused(scale: float, tmp_path: Path) -> None:
    source = mixtures.save(mixtures.make("mixtral"), tmp_path / "in")
    with pytest.raises(DataError, match="it must be positive"):
        merge(source, tmp_path / "out", scales={"0": scale})


# --- checks A10 and A13: the same bytes ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", mixtures.DECODERS)
def test_both_layouts_give_the_same_bytes(family: str, tmp_path: Path) -> None:
    model = mixtures.make(family)
    mixtures.save(model, tmp_path / "apart")
    mixtures.save_packed(model, tmp_path / "packed")
    for arch in ("auto", "single-expert"):
        for name in ("apart", "packed"):
            merge(tmp_path / name, tmp_path / f"{name}-{arch}", arch=arch, shares=[1, 2, 3, 4], shard_bytes=4000)
        one, other = (
            {path.name: path.read_bytes() for path in (tmp_path / f"{name}-{arch}").glob("*.safetensors*")}
            for name in ("apart", "packed")
        )
        assert one == other and len(one) > 3
        assert torch.equal(
            *(mixtures.logits(load(tmp_path / f"{n}-{arch}", family), family) for n in ("apart", "packed"))
        )


def test_a_second_run_writes_the_same_bytes_and_a_reload_saves_them(tmp_path: Path) -> None:
    source = mixtures.save(mixtures.make("qwen3_moe"), tmp_path / "in")
    for name in ("one", "two"):
        merge(source, tmp_path / name, arch="dense-twin")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    load(tmp_path / "one", "qwen3_moe").save_pretrained(tmp_path / "saved")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "saved"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_merged_model_is_not_merged_again(tmp_path: Path) -> None:
    source = mixtures.save(mixtures.make("mixtral"), tmp_path / "in")
    merge(source, tmp_path / "twin", arch="dense-twin")
    with pytest.raises(UsageError, match="mistral has no experts to merge"):
        merge(tmp_path / "twin", tmp_path / "again")
    merge(source, tmp_path / "one", arch="single-expert")
    merge(tmp_path / "one", tmp_path / "again", arch="single-expert")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "again")]
    assert files[0] == files[1]


# --- check A14: experts that share nothing ---------------------------------------------------------------------------


def test_independent_experts_are_destroyed_and_the_figures_say_so(tmp_path: Path) -> None:
    model = mixtures.make("mixtral", hidden_size=64, intermediate_size=96, initializer_range=0.02)
    source = mixtures.save(model, tmp_path / "in")
    routing = statistics(model, [mixtures.inputs("mixtral", length=60)], keep=64)
    result = merge(source, tmp_path / "out")
    errors = block_errors(Checkpoint.open(tmp_path / "out"), result.merged, routing, "silu")
    assert all(0.7 < error < 1.05 for error in errors.values()), errors
    assert all(abs(found) < 0.05 for found in result.cosine.values() if found is not None)


def test_experts_a_step_apart_are_merged_well_and_the_figures_say_so(tmp_path: Path) -> None:
    model = mixtures.alike(mixtures.make("mixtral"))
    torch.manual_seed(1)
    for experts in mixtures.stacks(model):
        for expert in experts:
            expert += 0.01 * expert.std() * torch.randn_like(expert)
    routing = statistics(model, [mixtures.inputs("mixtral")], keep=48)
    result = merge(mixtures.save(model, tmp_path / "in"), tmp_path / "out")
    errors = block_errors(Checkpoint.open(tmp_path / "out"), result.merged, routing, "silu")
    assert all(error < 0.02 for error in errors.values())
    assert all(found > 0.999 for found in result.cosine.values() if found is not None)


@pytest.mark.parametrize("family", mixtures.FAMILIES)
def test_copies_have_no_error_in_any_block(family: str, tmp_path: Path) -> None:
    several = {} if family == "switch_transformers" else {"num_experts_per_tok": 4}
    model = mixtures.alike(mixtures.make(family, **several))
    routing = statistics(model, [mixtures.inputs(family)], keep=48)
    source = mixtures.save(model, tmp_path / "in")
    scales = mass(recognise(Checkpoint.open(source)), "keep", routing)
    result = merge(source, tmp_path / "out", scales=scales)
    activation = "relu" if family == "switch_transformers" else "silu"
    errors = block_errors(Checkpoint.open(tmp_path / "out"), result.merged, routing, activation)
    assert errors.keys() == routing.keys()
    limit = 0.3 if family == "switch_transformers" else 1e-6  # Switch's one gate differs from token to token
    assert all(error < limit for error in errors.values()), errors


# --- models converted before -----------------------------------------------------------------------------------------


def upcycled(folder: Path, *, level: str = "sequence", experts: int = 3, biases: bool = True) -> dict[str, Tensor]:
    """MiniLM with `experts` copies of every feed-forward map, as `modeling_meo` names them; gives back MiniLM's."""
    dense = load_file(embedded.minilm() / "model.safetensors")
    tensors = dict(dense)
    for layer in range(6):
        for half in ("intermediate", "output"):
            name = f"encoder.layer.{layer}.{half}.dense"
            weight, bias = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias")
            width = weight.shape[1]
            tensors[f"{name}.weight"] = weight.repeat(experts, 1, 1)
            tensors[f"{name}.gate.weight"] = torch.zeros(experts, width)
            tensors[f"{name}.gate.noise"] = torch.zeros(experts, width)
            if biases:
                tensors[f"{name}.bias"] = bias.repeat(experts, 1)
            if level == "token":
                small = max(1, width // 64)
                tensors[f"{name}.token.down.weight"] = torch.randn(small, width)
                tensors[f"{name}.token.down.bias"] = torch.zeros(small)
                tensors[f"{name}.token.up.weight"] = torch.zeros(width, small)
                tensors[f"{name}.token.up.bias"] = torch.zeros(width)
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    config = json.loads((embedded.minilm() / "config.json").read_bytes())
    config["meo"] = {"level": level, "experts": experts, "selected": 2, "run_as": "meo"}
    config["auto_map"] = {"AutoModel": "modeling_meo.MeoBertModel"}
    config["architectures"] = ["MeoBertModel"]
    (folder / "config.json").write_text(json.dumps(config))
    return dense


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_minilm_comes_back_from_its_copies_bit_for_bit(level: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    dense = upcycled(tmp_path / "in", level=level)
    result = merge(tmp_path / "in", tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == dense.keys() and all(torch.equal(after[name], dense[name]) for name in dense)
    assert "meo" not in result.config and "auto_map" not in result.config
    assert result.config["architectures"] == ["BertModel"]
    model, told = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__name__ == "BertModel" and not any(told.values())


def test_what_upcycling_writes_comes_back(tmp_path: Path) -> None:
    dense = load_file(embedded.minilm() / "model.safetensors")
    give_experts(Path(embedded.minilm()), tmp_path / "in", Config(experts=3, level="token"))
    merge(tmp_path / "in", tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == dense.keys() and all(torch.equal(after[name], dense[name]) for name in dense)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_a_mixture_kept_for_merging_is_merged_as_its_source(level: Any, tmp_path: Path) -> None:
    source = mixtures.save(mixtures.make("qwen3_moe"), tmp_path / "in")
    give_experts(source, tmp_path / "kept", Config(level=level, token_reduction=4))
    for arch in ("dense-twin", "single-expert"):
        for name in ("in", "kept"):
            merge(tmp_path / name, tmp_path / f"{name}-{arch}", arch=arch)
        for file in ("model.safetensors", "config.json"):
            one, other = (tmp_path / f"{name}-{arch}" / file for name in ("in", "kept"))
            assert one.read_bytes() == other.read_bytes()


def give_experts(source: Path, folder: Path, config: Config) -> None:
    checkpoint = Checkpoint.open(source)
    family = recognise(checkpoint)
    block = upcycling.block(family, config)
    planned = upcycling.plan(checkpoint, family, block, init="copy", dtype="source", seed=0)
    folder.mkdir()
    upcycling.upcycle(planned, folder, progress=Quiet())


def test_each_linear_map_of_a_converted_model_has_weights_of_its_own(tmp_path: Path) -> None:
    upcycled(tmp_path / "in", experts=2)
    name = "encoder.layer.2.output.dense"

    def apart(tensors: dict[str, Tensor]) -> None:
        tensors[f"{name}.weight"][1] += 1.0
        tensors[f"{name}.bias"][1] -= 2.0

    before = load_file(mixtures.changed(tmp_path / "in", apart) / "model.safetensors")
    family = recognise(Checkpoint.open(tmp_path / "in"))
    shares = {layer.name: [1.0, 0.0] for layer in family.layers} | {name: [0.25, 0.75]}
    merge(tmp_path / "in", tmp_path / "out", shares=shares)
    after = load_file(tmp_path / "out" / "model.safetensors")
    for part in ("weight", "bias"):
        stack = before[f"{name}.{part}"].double()
        assert torch.equal(after[f"{name}.{part}"], (0.25 * stack[0] + 0.75 * stack[1]).float())


def test_a_trained_token_block_is_not_dropped(tmp_path: Path) -> None:
    upcycled(tmp_path / "in", level="token")
    name = "encoder.layer.4.output.dense.token.up.bias"
    mixtures.changed(tmp_path / "in", lambda tensors: tensors[name][3:4].fill_(0.5))
    with pytest.raises(CheckFailed, match=r"encoder\.layer\.4\.output\.dense: its token-level block changes"):
        merge(tmp_path / "in", tmp_path / "out")


def test_dropped_biases_come_back_as_zeros(tmp_path: Path) -> None:
    """`--compat reference` has none; a BERT that lacks them would not load whole."""
    dense = upcycled(tmp_path / "in", biases=False)
    merge(tmp_path / "in", tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == dense.keys()
    assert not any(after[f"encoder.layer.{n}.output.dense.bias"].any() for n in range(6))


def test_gpt2_gets_its_transposed_weights_back(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=2, vocab_size=20)).eval()
    model.save_pretrained(tmp_path / "in")

    def experts(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".mlp.c_" in name]:
            tensors[name] = (tensors[name].T if name.endswith("weight") else tensors[name]).repeat(
                (2, 1, 1) if name.endswith("weight") else (2, 1)
            )

    mixtures.changed(tmp_path / "in", experts)
    config = json.loads((tmp_path / "in" / "config.json").read_bytes())
    config["meo"] = {"level": "sequence", "experts": 2, "selected": 1}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    merge(tmp_path / "in", tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())


def test_maps_that_share_a_gate_share_its_weights(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=20, **size)).save_pretrained(tmp_path / "in")
    mlp = "model.layers.0.mlp"

    def experts(tensors: dict[str, Tensor]) -> None:
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = tensors[f"{mlp}.{name}.weight"]
            tensors[f"{mlp}.{name}.weight"] = torch.stack([weight, weight + 1])

    mixtures.changed(tmp_path / "in", experts)
    config = json.loads((tmp_path / "in" / "config.json").read_bytes())
    config["meo"] = {"level": "task", "experts": 2, "selected": 2}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    before = load_file(tmp_path / "in" / "model.safetensors")
    shares = {f"{mlp}.gate_proj": [0.0, 1.0], f"{mlp}.down_proj": [1.0, 0.0]}
    merge(tmp_path / "in", tmp_path / "out", shares=shares)
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, expert in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 0)):
        assert torch.equal(after[f"{mlp}.{name}.weight"], before[f"{mlp}.{name}.weight"][expert])


def test_what_makes_no_sense_of_a_converted_model_is_refused(tmp_path: Path) -> None:
    upcycled(tmp_path / "in")
    with pytest.raises(UsageError, match="a converted model has no such family"):
        merge(tmp_path / "in", tmp_path / "out", arch="single-expert")
    with pytest.raises(DataError, match="are single linear maps"):
        merge(tmp_path / "in", tmp_path / "out", align=Alignment("weights", {}, {}))
    config = json.loads((tmp_path / "in" / "config.json").read_bytes())
    config["meo"]["experts"] = 5
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"config\.json counts 5 experts"):
        merge(tmp_path / "in", tmp_path / "out")
