"""The prompts are protocol constants; these tests spell them out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pomona.errors import MissingError, UsageError
from pomona.io.conversation import Turn
from pomona.methods.ifd_score.templates import load, read, reversed_turn

BARE, FULL = Turn("Do {input} it.", "", "A"), Turn("Do it.", "17", "B")
ALPACA_BARE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nDo {input} it.\n\n### Response:"
)
ALPACA_FULL = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nDo it.\n\n### Input:\n17\n\n### Response:"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: "
)


@pytest.mark.parametrize(
    ("name", "bare", "full", "scaffold"),
    [
        ("alpaca", ALPACA_BARE, ALPACA_FULL, "### Response:"),
        ("wizardlm", "Do {input} it.\n\n### Response:", "Do it.\nInput:17\n\n### Response:", "### Response:"),
        ("wizardlm-v2", "Do {input} it.\n\n### Response:", "Do it.\n17\n\n### Response:", "### Response:"),
        ("vicuna", VICUNA + "Do {input} it. ASSISTANT:", VICUNA + "Do it.\nInput:\n17 ASSISTANT:", "ASSISTANT:"),
        ("plain", "Do {input} it.\n", "Do it.\n17\n", ""),
    ],
)
def test_built_in_wording(name: str, bare: str, full: str, scaffold: str) -> None:
    template = load(name, None)
    assert template.prompt([BARE]) == bare
    assert template.prompt([FULL]) == full
    assert template.scaffold == scaffold


def test_pre_experience_measures_the_bare_instruction_under_wizardlm_and_the_whole_prompt_under_alpaca() -> None:
    assert load("wizardlm", None).instruction([FULL]) == "Do it."
    assert load("alpaca", None).instruction([FULL]) == ALPACA_FULL


def test_earlier_turns_stand_before_the_last_with_their_answers_and_one_preamble() -> None:
    turns = [Turn("i1", "", "a1"), Turn("i2", "", "a2"), Turn("i3", "", "never shown")]
    assert load("plain", None).prompt(turns) == "i1\na1\ni2\na2\ni3\n"
    alpaca = load("alpaca", None).prompt(turns)
    assert alpaca.count("Below is an instruction") == 1
    assert alpaca.endswith("### Response:a2\n\n### Instruction:\ni3\n\n### Response:")


def test_the_chat_template_is_the_tokenizers_and_its_answer_mark_is_the_scaffold(tokenizer: Callable[..., Any]) -> None:
    template = load("chat", tokenizer())
    assert template.prompt([FULL]) == "<|user|>Do it.\n17<|end|><|assistant|>"
    assert template.prompt([BARE, FULL]) == (
        "<|user|>Do {input} it.<|end|><|assistant|>A<|end|><|user|>Do it.\n17<|end|><|assistant|>"
    )
    assert template.scaffold == "<|assistant|>"


def test_a_tokenizer_without_chat_template_is_refused(tokenizer: Callable[..., Any]) -> None:
    bare = tokenizer()
    bare.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        load("chat", bare)


def test_a_file_may_hold_one_text_or_two(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("Q: {instruction} ({input})\nA:\n---\nQ: {instruction}\nA:\n")
    assert read(path).prompt([FULL]) == "Q: Do it. (17)\nA:"
    assert load(str(path), None).prompt([BARE]) == "Q: Do {input} it.\nA:"
    path.write_text("{instruction}{other}{input}")
    assert read(path).prompt([BARE]) == "Do {input} it.{other}"


def test_an_unusable_template_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="--template alpacca"):
        load("alpacca", None)
    (tmp_path / "t").write_text("{input}")
    with pytest.raises(UsageError, match="instruction"):
        read(tmp_path / "t")
    (tmp_path / "t").write_bytes(b"\xff{instruction}")
    with pytest.raises(MissingError, match="UTF-8"):
        read(tmp_path / "t")


def test_reverse_asks_for_the_instruction_and_keeps_braces_in_the_answer() -> None:
    turn = reversed_turn(Turn("Say it", " twice", "{instruction} {input}"))
    assert "{instruction} {input}" in turn.instruction
    assert (turn.input, turn.output) == ("", "Say it twice")
