"""p_G: what the judge is asked (paper Fig. 3), in the layouts that exist."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pomona.errors import MissingError, UsageError
from pomona.io.conversation import Turn

Messages = tuple[tuple[str, str], ...]
"""(role, content) pairs."""

# Protocol constants: the wording of the paper's Fig. 3. Ratings are only comparable when it is kept to the letter.
SYSTEM = (
    "We would like to request your feedback on the performance of AI assistant in response to the instruction and the "
    "given input displayed following."
)
RUBRIC = (
    "Please rate according to the {dimension} of the response to the instruction and the input. Each assistant "
    "receives a score on a scale of {low} to {high}, where a higher score indicates higher level of the {dimension}. "
    "Please first output a single line containing the value indicating the scores. In the subsequent line, please "
    "provide a comprehensive explanation of your evaluation, avoiding any potential bias."
)
# The released script's rubric lacks one article and ends in white space.
_RELEASED_RUBRIC = RUBRIC.replace("containing the value", "containing value") + " \n\n"

LAYOUTS = ("repo", "paper", "rubric-first")
_REASK = "Answer with one number from {low} to {high} and nothing else."
_PLACE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt with everything but the record filled in.

    Attributes:
        layout: one of `LAYOUTS`, or "file".
        dimension: what is rated, e.g. "accuracy".
        low, high: ends of the scale, as the judge reads them.
        template: text of a prompt file; empty for the named layouts.
    """

    layout: str
    dimension: str
    low: str = "0"
    high: str = "5"
    template: str = ""

    def messages(self, turns: Sequence[Turn]) -> Messages:
        """The chat messages that ask for a rating of the last answer of `turns`."""
        rubric = self._fill(_RELEASED_RUBRIC if self.layout == "repo" else RUBRIC)
        if self.layout == "repo":
            return ("system", SYSTEM), ("user", triplet(turns) + rubric)
        if self.layout == "paper":
            last = turns[-1]
            shown = f"Instruction: {instruction_block(turns)}\nInput: {last.input}\nResponse: {last.output}"
            return ("system", f"{SYSTEM}\n\n{shown}"), ("user", rubric)
        if self.layout == "rubric-first":
            return ("system", SYSTEM), ("user", f"{rubric}\n\n{triplet(turns).rstrip()}")
        return (("user", self._fill(self.template, turns)),)

    def again(self, messages: Messages, reply: str) -> Messages:
        """`messages` continued after a reply in which no rating could be read."""
        return (*messages, ("assistant", reply), ("user", self._fill(_REASK)))

    def _fill(self, text: str, turns: Sequence[Turn] = ()) -> str:
        """`text` with its places filled in one pass, so that braces inside a record stay what they are."""
        values = {"dimension": self.dimension, "low": self.low, "high": self.high}
        if turns:
            last = turns[-1]
            values |= {"instruction": instruction_block(turns), "input": last.input, "output": last.output}
        return _PLACE.sub(lambda place: values.get(place[1], place[0]), text)


def open_prompt(name: str, *, dimension: str, low: float, high: float) -> Prompt:
    """The prompt called `name`: a named layout, or the text of a file, sent as one user message.

    Raises:
        MissingError: `name` is neither.
        UsageError: the file does not show the answer.
    """
    ends = f"{low:g}", f"{high:g}"
    if name in LAYOUTS:
        return Prompt(name, dimension, *ends)
    try:
        template = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MissingError(
            f"--prompt {name}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})",
            hint=f"give one of {', '.join(LAYOUTS)}, or a text file",
        ) from error
    missing = [place for place in ("{instruction}", "{output}") if place not in template]
    if missing:
        raise UsageError(f"--prompt {name}: {' and '.join(missing)} does not occur in it")
    return Prompt("file", dimension, *ends, template)


def instruction_block(turns: Sequence[Turn]) -> str:
    """The last turn's instruction, after the exchange that led to it where there is one."""
    last = turns[-1]
    if len(turns) == 1:
        return last.instruction
    lines: list[str] = []
    for turn in turns[:-1]:
        lines += [f"User: {_asked(turn)}", f"Assistant: {turn.output}"]
    return "\n\n".join([*lines, f"User: {last.instruction}"])


def _asked(turn: Turn) -> str:
    return f"{turn.instruction}\n{turn.input}" if turn.input else turn.instruction


def triplet(turns: Sequence[Turn]) -> str:
    """Instruction, input and response as the released script stores them; an absent input keeps its header."""
    last = turns[-1]
    return (
        f"###Instruction:\n{instruction_block(turns)}\n\n### Input:\n{last.input}\n\n### Response:\n{last.output}\n\n"
    )
