"""What the judge is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from pomona.errors import MissingError, UsageError
from pomona.io.conversation import Turn
from pomona.methods.alpagasus_filter.prompts import open_prompt, triplet

ADD = (Turn("Add the numbers.", "2 3", "5"),)
NO_INPUT = (Turn("Say hello.", "", "Hello!"),)
THREE = (Turn("Hi", "", "Hello"), Turn("Add", "1 1", "2"), Turn("And again", "2 2", "4"))


def test_the_triplet_has_the_released_headers_and_keeps_the_header_of_an_absent_input() -> None:
    assert triplet(ADD) == "###Instruction:\nAdd the numbers.\n\n### Input:\n2 3\n\n### Response:\n5\n\n"
    assert triplet(NO_INPUT) == "###Instruction:\nSay hello.\n\n### Input:\n\n\n### Response:\nHello!\n\n"


def test_repo_puts_the_record_and_then_the_rubric_into_the_user_message() -> None:
    (role_s, system), (role_u, user) = open_prompt("repo", dimension="accuracy", low=0, high=5).messages(ADD)
    assert (role_s, role_u) == ("system", "user")
    assert "feedback on the performance of AI assistant" in system and "###" not in system
    assert user.startswith(triplet(ADD) + "Please rate according to the accuracy of the response")
    assert "on a scale of 0 to 5, where a higher score indicates higher level of the accuracy." in user
    assert "a single line containing value indicating the scores." in user
    assert user.endswith("avoiding any potential bias. \n\n")


def test_paper_puts_the_record_into_the_system_message() -> None:
    (_, system), (_, user) = open_prompt("paper", dimension="helpfulness", low=0, high=5).messages(ADD)
    assert system.endswith("\n\nInstruction: Add the numbers.\nInput: 2 3\nResponse: 5")
    assert user.startswith("Please rate according to the helpfulness") and user.endswith("bias.")
    assert "containing the value indicating the scores" in user


def test_rubric_first_shares_everything_before_the_record_between_records() -> None:
    prompt = open_prompt("rubric-first", dimension="accuracy", low=0, high=5)
    (_, system), (_, one) = prompt.messages(ADD)
    (_, other_system), (_, other) = prompt.messages(NO_INPUT)
    shared = one[: one.index("###Instruction:")]
    assert system == other_system and other.startswith(shared) and "scale of 0 to 5" in shared
    assert one.endswith("### Response:\n5")


def test_a_scale_is_named_as_given() -> None:
    _, (_, user) = open_prompt("repo", dimension="style", low=1, high=10).messages(ADD)
    assert "on a scale of 1 to 10," in user


def test_earlier_turns_stand_in_the_instruction_block_and_only_the_last_answer_is_the_response() -> None:
    assert triplet(THREE) == (
        "###Instruction:\nUser: Hi\n\nAssistant: Hello\n\nUser: Add\n1 1\n\nAssistant: 2\n\nUser: And again"
        "\n\n### Input:\n2 2\n\n### Response:\n4\n\n"
    )


def test_braces_in_a_record_or_dimension_are_never_filled(tmp_path: Path) -> None:
    hostile = (Turn("{output} {0} {dimension} %s {{x}}", "{input.__class__}", "{instruction} \\1 \\g<0>"),)
    for name in ("repo", "paper", "rubric-first"):
        prompt = open_prompt(name, dimension="{output}", low=0, high=5)
        text = "".join(content for _, content in prompt.messages(hostile))
        assert "{output} {0} {dimension} %s {{x}}" in text
        assert "{instruction} \\1 \\g<0>" in text
        assert "according to the {output} of" in text
    file = tmp_path / "prompt.txt"
    file.write_text("Q {instruction} X {input} A {output} D {dimension} {other} {low}-{high}", encoding="utf-8")
    ((role, text),) = open_prompt(str(file), dimension="depth", low=0, high=5).messages(hostile)
    assert role == "user"
    assert text == (
        "Q {output} {0} {dimension} %s {{x}} X {input.__class__} A {instruction} \\1 \\g<0> D depth {other} 0-5"
    )


def test_a_prompt_file_must_exist_and_show_the_answer(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"nowhere\.txt"):
        open_prompt(str(tmp_path / "nowhere.txt"), dimension="accuracy", low=0, high=5)
    file = tmp_path / "prompt.txt"
    file.write_text("Rate {instruction}", encoding="utf-8")
    with pytest.raises(UsageError, match=r"\{output\} does not occur"):
        open_prompt(str(file), dimension="accuracy", low=0, high=5)


def test_asking_again_continues_the_conversation() -> None:
    prompt = open_prompt("repo", dimension="accuracy", low=0, high=5)
    messages = prompt.messages(ADD)
    again = prompt.again(messages, "Good answer!")
    assert again[: len(messages)] == messages
    assert again[-2] == ("assistant", "Good answer!")
    assert again[-1] == ("user", "Answer with one number from 0 to 5 and nothing else.")
