"""Conversations with a local model: what is asked together, what is remembered, what is refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from jinja2 import TemplateError

from pomona.errors import CheckFailed
from pomona.io.journal import Journal, NoJournal
from pomona.models import generation, local, losses
from pomona.models.endpoint import Answer, Chain, Failure, Outcome, Request, request_key
from pomona.models.loading import Scorer
from pomona.models.local import LocalModel, chat_ids
from pomona.runtime.device import Runtime
from pomona.runtime.progress import Quiet

CONTEXT = 160


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def model() -> Any:
    """Sharp, over bytes, with an end that it comes to now and then."""
    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = [1, *range(20, 40)]
    return model


@pytest.fixture
def scorer(model: Any, tokenizer: Any) -> Scorer:
    runtime = Runtime(None, torch.device("cpu"), torch.float32, "a test", 2)
    generation.register(runtime, model)
    return Scorer(model, tokenizer, runtime, {"model": "tiny", "revision": "0"}, losses.shares_heads(model))


def asking(*texts: str, tokens: int = 12, **how: Any) -> list[Request]:
    return [Request((("user", text),), tokens, **how) for text in texts]


def one(requests: Sequence[Request]) -> Chain[list[Outcome]]:
    return list((yield requests))


def told(scorer: Scorer, requests: Sequence[Request], journal: Any = None, **options: Any) -> list[Outcome]:
    asked = LocalModel(scorer, journal or NoJournal(), batch_size=options.pop("batch_size", None), progress=Quiet())
    return [outcome for _, (outcome,) in sorted(asked.conversations((i, one([r])) for i, r in enumerate(requests)))]


def some_requests(count: int, seed: int = 0, **how: Any) -> list[Request]:
    rng = random.Random(seed)
    return asking(*("".join(rng.choices("abcdefgh ", k=rng.randint(1, 60))) for _ in range(count)), **how)


def talk(number: int, said: list[str]) -> Chain[list[str]]:
    """As many turns as `number` says, of one or two requests, each asking on from what was answered."""
    heard: list[str] = []
    for turn in range(number % 4):
        prompt = f"{number} {turn} {''.join(heard)[-20:]!r}"
        outcomes = yield asking(*[prompt] * (1 + number % 2), temperature=0.7, tokens=8)
        assert len(outcomes) == 1 + number % 2
        heard += [outcome.text if isinstance(outcome, Answer) else outcome.reason for outcome in outcomes]  # type: ignore[union-attr]
        said.append(prompt)
    return heard


# --- answers ---------------------------------------------------------------------------------------------------------


def test_a_greedy_answer_is_what_transformers_says_with_exact_counts(scorer: Scorer) -> None:
    requests = some_requests(20)
    found = told(scorer, requests)
    reasons = set()
    for request, outcome in zip(requests, found, strict=True):
        ids = torch.tensor([chat_ids(scorer.tokenizer, request.messages)])
        out = scorer.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0
        )[0, ids.shape[1] :].tolist()
        ended = out[-1] in scorer.model.generation_config.eos_token_id
        text = scorer.tokenizer.decode(out, skip_special_tokens=True)
        assert outcome == Answer(text, ids.shape[1], len(out), "stop" if ended else "length", "tiny", cached=False)
        reasons.add(ended)
    assert reasons == {True, False}


def test_a_chain_is_sent_its_own_outcomes_and_finishes_in_its_round(scorer: Scorer) -> None:
    asked = LocalModel(scorer, NoJournal(), batch_size=None, progress=Quiet())
    found = list(asked.conversations((number, talk(number, [])) for number in range(24)))
    assert [number for number, _ in found] == sorted(range(24), key=lambda number: (number % 4, number))
    for number, heard in found:
        alone = LocalModel(scorer, NoJournal(), batch_size=None, progress=Quiet())
        assert next(alone.conversations([(0, talk(number, []))]))[1] == heard
        assert len(heard) == (number % 4) * (1 + number % 2)


def test_no_more_chains_are_live_than_the_window_holds(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_ON_CPU", (5, 32, 16384, 128))
    begun = 0

    def counted() -> Iterator[tuple[int, Chain[list[str]]]]:
        nonlocal begun
        for number in range(40):
            begun += 1
            yield number, talk(number, [])

    asked = LocalModel(scorer, NoJournal(), batch_size=None, progress=Quiet())
    for finished, _ in enumerate(asked.conversations(counted()), start=1):
        assert begun - finished <= 5
    assert finished == begun == 40


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_windows_and_batch_sizes_change_no_text(
    temperature: float, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = some_requests(40, temperature=temperature, top_p=0.95)
    expected = told(scorer, requests)
    assert len({outcome.text for outcome in expected if isinstance(outcome, Answer)}) > 30
    for size in (1, 7):
        assert told(scorer, requests, batch_size=size) == expected
    monkeypatch.setattr(local, "_ON_CPU", (9, 32, 300, 4))
    assert told(scorer, requests) == expected


def test_samples_and_seeds_are_drawn_apart_and_each_again_the_same(scorer: Scorer) -> None:
    (request,) = asking("hello", temperature=1.0)
    apart = [request, *(replace(request, sample=n) for n in (1, 2)), *(replace(request, seed=n) for n in (0, 1))]
    found = told(scorer, apart)
    assert len({outcome.text for outcome in found if isinstance(outcome, Answer)}) == 5
    assert told(scorer, apart[::-1]) == found[::-1]


def test_what_is_drawn_does_not_depend_on_where_the_model_lies(scorer: Scorer) -> None:
    requests = some_requests(4, temperature=1.0)
    moved = replace(scorer, identity={"model": "/elsewhere/tiny", "revision": "0"})
    assert [o.text for o in told(moved, requests)] == [o.text for o in told(scorer, requests)]  # type: ignore[union-attr]


def test_equal_requests_are_computed_once(scorer: Scorer) -> None:
    (request,) = asking("hello")
    same = [request, replace(request, sample=3), replace(request, seed=9), replace(request, schema="{}"), request]
    asked = LocalModel(scorer, NoJournal(), batch_size=None, progress=Quiet())
    ((_, found),) = asked.conversations([(0, one(same))])
    first = found[0]
    assert isinstance(first, Answer) and not first.cached
    assert found[1:] == [replace(first, cached=True)] * 4
    assert (asked.prompt_tokens, asked.generated_tokens) == (first.prompt_tokens, first.completion_tokens)


def test_what_was_shared_is_counted(scorer: Scorer) -> None:
    notes: list[str] = []

    class Told(Quiet):
        def note(self, message: str) -> None:
            notes.append(message)

    head = "x" * 40
    requests = asking(*(head + c for c in "abcd")) + asking(head + "a", temperature=1.0)
    asked = LocalModel(scorer, NoJournal(), batch_size=None, progress=Told())
    found = [o for _, rows in asked.conversations([(0, one(requests))]) for o in rows]
    prompts = [chat_ids(scorer.tokenizer, request.messages) for request in requests]
    common = next(n for n, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    assert asked.prompt_tokens == sum(map(len, prompts))
    # Four distinct prompts behind a common head, one of them twice.
    assert asked.shared_tokens == 4 * common + len(prompts[0]) - common
    assert asked.generated_tokens == sum(o.completion_tokens for o in found if isinstance(o, Answer))
    assert len(notes) == 1 and f"{asked.shared_tokens:,} of {asked.prompt_tokens:,}" in notes[0]


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_prompt_as_long_as_the_context_is_a_failure_and_a_shorter_one_is_answered_up_to_its_end(
    scorer: Scorer,
) -> None:
    frame = len(chat_ids(scorer.tokenizer, (("user", ""),)))
    requests = asking(*("q" * (CONTEXT - frame - left) for left in (-1, 0, 1, 5)), tokens=50)
    scorer.model.generation_config.eos_token_id, ends = None, scorer.model.generation_config.eos_token_id
    try:
        over, full, last, near = told(scorer, requests)
    finally:
        scorer.model.generation_config.eos_token_id = ends
    for outcome, length in ((over, CONTEXT + 1), (full, CONTEXT)):
        assert isinstance(outcome, Failure) and outcome.reason == "context overflow" and outcome.attempts == 1
        assert str(length) in outcome.detail and str(CONTEXT) in outcome.detail
    for outcome, left in ((last, 1), (near, 5)):
        assert isinstance(outcome, Answer)
        assert (outcome.prompt_tokens, outcome.completion_tokens) == (CONTEXT - left, left)
        assert outcome.finish_reason == "length"


def test_an_answer_without_text_is_a_failure_also_from_the_journal(scorer: Scorer, tmp_path: Path) -> None:
    (request,) = asking("hello")
    silent = replace(scorer, tokenizer=Silent(scorer.tokenizer))
    journal = Journal(tmp_path / "j", {}, resume=False)
    first = told(silent, [request], journal)
    assert isinstance(first[0], Failure) and (first[0].reason, first[0].attempts) == ("empty answer", 1)
    assert len(journal) == 1 and told(silent, [request], journal) == first


class Silent:
    """A tokenizer to which every token is a special one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: Any, **options: Any) -> str:
        return ""


def test_a_model_without_finite_logits_stops_the_run(model: Any, tokenizer: Any) -> None:
    damaged = transformers.LlamaForCausalLM(model.config).eval()
    with torch.no_grad():
        damaged.lm_head.weight[9] = float("nan")
    runtime = Runtime(None, torch.device("cpu"), torch.float32, "a test", 1)
    generation.register(runtime, damaged)
    with pytest.raises(CheckFailed):
        told(Scorer(damaged, tokenizer, runtime, {"model": "tiny"}, True), asking("hello"))


# --- the journal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_run_that_lost_answers_computes_their_batches_whole_and_ends_the_same(
    seed: int, scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_ON_CPU", (8, 3, 16384, 128))
    composed: set[tuple[tuple[int, ...], ...]] = set()
    fresh: list[tuple[tuple[int, ...], ...]] = []

    def watched(scorer: Scorer, prompts: Any, batches: Any) -> Any:
        fresh.extend(tuple(prompts[i].ids for i in batch.places) for batch in batches)
        return generation.generate(scorer, prompts, batches)

    monkeypatch.setattr(local, "generate", watched)

    def run(journal: Journal) -> list[tuple[int, list[str]]]:
        asked = LocalModel(scorer, journal, batch_size=None, progress=Quiet())
        return list(asked.conversations((number, talk(number, [])) for number in range(20)))

    journal = Journal(tmp_path / "whole", {}, resume=False)
    expected = run(journal)
    composed.update(fresh)
    entries = len(journal)
    journal.close()
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    rng = random.Random(seed)
    kept = [line for line in lines[1:] if rng.random() < (0.9, 0.5, 0.1, 1.0)[seed]]
    (tmp_path / "part").write_bytes(lines[0] + b"".join(kept))

    fresh.clear()
    journal = Journal(tmp_path / "part", {}, resume=True)
    assert run(journal) == expected
    assert set(fresh) <= composed and len(fresh) == len(set(fresh))
    assert bool(fresh) == (len(kept) < entries)
    assert len(journal) == entries


def test_the_journal_holds_answers_under_the_key_of_request_and_model(scorer: Scorer, tmp_path: Path) -> None:
    (request,) = asking("hello", temperature=0.5)
    journal = Journal(tmp_path / "j", {}, resume=False)
    (first,) = told(scorer, [request], journal)
    assert isinstance(first, Answer)
    held = journal.get(request_key(json.dumps(scorer.identity, sort_keys=True), request))
    assert held is not None and Answer(**held, cached=False) == first
    assert told(scorer, [request], journal) == [replace(first, cached=True)]
    other = replace(scorer, identity={"model": "tiny", "revision": "1"})
    assert told(other, [request], journal) == [first]


def test_an_answer_in_the_journal_stays_though_its_batch_is_computed_again(scorer: Scorer, tmp_path: Path) -> None:
    known, unknown = asking("hello", "world")
    journal = Journal(tmp_path / "j", {}, resume=False)
    held = Answer("as told before", 3, 4, "stop", "tiny", cached=True)
    entry = {name: value for name, value in asdict(held).items() if name != "cached"}
    journal.append(request_key(json.dumps(scorer.identity, sort_keys=True), known), entry)
    first, second = told(scorer, [known, unknown], journal)
    assert first == held and isinstance(second, Answer) and not second.cached
    assert len((tmp_path / "j").read_bytes().splitlines()) == 1 + 2


def test_a_batch_is_in_the_journal_before_the_next_ones_are_computed(
    scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "j", {}, resume=False)
    seen = []

    def watched(scorer: Scorer, prompts: Any, batches: Any) -> Any:
        seen.append((len(journal), sum(len(batch.places) for batch in batches)))
        return generation.generate(scorer, prompts, batches)

    monkeypatch.setattr(local, "generate", watched)
    told(scorer, some_requests(40), journal, batch_size=2)
    assert [there for there, _ in seen] == [sum(n for _, n in seen[:k]) for k in range(len(seen))]
    assert len(seen) == 5 and len(journal) == 40


# --- prompts ---------------------------------------------------------------------------------------------------------

SYSTEM = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Go on"))
_REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
)
_DROPPING = (
    "{% for m in messages %}{% if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }}{% endif %}{% endfor %}"
    "<assistant>"
)


@pytest.fixture
def own(tiny_model: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_model)


def test_a_template_is_followed(tokenizer: Any) -> None:
    ids = chat_ids(tokenizer, SYSTEM)
    assert tokenizer.decode(ids) == "<system>Be brief.\n<user>Hi\n<assistant>Yes?\n<user>Go on\n<assistant>"
    chat = [{"role": role, "content": content} for role, content in SYSTEM]
    assert list(ids) == tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("template", [_REFUSING, _DROPPING])
def test_a_system_message_that_a_template_does_not_take_goes_to_the_user(template: str, own: Any) -> None:
    own.chat_template = template
    assert own.decode(chat_ids(own, SYSTEM)) == "<user>Be brief.\n\nHi<assistant>Yes?<user>Go on<assistant>"
    assert own.decode(chat_ids(own, SYSTEM[:1])) == "<user>Be brief.<assistant>"


def test_without_a_template_roles_are_named(own: Any) -> None:
    own.chat_template = None
    text = "system: Be brief.\n\nuser: Hi\n\nassistant: Yes?\n\nuser: Go on\n\nassistant:"
    assert own.decode(chat_ids(own, SYSTEM)) == text


def test_a_conversation_that_a_template_refuses_is_a_failure_of_its_own(scorer: Scorer, own: Any) -> None:
    own.chat_template = _REFUSING
    twice = Request((("user", "a"), ("user", "b")), 5)
    with pytest.raises(TemplateError):
        chat_ids(own, twice.messages)
    refused, answered = told(replace(scorer, tokenizer=own), [twice, *asking("a", tokens=5)])
    assert refused == Failure("chat template refused", 1, "roles must alternate")
    assert isinstance(answered, Answer)


def test_text_that_is_no_unicode_is_a_failure_of_its_own(scorer: Scorer) -> None:
    broken, answered = told(scorer, asking("a\ud800", "a"))
    assert isinstance(broken, Failure) and (broken.reason, broken.attempts) == ("not valid Unicode", 1)
    assert isinstance(answered, Answer)


# --- several processes -----------------------------------------------------------------------------------------------

_LAUNCHED = """
import json, os, sys
import torch
from pomona.io.journal import NoJournal
from pomona.models.endpoint import Request
from pomona.models.loading import load_causal_lm
from pomona.models.local import LocalModel
from pomona.runtime.device import Runtime
from pomona.runtime.progress import Quiet

scorer = load_causal_lm(sys.argv[1], Runtime.open("cpu", "float32"))
if not scorer.runtime.is_main:
    scorer.runtime.serve()
    torch.distributed.destroy_process_group()
    os._exit(0)  # as the command line does: threads of torch can abort an interpreter that ends beside them

def chain(n):
    first = yield [Request((("user", f"{n} " * n),), 6, 0.8)]
    second = yield [Request((("user", f"{n} {first[0].text}"),), 6, 0.8)]
    return [first[0].text, second[0].text]

model = LocalModel(scorer, NoJournal(), batch_size=3, progress=Quiet())
found = list(model.conversations((n, chain(n)) for n in range(17)))
scorer.runtime.close()
print(json.dumps([scorer.runtime.world, found]), flush=True)
if scorer.runtime.world > 1:
    torch.distributed.destroy_process_group()
    os._exit(0)
"""


def test_two_processes_give_the_answers_of_one(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "launched.py").write_text(_LAUNCHED)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = []
    for words in ([], launch):
        done = subprocess.run(
            [sys.executable, *words, "launched.py", str(tiny_model)],
            cwd=tmp_path,
            capture_output=True,
            timeout=200,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, done.stderr.decode()
        found.append(json.loads(done.stdout))
    assert [world for world, _ in found] == [1, 2]
    assert found[0][1] == found[1][1] and len(found[0][1]) == 17
