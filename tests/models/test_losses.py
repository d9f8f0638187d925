"""Losses against a float64 restatement that calls the model on one whole sequence at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.errors import UnavailableError
from pomona.models import losses
from pomona.models.loading import Scorer
from pomona.models.losses import Passage, batches, heads, next_token_logprobs, passage_nll, text_statistics
from pomona.runtime.device import Runtime

VOCABULARY = 60
_WIDTHS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_WIDTHS),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.3, eos_token_id=1
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **_WIDTHS, head_dim=8, sliding_window=8, final_logit_softcapping=2.0, query_pre_attn_scalar=8
    ),
    "qwen2": lambda: transformers.Qwen2Config(**_WIDTHS),
    "granite": lambda: transformers.GraniteConfig(**_WIDTHS, logits_scaling=8.0),
    "cohere": lambda: transformers.CohereConfig(**_WIDTHS, logit_scale=0.25),
}
TRANSFORMS_LOGITS = ["gemma2", "granite", "cohere"]
PLAIN_ATTENTION = ["llama", "gpt2", "qwen2", "granite", "cohere"]

_built: dict[str, Any] = {}


def tiny(name: str) -> Any:
    """A random two-layer model, made once; sharp enough that a span off by one gives a clearly wrong sum."""
    if name not in _built:
        torch.manual_seed(0)
        _built[name] = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    return _built[name]


def scorer_of(model: Any, *, threads: int = 1, shares: bool | None = None) -> Scorer:
    runtime = Runtime(None, torch.device("cpu"), torch.float32, "a test", threads)
    losses.register(runtime, model)
    return Scorer(model, None, runtime, {}, losses.shares_heads(model) if shares is None else shares)


def log_probabilities(model: Any, ids: Sequence[int]) -> Any:
    """log p(next token | ids[:i + 1]) for every i, float64 NumPy, shape [length, vocabulary]."""
    with torch.no_grad():
        logits = model(torch.tensor([list(ids)])).logits[0].double().numpy()
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def reference(model: Any, passage: Passage) -> list[float]:
    log_p = log_probabilities(model, passage.ids)
    return [-math.fsum(log_p[i - 1, passage.ids[i]] for i in range(start, end)) for start, end in passage.spans]


def some_ids(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(2, VOCABULARY) for _ in range(length))


def some_passages(count: int, seed: int = 0, longest: int = 48) -> list[Passage]:
    """Passages of all lengths with one to three spans: touching, apart, of one token, up to the last token."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        length = rng.randint(2, longest)
        spans = []
        for _ in range(rng.randint(1, 3)):
            start = rng.randint(1, length - 1)
            spans.append((start, rng.choice([start + 1, length, rng.randint(start + 1, length)])))
        found.append(Passage(some_ids(rng, length), tuple(spans)))
    return found


def family(rng: random.Random, head: tuple[int, ...], count: int, start: int | None = None) -> list[Passage]:
    """Passages that begin with `head`; each has a span from `start`, by default just behind the head, and one later."""
    found = []
    for _ in range(count):
        ids = head + some_ids(rng, rng.randint(4, 25))
        first = len(head) + 1 if start is None else start
        found.append(Passage(ids, ((first, first + 2), (len(ids) - 1, len(ids)))))
    return found


def nll(scorer: Scorer, passages: Sequence[Passage], tokens: int = 256, chunk: int = 64) -> list[tuple[float, ...]]:
    return passage_nll(scorer, passages, tokens_per_batch=tokens, chunk_rows=chunk)


def agree(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]], relative: float) -> None:
    assert [len(spans) for spans in found] == [len(spans) for spans in expected]
    for row, (some, others) in enumerate(zip(found, expected, strict=True)):
        assert list(some) == pytest.approx(list(others), rel=relative, abs=0), row


# --- passages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_sums_equal_one_by_one_arithmetic(name: str) -> None:
    model, passages = tiny(name), some_passages(24)
    agree(nll(scorer_of(model), passages), [reference(model, p) for p in passages], 1e-5)


@pytest.mark.parametrize("name", TRANSFORMS_LOGITS)
def test_the_reference_feels_what_an_architecture_does_to_its_logits(name: str) -> None:
    """Otherwise the test above could not tell."""
    model, passage = tiny(name), Passage(tuple(range(2, 30)), ((4, 28),))
    with torch.no_grad():
        raw = model.get_output_embeddings()(model.base_model(torch.tensor([passage.ids])).last_hidden_state)[0]
    plain = -float(torch.log_softmax(raw, -1)[torch.arange(3, 27), torch.tensor(passage.ids[4:28])].sum())
    assert abs(plain - reference(model, passage)[0]) > 0.1


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_batches_chunks_order_and_company_do_not_change_sums(name: str) -> None:
    model = tiny(name)
    rng = random.Random(3)
    passages = some_passages(16, seed=1) + family(rng, some_ids(rng, 20), 5)
    scorer = scorer_of(model)
    expected = nll(scorer, passages)
    for tokens in (1, 64, 10**6):
        for chunk in (1, 7, 10**6):
            agree(nll(scorer, passages, tokens, chunk), expected, 2e-6)
    order = list(range(len(passages)))
    rng.shuffle(order)
    shuffled = nll(scorer, [passages[i] for i in order])
    agree([shuffled[order.index(i)] for i in range(len(order))], expected, 2e-6)
    agree([nll(scorer, [passage])[0] for passage in passages], expected, 2e-6)


def test_threads_do_not_change_a_bit() -> None:
    rng = random.Random(4)
    passages = some_passages(30, seed=2) + family(rng, some_ids(rng, 18), 6)
    assert nll(scorer_of(tiny("llama"), threads=3), passages, 64) == nll(scorer_of(tiny("llama")), passages, 64)


def test_a_row_limit_bounds_batches_and_changes_no_sum() -> None:
    model, passages = tiny("llama"), some_passages(20, seed=5)
    scorer = scorer_of(model)
    with watched(model.base_model) as seen:
        limited = passage_nll(scorer, passages, tokens_per_batch=10**6, chunk_rows=64, rows=3)
    assert max(shape[0] for shape in seen) == 3
    agree(limited, nll(scorer, passages), 2e-6)


def test_nothing_to_score_is_nothing() -> None:
    assert nll(scorer_of(tiny("llama")), []) == []


# --- shared heads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN_ATTENTION)
def test_a_shared_head_is_computed_once_and_changes_no_sum(name: str) -> None:
    model, rng = tiny(name), random.Random(6)
    one, other = some_ids(rng, 16), some_ids(rng, 30)
    passages = family(rng, one, 4) + some_passages(5, seed=7) + family(rng, other, 6)
    rng.shuffle(passages)
    with watched(model.base_model) as seen:
        shared = nll(scorer_of(model, shares=True), passages)
    assert seen.count((1, 16)) >= 1 and seen.count((1, 30)) == 1
    with watched(model.base_model) as seen_alone:
        alone = nll(scorer_of(model, shares=False), passages)
    saved = sum(a * b for a, b in seen_alone) - sum(a * b for a, b in seen)
    assert saved > 100  # tokens, padding counted
    agree(shared, alone, 2e-6)
    agree(shared, [reference(model, p) for p in passages], 1e-5)


@pytest.mark.parametrize("name", PLAIN_ATTENTION)
def test_a_span_inside_what_a_family_shares_is_scored_too(name: str) -> None:
    """The head ends where the first scored token is predicted, though the tokens agree beyond."""
    model, rng = tiny(name), random.Random(8)
    passages = family(rng, some_ids(rng, 40), 5, start=21)
    assert heads(passages) == [20] * 5
    agree(nll(scorer_of(model, shares=True), passages), [reference(model, p) for p in passages], 1e-5)


def test_more_families_than_are_remembered_are_still_right() -> None:
    model, rng = tiny("llama"), random.Random(9)
    passages = [p for _ in range(12) for p in family(rng, some_ids(rng, 17), 4)]
    agree(nll(scorer_of(model), passages, 40), [reference(model, p) for p in passages], 1e-5)


def test_a_second_call_may_use_a_head_again() -> None:
    """A remembered head must not have grown by what was appended to it."""
    model, rng = tiny("llama"), random.Random(10)
    passages = family(rng, some_ids(rng, 20), 6)
    scorer = scorer_of(model)
    assert nll(scorer, passages) == nll(scorer, passages)


def test_only_plain_attention_shares_heads() -> None:
    shares = {name for name in CONFIGS if losses.shares_heads(tiny(name))}
    assert shares == set(PLAIN_ATTENTION)
    mistral = transformers.MistralConfig(**_WIDTHS, sliding_window=8)
    mamba = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1)
    for config in (mistral, mamba):
        assert not losses.shares_heads(transformers.AutoModelForCausalLM.from_config(config))


def test_a_sliding_window_is_never_given_a_shared_head() -> None:
    model, rng = tiny("gemma2"), random.Random(11)
    passages = family(rng, some_ids(rng, 30), 5)
    with watched(model.base_model) as seen:
        found = nll(scorer_of(model), passages)
    assert min(width for _, width in seen) > 30
    agree(found, [reference(model, p) for p in passages], 1e-5)


@st.composite
def kindred(draw: st.DrawFn) -> list[Passage]:
    """Passages over two tokens, many of which begin alike for about as long as a head must be."""
    pool = draw(st.lists(st.lists(st.integers(1, 2), min_size=15, max_size=22), min_size=1, max_size=3))
    found = []
    for _ in range(draw(st.integers(0, 12))):
        ids = [*draw(st.sampled_from(pool)), *draw(st.lists(st.integers(1, 2), min_size=1, max_size=5))]
        ids = ids[: draw(st.sampled_from([len(ids), len(ids), len(ids), 2, 15, 16, 17]))]
        starts = draw(st.lists(st.integers(max(1, len(ids) - 6), len(ids) - 1), min_size=1, max_size=2))
        found.append(Passage(tuple(ids), tuple((start, start + 1) for start in starts)))
    return found


@settings(deadline=None, max_examples=300)
@given(kindred())
def test_heads_are_what_families_of_four_have_in_common(passages: list[Passage]) -> None:
    found = heads(passages)
    for passage, head in zip(passages, found, strict=True):
        kin = [p for p in passages if p.ids[:16] == passage.ids[:16]]
        furthest = min(start - 1 for p in kin for start, _ in p.spans)
        common = max(n for n in range(furthest + 1) if len({p.ids[:n] for p in kin}) == 1)
        assert head == (common if common >= 16 and len(kin) >= 4 else 0)
        assert head < len(passage.ids) and all(head < start for start, _ in passage.spans)


# --- batches ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 200), st.none() | st.integers(1, 5))
def test_batches_hold_every_index_once_within_the_budget(lengths: list[int], tokens: int, rows: int | None) -> None:
    planned = batches(lengths, tokens, rows)
    assert sorted(i for batch in planned for i in batch) == list(range(len(lengths)))
    for batch in planned:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= tokens
        assert rows is None or len(batch) <= rows
    flat = [lengths[i] for batch in planned for i in batch]
    assert flat == sorted(flat, reverse=True)
    for batch in planned[:-1]:  # none is closed early
        assert len(batch) == rows or max(lengths[i] for i in batch) * (len(batch) + 1) > tokens


# --- memory ----------------------------------------------------------------------------------------------------------

OUT_OF_MEMORY = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    lambda: MemoryError(),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
]


class watched:
    """Shapes of the token batches that a module's forward was given; `refuse` may raise on one."""

    def __init__(self, module: Any, refuse: Callable[[Any], None] = lambda shape: None) -> None:
        self._module, self._refuse = module, refuse
        self._seen: list[Any] = []

    def _look(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shape = tuple((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape)
        self._seen.append(shape)
        self._refuse(shape)

    def __enter__(self) -> list[Any]:
        self._handle = self._module.register_forward_pre_hook(self._look, with_kwargs=True)
        return self._seen

    def __exit__(self, *exc: object) -> None:
        self._handle.remove()


def refusing(make: Callable[[], BaseException], when: Callable[[Any], bool]) -> Callable[[Any], None]:
    def refuse(shape: Any) -> None:
        if when(shape):
            raise make()

    return refuse


@pytest.mark.parametrize("make", OUT_OF_MEMORY)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_that_does_not_fit_is_halved(make: Callable[[], BaseException], threads: int) -> None:
    model, rng = tiny("llama"), random.Random(12)
    passages = some_passages(17, seed=13) + family(rng, some_ids(rng, 20), 7)
    with watched(model.base_model, refusing(make, lambda shape: shape[0] > 3)) as seen:
        found = nll(scorer_of(model, threads=threads), passages, 10**6)
    assert max(shape[0] for shape in seen) > 3
    agree(found, [reference(model, p) for p in passages], 1e-5)


@pytest.mark.parametrize("make", OUT_OF_MEMORY)
def test_a_sequence_that_does_not_fit_alone_is_an_error_and_no_number(make: Callable[[], BaseException]) -> None:
    model = tiny("llama")
    passages = [*some_passages(6, seed=14, longest=20), Passage(tuple(range(2, 42)), ((3, 9),))]
    with (
        watched(model.base_model, refusing(make, lambda shape: shape[1] >= 40)),
        pytest.raises(UnavailableError, match="single sequence") as caught,
    ):
        nll(scorer_of(model), passages, 10**6)
    assert caught.value.exit_code == 7 and "--max-length" in (caught.value.hint or "")


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("odd")])
def test_other_errors_are_not_taken_for_lack_of_memory(error: Exception) -> None:
    model = tiny("llama")
    with (
        watched(model.base_model, refusing(lambda: error, lambda shape: True)) as seen,
        pytest.raises(type(error), match=str(error)),
    ):
        nll(scorer_of(model), some_passages(8), 10**6)
    assert len(seen) == 1


@pytest.mark.parametrize("chunk", [1, 7, 100, 10**6])
def test_the_output_layer_sees_the_scored_rows_alone_a_chunk_at_a_time(chunk: int) -> None:
    model = tiny("llama")
    rng = random.Random(15)
    passages = [Passage(some_ids(rng, 60), ((20, 60),)) for _ in range(10)]
    with watched(model.get_output_embeddings()) as seen:
        nll(scorer_of(model), passages, 10**6, chunk)
    assert sum(shape[0] for shape in seen) == 10 * 40
    assert max(shape[0] for shape in seen) <= chunk
    assert chunk > 1 or len(seen) == 400


# --- damaged weights -------------------------------------------------------------------------------------------------


def test_a_damaged_output_layer_gives_nan_and_never_zero() -> None:
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_WIDTHS)).eval()
    with torch.no_grad():
        model.lm_head.weight[5, 0] = math.nan
    assert all(math.isnan(s) for spans in nll(scorer_of(model), some_passages(9)) for s in spans)


def test_a_damaged_token_gives_nan_to_its_own_passages_alone() -> None:
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_WIDTHS)).eval()
    sound = [Passage((2, 3, 4, 5, 6), ((1, 5),)), Passage((3, 3, 4), ((2, 3),))]
    damaged = [Passage((2, 7, 4, 5, 6), ((3, 5),)), Passage((7, 3), ((1, 2),))]
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = math.inf
    found = nll(scorer_of(model), [*sound, *damaged])
    agree(found[:2], [reference(model, p) for p in sound], 1e-5)
    assert math.isnan(found[2][0]) and math.isnan(found[3][0])


# --- the next token, whole texts ------------------------------------------------------------------------------------


def some_texts(count: int, seed: int, shortest: int = 1) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [some_ids(rng, rng.randint(shortest, 40)) for _ in range(count)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [1, 100])
def test_next_token_log_probabilities(name: str, tokens: int) -> None:
    model, prompts, candidates = tiny(name), some_texts(9, 16), [3, 59, 0, 17]
    found = next_token_logprobs(scorer_of(model), prompts, candidates, tokens_per_batch=tokens)
    assert found.shape == (9, 4) and found.dtype == np.float64
    for row, prompt in zip(found, prompts, strict=True):
        assert row == pytest.approx(log_probabilities(model, prompt)[-1, candidates], rel=1e-5)


def test_no_prompt_still_has_the_shape_of_its_candidates() -> None:
    assert next_token_logprobs(scorer_of(tiny("llama")), [], [1, 2, 3], tokens_per_batch=9).shape == (0, 3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("tokens", [1, 100])
def test_text_statistics_are_means_over_each_text_alone(name: str, tokens: int) -> None:
    model, texts = tiny(name), some_texts(9, 17, shortest=2)
    means, embeddings = text_statistics(scorer_of(model), texts, tokens_per_batch=tokens)
    assert means.dtype == np.float64 and embeddings.dtype == np.float32
    for mean, embedding, ids in zip(means, embeddings, texts, strict=True):
        expected = reference(model, Passage(ids, ((1, len(ids)),)))[0] / (len(ids) - 1)
        assert mean == pytest.approx(expected, rel=1e-5)
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].double().numpy()
        assert embedding == pytest.approx(states.mean(axis=0), rel=1e-4, abs=1e-5)


def test_memory_is_halved_for_every_task() -> None:
    model, texts = tiny("llama"), some_texts(7, 18, shortest=2)
    scorer = scorer_of(model)
    expected = next_token_logprobs(scorer, texts, [4, 5], tokens_per_batch=10**6)
    means, _ = text_statistics(scorer, texts, tokens_per_batch=10**6)
    with watched(model.base_model, refusing(OUT_OF_MEMORY[0], lambda shape: shape[0] > 2)):
        assert next_token_logprobs(scorer, texts, [4, 5], tokens_per_batch=10**6) == pytest.approx(expected, rel=2e-6)
        assert text_statistics(scorer, texts, tokens_per_batch=10**6)[0] == pytest.approx(means, rel=2e-6)
