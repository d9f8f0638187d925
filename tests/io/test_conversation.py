"""The same exchange is found in every layout, and a record without one says which field is wrong."""

from __future__ import annotations

import pytest

from pomona.io.conversation import BadRecord, Fields, Turn, turns

PLAIN = Fields()


def test_flat_chat_and_sharegpt_say_the_same() -> None:
    flat = {"instruction": "q", "output": "a"}
    messages = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    parts = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "content": "a"},
        ]
    }
    sharegpt = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    for record in (flat, messages, parts, sharegpt):
        assert turns(record, PLAIN) == (Turn("q", "", "a"),)


@pytest.mark.parametrize("record", [{}, {"input": ""}, {"input": None}])
def test_an_input_is_absent_when_missing_null_or_empty(record: dict[str, object]) -> None:
    assert turns({"instruction": "q", "output": "a", **record}, PLAIN)[0].input == ""


def test_white_space_is_an_input() -> None:
    assert turns({"instruction": "q", "output": "a", "input": " "}, PLAIN)[0].input == " "


def test_system_and_consecutive_user_messages_stand_before_the_turn() -> None:
    record = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q1"},
            {"role": "assistant", "content": "a1"},
            {"role": "user", "content": "q2"},
            {"role": "user", "content": "q3"},
            {"role": "assistant", "content": "a2"},
        ]
    }
    assert turns(record, PLAIN) == (Turn("s\nq1", "", "a1"), Turn("q2\nq3", "", "a2"))


def test_field_names_can_be_changed() -> None:
    record = {"prompt": "q", "context": "x", "response": "a"}
    assert turns(record, Fields("prompt", "context", "response")) == (Turn("q", "x", "a"),)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "q"}, 'field "output" is missing (use --output-field)'),
        ({"output": "a"}, 'field "instruction" is missing'),
        ({"instruction": "q", "output": None}, 'field "output" is null, not text'),
        ({"instruction": 3, "output": "a"}, 'field "instruction" is a number'),
        ({"instruction": "q", "output": "a", "input": ["x"]}, 'field "input" is a list'),
        ({"messages": []}, "no assistant message"),
        ({"messages": [{"role": "user", "content": "q"}]}, "no assistant message"),
        ({"messages": ["q"]}, '"messages[0]" is text, not an object'),
        ({"messages": [{"role": "tool", "content": "q"}]}, 'no known "role"'),
        ({"conversations": [{"from": "human", "value": None}]}, '"conversations[0].value" is null'),
    ],
)
def test_a_bad_record_names_the_field(record: dict[str, object], message: str) -> None:
    with pytest.raises(BadRecord) as caught:
        turns(record, PLAIN)
    assert message in str(caught.value)
