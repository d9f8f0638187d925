"""The prompts: what stands before an answer when the model is told the question (Q in Eq. 3).

A template's text is filled in one pass, so braces inside a record are only ever text. The wording of the built-in ones
is a protocol constant: scores are comparable only when it is exact.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pomona.errors import MissingError, UsageError
from pomona.io.conversation import Turn

_SLOT = re.compile(r"\{(instruction|input)\}")
_SECTIONS = re.compile(r"^---\r?\n", re.MULTILINE)

# r-IFD (2402.10110, section 3): the answer is given and the instruction guessed. Our wording.
_GUESS = (
    "Here is a response that was written to follow an instruction.\n{instruction}\n"
    "Write the instruction that it follows."
)


class Template(Protocol):
    """Renders the context of an answer; `scaffold` is the part of it that a direct pass keeps (cherry)."""

    @property
    def scaffold(self) -> str: ...

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The text before the last turn's answer; earlier turns are shown with theirs."""
        ...

    def instruction(self, turns: Sequence[Turn]) -> str:
        """The text that pre-experience measures a record by (section 2.1)."""
        ...


def fill(text: str, turn: Turn) -> str:
    """`text` with its slots replaced by the turn's fields, which are not searched for slots themselves."""
    return _SLOT.sub(lambda slot: turn.instruction if slot[1] == "instruction" else turn.input, text)


@dataclass(frozen=True, slots=True)
class TextTemplate:
    """A fixed text with slots.

    A conversation is the preamble, then its turns' texts and answers with `gap` between an answer and the next turn.
    """

    with_input: str
    without_input: str
    scaffold: str = ""
    preamble_with_input: str = ""
    preamble_without_input: str = ""
    gap: str = "\n"
    bare_instruction: bool = False

    def _turn(self, turn: Turn) -> str:
        return fill(self.with_input if turn.input else self.without_input, turn)

    def prompt(self, turns: Sequence[Turn]) -> str:
        earlier = "".join(self._turn(turn) + turn.output + self.gap for turn in turns[:-1])
        preamble = self.preamble_with_input if turns[0].input else self.preamble_without_input
        return preamble + earlier + self._turn(turns[-1])

    def instruction(self, turns: Sequence[Turn]) -> str:
        return turns[-1].instruction if self.bare_instruction else self.prompt(turns)


class ChatTemplate:
    """The chat template that comes with a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """UsageError when the tokenizer has none."""
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                "--template chat: this model's tokenizer has no chat template", hint="use --template plain"
            )
        self._tokenizer = tokenizer
        question = [{"role": "user", "content": "?"}]
        asked, opened = self._render(question, False), self._render(question, True)
        self._scaffold = opened.removeprefix(asked) if opened.startswith(asked) else ""

    @property
    def scaffold(self) -> str:
        return self._scaffold

    def _render(self, messages: list[dict[str, str]], open_answer: bool) -> str:
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_answer)
        return str(text)

    def prompt(self, turns: Sequence[Turn]) -> str:
        messages = []
        for turn in turns:
            question = f"{turn.instruction}\n{turn.input}" if turn.input else turn.instruction
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": turn.output}]
        return self._render(messages[:-1], True)

    def instruction(self, turns: Sequence[Turn]) -> str:
        return self.prompt(turns)


# Stanford Alpaca's prompt, as the Cherry and Reflection-Tuning scripts use it: nothing after the colon.
_ALPACA = TextTemplate(
    with_input="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    without_input="### Instruction:\n{instruction}\n\n### Response:",
    scaffold="### Response:",
    preamble_with_input=(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
    ),
    preamble_without_input=(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    ),
    gap="\n\n",
)
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
_BUILT_IN = {
    "alpaca": _ALPACA,
    "wizardlm": TextTemplate(
        "{instruction}\nInput:{input}\n\n### Response:",
        "{instruction}\n\n### Response:",
        "### Response:",
        gap="\n\n",
        bare_instruction=True,
    ),
    "wizardlm-v2": TextTemplate(
        "{instruction}\n{input}\n\n### Response:", "{instruction}\n\n### Response:", "### Response:", gap="\n\n"
    ),
    "vicuna": TextTemplate(
        "USER: {instruction}\nInput:\n{input} ASSISTANT:",
        "USER: {instruction} ASSISTANT:",
        "ASSISTANT:",
        _VICUNA_SYSTEM,
        _VICUNA_SYSTEM,
        gap=" ",
    ),
    "plain": TextTemplate("{instruction}\n{input}\n", "{instruction}\n"),
}


def load(name: str, tokenizer: Any) -> Template:
    """The template called `name`: built in, ``chat`` (the tokenizer's own), or a file.

    Raises:
        MissingError: it is none of these.
        UsageError: the file names no {instruction}, or there is no chat template.
    """
    if name == "chat":
        return ChatTemplate(tokenizer)
    return _BUILT_IN[name] if name in _BUILT_IN else read(Path(name))


def read(path: Path) -> TextTemplate:
    """A template file: a text with {instruction} and {input}; after a line ``---``, the text for records without input.

    One newline at the end of each text belongs to the file, not to the prompt. A file of one text serves records
    without input with {input} left empty.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise MissingError(
            f"--template {path}: {reason}", hint="alpaca, wizardlm, wizardlm-v2, vicuna, plain, chat, or a text file"
        ) from error
    texts = [re.sub(r"\r?\n\Z", "", part) for part in _SECTIONS.split(text, maxsplit=1)]
    if not all("{instruction}" in part for part in texts):
        raise UsageError(f"--template {path}: every text in it must hold {{instruction}}")
    return TextTemplate(texts[0], texts[-1])


def reversed_turn(turn: Turn) -> Turn:
    """The r-IFD question about `turn`: its answer is asked about, its instruction and input are the answer."""
    return Turn(fill(_GUESS, Turn(turn.output, "", "")), "", turn.instruction + turn.input)
