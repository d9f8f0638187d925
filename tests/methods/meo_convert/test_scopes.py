"""What gates may see: no padding, no later token (checks A8, quirks 5 and 6); segments against a loop in NumPy."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from methods.meo_convert.tinies import DENSE, ENCODERS, MIXTURES, inputs, linear, stir, tiny
from pomona.methods.meo_convert import modeling_meo as meo

QUICK = ("gpt2", "t5", "llama", "olmoe")
DECODERS = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in (*DENSE, *MIXTURES)
    if name not in ENCODERS
]


def converted(name: str, **block: Any) -> Any:
    """A tiny model with four experts, stirred."""
    model = meo.install(tiny(name), {"experts": 4, "selected": 1 if name == "switch_transformers" else 2, **block})
    stir(model)
    return model


def gates_by_hand(map_: meo.MergedLinear, mean: Any) -> Any:
    logits = map_.gate.weight.detach().double().numpy() @ mean
    kept = np.argsort(-logits)[: map_.settings.selected]
    scores = np.zeros(len(logits))
    scores[kept] = np.exp(logits[kept] - logits[kept].max())
    return scores / scores.sum()


def affine(map_: meo.MergedLinear, scores: Any, tokens: Any) -> Any:
    assert map_.bias is not None
    weight, bias = (p.detach().double().numpy() for p in (map_.weight, map_.bias))
    return tokens @ np.einsum("n,nfd->fd", scores, weight).T + scores @ bias


def by_segment(map_: meo.MergedLinear, tokens: Any) -> Any:
    """One sequence without padding, (S, d): the gates of a segment from the mean of the one before."""
    size, out = map_.settings.segment, []
    for start in range(0, len(tokens), size):
        seen = tokens[start - size : start].mean(0) if start else tokens[0]
        out.append(affine(map_, gates_by_hand(map_, seen), tokens[start : start + size]))
    return np.concatenate(out)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 11, 40])
def test_segments_are_gated_by_the_segment_before(size: int, grad: bool) -> None:
    map_ = linear(6, 5, experts=4, selected=2, scope=f"segment:{size}", causal=True)
    x = torch.randn(4, 11, 6)
    mask = torch.ones(4, 11)
    mask[1, :4] = mask[2, 8:] = mask[3, :10] = 0  # padding on the left, on the right, all but one
    for given in (None, mask):
        map_.scene.now = meo.Pass(mask=given)
        with torch.set_grad_enabled(grad):
            found = map_(x).detach().double().numpy()
        for row in range(4):
            real = np.ones(11, bool) if given is None else given[row].numpy().astype(bool)
            expected = by_segment(map_, x[row].double().numpy()[real])
            np.testing.assert_allclose(found[row][real], expected, atol=1e-5)


def test_prompts_gate_what_follows_them() -> None:
    map_ = linear(6, 5, experts=4, selected=2, scope="prompt", causal=True)
    x = torch.randn(2, 7, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]])
    cases: list[tuple[dict[str, Any], list[slice]]] = [
        ({}, [slice(2, 3), slice(0, 1)]),  # nobody said: the first token
        ({"prompt": 4}, [slice(2, 4), slice(0, 4)]),
        ({"prompt": 1}, [slice(2, 3), slice(0, 1)]),  # padding is no prompt
        ({"prefill": True}, [slice(2, 7), slice(0, 6)]),
        (
            {"labels": torch.tensor([[-100, -100, -100, -100, 5, 5, 5], [7, -100, -100, 5, 5, 5, -100]])},
            [slice(2, 4), slice(0, 3)],  # the label of the first token is never scored
        ),
        ({"labels": torch.full((2, 7), 5)}, [slice(2, 3), slice(0, 1)]),
        ({"labels": torch.full((2, 7), -100)}, [slice(2, 7), slice(0, 6)]),
    ]
    for said, prompts in cases:
        map_.scene.now = meo.Pass(mask=mask, **said)
        found = map_(x).detach().double().numpy()
        for row, prompt in enumerate(prompts):
            tokens = x[row].double().numpy()
            expected = affine(map_, gates_by_hand(map_, tokens[prompt].mean(0)), tokens)
            np.testing.assert_allclose(found[row], expected, atol=1e-5)


def logits(model: Any, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs(model, ids), **more).logits
    return found


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("scope", ["prompt", "segment:3", "segment:1"])
@pytest.mark.parametrize("name", DECODERS)
def test_no_logit_of_a_decoder_depends_on_a_later_token(name: str, scope: str, level: str) -> None:
    model = converted(name, scope=scope, level=level)
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    before = logits(model, ids)
    for at in range(1, 9):
        changed = ids.clone()
        changed[:, at] = (changed[:, at] + 7) % 47 + 3
        if model.config.is_encoder_decoder:
            with torch.no_grad():
                after = model(input_ids=ids, decoder_input_ids=changed).logits
        else:
            after = logits(model, changed)
        torch.testing.assert_close(after[:, :at], before[:, :at], atol=1e-5, rtol=0)
        assert (after[:, at:] - before[:, at:]).abs().max() > 1e-4


def test_declared_prompts_are_seen_whole_and_nothing_after_them() -> None:
    model = converted("llama", scope="prompt")
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(2))

    def scored(ids: Tensor) -> Tensor:
        with meo.prompted(model, 4):
            return logits(model, ids)

    before = scored(ids)
    for at, safe in ((2, 0), (3, 0), (4, 4), (6, 6)):
        changed = ids.clone()
        changed[:, at] = (changed[:, at] + 7) % 47 + 3
        difference = (scored(changed) - before).abs().amax((0, 2))
        assert (difference[:safe] < 1e-5).all()
        assert safe or difference[0] > 1e-4  # another token of the prompt moves its gates, and every logit with them
    assert (logits(model, ids) - before).abs().max() > 1e-4


def test_prompts_can_be_declared_within_each_other() -> None:
    model = converted("llama", scope="prompt")
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(2))
    with meo.prompted(model, 4):
        before = logits(model, ids)
        model.generate(ids, max_new_tokens=2)
        assert torch.equal(logits(model, ids), before)


def test_labels_end_the_prompt_of_a_language_model_in_training() -> None:
    model = converted("llama", scope="prompt")
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, :4] = -100
    with meo.prompted(model, 4):
        declared = logits(model, ids)
    torch.testing.assert_close(logits(model, ids, labels=labels), declared)
    assert (logits(model, ids) - declared).abs().max() > 1e-4  # and are forgotten afterwards
    other = copy.deepcopy(model)
    torch.testing.assert_close(logits(other, ids, labels=labels), declared)


def test_a_sequence_classifier_reads_its_text_as_the_prompt() -> None:
    model = meo.install(tiny("llama", head="LlamaForSequenceClassification", num_labels=3), {"scope": "prompt"})
    stir(model)
    scene = model.model.layers[0].mlp.gate_proj.scene
    seen = []
    scene_seen = scene.seen
    scene.seen = lambda x: seen.append(scene_seen(x)) or seen[-1]
    ids = torch.randint(3, 50, (2, 6))
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    assert all(torch.equal(each, mask.bool()) for each in seen) and seen


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "scope"),
    [(name, "sequence") for name in ENCODERS]
    + [(name, scope) for name in ("llama", "gpt2", "olmoe", "t5", "bart") for scope in ("prompt", "segment:3")],
)
def test_a_text_alone_and_padded_in_a_batch_comes_out_the_same(name: str, scope: str, side: str) -> None:
    for level in ("sequence", "token"):
        model = converted(name, scope=scope, level=level)
        short = torch.randint(3, 50, (1, 5), generator=torch.Generator().manual_seed(3))
        ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(4))
        mask = torch.ones_like(ids)
        here = slice(4, 9) if side == "left" else slice(0, 5)
        ids[0], mask[0] = 0, 0
        ids[0, here], mask[0, here] = short[0], 1
        given = inputs(model, ids, mask)
        if name in ("llama", "gpt2", "olmoe", "bert"):
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if side == "left" and name in ("t5", "bart", "roberta"):
            continue  # they count positions over padding, experts or not
        with torch.no_grad():
            torch.testing.assert_close(
                model(**given).logits[:1, here], model(**inputs(model, short)).logits, atol=1e-5, rtol=0
            )


def test_the_released_gates_see_padding() -> None:
    found = []
    for compat in ("none", "reference"):
        model = converted("roberta", compat=compat)
        ids = torch.randint(3, 50, (1, 5), generator=torch.Generator().manual_seed(3))
        padded = torch.cat((ids, torch.zeros(1, 4, dtype=torch.int64)), 1)
        with torch.no_grad():
            alone = model(**inputs(model, ids)).logits
            found.append(float((model(**inputs(model, padded, padded != 0)).logits[:, :5] - alone).abs().max()))
    assert found[0] < 1e-5 and found[1] > 1e-2


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "mixtral", "switch_transformers"])
def test_gates_of_a_decoder_that_see_later_tokens_are_refused_unless_compatible(name: str) -> None:
    selected = 1 if name == "switch_transformers" else 2
    with pytest.raises(ValueError, match='"prompt" or "segment:LEN"'):
        meo.install(tiny(name), {"experts": 4, "selected": selected, "scope": "sequence"})
    model = converted(name, scope="sequence", compat="reference")
    ids = torch.randint(3, 50, (1, 9), generator=torch.Generator().manual_seed(1))
    changed = torch.cat((ids[:, :-1], ids[:, -1:] % 47 + 3), 1)
    if not model.config.is_encoder_decoder:
        assert (logits(model, changed) - logits(model, ids))[:, :-1].abs().max() > 1e-4


def test_masks_of_four_axes_are_refused() -> None:
    model = converted("llama", scope="prompt")
    ids = torch.randint(3, 50, (1, 4))
    with pytest.raises(ValueError, match="two axes"):
        model(input_ids=ids, attention_mask=torch.zeros(1, 1, 4, 4))
    model(input_ids=ids)  # and nothing of the failure is left
