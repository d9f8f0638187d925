"""What each strategy asks, in which order, and what it makes of the replies; nobody answers but the test."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from methods.nlpbench_eval.synthetic import synthetic, write
from pomona.errors import MissingError, UsageError
from pomona.methods.nlpbench_eval.config import Config
from pomona.methods.nlpbench_eval.conversation import Response, Strategy, drive, state_of
from pomona.methods.nlpbench_eval.dataset import load, select
from pomona.methods.nlpbench_eval.planning import open_method, plan
from pomona.methods.nlpbench_eval.prompts import asked
from pomona.methods.nlpbench_eval.questions import Question
from pomona.methods.nlpbench_eval.strategies import converse
from pomona.methods.nlpbench_eval.tree import read_value, read_vote
from pomona.models.endpoint import Answer, Failure, Outcome, Request, Unasked
from pomona.runtime.settings import Settings

MC = Question("m", "mc", "Which are trees?", (0, 2), "ot", ("oak", "rose", "elm"))
SA = Question("s", "sa", "What is a token?", ("An occurrence of a word.",), "lmsp")
MATH = Question("x", "math", "1/2 + 1/4?", (r"\frac{3}{4}", "0.75"), "lmsp", solution="2/4 + 1/4 = 3/4")
GROUP = tuple(
    Question(f"g{i}", kind, text, answer, "ot", options, context="About trees.", group="g", turn=i)  # type: ignore[arg-type]
    for i, (kind, text, answer, options) in enumerate(
        [
            ("mc", "First?", (1,), ("a", "b")),
            ("sa", "Second?", ("because",), ()),
            ("mc", "Third?", (0,), ("c", "d")),
        ]
    )
)


def method(strategy: str, **options: Any) -> Any:
    return open_method(Config(strategy=strategy, **options), Settings())


def reply(text: str, finish_reason: str = "stop") -> Answer:
    return Answer(text, 10, 2, finish_reason, "test", cached=False)


class Script:
    """Answers by a function of the request, and remembers every step."""

    def __init__(self, say: Callable[[Request], str | Outcome] = lambda request: "0") -> None:
        self._say = say
        self.steps: list[list[Request]] = []

    def __call__(self, requests: Sequence[Request]) -> list[Outcome]:
        self.steps.append(list(requests))
        said = [self._say(request) for request in requests]
        return [reply(outcome) if isinstance(outcome, str) else outcome for outcome in said]

    @property
    def requests(self) -> list[Request]:
        return [request for step in self.steps for request in step]


def ask(
    turns: Sequence[Question],
    strategy: str,
    say: Callable[[Request], str | Outcome] = lambda request: "0",
    **options: Any,
) -> tuple[list[Response], Script]:
    script = Script(say)
    return drive(converse(turns, method(strategy, **options)), script), script


def last(request: Request) -> str:
    return request.messages[-1][1]


# --- the grammar -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [("zs", "zs"), ("cot", "zs+cot"), ("sys+sc+fs+cot", "fs+cot+sc+sys"), ("ToT", "zs+tot"), (" fs + sys ", "fs+sys")],
)
def test_a_strategy_is_read_in_any_order_and_has_one_name(text: str, name: str) -> None:
    assert str(Strategy.parse(text)) == name == str(Strategy.parse(name))


@pytest.mark.parametrize("text", ["", "zs+fs", "cot+cot", "tot+sc", "tot+cot", "fewshot", "zs,cot", "zs+"])
def test_a_strategy_that_does_not_fit_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Strategy.parse(text)


# --- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", [MC, SA, MATH], ids=lambda q: q.type)
def test_zero_shot_shows_the_question_and_no_example(question: Question) -> None:
    (response,), script = ask([question], "zs")
    ((role, text),) = script.requests[0].messages
    assert role == "user" and asked(question) in text and "Example" not in text
    assert (response.text, response.state, len(script.requests)) == ("0", "ok", 1)


@pytest.mark.parametrize("question", [MC, SA, MATH], ids=lambda q: q.type)
def test_few_shot_shows_three_examples_before_the_question_and_cot_gives_them_thoughts(question: Question) -> None:
    plain = last(ask([question], "fs")[1].requests[0])
    reasoned = last(ask([question], "fs+cot")[1].requests[0])
    assert plain.count("Example ") == reasoned.count("Example ") == 3
    assert plain.index("Example 3") < plain.index(asked(question))
    assert plain.count("\n\nExample ") == 3 and f"\n\nQuestion: {asked(question)}\n" in plain
    assert "Thoughts:" not in plain and reasoned.count("Thoughts:") == 4 and reasoned.endswith("Thoughts:")
    assert last(ask([question], "fs", shots=1)[1].requests[0]).count("Example ") == 1


def test_everything_before_the_question_is_the_same_for_every_question_of_a_type() -> None:
    other = Question("n", "mc", "What else?", (0,), "ai", ("yes", "no"))
    first, second = (last(ask([q], "fs+cot")[1].requests[0]) for q in (MC, other))
    head = first[: first.index("Question: Which are trees?")]
    assert second.startswith(head) and len(head) > 0.8 * len(first)


def test_options_are_numbered_from_zero() -> None:
    assert asked(MC) == "Which are trees?\n0: oak\n1: rose\n2: elm"


def test_texts_with_braces_and_percent_signs_stay_what_they_are() -> None:
    odd = Question("o", "sa", "What is {input} {thought} %s {{x}}?", ("y",), "ot")
    assert "What is {input} {thought} %s {{x}}?" in last(ask([odd], "zs")[1].requests[0])


def test_the_system_message_goes_by_type_and_covers_every_type_of_a_group() -> None:
    for question in (MC, SA, MATH):
        (role, _), _ = ask([question], "sys")[1].requests[0].messages
        assert role == "system"
    mixed = ask(GROUP, "sys")[1].requests[0].messages[0][1]
    assert all(ask([q], "sys")[1].requests[0].messages[0][1] in mixed for q in (MC, SA))


def test_a_system_file_replaces_them(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("Be brief.\n")
    assert ask([MC], "zs", system=tmp_path / "s.txt")[1].requests[0].messages[0] == ("system", "Be brief.")
    with pytest.raises(MissingError):
        method("zs", system=tmp_path / "absent")


def test_demonstrations_come_from_a_file_and_a_bad_line_is_named(tmp_path: Path) -> None:
    shot = {"type": "mc", "question": "Own?", "options": ["p", "q"], "answer": "1", "thought": "T."}
    (tmp_path / "s.jsonl").write_text(json.dumps(shot) + "\n")
    text = last(ask([MC], "fs+cot", shot_file=tmp_path / "s.jsonl", shots=5)[1].requests[0])
    assert "Own?\n0: p\n1: q\nThoughts: T.\nAnswer: 1\n" in text and text.count("Example ") == 1
    (tmp_path / "s.jsonl").write_text(json.dumps(shot) + "\n[1]\n")
    with pytest.raises(UsageError, match=r"s\.jsonl:2: not a demonstration"):
        method("fs", shot_file=tmp_path / "s.jsonl")


# --- chain of thought ------------------------------------------------------------------------------------------------


def test_reasoning_on_a_short_answer_is_asked_for_first_and_pasted_in() -> None:
    (response,), script = ask([SA], "cot", lambda r: "Let me see." if "thoughts only" in last(r) else "A word.")
    first, second = script.requests
    assert (first.max_tokens, second.max_tokens) == (512, 945)
    assert "Let me see." in last(second) and "Let me see." not in last(first)
    assert (response.text, response.thoughts, response.cued) == ("A word.", ["Let me see."], False)


@pytest.mark.parametrize("question", [MC, MATH], ids=lambda q: q.type)
def test_other_questions_reason_and_answer_in_one_call(question: Question) -> None:
    (response,), script = ask([question], "cot")
    assert len(script.requests) == 1 and response.cued and '"Answer:"' in last(script.requests[0])


def test_a_thought_that_failed_leaves_the_question_unanswered_not_wrong() -> None:
    (response,), script = ask([SA], "cot", lambda r: Failure("timeout", 3))
    assert (response.state, response.text, len(script.requests)) == ("timeout", None, 1)


def test_the_paper_text_profile_pastes_the_worked_solution_of_mathematics() -> None:
    (response,), script = ask([MATH], "cot", profile="paper-text")
    assert len(script.requests) == 1 and MATH.solution in last(script.requests[0])
    assert script.requests[0].temperature == 1.0 and not response.cued
    thought, answer = ask([SA], "cot", profile="paper-text")[1].requests
    assert (thought.temperature, answer.temperature, thought.max_tokens) == (0.0, 1.0, 128)


def test_a_filtered_thought_leaves_the_question_unanswered() -> None:
    (response,), script = ask([SA], "cot", lambda r: reply("half a th", "content_filter"))
    assert (response.state, response.text, len(script.requests)) == ("filtered", None, 1)


def test_the_worked_solution_is_pasted_only_for_chain_of_thought() -> None:
    _, script = ask([MATH], "zs", profile="paper-text")
    assert str(MATH.solution) not in last(script.requests[0])


# --- self-consistency ------------------------------------------------------------------------------------------------


def test_votes_are_on_sets_so_that_order_and_form_do_not_matter() -> None:
    """Spec check 4: `1`, `2,0`, `0,2` give {0,2} with two votes of three; the released rule gives {1}."""
    said = iter(["1", "2,0", "0,2"])
    (response,), script = ask([MC], "sc", lambda r: next(said))
    assert response.text == "2,0" and response.votes == {"share": pytest.approx(2 / 3), "tied": False}
    assert [r.sample for r in script.requests] == [0, 1, 2] and len(script.steps) == 1
    assert len({r.seed for r in script.requests}) == 1 and script.requests[0].temperature == 0.7
    said = iter(["1", "2,0", "0,2"])
    (response,), _ = ask([MC], "sc", lambda r: next(said), profile="released")
    assert response.text == "1" and response.votes == {"share": pytest.approx(1 / 3), "tied": True}


def test_samples_that_failed_do_not_vote_and_one_that_did_not_is_enough() -> None:
    said: Any = iter([Failure("timeout", 7), reply("0,2"), Failure("empty answer", 1)])
    (response,), _ = ask([MC], "sc", lambda r: next(said))
    assert (response.text, response.state, response.samples) == ("0,2", "ok", [None, "0,2", None])
    said = iter([Failure("timeout", 7), Failure("empty answer", 1)])
    (response,), _ = ask([MC], "sc", lambda r: next(said), samples=2)
    assert (response.text, response.state) == (None, "timeout")


def test_only_multiple_choice_is_sampled() -> None:
    assert [len(ask([q], "sc")[1].requests) for q in (MC, SA, MATH)] == [3, 1, 1]


def test_a_sampled_reply_votes_with_its_final_answer_alone_and_ties_are_told() -> None:
    said = iter(["0 or 1 or 2?\nAnswer: 1", "1, but no\nAnswer: 0,2", "Answer: 1\nNo. answer: 2,0"])
    (response,), _ = ask([MC], "cot+sc", lambda r: next(said))
    assert response.text == "1, but no\nAnswer: 0,2" and response.votes == {
        "share": pytest.approx(2 / 3),
        "tied": False,
    }
    said = iter(["0", "1", "2"])
    (response,), _ = ask([MC], "sc", lambda r: next(said))
    assert (response.text, response.votes["tied"]) == ("0", True)


def test_a_filtered_sample_has_no_vote() -> None:
    said = iter([reply("1", "content_filter"), reply("1", "content_filter"), reply("0,2")])
    (response,), _ = ask([MC], "sc", lambda r: next(said))
    assert (response.text, response.state, response.samples) == ("0,2", "ok", [None, None, "0,2"])


def test_the_seed_is_sent_where_there_is_something_to_draw() -> None:
    for strategy, seeds in (("zs", [None]), ("sc", [7, 7, 7])):
        script = Script()
        drive(converse([MC], open_method(Config(strategy=strategy), Settings(seed=7))), script)
        assert [r.seed for r in script.requests] == seeds


# --- conversations ---------------------------------------------------------------------------------------------------


def numbered() -> Callable[[Request], str]:
    numbers = iter(range(100))
    return lambda request: f"reply {next(numbers)}"


def test_a_group_is_a_conversation_in_which_the_model_hears_its_own_answers() -> None:
    _, script = ask(GROUP, "fs", numbered())
    for turn, request in enumerate(script.requests):
        assert [role for role, _ in request.messages] == ["user", "assistant"] * turn + ["user"]
        assert [text for role, text in request.messages if role == "assistant"] == [f"reply {i}" for i in range(turn)]
        assert sum("About trees." in text for _, text in request.messages) == 1
        assert "About trees." in request.messages[0][1] and GROUP[turn].question in last(request)
    shown = [text.count("Example ") for role, text in script.requests[2].messages if role == "user"]
    assert shown == [3, 3, 0]  # instruction and examples once for each type


def test_history_can_be_gold_or_none() -> None:
    _, script = ask(GROUP, "zs", numbered(), history="gold")
    assert [text for role, text in script.requests[2].messages if role == "assistant"] == ["1", "because"]
    _, script = ask(GROUP, "cot", numbered(), history="gold")
    assert ("assistant", "Answer: 1") in script.requests[-1].messages
    _, script = ask(GROUP, "zs", numbered(), history="none")
    for request in script.requests:
        assert len(request.messages) == 1 and "About trees." in last(request) and "reply" not in last(request)


def test_a_turn_without_an_answer_is_not_part_of_what_follows() -> None:
    def say(request: Request) -> str | Outcome:
        return Failure("context overflow", 1) if "First?" in last(request) else "fine"

    responses, script = ask(GROUP, "zs", say)
    assert [r.state for r in responses] == ["context_overflow", "ok", "ok"]
    assert [role for role, _ in script.requests[2].messages] == ["user", "assistant", "user"]
    assert "About trees." in script.requests[1].messages[0][1] and "First?" not in str(script.requests[2].messages)


def test_the_thought_of_a_short_answer_knows_the_context_and_what_was_said() -> None:
    _, script = ask(GROUP[:2], "cot", numbered())
    thought = script.requests[1]
    assert [role for role, _ in thought.messages] == ["user", "assistant", "user"]
    assert "About trees." in thought.messages[0][1]


def test_a_thought_stays_in_the_conversation_with_the_answer_it_led_to() -> None:
    turns = (GROUP[1], GROUP[2])
    _, script = ask(turns, "cot", lambda r: "I recall." if "thoughts only" in last(r) else "fine")
    assert "I recall." in script.requests[-1].messages[0][1]


def test_a_type_that_occurs_twice_is_in_the_system_message_once() -> None:
    mixed, once = (ask(turns, "sys")[1].requests[0].messages[0][1] for turns in (GROUP, GROUP[:2]))
    assert mixed == once


# --- tree of thought -------------------------------------------------------------------------------------------------


def test_a_tree_takes_sixteen_samples_in_six_requests_where_several_come_at_once() -> None:
    numbers = iter(range(100))
    (response,), script = ask([SA], "tot", lambda r: f"{next(numbers)} thought")
    assert [len(step) for step in script.steps] == [3, 3, 6, 3, 1]
    assert len({(r.messages, r.temperature) for r in script.requests}) == 6
    assert {r.temperature for r in script.requests[:-1]} == {0.7} and script.requests[-1].temperature == 0.0
    assert response.state == "ok" and len(response.thoughts) == 2


def test_the_candidate_that_wins_the_vote_goes_on_at_every_depth() -> None:
    """Spec check 26: the second of three always wins."""
    numbers = iter(range(1, 100))

    def say(request: Request) -> str:
        if "Choice 1:" in last(request):
            return "Well. The best choice is 2"
        return f"thought-{next(numbers)}" if "Write down thought" in last(request) else "done"

    (response,), script = ask([SA], "tot", say)
    assert response.thoughts == ["thought-2", "thought-5"]  # of 1 2 3, then of 4 5 6 grown from thought-2
    assert "thought-2\nthought-5" in last(script.requests[-1])
    assert "So far:\nthought-2\n" in last(script.steps[2][0])
    assert response.tree["levels"][0]["scores"] == [0, 3, 0] and response.tree["unread_votes"] == 0


def test_votes_that_cannot_be_read_are_dropped_and_counted() -> None:
    votes = iter(["hm", "The best choice is 9", "The best choice is 3"] * 2)
    numbers = iter(range(1, 100))

    def say(request: Request) -> str:
        return next(votes) if "Choice 1:" in last(request) else f"thought-{next(numbers)}"

    (response,), _ = ask([MC], "tot", say)
    assert response.thoughts[0] == "thought-3" and response.tree["unread_votes"] == 4


def test_candidates_can_be_valued_one_by_one() -> None:
    numbers = iter(range(1, 100))

    def say(request: Request) -> str:
        if "number from 0 to 1" in last(request):
            return "0.9" if "thought-1" in last(request) and "thought-10" not in last(request) else "I say 0.2."
        return f"thought-{next(numbers)}"

    (response,), script = ask([SA], "tot", say, tot_eval="value", tot_votes=2, tot_depth=1)
    assert [len(step) for step in script.steps] == [3, 6, 1]
    assert response.thoughts == ["thought-1"] and response.tree["levels"][0]["scores"] == [0.9, 0.2, 0.2]


def test_a_tree_without_a_thought_has_no_answer() -> None:
    (response,), script = ask([SA], "tot", lambda r: Failure("http 500", 7))
    assert (response.state, response.text, len(script.steps)) == ("exhausted", None, 1)


def test_thoughts_and_votes_are_samples_of_their_own_and_twins_are_one_candidate() -> None:
    (response,), script = ask(
        [SA], "tot", lambda r: "The best choice is 1" if "Choice 1:" in last(r) else "same", tot_depth=1
    )
    assert [[r.sample for r in step] for step in script.steps] == [[0, 1, 2], [0, 1, 2], [0]]
    assert response.tree["levels"] == [{"candidates": 1, "scores": [3.0]}]


def test_candidates_with_as_many_votes_go_on_in_the_order_they_came() -> None:
    numbers = iter(range(1, 100))
    (response,), _ = ask([SA], "tot", lambda r: "hm" if "Choice 1:" in last(r) else f"t{next(numbers)}", tot_depth=1)
    assert response.thoughts == ["t1"]


def test_a_filtered_thought_is_no_candidate_and_a_value_that_cannot_be_read_is_left_out_of_the_mean() -> None:
    said = iter([reply("cut", "content_filter"), reply("one"), reply("two")])
    values = iter(["0.4", "hm", "0.9", "0.1"])

    def say(request: Request) -> str | Outcome:
        if "number from 0 to 1" in last(request):
            return next(values)
        return next(said) if "Write down thought" in last(request) else "done"

    (response,), _ = ask([SA], "tot", say, tot_eval="value", tot_votes=2, tot_depth=1)
    assert response.thoughts == ["two"]
    assert response.tree == {"levels": [{"candidates": 2, "scores": [0.4, 0.5]}], "unread_votes": 1}


def test_a_level_without_a_thought_ends_in_the_state_of_its_first_call() -> None:
    said = iter([Failure("timeout", 1), Failure("http 500", 1), Failure("empty answer", 1)])
    (response,), _ = ask([SA], "tot", lambda r: next(said))
    assert response.state == "timeout"


@pytest.mark.parametrize(
    ("text", "vote"),
    [
        ("The best choice is 2", 1),
        ("the best choice is 1. No: the best choice is **3**", 2),
        ("2", 1),
        ("Choice 2.", 1),
        ("The best choice is 4", None),
        ("The best choice is 0", None),
        ("1 or 2", None),
        ("", None),
        ("the best choice is 99999999999999999999", None),
    ],
)
def test_a_vote_is_read_or_dropped(text: str, vote: int | None) -> None:
    assert read_vote(text, 3) == vote


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.5", 0.5), ("1", 1.0), ("0", 0.0), ("about .25", 0.25), ("7", None), ("1.5", None), ("", None)],
)
def test_a_value_is_read_or_dropped(text: str, value: float | None) -> None:
    assert read_value(text) == value


# --- as released -----------------------------------------------------------------------------------------------------


def test_the_released_profile_glues_answers_onto_user_messages() -> None:
    """Spec check 12: the context, i + 1 questions with the answers before, and nobody ever speaks as the assistant."""
    _, script = ask(GROUP, "zs+sys", numbered(), profile="released")
    for turn, request in enumerate(script.requests):
        assert [role for role, _ in request.messages] == ["system", "user"] + ["user"] * (turn + 1)
        assert request.messages[1] == ("user", "About trees.")
        for earlier in range(turn):
            assert request.messages[2 + earlier][1].endswith(f"reply {earlier}")
        assert request.messages[0] == script.requests[0].messages[0]
    texts = [text for _, text in script.requests[2].messages[2:]]
    assert texts[0].count("Example ") == texts[2].count("Example ") == 3  # repeated on every turn, zero-shot or not
    assert all(r.temperature == 1.0 and r.max_tokens == 945 for r in script.requests)


def test_the_released_tree_takes_seven_calls_and_its_first_thought_always_wins() -> None:
    """Spec check 26: think and vote three times, then solve from the first thought, whatever the votes say."""
    numbers = iter(range(1, 100))
    (response,), script = ask([SA], "tot", lambda r: f"thought-{next(numbers)}", profile="released")
    assert [step.name for step in response.steps] == ["thought", "vote"] * 3 + ["answer"]
    assert "thought-1" in last(script.requests[-1]) and "thought-3" not in last(script.requests[-1])
    assert " ".join("thought-1") in last(script.requests[1])
    assert {r.temperature for r in script.requests} == {1.0}
    (_,), script = ask([SA], "tot", profile="released", compat="tot-temperature")
    assert [r.temperature for r in script.requests] == [1.0] + [50.0] * 6
    (response,), script = ask(GROUP[:1], "tot", profile="released")
    assert len(script.requests) == 1  # with a context its tree is never grown


def test_the_released_thoughts_are_told_apart_so_that_none_is_answered_from_another() -> None:
    _, script = ask([SA], "tot", profile="released")
    assert [r.sample for r in script.requests[:-1]] == [0, 0, 1, 1, 2, 2]


def test_the_released_thought_sees_no_context_and_its_limit_sticks_only_when_asked_for() -> None:
    _, script = ask(GROUP, "cot", numbered(), profile="released")
    assert [r.max_tokens for r in script.requests] == [945, 128, 945, 945]
    assert len(script.requests[1].messages) == 1 and "About trees." not in last(script.requests[1])
    _, script = ask(GROUP, "cot", numbered(), profile="released", compat="thought-limit")
    assert [r.max_tokens for r in script.requests] == [945, 128, 128, 128]


def test_the_original_texts_are_read_and_not_run(tmp_path: Path) -> None:
    names = ["MULTICHOICE_STD", "SHORTANS", "MATH"]
    kinds = [f"{name}_{shot}{cot}" for name in names for shot in ("ZS", "FS") for cot in ("", "_COT")]
    qa = [f'{name} = """{name}: {{input}} costs {{{{x}}}}"""' for name in [*kinds, "SHORTANS_ZS_COT_ST1"]]
    qa = [line.replace("}}", "}} {thought}") if line.startswith("SHORTANS_ZS_COT =") else line for line in qa]
    (tmp_path / "qa_prompt.py").write_text("\n".join([*qa, "open('ran', 'w')"]))
    systems = [f'SYS_PROMPT_{name} = """{name} {{{{}}}}"""' for name in ("MULTICHOICE", "SHORTANS", "MATH")]
    (tmp_path / "sys_prompt.py").write_text("\n".join(systems))
    _, script = ask([SA], "cot+sys", lambda r: "hm", profile="released", prompts=tmp_path)
    assert [last(r) for r in script.requests] == [
        f"SHORTANS_ZS_COT_ST1: {SA.question} costs {{x}}",
        f"SHORTANS_ZS_COT: {SA.question} costs {{x}} hm",
    ]
    assert script.requests[1].messages[0] == ("system", "SHORTANS {{}}")  # never formatted, so its braces stay double
    assert not (tmp_path / "ran").exists() and not Path("ran").exists()
    (tmp_path / "sys_prompt.py").write_text("")
    with pytest.raises(MissingError, match="SYS_PROMPT_MATH is not defined"):
        method("sys", profile="released", prompts=tmp_path)


def test_the_digest_of_the_wording_follows_every_text(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("Be brief.")
    options: list[dict[str, Any]] = [{}, {"shots": 2}, {"system": tmp_path / "s"}, {"profile": "released"}]
    found = {method(s, **o).wording.sha256() for s in ("fs", "fs+cot", "fs+sys") for o in options}
    assert len(found) >= 9 and method("fs").wording.sha256() in found


def test_a_demonstration_file_that_holds_none_or_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    for content in (
        "",
        '{"type": "sa", "question": null, "answer": "x"}',
        '{"type": "mc", "question": "q", "answer": "0", "options": "ab"}',
        '{"type": "sa", "question": "\\ud800", "answer": "x"}',
        '{"type": "sa", "question": "q", "answer": "x", "n": ' + "[" * 9000,
    ):
        path.write_text(content)
        with pytest.raises(UsageError, match="demonstration"):
            method("fs", shot_file=path)
    path.write_bytes(b'\xef\xbb\xbf{"type": "sa", "question": "Own\xe2\x80\xa8line?", "answer": "x"}\r\n')
    assert "Own\u2028line?" in last(ask([SA], "fs", shot_file=path)[1].requests[0])


def test_released_texts_too_deep_to_parse_cannot_be_read(tmp_path: Path) -> None:
    for content in ("-" * 100_000 + "1", "(" * 5000, "x = '\0'"):
        (tmp_path / "qa_prompt.py").write_text(content)
        with pytest.raises(MissingError, match="qa_prompt"):
            method("zs", profile="released", prompts=tmp_path)


def test_a_question_in_a_released_text_keeps_its_braces(tmp_path: Path) -> None:
    names = ("MULTICHOICE_STD", "SHORTANS", "MATH")
    (tmp_path / "qa_prompt.py").write_text("\n".join(f"{name}_ZS = '{{input}} {{{{x}}}}'" for name in names))
    (tmp_path / "sys_prompt.py").write_text("")
    odd = Question("o", "sa", "{{a}} {thought} {input}", ("y",), "ot")
    assert last(ask([odd], "zs", profile="released", prompts=tmp_path)[1].requests[0]) == f"{odd.question} {{x}}"


# --- states and plans ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        (reply("x"), "ok"),
        (reply("x", "length"), "truncated"),
        (reply("no", "refusal"), "refused"),
        (reply("", "content_filter"), "filtered"),
        (Failure("empty answer", 1), "empty"),
        (Failure("malformed body", 7), "bad_response"),
        (Failure("no choices", 7), "bad_response"),
        (Failure("error in body", 7), "bad_response"),
        (Failure("timeout", 7), "timeout"),
        (Failure("connection", 7), "exhausted"),
        (Failure("rate limited", 7), "exhausted"),
        (Failure("http 503", 7), "exhausted"),
        (Failure("http 400", 1), "http_4xx"),
        (Failure("context overflow", 1), "context_overflow"),
        (Failure("not valid Unicode", 1), "http_4xx"),
        (Unasked("budget exhausted"), "budget"),
    ],
)
def test_every_call_ends_in_one_state(outcome: Outcome, state: str) -> None:
    assert state_of(outcome) == state
    (response,), _ = ask([SA], "zs", lambda r: outcome)
    assert response.state == state and (response.text is not None) == (state in ("ok", "truncated", "refused"))


@pytest.mark.parametrize(
    ("strategy", "options", "calls", "without"),
    [
        ("zs", {}, 378, 378),
        ("cot", {}, 570, 570),
        ("fs+cot", {}, 378, 378),
        ("sc", {}, 378, 696),
        ("cot+sc", {}, 570, 888),
        ("tot", {"profile": "released", "context": "without"}, 1463, 1463),
        ("tot", {"context": "without"}, 209 * 6, 209 * 16),
    ],
)
def test_the_plan_counts_the_calls(
    strategy: str, options: dict[str, Any], calls: int, without: int, tmp_path: Path
) -> None:
    """Spec check 11."""
    data = load([str(write(tmp_path / "d.jsonl", synthetic()))])
    config = Config(strategy=strategy, price_in=1.0, price_out=2.0, **options)
    found = plan(select(data, context=config.context), open_method(config, Settings()), config)
    assert (found["calls"], found["calls_without_n"]) == (calls, without)
    expected = (found["prompt_tokens"] + 2 * found["completion_tokens"]) / 1e6
    assert found["cost"] == pytest.approx(expected, abs=1e-6)
