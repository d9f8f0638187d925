"""Generation against transformers' own, one prompt at a time, and draws against the probabilities they come from."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pomona.errors import CheckFailed, UnavailableError
from pomona.models import generation, losses
from pomona.models.generation import Batch, Continuation, Prompt, draw
from pomona.models.loading import Scorer
from pomona.runtime.device import Runtime

VOCABULARY = 60
_WIDTHS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_SHORT = {"vocab_size": VOCABULARY, "hidden_size": 32, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.3}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_WIDTHS),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3, eos_token_id=1
    ),
    "gemma2": lambda: transformers.Gemma2Config(**_WIDTHS, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "mistral": lambda: transformers.MistralConfig(**_WIDTHS, sliding_window=8),
    "cohere": lambda: transformers.CohereConfig(**_WIDTHS, logit_scale=0.25),
    "opt": lambda: transformers.OPTConfig(
        **{**_WIDTHS, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3, "dropout": 0.0}
    ),
    "bloom": lambda: transformers.BloomConfig(**_SHORT, n_layer=2, n_head=4),
    "mpt": lambda: transformers.MptConfig(
        vocab_size=VOCABULARY, d_model=32, n_heads=4, n_layers=2, eos_token_id=1, initializer_range=0.3
    ),
    "mamba": lambda: transformers.MambaConfig(**_SHORT, state_size=4, num_hidden_layers=2),
}
CACHING = {
    "llama": "shared",
    "gpt2": "shared",
    "gemma2": "own",
    "mistral": "own",
    "cohere": "shared",
    "opt": "shared",
    "bloom": "shared",
    "mpt": "own",
    "mamba": "none",
}

_built: dict[str, Any] = {}


def tiny(name: str) -> Any:
    """A random two-layer model, made once, sharp enough that a wrong position changes what it says. Its end is a token
    that about half of what it says has in it."""
    if name not in _built:
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None
        said = Counter(token for prompt in some_prompts(24, 0) for token in set(theirs(model, prompt)))
        model.generation_config.eos_token_id = min(said, key=lambda token: (abs(said[token] - 12), token))
        _built[name] = model
    return _built[name]


def end_of(model: Any) -> int:
    end: int = model.generation_config.eos_token_id
    return end


@contextmanager
def ending_with(model: Any, ends: list[int] | None) -> Iterator[None]:
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = ends
    yield
    model.generation_config.eos_token_id = before


def scorer_of(model: Any, *, shares: bool = True, threads: int = 1) -> Scorer:
    runtime = Runtime(None, torch.device("cpu"), torch.float32, "a test", threads)
    generation.register(runtime, model)
    return Scorer(model, None, runtime, {}, shares and losses.shares_heads(model))


def some_ids(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(2, VOCABULARY) for _ in range(length))


def some_prompts(count: int, seed: int, room: int = 12, **how: Any) -> list[Prompt]:
    """Prompts of mixed length: some alone, some with a common head, some twice."""
    rng = random.Random(seed)
    head = some_ids(rng, 20)
    found: list[Prompt] = []
    for number in range(count):
        ids = some_ids(rng, rng.randint(1, 30))
        if number % 3:
            ids = head + ids
        if number % 8 == 7:
            ids = found[-1].ids
        found.append(Prompt(ids, room, seed=number, **how))
    return found


def spoken(
    scorer: Scorer, prompts: Sequence[Prompt], tokens: int = 10**6, rows: int | None = None
) -> list[Continuation]:
    batches = generation.plan(scorer, prompts, tokens_per_batch=tokens, rows=rows, foreseen=10**6)
    return in_order(batches, generation.generate(scorer, prompts, batches))


def in_order(batches: Sequence[Batch], said: Sequence[Sequence[Continuation]]) -> list[Continuation]:
    found = {
        i: row for batch, rows in zip(batches, said, strict=True) for i, row in zip(batch.places, rows, strict=True)
    }
    return [found[i] for i in range(len(found))]


def theirs(model: Any, prompt: Prompt) -> tuple[int, ...]:
    out = model.generate(
        input_ids=torch.tensor([prompt.ids]),
        attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=prompt.room,
        pad_token_id=0,
    )
    return tuple(out[0, len(prompt.ids) :].tolist())


@contextmanager
def watched(module: Any, refuse: Callable[[Any], None] = lambda shape: None) -> Iterator[list[tuple[int, int]]]:
    """Shapes of the token batches that a module's forward was given; `refuse` may raise on one."""
    seen: list[tuple[int, int]] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows, width = (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape
        seen.append((rows, width))
        refuse((rows, width))

    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    yield seen
    handle.remove()


# --- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_batches_say_what_transformers_says_of_each_prompt_alone(name: str) -> None:
    model, prompts = tiny(name), some_prompts(24, 0)
    expected = [theirs(model, prompt) for prompt in prompts]
    found = spoken(scorer_of(model), prompts)
    assert [row.ids for row in found] == expected
    assert [row.finish for row in found] == ["stop" if ids[-1] == end_of(model) else "length" for ids in expected]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_prompts_of_these_tests_end_in_both_ways(name: str) -> None:
    """Otherwise the test above would prove less than it says."""
    model = tiny(name)
    said = [theirs(model, prompt) for prompt in some_prompts(64, 1)]
    assert 5 <= sum(ids[-1] == end_of(model) for ids in said) <= 59
    assert len({len(ids) for ids in said}) > 5 and len(set(said)) > 20


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("rows", [1, 5, None])
def test_64_prompts_in_batches_and_with_shared_heads_are_as_one_by_one_and_without(name: str, rows: int | None) -> None:
    model, prompts = tiny(name), some_prompts(64, 1)
    alone = [spoken(scorer_of(model, shares=False), [prompt])[0] for prompt in prompts]
    shared, unshared = scorer_of(model, threads=2), scorer_of(model, shares=False)
    assert any(batch.head >= 20 for batch in generation.plan(shared, prompts, tokens_per_batch=999, rows=9, foreseen=9))
    assert spoken(shared, prompts, rows=rows) == alone
    assert spoken(unshared, prompts, rows=rows) == alone


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_remembers_only_what_leaves_its_logits_as_they_are(name: str) -> None:
    assert generation.caching(tiny(name), shares_heads=losses.shares_heads(tiny(name))) == CACHING[name]


def test_any_of_several_ends_stops_a_row() -> None:
    model, prompt = tiny("llama"), Prompt(some_ids(random.Random(4), 9), 12)
    with ending_with(model, None):
        said = spoken(scorer_of(model), [prompt])[0].ids
    assert len(said) == 12
    with ending_with(model, [next(token for token in range(VOCABULARY) if token not in said), said[3]]):
        assert spoken(scorer_of(model), [prompt])[0] == Continuation(said[: said.index(said[3]) + 1], "stop")


@pytest.mark.parametrize("name", CONFIGS)
def test_each_row_has_a_room_of_its_own(name: str) -> None:
    rng = random.Random(5)
    prompts = [Prompt(p.ids, rng.randint(1, 20)) for p in some_prompts(20, 6)]
    assert [row.ids for row in spoken(scorer_of(tiny(name)), prompts)] == [theirs(tiny(name), p) for p in prompts]


def test_a_row_at_the_end_of_the_context_does_not_push_its_neighbours_over_it() -> None:
    """GPT-2 has no position beyond; a row that is done waits at its last."""
    model, rng = tiny("gpt2"), random.Random(7)
    prompts = [Prompt(some_ids(rng, 252), 4), *[Prompt(some_ids(rng, n), 40) for n in (5, 9, 30, 31, 32)]]
    with ending_with(model, None):
        assert [row.ids for row in spoken(scorer_of(model), prompts)] == [theirs(model, p) for p in prompts]


def test_a_buffer_that_is_full_grows() -> None:
    model = tiny("llama")
    prompts = [Prompt(p.ids, 150) for p in some_prompts(6, 8)]
    with ending_with(model, None):
        assert [row.ids for row in spoken(scorer_of(model), prompts)] == [theirs(model, p) for p in prompts]


def test_a_scorer_gives_text_and_the_number_of_its_tokens(tiny_model: Path) -> None:
    torch.manual_seed(2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**_WIDTHS, "vocab_size": 258})).eval()
    model.generation_config.eos_token_id = list(range(60, 90))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    scorer = replace(scorer_of(model, threads=2), tokenizer=tokenizer)
    rng = random.Random(19)
    prompts = [tuple(rng.randrange(2, 258) for _ in range(rng.randint(1, 20))) for _ in range(12)]
    expected = [theirs(model, Prompt(prompt, 10)) for prompt in prompts]
    assert {len(ids) == 10 for ids in expected} == {True, False}
    for tokens in (1, 60, 10**6):
        found = scorer.generate(prompts, 10, tokens_per_batch=tokens)
        assert found == [(tokenizer.decode(ids, skip_special_tokens=True), len(ids)) for ids in expected]


# --- what is computed ------------------------------------------------------------------------------------------------


def test_rows_that_are_done_leave_the_batch() -> None:
    rng, model = random.Random(9), tiny("llama")
    prompts = [Prompt(some_ids(rng, 10), room) for room in (2, 2, 2, 2, 2, 10, 10, 30)]
    with ending_with(model, None), watched(model.base_model) as seen:
        spoken(scorer_of(model, shares=False), prompts)
    steps = [rows for rows, width in seen[-30:] if width == 1]
    assert steps == [8] + [3] * 8 + [1] * 20


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_equal_prompts_and_common_heads_are_read_once(name: str) -> None:
    rng, model = random.Random(10), tiny(name)
    head, tail = some_ids(rng, 30), some_ids(rng, 12)
    prompts = [Prompt(head + tail, 5)] * 6 + [Prompt(head + some_ids(rng, 7), 5) for _ in range(3)]
    scorer = scorer_of(model)
    assert scorer.caching == "shared"
    with watched(model.base_model) as seen:
        spoken(scorer, prompts)
    assert seen[:2] == [(1, 30), (4, 12)]
    assert seen[2] == (9, 1)


def test_a_batch_that_does_not_fit_is_halved_and_says_the_same() -> None:
    model, prompts = tiny("llama"), some_prompts(16, 11, temperature=0.8)
    expected = spoken(scorer_of(model), prompts)

    def refuse(shape: tuple[int, int]) -> None:
        if shape[0] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    scorer = scorer_of(model)
    assert scorer.caching == "shared"
    with watched(model.base_model, refuse) as seen:
        assert spoken(scorer, prompts) == expected
    assert max(rows for rows, _ in seen) > 3

    def refuse_all(shape: tuple[int, int]) -> None:
        raise MemoryError

    with watched(model.base_model, refuse_all), pytest.raises(UnavailableError, match="single sequence") as caught:
        spoken(scorer, prompts)
    assert "new tokens" in (caught.value.hint or "")


@pytest.mark.parametrize("damage", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_and_no_token(damage: float, temperature: float) -> None:
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_WIDTHS)).eval()
    sound = Prompt((3, 4, 5), 1, temperature)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = damage
    scorer = scorer_of(model)
    assert spoken(scorer, [sound])[0].finish in ("stop", "length")
    with pytest.raises(CheckFailed, match="not finite") as caught:
        spoken(scorer, [Prompt((3, 7, 5), 4, temperature), *[Prompt((3, 4, n), 4, temperature) for n in range(8, 16)]])
    assert caught.value.exit_code == 9


# --- sampling --------------------------------------------------------------------------------------------------------


def softmax(logits: Any, temperature: float) -> Any:
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    return p / p.sum()


def nucleus(p: Any, top_p: float) -> Any:
    """The fewest of the most probable tokens that hold `top_p`, renormalised."""
    kept, held = np.zeros_like(p), 0.0
    for token in np.argsort(-p):
        if held >= top_p:
            break
        kept[token], held = p[token], held + p[token]
    return kept / kept.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
@pytest.mark.parametrize("vocabulary", [40, 1000])
def test_draws_have_the_probabilities_of_the_softmax(temperature: float, top_p: float, vocabulary: int) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, vocabulary)
    expected = nucleus(softmax(logits, temperature), top_p)
    count = 20_000
    uniform = torch.from_numpy(rng.random(count))
    found: list[int] = []
    for part in uniform.split(2000):
        rows = len(part)
        found += draw(
            torch.tensor(logits, dtype=torch.float32).expand(rows, -1),
            torch.full((rows,), temperature),
            torch.full((rows,), top_p),
            part,
        ).tolist()
    drawn = np.bincount(found, minlength=vocabulary)
    assert drawn[expected == 0].sum() == 0
    likely = expected * count >= 5
    observed = [*drawn[likely], drawn[~likely].sum()]
    awaited = [*(expected[likely] * count), expected[~likely].sum() * count]
    chi2 = sum((o - e) ** 2 / e for o, e in zip(observed, awaited, strict=True) if e > 0)
    freedom = max(1, sum(e > 0 for e in awaited) - 1)
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)  # five standard deviations


def test_a_draw_is_the_inverse_of_the_cumulative_probability() -> None:
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]])).expand(6, -1)
    uniform = torch.tensor([0.0, 0.199, 0.201, 0.699, 0.701, 1 - 2**-32], dtype=torch.float64)
    assert draw(logits, torch.ones(6), None, uniform).tolist() == [0, 0, 1, 1, 2, 2]


def test_ties_are_drawn_from_together() -> None:
    logits = torch.zeros(4, 3)
    uniform = torch.tensor([0.1, 0.4, 0.9, 1 - 2**-32], dtype=torch.float64)
    assert draw(logits, torch.ones(4), torch.full((4,), 0.2), uniform).tolist() == [0, 1, 2, 2]


def test_a_token_outside_the_nucleus_is_not_drawn_even_at_nought() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.9]]))
    assert draw(logits, torch.ones(1), torch.tensor([0.5]), torch.zeros(1, dtype=torch.float64)).tolist() == [1]


def test_without_top_p_no_token_is_too_improbable_beside_a_row_with_it() -> None:
    logits = torch.log(torch.tensor([1.0, *[1e-9] * 5])).expand(2, -1)
    uniform = torch.full((2,), 1 - 2**-32, dtype=torch.float64)
    assert draw(logits, torch.ones(2), torch.tensor([1.0, 0.5]), uniform).tolist() == [5, 0]


def test_an_extreme_temperature_gives_no_number_away() -> None:
    logits = torch.tensor([[80.0, -80.0, 79.0]]).expand(2, -1)
    uniform = torch.tensor([0.5, 1 - 2**-32], dtype=torch.float64)
    assert draw(logits, torch.tensor([1e-30, 1e-30]), None, uniform).tolist() == [0, 0]
    assert draw(logits, torch.tensor([1e30, 1e30]), None, uniform).tolist() == [1, 2]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mamba"])
def test_what_a_row_draws_does_not_depend_on_its_neighbours(name: str) -> None:
    prompts = some_prompts(32, 12, temperature=0.8, top_p=0.9)
    prompts += [Prompt(prompts[0].ids, 12), Prompt(prompts[0].ids, 12, 0.8, 0.9, seed=99)]
    scorer = scorer_of(tiny(name))
    expected = [spoken(scorer, [prompt])[0] for prompt in prompts]
    assert expected[0] != expected[-1] and expected[0] != expected[-2]
    for rows in (3, None):
        assert spoken(scorer, prompts, rows=rows) == expected
    assert spoken(scorer, prompts[::-1]) == expected[::-1]
    assert expected[-2].ids == theirs(tiny(name), prompts[-2])  # greedy among the drawn


def test_first_tokens_follow_the_models_probabilities_over_seeds() -> None:
    model, ids = tiny("llama"), some_ids(random.Random(13), 12)
    with torch.no_grad():
        expected = softmax(model(torch.tensor([ids])).logits[0, -1].numpy(), 2.0)
    count = 4000
    said = spoken(scorer_of(model), [Prompt(ids, 1, 2.0, 1.0, seed) for seed in range(count)])
    drawn = np.bincount([row.ids[0] for row in said], minlength=VOCABULARY) / count
    # Half the sum of absolute deviations, each of sqrt(2 p (1 - p) / (pi n)) on average.
    awaited = 0.5 * np.sqrt(2 * expected * (1 - expected) / (np.pi * count)).sum()
    assert 0.5 * np.abs(drawn - expected).sum() < 1.5 * awaited
