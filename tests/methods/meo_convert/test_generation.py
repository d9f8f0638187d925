"""Generation: gates and merged experts are frozen with the cache, follow its rows, and change no token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from methods.meo_convert.test_scopes import DECODERS, converted
from methods.meo_convert.tinies import tiny
from pomona.methods.meo_convert import modeling_meo as meo

SCOPES = ["prompt", "segment:3", "segment:1"]
IDS = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(5))


def scores(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """The logits of every step of a greedy generation of 8 tokens, (steps, rows, vocabulary)."""
    found = model.generate(
        ids, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return torch.stack(found.logits)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", DECODERS)
def test_a_cache_changes_no_logit(name: str, scope: str) -> None:
    for level in ("sequence", "token"):
        model = converted(name, scope=scope, level=level)
        torch.testing.assert_close(scores(model, IDS), scores(model, IDS, use_cache=False), atol=2e-5, rtol=0)


@pytest.mark.parametrize("scope", SCOPES)
def test_rows_of_a_padded_batch_go_on_as_they_would_alone(scope: str) -> None:
    model = converted("llama", scope=scope)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :3], mask[1, :3] = 0, 0
    ids[2, :6], mask[2, :6] = 0, 0
    for use_cache in (True, False):
        together = scores(model, ids, attention_mask=mask, use_cache=use_cache)
        for row, start in enumerate((0, 3, 6)):
            alone = scores(model, ids[row : row + 1, start:], use_cache=use_cache)
            torch.testing.assert_close(together[:, row : row + 1], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ["llama", "olmoe", "t5", "bart"])
def test_beams_carry_their_own_gates(name: str, scope: str) -> None:
    model = converted(name, scope=scope)
    options = {"max_new_tokens": 8, "num_beams": 4, "num_return_sequences": 4, "do_sample": False}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    cached, plain = model.generate(IDS, **options), model.generate(IDS, use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, atol=2e-5, rtol=0)


@pytest.mark.parametrize("level", ["sequence", "task"])
def test_experts_are_merged_once_for_a_generation(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("llama", scope="prompt", level=level, task_tokens=[4, 9])
    merges = []
    merge = meo.merge
    monkeypatch.setattr(meo, "merge", lambda *given: merges.append(1) or merge(*given))
    scores(model, IDS)
    assert len(merges) == 2 * 3 * 2  # layers, maps, weights and biases
    merges.clear()
    monkeypatch.setattr(meo, "KEPT_WITH_CACHE", 0)
    scores(model, IDS)
    assert len(merges) == 8 * 2 * 3 * 2


def test_segments_are_merged_again_only_where_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("mixtral", scope="segment:3")
    merges = []
    merge = meo.merge
    scores_before = scores(model, IDS[:1])
    monkeypatch.setattr(meo, "merge", lambda *given: merges.append(1) or merge(*given))
    torch.testing.assert_close(scores(model, IDS[:1]), scores_before)
    # of 7 + 7 tokens read: the prompt, then one merge in each of the segments 6-8, 9-11 and 12-14
    assert len(merges) == 4 * 2 * 2


@pytest.mark.parametrize("scope", SCOPES)
def test_a_cache_can_be_read_on_in_several_steps_and_copied(scope: str) -> None:
    model = converted("qwen2", scope=scope)
    tail = torch.randint(3, 50, (3, 6), generator=torch.Generator().manual_seed(6))
    with torch.no_grad(), meo.prompted(model, IDS.shape[1]):
        whole = model(input_ids=torch.cat((IDS, tail), 1), use_cache=False).logits[:, 7:]
        cache = DynamicCache()
        model(input_ids=IDS, past_key_values=cache)
        other = copy.deepcopy(cache)
        for _ in range(2):
            parts = [model(input_ids=part, past_key_values=cache).logits for part in tail.split([1, 3, 2], 1)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=0)
            cache = other
        cache = DynamicCache()
        model(input_ids=IDS, past_key_values=cache)
        kept = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([1, 1, 1]))
        model(input_ids=tail[:, :1], past_key_values=cache)
        found = model(input_ids=tail[:, :1], past_key_values=kept).logits
        torch.testing.assert_close(found, whole[:, :1], atol=2e-5, rtol=0)
        selected = torch.tensor([2, 0, 0])
        cache = DynamicCache()
        model(input_ids=IDS, past_key_values=cache)
        cache.batch_select_indices(selected)
        found = model(input_ids=tail[selected, :1], past_key_values=cache).logits
        torch.testing.assert_close(found, whole[selected, :1], atol=2e-5, rtol=0)
        cache.batch_repeat_interleave(2)
        found = model(input_ids=tail[selected, 1:2].repeat_interleave(2, 0), past_key_values=cache).logits
        torch.testing.assert_close(found, whole[selected, 1:2].repeat_interleave(2, 0), atol=2e-5, rtol=0)


@pytest.mark.parametrize("run_as", ["meo", "moe"])
@pytest.mark.parametrize("level", ["sequence", "token", "task"])
def test_one_prompt_can_be_continued_in_several_ways(level: str, run_as: str) -> None:
    model = converted("llama", scope="prompt", level=level, run_as=run_as, task_tokens=[4, 9])
    tails = torch.randint(3, 50, (4, 3), generator=torch.Generator().manual_seed(6))
    with torch.no_grad(), meo.prompted(model, 7):
        whole = model(input_ids=torch.cat((IDS[:1].expand(4, -1), tails), 1)).logits[:, 7:]
        cache = DynamicCache()
        model(input_ids=IDS[:1], past_key_values=cache)
        cache.batch_repeat_interleave(4)
        found = model(input_ids=tails, past_key_values=cache).logits
    torch.testing.assert_close(found, whole, atol=2e-5, rtol=0)


def test_memory_for_merged_experts_is_given_back_where_a_segment_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("mixtral", scope="segment:1")
    one = 3 * 16 * 32 * 4
    monkeypatch.setattr(meo, "KEPT_WITH_CACHE", 2 * one)
    found = model.generate(IDS[:1], max_new_tokens=12, return_dict_in_generate=True, do_sample=False)
    assert 0 <= found.past_key_values.meo_memory.size <= 2 * one
    model = converted("mixtral", scope="prompt")
    found = model.generate(IDS, max_new_tokens=4, return_dict_in_generate=True, do_sample=False)
    assert found.past_key_values.meo_memory.size == 0  # three sequences are too many
    found = model.generate(IDS[:1], max_new_tokens=4, return_dict_in_generate=True, do_sample=False)
    assert found.past_key_values.meo_memory.size == 2 * one


@pytest.mark.parametrize("name", ["llama", "olmoe"])
def test_half_precision_generates_too(name: str) -> None:
    model = converted(name, scope="prompt")
    single = scores(model, IDS)[0]
    half = model.to(torch.bfloat16)
    first = scores(half, IDS)
    assert (first[0].float() - single).norm() < 0.03 * single.norm()
    torch.testing.assert_close(first, scores(half, IDS, use_cache=False), atol=0.05, rtol=0.05)


def test_caches_that_do_not_fit_are_refused() -> None:
    model = converted("llama", scope="segment:3")
    with torch.no_grad():
        foreign = tiny("llama")(input_ids=IDS, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="another model"):
            model(input_ids=IDS[:, :1], past_key_values=foreign)
        own = model(input_ids=IDS, use_cache=True).past_key_values
        own.crop(-2)
        with pytest.raises(ValueError, match="cut from 7 tokens to 5"):
            model(input_ids=IDS[:, :1], past_key_values=own)


def test_a_pass_that_only_scores_frees_what_its_gates_chose() -> None:
    model = converted("llama", scope="prompt")
    with torch.no_grad():
        model(input_ids=IDS)
    scene = model.model.layers[0].mlp.gate_proj.scene
    assert scene.now == meo.Pass() and scene.prompt is None and scene.labels is None
