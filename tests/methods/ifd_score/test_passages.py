"""Which tokens are scored: counted by hand on a tokenizer whose tokens are bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pomona.io.conversation import Turn
from pomona.methods.ifd_score.config import Config, Recipe, resolve
from pomona.methods.ifd_score.passages import Codec, Pair, Sample, pairs, samples
from pomona.methods.ifd_score.templates import load

Make = Callable[..., Any]


def recipe(**options: Any) -> Recipe:
    return resolve(Config(**options))


def one(tokenizer: Any, prompt: str, answer: str, scaffold: str, rules: Recipe) -> Pair:
    codec = Codec(tokenizer, rules.bos, renders_bos=rules.template == "chat")
    return pairs([Sample(prompt, answer)], codec, scaffold, rules)[0]


def spans(pair: Pair) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    return tuple(None if p is None else p.spans[0] for p in (pair.conditioned, pair.direct))  # type: ignore[return-value]


def text(tokenizer: Any, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(list(ids)))


def test_without_start_token_the_bare_answers_first_token_is_not_scored(tokenizer: Make) -> None:
    pair = one(tokenizer(), "ab\n", "cde", "", recipe())
    assert spans(pair) == ((3, 6), (1, 3))
    assert pair.conditioned and text(tokenizer(), pair.conditioned.ids) == "ab\ncde"
    assert (pair.n_prompt, pair.status) == (3, "ok")


@pytest.mark.parametrize(("starts", "bos"), [(True, "auto"), (True, "add"), (False, "add")])
def test_with_a_start_token_both_passes_score_every_answer_token(tokenizer: Make, starts: bool, bos: str) -> None:
    pair = one(tokenizer(starts=starts), "ab\n", "cde", "", recipe(bos=bos))
    assert spans(pair) == ((4, 7), (1, 4))
    first = 0 if starts else 1  # a tokenizer without start token lends its end-of-text token, as GPT-2's does
    assert pair.conditioned and pair.direct and pair.conditioned.ids[0] == pair.direct.ids[0] == first


def test_bos_none_takes_the_tokenizers_own_start_token_away(tokenizer: Make) -> None:
    assert spans(one(tokenizer(starts=True), "ab\n", "cde", "", recipe(bos="none"))) == ((3, 6), (1, 3))


def test_a_chat_template_that_writes_the_start_token_gets_no_second_one(tokenizer: Make) -> None:
    pair = one(tokenizer(starts=True), "<s>hi", "x", "", recipe(template="chat"))
    assert pair.conditioned and pair.conditioned.ids.count(0) == 1
    plain = one(tokenizer(starts=True), "<s>hi", "x", "", recipe())
    assert plain.conditioned and plain.conditioned.ids.count(0) == 2  # text of the user's, as the reference reads it


def test_a5_one_token_answer_has_nothing_before_it_in_the_direct_pass(tokenizer: Make) -> None:
    pair = one(tokenizer(), "ab\n", "c", "", recipe())
    assert pair.status == "no_context_token"
    assert spans(pair) == ((3, 4), None)
    assert one(tokenizer(), "ab\n", "c", "", recipe(bos="add")).status == "ok"
    assert one(tokenizer(), "ab\n", "c", "R:", recipe()).status == "ok"


def test_empty_answers_and_full_prompts_are_named(tokenizer: Make) -> None:
    assert one(tokenizer(), "ab", "", "", recipe()).status == "empty_answer"
    for size, status in [(7, "ok"), (8, "prompt_too_long"), (9, "prompt_too_long")]:
        pair = one(tokenizer(), "p" * size, "abc", "R:", recipe(max_length=8, template="alpaca"))
        assert (pair.status, pair.n_prompt) == (status, min(size, 8))


def test_cherry_cuts_at_l_and_l_minus_p_plus_4_and_drops_what_then_exceeds_l(tokenizer: Make) -> None:
    """P = 20, L = 50. A mark of 4 tokens with its start token leaves equal heads; of 3 tokens one more: over_length."""
    rules = recipe(variant="cherry", max_length=50)
    glued = [("#", "#"), ("##", "#"), ("R", "e")]
    tokens = tokenizer(starts=True, merges=glued)
    mark = "### Response:"
    size = len(tokens("### Response:")["input_ids"])  # start token and its bytes after the merges
    pair = one(tokens, "p" * 19, "a" * 100, mark, rules)
    assert pair.conditioned and pair.direct and pair.truncated
    assert len(pair.conditioned.ids) == 50 and spans(pair)[0] == (20, 50)
    assert len(pair.direct.ids) == 50 - 20 + 4 and spans(pair)[1] == (size, 34)
    assert pair.status == "ok"  # this mark has more than 4 tokens, so the direct head is the shorter one

    short = one(tokens, "p" * 19, "a" * 100, "R:", replace(rules, over_length=True))
    assert short.direct and len(short.direct.ids) == 50 - 20 + 3  # a mark of the user's own is counted: <s>, R, :
    assert short.status == "ok"


def test_a_direct_head_longer_than_the_conditioned_one_is_over_length_in_cherry_only(tokenizer: Make) -> None:
    """The constant 4 with a mark that is 1 token (merged): 3 direct tokens too many once the answer is cut."""
    steps = [("#", "#"), ("##", "#"), ("R", "e"), ("s", "p"), ("o", "n"), ("s", "e"), ("Re", "sp"), ("Resp", "on")]
    steps += [("Respon", "se"), ("Response", ":"), ("###", "Ġ"), ("###Ġ", "Response:")]
    tokens = tokenizer(merges=steps)
    assert len(tokens("### Response:")["input_ids"]) == 1
    for variant, status in (("cherry", "over_length"), ("reflection", "ok")):
        rules = recipe(variant=variant, max_length=50)
        pair = one(tokens, "p" * 20, "a" * 100, "### Response:", rules)
        assert pair.status == status
        assert spans(pair) == ((20, 50), (1, 34))
        assert one(tokens, "p" * 20, "a" * 30, "### Response:", rules).status == "ok"


def test_bare_direct_passes_are_cut_at_l_minus_p_plus_1(tokenizer: Make) -> None:
    pair = one(tokenizer(starts=True), "p" * 19, "a" * 100, "", recipe(max_length=50))
    assert spans(pair) == ((20, 50), (1, 31))


def test_on_truncate_drop_leaves_cut_answers_unscored(tokenizer: Make) -> None:
    rules = recipe(max_length=50, on_truncate="drop")
    cut = one(tokenizer(starts=True), "p" * 19, "a" * 100, "", rules)
    assert (cut.conditioned, cut.direct, cut.truncated, cut.status) == (None, None, True, "over_length")
    assert one(tokenizer(starts=True), "p" * 19, "a" * 30, "", rules).status == "ok"


def test_a_merge_over_the_boundary_is_reported_and_token_boundary_avoids_it(tokenizer: Make) -> None:
    glue = tokenizer(merges=[(":", '"')])
    pair = one(glue, "R:", '"yes', "", recipe())
    assert pair.boundary_shift and spans(pair) == ((2, 5), (1, 4))  # the glued quote counts as prompt
    apart = one(glue, "R:", '"yes', "", recipe(boundary="token"))
    assert not apart.boundary_shift and spans(apart) == ((2, 6), (1, 4))
    assert apart.conditioned and text(glue, apart.conditioned.ids) == 'R:"yes'


def test_an_answer_swallowed_by_the_prompts_last_token_counts_as_empty(tokenizer: Make) -> None:
    assert one(tokenizer(merges=[(":", ")")]), "R:", ")", "S:", recipe()).status == "empty_answer"


def test_scored_eos_ends_both_passes_unless_the_answer_is_cut(tokenizer: Make) -> None:
    pair = one(tokenizer(), "ab\n", "cde", "", recipe(eos="score"))
    assert pair.conditioned and pair.direct
    assert pair.conditioned.ids[-1] == pair.direct.ids[-1] == 1
    assert spans(pair) == ((3, 7), (1, 4))
    cut = one(tokenizer(), "ab\n", "c" * 9, "", recipe(eos="score", max_length=12))
    assert cut.truncated and cut.conditioned and 1 not in cut.conditioned.ids


def test_context_of_each_turn_is_all_before_it() -> None:
    turns = (Turn("i1", "", "a1"), Turn("i2", "x", "a2"))
    plain = load("plain", None)
    assert samples(turns, plain, recipe()) == [Sample("i1\na1\ni2\nx\n", "a2")]
    assert samples(turns, plain, recipe(turns="each"))[0] == Sample("i1\n", "a1")
    reverse = samples(turns, plain, recipe(reverse=True, turns="each"))
    assert [s.answer for s in reverse] == ["i1", "i2x"] and "a2" in reverse[1].prompt and "a1" not in reverse[1].prompt
